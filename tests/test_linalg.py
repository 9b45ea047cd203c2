"""Gram matrices, Cholesky, triangular solves and whitening against float64 twins and against torch.linalg."""

import math

import freqrank
import pytest
import torch
from freqrank.ops import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck, gradgradcheck

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SOLVER_FLOATS = (torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def positive_definite(*shape, dtype=torch.float64):
    *batch, n = shape
    x = torch.randn(*batch, n + 3, n, dtype=torch.float64)
    return (x.mT @ x / (n + 3) + 0.1 * torch.eye(n, dtype=torch.float64)).to(dtype)


def with_rubbish(matrix, upper):
    """The other triangle filled with NaN: whoever reads it is found out."""
    rubbish = torch.full_like(matrix, float("nan"))
    return matrix.triu() + rubbish.tril(-1) if upper else matrix.tril() + rubbish.triu(1)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))


def threads(n):
    class Threads:
        def __enter__(self):
            self.before = torch.get_num_threads()
            torch.set_num_threads(n)

        def __exit__(self, *_):
            torch.set_num_threads(self.before)

    return Threads()


# --- gram -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("T", "n", "m"),
    [(1, 1, 1), (2, 3, 1), (7, 13, 5), (96, 48, 47), (97, 193, 49), (300, 200, 31), (2500, 5, 7), (4100, 193, 197)],
)
def test_gram_has_float64_accuracy(T, n, m, dtype):
    x, y = torch.randn(T, n).to(dtype), torch.randn(T, m).to(dtype)
    weight = torch.randn(T)
    symmetric = freqrank.gram(x)
    assert symmetric.dtype == torch.float64
    assert torch.equal(symmetric, symmetric.mT)
    assert relative(symmetric, reference.gram(x)) < 1e-14
    assert relative(freqrank.gram(x, y), reference.gram(x, y)) < 1e-14
    weighted = freqrank.gram(x, weight=weight)
    assert torch.equal(weighted, weighted.mT)
    assert relative(weighted, reference.gram(x, weight=weight)) < 1e-14
    assert relative(freqrank.gram(x, y, weight=weight), reference.gram(x, y, weight=weight)) < 1e-14
    assert relative(freqrank.gram(x, y, weight=-weight.abs()), -reference.gram(x, y, weight=weight.abs())) < 1e-14


def test_gram_is_exact_where_float32_is_not():
    x = torch.tensor([[4096.0], [1.0], [1.0]], dtype=torch.bfloat16).repeat(3000, 1)
    assert freqrank.gram(x).item() == 3000 * (4096.0**2 + 2)
    # the product of two float32 values needs float64
    x = torch.tensor([[1 + 2.0**-23]])
    assert freqrank.gram(x).item() == (1 + 2.0**-23) ** 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gram_converts_every_16_bit_value(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    x = x[x.isfinite()]
    ones = torch.ones(1, 1, dtype=dtype)
    assert torch.equal(freqrank.gram(ones, x[None])[0], x.double())


@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    T=st.integers(0, 40),
    n=st.integers(0, 60),
    m=st.integers(0, 60),
    dtype=st.sampled_from(FLOATS),
    weighted=st.booleans(),
    layout=st.sampled_from(["plain", "transposed", "sliced", "expanded"]),
)
def test_gram_any_size_and_stride(batch, T, n, m, dtype, weighted, layout):
    def make(columns):
        if layout == "transposed":
            return torch.randn(*batch, columns, T).to(dtype).mT
        if layout == "sliced":
            return torch.randn(*batch, 2 * T, 3 * columns).to(dtype)[..., ::2, 1::3]
        if layout == "expanded":
            return torch.randn(T, 1).to(dtype).expand(*batch, T, columns)
        return torch.randn(*batch, T, columns).to(dtype)

    x, y = make(n), make(m)
    weight = torch.randn(T).expand(*batch, T) if weighted else None
    torch.testing.assert_close(
        freqrank.gram(x, weight=weight), reference.gram(x, weight=weight), atol=1e-12, rtol=1e-13
    )
    expected = reference.gram(x, y, weight=weight)
    torch.testing.assert_close(freqrank.gram(x, y, weight=weight), expected, atol=1e-12, rtol=1e-13)
    for target in (torch.randn(*batch, n, m).double(), torch.randn(*batch, m, 2 * n).double()[..., ::2].mT):
        before = target.clone()
        assert freqrank.gram_(target, x, y, weight=weight) is target
        torch.testing.assert_close(target, before + expected, atol=1e-12, rtol=1e-13)


def test_gram_broadcasts_and_mixes_dtypes():
    x, y = torch.randn(4, 1, 9, 5).half(), torch.randn(3, 9, 6).double()
    keep = torch.rand(4, 3, 9) > 0.5
    assert relative(freqrank.gram(x, y, weight=keep), reference.gram(x, y, weight=keep)) < 1e-14
    assert torch.equal(freqrank.gram(y, y), freqrank.gram(y))


def test_gram_accumulates():
    x = torch.randn(1000, 70).bfloat16()
    acc = torch.zeros(70, 70, dtype=torch.float64)
    for piece in x.split(170):
        freqrank.gram_(acc, piece)
    assert torch.equal(acc, acc.mT)
    assert relative(acc, reference.gram(x)) < 1e-14


def test_gram_accumulating_spoils_what_backward_saved():
    acc, w = torch.eye(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    loss = (w * acc).sum()
    freqrank.gram_(acc, torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gram_nan_stays_in_its_batch_entry():
    x = torch.randn(4, 50, 60)
    x[1, 3, 7] = float("nan")
    x[2, 5, 0] = float("inf")
    clean = [0, 3]
    result = freqrank.gram(x)
    assert torch.equal(result[clean], freqrank.gram(x[clean]))
    wrong = ~result[1].isfinite()
    assert wrong[7].all()
    assert wrong[:, 7].all()
    assert wrong.sum() == 2 * 60 - 1


@pytest.mark.parametrize(("shape"), [(5000, 40), (2, 3000, 200), (30, 100, 33)])
def test_gram_repeats_bitwise_on_any_number_of_threads(shape):
    x, y = torch.randn(shape), torch.randn(shape)
    results = []
    for n in (1, 2, 3, 1):
        with threads(n):
            results.append((freqrank.gram(x), freqrank.gram(x, y)))
    for symmetric, general in results[1:]:
        assert torch.equal(symmetric, results[0][0])
        assert torch.equal(general, results[0][1])


def test_gram_reads_beyond_two_to_the_31():
    storage = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)  # touched at its ends alone
    far = storage.as_strided((2, 4), (2**31, 1))
    far.copy_(torch.randn(2, 4))
    assert relative(freqrank.gram(far), reference.gram(far)) < 1e-15
    assert relative(freqrank.gram(far.mT), reference.gram(far.mT)) < 1e-15


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_gram_gradients(same, weighted):
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    y = None if same else torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, dtype=torch.float64, requires_grad=True) if weighted else None
    inputs = [t for t in (x, y, weight) if t is not None]

    def run(*given):
        given = iter(given)
        return freqrank.gram(next(given), None if same else next(given), weight=next(given) if weighted else None)

    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


