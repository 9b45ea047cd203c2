"""Where a random feature map gets its frequencies from: uniform points, and the radii they are turned into."""

from __future__ import annotations

import torch
from torch import Tensor

POINTS = ("random", "stratified")
RADII = ("normal", "chi")


def uniform_points(count: int, *, points: str = "random", generator: torch.Generator) -> Tensor:
    """``count`` points in (0, 1), float64: independent draws, or one draw in each of ``count`` equal strata.

    Strata are a quasi-Monte Carlo rule in one dimension: discrepancy O(1/count) where independent draws have
    O(1/sqrt(count)). Their order is shuffled, so that neither end of the spectrum is favoured.

    >>> g = torch.Generator().manual_seed(0)
    >>> uniform_points(4, points="stratified", generator=g).sort().values.mul(4).floor().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    if points not in POINTS:
        raise ValueError(f"points must be one of {', '.join(map(repr, POINTS))}; got {points!r}")
    u = torch.rand(count, dtype=torch.float64, device="cpu", generator=generator)
    if points == "stratified":
        order = torch.randperm(count, device="cpu", generator=generator)
        u = (order + u) / count
    tiny = torch.finfo(torch.float64).eps
    return u.clamp(tiny, 1 - tiny)


def normal_quantile(u: Tensor) -> Tensor:
    """Inverse cdf of the standard normal distribution, what the released DiJiang code draws its diagonal T from.

    >>> normal_quantile(torch.tensor([0.5, 0.975], dtype=torch.float64))
    tensor([0.0000, 1.9600], dtype=torch.float64)
    """
    return torch.special.ndtri(u.double())


def chi_quantile(u: Tensor, degrees: int) -> Tensor:
    """Inverse cdf of the length of a standard normal vector with ``degrees`` components (what the paper's proof needs).

    The cdf is the regularised lower incomplete gamma function P(degrees / 2, r^2 / 2), inverted by bisection to float64
    accuracy.

    >>> chi_quantile(torch.tensor([0.5], dtype=torch.float64), 2)
    tensor([1.1774], dtype=torch.float64)
    """
    if degrees < 1:
        raise ValueError(f"degrees must be at least 1; got {degrees}")
    u = u.double()
    shape = torch.full_like(u, degrees / 2)
    low, high = torch.zeros_like(u), torch.full_like(u, degrees**0.5 + 12.0)
    for _ in range(64):
        middle = (low + high) / 2
        below = torch.special.gammainc(shape, middle.square() / 2) < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def sample_scales(
    head_dim: int, *, radii: str = "normal", points: str = "random", generator: torch.Generator
) -> Tensor:
    """The diagonal of T: one factor a frequency, float32 [head_dim].

    ``radii`` is "normal" (the standard normal, as released) or "chi" (the length of a ``head_dim``-dimensional normal
    vector, as in the paper's Theorem 3.2).

    >>> sample_scales(4, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4])
    """
    if radii not in RADII:
        raise ValueError(f"radii must be one of {', '.join(map(repr, RADII))}; got {radii!r}")
    u = uniform_points(head_dim, points=points, generator=generator)
    return (normal_quantile(u) if radii == "normal" else chi_quantile(u, head_dim)).float()


def sample_signs(head_dim: int, *, generator: torch.Generator) -> Tensor:
    """``head_dim`` fair random signs, float32: the flip that keeps a common mean off the transform's constant row."""
    return torch.randint(0, 2, (head_dim,), device="cpu", generator=generator).mul(2).sub(1).float()
