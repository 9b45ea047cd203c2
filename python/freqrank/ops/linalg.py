"""Gram matrices, Cholesky factors and what whitening needs of them.

Gram matrices are float64 whatever their input is stored in: the accuracy of the Gram decides everything that follows
from it, because forming it squares the condition number of the activations.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from freqrank.ops._checks import check_device, check_dtype, check_tensor, check_values
from freqrank.ops._derivatives import functorch_level, register_derivatives

_SOLVER_FLOATS = (torch.float32, torch.float64)
_GPU_BATCH_SIZES = 6  # kGramBatchSizes of csrc/whitening/gram_device.h


class CholeskyResult(NamedTuple):
    """What :func:`cholesky_ex` returns."""

    L: Tensor
    info: Tensor


class CholeskySolution(NamedTuple):
    """What :func:`cholesky_solve_ex` returns."""

    X: Tensor
    L: Tensor
    info: Tensor


class Whitening(NamedTuple):
    """What :func:`whiten` and :func:`whiten_eigh` return, for matrices [..., n, n].

    ``factor`` [..., n, n] float64, upper triangular, ``factor.mT @ factor`` is the (damped) scaled Gram matrix;
    ``damping`` [...] float64, the level that was needed, 0 where none was; ``info`` [...] int32, 0 where it succeeded.
    """

    factor: Tensor
    damping: Tensor
    info: Tensor


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_matrix(name: str, value: object) -> None:
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.layout is not torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else str(value.layout)
        raise ValueError(f"{name} must be dense, of layout torch.strided; got {layout}")
    if value.dim() < 2:
        raise ValueError(f"{name} must have at least 2 dimensions; got shape {tuple(value.shape)}")


def _check_square(name: str, value: object) -> None:
    _check_matrix(name, value)
    assert isinstance(value, Tensor)
    if value.shape[-1] != value.shape[-2]:
        raise ValueError(
            f"{name} must be a square matrix or a batch of them, [..., n, n]; got shape {tuple(value.shape)}"
        )


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def _broadcast(named: dict[str, tuple[torch.Size, Tensor]]) -> torch.Size:
    """The common shape of the leading dimensions."""
    try:
        return torch.broadcast_shapes(*(shape for shape, _ in named.values()))
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, (_, tensor) in named.items())
        raise ValueError(f"the leading (batch) dimensions must match or broadcast; got {shapes}") from None


def _check_system(A: object, B: object) -> None:
    """What all solvers want of A X = B; sizes are left to them."""
    _check_square("A", A)
    _check_matrix("B", B)
    assert isinstance(A, Tensor)
    assert isinstance(B, Tensor)
    check_dtype("A", A, _SOLVER_FLOATS)
    check_dtype("B", B, (A.dtype,))
    check_device("B", B, "A", A)


def _in_one_batch(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices expanded to common leading dimensions."""
    if A.shape[:-2] == B.shape[:-2]:
        return A, B
    batch = _broadcast({"A": (A.shape[:-2], A), "B": (B.shape[:-2], B)})
    return A.expand(*batch, *A.shape[-2:]), B.expand(*batch, *B.shape[-2:])


# --- gram -------------------------------------------------------------------------------------------------------------


