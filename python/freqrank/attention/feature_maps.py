"""Positive feature maps phi of queries and keys, all of the form feature(x P) * weights.

A map is put together from few parts: where its frequencies come from (:mod:`freqrank.attention.sampling`), what is done
to the products (softmax, exponential, both signs), a factor for each feature, a factor for each vector, a temperature.
``FEATURE_MAPS`` names the combinations that a model can be converted with; a new one is one entry there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from freqrank.attention.sampling import sample_frequencies, sample_scales, sample_signs

TRANSFORMS = ("idct", "dct")


@dataclass(frozen=True)
class FeatureMapKind:
    """What distinguishes one named map from another.

    Args:
        feature: "softmax", "exp" or "softmax_pm" (softmax over the products and their negatives: twice the features).
        frequencies: the columns of P. "idct" (x C diag(scales), as released) or "dct" (x C^T diag(scales), as in the
            paper); "gaussian", "orthogonal" or "sphere" (:func:`freqrank.attention.sampling.sample_frequencies`); or
            "learned": a matrix for each key head, trained, the identity at first (Hedgehog).
        radii: distribution of the scales of "idct" and "dct", see :func:`freqrank.attention.sampling.sample_scales`.
        points: the uniform points behind the frequencies, see :func:`freqrank.attention.sampling.uniform_points`.
        signs: flip the coordinates of x by fixed random signs before the transform.
        weighted: one learned weight a feature, 1 at first (the paper's D).
        prefactor: exponent a of exp(-a |x|^2) / sqrt(num_features) before "exp" features: 1/2 makes phi(q) . phi(k) an
            estimate of exp(q . k), 1 one of the Gaussian kernel exp(-|q - k|^2 / 2); 0 leaves the whole factor out.
    """

    feature: str
    frequencies: str
    radii: str = "normal"
    points: str = "random"
    signs: bool = False
    weighted: bool = False
    prefactor: float = 0.0


FEATURE_MAPS: dict[str, FeatureMapKind] = {
    # The released code: softmax(x C T), T ~ N(0, 1), nothing learned.
    "dijiang": FeatureMapKind("softmax", "idct"),
    # The same with both signs of every frequency, as hyperbolic random features have.
    "dijiang-pm": FeatureMapKind("softmax_pm", "idct", points="stratified", signs=True),
    # The paper's equation 12, D exp(T C x), radii of a normal vector; the signs tame inputs with a common mean.
    "wdcf": FeatureMapKind("exp", "dct", radii="chi", points="stratified", signs=True, weighted=True),
    # The same without D.
    "dcf": FeatureMapKind("exp", "dct", radii="chi", points="stratified", signs=True),
    # Performer's positive random features (Choromanski et al., ICLR 2021), and with orthogonal blocks.
    "prf": FeatureMapKind("exp", "gaussian", prefactor=0.5),
    "orthogonal-prf": FeatureMapKind("exp", "orthogonal", prefactor=0.5),
    # The paper's Theorems 3.2 and 3.3: quasi-Monte Carlo directions and radii, the Gaussian kernel; D for WPFF.
    "pff": FeatureMapKind("exp", "sphere", points="sobol", prefactor=1.0),
    "wpff": FeatureMapKind("exp", "sphere", points="sobol", prefactor=1.0, weighted=True),
    # A learned map for comparison: softmax(+-x W), W trained (Hedgehog, Zhang et al., ICLR 2024).
    "hedgehog": FeatureMapKind("softmax_pm", "learned"),
}


def feature_map_kind(name: str) -> FeatureMapKind:
    """The entry of ``FEATURE_MAPS`` called ``name``; ValueError with the known names otherwise.

    >>> feature_map_kind("dijiang").feature
    'softmax'
    """
    if not isinstance(name, str) or name not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(map(repr, FEATURE_MAPS))}; got {name!r}")
    return FEATURE_MAPS[name]


@torch.compiler.assume_constant_result  # or each compiled step would make it again, on the host
def dct_matrix(size: int, device: torch.device, transform: str = "idct", dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthonormal DCT-II matrix C [size, size]; row k is the k-th cosine (computed in fp64). For "dct", C^T.

    >>> c = dct_matrix(8, torch.device("cpu"))
    >>> torch.allclose(c @ c.T, torch.eye(8), atol=1e-6)
    True
    """
    return _dct_matrix(size, device, transform, dtype)


@lru_cache(maxsize=64)
def _dct_matrix(size: int, device: torch.device, transform: str, dtype: torch.dtype) -> Tensor:
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    c = torch.cos(torch.pi / (2 * size) * (2 * n + 1) * n[:, None]) * (2 / size) ** 0.5
    c[0] *= 0.5**0.5
    return (c if transform == "idct" else c.T.contiguous()).to(device, dtype)


def pretrained_temperature(kind: FeatureMapKind, head_dim: int) -> float:
    """The factor on x at which the map's kernel has the scale of a pretrained model's exp(q . k / sqrt(head_dim)).

    Frequencies of the length of a normal vector (about sqrt(head_dim)) give exp(q . k), so queries and keys are
    divided by head_dim^(1/4). Rows of a transform times standard normal radii, or an identity, are about sqrt(head_dim)
    times shorter and give exp(q . k / head_dim): multiplied by head_dim^(1/4).

    >>> pretrained_temperature(FEATURE_MAPS["dijiang"], 16), pretrained_temperature(FEATURE_MAPS["prf"], 16)
    (2.0, 0.5)
    """
    short = kind.frequencies == "learned" or (kind.frequencies in TRANSFORMS and kind.radii == "normal")
    return head_dim ** (0.25 if short else -0.25)


class Float32Module(nn.Module):
    """A module whose own tensors stay float32 when the model around it changes dtype; moves between devices as usual.

    The log of the decay and the frequencies need it: gamma = 0.998 rounded to bfloat16 is 1.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class FeatureMap(Float32Module):
    """phi(x) of one attention layer, the same for queries and keys.

    Args:
        head_dim: size K of a query.
        name: an entry of ``FEATURE_MAPS``, or a :class:`FeatureMapKind` of one's own.
        num_frequencies: columns M of the projection, by default ``head_dim``. Transforms have ``head_dim`` of them; of
            fewer the first are taken, and more are made of several transforms, those after the first behind random
            signs of their own. ``num_features`` is M, or 2M with both signs of each; the ops take up to 512.
        num_heads: key heads, each with a matrix of its own, of a learned map.
        temperature: factor on x, or "pretrained" (:func:`pretrained_temperature`). None: 1 for softmax features, as
            released, and "pretrained" for exponentials, which a trained model's vectors would overflow.
        device: where the tensors live.

    The tensors are empty until :meth:`reset_parameters`, or until a checkpoint fills them. The temperature is kept
    inside of them.

    Raises:
        ValueError: an unknown name, no frequencies, a temperature that is not positive.
    """

    scales: Tensor | None
    signs: Tensor | None
    frequencies: Tensor | None
    matrix: nn.Parameter | None
    weights: nn.Parameter | None

    def __init__(
        self,
        head_dim: int,
        name: str | FeatureMapKind = "dijiang",
        *,
        num_frequencies: int | None = None,
        num_heads: int = 1,
        temperature: float | str | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.name, self.head_dim = name, head_dim
        self.kind = kind = name if isinstance(name, FeatureMapKind) else feature_map_kind(name)
        self.num_frequencies = head_dim if num_frequencies is None else num_frequencies
        if self.num_frequencies < 1:
            raise ValueError(f"num_frequencies must be at least 1; got {num_frequencies}")
        self.num_features = self.num_frequencies * (2 if kind.feature == "softmax_pm" else 1)
        if temperature is None:
            temperature = "pretrained" if kind.feature == "exp" else 1.0
        self.temperature = pretrained_temperature(kind, head_dim) if temperature == "pretrained" else float(temperature)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f'temperature must be a positive number, "pretrained" or None; got {temperature!r}')

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        blocks = -(-self.num_frequencies // head_dim)
        is_transform = kind.frequencies in TRANSFORMS
        signed = is_transform and (kind.signs or blocks > 1)
        is_drawn = not is_transform and kind.frequencies != "learned"
        self.register_buffer("scales", empty(self.num_frequencies) if is_transform else None)
        self.register_buffer("signs", empty(blocks, head_dim) if signed else None)
        self.register_buffer("frequencies", empty(head_dim, self.num_frequencies) if is_drawn else None)
        learned = empty(num_heads, head_dim, self.num_frequencies) if kind.frequencies == "learned" else None
        self.matrix = None if learned is None else nn.Parameter(learned)
        self.weights = nn.Parameter(empty(self.num_features)) if kind.weighted else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the frequencies from a CPU generator, so that every device gets the same."""
        kind, count, dim = self.kind, self.num_frequencies, self.head_dim
        if self.scales is not None:
            scales = sample_scales(count, dim, radii=kind.radii, points=kind.points, generator=generator)
            self.scales.copy_(scales * self.temperature)
        if self.frequencies is not None:
            w = sample_frequencies(dim, count, directions=kind.frequencies, points=kind.points, generator=generator)
            self.frequencies.copy_(w * self.temperature)
        if self.signs is not None:
            self.signs.copy_(sample_signs((len(self.signs), dim), generator=generator))
            if not kind.signs:
                self.signs[0] = 1.0
        if self.matrix is not None:
            blocks = [torch.eye(dim)]
            while len(blocks) * dim < count:
                signs = sample_signs((dim, 1), generator=generator)
                blocks.append(signs * dct_matrix(dim, torch.device("cpu")))
            self.matrix.copy_(torch.cat(blocks, 1)[:, :count] * self.temperature)
        if self.weights is not None:
            self.weights.fill_(1.0)

    def projection(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """P [K, M], or [heads, K, M] if it is learned, that x is multiplied by on the right.

        Of a map with "exp" features it is [K + 1, M], for x as :meth:`augment` returns it. ``dtype``: float32 or
        float64.
        """
        if self.matrix is not None:
            return self.matrix.to(dtype)
        if self.scales is not None:
            p = dct_matrix(self.head_dim, self.scales.device, self.kind.frequencies, dtype)
            if self.signs is not None:
                p = (self.signs[:, :, None] * p).transpose(0, 1).flatten(1)
            p = p[:, : self.num_frequencies] * self.scales
        else:
            assert self.frequencies is not None
            p = self.frequencies.to(dtype)
        return torch.cat([p, torch.ones_like(p[:1])]) if self.kind.feature == "exp" else p

    def augment(self, x: Tensor, bounded_by: Tensor | None = None) -> Tensor:
        """x in float32 (float64), with one more channel for "exp" features: what every product gets added to it.

        That is the logarithm of the prefactor, or, ``bounded_by`` the projection, minus the largest product with it, so
        that the features of each vector go up to 1: for queries whose factor a norm takes out again, exponentials that
        would overflow together with those of the keys. Other maps get x as it is.
        """
        if self.kind.feature != "exp":
            return x
        x = x if x.dtype == torch.float64 else x.float()
        if bounded_by is not None:
            channel = -(x.detach() @ bounded_by.detach()[:-1].to(x.dtype)).amax(-1, keepdim=True)
        elif self.kind.prefactor:
            norms = x.square().sum(-1, keepdim=True) * self.temperature**2
            channel = -self.kind.prefactor * norms - 0.5 * math.log(self.num_features)
        else:
            channel = torch.zeros_like(x[..., :1])
        return torch.cat([x, channel], -1)

    def forward(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """What the ops take: the projection in ``dtype``, float32 or float64, and the weights or None.

        A call of the module, so that hooks which bring offloaded tensors in see it.
        """
        return self.projection(dtype), self.weights

    def features(self, x: Tensor) -> Tensor:
        """phi(x) in fp32 (fp64 for fp64), as the ops make it on their way: [..., heads, K] -> [..., num_features].

        A map that is not learned takes [..., K] of any shape.
        """
        x = self.augment(x if x.dtype == torch.float64 else x.float())
        projection = self.projection(x.dtype)
        p = x @ projection if projection.dim() == 2 else (x[..., None, :] @ projection)[..., 0, :]
        if self.kind.feature == "exp":
            phi = p.exp()
        else:
            phi = torch.cat([p, -p], -1).softmax(-1) if self.kind.feature == "softmax_pm" else p.softmax(-1)
        return phi if self.weights is None else phi * self.weights.to(phi.dtype)

    def extra_repr(self) -> str:
        return f"{self.name!r}, head_dim={self.head_dim}, num_features={self.num_features}"
