"""A shared basis and its coefficients from weights and a Gram matrix, by eigenvectors and without any inverse.

Convention: y = x W with W [d1, d2], the transpose of ``nn.Linear.weight``. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from freqrank.lowrank.subspace import leading_eigenvectors
from freqrank.ops import cholesky_solve_ex, gram_, whiten, whiten_eigh
from freqrank.ops import gram as gram_of

#: How eigenvectors are found: all of them, or the leading ones where :func:`decompose` says so.
SOLVERS = ("eigh", "subspace")
# Finding the leading vectors alone pays where they are at most one in so many: docs/performance.md.
_SUBSPACE_SHARE = 32
# Columns of a symmetric product that are formed together; what lies above the diagonal within them is wasted.
_COLUMNS = 256
# Right singular vectors from left ones are orthonormal to rounding times the ratio of the largest squared singular
# value to their own. The loss suffers by the square of that, and beyond this ratio it is worth mending.
_ORTHOGONAL_SPREAD = 1e6
# Refitted coefficients move freely along directions that hold more than this share of a direction's mean energy.
_REFIT_DAMPING = 1e-6


class Root:
    """S with S^T S = G, made when it is first asked for: weights that read the same inputs share it.

    Attributes:
        gram: G [d1, d1], float64.

    >>> root = Root(torch.tensor([[4.0, 2.0], [2.0, 2.0]], dtype=torch.float64))
    >>> root.factor, root.whitening, root.damping
    (tensor([[2., 1.],
            [0., 1.]], dtype=torch.float64), 'cholesky', 0.0)
    """

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram

    @cached_property
    def _found(self) -> tuple[Tensor, str, float]:
        factor, damping, info = whiten(self.gram)
        if int(info) == 0:
            return factor, "cholesky", float(damping)
        factor, damping, _ = whiten_eigh(self.gram)  # a zero Gram matrix has the factor 0, which is right
        return factor, "eigh", float(damping)

    @property
    def factor(self) -> Tensor:
        """S [d1, d1], upper triangular."""
        return self._found[0]

    @property
    def whitening(self) -> str:
        """How it was made: "cholesky" or "eigh"."""
        return self._found[1]

    @property
    def damping(self) -> float:
        """Relative damping of the Gram matrix, 0 if none was needed."""
        return self._found[2]


@dataclass(frozen=True)
class Factorization:
    """W_l ~ basis @ coefficients[l].

    Attributes:
        basis: [d1, k].
        coefficients: [k, d2] of each block.
        spectrum: squared singular values of S [b_1 W_1 | ... | b_n W_n], largest first: all of them, or as many as the
            solver found.
        energy: ||S b_l W_l||_F^2 of each block.
        lost: the part of it that the truncation drops; the sum over blocks is that of all squared singular values
            beyond the first k.
        whitening: how S was made: "cholesky", "eigh", or "none" where no S was needed.
        damping: relative damping of the Gram matrix, 0 if none was needed.
        solver: "eigh", "subspace", or "subspace, then eigh" where the first was tried and could not vouch for its
            result.
    """

    basis: Tensor
    coefficients: list[Tensor]
    spectrum: Tensor
    energy: list[float]
    lost: list[float]
    whitening: str
    damping: float
    solver: str


@dataclass(frozen=True)
class Decomposition:
    """What :func:`decompose` found: factors of any rank at the price of a few products each.

    Attributes:
        spectrum, energy, whitening, damping, solver: as in :class:`Factorization`.
        weights, block_weights: those that were decomposed.
        vectors: eigenvectors [d1 or sum of d2, r] of the first r entries of ``spectrum``.
        root: the upper triangular S [d1, d1], None for the identity and where ``vectors`` are those of the outputs.
        by_inputs: whether ``vectors`` are left singular vectors (of length d1) or right ones.
    """

    spectrum: Tensor
    energy: list[float]
    whitening: str
    damping: float
    solver: str
    weights: list[Tensor]
    block_weights: list[float]
    vectors: Tensor
    root: Tensor | None
    by_inputs: bool

    def truncate(self, rank: int) -> Factorization:
        """The best factors of ``rank`` directions, which must be among those found.

        >>> w = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
        >>> d = decompose([w], None)
        >>> [d.truncate(rank).lost for rank in (1, 2)]
        [[1.0], [0.0]]
        """
        found = self.vectors.shape[1]
        if not 0 < rank <= found:
            raise ValueError(f"rank must be from 1 to {found}, the directions that were found; got {rank}")
        kept = self.spectrum[:rank]
        leading = self.vectors[:, :rank]
        sizes = [weight.shape[1] for weight in self.weights]
        if self.by_inputs:
            # Squaring leaves the directions below this to rounding. They carry nothing: drop them, don't divide by
            # them.
            real = kept > leading.shape[0] * torch.finfo(torch.float64).eps * self.spectrum[0]
            leading = leading * (torch.where(real, kept, 1.0).rsqrt() * real)
            if self.root is not None:
                leading = self.root.mT @ leading
            parts = [
                scale * (weight.double().mT @ leading)
                for weight, scale in zip(self.weights, self.block_weights, strict=True)
            ]
            if float(self.spectrum[0]) > _ORTHOGONAL_SPREAD * float(kept[-1]):
                parts = _orthogonal(parts)
        else:
            parts = list(leading.split(sizes))
        basis = torch.zeros(self.weights[0].shape[0], rank, dtype=torch.float64, device=leading.device)
        for weight, scale, part in zip(self.weights, self.block_weights, parts, strict=True):
            basis.addmm_(weight.double(), part, alpha=scale)
        captured = [float((part.square() @ kept).sum()) for part in parts]
        return Factorization(
            basis=basis,
            coefficients=[(part / scale).mT for part, scale in zip(parts, self.block_weights, strict=True)],
            spectrum=self.spectrum,
            energy=self.energy,
            lost=[max(0.0, whole - part) for whole, part in zip(self.energy, captured, strict=True)],
            whitening=self.whitening,
            damping=self.damping,
            solver=self.solver,
        )


def _orthogonal(parts: Sequence[Tensor]) -> list[Tensor]:
    """Stacked columns that are almost orthonormal, or zero, made orthonormal by a step of Newton and Schulz."""
    products = gram_of(parts[0])
    for part in parts[1:]:
        gram_(products, part)
    step = products.mul_(-0.5)
    step.diagonal().add_(1.5)
    return [part @ step for part in parts]


def factorize(
    weights: Sequence[Tensor],
    gram: Tensor | Root | None,
    rank: int,
    block_weights: Sequence[float] | None = None,
    *,
    solver: str = "eigh",
) -> Factorization:
    """The best basis of ``rank`` directions for all weights together: :func:`decompose`, cut off at ``rank``.

    >>> w = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    >>> f = factorize([w], None, rank=1)
    >>> f.basis @ f.coefficients[0], f.lost
    (tensor([[0., 0.],
            [0., 2.]], dtype=torch.float64), [1.0])
    """
    return decompose(weights, gram, block_weights, rank=rank, solver=solver).truncate(rank)


def decompose(
    weights: Sequence[Tensor],
    gram: Tensor | Root | None,
    block_weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    solver: str = "eigh",
) -> Decomposition:
    """The directions that several weights share, in the metric of ``gram``, most important first.

    Cut off at k of them, they minimise sum_l b_l^2 tr(D_l^T G D_l), D_l = W_l - B C_l: the truncated SVD U Sigma V^T of
    S [b_1 W_1 | ... | b_n W_n], G = S^T S (SVD-LLM, arXiv 2403.07378; Basis Sharing, arXiv 2410.03765). Since
    S^-1 U Sigma = W_cat V, the basis is W_cat V_k and no inverse appears, so a singular G is as good as any.
    Eigenvectors of the smaller of S (sum_l b_l^2 W_l W_l^T) S^T and W_cat^T G W_cat take the place of the SVD; W_cat
    itself is never put together, and of each symmetric matrix only one half is computed.

    Args:
        weights: [d1, d2] each, of any floating dtype; the d2 may differ.
        gram: G [d1, d1], float64, or its root; None for the identity.
        block_weights: b_l > 0 of each weight; 1 if None.
        rank: how many directions will be asked for, if that is known; all of them if None.
        solver: "eigh": all eigenvectors, by LAPACK or cuSOLVER. "subspace": only the leading ``rank``, by
            :func:`freqrank.lowrank.subspace.leading_eigenvectors`, where ``rank`` is at most a 32nd of the order
            min(d1, sum of d2); it proves that what it drops is at most 1e-8 more than need be, and where it cannot,
            eigh follows. Above a 32nd it is eigh at once.

    No gradient passes through: weights that require one are taken as they stand.

    Raises:
        ValueError: an unknown solver, a rank out of range.
    """
    weights = [weight.detach() for weight in weights]
    b = [1.0] * len(weights) if block_weights is None else list(block_weights)
    order = min(weights[0].shape[0], sum(weight.shape[1] for weight in weights))
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(map(repr, SOLVERS))}; got {solver!r}")
    if rank is not None and not 0 < rank <= order:
        raise ValueError(f"rank must be from 1 to min(d1, sum of d2) = {order}; got {rank}")
    problem = _problem(weights, gram, b)
    used = "eigh"
    found = None
    if solver == "subspace" and rank is not None and _SUBSPACE_SHARE * rank <= order:
        found = leading_eigenvectors(_mirrored(problem.matrix), rank)
        used = "subspace, then eigh" if found is None else "subspace"
    if found is None:
        values, vectors = torch.linalg.eigh(problem.matrix)
        found = values.flip(0).clamp(min=0), vectors[:, -(rank or order) :].flip(1)
    return Decomposition(
        spectrum=found[0],
        energy=problem.energy,
        whitening=problem.whitening,
        damping=problem.damping,
        solver=used,
        weights=list(weights),
        block_weights=b,
        vectors=found[1],
        root=problem.root,
        by_inputs=problem.by_inputs,
    )


def squared_singular_values(
    weights: Sequence[Tensor], gram: Tensor | Root | None, block_weights: Sequence[float] | None = None
) -> Tensor:
    """The ``spectrum`` of :func:`decompose` alone, without the cost of eigenvectors.

    >>> squared_singular_values([torch.tensor([[1.0, 0.0], [0.0, 2.0]])], None)
    tensor([4., 1.], dtype=torch.float64)
    """
    weights = [weight.detach() for weight in weights]
    b = [1.0] * len(weights) if block_weights is None else list(block_weights)
    return torch.linalg.eigvalsh(_problem(weights, gram, b).matrix).flip(0).clamp(min=0)


@dataclass(frozen=True)
class _Problem:
    """A symmetric matrix, of which only the lower triangle is meant, and where it comes from."""

    matrix: Tensor
    energy: list[float]
    whitening: str
    damping: float
    root: Tensor | None
    by_inputs: bool


def _problem(weights: Sequence[Tensor], gram: Tensor | Root | None, b: Sequence[float]) -> _Problem:
    inputs, outputs = weights[0].shape[0], sum(weight.shape[1] for weight in weights)
    root = Root(gram) if isinstance(gram, Tensor) else gram
    if outputs <= inputs:
        matrix = _between_outputs(weights, None if root is None else root.gram, b)
        diagonal = matrix.diagonal().split([weight.shape[1] for weight in weights])
        return _Problem(matrix, [float(part.sum()) for part in diagonal], "none", 0.0, None, False)
    # tr(S K S^T) of each K = W W^T is the sum over S^T S times K. Damping is what the diagonal of S^T S has beyond G's.
    added = None if root is None else root.factor.square().sum(0) - root.gram.diagonal()
    pooled: Tensor | None = None
    energy = []
    for weight, scale in zip(weights, b, strict=True):
        product = gram_of(weight.mT).mul_(scale * scale)
        if root is None or added is None:
            energy.append(float(product.trace()))
        else:
            energy.append(float((root.gram * product).sum() + added @ product.diagonal()))
        pooled = product if pooled is None else pooled.add_(product)
    assert pooled is not None
    if root is None:
        return _Problem(pooled, energy, "none", 0.0, None, True)
    return _Problem(_congruent(root.factor, pooled), energy, root.whitening, root.damping, root.factor, True)


def _between_outputs(weights: Sequence[Tensor], gram: Tensor | None, b: Sequence[float]) -> Tensor:
    """The lower triangle of W_cat^T G W_cat."""
    ends = torch.tensor([weight.shape[1] for weight in weights]).cumsum(0).tolist()
    matrix = torch.zeros(ends[-1], ends[-1], dtype=torch.float64, device=weights[0].device)
    for i, weight in enumerate(weights):
        columns = weight.shape[1]
        for start in range(0, columns, _COLUMNS):
            part = weight[:, start : start + _COLUMNS].double() * b[i]
            part = part if gram is None else gram @ part
            here = ends[i] - columns + start
            into = matrix[:, here : here + part.shape[1]]
            torch.mm(weight[:, start:].double().mT * b[i], part, out=into[here : ends[i]])
            for j in range(i + 1, len(weights)):
                torch.mm(weights[j].double().mT * b[j], part, out=into[ends[j - 1] : ends[j]])
    return matrix


def _congruent(root: Tensor, middle: Tensor) -> Tensor:
    """The lower triangle of S K S^T, S upper triangular and K symmetric, at a third of the price of two products."""
    n = root.shape[0]
    matrix = torch.zeros_like(root)
    for start in range(0, n, _COLUMNS):
        # rows of S from here on have nothing to the left of here
        corner = root[start:, start:]
        part = middle[start:, start:] @ corner[:_COLUMNS].mT
        torch.mm(corner, part, out=matrix[start:, start : start + part.shape[1]])
    return matrix


def _mirrored(lower: Tensor) -> Tensor:
    return lower.tril() + lower.tril(-1).mT


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
    normal = basis.mT @ (gram @ basis)
    return _moved(coefficient, normal, basis.mT @ moment, basis.square().sum(0), gram)


def _moved(coefficient: Tensor, normal: Tensor, right: Tensor, squares: Tensor, gram: Tensor) -> Tensor:
    """C0 + dC of :func:`refit`, normal = B^T G B, right = B^T moment and squares those of the columns of B."""
    right = right - normal @ coefficient
    # What B^T G B holds of a direction that the data does not excite is rounding, which need not be definite.
    rounding = 10 * torch.finfo(gram.dtype).eps * gram.shape[0] * gram.trace() * squares
    diagonal = normal.diagonal() + rounding
    scale = torch.where(diagonal > 0, diagonal, diagonal.mean()).sqrt()
    if not bool(scale.isfinite().all() & (scale > 0).all()):
        return coefficient  # the layer's input is zero
    balanced = normal / (scale[:, None] * scale)
    balanced.diagonal().add_(rounding / scale.square() + _REFIT_DAMPING)
    step, _, info = cholesky_solve_ex(balanced, right / scale[:, None])
    if int(info) != 0:
        raise ValueError(f"the refit's normal equations are not positive definite (minor {int(info)})")
    return coefficient + step / scale[:, None]


def adapted(weight: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """The dense weight that gives on other inputs X' what W gives on X: argmin_V ||X W - X' V||_F, from V = W.

    What is decomposed where statistics are error-aware (AA-SVD, arXiv 2604.02119): ||X W - X' B C||_F is least where
    ||X' (V - B C)||_F is. As in :func:`refit`, V leaves W along the directions only that X' excites.

    Args:
        weight: W [d1, d2].
        gram: X'^T X' [d1, d1].
        cross: X'^T X [d1, d1].

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)
    >>> w = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    >>> adapted(w, 4 * x.T @ x, 2 * x.T @ x).round(decimals=3)
    tensor([[0.5000],
            [1.0000]], dtype=torch.float64)
    """
    return _moved(weight, gram, cross @ weight, torch.ones_like(gram.diagonal()), gram)  # B is the identity


def squared_error(weight: Tensor, approximation: Tensor, gram: Tensor | None) -> tuple[float, float]:
    """tr(D^T G D) of D = weight - approximation, and tr(W^T G W): squared output error, squared output."""
    return squared_norm(weight - approximation, gram), squared_norm(weight, gram)


def squared_norm(weight: Tensor, gram: Tensor | None) -> float:
    """tr(W^T G W): the squared output.

    >>> squared_norm(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    13.0
    """
    return float(((weight if gram is None else gram @ weight) * weight).sum().clamp(min=0))
