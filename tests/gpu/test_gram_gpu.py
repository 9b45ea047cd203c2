"""Gram matrices on a GPU, against sums in extended precision and of whole numbers."""

from __future__ import annotations

import itertools

import freqrank
import numpy as np
import pytest
import torch
from freqrank.ops import reference
from on_device import CUDA, DEVICE, assert_waits_for_nothing, needs_cuda, room, skip_module_without_device

skip_module_without_device()
pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# (leading dimensions, tokens, n, m): both tile shapes, whole and ragged tiles, split and whole sums
SHAPES = (
    ((), 1, 1, 1), ((), 7, 13, 5), ((), 96, 64, 64), ((), 300, 130, 70), ((), 2500, 5, 200), ((), 5000, 65, 64),
    ((), 517, 384, 128), ((2, 3), 40, 33, 65), ((30,), 100, 128, 64), ((), 20000, 256, 100), ((), 70, 1030, 520),
)  # fmt: skip


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Random numbers on the device, the same on each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).to(DEVICE)


def whole(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Whole numbers whose products sum up exactly in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-100, 101, shape, generator=generator).to(dtype).to(DEVICE)


def error(got: torch.Tensor, x: torch.Tensor, y: torch.Tensor | None = None, weight: torch.Tensor | None = None):
    """The worst element's, relative to sqrt(G_ii G_jj), against extended precision."""
    wide = [t.detach().double().cpu().numpy().astype(np.longdouble) for t in (x, x if y is None else y)]
    factor = (
        np.ones(x.shape[:-1], np.longdouble) if weight is None else weight.double().cpu().numpy().astype(np.longdouble)
    )
    expected = np.swapaxes(wide[0] * factor[..., None], -1, -2) @ wide[1]
    norms = [np.sqrt((t * t * np.abs(factor)[..., None]).sum(-2)) for t in wide]
    size = norms[0][..., :, None] * norms[1][..., None, :]
    difference = np.abs(got.cpu().numpy().astype(np.longdouble) - expected)
    return float((difference / np.maximum(size, 1e-300)).max(initial=0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_whole_numbers_are_exact(shape, dtype):
    batch, tokens, n, m = shape
    x, y = whole(*batch, tokens, n, dtype=dtype), whole(*batch, tokens, m, dtype=dtype, seed=1)
    weight = whole(*batch, tokens, dtype=torch.float64, seed=2)
    got = freqrank.gram(x)
    assert got.dtype == torch.float64
    assert torch.equal(got, x.double().mT @ x.double())
    assert torch.equal(freqrank.gram(x, y), x.double().mT @ y.double())
    weighted = x.double() * weight[..., None]
    assert torch.equal(freqrank.gram(x, weight=weight), weighted.mT @ x.double())
    assert torch.equal(freqrank.gram(x, y, weight=weight), weighted.mT @ y.double())
    acc = whole(*batch, n, m, dtype=torch.float64, seed=3)
    expected = acc + x.double().mT @ y.double()
    assert freqrank.gram_(acc, x, y) is acc
    assert torch.equal(acc, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "n"), [(200, 70), (3000, 20), (130, 384)])
@pytest.mark.parametrize("large", [1.0, 1e4])
def test_dense(tokens, n, dtype, large):
    if dtype == torch.float16 and large > 1:
        large = 1e3  # its range
    rows = random(tokens, n)
    rows[:: max(1, tokens // 3)] *= large
    x, weight = rows.to(dtype), random(tokens, seed=1)
    got = freqrank.gram(x)
    assert torch.equal(got, got.mT)
    assert error(got, x) < 1e-13
    weighted = freqrank.gram(x, weight=weight)
    assert torch.equal(weighted, weighted.mT)
    assert error(weighted, x, None, weight) < 1e-13
    y = random(tokens, 9, seed=2)
    assert error(freqrank.gram(x, y, weight=weight), x, y, weight) < 1e-13


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums(dtype):
    tokens = 300_000 if CUDA else 20_000
    x = random(tokens, 24).to(dtype)
    x[::1000] *= 1000.0
    expected = sum(reference.gram(part) for part in x.split(50))
    scale = expected.diagonal().sqrt()
    relative = (freqrank.gram(x) - expected).abs() / (scale[:, None] * scale)
    assert float(relative.max()) < 1e-13


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "expanded", "offset"])
def test_strides(layout):
    def make(columns, dtype, seed):
        if layout == "transposed":
            return random(2, 3, columns, 40, seed=seed).to(dtype).mT
        if layout == "sliced":
            return random(2, 3, 80, 3 * columns, seed=seed).to(dtype)[..., ::2, 1::3]
        if layout == "expanded":
            return random(40, 1, seed=seed).to(dtype).expand(2, 3, 40, columns)
        if layout == "offset":
            return random(2, 3, 40, columns + 1, seed=seed).to(dtype)[..., 1:]
        return random(3, 2, 40, columns, seed=seed).to(dtype).transpose(0, 1)

    for dtype, other in itertools.product(DTYPES, DTYPES):
        x, y = make(24, dtype, 1), make(72, other, 2)
        weight = random(40, 2, 3, seed=3).permute(1, 2, 0)
        assert error(freqrank.gram(x, weight=weight), x, None, weight) < 1e-14
        got = freqrank.gram(x, y, weight=weight)
        assert error(got, x, y, weight) < 1e-14
        acc = random(3, 72, 48, 2, seed=4).permute(3, 0, 2, 1)[:, :, ::2]
        before = acc.clone()
        freqrank.gram_(acc, x, y, weight=weight)
        torch.testing.assert_close(acc, before + got, atol=1e-12, rtol=1e-13)


def test_empty():
    for batch, tokens, n, m in ((2, 0, 5, 3), (0, 4, 5, 3), (2, 4, 0, 3), (2, 4, 5, 0)):
        x, y = (whole(batch, tokens, k, dtype=torch.float64) for k in (n, m))
        assert torch.equal(freqrank.gram(x, y), x.mT @ y)
        assert torch.equal(freqrank.gram(x), x.mT @ x)
        acc = torch.ones(batch, n, m, dtype=torch.float64, device=DEVICE)
        assert torch.equal(freqrank.gram_(acc, x, y), 1 + x.mT @ y)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [50, 3000])
