"""The compression methods: each says in which metric the weights of a group are decomposed.

To add a method, subclass :class:`Method` and decorate it with :func:`register`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from freqrank.lowrank.factorize import Root
from freqrank.lowrank.scales import block_weights, channel_weights, input_scale, pooling

METHODS: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Pool:
    """The inputs of some layers, as weights that read them are decomposed with; the same for q, k and v.

    Attributes:
        root: of the pooled sum_l alpha_l G_l, or None for the identity.
        alpha: coefficient of each layer's Gram matrix in it.
        scales: of each layer's input, as the method measures it.
    """

    root: Root | None
    alpha: list[float]
    scales: list[float]

    @property
    def gram(self) -> Tensor | None:
        """The pooled matrix."""
        return None if self.root is None else self.root.gram


@dataclass(frozen=True)
class Method:
    """One way to decompose.

    Attributes:
        shares: whether several layers get one basis (else each weight is factored alone).
        switches: which of the following it has a use for.
        channels: what it needs to know of the input channels beside Gram matrices: None; "magnitude", sum_t |x_tj|;
            "gradient", the squared gradients of the loss by the weights that read channel j, summed. The last differs
            between linears that read the same input, and takes backward passes through the whole model.
        preset: switches of ``freqrank.compress`` that the method sets itself.
        scale, exponent, block_weight: the switches of ``freqrank.compress``.
    """

    name: ClassVar[str]
    shares: ClassVar[bool]
    switches: ClassVar[frozenset[str]] = frozenset()
    channels: ClassVar[str | None] = None
    preset: ClassVar[Mapping[str, Any]] = {}

    scale: str = "trace"
    exponent: float = 1.0
    block_weight: str | None = None

    @classmethod
    def spans_layers(cls) -> bool:
        """Whether ``group_size`` matters."""
        return cls.shares and cls.preset.get("share") != "modules"

    def pool(self, grams: Sequence[Tensor], tokens: int, channels: Sequence[Tensor] | None = None) -> Pool:
        """Of the Gram matrices [d1, d1] of some layers' inputs, sums over so many tokens.

        Args:
            channels: [d1] of each layer, what ``channels`` of the method says.
        """
        scales = [input_scale(gram, tokens, self.scale) for gram in grams]
        root, alpha = self.combine(grams, scales)
        return Pool(root, alpha, scales)

    def combine(self, grams: Sequence[Tensor], scales: Sequence[float]) -> tuple[Root | None, list[float]]:
        """The first two of a :class:`Pool`, from the layers' Gram matrices and scales."""
        raise NotImplementedError

    def block_weights(self, weights: Sequence[Tensor], scales: Sequence[float]) -> list[float]:
        """b of each weight [d1, d2] of a group, given the scale of each one's input."""
        return [1.0] * len(weights)


def register(method: type[Method]) -> type[Method]:
    """Make a method available under its name."""
    METHODS[method.name] = method
    return method


@register
class SVD(Method):
    """Plain truncated SVD of each weight; the calibration data only measures the error."""

    name = "svd"
    shares = False

    def combine(self, grams: Sequence[Tensor], scales: Sequence[float]) -> tuple[Root | None, list[float]]:
        return None, [1.0] * len(grams)


class Diagonal(Method):
    """The metric diag(s)^2: a weight for each input channel, each linear alone.

    The truncated SVD of diag(s) W with s taken out again is W V_k V_k^T (see
    :func:`freqrank.lowrank.factorize.decompose`), so nothing is divided by s. The SVD is exact.
    """

    shares = False

    def weights(self, values: Tensor) -> Tensor:
        """s [d1] of what is known of the channels."""
        raise NotImplementedError

    def pool(self, grams: Sequence[Tensor], tokens: int, channels: Sequence[Tensor] | None = None) -> Pool:
        if channels is None or len(channels) != 1:
            raise ValueError(f"{self.name} factors one linear alone and needs `channels`, its {self.channels}s")
        root = Root(self.weights(channels[0]).square().diag())
        return Pool(root, [1.0], [input_scale(gram, tokens, self.scale) for gram in grams])


@register
class ASVD(Diagonal):
    """Activation-aware SVD (Yuan et al., arXiv 2312.05821): s_j = (mean_t |x_tj|)^(exponent / 2), and 1e-6 of the mean.

    ``exponent=1``, the root, is what it was published with. Its search for ranks is ``allocation="sensitivity"``. The
    released code truncates by a randomised SVD without oversampling, which loses more; this is the exact one.
    """

    name = "asvd"
    switches = frozenset({"exponent"})
    channels = "magnitude"

    def weights(self, values: Tensor) -> Tensor:
        return channel_weights(values, self.exponent / 2)  # the sum for the mean: a common factor changes nothing


@register
class FWSVD(Diagonal):
    """Fisher-weighted SVD (Hsu et al., ICLR 2022, arXiv 2207.00112), on the side of the inputs.

    s_j^2 is the empirical Fisher information of the weights that read channel j, summed over outputs
    (`freqrank.models.whole.squared_gradients`), and s_j has 1e-6 of the mean added. Where the original adds nothing and
    divides by s, a channel without gradient has no solution.
    """

    name = "fwsvd"
    channels = "gradient"

    def weights(self, values: Tensor) -> Tensor:
        return channel_weights(values, 0.5)


@register
class SVDLLM(Method):
    """Truncation-aware whitening, each weight alone (SVD-LLM, Wang et al., ICLR 2025, arXiv 2403.07378).

    Its closed-form update is ``refit="sequential"``: both solve min_C ||X W - X B C||_F with the side of the factors
    that reads the input held fixed and X as the compressed blocks before make it. Here all calibration tokens take part
    (there 16 samples), and within a block a linear sees what the refitted ones before it give.
    """

    name = "svd-llm"
    shares = False

    def combine(self, grams: Sequence[Tensor], scales: Sequence[float]) -> tuple[Root | None, list[float]]:
        ones = [1.0] * len(grams)
        return Root(pooled(grams, ones)), ones


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
    switches = frozenset({"scale", "exponent", "block_weight"})

    def combine(self, grams: Sequence[Tensor], scales: Sequence[float]) -> tuple[Root | None, list[float]]:
        alpha = pooling(scales, self.exponent)
        return Root(pooled(grams, alpha)), alpha

    def block_weights(self, weights: Sequence[Tensor], scales: Sequence[float]) -> list[float]:
        return block_weights(weights, scales, self.block_weight)


@register
class Best(BasisSharing):
    """The switches that together lost least, or nearly so, on the bundled model's validation text: docs/compression.md.

    Both metrics at once, inputs as the compressed model gives them and outputs by their Fisher information, ranks where
    they lower the loss most, one basis for the linears of a layer that read the same input.
    """

    name = "best"
    preset: ClassVar[Mapping[str, Any]] = {
        "share": "modules",
        "statistics": "error-aware",
        "output_weight": "fisher",
        "allocation": "loss",
        "refit": "cross",
    }


def pooled(grams: Sequence[Tensor], alpha: Sequence[float]) -> Tensor:
    """sum_l alpha_l G_l."""
    if len(grams) == 1:
        return grams[0]  # a common factor changes nothing
    total = grams[0] * alpha[0]
    for gram, coefficient in zip(grams[1:], alpha[1:], strict=True):
        total.add_(gram, alpha=coefficient)
    return total
