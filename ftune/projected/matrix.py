"""Projecting a gradient to fewer rows or columns, a stretch of rows at a time.

A projection of rank r is a float32 matrix of r columns: (m, r) for the left of a gradient (m, n), whose projection is
(r, n), and (n, r) for its right, with projection (m, r).
"""

from __future__ import annotations

import torch

from ftune.fused.rule import row_slices


def project(gradient: torch.Tensor, projection: torch.Tensor, *, left: bool) -> torch.Tensor:
    """Return P^T G, or G P; float32 whatever the gradient is."""
    if left:
        found = torch.zeros(projection.shape[1], gradient.shape[1], dtype=torch.float32, device=gradient.device)
        for rows in row_slices(gradient):
            found.addmm_(projection[rows].T, gradient[rows].float())
        return found
    found = torch.empty(gradient.shape[0], projection.shape[1], dtype=torch.float32, device=gradient.device)
    for rows in row_slices(gradient):
        torch.mm(gradient[rows].float(), projection, out=found[rows])
    return found
