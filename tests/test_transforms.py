"""The discrete cosine transforms against SciPy and against dense float64 matrices."""

from __future__ import annotations

import itertools
import math
import threading

import freqrank
import numpy as np
import pytest
import scipy.fft
import torch
from freqrank.ops import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

TYPES = (1, 2, 3, 4)
NORMS = (None, "backward", "ortho", "forward")
ORTHOGONALIZE = (None, True, False)
ONE = ("dct", "idct")
MANY = ("dctn", "idctn")
# small ones, primes of every radix and beyond, smooth ones, twice a prime, one more than a power of two
LENGTHS = (*range(1, 36), 37, 48, 64, 67, 81, 97, 121, 125, 128, 130, 134, 169, 242, 257, 343, 360, 997)
LONG_LENGTHS = (1009, 1024, 2187, 4096, 4097, 10007, 15015, 2**17)
BOUND = {torch.float32: 4e-7, torch.float64: 1e-15}


def rows(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(got: torch.Tensor, expected: object) -> float:
    want = torch.as_tensor(expected, dtype=torch.float64)
    assert got.shape == want.shape
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))


def bound(dtype: torch.dtype, *lengths: int) -> float:
    return BOUND[dtype] * sum(max(1.0, math.log2(n)) for n in lengths)


def check_against_scipy(n: int, combinations: object, counts: tuple[int, ...]) -> None:
    for dtype, count in itertools.product(BOUND, counts):
        x = rows(count, n, dtype=dtype, seed=n)
        for name, type, norm, orthogonalize in combinations:
            if type == 1 and n < 2:
                continue
            options = {"norm": norm, "orthogonalize": orthogonalize}
            got = getattr(freqrank, name)(x, type, **options)
            want = getattr(scipy.fft, name)(x.double().numpy(), type, **options)
            assert got.dtype == dtype
            assert error(got, want) <= bound(dtype, n), (name, type, options, dtype, count)


@pytest.mark.parametrize("n", LENGTHS)
def test_matches_scipy(n):
    check_against_scipy(n, list(itertools.product(ONE, TYPES, NORMS, ORTHOGONALIZE)), (1, 19))


@pytest.mark.parametrize("n", LONG_LENGTHS)
def test_matches_scipy_at_long_lengths(n):
    check_against_scipy(n, list(itertools.product(ONE, TYPES, (None, "ortho"), (None,))), (1, 5) if n < 10**5 else (1,))


@pytest.mark.long
@pytest.mark.parametrize("first", range(1, 1200, 100))
def test_matches_scipy_at_every_length(first):
    for n in range(first, first + 100):
        check_against_scipy(n, list(itertools.product(ONE, TYPES, NORMS, ORTHOGONALIZE)), (1, 19))


@pytest.mark.parametrize(
    ("n", "type"),
    [(1_000_003, 2), (1_000_003, 3), (2**19 + 1, 1), (3 * 2**18, 4)]
    + [pytest.param(n, type, marks=pytest.mark.long) for n in (1_000_003, 2_000_006, 3 * 2**18) for type in TYPES],
)
def test_huge_lengths(n, type):
    x = rows(n, dtype=torch.float32)
    got = freqrank.dct(x, type, norm="ortho")
    assert error(got, scipy.fft.dct(x.double().numpy(), type, norm="ortho")) <= bound(torch.float32, n)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 15, 17, 34])
def test_reference_matches_scipy(n):
    x = rows(3, n)
    for name, type, norm, orthogonalize in itertools.product(ONE, TYPES, NORMS, ORTHOGONALIZE):
        if type == 1 and n < 2:
            continue
        options = {"norm": norm, "orthogonalize": orthogonalize}
        want = getattr(scipy.fft, name)(x.numpy(), type, **options)
        assert error(getattr(reference, name)(x, type, **options), want) < 1e-14


