"""Factors as 8-bit integers: symmetric, with a scale for each row and no zero point."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["balanced", "from_int8", "rounded", "to_int8"]


def to_int8(rows: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Integers [n, m] from -127 to 127 and scales [n] in `dtype` (that of `rows` if None) for a matrix `rows` [n, m].

    A scale is what 128 stands for, so that it has the size of the row's largest entry: what 1 stands for may be too
    small for float16. Integers are rounded to the scale as it is stored, and rounding their numbers again gives the
    same (but for the last bit of scales in float64). A row of zeros has scale 0.

    >>> to_int8(torch.tensor([[1.0, -0.25], [0.0, 0.0]]))
    (tensor([[127, -32],
            [  0,   0]], dtype=torch.int8), tensor([1.0079, 0.0000]))
    """
    wide = rows.double()
    scale = (wide.abs().amax(1) * 128 / 127).to(dtype or rows.dtype)
    step = scale.double()[:, None] / 128
    integers = torch.where(step > 0, wide / step, 0.0).round().clamp(-127, 127)
    return integers.to(torch.int8), scale


def from_int8(integers: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers [n, m] in `dtype` that `integers` [n, m] and `scale` [n] stand for.

    >>> from_int8(torch.tensor([[127, -32]], dtype=torch.int8), torch.tensor([1.0]))
    tensor([[ 0.9922, -0.2500]])
    """
    return integers.to(dtype) * (scale.to(dtype)[:, None] / 128)


def rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`rows` [n, m], float64, as :func:`to_int8` stores them with scales of `dtype`."""
    return from_int8(*to_int8(rows, dtype), torch.float64)


def balanced(basis: Tensor, coefficients: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Factors B [d1, k] and C_l [k, d2] of the same products, where the largest entry of a direction in all C_l is 1.

    The integers of C_l have a scale for each output. How much larger one direction is than another belongs into B,
    which has a scale for each direction: errors of the outputs were up to 1.4 times as large without this.

    >>> balanced(torch.tensor([[1.0, 1.0]]), [torch.tensor([[4.0, 2.0], [0.5, 0.0]])])
    (tensor([[4.0000, 0.5000]]), [tensor([[1.0000, 0.5000],
            [1.0000, 0.0000]])])
    """
    largest = torch.stack([c.abs().amax(1) for c in coefficients]).amax(0)
    largest = torch.where(largest > 0, largest, 1.0)
    return basis * largest, [c / largest[:, None] for c in coefficients]
