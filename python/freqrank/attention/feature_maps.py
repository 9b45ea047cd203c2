"""Positive feature maps built on the cosine transform: phi(x) = feature(x S C diag(scales)) * weights.

``FEATURE_MAPS`` names the ones that a model can be converted with; a new one is one entry there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from freqrank.attention.sampling import sample_scales, sample_signs


@dataclass(frozen=True)
class FeatureMapKind:
    """What distinguishes one named map from another.

    Args:
        feature: "softmax", "exp" or "softmax_pm" (softmax over the products and their negatives: twice the features).
        transform: "idct" (x C, as released) or "dct" (x C^T, as in the paper).
        radii: distribution of the scales, see :func:`freqrank.attention.sampling.sample_scales`.
        points: "random" or "stratified" uniforms behind the scales.
        signs: flip the coordinates of x by fixed random signs before the transform.
        weighted: one learned weight a feature, 1 at first (the paper's D).
    """

    feature: str
    transform: str
    radii: str = "normal"
    points: str = "random"
    signs: bool = False
    weighted: bool = False


FEATURE_MAPS: dict[str, FeatureMapKind] = {
    # The released code: softmax(x C T), T ~ N(0, 1), nothing learned.
    "dijiang": FeatureMapKind("softmax", "idct"),
    # The same with both signs of every frequency, as hyperbolic random features have.
    "dijiang-pm": FeatureMapKind("softmax_pm", "idct", points="stratified", signs=True),
    # The paper's equation 12: D exp(T C x), radii of a normal vector; the signs tame inputs with a common mean.
    "wdcf": FeatureMapKind("exp", "dct", radii="chi", points="stratified", signs=True, weighted=True),
}


def feature_map_kind(name: str) -> FeatureMapKind:
    """The entry of ``FEATURE_MAPS`` called ``name``; ValueError with the known names otherwise.

    >>> feature_map_kind("dijiang").feature
    'softmax'
    """
    if not isinstance(name, str) or name not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(map(repr, FEATURE_MAPS))}; got {name!r}")
    return FEATURE_MAPS[name]


@lru_cache(maxsize=64)
def dct_matrix(size: int, device: torch.device, transform: str = "idct") -> Tensor:
    """The orthonormal DCT-II matrix C, fp32 [size, size]; row k is the k-th cosine (computed in fp64). For "dct", C^T.

    >>> c = dct_matrix(8, torch.device("cpu"))
    >>> torch.allclose(c @ c.T, torch.eye(8), atol=1e-6)
    True
    """
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    c = torch.cos(torch.pi / (2 * size) * (2 * n + 1) * n[:, None]) * (2 / size) ** 0.5
    c[0] *= 0.5**0.5
    return (c if transform == "idct" else c.T.contiguous()).float().to(device)


class Float32Module(nn.Module):
    """A module whose own tensors stay float32 when the model around it changes dtype; moves between devices as usual.

    The log of the decay and the frequencies need it: gamma = 0.998 rounded to bfloat16 is 1.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class CosineFeatureMap(Float32Module):
    """phi(x) of one attention layer: fixed frequencies, the same for every head, for queries and keys.

    Args:
        head_dim: size K of a query.
        name: an entry of ``FEATURE_MAPS``.
        temperature: factor on x. The released map has 1; ``head_dim ** 0.25`` restores the scale of the logits
            q.k / sqrt(head_dim) that a pretrained model was trained with. It is kept inside ``scales``.
        device: where the tensors live.

    The tensors are empty until :meth:`reset_parameters`, or until a checkpoint fills them.
    """

    scales: Tensor
    signs: Tensor | None

    def __init__(
        self, head_dim: int, name: str = "dijiang", *, temperature: float = 1.0, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.name, self.kind, self.head_dim, self.temperature = name, feature_map_kind(name), head_dim, temperature
        self.num_features = head_dim * (2 if self.kind.feature == "softmax_pm" else 1)
        self.register_buffer("scales", torch.empty(head_dim, dtype=torch.float32, device=device))
        self.register_buffer(
            "signs", torch.empty(head_dim, dtype=torch.float32, device=device) if self.kind.signs else None
        )
        weights = torch.ones(self.num_features, dtype=torch.float32, device=device) if self.kind.weighted else None
        self.weights = nn.Parameter(weights) if weights is not None else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the frequencies from a CPU generator, so that every device gets the same."""
        kind = self.kind
        scales = sample_scales(self.head_dim, radii=kind.radii, points=kind.points, generator=generator)
        self.scales.copy_(scales * self.temperature)
        if self.signs is not None:
            self.signs.copy_(sample_signs(self.head_dim, generator=generator))
        if self.weights is not None:
            self.weights.fill_(1.0)

    def projection(self) -> Tensor:
        """The matrix S C diag(scales), fp32 [K, K], that x is multiplied by on the right."""
        p = dct_matrix(self.head_dim, self.scales.device, self.kind.transform) * self.scales
        return p if self.signs is None else self.signs[:, None] * p

    def forward(self, x: Tensor) -> Tensor:
        """phi(x) in fp32 (fp64 for fp64): [..., K] -> [..., num_features], as the ops make it on their way."""
        x = x if x.dtype == torch.float64 else x.float()
        p = x @ self.projection().to(x.dtype)
        if self.kind.feature == "exp":
            phi = p.exp()
        else:
            phi = torch.cat([p, -p], -1).softmax(-1) if self.kind.feature == "softmax_pm" else p.softmax(-1)
        return phi if self.weights is None else phi * self.weights.to(phi.dtype)

    def extra_repr(self) -> str:
        return f"{self.name!r}, head_dim={self.head_dim}, num_features={self.num_features}"