# --- several dimensions, shapes, strides --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("name", MANY)
def test_many_dimensions(name, type, dtype):
    x = rows(4, 3, 5, 8, dtype=dtype)
    cases = [
        {},
        {"dim": (1, 3)},
        {"dim": (3, 0)},
        {"dim": -2},
        {"s": (7, 2)},
        {"s": 6},
        {"s": (9, 2, 5), "dim": (0, -1, 1)},
        {"s": (-1, 3), "dim": (2, 3)},
        {"s": [2, 3, 4, 5]},
    ]
    for case, norm, orthogonalize in itertools.product(cases, NORMS, ORTHOGONALIZE):
        s, dim = case.get("s"), case.get("dim")
        options = {"norm": norm, "orthogonalize": orthogonalize}
        got = getattr(freqrank, name)(x, type, s, dim, **options)
        want = getattr(scipy.fft, name)(x.double().numpy(), type, s, dim, **options)
        assert error(got, want) <= bound(dtype, 8, 8), (case, options)
        assert error(getattr(reference, name)(x, type, s, dim, **options), want) < 1e-14
        assert got.is_contiguous()


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 12])
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_crop_and_pad(n, dim):
    x = rows(6, 7, 5)
    for name, type in itertools.product(ONE, TYPES):
        if type == 1 and n < 2:
            continue
        got = getattr(freqrank, name)(x, type, n, dim)
        assert error(got, getattr(scipy.fft, name)(x.numpy(), type, n, dim)) <= bound(torch.float64, n)


def strided(kind: str) -> torch.Tensor:
    x = rows(6, 20, 9, dtype=torch.float32)
    return {
        "contiguous": x,
        "transposed": x.transpose(0, 2),
        "permuted": x.permute(1, 2, 0),
        "sliced": x[1:5, ::3, 1::2],
        "expanded": x[:1].expand(40, 20, 9),
        "expanded row": x[:, :, :1].expand(6, 20, 24),
        "offset": x.flatten()[7:][:60].view(3, 5, 4),
        "overlapping": torch.as_strided(x, (8, 20, 12), (3, 2, 1)),
        "flipped": x.flip(1),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["contiguous", "transposed", "permuted", "sliced", "expanded", "expanded row", "offset", "overlapping", "flipped"],
)
def test_strides(kind):
    x = strided(kind)
    before = x.clone()
    for dim in (0, 1, 2):
        for type in TYPES:
            got = freqrank.dct(x, type, dim=dim)
            assert torch.equal(got, freqrank.dct(x.contiguous(), type, dim=dim))
            assert error(got, scipy.fft.dct(x.double().numpy(), type, axis=dim)) <= bound(torch.float32, 40)
    assert torch.equal(freqrank.dctn(x, dim=(0, 2)), freqrank.dctn(x.contiguous(), dim=(0, 2)))
    assert torch.equal(x, before)


def test_one_dimension_and_conjugate_free_views():
    x = rows(10)
    assert error(freqrank.dct(x), scipy.fft.dct(x.numpy())) < 1e-14
    negated = torch.complex(rows(10), x).conj().imag  # a view with torch's lazy negation
    assert negated.is_neg()
    assert error(freqrank.dct(negated), scipy.fft.dct(-x.numpy())) < 1e-14


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (2, 5, 0)])
def test_empty_batch(shape):
    dim = shape.index(5)
    x = torch.empty(shape, requires_grad=True)
    y = freqrank.dct(x, dim=dim)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert freqrank.dct(x, n=8, dim=dim).numel() == 0


def test_padding_nothing_gives_zeros():
    assert torch.equal(freqrank.dct(torch.empty(3, 0), n=4), torch.zeros(3, 4))
    assert torch.equal(freqrank.dctn(torch.empty(0, 5), s=(4, 4)), torch.zeros(4, 4))


def test_no_dimensions():
    x = rows(3, 4)
    for name in MANY:
        y = getattr(freqrank, name)(x, dim=())
        assert torch.equal(x, y)
        assert y.data_ptr() != x.data_ptr()
        assert getattr(freqrank, name)(x.mT, dim=()).is_contiguous()
        assert getattr(freqrank, name)(torch.tensor(2.0)).item() == 2.0


def test_offsets_beyond_two_to_the_31():
    try:
        storage = torch.empty(2**31 + 2**20, dtype=torch.float16)  # pages are only taken when written
    except RuntimeError:
        pytest.skip("4 GiB of address space are not to be had")
    x = storage.as_strided((3, 64), (2**30, 1))
    x.copy_(rows(3, 64))
    assert torch.equal(freqrank.dct(x), freqrank.dct(x.clone()))
    assert torch.equal(freqrank.dct(x, dim=0), freqrank.dct(x.clone(), dim=0))
    assert torch.equal(freqrank.dct(x.T), freqrank.dct(x.T.clone()))


