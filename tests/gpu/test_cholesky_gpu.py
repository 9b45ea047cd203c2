"""Cholesky factors, whitening and triangular solves on a GPU, against LAPACK in float64."""

from __future__ import annotations

from functools import partial

import freqrank
import pytest
import torch
from on_device import CUDA, DEVICE, needs_cuda, room, skip_module_without_device

skip_module_without_device()
pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float64)
# A warp's 8, 16 and 32 columns, a block's shared memory, panels with whole and ragged steps
ORDERS = (
    1,
    2,
    7,
    8,
    9,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    100,
    127,
    128,
    160,
    161,
    191,
    224,
    225,
    256,
    257,
    383,
    500,
    700,
)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Random numbers on the device, the same on each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).to(DEVICE)


def positive_definite(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    x = random(*shape, seed=seed)
    n = shape[-1]
    return (x @ x.mT / n + torch.eye(n, dtype=torch.float64, device=DEVICE)).to(dtype)


def check_lower(L: torch.Tensor, a: torch.Tensor) -> None:
    """Lower triangular, and L L^T = A to what the dtype allows."""
    n = a.shape[-1]
    assert torch.equal(L, L.tril())
    wide, full = L.double(), a.double().tril() + a.double().tril(-1).mT
    residual = float((wide @ wide.mT - full).abs().max())
    assert residual <= 5 * n * eps(a.dtype) / 2 * float(full.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", ORDERS)
def test_dense_sizes(n, dtype):
    a = positive_definite(3, n, n, dtype=dtype, seed=n)
    for upper in (False, True):
        L, info = freqrank.cholesky_ex(a, upper=upper)
        assert L.dtype == dtype
        assert info.dtype == torch.int32
        assert (info == 0).all()
        check_lower(L.mT if upper else L, a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_small_and_few_large(dtype):
    for batch, n in ((10_000, 5), (5000, 24), (1000, 90), (40, 300), (2, 1500)):
        if not CUDA:
            batch, n = min(batch, 50), min(n, 300)
        a = positive_definite(batch, n, n, dtype=dtype)
        L, info = freqrank.cholesky_ex(a)
        assert (info == 0).all()
        check_lower(L, a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [6, 30, 70, 260])
def test_strides(n, dtype):
    a = positive_definite(3, 2, n, n, dtype=dtype)
    want = freqrank.cholesky_ex(a).L
    spread = torch.full((2, 3, 2 * n, n + 1), float("nan"), dtype=dtype, device=DEVICE)
    view = spread.transpose(0, 1)[..., ::2, 1:]
    view.copy_(a)
    for x in (a.mT.contiguous().mT, view, a[:1].expand(3, -1, -1, -1)):
        got = freqrank.cholesky_ex(x).L
        assert torch.equal(got, want if x.stride(0) else want[:1].expand_as(want))
    marked = torch.where(torch.ones_like(a).tril().bool(), a, float("nan"))  # the other triangle is not read
    assert torch.equal(freqrank.cholesky_ex(marked).L, want)
    assert torch.equal(freqrank.cholesky_ex(marked.mT, upper=True).L.mT, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 5, 32, 60, 128, 300])
def test_info_is_lapacks(n, dtype):
    orders = sorted({1, n // 2 + 1, n})
    a = positive_definite(2 * len(orders) + 1, n, n, dtype=dtype)
    good = freqrank.cholesky_ex(a).L
    for b, order in enumerate(orders):
        a[2 * b, order - 1, order - 1] = -1
        a[2 * b + 1, n - 1, order - 1] = float("nan")
    info = freqrank.cholesky_ex(a).info
    L = freqrank.cholesky_ex(a).L
    want = torch.linalg.cholesky_ex(a.cpu()).info
    assert info.tolist() == want.tolist()
    assert (info[:-1] > 0).all()
    assert torch.equal(L[-1], good[-1])
    assert torch.equal(L, L.tril()) or bool(L.isnan().any())
    with pytest.raises(torch.linalg.LinAlgError, match=r"\(Batch element 0\).*not positive-definite"):
        freqrank.cholesky_ex(a, check_errors=True)


def test_empty():
    for shape in ((0, 5, 5), (3, 0, 0), (0, 300, 300)):
        L, info = freqrank.cholesky_ex(random(*shape))
        assert L.shape == shape
        assert info.tolist() == [0] * shape[0]
        assert freqrank.whiten(random(*shape)).damping.tolist() == [0] * shape[0]
    assert freqrank.solve_triangular(random(2, 4, 4), random(2, 4, 0), upper=True).shape == (2, 4, 0)


@pytest.mark.parametrize("n", [6, 25, 90, 210])
def test_whitening_ladder(n):
    """Matrices that need every level, against the CPU's ladder."""
    q = torch.linalg.qr(random(9, n, n)).Q
    values = torch.linspace(0.5, 1.5, n, dtype=torch.float64, device=DEVICE).repeat(9, 1)
    values[1:8, 0] = -torch.logspace(-12, -6, 7, dtype=torch.float64, device=DEVICE) / 3
    values[8, 0] = -1
    gram = (q * values.unsqueeze(-2)) @ q.mT
    gram = (gram + gram.mT) / 2
    scale = torch.rand(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64).add(0.5).to(DEVICE)
    factor, damping, info = freqrank.whiten(gram, scale=scale)
    want = freqrank.whiten(gram.cpu(), scale=scale.cpu())
    assert info.tolist()[:8] == [0] * 8
    assert info.tolist() == want.info.tolist()
    # levels below rounding may differ by one
    assert damping[3:].tolist() == want.damping[3:].tolist()
    assert factor[8].triu().isnan().any()
    assert torch.equal(factor[:8], factor[:8].triu())
    full = gram[:8] * scale[:8, None, None]
    full = full + damping[:8, None, None] * torch.diag_embed(full.diagonal(dim1=-2, dim2=-1))
    check_lower(factor[:8].mT, full)
    single = freqrank.whiten(gram[:1].float())
    assert single.factor.dtype == torch.float64
    check_lower(single.factor.mT, gram[:1].float().double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (33, 65), (128, 64), (150, 70), (129, 1), (500, 300)])
def test_solve_dense(n, k, dtype):
    A = random(2, n, n, dtype=dtype) / n + 2 * torch.eye(n, dtype=dtype, device=DEVICE)
    for upper in (True, False):
        for left in (True, False):
            for unit in (True, False):
                B = random(2, n, k, dtype=dtype, seed=1) if left else random(2, k, n, dtype=dtype, seed=1)
                options = {"upper": upper, "left": left, "unitriangular": unit}
                got = freqrank.solve_triangular(A, B, **options)
                want = torch.linalg.solve_triangular(A.cpu().double(), B.cpu().double(), **options)
                error = float((got.double().cpu() - want).norm() / want.norm())
                assert error <= 20 * n**0.5 * eps(dtype), options
    assert torch.equal(
        freqrank.solve_triangular(A.mT, B, upper=True, left=False),
        freqrank.solve_triangular(A.mT.contiguous(), B, upper=True, left=False),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", ORDERS)
def test_factor_and_solve_dense(n, dtype):
    a = positive_definite(3, n, n, dtype=dtype, seed=n)
    a[1, n // 2, n // 2] = -1
    for k in (1, 50, 520):
        b = random(3, n, k, dtype=dtype, seed=1)
        for upper in (False, True):
            for right in (b, b.mT.contiguous().mT):
                X, L, info = freqrank.cholesky_solve_ex(a, right, upper=upper)
                assert info.tolist() == [0, n // 2 + 1, 0]
                assert bool(X[1].isnan().all())
                good = [0, 2]
                assert torch.equal(L[good], freqrank.cholesky_ex(a[good], upper=upper).L)
                want = torch.linalg.solve(a[good].cpu().double(), b[good].cpu().double())
                error = float((X[good].double().cpu() - want).norm() / want.norm())
                assert error <= 40 * n**0.5 * eps(dtype), (k, upper)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_the_same_bit_for_bit(dtype):
    for batch, n in ((50, 20), (20, 100), (3, 400)):
        a = positive_definite(batch, n, n, dtype=dtype)
        b = random(batch, n, 33, dtype=dtype, seed=1)
        first = freqrank.cholesky_ex(a).L
        x = freqrank.solve_triangular(first, b, upper=False)
        solved = freqrank.cholesky_solve_ex(a, b).X
        for _ in range(3):
            assert torch.equal(freqrank.cholesky_solve_ex(a, b).X, solved)
            assert torch.equal(freqrank.cholesky_ex(a).L, first)
            assert torch.equal(freqrank.solve_triangular(first, b, upper=False), x)


def test_gradients():
    def solve(x, b):
        L = freqrank.cholesky_ex(x @ x.mT + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).L
        A = x @ x.mT + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return freqrank.solve_triangular(L, b, upper=False), freqrank.logdet(L), freqrank.cholesky_solve_ex(A, b).X

    x, b = random(2, 3, 3).requires_grad_(), random(2, 3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(solve, (x, b))
    assert torch.autograd.gradgradcheck(solve, (x, b))
    x, b = random(2, 40, 40).requires_grad_(), random(2, 40, 2, seed=1).requires_grad_()
    got = torch.autograd.grad(sum(y.sum() for y in solve(x, b)), (x, b))
    cpu = [t.detach().cpu().requires_grad_() for t in (x, b)]
    want = torch.autograd.grad(sum(y.sum() for y in solve(*cpu)), cpu)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.cpu(), w)


@pytest.mark.parametrize("upper", [False, True])
def test_gradients_of_every_option(upper):
    a = random(2, 4, 4) / 4 + 2 * torch.eye(4, dtype=torch.float64, device=DEVICE)
    assert torch.autograd.gradcheck(
        lambda a: freqrank.cholesky_ex(a @ a.mT, upper=upper).L, (a.clone().requires_grad_(),)
    )
    for left in (True, False):
        for unit in (True, False):
            options = {"upper": upper, "left": left, "unitriangular": unit}
            b = random(2, 4, 3, seed=1) if left else random(2, 3, 4, seed=1)
            inputs = (a.clone().requires_grad_(), b.requires_grad_())
            solve = partial(freqrank.solve_triangular, **options)
            assert torch.autograd.gradcheck(solve, inputs), options
            assert torch.autograd.gradgradcheck(solve, inputs), options


def test_gradients_of_large_float32_matrices_are_those_of_float64():
    a = positive_definite(2, 300, 300)
    b = random(2, 300, 40, seed=1)
    grads = []
    for dtype in DTYPES:
        x, y = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
        L = freqrank.cholesky_ex(x).L
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            solved = freqrank.solve_triangular(L, y, upper=False)
        (solved.square().sum() + freqrank.logdet(L).sum()).backward()
        assert x.grad is not None
        assert y.grad is not None
        assert x.grad.dtype == y.grad.dtype == dtype
        assert x.grad.device == x.device
        grads.append((x.grad.double(), y.grad.double()))
    for single, double in zip(*grads, strict=True):
        assert float((single - double).norm() / double.norm()) < 1e-4


@needs_cuda
def test_nothing_waits_for_the_gpu_and_graphs_replay():
    a, b = positive_definite(3, 300, 300), random(3, 300, 5, seed=1)
    small = positive_definite(50, 20, 20, dtype=torch.float32)

    def run():
        L, info = freqrank.cholesky_ex(a)
        solved = (*freqrank.cholesky_solve_ex(a, b), *freqrank.cholesky_solve_ex(small, small))
        return L, info, freqrank.solve_triangular(L, b, upper=False), *freqrank.whiten(a), *solved

    want = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = run()
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for x in got:
        x.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@needs_cuda
def test_compiled():
    a = positive_definite(2, 40, 40)
    compiled = torch.compile(lambda a: freqrank.whiten(a).factor + freqrank.cholesky_ex(a).L.mT, fullgraph=True)
    assert torch.equal(compiled(a), freqrank.whiten(a).factor + freqrank.cholesky_ex(a).L.mT)


@needs_cuda
def test_more_than_2_to_the_31_elements():
    room(36)
    a = torch.eye(2, device=DEVICE).expand(2**29 + 3, 2, 2) * 4  # 8 GiB
    L, info = freqrank.cholesky_ex(a)
    assert bool((L[-5:] == 2 * torch.eye(2, device=DEVICE)).all())
    assert not info.any()
    big = torch.eye(46_400, device=DEVICE)
    got = freqrank.solve_triangular(big, torch.ones(46_400, 3, device=DEVICE), upper=True)
    assert bool((got == 1).all())


def test_bad_input():
    with pytest.raises(TypeError, match="A must have dtype float32, float64"):
        freqrank.cholesky_ex(positive_definite(3, 3).half())
    with pytest.raises(ValueError, match="square"):
        freqrank.cholesky_ex(random(3, 4))
