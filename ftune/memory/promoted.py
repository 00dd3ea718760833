"""Copies that a CPU's kernel makes of operands whose dtype is not the one that is computed in.

`TensorIteratorBase::compute_types` of aten/src/ATen/TensorIterator.cpp, PyTorch 2.13: on a CPU each such operand is
copied before the result is made, and what is changed in place is computed beside itself first. A GPU converts as it
reads.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch

_PROMOTING = {
    *("add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "addcmul", "addcdiv", "where"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
}


def copied_bytes(operation: Any, arguments: Any) -> list[int]:
    """Return the sizes of the copies that a call makes of its operands."""
    name = operation._schema.name.removeprefix("aten::")
    if name.rstrip("_") not in _PROMOTING:
        return []
    operands = [value for value in arguments if isinstance(value, torch.Tensor)]
    if name == "where":
        operands = operands[1:]  # the condition is no operand
    if len({operand.dtype for operand in operands}) < 2:
        return []
    common = _common_dtype(operands)
    copied = [operand for operand in operands if operand.dtype != common]
    if name.endswith("_") and operands[0].dtype != common:
        copied.append(operands[0])
    return [operand.numel() * common.itemsize for operand in copied]


def _common_dtype(operands: list[torch.Tensor]) -> torch.dtype:
    """Return the dtype in which operands meet: a single number counts where it is of a higher kind.

    `torch.result_type` says the same of two, but asks whatever follows the operators here.
    """
    whole = [operand.dtype for operand in operands if operand.dim()] or [operand.dtype for operand in operands]
    common = reduce(torch.promote_types, whole)
    for operand in operands:
        if operand.dim() == 0 and _kind(operand.dtype) > _kind(common):
            common = torch.promote_types(common, operand.dtype)
    return common


def _kind(dtype: torch.dtype) -> int:
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else 0 if dtype == torch.bool else 1