def test_a_bad_number_stays_where_arithmetic_puts_it(bad, tokens):
    x = random(3, tokens, 70).bfloat16()
    clean = freqrank.gram(x)
    x[1, tokens // 2, 67] = bad
    got = freqrank.gram(x)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    wrong = ~got[1].isfinite()
    assert wrong[67].all()
    assert wrong[:, 67].all()
    assert int(wrong.sum()) == 2 * 70 - 1


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_repeats_bit_for_bit(shape):
    batch, tokens, n, m = shape
    for dtype in (torch.bfloat16, torch.float64):
        x, y = random(*batch, tokens, n).to(dtype), random(*batch, tokens, m, seed=1).to(dtype)
        want = freqrank.gram(x), freqrank.gram(x, y)
        for _ in range(5):
            assert torch.equal(freqrank.gram(x), want[0])
            assert torch.equal(freqrank.gram(x, y), want[1])


def test_far_apart_in_memory():
    room(5)
    storage = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device=DEVICE)
    far = storage.as_strided((2, 4), (2**31, 1))
    far.copy_(random(2, 4))
    assert error(freqrank.gram(far), far) < 1e-15
    assert error(freqrank.gram(far.mT), far.mT) < 1e-15


def test_more_results_than_two_to_the_31():
    room(20)
    x = torch.arange(46400, device=DEVICE).remainder(97).float()[None]
    got = freqrank.gram(x)
    for i in (0, 1, 23000, 46399):
        assert torch.equal(got[i], (x[0] * x[0, i]).double())


def test_a_layer_of_a_model():
    n = 4096 if CUDA else 512
    x = whole(2048, n, dtype=torch.bfloat16)
    acc = torch.zeros(n, n, dtype=torch.float64, device=DEVICE)
    for part in x.split(700):
        freqrank.gram_(acc, part)
    assert torch.equal(acc, x.double().mT @ x.double())


def test_gradients():
    x, y = (random(2, 5, n, seed=n).requires_grad_() for n in (3, 4))
    weight = random(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: freqrank.gram(x, weight=w), (x, weight))
    assert torch.autograd.gradcheck(lambda x, y, w: freqrank.gram(x, y, weight=w), (x, y, weight))


def test_compiled():
    x = random(40, 24).bfloat16()
    compiled = torch.compile(lambda x: freqrank.gram(x).diagonal() + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), freqrank.gram(x).diagonal() + 1)


def test_errors():
    x = random(5, 3)
    with pytest.raises(ValueError, match="y must have as many rows"):
        freqrank.gram(x, random(4, 3))
    with pytest.raises(TypeError, match="acc must have dtype float64"):
        freqrank.gram_(torch.zeros(3, 3, device=DEVICE), x)
    if CUDA:
        with pytest.raises(ValueError, match="y must be on the device of x"):
            freqrank.gram(x, x.cpu())
        with pytest.raises(ValueError, match="on a GPU at most 6 leading"):
            freqrank.gram(random(2, 2, 2, 2, 2, 2, 2, 1, 1))


# --- streams, graphs --------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_graphs(shape):
    batch, tokens, n, m = shape
    x, y = random(*batch, tokens, n).bfloat16(), random(*batch, tokens, m, seed=1)

    def work():
        return freqrank.gram(x), freqrank.gram(x, y), freqrank.gram_(freqrank.gram(x), x)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for seed in (2, 3):
        x.copy_(random(*batch, tokens, n, seed=seed))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, work(), strict=True))


@needs_cuda
def test_side_streams():
    for _, tokens, n, _ in SHAPES[:7]:
        data = random(tokens, n).bfloat16()
        want = freqrank.gram(data)
        x = torch.zeros_like(data)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # so that work put on another stream would run before the copy
            x.copy_(data)
            got = freqrank.gram(x)
        stream.synchronize()
        assert torch.equal(got, want)


@needs_cuda
def test_never_synchronises():
    x, y, weight = random(3000, 200).bfloat16(), random(3000, 64).bfloat16(), random(3000)

    def work():
        freqrank.gram_(freqrank.gram(x, weight=weight), x)
        freqrank.gram(x, y)

    assert_waits_for_nothing(work)
