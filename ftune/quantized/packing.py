"""Codes of 2, 3, 4 or 8 bits, packed into bytes without a bit left over.

A code is cut into planes whose width divides a byte: 3 bits are a plane of 2 and a plane of 1. Byte j of a plane holds
the codes j, j + n, j + 2n, ... of its row, n being the bytes of the plane, so that unpacking writes whole runs.
"""

from __future__ import annotations

import torch

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Widths of the planes of a code, lowest bits first."""


def row_bytes(columns: int, bits: int) -> int:
    """Return the bytes of one packed row: each plane is rounded up to a whole byte."""
    return sum(_plane_bytes(columns, width) for width in PLANES[bits])


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return uint8 codes (rows, columns), each below 2 ** bits, as bytes (rows, row_bytes)."""
    rows, columns = codes.shape
    planes, low = [], 0
    for width in PLANES[bits]:
        length, per_byte = _plane_bytes(columns, width), 8 // width
        plane = codes.new_zeros(rows, length * per_byte)
        plane[:, :columns] = (codes >> low) & (2**width - 1)
        packed = plane[:, :length].clone()
        for place in range(1, per_byte):
            packed |= plane[:, place * length : (place + 1) * length] << (place * width)
        planes.append(packed)
        low += width
    return torch.cat(planes, dim=1)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Return the uint8 codes (rows, columns) of packed bytes."""
    codes, start, low = None, 0, 0
    for width in PLANES[bits]:
        length, mask = _plane_bytes(columns, width), 2**width - 1
        plane = packed[:, start : start + length]
        part = torch.cat([(plane >> shift) & mask for shift in range(0, 8, width)], dim=1)[:, :columns]
        codes = part if codes is None else codes | (part << low)
        start, low = start + length, low + width
    assert codes is not None
    return codes


def _plane_bytes(columns: int, width: int) -> int:
    return -(-columns * width // 8)