def test_gram_gradient_has_the_dtype_of_its_input():
    x = torch.randn(6, 4).bfloat16().requires_grad_()
    weight = torch.rand(6, requires_grad=True)
    freqrank.gram(x, weight=weight).square().sum().backward()
    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    reference.gram(wide, weight=wide_weight).square().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad, wide.grad.bfloat16())
    torch.testing.assert_close(weight.grad, wide_weight.grad.float())


def test_gram_errors():
    x = torch.randn(5, 3)
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor; got list"):
        freqrank.gram([1.0])
    with pytest.raises(TypeError, match=r"x must have dtype .*; got torch.int64"):
        freqrank.gram(torch.ones(5, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x must have dtype .*; got torch.complex64"):
        freqrank.gram(torch.ones(5, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"x must have at least 2 dimensions; got shape \(5,\)"):
        freqrank.gram(torch.ones(5))
    with pytest.raises(ValueError, match=r"y must have as many rows \(tokens\) as x, 5; got x \(5, 3\), y \(4, 3\)"):
        freqrank.gram(x, torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"weight must have one entry for each row of x, \[..., 5\]; got shape \(3,\)"):
        freqrank.gram(x, weight=torch.ones(3))
    with pytest.raises(TypeError, match="weight must be real"):
        freqrank.gram(x, weight=torch.ones(5, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"must match or broadcast; got x \(2, 5, 3\), y \(3, 5, 3\)"):
        freqrank.gram(x.expand(2, 5, 3), x.expand(3, 5, 3))
    with pytest.raises(ValueError, match="device of x"):
        freqrank.gram(x, torch.ones(5, 3, device="meta"))
    with pytest.raises(TypeError, match=r"acc must have dtype float64; got torch.float32"):
        freqrank.gram_(torch.zeros(3, 3), x)
    with pytest.raises(ValueError, match=r"acc must have shape \(3, 3\); got \(3, 4\)"):
        freqrank.gram_(torch.zeros(3, 4).double(), x)
    with pytest.raises(ValueError, match="must not overlap itself"):
        freqrank.gram_(torch.zeros(3, 1).double().expand(3, 3), x)
    acc = torch.zeros(3, 3).double()
    with pytest.raises(RuntimeError, match="gram_ is not differentiable"):
        freqrank.gram_(acc, x.requires_grad_())
    assert not acc.any()
    with torch.no_grad():
        freqrank.gram_(acc, x)


# --- cholesky ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SOLVER_FLOATS)
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize(
    "n", [0, 1, 2, 3, 12, 13, 47, 48, 63, 64, 65, 127, 128, 129, 191, 255, 256, 257, 511, 512, 513]
)
def test_cholesky_residual(n, upper, dtype):
    A = positive_definite(3, n, dtype=dtype)
    L, info = freqrank.cholesky_ex(with_rubbish(A, upper), upper=upper)
    assert L.dtype == dtype
    assert info.dtype == torch.int32
    assert not info.any()
    assert torch.equal(L, L.triu() if upper else L.tril())
    wide = L.double().mT if upper else L.double()
    bound = 5 * max(n, 1) * torch.finfo(dtype).eps
    assert ((wide @ wide.mT - A.double()).flatten(1).norm(dim=-1) <= bound * A.double().flatten(1).norm(dim=-1)).all()
    expected = torch.linalg.cholesky(A.double(), upper=upper)
    torch.testing.assert_close(L.double(), expected, atol=300 * torch.finfo(dtype).eps, rtol=1e-3)


@pytest.mark.parametrize("dtype", SOLVER_FLOATS)
@pytest.mark.parametrize("upper", [False, True])
def test_cholesky_side_by_side(upper, dtype):
    # small matrices are factored in the lanes of vectors, and what does not fill half of one, alone: the same bits
    for n in [*range(1, 71), 83, 128]:
        A = positive_definite(7, 3, n, dtype=dtype)
        L, info = freqrank.cholesky_ex(with_rubbish(A, upper), upper=upper)
        assert not info.any()
        assert torch.equal(L, L.triu() if upper else L.tril())
        wide = L.double().mT if upper else L.double()
        error = (wide @ wide.mT - A.double()).flatten(2).norm(dim=-1)
        assert (error <= 5 * n * torch.finfo(dtype).eps * A.double().flatten(2).norm(dim=-1)).all()
        for b in (0, 6):
            assert torch.equal(freqrank.cholesky_ex(A[b, 1], upper=upper).L, L[b, 1])
        assert torch.equal(freqrank.cholesky_ex(A.mT.contiguous().mT, upper=upper).L, L)
        assert torch.equal(freqrank.cholesky_ex(A.transpose(0, 1), upper=upper).L, L.transpose(0, 1))


@pytest.mark.parametrize("dtype", SOLVER_FLOATS)
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("n", [1, 6, 33, 64])
def test_cholesky_a_failure_stays_in_its_lane(n, upper, dtype):
    A = positive_definite(45, n, dtype=dtype)
    clean = freqrank.cholesky_ex(A, upper=upper).L
    bad = {b: 7 * b % n for b in range(0, 45, 2)}
    for value, (b, at) in zip([-1.0, 0.0, float("nan"), -float("inf")] * 6, bad.items(), strict=False):
        A[b, at, at] = value
    L, info = freqrank.cholesky_ex(A, upper=upper)
    assert info.tolist() == [bad[b] + 1 if b in bad else 0 for b in range(45)]
    assert torch.equal(L[1::2], clean[1::2])
    for b in range(45):  # a matrix that fails does not depend on the others either
        alone = freqrank.cholesky_ex(A[b], upper=upper)
        torch.testing.assert_close(alone.L, L[b], rtol=0, atol=0, equal_nan=True)
        assert int(alone.info) == int(info[b])


@pytest.mark.parametrize("dtype", SOLVER_FLOATS)
@pytest.mark.parametrize("n", [1024, 1100])
def test_cholesky_of_one_large_matrix(n, dtype):
    A = positive_definite(n, dtype=dtype)
    for upper in (False, True):
        L, info = freqrank.cholesky_ex(with_rubbish(A, upper), upper=upper)
        assert int(info) == 0
        product = L.mT @ L if upper else L @ L.mT
        assert relative(product, A) <= 5 * n * torch.finfo(dtype).eps
    A[700, 700] = -1
    assert int(freqrank.cholesky_ex(A).info) == 701
    A[651, 300] = float("nan")
    assert int(freqrank.cholesky_ex(A).info) == 652


@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    n=st.integers(0, 70),
    dtype=st.sampled_from(SOLVER_FLOATS),
    upper=st.booleans(),
    layout=st.sampled_from(["plain", "transposed", "sliced", "expanded"]),
)
def test_cholesky_any_batch_and_stride(batch, n, dtype, upper, layout):
    A = positive_definite(*(batch if layout != "expanded" else []), n, dtype=dtype)
    A = with_rubbish(A, upper)
    if layout == "transposed":
        A = A.mT.contiguous().mT
    elif layout == "sliced":
        room = torch.full((*batch, 2 * n, 3 * n), float("nan"), dtype=dtype)
        room[..., ::2, ::3] = A
        A = room[..., ::2, ::3]
    elif layout == "expanded":
        A = A.expand(*batch, n, n)
    L, info = freqrank.cholesky_ex(A, upper=upper)
    expected, _ = reference.cholesky_ex(A, upper=upper)
    assert info.shape == A.shape[:-2]
    assert not info.any()
    torch.testing.assert_close(L.double(), expected, atol=1e-12 if dtype == torch.float64 else 1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", SOLVER_FLOATS)
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize(("n", "bad"), [(1, 0), (5, 3), (70, 63), (130, 64), (200, 199), (300, 130)])
def test_cholesky_info_is_lapacks(n, bad, upper, dtype):
    A = positive_definite(6, n, dtype=dtype)
    A[1, bad, bad] = -1.0
    A[2, bad, bad] = 0.0
    A[3, bad, bad] = float("nan")
    if bad > 0:  # off the diagonal, on the side that is read
        row, column = (0, bad) if upper else (bad, 0)
        A[4, row, column] = float("nan")
    L, info = freqrank.cholesky_ex(A, upper=upper)
    expected = torch.linalg.cholesky_ex(A, upper=upper).info
    assert torch.equal(info, expected)
    assert info.tolist() == [0, bad + 1, bad + 1, bad + 1, (bad + 1) * (bad > 0), 0]
    clean = [0, 5]
    alone = freqrank.cholesky_ex(A[clean], upper=upper).L
    assert torch.equal(L[clean], alone)
    assert torch.equal(L.nan_to_num(), L.triu().nan_to_num() if upper else L.tril().nan_to_num())
    product = L[1, :bad, :bad].double()
    product = product.mT @ product if upper else product @ product.mT
    torch.testing.assert_close(product, A[1, :bad, :bad].double(), atol=1e-4, rtol=1e-4)


def test_cholesky_repeats_bitwise_on_any_number_of_threads():
    for shape in ((40, 30), (41, 64), (40, 100), (3, 300), (2, 600), (1030,)):
        A = positive_definite(*shape, dtype=torch.float32)
        results = []
        for n in (1, 2, 3):
            with threads(n):
                results.append(freqrank.cholesky_ex(A).L)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_cholesky_many_small_matrices():
    A = positive_definite(70_000, 2, dtype=torch.float32)
    L, info = freqrank.cholesky_ex(A)
    assert not info.any()
    torch.testing.assert_close(L, torch.linalg.cholesky(A))


def test_cholesky_errors():
    with pytest.raises(TypeError, match=r"A must be a torch.Tensor; got float"):
        freqrank.cholesky_ex(1.0)
    for dtype in (torch.float16, torch.bfloat16, torch.int32, torch.complex64):
        with pytest.raises(TypeError, match=f"A must have dtype float32, float64; got {dtype}"):
            freqrank.cholesky_ex(torch.eye(3).to(dtype))
    with pytest.raises(ValueError, match=r"A must be a square matrix .*; got shape \(3, 4\)"):
        freqrank.cholesky_ex(torch.ones(3, 4))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        freqrank.cholesky_ex(torch.ones(3))
    with pytest.raises(ValueError, match=r"A must be dense, of layout torch\.strided; got torch\.sparse_coo"):
        freqrank.cholesky_ex(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"A must be dense, of layout torch\.strided; got a nested tensor"):
        freqrank.cholesky_ex(torch.nested.nested_tensor([torch.ones(3, 3), torch.ones(2, 3)], layout=torch.jagged))
    with pytest.raises(TypeError, match="upper must be True or False; got 'L'"):
        freqrank.cholesky_ex(torch.eye(3), upper="L")


def test_cholesky_check_errors():
    good, bad = torch.eye(3), -torch.eye(3)
    freqrank.cholesky_ex(good, check_errors=True)
    with pytest.raises(torch.linalg.LinAlgError, match="leading minor of order 1"):
        freqrank.cholesky_ex(bad, check_errors=True)
    bad = torch.diag(torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(torch.linalg.LinAlgError, match=r"\(Batch element 2\).*leading minor of order 2"):
        freqrank.cholesky_ex(torch.stack([good, good, bad, bad]), check_errors=True)


def test_check_errors_where_there_are_no_values_yet():
    def run(A):
        return freqrank.cholesky_ex(A, check_errors=True).L + freqrank.cholesky_solve_ex(A, A, check_errors=True).X

    good = positive_definite(4, 3)
    assert run(good.to("meta")).shape == (4, 3, 3)
    torch.testing.assert_close(torch.func.vmap(run)(good), run(good))
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(good), run(good))
    with pytest.raises(torch.linalg.LinAlgError, match=r"\(Batch element 1\).*order 1"):
        compiled(torch.stack([good[0], -good[1]]))


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("shape", [(1,), (4,), (2, 3), (0, 3), (2, 0)])
def test_cholesky_gradients(shape, upper):
    A = positive_definite(*shape).requires_grad_()

    def run(A):  # gradcheck moves one entry at a time, the other triangle must follow
        A = (A + A.mT) / 2
        return freqrank.cholesky_ex(A, upper=upper).L

    assert gradcheck(run, A)
    assert gradgradcheck(run, A)


def test_cholesky_gradient_is_torchs():
    A = positive_definite(2, 5).requires_grad_()
    weight = torch.randn(2, 5, 5, dtype=torch.float64)  # the other triangle must not matter
    for upper in (False, True):
        ours = torch.autograd.grad((freqrank.cholesky_ex(A, upper=upper).L * weight).sum(), A)[0]
        theirs = torch.autograd.grad((torch.linalg.cholesky_ex(A, upper=upper).L * weight).sum(), A)[0]
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(ours, ours.mT)


# --- factor and solve -------------------------------------------------------------------------------------------------


def check_solution(A, X, B):
    """||B - A X|| <= c n eps ||A|| ||X||, what a backward stable solver leaves."""
    n = A.shape[-1]
    residual = (A.double() @ X.double() - B.double()).flatten(-2).norm(dim=-1)
    size = A.double().flatten(-2).norm(dim=-1) * X.double().flatten(-2).norm(dim=-1)
    assert (residual <= 2 * max(n, 1) * torch.finfo(A.dtype).eps * size).all()


@pytest.mark.parametrize("dtype", SOLVER_FLOATS)
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("n", [0, *range(1, 20), 31, 32, 33, 47, 64, 65, 100, 128, 129, 257, 512, 513, 600])
def test_cholesky_solve(n, upper, dtype):
    for count, k in ((1, 1), (3, 5), (17, 2), (23, 18), (2, 49), (18, 0)):
        if n > 129 and count > 3:
            continue
        A, B = positive_definite(count, n, dtype=dtype), torch.randn(count, n, k).to(dtype)
        X, L, info = solution = freqrank.cholesky_solve_ex(with_rubbish(A, upper), B, upper=upper)
        assert isinstance(solution, freqrank.CholeskySolution)
        assert (X.dtype, X.shape) == (dtype, B.shape)
        assert not info.any()
        assert torch.equal(L, freqrank.cholesky_ex(A, upper=upper).L)
        check_solution(A, X, B)


@pytest.mark.parametrize("dtype", SOLVER_FLOATS)
def test_cholesky_solve_side_by_side(dtype):
    """Whether a matrix is solved in a lane or alone, and with which others: the same bits."""
    for n, k in [*((n, 1 + 5 * n % 21) for n in range(1, 70)), (9, 513), (70, 520)]:
        A, B = positive_definite(7, 3, n, dtype=dtype), torch.randn(7, 3, n, k).to(dtype)
        X = freqrank.cholesky_solve_ex(A, B).X
        check_solution(A, X, B)
        for b in (0, 6):
            assert torch.equal(freqrank.cholesky_solve_ex(A[b, 1], B[b, 1]).X, X[b, 1])
        turned = B.mT.contiguous().mT
        assert torch.equal(freqrank.cholesky_solve_ex(A, turned).X, X)
        assert torch.equal(freqrank.cholesky_solve_ex(A.transpose(0, 1), B.transpose(0, 1)).X, X.transpose(0, 1))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(st.integers(0, 5), max_size=2),
    n=st.integers(0, 70),
    k=st.integers(0, 40),
    dtype=st.sampled_from(SOLVER_FLOATS),
    upper=st.booleans(),
    layout=st.sampled_from(["plain", "transposed", "sliced", "reversed", "expanded", "one A"]),
    seed=st.integers(0, 1000),
)
def test_cholesky_solve_any_batch_and_stride(batch, n, k, dtype, upper, layout, seed):
    torch.manual_seed(seed)
    one = [] if layout in ("expanded", "one A") else batch
    A = with_rubbish(positive_definite(*one, n, dtype=dtype), upper)
    B = torch.randn(*(one if layout == "expanded" else batch), n, k).to(dtype)
    if layout == "transposed":
        A, B = A.mT.contiguous().mT, B.mT.contiguous().mT
    elif layout == "sliced":
        room = torch.full((*batch, 2 * n, 3 * k), float("nan"), dtype=dtype)
        room[..., ::2, ::3] = B
        B = room[..., ::2, ::3]
    elif layout == "reversed":
        B = torch.as_strided(B, B.shape, B.stride()).flip(-1).mT.contiguous().mT.flip(-1)
    elif layout == "expanded":
        A, B = A.expand(*batch, n, n), B.expand(*batch, n, k)
    X, L, info = freqrank.cholesky_solve_ex(A, B, upper=upper)
    full = A.double().triu() if upper else A.double().tril()
    full = full + full.mT - torch.diag_embed(full.diagonal(dim1=-2, dim2=-1))
    assert X.shape == B.shape
    assert L.shape == (*batch, n, n)
    assert info.shape == tuple(batch)
    expected = torch.linalg.solve(full, B.double())
    torch.testing.assert_close(X.double(), expected, atol=1e-10 if dtype == torch.float64 else 2e-2, rtol=1e-3)


@pytest.mark.parametrize("dtype", SOLVER_FLOATS)
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("n", [1, 6, 33, 64, 80, 530])
def test_cholesky_solve_a_failure_stays_in_its_lane(n, upper, dtype):
    count = 45 if n <= 80 else 3
    A, B = positive_definite(count, n, dtype=dtype), torch.randn(count, n, 3).to(dtype)
    clean = freqrank.cholesky_solve_ex(A, B, upper=upper)
    bad = {b: 7 * b % n for b in range(0, count, 2)}
    for value, (b, at) in zip([-1.0, 0.0, float("nan"), -float("inf")] * 6, bad.items(), strict=False):
        A[b, at, at] = value
        B[b, :, 0] = 0  # not even there is 0 an answer
    B[1, n // 2, 2] = float("nan")
    X, L, info = freqrank.cholesky_solve_ex(A, B, upper=upper)
    assert info.tolist() == [bad[b] + 1 if b in bad else 0 for b in range(count)]
    assert torch.equal(L[1::2], clean.L[1::2])
    assert torch.equal(X[1::2, :, :2], clean.X[1::2, :, :2])
    assert torch.equal(X[3::2], clean.X[3::2])
    assert X[1, :, 2].isnan().all()
    assert X[::2].isnan().all()
    nothing = freqrank.cholesky_solve_ex(A, B[..., :0], upper=upper)
    torch.testing.assert_close(nothing.L, L, rtol=0, atol=0, equal_nan=True)
    triangle = torch.ones(n, n).triu() if upper else torch.ones(n, n).tril()
    assert torch.equal(L[::2].isnan(), triangle.bool().expand(len(bad), n, n))
    assert not (L[::2].nan_to_num()).any()


def test_cholesky_solve_repeats_bitwise_on_any_number_of_threads():
    for count, n, k in ((40, 30, 7), (41, 64, 1), (40, 100, 20), (3, 300, 5), (2, 600, 3), (1, 1030, 2), (3, 40, 600)):
        A, B = positive_definite(count, n, dtype=torch.float32), torch.randn(count, n, k)
        results = []
        for number in (1, 2, 3):
            with threads(number):
                results.append(freqrank.cholesky_solve_ex(A, B).X)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("shape", [(1,), (4,), (2, 3), (0, 3), (2, 0)])
def test_cholesky_solve_gradients(shape, upper):
    A, B = positive_definite(*shape).requires_grad_(), torch.randn(*shape, 2, dtype=torch.float64, requires_grad=True)

    def run(A, B):
        X, L, _ = freqrank.cholesky_solve_ex((A + A.mT) / 2, B, upper=upper)
        return X, L

    assert gradcheck(run, (A, B))
    assert gradgradcheck(run, (A, B))


def test_cholesky_solve_gradient_is_torchs():
    """Of a Gaussian's log-likelihood, in which both the solution and the factor stand."""
    A = positive_definite(2, 6).requires_grad_()
    B = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)

    def likelihood(X, L):
        return (B * X).sum() + freqrank.logdet(L).sum()

    X, L, _ = freqrank.cholesky_solve_ex(A, B)
    factor = torch.linalg.cholesky(A)
    ours = torch.autograd.grad(likelihood(X, L), (A, B))
    theirs = torch.autograd.grad(likelihood(torch.cholesky_solve(B, factor), factor), (A, B))
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours[0], ours[0].mT)
    for wanted in (A, B):  # one of them alone
        X, L, _ = freqrank.cholesky_solve_ex(A if wanted is A else A.detach(), B if wanted is B else B.detach())
        assert torch.autograd.grad(X.sum(), wanted)[0].isfinite().all()


def test_cholesky_solve_errors():
    A, B = torch.eye(3), torch.ones(3, 2)
    with pytest.raises(TypeError, match=r"B must have dtype float32; got torch\.float64"):
        freqrank.cholesky_solve_ex(A, B.double())
    with pytest.raises(TypeError, match=r"A must have dtype float32, float64; got torch\.bfloat16"):
        freqrank.cholesky_solve_ex(A.bfloat16(), B.bfloat16())
    with pytest.raises(ValueError, match=r"B must have shape \[\.\.\., 3, k\] for A \(3, 3\); got \(2, 3\)"):
        freqrank.cholesky_solve_ex(A, B.mT)
    with pytest.raises(ValueError, match="B must have at least 2 dimensions"):
        freqrank.cholesky_solve_ex(A, torch.ones(3))
    with pytest.raises(ValueError, match=r"must match or broadcast; got A \(2, 3, 3\), B \(4, 3, 2\)"):
        freqrank.cholesky_solve_ex(A.expand(2, 3, 3), B.expand(4, 3, 2))
    with pytest.raises(torch.linalg.LinAlgError, match=r"\(Batch element 1\).*order 1"):
        freqrank.cholesky_solve_ex(torch.stack([A, -A]), B, check_errors=True)


# --- triangular systems -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    batch_a=st.sampled_from([(), (3,), (2, 1), (0,)]),
    batch_b=st.sampled_from([(), (1,), (2, 1), (2, 3)]),
    n=st.integers(0, 70),
    k=st.sampled_from([0, 1, 2, 13, 50, 200]),
    dtype=st.sampled_from(SOLVER_FLOATS),
    upper=st.booleans(),
    left=st.booleans(),
    unitriangular=st.booleans(),
    transposed=st.booleans(),
)
def test_solve_triangular(batch_a, batch_b, n, k, dtype, upper, left, unitriangular, transposed):
    if batch_a == (0,) and batch_b == (2, 3):
        batch_b = ()
    A = torch.randn(*batch_a, n, n, dtype=dtype) / (4 * math.sqrt(n + 1))
    A.diagonal(dim1=-2, dim2=-1).add_(1.0)
    A = with_rubbish(A, upper)
    if unitriangular:
        A.diagonal(dim1=-2, dim2=-1).fill_(float("nan"))
    B = torch.randn(*batch_b, *((n, k) if left else (k, n)), dtype=dtype)
    if transposed:
        A, B = A.mT.contiguous().mT, B.mT.contiguous().mT
    options = {"upper": upper, "left": left, "unitriangular": unitriangular}
    X = freqrank.solve_triangular(A, B, **options)
    expected = reference.solve_triangular(A, B, **options)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(X.double(), expected, atol=2000 * eps, rtol=2000 * eps)
    out = torch.empty(X.shape[::-1], dtype=dtype).permute(*reversed(range(X.dim())))
    assert freqrank.solve_triangular(A, B, out=out, **options) is out
    assert torch.equal(out, X)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("dtype", SOLVER_FLOATS)
def test_solve_triangular_large(dtype, upper, left):
    n, k = 700, 401
    A = freqrank.cholesky_ex(positive_definite(n, dtype=dtype), upper=upper).L
    B = torch.randn((n, k) if left else (k, n), dtype=dtype)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(freqrank.solve_triangular(A, B, upper=upper, left=left))
    X = results[0]
    assert torch.equal(X, results[1])
    assert torch.equal(X, results[2])
    residual = (A @ X if left else X @ A) - B
    assert residual.norm() <= n * torch.finfo(dtype).eps * A.norm() * X.norm()
    torch.testing.assert_close(X, torch.linalg.solve_triangular(A, B, upper=upper, left=left), rtol=1e-2, atol=1e-3)


def test_solve_triangular_contains_nan():
    A = torch.eye(3).repeat(3, 1, 1) + torch.ones(3, 3).tril(-1)
    B = torch.randn(3, 3, 4)
    A[0, 2, 1] = float("nan")
    B[1, 1, 2] = float("nan")
    X = freqrank.solve_triangular(A, B, upper=False)
    assert X[0, :2].isfinite().all()
    assert X[1, :, [0, 1, 3]].isfinite().all()
    assert X[1, 0].isfinite().all()
    assert X[1, 1:, 2].isnan().all()
    assert X[2].isfinite().all()
    A = torch.zeros(2, 2)
    assert torch.equal(freqrank.solve_triangular(A, torch.ones(2, 1), upper=True)[1], torch.tensor([float("inf")]))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("unitriangular", [False, True])
def test_solve_triangular_gradients(unitriangular, upper, left):
    A = (torch.randn(2, 1, 3, 3, dtype=torch.float64) / 4 + torch.eye(3)).requires_grad_()
    B = torch.randn(*((2, 3, 2) if left else (2, 2, 3)), dtype=torch.float64, requires_grad=True)

    def run(A, B):
        return freqrank.solve_triangular(A, B, upper=upper, left=left, unitriangular=unitriangular)

    assert gradcheck(run, (A, B))
    assert gradgradcheck(run, (A, B))
    assert gradgradcheck(run, (A.detach(), B))


def test_solve_triangular_writes_out():
    A, B = torch.eye(3) * 2, torch.ones(4, 3, 2)
    for out in (torch.empty(4, 3, 2), torch.empty(4, 2, 3).mT, torch.empty(0)):
        assert freqrank.solve_triangular(A, B, upper=True, out=out) is out
        assert torch.equal(out, B / 2)


def test_solve_triangular_errors():
    A, B = torch.eye(3), torch.ones(3, 2)
    with pytest.raises(TypeError, match=r"B must have dtype float32; got torch.float64"):
        freqrank.solve_triangular(A, B.double(), upper=True)
    with pytest.raises(TypeError, match="A must have dtype float32, float64"):
        freqrank.solve_triangular(A.half(), B.half(), upper=True)
    with pytest.raises(
        ValueError, match=r"B must have shape \[..., k, 3\] for A \(3, 3\) and left=False; got \(3, 2\)"
    ):
        freqrank.solve_triangular(A, B, upper=True, left=False)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        freqrank.solve_triangular(A, B[:, 0], upper=True)
    with pytest.raises(ValueError, match="A must be a square matrix"):
        freqrank.solve_triangular(B, B, upper=True)
    with pytest.raises(ValueError, match="must match or broadcast"):
        freqrank.solve_triangular(A.expand(2, 3, 3), B.expand(4, 3, 2), upper=True)
    with pytest.raises(ValueError, match=r"out must have shape \(3, 2\); got \(2, 3\)"):
        freqrank.solve_triangular(A, B, upper=True, out=torch.empty(2, 3))
    with pytest.raises(RuntimeError, match="out= is not differentiable"):
        freqrank.solve_triangular(A, B.requires_grad_(), upper=True, out=torch.empty(3, 2))


# --- logdet -----------------------------------------------------------------------------------------------------------


def test_logdet():
    for shape in ((4,), (2, 3), (3, 0), (0, 3)):
        A = positive_definite(*shape).requires_grad_()
        for upper in (False, True):
            L = freqrank.cholesky_ex(A, upper=upper).L
            torch.testing.assert_close(freqrank.logdet(L), torch.logdet(A))
            torch.testing.assert_close(freqrank.logdet(L), reference.logdet(L))

        def run(A):
            return freqrank.logdet(freqrank.cholesky_ex((A + A.mT) / 2).L)

        assert gradcheck(run, A)
        assert gradgradcheck(run, A)
    A = positive_definite(3).requires_grad_()
    grad = torch.autograd.grad(freqrank.logdet(freqrank.cholesky_ex(A).L), A)[0]
    torch.testing.assert_close(grad, torch.linalg.inv(A))
    with pytest.raises(ValueError, match="L must be a square matrix"):
        freqrank.logdet(torch.ones(2, 3))


# --- whitening --------------------------------------------------------------------------------------------------------


def product(factor):
    return factor.mT @ factor


@pytest.mark.parametrize("n", [0, 1, 2, 31, 64, 65, 200])
@pytest.mark.parametrize("scale", [None, 0.25, "tensor"])
def test_whiten(n, scale):
    G = positive_definite(2, 3, n)
    scale = torch.rand(2, 3) + 0.5 if scale == "tensor" else scale
    factors = 1.0 if scale is None else scale if isinstance(scale, float) else scale.double()[..., None, None]
    for whiten in (freqrank.whiten, freqrank.whiten_eigh):
        result = whiten(with_rubbish(G, upper=True), scale=scale)
        assert result._fields == ("factor", "damping", "info")
        factor, damping, info = result
        assert factor.dtype == damping.dtype == torch.float64
        assert factor.shape == G.shape
        assert info.dtype == torch.int32
        assert damping.shape == info.shape == (2, 3)
        assert not damping.any()
        assert not info.any()
        assert torch.equal(factor, factor.triu())
        assert (factor.diagonal(dim1=-2, dim2=-1) > 0).all()
        torch.testing.assert_close(product(factor), G * factors, atol=1e-12, rtol=1e-12)


def test_whiten_widens_float32_and_takes_any_stride():
    G = positive_definite(4, 30, dtype=torch.float32)
    for view in (G, G.mT, G.mT.contiguous().mT, G[1].expand(4, 30, 30)):
        factor, damping, info = freqrank.whiten(view)
        assert factor.dtype == torch.float64
        assert not damping.any()
        assert not info.any()
        torch.testing.assert_close(product(factor), view.double(), atol=1e-13, rtol=1e-13)


def awkward_grams(n=24):
    """What calibration meets, by name."""
    tokens = torch.randn(4 * n, n, dtype=torch.float64)
    dead = tokens.clone()
    dead[:, [0, 5, n - 1]] = 0
    massive = tokens.clone()
    massive[0] = 0
    massive[0, 3] = 1e7
    equal = tokens.clone()
    equal[:, 7] = equal[:, 2]
    scales = torch.logspace(-8, 8, n, dtype=torch.float64)
    grams = {
        "plain": freqrank.gram(tokens),
        "fewer tokens than channels": freqrank.gram(tokens[: n // 2]),
        "dead channels": freqrank.gram(dead),
        "massive token": freqrank.gram(massive),
        "two equal channels": freqrank.gram(equal),
        "scales over sixteen decades": freqrank.gram(tokens * scales),
        "float32 Gram": freqrank.gram(tokens[: n // 2]).float().double(),
        "all zero": torch.zeros(n, n, dtype=torch.float64),
        "NaN": torch.full((n, n), float("nan"), dtype=torch.float64),
        "indefinite": -torch.eye(n, dtype=torch.float64),
    }
    grams["one NaN"] = grams["plain"].clone()
    grams["one NaN"][4, 9] = grams["one NaN"][9, 4] = float("nan")
    return grams


HOPELESS = {"all zero", "NaN", "indefinite", "one NaN"}
DAMPED = {"fewer tokens than channels", "dead channels", "float32 Gram"}


def test_whiten_ladder():
    grams = awkward_grams()
    batch = torch.stack(list(grams.values()))
    factor, damping, info = freqrank.whiten(batch)
    expected_factor, expected_damping, expected_info = reference.whiten(batch)
    for i, (name, G) in enumerate(grams.items()):
        assert (int(info[i]) > 0) == (name in HOPELESS), name
        assert (int(expected_info[i]) > 0) == (name in HOPELESS), name
        alone = freqrank.whiten(G)
        for together, single in zip((factor[i], damping[i], info[i]), alone, strict=True):
            assert torch.equal(together.nan_to_num(7), single.nan_to_num(7)), name
        if name in HOPELESS:
            assert factor[i].triu().isnan().sum() == G.numel() // 2 + 12
            assert not factor[i].tril(-1).any()
            continue
        level = float(damping[i])
        assert level in (0.0, *(10.0**-k for k in range(6, 13))), name
        if name in DAMPED:
            assert level > 0, name
            assert level <= (1e-6 if name == "float32 Gram" else 1e-11), name
        diagonal = G.diagonal()
        damped = G + level * torch.diag(torch.where(diagonal == 0, diagonal.mean(), diagonal))
        spread = damped.diagonal().sqrt()
        error = (product(factor[i]) - damped) / (spread[:, None] * spread)  # relative to each pair of channels
        assert error.abs().max() < 1e-13, name
        if level == float(expected_damping[i]):
            torch.testing.assert_close(factor[i] / spread, expected_factor[i] / spread, atol=1e-3, rtol=1e-3)
    assert float(damping[list(grams).index("massive token")]) == 0
    assert float(damping[list(grams).index("scales over sixteen decades")]) == 0


def test_whiten_damps_by_the_level_that_works():
    # the smallest eigenvalue of the unit-diagonal matrix is -d: the first level above d succeeds
    for d, level in ((3e-12, 1e-11), (2e-9, 1e-8), (3e-7, 1e-6), (1e-5, None)):
        G = torch.tensor([[1.0, 1.0 + d], [1.0 + d, 1.0]], dtype=torch.float64)
        G = G * torch.tensor([1e-3, 1e3], dtype=torch.float64).outer(torch.tensor([1e-3, 1e3], dtype=torch.float64))
        _, damping, info = freqrank.whiten(G, scale=100.0)
        if level is None:
            assert int(info) == 2
        else:
            assert int(info) == 0
            assert float(damping) == level


def test_whiten_large_uses_all_threads_on_one_matrix():
    x = torch.randn(600, 1100)
    G = freqrank.gram(x)
    results = []
    for n in (1, 2):
        with threads(n):
            results.append(freqrank.whiten(G))
    factor, damping, info = results[0]
    assert torch.equal(factor, results[1].factor)
    assert int(info) == 0
    assert 0 < float(damping) <= 1e-10
    assert relative(product(factor), G) < 2e-10


def test_whiten_eigh_on_what_whiten_cannot_do():
    grams = awkward_grams()
    batch = torch.stack(list(grams.values()))
    n = batch.shape[-1]
    unit = torch.finfo(torch.float64).eps / 2
    factor, damping, info = freqrank.whiten_eigh(batch)
    for i, (name, G) in enumerate(grams.items()):
        if "NaN" in name:
            assert int(info[i]) == 1
            assert factor[i].triu().isnan().sum() == n * (n + 1) // 2
            continue
        assert torch.equal(factor[i], factor[i].triu()), name
        if name in ("all zero", "indefinite"):
            assert int(info[i]) == 1
            assert not factor[i].any()
            continue
        assert int(info[i]) == 0
        assert float(damping[i]) in (0.0, n * unit)
        assert (float(damping[i]) > 0) == (name in DAMPED | {"two equal channels", "scales over sixteen decades"}), name
        assert (factor[i].diagonal() > 0).all(), name
        assert relative(product(factor[i]), G) < (1e-7 if name == "float32 Gram" else 4 * n * n * unit), name
        alone = freqrank.whiten_eigh(G)
        torch.testing.assert_close(
            product(alone.factor), product(factor[i]), rtol=1e-10, atol=1e-10 * float(G.abs().max())
        )
    assert freqrank.whiten_eigh(torch.zeros(0, 3, 3)).info.shape == (0,)


def test_whiten_errors():
    G = positive_definite(2, 3)
    for whiten in (freqrank.whiten, freqrank.whiten_eigh):
        with pytest.raises(TypeError, match=r"gram must have dtype float32, float64; got torch.bfloat16"):
            whiten(G.bfloat16())
        with pytest.raises(ValueError, match="gram must be a square matrix"):
            whiten(G[:, :2])
        for scale in (0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, -1.0]), torch.tensor(float("nan"))):
            with pytest.raises(ValueError, match="scale must be finite and positive"):
                whiten(G, scale=scale)
        with pytest.raises(ValueError, match=r"scale must have the batch shape of gram, \(2,\); got \(3,\)"):
            whiten(G, scale=torch.ones(3))
        for scale in ("trace", True, torch.ones(2, dtype=torch.bool)):
            with pytest.raises(TypeError, match="scale must be"):
                whiten(G, scale=scale)
        with pytest.raises(RuntimeError, match=f"{whiten.__name__} is not differentiable"):
            whiten(G.clone().requires_grad_())


# --- torch's own checks -----------------------------------------------------------------------------------------------


def samples():
    ops = torch.ops.freqrank
    x, y, weight = torch.randn(2, 5, 3), torch.randn(2, 5, 4).half(), torch.rand(2, 5).double()
    A = positive_definite(2, 3)
    triangle, B = A.tril(), torch.randn(2, 3, 4, dtype=torch.float64)
    grad = lambda t: t.clone().requires_grad_()  # noqa: E731
    yield ops.gram.default, (x, None, None)
    yield ops.gram.default, (grad(x.mT), None, grad(weight[:, :3]))
    yield ops.gram.default, (grad(x), grad(y), grad(weight))
    yield ops.gram_.default, (torch.zeros(2, 3, 4).double(), x, y, weight)
    yield ops.gram_.default, (torch.zeros(2, 3, 3).double(), x, None, None)
    for upper in (False, True):
        yield ops.cholesky_ex.default, (grad(A), upper)
        yield ops.cholesky_ex.default, (A[0].float(), upper)
        yield ops.cholesky_solve_ex.default, (grad(A), grad(B), upper)
        yield ops.cholesky_solve_ex.default, (A[0].float(), B[0].float(), upper)
        yield ops.solve_triangular.default, (grad(triangle), grad(B), upper, True, False)
        yield ops.solve_triangular.default, (grad(triangle), grad(B.mT), upper, False, True)
    yield ops.whiten.default, (A, None)
    yield ops.whiten.default, (A.float(), torch.rand(2).double())


@pytest.mark.parametrize("index", range(len(list(samples()))))
def test_opcheck(index):
    op, arguments = list(samples())[index]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", ["gram", "cholesky_ex", "cholesky_solve_ex", "solve_triangular"])
def test_function_transforms_and_forward_mode(name):
    run = {
        "gram": lambda a: freqrank.gram(a).square().sum(),
        "cholesky_ex": lambda a: freqrank.cholesky_ex(a).L.square().sum(dim=(-1, -2)).log().sum(),
        "cholesky_solve_ex": lambda a: freqrank.cholesky_solve_ex(a, a.mT).X.square().sum(),
        "solve_triangular": lambda a: freqrank.solve_triangular(a.tril(), a, upper=False).square().sum(),
    }[name]
    a = positive_definite(4)
    leaf = a.clone().requires_grad_()
    (want,) = torch.autograd.grad(run(leaf), leaf)
    assert torch.equal(torch.func.grad(run)(a), want)
    (want,) = torch.autograd.grad(torch.autograd.grad(run(leaf), leaf, create_graph=True)[0].square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda a: torch.func.grad(run)(a).square().sum())(a), want)
    for jvp in (lambda: torch.func.jvp(run, (a,), (a,)), lambda: torch.func.jacfwd(run)(a)):
        with pytest.raises(NotImplementedError, match=f"freqrank.{name} has no forward-mode derivative"):
            jvp()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="use reverse mode"):
        run(forward_ad.make_dual(a, a))


def test_transforms_of_what_has_no_derivative():
    a = positive_definite(3)
    accumulate = lambda a: freqrank.gram_(torch.zeros_like(a), a)  # noqa: E731
    for run in (lambda a: freqrank.whiten(a).factor, accumulate):
        inner = lambda a, run=run: torch.func.jvp(lambda s: s * run(a), (a,), (a,))[1]  # noqa: E731
        for jvp in (lambda f=run: torch.func.jvp(f, (a,), (a,)), lambda f=inner: torch.func.jacfwd(f)(a)):
            with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
                jvp()
    hidden = lambda a: torch.func.vmap(lambda s: freqrank.whiten(a * s).factor)(torch.ones(2)).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="whiten is not differentiable"):
        torch.func.grad(hidden)(a)
    many, scale = positive_definite(4, 3), torch.rand(4) + 0.5
    white = torch.func.vmap(lambda a, s: freqrank.whiten(a, scale=s))(many, scale)
    assert torch.equal(white.factor, freqrank.whiten(many, scale=scale).factor)
    acc = many.clone()
    torch.func.vmap(freqrank.gram_)(acc, many)
    torch.testing.assert_close(acc, many + freqrank.gram(many))