def _gram_arguments(x: Tensor, y: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Checked, and expanded to one batch shape without copying."""
    _check_matrix("x", x)
    check_dtype("x", x)
    named = {"x": (x.shape[:-2], x)}
    if y is x:
        y = None
    if y is not None:
        _check_matrix("y", y)
        check_dtype("y", y)
        check_device("y", y, "x", x)
        if y.shape[-2] != x.shape[-2]:
            raise ValueError(
                f"y must have as many rows (tokens) as x, {x.shape[-2]}; got x {tuple(x.shape)}, y {tuple(y.shape)}"
            )
        named["y"] = (y.shape[:-2], y)
    if weight is not None:
        check_tensor("weight", weight)
        if weight.is_complex():
            raise TypeError(f"weight must be real; got {weight.dtype}")
        check_device("weight", weight, "x", x)
        if weight.dim() < 1 or weight.shape[-1] != x.shape[-2]:
            raise ValueError(
                f"weight must have one entry for each row of x, [..., {x.shape[-2]}]; got shape {tuple(weight.shape)}"
            )
        named["weight"] = (weight.shape[:-1], weight)
    batch = _broadcast(named)
    if x.is_cuda and sum(size != 1 for size in batch) > _GPU_BATCH_SIZES:
        raise ValueError(
            f"on a GPU at most {_GPU_BATCH_SIZES} leading (batch) dimensions may be larger than 1; got {tuple(batch)}"
        )
    x = x.expand(*batch, *x.shape[-2:])
    if y is not None:
        y = y.expand(*batch, *y.shape[-2:])
    if weight is not None:
        weight = weight.to(torch.float64).expand(*batch, weight.shape[-1])
    return x, y, weight


def gram(x: Tensor, y: Tensor | None = None, *, weight: Tensor | None = None) -> Tensor:
    """X^T diag(weight) Y in float64, to float64 accuracy, from any floating-point input.

    Args:
        x: [..., T, n], float16, bfloat16, float32 or float64, any strides.
        y: [..., T, m], of any of these dtypes; ``x`` itself if None, of which then only half is computed: the result is
            exactly symmetric.
        weight: [..., T], real or bool; 1 if None. Negative weights are allowed (the result may then be indefinite). A
            weight of 0 does not hide a NaN: 0 * NaN is NaN.

    Leading dimensions are a batch and broadcast (on a GPU at most 6 of them may be larger than 1). Elements are
    converted as they are read, no float64 copy of x is made. Up to 800,000 rows the error of element (i, j) is at most
    1e-12 sqrt(G_ii G_jj), and mostly far less, where G_ii and G_jj are the sums of abs(weight) times the squares of x's
    column i and y's column j: sums are float64 throughout or, on GPUs that are slow in float64, exact sums of integers.
    Repeats bit for bit on any number of threads. Differentiable, any number of times, with respect to all three (the
    backward pass does make float64 copies).

    Returns:
        [..., n, m], float64.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes that do not match.

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    >>> gram(x)
    tensor([[10., 14.],
            [14., 20.]], dtype=torch.float64)
    >>> gram(x, weight=torch.tensor([True, False]))
    tensor([[1., 2.],
            [2., 4.]], dtype=torch.float64)
    """
    return torch.ops.freqrank.gram(*_gram_arguments(x, y, weight))


def gram_(acc: Tensor, x: Tensor, y: Tensor | None = None, *, weight: Tensor | None = None) -> Tensor:
    """Adds X^T diag(weight) Y to ``acc`` in place and returns ``acc``: :func:`gram` for data that comes in pieces.

    Args:
        acc: [..., n, m], the shape of :func:`gram`'s result, float64, any strides without overlap.
        x, y, weight: as for :func:`gram`.

    Not differentiable: raises RuntimeError if a gradient would be needed, NotImplementedError in forward mode. Inside a
    transform of :mod:`torch.func` it makes a temporary of ``acc``'s size.

    >>> import torch
    >>> acc = torch.zeros(2, 2, dtype=torch.float64)
    >>> for piece in torch.tensor([[1.0, 2.0], [3.0, 4.0]]).split(1):
    ...     acc = gram_(acc, piece)
    >>> acc
    tensor([[10., 14.],
            [14., 20.]], dtype=torch.float64)
    """
    x, y, weight = _gram_arguments(x, y, weight)
    check_tensor("acc", acc)
    check_dtype("acc", acc, (torch.float64,))
    check_device("acc", acc, "x", x)
    expected = (*x.shape[:-2], x.shape[-1], (x if y is None else y).shape[-1])
    if tuple(acc.shape) != tuple(expected):
        raise ValueError(f"acc must have shape {tuple(expected)}; got {tuple(acc.shape)}")
    if any(stride == 0 and size > 1 for size, stride in zip(acc.shape, acc.stride(), strict=True)):
        raise ValueError(f"acc must not overlap itself (an expanded tensor); got strides {acc.stride()}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (acc, x, y, weight)):
        raise RuntimeError("gram_ is not differentiable: call it under torch.no_grad(), detach its input, or use gram")
    if forward_ad._current_level >= 0 or functorch_level() is not None:
        return acc.add_(torch.ops.freqrank.gram(x, y, weight))  # which has a rule for vmap and refuses tangents
    torch.ops.freqrank.gram_(acc, x, y, weight)
    increment_version(acc)  # a backward pass that saved acc must notice
    return acc


@torch.library.register_fake("freqrank::gram")
def _(x: Tensor, y: Tensor | None, weight: Tensor | None) -> Tensor:
    other = x if y is None else y
    return x.new_empty((*x.shape[:-2], x.shape[-1], other.shape[-1]), dtype=torch.float64)


@torch.library.register_fake("freqrank::gram_")
def _(acc: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None) -> None:
    return None


def _gram_setup(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gram_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, y, weight = ctx.saved_tensors
    wide_x = x.double()
    wide_y = wide_x if y is None else y.double()
    # one product serves x and weight; where Y is X both halves of the gradient fall on x
    along_x = wide_y @ (grad + grad.mT if y is None else grad).mT
    weighted = (lambda t: t) if weight is None else (lambda t: t * weight.unsqueeze(-1))
    grad_x = weighted(along_x).to(x.dtype) if ctx.needs_input_grad[0] else None
    grad_y = weighted(wide_x @ grad).to(y.dtype) if y is not None and ctx.needs_input_grad[1] else None
    grad_weight = None
    if weight is not None and ctx.needs_input_grad[2]:
        grad_weight = (wide_x * along_x).sum(-1)
        if y is None:
            grad_weight = grad_weight / 2
    return grad_x, grad_y, grad_weight


register_derivatives("gram", _gram_backward, setup_context=_gram_setup)


# --- factorisations ---------------------------------------------------------------------------------------------------


def cholesky_ex(A: Tensor, *, upper: bool = False, check_errors: bool = False) -> CholeskyResult:
    """The Cholesky factors of symmetric positive definite matrices, with the semantics of torch.linalg.cholesky_ex.

    Args:
        A: [..., n, n], float32 or float64, any strides. Only the lower triangle is read (the upper one if ``upper``).
        upper: return upper U with ``U.mT @ U = A`` instead of lower L with ``L @ L.mT = A``.
        check_errors: raise :class:`torch.linalg.LinAlgError` for the first matrix that fails, in a compiled graph too.
            This looks at ``info``, which synchronises with a GPU.

    Returns:
        A named tuple (L, info). ``L`` [..., n, n] is zero in the other triangle. ``info`` [...] int32 is 0, or the
        order of the first leading minor that is not positive definite; NaN in the triangle that is read gives
        ``info > 0``. A matrix that fails leaves the others alone; of its own factor only the leading ``info - 1`` rows
        and columns are meaningful, the rest is finished partly or not at all.

    Differentiable any number of times; the gradient is symmetric. Every order, single large matrices included, uses the
    library's own factorisation; nothing is handed to LAPACK or cuSOLVER, and on a GPU nothing waits for the host. There
    at most 8 batch dimensions that do not follow each other in memory are allowed.

    Raises:
        TypeError: A is not float32 or float64.
        ValueError: A is not square.

    >>> import torch
    >>> L, info = cholesky_ex(torch.tensor([[4.0, 2.0], [2.0, 5.0]]))
    >>> L
    tensor([[2., 0.],
            [1., 2.]])
    >>> cholesky_ex(torch.tensor([[1.0, 2.0], [2.0, 1.0]])).info
    tensor(2, dtype=torch.int32)
    """
    _check_square("A", A)
    check_dtype("A", A, _SOLVER_FLOATS)
    _check_bool("upper", upper)
    _check_bool("check_errors", check_errors)
    L, info = torch.ops.freqrank.cholesky_ex(A, upper)
    if check_errors:
        _raise_first_failure(info)
    return CholeskyResult(L, info)


def cholesky_solve_ex(A: Tensor, B: Tensor, *, upper: bool = False, check_errors: bool = False) -> CholeskySolution:
    """Solves A X = B for symmetric positive definite A by its Cholesky factor, which is returned too.

    Factor and solve are one pass over a small matrix: it stays in a GPU's registers or shared memory, in a CPU's
    caches, until its X is known. That is so for at most 512 right-hand sides and, on a CPU, n up to 512; on a GPU n up
    to about 192 in float32 and 128 in float64 (a few right-hand sides: 224 and 160). Beyond that it is
    :func:`cholesky_ex` followed by two triangular solves.

    Args:
        A: [..., n, n], float32 or float64, any strides. Only the lower triangle is read (the upper one if ``upper``).
        B: [..., n, k], of A's dtype, any strides. Leading dimensions broadcast with A's; an A that is repeated is
            factored as often.
        upper: read the upper triangle and return upper U with ``U.mT @ U = A`` in the place of L.
        check_errors: raise :class:`torch.linalg.LinAlgError` for the first matrix that fails, in a compiled graph too.
            This looks at ``info``, which synchronises with a GPU.

    Returns:
        A named tuple (X, L, info). ``X`` [..., n, k]; ``L`` [..., n, n] and ``info`` [...] int32 as those of
        :func:`cholesky_ex` for the broadcast batch, except that where ``info > 0`` all of ``X`` and of the factor's
        triangle is NaN. ``logdet(L)`` is the log-determinant of A. NaN in one right-hand side stays there.

    Differentiable any number of times with respect to A and B; the gradient of A is symmetric. On a GPU nothing waits
    for the host, and at most 8 batch dimensions that do not follow each other in memory are allowed.

    Raises:
        TypeError: dtypes that are not float32 or float64, or differ.
        ValueError: A is not square, shapes that do not match.

    >>> import torch
    >>> A = torch.tensor([[4.0, 2.0], [2.0, 5.0]])
    >>> X, L, info = cholesky_solve_ex(A, torch.tensor([[8.0], [12.0]]))
    >>> X
    tensor([[1.],
            [2.]])
    >>> logdet(L).exp()
    tensor(16.)
    """
    _check_system(A, B)
    _check_bool("upper", upper)
    _check_bool("check_errors", check_errors)
    if B.shape[-2] != A.shape[-1]:
        raise ValueError(f"B must have shape [..., {A.shape[-1]}, k] for A {tuple(A.shape)}; got {tuple(B.shape)}")
    A, B = _in_one_batch(A, B)
    X, L, info = torch.ops.freqrank.cholesky_solve_ex(A, B, upper)
    if check_errors:
        _raise_first_failure(info)
    return CholeskySolution(X, L, info)


def _raise_first_failure(info: Tensor) -> None:
    # torch's own, because torch.compile, torch.export and vmap know it
    torch._linalg_check_errors(info, "linalg.cholesky_ex", is_matrix=info.dim() == 0)


def solve_triangular(
    A: Tensor,
    B: Tensor,
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Solves A X = B, or X A = B if not ``left``, for triangular A: torch.linalg.solve_triangular's signature.

    Args:
        A: [..., n, n], float32 or float64, any strides. Only the triangle named by ``upper`` is read.
        B: [..., n, k], or [..., k, n] if not ``left``, of A's dtype. Leading dimensions broadcast with A's.
        upper: A is upper triangular, else lower.
        left: A is on the left of X.
        unitriangular: take A's diagonal as ones and do not read it.
        out: a tensor of the result's shape and dtype that receives it; an empty one is resized, as torch
            does. Not under autograd.

    A zero on the diagonal divides by zero, as in torch.linalg: the result holds Inf or NaN (on a GPU, rows after an Inf
    may be NaN). NaN in one right-hand side stays there. Differentiable any number of times with respect to A and B.

    On a GPU at most 8 batch dimensions that do not follow each other in memory are allowed.

    Raises:
        TypeError: dtypes that are not float32 or float64, or differ.
        ValueError: shapes that do not match.

    >>> import torch
    >>> A = torch.tensor([[2.0, 0.0], [1.0, 4.0]])
    >>> solve_triangular(A, torch.tensor([[2.0], [9.0]]), upper=False)
    tensor([[1.],
            [2.]])
    """
    _check_system(A, B)
    _check_bool("upper", upper)
    _check_bool("left", left)
    _check_bool("unitriangular", unitriangular)
    if B.shape[-2 if left else -1] != A.shape[-1]:
        need = f"[..., {A.shape[-1]}, k]" if left else f"[..., k, {A.shape[-1]}]"
        raise ValueError(f"B must have shape {need} for A {tuple(A.shape)} and left={left}; got {tuple(B.shape)}")
    A, B = _in_one_batch(A, B)
    if out is None:
        return torch.ops.freqrank.solve_triangular(A, B, upper, left, unitriangular)
    check_tensor("out", out)
    check_dtype("out", out, (B.dtype,))
    check_device("out", out, "B", B)
    if out.shape != B.shape and out.numel() > 0:
        raise ValueError(f"out must have shape {tuple(B.shape)}; got {tuple(out.shape)}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (A, B, out)):
        raise RuntimeError("solve_triangular with out= is not differentiable: leave out= away, or use torch.no_grad()")
    if out.shape != B.shape:
        out.resize_(B.shape)
    return out.copy_(torch.ops.freqrank.solve_triangular(A, B, upper, left, unitriangular))


def logdet(L: Tensor) -> Tensor:
    """The log-determinant of A = L L^T (or U^T U) from its Cholesky factor: 2 sum log diag L.

    Args:
        L: [..., n, n], a triangular factor with a positive diagonal, float32 or float64; only the diagonal is read.

    Returns:
        [...] of L's dtype; 0 for n = 0. NaN where the diagonal holds a negative number or NaN.

    Raises:
        TypeError: L is not float32 or float64.
        ValueError: L is not square.

    >>> import torch
    >>> logdet(cholesky_ex(torch.diag(torch.tensor([1.0, 4.0]))).L)
    tensor(1.3863)
    """
    _check_square("L", L)
    check_dtype("L", L, _SOLVER_FLOATS)
    return 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@torch.library.register_fake("freqrank::cholesky_ex")
def _(A: Tensor, upper: bool) -> tuple[Tensor, Tensor]:
    factor = A.new_empty(A.shape)  # the lower factor lies column by column in memory, as torch's does
    return factor if upper else factor.mT, A.new_empty(A.shape[:-2], dtype=torch.int32)


@torch.library.register_fake("freqrank::cholesky_solve_ex")
def _(A: Tensor, B: Tensor, upper: bool) -> tuple[Tensor, Tensor, Tensor]:
    factor = A.new_empty(A.shape)
    return B.new_empty(B.shape), factor if upper else factor.mT, A.new_empty(A.shape[:-2], dtype=torch.int32)


@torch.library.register_fake("freqrank::solve_triangular")
def _(A: Tensor, B: Tensor, upper: bool, left: bool, unitriangular: bool) -> Tensor:
    return B.new_empty(B.shape)


# The backward formulas are made of the ops above and of products: differentiating them again needs nothing more.


def _cholesky_setup(ctx: Any, inputs: tuple[Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    ctx.upper = inputs[1]
    ctx.save_for_backward(output[0])


def _cholesky_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    (factor,) = ctx.saved_tensors
    with torch.autocast(factor.device.type, enabled=False):
        return _factor_gradient(factor, grad, ctx.upper), None


def _factor_gradient(factor: Tensor, grad: Tensor, upper: bool) -> Tensor:
    # dA = L^-T sym(tril(L^T dL)) L^-1 / 2, where sym mirrors the strict lower triangle (Murray 2016, section 4)
    L, grad = (factor.mT, grad.mT) if upper else (factor, grad)
    inner = (L.mT @ grad.tril()).tril()
    inner = inner + inner.tril(-1).mT
    half = torch.ops.freqrank.solve_triangular(L.mT, inner, True, True, False)
    result = torch.ops.freqrank.solve_triangular(L, half, False, False, False)
    return (result + result.mT) / 4


def _cholesky_solve_setup(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.upper = inputs[2]
    ctx.save_for_backward(*output[:2])


def _cholesky_solve_backward(
    ctx: Any, grad_X: Tensor | None, grad_L: Tensor | None, _: Any
) -> tuple[Tensor | None, Tensor | None, None]:
    # dB = A^-1 dX, dA = -sym(dB X^T), and what falls on the factor
    X, factor = ctx.saved_tensors
    with torch.autocast(X.device.type, enabled=False):
        grad_A = None if grad_L is None else _factor_gradient(factor, grad_L, ctx.upper)
        if grad_X is None:
            return grad_A, None, None
        L = factor.mT if ctx.upper else factor
        half = torch.ops.freqrank.solve_triangular(L, grad_X, False, True, False)
        grad_B = torch.ops.freqrank.solve_triangular(L.mT, half, True, True, False)
        if ctx.needs_input_grad[0]:
            product = grad_B @ X.mT
            through_X = (product + product.mT) / -2
            grad_A = through_X if grad_A is None else grad_A + through_X
        return grad_A, grad_B, None


def _solve_setup(ctx: Any, inputs: tuple[Tensor, Tensor, bool, bool, bool], output: Tensor) -> None:
    ctx.options = inputs[2:]
    ctx.save_for_backward(inputs[0], output)


def _solve_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    # A X = B: dB = A^-T dX, dA = -dB X^T on A's triangle; X A = B the other way round
    A, X = ctx.saved_tensors
    upper, left, unitriangular = ctx.options
    with torch.autocast(A.device.type, enabled=False):
        grad_B = torch.ops.freqrank.solve_triangular(A.mT, grad, not upper, left, unitriangular)
        grad_A = None
        if ctx.needs_input_grad[0]:
            product = -(grad_B @ X.mT) if left else -(X.mT @ grad_B)
            offset = 1 if unitriangular else 0
            grad_A = product.triu(offset) if upper else product.tril(-offset)
    return grad_A, grad_B, None, None, None


register_derivatives("cholesky_ex", _cholesky_backward, setup_context=_cholesky_setup)
register_derivatives("cholesky_solve_ex", _cholesky_solve_backward, setup_context=_cholesky_solve_setup)
register_derivatives("solve_triangular", _solve_backward, setup_context=_solve_setup)


# --- whitening --------------------------------------------------------------------------------------------------------


def _whiten_arguments(gram: Tensor, scale: float | Tensor | None, name: str) -> Tensor | None:
    """Checks, and the scale as a float64 tensor of the batch shape."""
    _check_square("gram", gram)
    check_dtype("gram", gram, _SOLVER_FLOATS)
    batch = gram.shape[:-2]
    if isinstance(scale, Tensor):
        if scale.is_complex() or scale.dtype == torch.bool:
            raise TypeError(f"scale must be real; got {scale.dtype}")
        check_device("scale", scale, "gram", gram)
        try:
            scale = scale.to(torch.float64).expand(batch)
        except RuntimeError:
            raise ValueError(
                f"scale must have the batch shape of gram, {tuple(batch)}; got {tuple(scale.shape)}"
            ) from None
        if check_values(scale) and not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError("scale must be finite and positive; got a tensor with other values")
    elif scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"scale must be a float or a tensor; got {type(scale).__name__}")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be finite and positive; got {scale}")
        scale = torch.full(batch, float(scale), dtype=torch.float64, device=gram.device)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (gram, scale)):
        raise RuntimeError(
            f"{name} is not differentiable: call it under torch.no_grad(), detach its input, or use cholesky_ex"
        )
    return scale


def whiten(gram: Tensor, *, scale: float | Tensor | None = None) -> Whitening:
    """Upper triangular R with R^T R = scale * G, damped as little as makes G positive definite in float64.

    Args:
        gram: G, [..., n, n], symmetric; float64, or float32 which is widened as it is read. Only the upper triangle is
            read.
        scale: a positive factor: a number, or a tensor of the batch shape of ``gram`` (or one that broadcasts to it).
            1 if None.

    For each matrix, first without damping; if that fails, G + eps diag(G) with eps = 1e-12, 1e-11, ... 1e-6, a channel
    that is zero taking eps times the mean of the diagonal. Damping is relative to each channel because an absolute one
    drowns the channels with small activations.

    Returns:
        :class:`Whitening`: ``factor`` [..., n, n] float64; ``damping`` [...] float64, the eps that was needed or 0;
        ``info`` [...] int32, 0, or where every level failed the order of the leading minor that did so last: ``factor``
        is then NaN in its upper triangle and ``damping`` the last level tried (a NaN ends the ladder early: no damping
        cures it). A NaN in one matrix fails that matrix alone.

    One native call, nothing is copied to the host. Not differentiable: raises RuntimeError if a gradient would be
    needed, NotImplementedError in forward mode.

    On a GPU at most 8 batch dimensions that do not follow each other in memory are allowed.

    Raises:
        TypeError: dtypes that are not listed.
        ValueError: shapes that do not match, a scale that is not positive.

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]])
    >>> factor, damping, info = whiten(gram(x))
    >>> damping, info
    (tensor(1.0000e-12, dtype=torch.float64), tensor(0, dtype=torch.int32))
    >>> torch.allclose(factor.mT @ factor, gram(x))
    True
    """
    factor, damping, info = torch.ops.freqrank.whiten(gram, _whiten_arguments(gram, scale, "whiten"))
    return Whitening(factor, damping, info)


@torch.library.register_fake("freqrank::whiten")
def _(gram: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch = gram.shape[:-2]
    return (
        gram.new_empty(gram.shape, dtype=torch.float64),
        gram.new_empty(batch, dtype=torch.float64),
        gram.new_empty(batch, dtype=torch.int32),
    )


def _whiten_backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError("whiten is not differentiable: detach its input, or use cholesky_ex")


# for transforms of torch.func that hide what requires a gradient, and for tangents
register_derivatives("whiten", _whiten_backward, setup_context=lambda ctx, inputs, output: None)


def whiten_eigh(gram: Tensor, *, scale: float | Tensor | None = None) -> Whitening:
    """:func:`whiten` by eigenvalues, for matrices that no damping level saves: slower, never indefinite.

    With scale * G = Q diag(w) Q^T, eigenvalues below ``n u max(w)`` (u the unit roundoff) are raised to it, and R is
    the upper factor, with a positive diagonal, of a QR decomposition of diag(sqrt(w)) Q^T.

    **Synchronises**: torch.linalg.eigh waits for a GPU and tells the host whether it converged.

    Arguments, errors and results are those of :func:`whiten`, except that ``damping`` is ``n u`` where an eigenvalue
    was raised (a fraction of the largest eigenvalue) and 0 elsewhere. ``info`` is 1 where G has no positive eigenvalue
    (``factor`` is 0) or is not finite (``factor`` is NaN in its upper triangle).

    >>> import torch
    >>> G = torch.ones(2, 2, dtype=torch.float64)
    >>> factor, damping, info = whiten_eigh(G)
    >>> torch.allclose(factor.mT @ factor, G), bool(damping > 0), int(info)
    (True, True, 0)
    """
    factors = _whiten_arguments(gram, scale, "whiten_eigh")
    scaled = gram.double() if factors is None else gram.double() * factors[..., None, None]
    scaled = scaled.triu() + scaled.triu(1).mT
    n = gram.shape[-1]
    batch = gram.shape[:-2]
    if n == 0 or gram.numel() == 0:
        return Whitening(scaled, scaled.new_zeros(batch), scaled.new_zeros(batch, dtype=torch.int32))
    finite = scaled.isfinite().all(-1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(finite[..., None, None], scaled, 0.0))
    level = n * torch.finfo(torch.float64).eps / 2
    floor = values[..., -1:].clamp(min=0) * level
    clipped = (values < floor).any(-1)
    roots = torch.maximum(values, floor).sqrt()
    R = torch.linalg.qr(roots.unsqueeze(-1) * vectors.mT, mode="r").R
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    R = torch.where(finite[..., None, None], sign.unsqueeze(-1) * R, float("nan")).triu()
    info = (~finite | (values[..., -1] <= 0)).to(torch.int32)
    return Whitening(R, torch.where(clipped, level, 0.0).to(torch.float64), info)
