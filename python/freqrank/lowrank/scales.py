"""Input scales, pooling coefficients and block weights of the layers that share a basis; weights of input channels.

Layer-wise input scale calibration (LISC) pools the Gram matrices of a group as sum_l alpha_l G_l with
alpha_l = (mean(s) / s_l)^exponent. Only relative values matter within a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "trace": lambda gram: gram.diagonal().mean(),
    "frobenius": lambda gram: gram.norm(),
    "spectral": lambda gram: torch.linalg.eigvalsh(gram)[-1],
}

#: How the scale s_l of a layer's input is measured from its Gram matrix ("none": 1 for every layer).
SCALES = (*_MEASURES, "none")
#: How the columns of each layer's weight are weighted before the decomposition.
BLOCK_WEIGHTS = (None, "norm", "sqrt-scale")

# What a channel that the statistic calls worthless weighs, beside the mean.
_FLOOR = 1e-6


def input_scale(gram: Tensor, tokens: int, kind: str = "trace") -> float:
    """Scale of a layer's input X [tokens, n], from ``gram`` = X^T X, for one token.

    "trace": mean square of an entry of X; "frobenius": ||G||_F / tokens; "spectral": largest eigenvalue of G / tokens;
    "none": 1.

    >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    >>> input_scale(x.T @ x, tokens=2), input_scale(x.T @ x, tokens=2, kind="spectral")
    (6.25, 12.5)
    """
    return 1.0 if kind == "none" else float(_MEASURES[kind](gram)) / max(tokens, 1)


def pooling(scales: Sequence[float], exponent: float = 1.0) -> list[float]:
    """alpha_l = (mean(s) / s_l)^exponent; 1 for a layer whose input is zero, where it makes no difference.

    >>> pooling([1.0, 3.0])
    [2.0, 0.6666666666666666]
    >>> pooling([1.0, 3.0], exponent=0.0)
    [1.0, 1.0]
    """
    mean = sum(scales) / len(scales)
    return [(mean / scale) ** exponent if scale > 0 else 1.0 for scale in scales]


def block_weights(weights: Sequence[Tensor], scales: Sequence[float], kind: str | None) -> list[float]:
    """b_l of each layer's weight W_l: 1 (None), 1 / ||W_l||_F ("norm") or sqrt(s_l) ("sqrt-scale"), of mean 1.

    With either of the two, and alpha of exponent 1, moving a factor between a layer's input and its weight changes
    nothing; without, it re-weights the layers.

    >>> block_weights([torch.ones(1, 1), torch.full((1, 1), 3.0)], [1.0, 1.0], "norm")
    [1.5, 0.5]
    """
    if kind is None:
        return [1.0] * len(weights)
    if kind == "norm":
        norms = [float(weight.norm()) for weight in weights]
        raw = [1 / norm if norm > 0 else math.nan for norm in norms]
    else:
        raw = [math.sqrt(scale) if scale > 0 else math.nan for scale in scales]
    known = [value for value in raw if not math.isnan(value)]
    mean = sum(known) / len(known) if known else 1.0
    return [1.0 if math.isnan(value) else value / mean for value in raw]  # zero weights or inputs: no influence


def by_depth(weights: Sequence[float], layers: Sequence[int], base: float) -> list[float]:
    """b_l base^-l of the layers of a group, of mean 1.

    >>> by_depth([1.0, 1.0], [4, 5], 3.0)
    [1.5, 0.5]
    """
    raw = [weight * base ** (layers[0] - layer) for weight, layer in zip(weights, layers, strict=True)]
    mean = sum(raw) / len(raw)
    return [value / mean for value in raw]


def channel_weights(values: Tensor, exponent: float) -> Tensor:
    """Weight of each input channel: (values / max)^exponent, plus 1e-6 of their mean; 1 where every value is zero.

    The floor keeps what is known about a channel without influence from being left to rounding. It is relative,
    where ASVD adds an absolute 1e-6: so a common factor on an input changes nothing, whatever its unit.

    Args:
        values: [n], float64, not negative.

    >>> channel_weights(torch.tensor([4.0, 0.0, 16.0], dtype=torch.float64), 0.5)
    tensor([5.0000e-01, 5.0000e-07, 1.0000e+00], dtype=torch.float64)
    >>> channel_weights(torch.zeros(2, dtype=torch.float64), 0.5)
    tensor([1., 1.], dtype=torch.float64)
    """
    if not bool(values.any()):
        return torch.ones_like(values)
    weights = (values / values.max()) ** exponent
    return weights + _FLOOR * weights.mean()
