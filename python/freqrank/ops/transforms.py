"""Discrete cosine transforms of types I to IV, in one and in several dimensions."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from freqrank import _native
from freqrank.ops._checks import FLOATS, check_option, check_tensor
from freqrank.ops._derivatives import below_autograd, functorch_level, register_derivatives

__all__ = ["dct", "dctn", "describe_plan", "idct", "idctn"]

MAX_LENGTH = 2**30  # kLongestRow in csrc/dct/dct.h

# the arguments of torch.ops.freqrank.dct
_Call = tuple[Tensor, list[int], list[int] | None, None, int, int, int, int]


def dct(
    x: Tensor,
    type: int = 2,
    n: int | None = None,
    dim: int = -1,
    norm: str | None = None,
    *,
    orthogonalize: bool | None = None,
) -> Tensor:
    r"""Discrete cosine transform along one dimension, with :func:`scipy.fft.dct`'s definitions.

    With :math:`N` the length and ``norm=None`` or ``"backward"``,

    - type I: :math:`y_k = x_0 + (-1)^k x_{N-1} + 2 \sum_{n=1}^{N-2} x_n \cos(\pi k n / (N-1))`, :math:`N \ge 2`
    - type II: :math:`y_k = 2 \sum_n x_n \cos(\pi k (2n+1) / 2N)`
    - type III: :math:`y_k = x_0 + 2 \sum_{n \ge 1} x_n \cos(\pi (2k+1) n / 2N)`
    - type IV: :math:`y_k = 2 \sum_n x_n \cos(\pi (2k+1)(2n+1) / 4N)`

    Args:
        x: float16, bfloat16, float32 or float64, any strides, any number of dimensions from one on. Integers and bool
            are converted to the default dtype, as in :mod:`torch.fft`.
        type: 1, 2, 3 or 4.
        n: length of the transform; ``x`` is cropped or zero-padded at its end. Default: the size of ``x``.
        dim: dimension to transform, negative ones count from the end. It is read and written in place: no transposing
            copy is made.
        norm: None or "backward" (no factor; :func:`idct` has it), "ortho" (both have the square root) or "forward"
            (this one has all of it, :math:`1/2N`, for type I :math:`1/2(N-1)`).
        orthogonalize: use the orthogonal variant of the matrix: in types II and III the zeroth coefficient is scaled
            by :math:`\sqrt{1/2}`, in type I both ends are; type IV is orthogonal anyway. Default: ``norm == "ortho"``.

    Returns:
        A new contiguous tensor of the dtype of ``x``, of size ``n`` along ``dim``. 16-bit tensors are computed in
        float32 and rounded once. O(N log N) for every N. Each row has the same bits whatever the other rows, their
        number and that of threads. Differentiable any number of times, in
        reverse and forward mode, also by :mod:`torch.func`; works under :func:`torch.vmap`.

    Raises:
        TypeError: ``x`` is not a tensor or is complex, ``type``, ``n`` or ``dim`` is not an integer.
        ValueError: ``type`` or ``norm`` is none of the above, ``dim`` is out of range, the length is below 1 (below 2
            for type I) or above 2^30; also if ``x`` is sparse or nested, or is on a device without kernels, or whose
            kernels are not built.

    Types I to IV: Wang and Hunt 1985. The algorithm for type II: Makhoul 1980, for lengths with large prime factors
    Rader 1968 on the CPU, Bluestein 1970 on CUDA.

    >>> import torch, freqrank
    >>> freqrank.dct(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([20.0000, -6.3086,  0.0000, -0.4483])
    """
    return _transform(x, type, n, dim, norm, orthogonalize, inverse=False, many=False)


def idct(
    x: Tensor,
    type: int = 2,
    n: int | None = None,
    dim: int = -1,
    norm: str | None = None,
    *,
    orthogonalize: bool | None = None,
) -> Tensor:
    """Inverse of :func:`dct` with the same ``type``, ``norm`` and ``orthogonalize``, as :func:`scipy.fft.idct`.

    Arguments, result and errors are those of :func:`dct`; ``norm=None`` or ``"backward"`` divides by 2N (for type I by
    2(N - 1)), ``"forward"`` does not.

    >>> import torch, freqrank
    >>> x = torch.tensor([1.0, 2.0, 3.0])
    >>> torch.allclose(freqrank.idct(freqrank.dct(x, type=4), type=4), x)
    True
    """
    return _transform(x, type, n, dim, norm, orthogonalize, inverse=True, many=False)


def dctn(
    x: Tensor,
    type: int = 2,
    s: int | Sequence[int] | None = None,
    dim: int | Sequence[int] | None = None,
    norm: str | None = None,
    *,
    orthogonalize: bool | None = None,
) -> Tensor:
    """Discrete cosine transform along several dimensions, as :func:`scipy.fft.dctn`.

    Args:
        x, type, norm, orthogonalize: as in :func:`dct`.
        s: lengths of the transform along the dimensions of ``dim``; ``x`` is cropped or zero-padded at its end. -1
            stands for the size of ``x``. Default: the sizes of ``x``.
        dim: the dimensions, each once. Default: all, or the last ``len(s)`` if ``s`` is given.

    Returns:
        A new contiguous tensor of the dtype of ``x``. 16-bit tensors are rounded once, after the last dimension.

    Raises:
        TypeError, ValueError: as :func:`dct`; ValueError also if ``s`` and ``dim`` differ in length, ``s`` has more
            entries than ``x`` dimensions, or a dimension is repeated.

    >>> import torch, freqrank
    >>> x = torch.ones(2, 3)
    >>> freqrank.dctn(x, norm="ortho")[0, 0].item() == freqrank.dctn(x, norm="ortho").norm().item()
    True
    """
    return _transform(x, type, s, dim, norm, orthogonalize, inverse=False, many=True)


def idctn(
    x: Tensor,
    type: int = 2,
    s: int | Sequence[int] | None = None,
    dim: int | Sequence[int] | None = None,
    norm: str | None = None,
    *,
    orthogonalize: bool | None = None,
) -> Tensor:
    """Inverse of :func:`dctn` with the same ``type``, ``norm`` and ``orthogonalize``, as :func:`scipy.fft.idctn`.

    Arguments, result and errors are those of :func:`dctn`.

    >>> import torch, freqrank
    >>> x = torch.arange(6.0).reshape(2, 3)
    >>> torch.allclose(freqrank.idctn(freqrank.dctn(x)), x, atol=1e-6)
    True
    """
    return _transform(x, type, s, dim, norm, orthogonalize, inverse=True, many=True)


def describe_plan(
    op: Callable[..., Tensor] | str,
    x: Tensor | Sequence[int],
    *args: Any,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    **options: Any,
) -> str:
    """Which algorithms ``op(x, *args, **options)`` goes through on a device, why, and what they move: text for people.

    Nothing is computed and the device need not be there.

    Args:
        op: :func:`dct`, :func:`idct`, :func:`dctn` or :func:`idctn`, or its name.
        x: a tensor, whose values are not read, or the sizes of a contiguous one.
        *args, **options: further arguments of ``op``.
        dtype: of the tensor if ``x`` is sizes. Default: the default dtype.
        device: the device to plan for, "cpu" or "cuda". Default: the device of ``x``, "cpu" if ``x`` is sizes. On a
            machine without that GPU the plan is that of an H100 and says so.

    Raises:
        TypeError, ValueError: as ``op``; ValueError also for another op or device.

    >>> import torch, freqrank
    >>> print(freqrank.describe_plan(freqrank.dct, (1000, 34), norm="ortho"))
    Rader (...): type II of length 34, 1000 rows...
    >>> "1000 rows" in freqrank.describe_plan("dct", (1000, 256), dtype=torch.bfloat16, device="cuda")
    True
    """
    functions = {"dct": dct, "idct": idct, "dctn": dctn, "idctn": idctn}
    function = functions.get(op) if isinstance(op, str) else op
    if function is None or function not in functions.values():
        raise ValueError(f"op must be freqrank's dct, idct, dctn or idctn, or one of these names; got {op!r}")
    if isinstance(x, Tensor):
        if dtype is not None:
            raise TypeError(f"dtype goes with sizes: x is a tensor and has its own, {x.dtype}; got dtype={dtype}")
        if device is None and x.is_meta:
            raise ValueError("device must be given for a meta tensor: 'cpu' or 'cuda'; got None")
        target = x.device if device is None else torch.device(device)
        shadow = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    else:
        wanted = _integers("x", x)
        if wanted is None or any(size < 0 for size in wanted):
            raise ValueError(f"x must be a tensor or the sizes of one; got {x!r}")
        target = torch.device("cpu" if device is None else device)
        shadow = torch.empty(wanted, dtype=dtype, device="meta")
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda'; got {str(target)!r}")

    bound = inspect.signature(function).bind(shadow, *args, **options)
    bound.apply_defaults()
    inverse, many = function in (idct, idctn), function in (dctn, idctn)
    call = _arguments(*bound.arguments.values(), inverse=inverse, many=many)
    limits: list[int] = []
    note = ""
    if target.type == "cuda":
        if _native.cuda_loaded() and torch.cuda.is_available():
            index = torch.cuda.current_device() if target.index is None else target.index
            limits = torch.ops.freqrank.dct_cuda_limits(index)
        else:
            note = "for a GPU like the H100, as none can be asked here\n"
    if isinstance(call, Tensor):
        return "a copy: no dimension is transformed"
    shadow, *arguments = call
    sizes, strides = shadow.shape, shadow.stride()
    return note + torch.ops.freqrank.dct_plan(sizes, strides, shadow.dtype, *arguments, target.type, limits)


# --- arguments ----------------------------------------------------------------------------------------------------


def _integer(name: str, value: Any) -> int:
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]  # a SymInt stays one, or every size would be compiled anew
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer; got {value!r}") from None


def _integers(name: str, value: Any) -> list[int] | None:
    if value is None:
        return None
    if isinstance(value, (tuple, list, torch.Size)):
        return [_integer(f"{name}[{i}]", item) for i, item in enumerate(value)]
    try:
        return [_integer(name, value)]
    except TypeError:
        raise TypeError(f"{name} must be an integer or a sequence of integers; got {value!r}") from None


_dct = torch.ops.freqrank.dct.default
_invoke = _dct._op  # what calling _dct comes to
_is_compiling = torch.compiler.is_compiling

_TYPES, _NORMS = (1, 2, 3, 4), (None, "backward", "ortho", "forward")
_HALVES = dict(zip(_NORMS, (0, 0, 1, 2), strict=True))
_TRANSPOSED = {1: 1, 2: 3, 3: 2, 4: 4}  # and inverse, but for the direction of the norm


def _matrices() -> dict[tuple[int, bool, bool], tuple[int, int, int]]:
    """(type, inverse, orthogonalize) -> type, in_ends and out_ends of the op."""
    table = {}
    for type, inverse, orthogonalize in itertools.product(_TYPES, (False, True), (False, True)):
        kind = _TRANSPOSED[type] if inverse else type
        in_ends = 0 if kind in (2, 4) else 1 if orthogonalize else 2
        out_ends = 1 if orthogonalize and kind in (1, 2) else 0
        table[type, inverse, orthogonalize] = kind, in_ends, out_ends
    return table


_MATRICES = _matrices()


def _transform(
    x: Tensor, type: int, n: Any, dim: Any, norm: str | None, orthogonalize: bool | None, *, inverse: bool, many: bool
) -> Tensor:
    call = _arguments(x, type, n, dim, norm, orthogonalize, inverse=inverse, many=many)
    if not isinstance(call, tuple):
        return call
    x = call[0]
    if (
        _is_compiling()
        or x.__class__ is not Tensor
        or (x.requires_grad and torch.is_grad_enabled())
        or forward_ad._current_level >= 0
        or functorch_level() is not None
    ):
        return _dct(*call)
    # Nobody can ask for a derivative: past autograd, whose Python costs more than a short transform.
    with below_autograd():
        return _invoke(*call)


def _arguments(
    x: Tensor, type: int, n: Any, dim: Any, norm: str | None, orthogonalize: bool | None, *, inverse: bool, many: bool
) -> _Call | Tensor:
    """The checked arguments of the native op, or the result itself where no dimension is transformed.

    Short transforms take no longer than this: what is checked is cheap where it holds, and says why elsewhere.
    """
    if not isinstance(x, Tensor):
        check_tensor("x", x)
    dtype = x.dtype
    if dtype not in FLOATS and x.is_complex():
        raise TypeError(f"x must be real; got {dtype}. Transform real and imaginary part each on its own")
    if x.layout is not torch.strided or x.is_nested:
        layout = "a nested tensor" if x.is_nested else str(x.layout)
        raise ValueError(f"x must be dense, of layout torch.strided; got {layout}")
    if type.__class__ is not int:
        type = _integer("type", type)
    if type not in _TYPES:
        check_option("type", type, _TYPES)
    if norm not in _NORMS:
        check_option("norm", norm, _NORMS)
    shape = x.shape
    lengths: list[int] | None
    if many:
        lengths, dims = _integers("s", n), _integers("dim", dim)
        ndim = len(shape)
        if lengths is not None and len(lengths) > ndim:
            raise ValueError(f"s must have at most one entry for each of x's {ndim} dimensions; got {len(lengths)}")
        if dims is None:
            dims = list(range(-(ndim if lengths is None else len(lengths)), 0))
        if lengths is not None and len(lengths) != len(dims):
            raise ValueError(f"s and dim must have the same length; got {len(lengths)} and {len(dims)}")
        dims = [_dimension(d, ndim) for d in dims]
        if len(set(dims)) != len(dims):
            raise ValueError(f"dim must name each dimension once; got {dim!r}")
        if lengths is not None:
            lengths = [shape[d] if length == -1 else length for length, d in zip(lengths, dims, strict=True)]
        for length, d in zip([shape[d] for d in dims] if lengths is None else lengths, dims, strict=True):
            _check_length("s", length, type, d)
    else:
        lengths = None if n is None else [_integer("n", n)]
        d = _dimension(dim if dim.__class__ is int else _integer("dim", dim), len(shape))
        dims = [d]
        _check_length("n", shape[d] if lengths is None else lengths[0], type, d)

    if dtype not in FLOATS:
        if x.is_floating_point():  # the 8-bit ones and their kin
            raise TypeError(f"x must have dtype float16, bfloat16, float32, float64 or an integer one; got {dtype}")
        x = x.to(torch.get_default_dtype())
    if not dims:
        return x.clone(memory_format=torch.contiguous_format)

    halves = _HALVES[norm]
    orthogonalize = norm == "ortho" if orthogonalize is None else bool(orthogonalize)
    kind, in_ends, out_ends = _MATRICES[type, inverse, orthogonalize]
    return x, dims, lengths, None, kind, 2 - halves if inverse else halves, in_ends, out_ends


def _dimension(d: int, ndim: int) -> int:
    if not -ndim <= d < ndim:
        allowed = f"from {-ndim} to {ndim - 1}" if ndim else "none, for x has no dimensions"
        raise ValueError(f"dim out of range: allowed is {allowed}; got {d}")
    return d + ndim if d < 0 else d


def _check_length(name: str, length: int, type: int, d: int) -> None:
    smallest = 2 if type == 1 else 1
    if length < smallest:
        raise ValueError(
            f"{name}, the length of the transform, must be at least {smallest} for type {type}; "
            f"got {length} along dimension {d}"
        )
    # not while tracing, where it would bound every dynamic size; the native op has the same check
    if not _is_compiling() and length > MAX_LENGTH:
        raise ValueError(
            f"{name}, the length of the transform, must be at most {MAX_LENGTH}; got {length} along dimension {d}"
        )


# --- fake, autograd, vmap -----------------------------------------------------------------------------------------


@torch.library.register_fake("freqrank::dct")
def _fake(
    x: Tensor,
    dims: list[int],
    lengths: list[int] | None,
    sizes: list[int] | None,
    type: int,
    norm: int,
    in_ends: int,
    out_ends: int,
) -> Tensor:
    shape = list(x.shape)
    written = lengths if sizes is None else sizes
    if written is not None:
        for d, size in zip(dims, written, strict=True):
            shape[d] = size
    return x.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.arguments = inputs
    ctx.sizes = [x.shape[d] for d in ctx.arguments[0]]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The transposed matrix: the type's own transpose, ends exchanged; cropping and padding exchanged too.
    dims, lengths, sizes, type, norm, in_ends, out_ends = ctx.arguments
    resized = None
    if lengths is not None or sizes is not None:
        lengths, resized = lengths or ctx.sizes, ctx.sizes
    return _dct(grad, dims, lengths, resized, _TRANSPOSED[type], norm, out_ends, in_ends), *[None] * 7


def _jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
    return _dct(tangent, *ctx.arguments)


register_derivatives("dct", _backward, setup_context=_setup_context, jvp=_jvp)


@torch.library.register_vmap("freqrank::dct")
def _vmap(info: Any, in_dims: tuple[int, ...], x: Tensor, dims: list[int], *args: Any) -> tuple[Tensor, int]:
    return _dct(x.movedim(in_dims[0], 0), [d + 1 for d in dims], *args), 0
