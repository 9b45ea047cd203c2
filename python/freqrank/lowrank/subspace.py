"""The leading eigenvectors of a symmetric matrix by subspace iteration, with a proof that they are good enough."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from freqrank.ops import cholesky_ex

# A call multiplies the matrix by as many columns as this many matrices of its order have, and then gives up.
_BUDGET = 4
# A filter may raise the largest eigenvector above the last wanted one by this factor; more drowns it in rounding.
_SPREAD = 1e8
_DEGREE = 10
_PROOFS = 2  # how often a Cholesky factorisation is spent on one


def leading_eigenvectors(
    matrix: Tensor, rank: int, *, tolerance: float = 1e-8, seed: int = 0, start: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """The ``rank`` largest eigenvalues and their eigenvectors, or None where it can't be shown that they are.

    Chebyshev-filtered subspace iteration with Rayleigh-Ritz in float64, from random vectors that ``seed`` determines.
    With Ritz vectors V, values theta and residuals R = M V - V diag(theta), and mu above all eigenvalues of M on the
    complement of V, the largest ``rank`` eigenvalues of M have, for any s > 0, a sum of at most

        sum_i theta_i + ||R||_F^2 / s + sum_i max(0, mu + s - theta_i).

    The result is returned only if that exceeds sum_i theta_i by at most ``tolerance`` times tr(M) - sum_i theta_i,
    which is what a truncation drops. That mu is above them is proven by a Cholesky factorisation of mu I - M on the
    complement: directions that the iteration never saw, whatever it started from, cannot hide. Eigenvalues that lie
    close together at ``rank`` do no harm, since either may be kept. Rounding, n u times the largest eigenvalue, counts
    against the tolerance: where that is all that is dropped, as from a matrix of lower rank, the answer is None.

    Args:
        matrix: M [n, n], float64, symmetric and positive semidefinite.
        rank: below n.
        start: [n, at least rank] vectors to begin with; random ones if None.

    Returns:
        Eigenvalues [rank], largest first, and orthonormal eigenvectors [n, rank]. None if the proof fails or the work
        reaches four products of the order of the matrix. Synchronises with a GPU.

    >>> M = torch.diag(torch.tensor([1.0, 9.0, 4.0, 0.5], dtype=torch.float64))
    >>> values, vectors = leading_eigenvectors(M, 2)
    >>> values.round(decimals=9), torch.allclose(M @ vectors, vectors * values)
    (tensor([9., 4.], dtype=torch.float64), True)
    """
    n = matrix.shape[0]
    if not 0 < rank < n:
        raise ValueError(f"rank must be from 1 to {n - 1}; got {rank}")
    if start is not None and (start.dim() != 2 or start.shape[0] != n or not rank <= start.shape[1] <= n):
        raise ValueError(f"start must be [{n}, {rank} to {n}]; got {tuple(start.shape)}")
    if start is None:
        columns = min(n, rank + max(16, rank // 4))
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(n, columns, dtype=torch.float64, generator=generator).to(matrix.device)
    columns = start.shape[1]
    left = _BUDGET * n
    proofs = _PROOFS
    total = float(matrix.trace())
    block = matrix @ start
    while left >= 2 * columns and bool(block.isfinite().all()):
        block = torch.linalg.qr(block).Q
        product = matrix @ block
        left -= columns
        values, rotation = torch.linalg.eigh(block.mT @ product)
        values, rotation = values.flip(0), rotation.flip(1)
        block, product = block @ rotation, product @ rotation
        ritz = values.tolist()
        allowed = tolerance * (total - sum(ritz[:rank]))
        rounding = n * torch.finfo(torch.float64).eps / 2 * ritz[0]
        if not allowed > rounding:
            return None
        residual = product[:, :rank] - block[:, :rank] * values[:rank]
        slack = 2 * float(residual.square().sum()) / allowed
        # the largest t with sum_i max(0, t - theta_i) <= allowed / 2
        smallest_first = values[:rank].flip(0)
        counts = torch.arange(1, rank + 1, dtype=torch.float64, device=matrix.device)
        above = float(((smallest_first.cumsum(0) + allowed / 2) / counts).min()) - slack - rounding
        next_value = ritz[rank] if columns > rank else 0.0
        if above > next_value:
            if _bounds_the_rest(matrix, block[:, :rank], values[:rank], residual, above):
                return values[:rank], block[:, :rank]
            proofs -= 1
            if proofs == 0:
                return None
        degree = _degree(ritz[0], ritz[rank - 1], ritz[-1], left // columns - 1)
        block = _filtered(matrix, block, product, ritz[0], ritz[-1], degree)
        left -= (degree - 1) * columns
    return None


def _bounds_the_rest(matrix: Tensor, vectors: Tensor, values: Tensor, residual: Tensor, above: float) -> bool:
    """Whether all eigenvalues of (I - V V^T) M (I - V V^T) are below ``above``."""
    # M V = V diag(values) + R with V^T R = 0
    half = vectors * (values / 2) + residual
    rest = -matrix
    rest.addmm_(half, vectors.mT).addmm_(vectors, half.mT)
    rest.diagonal().add_(above)
    return int(cholesky_ex(rest).info) == 0


def _degree(largest: float, wanted: float, edge: float, most: int) -> int:
    """Of the filter: as high as keeps ``wanted`` from drowning below ``largest``."""

    def growth(value: float) -> float:
        x = max(1.0, 2 * value / edge - 1) if edge > 0 else math.inf
        return math.log(2 * x) if x > 1e8 else math.log(x + math.sqrt(x * x - 1))

    spread = growth(largest) - growth(wanted) if edge > 0 else math.inf
    degree = _DEGREE if spread <= 0 else min(_DEGREE, int(math.log(_SPREAD) / spread))
    return max(1, min(degree, most))


def _filtered(matrix: Tensor, x: Tensor, product: Tensor, largest: float, edge: float, degree: int) -> Tensor:
    """p(M) X for the Chebyshev polynomial p of [0, edge] that is 1 at ``largest``; ``product`` is M X."""
    if degree == 1 or not edge > 0:
        return product
    half = edge / 2
    first = half / (largest - half)
    ratio = first
    before, now = x, (product - half * x) * (ratio / half)
    for _ in range(degree - 1):
        following = 1 / (2 / first - ratio)
        before, now = now, (matrix @ now - half * now).mul_(2 * following / half) - (ratio * following) * before
        ratio = following
    return now