# --- dtypes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("type", TYPES)
def test_16_bit_is_one_rounding_of_float32(type, dtype):
    for shape in ((1, 40), (33, 40), (5, 31)):
        x = rows(*shape, dtype=dtype)
        for name in ONE:
            f = getattr(freqrank, name)
            for dim in (0, 1):
                if type == 1 and shape[dim] < 2:
                    continue
                assert torch.equal(f(x, type, dim=dim), f(x.float(), type, dim=dim).to(dtype))
    x = rows(6, 17, 12, dtype=dtype)
    for name, case in itertools.product(MANY, ({}, {"s": (3, 20, 7)}, {"dim": (2, 0)}, {"dim": 1})):
        f = getattr(freqrank, name)
        assert torch.equal(f(x, type, norm="ortho", **case), f(x.float(), type, norm="ortho", **case).to(dtype))


def test_float16_overflows_to_infinity_only_at_the_end():
    x = torch.full((8, 8), 60000.0, dtype=torch.float16)
    assert freqrank.dctn(x)[0, 0] == math.inf
    assert freqrank.dctn(x, norm="forward")[0, 0] == 60000.0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integers_become_the_default_dtype(dtype):
    x = torch.arange(12).remainder(5).to(dtype).view(3, 4)
    assert torch.equal(freqrank.dct(x), freqrank.dct(x.float()))
    assert freqrank.dctn(x, dim=()).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(freqrank.idct(x, 3), freqrank.idct(x.double(), 3))
    finally:
        torch.set_default_dtype(torch.float32)


