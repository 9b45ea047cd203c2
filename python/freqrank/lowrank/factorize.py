"""A shared basis and its coefficients from weights and a Gram matrix, by eigenvectors and without any inverse.

Convention: y = x W with W [d1, d2], the transpose of ``nn.Linear.weight``. Everything here is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freqrank.ops import cholesky_ex, solve_triangular, whiten, whiten_eigh

# Refitted coefficients move freely along directions that hold more than this share of a direction's mean energy.
_REFIT_DAMPING = 1e-6


@dataclass(frozen=True)
class Factorization:
    """W_l ~ basis @ coefficients[l].

    Attributes:
        basis: [d1, k].
        coefficients: [k, d2] of each block.
        spectrum: all squared singular values of S [b_1 W_1 | ... | b_n W_n], largest first.
        energy: ||S b_l W_l||_F^2 of each block.
        lost: the part of it that the truncation drops; the sum over blocks is that of ``spectrum[k:]``.
        whitening: how S was made: "cholesky", "eigh", or "none" where no S was needed.
        damping: relative damping of the Gram matrix, 0 if none was needed.
    """

    basis: Tensor
    coefficients: list[Tensor]
    spectrum: Tensor
    energy: list[float]
    lost: list[float]
    whitening: str
    damping: float


def factorize(
    weights: Sequence[Tensor], gram: Tensor | None, rank: int, block_weights: Sequence[float] | None = None
) -> Factorization:
    """The best basis of ``rank`` directions for all weights together, in the metric of ``gram``.

    Minimises sum_l b_l^2 tr(D_l^T G D_l), D_l = W_l - B C_l: the truncated SVD U Sigma V^T of
    S [b_1 W_1 | ... | b_n W_n], G = S^T S (SVD-LLM, arXiv 2403.07378; Basis Sharing, arXiv 2410.03765). Since
    S^-1 U Sigma = W_cat V, the basis is W_cat V_k and no inverse appears, so a singular G is as good as any.
    Eigenvectors of the smaller of S (sum_l b_l^2 W_l W_l^T) S^T and W_cat^T G W_cat take the place of the SVD.

    Args:
        weights: [d1, d2] each, float64; the d2 may differ.
        gram: G [d1, d1], float64; None for the identity.
        rank: directions to keep, at most min(d1, sum of d2).
        block_weights: b_l > 0 of each weight; 1 if None.

    >>> w = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    >>> f = factorize([w], None, rank=1)
    >>> f.basis @ f.coefficients[0], f.lost
    (tensor([[0., 0.],
            [0., 2.]], dtype=torch.float64), [1.0])
    """
    b = [1.0] * len(weights) if block_weights is None else list(block_weights)
    concatenated = torch.cat([weight * scale for weight, scale in zip(weights, b, strict=True)], dim=1)
    inputs, outputs = concatenated.shape
    sizes = [weight.shape[1] for weight in weights]
    if outputs <= inputs:
        product = concatenated if gram is None else gram @ concatenated
        squared = concatenated.mT @ product
        spectrum, vectors = _eigh(squared)
        energy = squared.diagonal()
        v = vectors[:, :rank]
        whitening, damping = "none", 0.0
    else:
        s, whitening, damping = _whiten(gram)
        whitened = concatenated if s is None else s @ concatenated
        spectrum, u = _eigh(whitened @ whitened.mT)
        energy = whitened.square().sum(0)
        kept = spectrum[:rank]
        # Squaring leaves the directions below this to rounding. They carry nothing: drop them, don't divide by them.
        real = kept > inputs * torch.finfo(torch.float64).eps * spectrum[0]
        v = whitened.mT @ (u[:, :rank] * torch.where(real, kept, 1.0).rsqrt() * real)
    captured = v.square() @ spectrum[:rank]
    coefficients = [(rows / scale).mT for rows, scale in zip(v.split(sizes), b, strict=True)]
    return Factorization(
        basis=concatenated @ v,
        coefficients=coefficients,
        spectrum=spectrum,
        energy=[float(part.sum()) for part in energy.split(sizes)],
        lost=[float(part.sum().clamp(min=0)) for part in (energy - captured).split(sizes)],
        whitening=whitening,
        damping=damping,
    )


def squared_singular_values(
    weights: Sequence[Tensor], gram: Tensor | None, block_weights: Sequence[float] | None = None
) -> Tensor:
    """The ``spectrum`` of :func:`factorize` alone."""
    b = [1.0] * len(weights) if block_weights is None else list(block_weights)
    concatenated = torch.cat([weight * scale for weight, scale in zip(weights, b, strict=True)], dim=1)
    if concatenated.shape[1] <= concatenated.shape[0]:
        squared = concatenated.mT @ (concatenated if gram is None else gram @ concatenated)
    else:
        s = _whiten(gram)[0]
        whitened = concatenated if s is None else s @ concatenated
        squared = whitened @ whitened.mT
    return torch.linalg.eigvalsh(squared).flip(0).clamp(min=0)


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _whiten(gram: Tensor | None) -> tuple[Tensor | None, str, float]:
    if gram is None:
        return None, "none", 0.0
    factor, damping, info = whiten(gram)
    if int(info) == 0:
        return factor, "cholesky", float(damping)
    factor, damping, _ = whiten_eigh(gram)  # a zero Gram matrix has the factor 0, which is right
    return factor, "eigh", float(damping)


def refit(basis: Tensor, coefficient: Tensor, gram: Tensor, moment: Tensor) -> Tensor:
    """Coefficients that follow one layer's own data: argmin_C ||Y - X B C||_F, from the ones given.

    With X^T X = ``gram`` and X^T Y = ``moment``, (B^T G B) dC = B^T (moment - G B C0) is solved by Cholesky with
    1e-6 of its diagonal added. So coefficients move along the directions that the data excites, stay where they are
    along those that it does not, and the error never rises. (A least-squares driver that cuts small singular values off
    has been seen to ruin the model.)

    Args:
        basis: B [d1, k].
        coefficient: C0 [k, d2].
        gram: G [d1, d1].
        moment: [d1, d2].

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)
    >>> w = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    >>> basis = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    >>> refit(basis, torch.zeros(1, 1, dtype=torch.float64), x.T @ x, x.T @ x @ w).round(decimals=4)
    tensor([[1.6301]], dtype=torch.float64)
    """
    product = gram @ basis
    normal = basis.mT @ product
    right = basis.mT @ moment - normal @ coefficient
    # What B^T G B holds of a direction that the data does not excite is rounding, which need not be definite.
    rounding = 10 * torch.finfo(gram.dtype).eps * gram.shape[0] * gram.trace() * basis.square().sum(0)
    diagonal = normal.diagonal() + rounding
    scale = torch.where(diagonal > 0, diagonal, diagonal.mean()).sqrt()
    if not bool(scale.isfinite().all() & (scale > 0).all()):
        return coefficient  # the layer's input is zero
    balanced = normal / (scale[:, None] * scale)
    balanced.diagonal().add_(rounding / scale.square() + _REFIT_DAMPING)
    factor, info = cholesky_ex(balanced)
    if int(info) != 0:
        raise ValueError(f"the refit's normal equations are not positive definite (minor {int(info)})")
    step = solve_triangular(factor, right / scale[:, None], upper=False)
    step = solve_triangular(factor.mT, step, upper=True)
    return coefficient + step / scale[:, None]


def squared_error(weight: Tensor, approximation: Tensor, gram: Tensor | None) -> tuple[float, float]:
    """tr(D^T G D) of D = weight - approximation, and tr(W^T G W): squared output error, squared output."""

    def norm(matrix: Tensor) -> float:
        return float(((matrix if gram is None else gram @ matrix) * matrix).sum().clamp(min=0))

    return norm(weight - approximation), norm(weight)