def test_meta_tensors():
    x = torch.empty(2, 7, 5, device="meta", dtype=torch.bfloat16)
    assert freqrank.gram(x).shape == (2, 5, 5)
    G = freqrank.gram(x)
    assert freqrank.gram_(G, x).device.type == "meta"
    for upper in (False, True):
        L = freqrank.cholesky_ex(G, upper=upper).L
        real = freqrank.cholesky_ex(torch.eye(5).double().expand(2, 5, 5), upper=upper).L
        assert L.stride() == real.stride()
        X, L, info = freqrank.cholesky_solve_ex(G, G[..., :3], upper=upper)
        assert (X.shape, L.stride(), info.shape) == ((2, 5, 3), real.stride(), (2,))
    assert freqrank.solve_triangular(L, G, upper=True).shape == (2, 5, 5)
    assert freqrank.whiten(G, scale=2.0).info.shape == (2,)


def test_autocast_does_not_narrow():
    x = torch.randn(50, 8)
    A = positive_definite(8, dtype=torch.float32).requires_grad_()

    def everything():
        L = freqrank.cholesky_ex(A).L
        X = freqrank.solve_triangular(L, x.mT, upper=False)
        loss = X.square().sum() + freqrank.logdet(L) + freqrank.cholesky_solve_ex(A, x.mT).X.sum()
        return freqrank.gram(x), L, X, *torch.autograd.grad(loss, A), freqrank.whiten(A.detach()).factor

    plain = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = everything()
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def everything(x, weight):
    G = freqrank.gram(x, weight=weight)
    acc = freqrank.gram_(torch.zeros_like(G), x.detach())
    A = G + torch.eye(x.shape[-1], dtype=torch.float64)
    L, info = freqrank.cholesky_ex(A)
    X = freqrank.solve_triangular(L, x.mT.double(), upper=False)
    white = freqrank.whiten(A.detach(), scale=0.5)
    X = X + freqrank.cholesky_solve_ex(A, x.mT.double()).X
    return X.square().sum() + freqrank.logdet(L), acc, info, white.factor, freqrank.whiten_eigh(A.detach()).damping


