"""Where a random feature map gets its frequencies from: uniform points, and the radii and directions made of them."""

from __future__ import annotations

import torch
from torch import Tensor

POINTS = ("random", "stratified", "sobol", "halton")
RADII = ("normal", "chi")
DIRECTIONS = ("gaussian", "orthogonal", "sphere")


def uniform_points(count: int, dimensions: int = 1, *, points: str = "random", generator: torch.Generator) -> Tensor:
    """``count`` points in the open unit cube, float64 [count, dimensions], in random order.

    "random": independent draws. The others are quasi-Monte Carlo rules, randomised so that each point is uniform:
    "stratified": one draw in each of ``count`` equal strata of every coordinate (a Latin hypercube; McKay et al. 1979);
    "sobol": Sobol's sequence, scrambled (``torch.quasirandom.SobolEngine``); "halton": Halton's sequence with a random
    permutation of every digit (Owen, arXiv 1706.02808).

    Raises:
        ValueError: unknown ``points``, a count or number of dimensions below 1, or more dimensions than Sobol's 21,201.

    >>> g = torch.Generator().manual_seed(0)
    >>> uniform_points(4, points="stratified", generator=g)[:, 0].sort().values.mul(4).floor().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    if points not in POINTS:
        raise ValueError(f"points must be one of {', '.join(map(repr, POINTS))}; got {points!r}")
    if count < 1 or dimensions < 1:
        raise ValueError(f"count and dimensions must be at least 1; got {count} and {dimensions}")

    def order() -> Tensor:
        return torch.randperm(count, device="cpu", generator=generator)

    if points == "sobol":
        if dimensions > torch.quasirandom.SobolEngine.MAXDIM:
            raise ValueError(
                f"sobol points have at most {torch.quasirandom.SobolEngine.MAXDIM} dimensions; got {dimensions}"
            )
        seed = int(torch.randint(2**31, (), device="cpu", generator=generator))
        u = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed).draw(count, dtype=torch.float64)
        u = u[order()]
    elif points == "halton":
        u = torch.stack([_radical_inverse(count, base, generator) for base in _primes(dimensions)], 1)[order()]
    else:
        u = torch.rand(count, dimensions, dtype=torch.float64, device="cpu", generator=generator)
        if points == "stratified":
            u = (torch.stack([order() for _ in range(dimensions)], 1) + u) / count
    tiny = torch.finfo(torch.float64).eps
    return u.clamp(tiny, 1 - tiny)


def _primes(count: int) -> list[int]:
    found: list[int] = []
    candidate = 2
    while len(found) < count:
        if all(candidate % p for p in found if p * p <= candidate):
            found.append(candidate)
        candidate += 1
    return found


def _radical_inverse(count: int, base: int, generator: torch.Generator) -> Tensor:
    """The first ``count`` van der Corput points of a base, each digit through a random permutation of its own."""
    index = torch.arange(count, device="cpu")
    total = torch.zeros(count, dtype=torch.float64, device="cpu")
    place = 1.0
    while place > 2**-53:  # also where the digits of every index are 0: those are permuted too
        permutation = torch.randperm(base, device="cpu", generator=generator)
        place /= base
        total += place * permutation[index % base]
        index //= base
    return total


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
    count: int, degrees: int, *, radii: str = "normal", points: str = "random", generator: torch.Generator
) -> Tensor:
    """The diagonal of T: one factor a frequency, float32 [count].

    ``radii`` is "normal" (the standard normal, as released) or "chi" (the length of a ``degrees``-dimensional normal
    vector, as in the paper's Theorem 3.2).

    >>> sample_scales(4, 4, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4])
    """
    if radii not in RADII:
        raise ValueError(f"radii must be one of {', '.join(map(repr, RADII))}; got {radii!r}")
    u = uniform_points(count, points=points, generator=generator)[:, 0]
    return (normal_quantile(u) if radii == "normal" else chi_quantile(u, degrees)).float()


def sample_signs(shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
    """Fair random signs, float32: the flip that keeps a common mean off the transform's constant row."""
    return torch.randint(0, 2, shape, device="cpu", generator=generator).mul(2).sub(1).float()


def sample_frequencies(
    dim: int, count: int, *, directions: str, points: str = "random", generator: torch.Generator
) -> Tensor:
    """``count`` frequencies w without a transform's structure, each standard normal: float32 [dim, count].

    Args:
        directions: "gaussian": every coordinate from the normal quantile of a point in ``dim`` dimensions;
            "orthogonal": ``dim`` at a time orthogonal, with independent lengths (Performer, Choromanski et al. 2021);
            "sphere": a direction and, from one more coordinate of the point, a length (the paper's PFF).
        points: see :func:`uniform_points`; behind the lengths of "orthogonal", behind everything otherwise.

    >>> sample_frequencies(4, 6, directions="gaussian", generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4, 6])
    """
    if directions not in DIRECTIONS:
        raise ValueError(f"directions must be one of {', '.join(map(repr, DIRECTIONS))}; got {directions!r}")
    if directions == "gaussian":
        w = normal_quantile(uniform_points(count, dim, points=points, generator=generator))
    elif directions == "sphere":
        u = uniform_points(count, dim + 1, points=points, generator=generator)
        w = torch.nn.functional.normalize(normal_quantile(u[:, :dim]), dim=1) * chi_quantile(u[:, dim:], dim)
    else:
        blocks = []
        for _ in range(-(-count // dim)):
            normal = torch.randn(dim, dim, dtype=torch.float64, device="cpu", generator=generator)
            q, r = torch.linalg.qr(normal)
            blocks.append(q * r.diagonal().sign())  # Haar's measure
        lengths = chi_quantile(uniform_points(count, points=points, generator=generator), dim)
        w = torch.cat(blocks, 1).T[:count] * lengths
    return w.T.float().contiguous()