# --- containment, repeatability -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 7, 16, 17, 64, 97, 2048])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_values_stay_in_their_row(n, bad):
    for type, dim in itertools.product(TYPES, (0, 1)):
        x = rows(37, n, dtype=torch.float32)
        spoilt = x.clone()
        spoilt[3, 0] = spoilt[20, n - 1] = spoilt[36, n // 2] = bad
        clean = [i for i in range(37) if i not in (3, 20, 36)]
        if dim == 0:
            x, spoilt = x.T.contiguous(), spoilt.T.contiguous()
        want, got = freqrank.dct(x, type, dim=dim), freqrank.dct(spoilt, type, dim=dim)
        if dim == 0:
            want, got = want.T, got.T
        assert torch.equal(got[clean], want[clean])
        assert not torch.isfinite(got[[3, 20, 36]]).any(dim=1).all() or n == 2
        assert not torch.isfinite(got[[3, 20, 36]]).all(dim=1).any()


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("n", [8, 31, 34, 1024, 1009])
def test_bits_do_not_depend_on_threads_neighbours_or_layout(n, dtype):
    x = rows(45, n, dtype=dtype)
    threads = torch.get_num_threads()
    for type in TYPES:
        want = freqrank.dct(x, type)
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                assert torch.equal(freqrank.dct(x, type), want)
                assert torch.equal(freqrank.dct(x.T.contiguous(), type, dim=0).T, want)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(torch.stack([freqrank.dct(row, type) for row in x]), want)
        assert torch.equal(freqrank.dct(x[7:9], type), want[7:9])


def test_calls_from_many_threads():
    # each length has its table made by whoever comes first, and more lengths are in use than tables are kept
    lengths = [*range(2, 80), 1009]
    inputs = {n: rows(3, n) for n in lengths}
    want = {n: freqrank.dct(x) for n, x in inputs.items()}
    wrong = []

    def work(seed: int) -> None:
        for n in np.random.default_rng(seed).permutation(lengths * 3):
            if not torch.equal(freqrank.dct(inputs[n]), want[n]):
                wrong.append(n)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# --- properties ---------------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    type = draw(st.sampled_from(TYPES))
    shape = draw(st.lists(st.integers(1, 12), min_size=0, max_size=2))
    dim = draw(st.integers(0, len(shape)))
    shape.insert(dim, draw(st.integers(2 if type == 1 else 1, 150)))
    options = {"norm": draw(st.sampled_from(NORMS)), "orthogonalize": draw(st.sampled_from(ORTHOGONALIZE))}
    return rows(*shape, seed=draw(st.integers(0, 2**31))), type, dim, options


@settings(max_examples=150, deadline=None)
@given(problems())
def test_inverse_linearity_parseval(problem):
    x, type, dim, options = problem
    tolerance = 1e-13
    y = freqrank.dct(x, type, dim=dim, **options)
    assert error(freqrank.idct(y, type, dim=dim, **options), x) < tolerance
    other = rows(*x.shape, seed=1)
    combined = freqrank.dct(2.5 * x - other, type, dim=dim, **options)
    torch.testing.assert_close(
        combined,
        2.5 * y - freqrank.dct(other, type, dim=dim, **options),
        rtol=tolerance,
        atol=tolerance * y.norm().item(),
    )
    orthonormal = freqrank.dct(x, type, dim=dim, norm="ortho")
    torch.testing.assert_close(orthonormal.norm(dim=dim), x.norm(dim=dim), rtol=tolerance, atol=tolerance)
    n = x.shape[dim]
    assert error(freqrank.dctn(x, type, (n,), (dim,), **options), y) == 0


@st.composite
def calls(draw):
    """Any call of any of the four functions, on a tensor of any layout."""
    name, type = draw(st.sampled_from(ONE + MANY)), draw(st.sampled_from(TYPES))
    smallest = 2 if type == 1 else 1
    ndim = draw(st.integers(1, 4))
    dims = draw(st.permutations(range(ndim)))[: draw(st.integers(1, min(3, ndim))) if name in MANY else 1]
    shape = [draw(st.integers(smallest, 40) if d in dims else st.integers(1, 19)) for d in range(ndim)]
    cropped = draw(st.booleans())
    lengths = [draw(st.integers(smallest, shape[d] + 9)) for d in dims] if cropped else None
    steps = [draw(st.integers(1, 3)) for _ in shape]
    order = draw(st.permutations(range(ndim)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    base = rows(*(shape[d] * steps[d] + 1 for d in order), dtype=dtype, seed=draw(st.integers(0, 2**31)))
    x = base.permute([order.index(d) for d in range(ndim)])
    x = x[tuple(slice(1, 1 + size * step, step) for size, step in zip(shape, steps, strict=True))]
    position = (lengths, dims) if name in MANY else (lengths[0] if lengths else None, dims[0])
    options = {"norm": draw(st.sampled_from(NORMS)), "orthogonalize": draw(st.sampled_from(ORTHOGONALIZE))}
    return name, x, (type, *position), options, dims, lengths or [shape[d] for d in dims]


@settings(max_examples=200, deadline=None)
@given(calls(), st.data())
def test_any_call(call, data):
    name, x, arguments, options, dims, lengths = call
    f = lambda x: getattr(freqrank, name)(x, *arguments, **options)  # noqa: E731
    y = f(x)
    assert torch.equal(f(x.contiguous()), y)
    if x.dtype in BOUND:
        want = getattr(scipy.fft, name)(x.numpy().astype(np.longdouble), *arguments, **options)
        assert error(y, want.astype(np.float64)) <= bound(x.dtype, math.prod(lengths))
        assert torch.equal(f(x * 2.0**90), y * 2.0**90)
    else:
        assert torch.equal(y, f(x.float()).to(x.dtype))
    batch = [d for d in range(x.dim()) if d not in dims]
    if batch:
        d = data.draw(st.sampled_from(batch))
        first = data.draw(st.integers(0, x.shape[d] - 1))
        count = data.draw(st.integers(1, x.shape[d] - first))
        assert torch.equal(f(x.narrow(d, first, count)), y.narrow(d, first, count))


# --- autograd -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orthogonalize", ORTHOGONALIZE)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("type", TYPES)
def test_gradients(type, norm, orthogonalize):
    options = {"norm": norm, "orthogonalize": orthogonalize}
    for name, n in itertools.product(ONE, (None, 3, 7)):
        x = rows(2, 5).requires_grad_()
        f = lambda x, name=name, n=n: getattr(freqrank, name)(x, type, n, **options)  # noqa: E731
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("name", MANY)
def test_gradients_in_many_dimensions(name, type):
    for case in ({}, {"s": (2, 4)}, {"s": (5, 2), "dim": (0, 2)}, {"dim": 1}):
        x = rows(3, 2, 3).transpose(0, 1).requires_grad_()
        f = lambda x, case=case: getattr(freqrank, name)(x, type, norm="ortho", **case)  # noqa: E731
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradients(dtype):
    x = rows(4, 9, dtype=dtype).requires_grad_()
    weight = rows(4, 12, dtype=dtype)
    freqrank.dctn(x, s=(4, 12), norm="ortho").backward(weight)
    wide = x.detach().float().requires_grad_()
    freqrank.dctn(wide, s=(4, 12), norm="ortho").backward(weight.float())
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, wide.grad.to(dtype))


def cube(x: torch.Tensor) -> torch.Tensor:
    return freqrank.dct(x, 3, n=6, norm="ortho").pow(3).sum(-1)


def dense_cube(x: torch.Tensor) -> torch.Tensor:
    matrix = reference.dct(torch.eye(5, dtype=torch.float64), 3, n=6, norm="ortho")
    return (x @ matrix).pow(3).sum(-1)


@pytest.mark.parametrize("type", TYPES)
def test_forward_mode(type):
    for name, options in (("dct", {"n": 7}), ("idct", {"dim": 0, "n": 3}), ("dctn", {"norm": "ortho"}), ("idctn", {})):
        f = lambda x, name=name, options=options: getattr(freqrank, name)(x, type, **options)  # noqa: E731
        x, tangent = rows(4, 5), rows(4, 5, seed=1)
        with forward_ad.dual_level():
            got = forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent)))
            assert torch.equal(got.primal, f(x))
            assert torch.equal(got.tangent, f(tangent))
            with torch.no_grad():
                assert torch.equal(forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent, f(tangent))
            half = forward_ad.unpack_dual(f(forward_ad.make_dual(x.half(), tangent.half())))
            assert torch.equal(half.tangent, f(tangent.half()))
            assert forward_ad.unpack_dual(f(x)).tangent is None
        leaf = x.clone().requires_grad_()
        batched = {"check_batched_grad": True}
        assert torch.autograd.gradcheck(f, leaf, check_forward_ad=True, check_batched_forward_grad=True, **batched)
        assert torch.autograd.gradgradcheck(f, leaf, check_fwd_over_rev=True, **batched)