def test_compile_one_graph_for_many_sizes():
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend=count)
    for T, n in ((9, 4), (12, 5), (30, 7)):
        x = torch.randn(T, n, requires_grad=True)
        weight = torch.rand(T)
        expected = everything(x, weight)
        got = compiled(x, weight)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(
            torch.autograd.grad(got[0], x)[0], torch.autograd.grad(expected[0], x)[0], rtol=1e-5, atol=1e-5
        )
    assert count.frame_count == 1


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x, weight):
            return everything(x, weight)

    tokens = torch.export.Dim("tokens", min=2, max=1000)
    example = (torch.randn(9, 4), torch.rand(9))
    program = torch.export.export(Module(), example, dynamic_shapes=({0: tokens}, {0: tokens}))
    other = (torch.randn(20, 4), torch.rand(20))
    for a, b in zip(program.module()(*other), everything(*other), strict=True):
        torch.testing.assert_close(a, b)


# --- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("dtype", SOLVER_FLOATS)
@pytest.mark.parametrize("n", [*range(0, 200), 383, 384, 385, 1023, 1025, 2047])
def test_cholesky_sweep(n, dtype):
    A = positive_definite(2, n, dtype=dtype)
    for upper in (False, True):
        L, info = freqrank.cholesky_ex(with_rubbish(A, upper), upper=upper)
        assert not info.any()
        wide = L.double().mT if upper else L.double()
        assert relative(wide @ wide.mT, A) <= 5 * max(n, 1) * torch.finfo(dtype).eps


@pytest.mark.long
@pytest.mark.parametrize("dtype", FLOATS)
def test_gram_sweep(dtype):
    for T in (0, 1, 95, 96, 97, 1023, 2049, 20_001):
        for n in (1, 2, 11, 12, 13, 47, 48, 49, 191, 192, 193, 400):
            x = torch.randn(T, n).to(dtype)
            torch.testing.assert_close(freqrank.gram(x), reference.gram(x), rtol=1e-13, atol=1e-11)


@pytest.mark.long
def test_cholesky_of_order_20000():
    # diagonally dominant, of a known factor: unit diagonal plus a few bands, so that A is cheap to make and to check
    n = 20_000
    A = torch.eye(n)
    for offset, value in ((1, 0.25), (37, 0.125), (9000, 0.0625)):
        A.diagonal(-offset).fill_(value)
    A = A.float()
    L, info = freqrank.cholesky_ex(A)
    assert int(info) == 0
    v = torch.randn(n, 1)
    symmetric = A @ v + A.mT @ v - A.diagonal().unsqueeze(-1) * v
    residual = L @ (L.mT @ v) - symmetric
    assert float(residual.norm() / symmetric.norm()) < 1e-4
