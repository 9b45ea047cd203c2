"""The compression methods: each says in which metric the weights of a group are decomposed.

To add a method, subclass :class:`Method` and decorate it with :func:`register`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from freqrank.lowrank.scales import block_weights, input_scale, pooling

METHODS: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Metric:
    """What a group is decomposed with.

    Attributes:
        gram: the pooled sum_l alpha_l G_l, or None for the identity.
        alpha: coefficient of each layer's Gram matrix in it.
        block_weights: b of each weight.
    """

    gram: Tensor | None
    alpha: list[float]
    block_weights: list[float]


@dataclass(frozen=True)
class Method:
    """One way to decompose. ``shares``: whether several layers get one basis (else each weight is factored alone).

    Attributes:
        scale, exponent, block_weight: the switches of ``freqrank.compress``; a method uses what it has a use for.
    """

    name: ClassVar[str]
    shares: ClassVar[bool]

    scale: str = "trace"
    exponent: float = 1.0
    block_weight: str | None = None

    def metric(self, grams: Sequence[Tensor], tokens: int, weights: Sequence[Tensor], layers: Sequence[int]) -> Metric:
        """The metric of one group.

        Args:
            grams: [d1, d1] of each layer.
            tokens: how many tokens they sum over.
            weights: [d1, d2] each; ``layers``: which of ``grams`` each weight belongs to.
        """
        raise NotImplementedError


def register(method: type[Method]) -> type[Method]:
    """Make a method available under its name."""
    METHODS[method.name] = method
    return method


@register
class SVD(Method):
    """Plain truncated SVD of each weight; the calibration data only measures the error."""

    name = "svd"
    shares = False

    def metric(self, grams: Sequence[Tensor], tokens: int, weights: Sequence[Tensor], layers: Sequence[int]) -> Metric:
        return Metric(None, [1.0] * len(grams), [1.0] * len(weights))


@register
class SVDLLM(Method):
    """Truncation-aware whitening, each weight alone (SVD-LLM, Wang et al., ICLR 2025, arXiv 2403.07378)."""

    name = "svd-llm"
    shares = False

    def metric(self, grams: Sequence[Tensor], tokens: int, weights: Sequence[Tensor], layers: Sequence[int]) -> Metric:
        return Metric(pool(grams, [1.0] * len(grams)), [1.0] * len(grams), [1.0] * len(weights))


@register
class BasisSharing(SVDLLM):
    """One basis for several layers, from the sum of their Gram matrices (Wang et al., ICLR 2025, arXiv 2410.03765)."""

    name = "basis-sharing"
    shares = True


@register
class LISC(Method):
    """Basis sharing with layer-wise input scale calibration: alpha_l = (mean(s) / s_l)^exponent.

    Which definition of the scale the method's author used is not public; ``scale="trace"``, ``exponent=1`` is our
    reading. ``block_weight`` makes it blind to a factor moved between a layer's input and its weights.
    """

    name = "lisc"
    shares = True

    def metric(self, grams: Sequence[Tensor], tokens: int, weights: Sequence[Tensor], layers: Sequence[int]) -> Metric:
        scales = [input_scale(gram, tokens, self.scale) for gram in grams]
        alpha = pooling(scales, self.exponent)
        return Metric(
            pool(grams, alpha),
            alpha,
            block_weights(weights, [scales[layer] for layer in layers], self.block_weight),
        )


def pool(grams: Sequence[Tensor], alpha: Sequence[float]) -> Tensor:
    """sum_l alpha_l G_l."""
    if len(grams) == 1:
        return grams[0]  # a common factor changes nothing
    pooled = grams[0] * alpha[0]
    for gram, coefficient in zip(grams[1:], alpha[1:], strict=True):
        pooled.add_(gram, alpha=coefficient)
    return pooled