def test_forward_mode_reaches_the_op_itself():
    x, tangent, arguments = rows(3, 5), rows(3, 5, seed=1), ([1], [5], [5], 2, 0, 0, 0)
    with forward_ad.dual_level(), torch.no_grad():
        got = forward_ad.unpack_dual(torch.ops.freqrank.dct(forward_ad.make_dual(x, tangent), *arguments))
    assert torch.equal(got.tangent, freqrank.dct(tangent))


@pytest.mark.parametrize("orthogonalize", ORTHOGONALIZE)
@pytest.mark.parametrize("type", TYPES)
def test_jacobians_are_the_matrix(type, orthogonalize):
    for name, n in itertools.product(ONE, (None, 3, 8)):
        f = lambda x, name=name, n=n: getattr(freqrank, name)(x, type, n, orthogonalize=orthogonalize)  # noqa: E731
        matrix = f(torch.eye(5, dtype=torch.float64)).T
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(jacobian(f)(rows(5)), matrix, rtol=1e-14, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's own, in linearize
def test_function_transforms():
    func, close = torch.func, torch.testing.assert_close
    x, many, tangents = rows(5), rows(4, 5, seed=1), rows(4, 5, seed=2)
    gradient, hessian = func.grad(dense_cube), func.hessian(dense_cube)
    curvature = hessian(x) @ tangents[0]
    close(func.grad(cube)(x), gradient(x))
    close(func.vjp(cube, many)[1](torch.ones(4, dtype=torch.float64))[0], torch.stack([gradient(row) for row in many]))
    close(func.jvp(cube, (many,), (tangents,))[1], func.jvp(dense_cube, (many,), (tangents,))[1])
    close(func.linearize(cube, many)[1](tangents), func.jvp(dense_cube, (many,), (tangents,))[1])
    for outer, inner in itertools.product((func.jacrev, func.jacfwd), repeat=2):
        close(outer(inner(cube))(x), hessian(x))
        close(func.jacfwd(outer(inner(cube)))(x), func.jacrev(hessian)(x))
    close(torch.vmap(func.grad(cube))(many), torch.stack([gradient(row) for row in many]))
    close(torch.vmap(func.hessian(cube))(many), torch.stack([hessian(row) for row in many]))
    close(func.grad(lambda x: torch.vmap(cube)(x).sum())(many), torch.stack([gradient(row) for row in many]))
    leaf = x.clone().requires_grad_()  # the two systems of derivatives in one another
    close(torch.autograd.grad(func.jvp(cube, (leaf,), (tangents[0],))[1], leaf)[0], curvature)
    with forward_ad.dual_level():
        (first,) = torch.autograd.grad(cube(dual := forward_ad.make_dual(leaf, tangents[0])), dual, create_graph=True)
        close(forward_ad.unpack_dual(first).tangent, curvature)


def test_vmap():
    x = rows(3, 4, 5)
    want = freqrank.dct(x, 2, dim=1)
    assert torch.equal(torch.vmap(lambda a: freqrank.dct(a, 2, dim=0))(x), want)
    assert torch.equal(
        torch.vmap(lambda a: freqrank.dct(a, 2, dim=0), in_dims=2, out_dims=2)(x), freqrank.dct(x, dim=0)
    )
    assert torch.equal(torch.vmap(torch.vmap(lambda a: freqrank.dct(a, 3)))(x), freqrank.dct(x, 3))
    leaf = x.clone().requires_grad_()
    identity = torch.eye(60, dtype=torch.float64).view(60, 3, 4, 5)
    y = freqrank.dct(leaf, dim=1)
    (batched,) = torch.autograd.grad(y, leaf, identity, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, leaf, row, retain_graph=True)[0] for row in identity]
    assert torch.equal(batched, torch.stack(one_by_one))


