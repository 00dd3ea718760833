"""A weight in few bits: packed codes, with a scale and a floating-point offset for each group of inputs.

    W~[j, i] = scale[j, l(i)] * code[j, i] + offset[j, l(i)]        (QA-LoRA, arXiv 2309.14717, equation 1)

The offset is kept as it is, not as an integer zero-point: a number added to all weights of a group moves it and nothing
else, which is why an adapter over such groups merges exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from ftune.errors import RecipeError
from ftune.quantized.groups import uneven
from ftune.quantized.packing import pack, unpack

_BLOCK = 1 << 20
"""Weights dequantised at a time: 4 MB of float32 beside the result, whatever the size of the layer."""


@dataclass(frozen=True, eq=False)
class GroupCodes:
    """The weight of a linear layer (out_features, in_features) in groups along its inputs."""

    packed: torch.Tensor
    """uint8 (out_features, row_bytes)."""
    scale: torch.Tensor
    """Floating point (out_features, groups), never 0."""
    offset: torch.Tensor
    """Floating point (out_features, groups)."""
    bits: int
    in_features: int
    group_index: torch.Tensor | None = None
    """int64 (in_features,): the group of each input; None where groups are consecutive and equal."""

    @classmethod
    def of(
        cls,
        codes: torch.Tensor,
        scale: torch.Tensor,
        offset: torch.Tensor,
        bits: int,
        group_index: torch.Tensor | None = None,
    ) -> GroupCodes:
        """Pack uint8 codes (out_features, in_features)."""
        return cls(pack(codes, bits), scale, offset, bits, codes.shape[1], group_index)

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    @property
    def group_size(self) -> int:
        return self.in_features // self.groups

    @property
    def nbytes(self) -> int:
        tensors = (self.packed, self.scale, self.offset, self.group_index)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def codes(self) -> torch.Tensor:
        """Return the codes unpacked, uint8 (out_features, in_features)."""
        return unpack(self.packed, self.bits, self.in_features)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight (out_features, in_features); computed in float32, or in float64 where that is asked for."""
        weight = torch.empty(self.shape, dtype=dtype, device=self.packed.device)
        rows = max(1, _BLOCK // self.in_features)
        for start in range(0, self.out_features, rows):
            some = slice(start, start + rows)
            weight[some] = self._rows(some, torch.promote_types(dtype, torch.float32))
        return weight

    def _rows(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        codes = unpack(self.packed[rows], self.bits, self.in_features).to(dtype)
        scale, offset = self.scale[rows].to(dtype), self.offset[rows].to(dtype)
        if self.group_index is not None:
            return torch.addcmul(offset[:, self.group_index], codes, scale[:, self.group_index])
        grouped = codes.view(len(codes), self.groups, -1)
        return torch.addcmul(offset[..., None], grouped, scale[..., None]).view_as(codes)

    def shifted(self, delta: torch.Tensor) -> GroupCodes:
        """Return the codes with `delta` (out_features, groups) added to every weight of its group; no code moves."""
        return replace(self, offset=(self.offset.double() + delta.double()).to(self.offset.dtype))

    def to(self, target: torch.device | torch.dtype) -> GroupCodes:
        """Return the codes on a device, or with scale and offset in a dtype."""
        keeps = isinstance(target, torch.dtype)
        index = self.group_index
        return replace(
            self,
            packed=self.packed if keeps else self.packed.to(target),
            scale=self.scale.to(target),
            offset=self.offset.to(target),
            group_index=index if keeps or index is None else index.to(target),
        )


def require_groups(in_features: int, group_size: int, layer: str = "a layer", every: Iterable[int] = ()) -> None:
    """Raise RecipeError where the inputs of a layer are no whole number of groups."""
    if (problem := uneven(in_features, group_size, layer, every=every)) is not None:
        raise RecipeError(problem)