# --- the compiler and its kin -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((3, 5), ([1], [5], [5], 2, 0, 0, 0)),
        ((3, 5), ([0, 1], [4, 2], [4, 2], 1, 1, 1, 1)),
        ((3, 5), ([1], [7], [5], 3, 2, 2, 0)),
        ((0, 5), ([1], [5], [5], 4, 0, 0, 0)),
        ((3, 5), ([1, 0], None, None, 2, 0, 0, 1)),
        ((3, 5), ([1], None, [4], 2, 0, 0, 0)),
        ((3, 5), ([1], [8], None, 4, 1, 0, 0)),
    ],
)
def test_opcheck(shape, arguments):
    for dtype in (torch.float64, torch.bfloat16):
        x = rows(*shape, dtype=dtype).requires_grad_()
        torch.library.opcheck(torch.ops.freqrank.dct.default, (x, *arguments))


def test_lengths_and_sizes_of_the_op_have_defaults():
    x = rows(3, 5)
    op = torch.ops.freqrank.dct
    for lengths, sizes in itertools.product((None, [5], [8]), (None, [4], [9])):
        known = lengths or [5]
        want = op(x, [1], known, sizes or known, 3, 0, 2, 0)
        assert torch.equal(op(x, [1], lengths, sizes, 3, 0, 2, 0), want)
        f = lambda x, lengths=lengths, sizes=sizes: op(x, [1], lengths, sizes, 3, 0, 2, 0)  # noqa: E731
        assert torch.autograd.gradcheck(f, x.clone().requires_grad_(), check_forward_ad=True)
    with pytest.raises(RuntimeError, match="one length a transformed dimension"):
        op(x, [0, 1], [5], None, 2, 0, 0, 0)


def test_compile_once_for_many_sizes():
    compiled = 0

    def count(graph, inputs):
        nonlocal compiled
        compiled += 1
        return graph.forward

    def f(x):
        return freqrank.dct(x, norm="ortho").sum(0) + freqrank.idctn(x, 1)[0] + freqrank.dct(x, 4, n=9, dim=0)[0]

    g = torch.compile(f, fullgraph=True, backend=count)
    for shape in ((4, 6), (5, 11), (7, 130)):
        x = rows(*shape)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        assert torch.equal(g(x), f(x))
    assert compiled == 1


def test_compile_with_gradients():
    torch._dynamo.reset()
    f = lambda x: freqrank.dctn(x, s=(6, 5), norm="ortho").square()  # noqa: E731
    g = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 6), (9, 3)):
        x, y = (rows(*shape).requires_grad_() for _ in range(2))
        f(x).sum().backward()
        g(y).sum().backward()
        assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["grad", "hessian", "jacrev", "jacfwd"])
def test_compile_function_transforms(name, backend):
    torch._dynamo.reset()
    transform = getattr(torch.func, name)
    got = torch.compile(transform(cube), fullgraph=True, backend=backend, dynamic=True)(rows(5))
    torch.testing.assert_close(got, transform(dense_cube)(rows(5)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_forward_mode(backend):
    torch._dynamo.reset()

    def by_function(x, tangent):
        return torch.func.jvp(freqrank.dct, (x,), (tangent,))[1]

    def by_dual(x, tangent):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(freqrank.dct(forward_ad.make_dual(x, tangent))).tangent

    def without_grad(x, tangent):
        with torch.no_grad():
            return by_dual(x, tangent)

    for f in (by_function, by_dual, without_grad):
        got = torch.compile(f, fullgraph=True, backend=backend)(rows(3, 5), rows(3, 5, seed=1))
        assert torch.equal(got, freqrank.dct(rows(3, 5, seed=1)))


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x):
            return freqrank.dct(x, 2, dim=1, norm="ortho")

    sizes = {0: torch.export.Dim("b"), 1: torch.export.Dim("n", min=2)}
    program = torch.export.export(Module(), (rows(3, 8),), dynamic_shapes=(sizes,))
    x = rows(5, 13)
    assert torch.equal(program.module()(x), freqrank.dct(x, 2, norm="ortho"))


def test_meta_and_autocast():
    x = torch.empty(3, 4, 10**7, device="meta", dtype=torch.bfloat16)
    y = freqrank.dctn(x, s=(8, 9), dim=(0, 2))
    assert (y.shape, y.dtype, y.device.type) == ((8, 4, 9), torch.bfloat16, "meta")
    x = rows(3, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(freqrank.dct(x), freqrank.dct(x.clone()))
        assert freqrank.dct(x).dtype == torch.float32
        assert freqrank.dct(x.bfloat16()).dtype == torch.bfloat16


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "x", "options", "kind", "says"),
    [
        ("dct", [1.0], {}, TypeError, "x must be a torch.Tensor; got list"),
        ("dct", torch.ones(3, dtype=torch.complex64), {}, TypeError, "x must be real; got torch.complex64"),
        ("dct", torch.ones(3).to(torch.float8_e5m2), {}, TypeError, "x must have dtype .*float8_e5m2"),
        ("dct", torch.ones(3, 2).to_sparse(), {}, ValueError, "x must be dense, .* got torch.sparse_coo"),
        ("dct", torch.ones(3), {"type": 5}, ValueError, "type must be one of 1, 2, 3, 4; got 5"),
        ("dct", torch.ones(3), {"type": 2.0}, TypeError, "type must be an integer; got 2.0"),
        ("dct", torch.ones(3), {"type": "2"}, TypeError, "type must be an integer; got '2'"),
        ("idct", torch.ones(3), {"norm": "orthogonal"}, ValueError, "norm must be one of .* got 'orthogonal'"),
        ("dct", torch.ones(3), {"dim": 1}, ValueError, "dim out of range: allowed is from -1 to 0; got 1"),
        ("dct", torch.ones(3), {"dim": 0.5}, TypeError, "dim must be an integer; got 0.5"),
        ("dct", torch.tensor(1.0), {}, ValueError, "x has no dimensions"),
        ("dct", torch.ones(3), {"n": 0}, ValueError, "n, the length .* at least 1 for type 2; got 0"),
        ("dct", torch.ones(3), {"n": -1}, ValueError, "n, the length .* got -1"),
        ("dct", torch.ones(3), {"n": "4"}, TypeError, "n must be an integer; got '4'"),
        ("dct", torch.ones(3, 0), {}, ValueError, "at least 1 for type 2; got 0 along dimension 1"),
        ("dct", torch.ones(3), {"n": 2**30 + 1}, ValueError, "n, .* at most 1073741824; got 1073741825 along"),
        ("dctn", torch.ones(3, 4), {"s": (3, 2**40)}, ValueError, "s, .* at most 1073741824; got 1099511627776"),
        ("dct", torch.ones(3, 1), {"type": 1}, ValueError, "at least 2 for type 1; got 1 along dimension 1"),
        ("dctn", torch.ones(3, 4), {"dim": (0, -2)}, ValueError, r"dim must name each dimension once; got \(0, -2\)"),
        (
            "dctn",
            torch.ones(3, 4),
            {"s": (2, 2, 2)},
            ValueError,
            "at most one entry for each of x's 2 dimensions; got 3",
        ),
        (
            "idctn",
            torch.ones(3, 4),
            {"s": (2, 2), "dim": 0},
            ValueError,
            "s and dim must have the same length; got 2 and 1",
        ),
        ("idctn", torch.ones(3, 4), {"s": (2, -2)}, ValueError, "s, the length .* got -2 along dimension 1"),
        ("dctn", torch.ones(3, 4), {"s": 2.5}, TypeError, "s must be an integer or a sequence of integers; got 2.5"),
    ],
)
def test_bad_input(name, x, options, kind, says):
    with pytest.raises(kind, match=says):
        getattr(freqrank, name)(x, **options)
