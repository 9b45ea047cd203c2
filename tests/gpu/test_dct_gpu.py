"""The discrete cosine transforms on a GPU, against float64 on the CPU."""

from __future__ import annotations

import itertools
import math
import threading

import freqrank
import numpy as np
import pytest
import torch
from freqrank.ops import reference
from on_device import CUDA, DEVICE, assert_waits_for_nothing, needs_cuda, room, skip_module_without_device

skip_module_without_device()
pytestmark = pytest.mark.gpu

TYPES = (1, 2, 3, 4)
NORMS = (None, "ortho", "forward")
ORTHOGONALIZE = (None, True, False)
ONE = ("dct", "idct")
MANY = ("dctn", "idctn")
BOUND = {torch.float32: 4e-7, torch.float64: 1e-15}
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half a unit in the last place

SHORT = (*range(1, 36), 37, 47, 48, 64, 67, 81, 97, 100, 121, 125, 127, 128, 130, 134, 169, 242, 243, 256, 257, 360)
LONG = (500, 512, 997, 1000, 1009, 1023, 1024, 1025, 2000, 2048, 2187, 3000, 4093, 4096, 4097, 6000, 8191, 8192)
LONGER = (10007, 10000, 12288, 15015, 16384, 2**15, 2**16 + 1, 2**17, 100003, 6**7, 2**20)


def rows(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Random numbers on the device, the same on each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).to(DEVICE)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def bound(dtype: torch.dtype, *lengths: int) -> float:
    return BOUND[dtype] * sum(max(1.0, math.log2(n)) for n in lengths)


def exact(name: str, x: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
    """The same op in float64 on the CPU, which tests/test_transforms.py holds against SciPy."""
    return getattr(freqrank, name)(x.cpu().double(), *args, **options)


def combinations(n: int, norms: tuple[str | None, ...] = NORMS) -> list[tuple[str, int, str | None, bool | None]]:
    everything = itertools.product(ONE, TYPES, norms, ORTHOGONALIZE)
    return [case for case in everything if not (case[1] == 1 and n < 2)]


# --- lengths, types, norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("n", SHORT)
def test_short_lengths(n, dtype):
    for count in (1, 19):
        x = rows(count, n, dtype=dtype, seed=n)
        for name, type, norm, orthogonalize in combinations(n):
            options = {"norm": norm, "orthogonalize": orthogonalize}
            got = getattr(freqrank, name)(x, type, **options)
            assert got.dtype == dtype
            assert got.device == x.device
            assert got.is_contiguous()
            assert error(got, exact(name, x, type, **options)) <= bound(dtype, n), (name, type, options, count)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("n", LONG)
def test_long_lengths(n, dtype):
    x = rows(7, n, dtype=dtype, seed=n)
    for name, type, norm in itertools.product(ONE, TYPES, (None, "ortho")):
        got = getattr(freqrank, name)(x, type, norm=norm)
        assert error(got, exact(name, x, type, norm=norm)) <= bound(dtype, n), (name, type, norm)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("n", LONGER)
def test_lengths_beyond_shared_memory(n, dtype):
    x = rows(3, n, dtype=dtype, seed=n)
    for type in TYPES:
        got = freqrank.dct(x, type, norm="ortho")
        assert error(got, exact("dct", x, type, norm="ortho")) <= bound(dtype, n), type
    strided = rows(n, 2, dtype=dtype, seed=n)
    assert error(freqrank.idct(strided, 2, dim=0), exact("idct", strided, 2, dim=0)) <= bound(dtype, n)


@pytest.mark.parametrize("n", [1_000_003, 3 * 2**20, 2**22 + 1])
def test_huge_lengths(n):
    x = rows(n, dtype=torch.float32)
    for type in (1, 2):
        got = freqrank.dct(x, type, norm="ortho")
        assert error(got, exact("dct", x, type, norm="ortho")) <= bound(torch.float32, n)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 17, 32, 60, 64, 67, 256])
def test_dense_matrices(n):
    x = rows(5, n, seed=n)
    for name, type, norm, orthogonalize in combinations(n, (None, "backward", "ortho", "forward")):
        options = {"norm": norm, "orthogonalize": orthogonalize}
        want = getattr(reference, name)(x.cpu(), type, **options)
        assert error(getattr(freqrank, name)(x, type, **options), want) < bound(torch.float64, n), (name, type, options)


@pytest.mark.parametrize("n", [8, 32, 60, 61, 64, 128, 1024, 4096])
@pytest.mark.parametrize("count", [1, 2, 3, 31, 64, 133, 1000, 70000])
def test_numbers_of_rows(count, n):
    if count * n > 2**24:
        count = 2**24 // n + 1
    x = rows(count, n, dtype=torch.float32)
    for type in TYPES:
        got = freqrank.dct(x, type)
        want = exact("dct", x, type)
        worst = ((got.double().cpu() - want).norm(dim=1) / want.norm(dim=1)).max().item()
        assert worst <= 3 * bound(torch.float32, n)  # of a single row


# --- several dimensions, shapes, strides --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("name", MANY)
def test_many_dimensions(name, dtype):
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
    for type, case, norm in itertools.product(TYPES, cases, NORMS):
        got = getattr(freqrank, name)(x, type, **case, norm=norm)
        assert error(got, exact(name, x, type, **case, norm=norm)) <= bound(dtype, 8, 8), (type, case, norm)
        assert got.is_contiguous()


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    "shape", [(8, 8), (7, 9), (16, 32), (31, 33), (64, 64), (61, 64), (100, 100), (128, 128), (128, 96), (130, 64)]
)
def test_tiles(shape, dtype):
    for count in (1, 5, 300):
        x = rows(count, *shape, dtype=dtype)
        for name, type in itertools.product(MANY, TYPES):
            got = getattr(freqrank, name)(x, type, dim=(-2, -1), norm="ortho")
            want = exact(name, x, type, dim=(-2, -1), norm="ortho")
            assert error(got, want) <= bound(dtype, *shape), (name, type, count)
    x = rows(*shape, 6, dtype=dtype)
    assert error(freqrank.dctn(x, dim=(0, 1)), exact("dctn", x, dim=(0, 1))) <= bound(dtype, *shape)
    x = rows(3, *shape, dtype=dtype).mT
    assert error(freqrank.dctn(x, dim=(1, 2)), exact("dctn", x, dim=(1, 2))) <= bound(dtype, *shape)


@pytest.mark.parametrize(
    ("algorithm", "shape", "dim"),
    [
        ("power of two", (700, 64), (1,)),
        ("power of two", (50, 4096), (1,)),
        ("power of two", (256, 40), (0,)),
        ("mixed radix", (300, 60), (1,)),
        ("mixed radix", (1000, 7), (0,)),
        ("Bluestein", (30, 1009), (1,)),
        ("several passes", (3, 10**5), (1,)),
        ("several passes", (2, 10**5 + 3), (1,)),
        ("2-D tile", (40, 64, 64), (1, 2)),
        ("2-D tile", (10, 100, 60), (1, 2)),
    ],
)
def test_every_branch_of_the_plan(algorithm, shape, dim):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = rows(*shape, dtype=dtype)
        if dtype != torch.float64:  # double has other limits
            assert algorithm in freqrank.describe_plan(freqrank.dctn, x, dim=dim, device="cuda")
        for name, type in itertools.product(MANY, TYPES):
            got = getattr(freqrank, name)(x, type, dim=dim, norm="ortho")
            want = exact(name, x, type, dim=dim, norm="ortho")
            allowed = bound(dtype if dtype in BOUND else torch.float32, *(shape[d] for d in dim))
            assert error(got, want) <= allowed + EPSILON.get(dtype, 0.0), (name, type, dtype)


def test_large_images_and_volumes():
    for shape, dim in (((2, 512, 512), (1, 2)), ((1080, 1920), (0, 1)), ((48, 50, 52), None), ((5, 3000, 40), (1, 2))):
        x = rows(*shape, dtype=torch.float32)
        got = freqrank.dctn(x, dim=dim, norm="ortho")
        assert error(got, exact("dctn", x, dim=dim, norm="ortho")) <= bound(torch.float32, *shape)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 12, 32, 64])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_crop_and_pad(n, dim):
    for shape in ((6, 7, 5), (40, 33, 70)):
        x = rows(*shape)
        for name, type in itertools.product(ONE, TYPES):
            if type == 1 and n < 2:
                continue
            got = getattr(freqrank, name)(x, type, n, dim)
            assert error(got, exact(name, x, type, n, dim)) <= bound(torch.float64, n)


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
        "negated": torch.complex(x, x).conj().imag,
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["contiguous", "transposed", "permuted", "sliced", "expanded", "expanded row", "offset", "overlapping", "negated"],
)
def test_strides(kind):
    x = strided(kind)
    before = x.clone()
    for dim, type in itertools.product((0, 1, 2), TYPES):
        got = freqrank.dct(x, type, dim=dim)
        assert error(got, exact("dct", x, type, dim=dim)) <= bound(torch.float32, 40)
    assert error(freqrank.dctn(x, dim=(0, 2)), exact("dctn", x, dim=(0, 2))) <= bound(torch.float32, 40, 40)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [8, 30, 64, 256, 1000, 1024])
def test_memory_that_vectors_cannot_be_loaded_from(n, dtype):
    for offset, gap in itertools.product((0, 1, 2, 3), (0, 1, 2)):
        memory = rows(offset + 5 * (n + gap), dtype=dtype, seed=n)
        x = memory.as_strided((5, n), (n + gap, 1), offset)
        for type in (1, 2):
            got, want = freqrank.dct(x, type), exact("dct", x, type)
            allowed = EPSILON[dtype] if dtype in EPSILON else bound(dtype, n)
            assert error(got, want) <= allowed, (offset, gap)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (2, 5, 0)])
def test_empty_batch(shape):
    dim = shape.index(5)
    x = torch.empty(shape, requires_grad=True, device=DEVICE)
    y = freqrank.dct(x, dim=dim)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert freqrank.dct(x, n=8, dim=dim).numel() == 0


def test_padding_nothing_gives_zeros():
    assert torch.equal(freqrank.dct(torch.empty(3, 0, device=DEVICE), n=4), torch.zeros(3, 4, device=DEVICE))
    assert torch.equal(freqrank.dctn(torch.empty(0, 5, device=DEVICE), s=(4, 4)), torch.zeros(4, 4, device=DEVICE))


@needs_cuda
@pytest.mark.parametrize("n", [2, 48, 64, 1000])
def test_more_than_two_to_the_31_elements(n):
    room(14)
    count = 2**31 // n + 3
    x = torch.empty(count, n, dtype=torch.float16, device=DEVICE)
    marks = sorted({0, 1, count // 2, 2**30 // n, 2**30 // n + 1, count - 2, count - 1})
    x.zero_()
    for i in marks:
        x[i] = rows(n, seed=i % 1000).half()
    y = freqrank.dct(x, norm="ortho")
    for i in marks:
        want = exact("dct", x[i], norm="ortho")
        assert (y[i].double().cpu() - want).abs().max() <= 2 * EPSILON[torch.float16] * want.abs().max()
    quiet = torch.ones(count, dtype=torch.bool, device=DEVICE)
    quiet[marks] = False
    step = 2**28 // n
    for first in range(0, count, step):
        part = y[first : first + step]
        assert not bool(((part != 0).any(dim=1) & quiet[first : first + step]).any())


@needs_cuda
def test_strides_beyond_two_to_the_31():
    room(10)
    storage = torch.empty(2**31 + 2**20, dtype=torch.float16, device=DEVICE)
    x = storage.as_strided((3, 64), (2**30, 1))
    x.copy_(rows(3, 64))
    assert torch.equal(freqrank.dct(x), freqrank.dct(x.clone()))
    for got, want in (
        (freqrank.dct(x, dim=0), exact("dct", x, dim=0)),
        (freqrank.dctn(x), exact("dctn", x)),
    ):
        assert (got.double().cpu() - want).abs().max() <= 4 * EPSILON[torch.float16] * want.abs().max()


# --- dtypes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("type", TYPES)
def test_16_bit_is_within_one_rounding_of_float32(type, dtype):
    for shape in ((1, 40), (33, 40), (5, 31), (100, 64), (64, 128), (9, 1000), (3, 2048), (2, 1009), (2, 20000)):
        x = rows(*shape, dtype=dtype)
        for name, dim in itertools.product(ONE, (0, 1)):
            if type == 1 and shape[dim] < 2:
                continue
            got = getattr(freqrank, name)(x, type, dim=dim)
            wide = getattr(freqrank, name)(x.float(), type, dim=dim)
            assert got.dtype == dtype
            slack = bound(torch.float32, shape[dim]) * wide.norm(dim=dim, keepdim=True)
            assert bool(((got.float() - wide).abs() <= EPSILON[dtype] * wide.abs() + slack).all()), (name, shape, dim)
    x = rows(6, 17, 12, dtype=dtype)
    for name, case in itertools.product(MANY, ({}, {"s": (3, 20, 7)}, {"dim": (2, 0)}, {"dim": 1})):
        got = getattr(freqrank, name)(x, type, norm="ortho", **case)
        wide = getattr(freqrank, name)(x.float(), type, norm="ortho", **case)
        slack = bound(torch.float32, 20, 20, 20) * wide.norm()
        assert bool(((got.float() - wide).abs() <= EPSILON[dtype] * wide.abs() + slack).all()), (name, case)


def test_float16_overflows_to_infinity_only_at_the_end():
    for n in (8, 64, 100):
        x = torch.full((n, n), 60000.0, dtype=torch.float16, device=DEVICE)
        assert freqrank.dctn(x)[0, 0] == math.inf
        assert freqrank.dctn(x, norm="forward")[0, 0] == 60000.0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64])
def test_integers_become_the_default_dtype(dtype):
    x = torch.arange(12, device=DEVICE).remainder(5).to(dtype).view(3, 4)
    assert torch.equal(freqrank.dct(x), freqrank.dct(x.float()))
    assert freqrank.dctn(x, dim=()).dtype == torch.float32


def test_autocast_leaves_dtypes_alone():
    x = rows(3, 4, dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert freqrank.dct(x).dtype == torch.float32
        assert freqrank.dct(x.bfloat16()).dtype == torch.bfloat16


# --- containment, repeatability, streams --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 7, 16, 17, 64, 97, 120, 512, 2048, 20000])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
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
        assert not torch.isfinite(got[[3, 20, 36]]).all(dim=1).any()


def test_bad_values_stay_in_their_tile():
    x = rows(9, 64, 48, dtype=torch.float32)
    spoilt = x.clone()
    spoilt[4, 63, 47] = math.nan
    want, got = (freqrank.dctn(t, dim=(1, 2)) for t in (x, spoilt))
    clean = [i for i in range(9) if i != 4]
    assert torch.equal(got[clean], want[clean])
    assert bool(torch.isnan(got[4]).all())


SIZES = ((300, 64), (5, 1000), (7, 1009), (2, 40000), (3, 60000), (11, 4096), (100, 100), (4, 128, 128), (3, 70, 90))


@pytest.mark.parametrize("shape", SIZES)
def test_repeats_bit_for_bit(shape):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = rows(*shape, dtype=dtype)
        op = freqrank.dct if len(shape) == 2 else freqrank.dctn
        want = op(x)
        assert all(torch.equal(op(x), want) for _ in range(5))
        if len(shape) == 2:  # neither do other rows matter
            assert torch.equal(op(x[1:2].contiguous()), want[1:2])


@needs_cuda
@pytest.mark.parametrize("shape", SIZES)
def test_side_streams(shape):
    op = freqrank.dct if len(shape) == 2 else freqrank.dctn
    data = rows(*shape, dtype=torch.float32)
    want = op(data)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    x = torch.zeros_like(data)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # so that work put on another stream would run before the copy
        x.copy_(data)
        y = op(x)
    stream.synchronize()
    assert torch.equal(y, want)


@needs_cuda
def test_never_synchronises():
    x = rows(300, 1000, dtype=torch.float32)

    def work() -> None:
        for n in (64, 1000, 1009, 40000):
            freqrank.dct(x, n=n)
        freqrank.dctn(x, s=(128, 128))

    assert_waits_for_nothing(work)


@needs_cuda
@pytest.mark.parametrize("shape", SIZES)
def test_graphs(shape):
    def work(x: torch.Tensor) -> torch.Tensor:
        y = freqrank.dct(x, norm="ortho") if len(shape) == 2 else freqrank.dctn(x, norm="ortho")
        return y + freqrank.idct(y, 3, dim=0)

    x = rows(*shape, dtype=torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = work(x)
    for seed in (1, 2, 3):
        data = rows(*shape, dtype=torch.float32, seed=seed)
        x.copy_(data)
        graph.replay()
        assert torch.equal(y, work(data))


@needs_cuda
def test_threads_with_a_stream_each():
    inputs = [rows(50, n, dtype=torch.float32) for n in (32, 60, 61, 1000, 1024, 30000)]
    want = [freqrank.dct(x) for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in np.random.default_rng(seed).permutation(len(inputs) * 5) % len(inputs):
                if not torch.equal(freqrank.dct(inputs[i]), want[i]):
                    wrong.append(i)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_cuda
@pytest.mark.skipif(CUDA and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensor():
    x = rows(5, 60, dtype=torch.float32).to("cuda:1")
    with torch.cuda.device(0):
        y = freqrank.dct(x)
    assert y.device == x.device
    assert torch.equal(y.cpu(), freqrank.dct(x.to("cuda:0")).cpu())
    assert torch.cuda.current_device() == 0


# --- autograd, the compiler and its kin ---------------------------------------------------------------------------


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients(type, norm):
    for name, n in itertools.product(ONE, (None, 3, 8)):
        x = rows(2, 5).requires_grad_()
        f = lambda x, name=name, n=n: getattr(freqrank, name)(x, type, n, norm=norm)  # noqa: E731
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)
    x = rows(3, 2, 3).transpose(0, 1).requires_grad_()
    f = lambda x: freqrank.dctn(x, type, (5, 2), (0, 2), norm=norm)  # noqa: E731
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("shape", SIZES)
def test_gradients_are_those_of_the_cpu(shape):
    x = rows(*shape).requires_grad_()
    twin = x.detach().cpu().requires_grad_()
    weight = rows(*shape, seed=1)
    for leaf, factor in ((x, weight), (twin, weight.cpu())):
        (freqrank.dctn(leaf, dim=tuple(range(1, len(shape))), norm="ortho") * factor).sum().backward()
    assert error(x.grad, twin.grad) <= bound(torch.float64, *shape)


def test_vmap():
    x = rows(3, 4, 5)
    want = freqrank.dct(x, 2, dim=1)
    assert torch.equal(torch.vmap(lambda a: freqrank.dct(a, 2, dim=0))(x), want)


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((3, 5), ([1], [5], [5], 2, 0, 0, 0)),
        ((3, 5), ([0, 1], [4, 2], [4, 2], 1, 1, 1, 1)),
        ((3, 64), ([1], [64], [64], 3, 2, 2, 0)),
        ((0, 5), ([1], [5], [5], 4, 0, 0, 0)),
    ],
)
def test_opcheck(shape, arguments):
    for dtype in (torch.float64, torch.bfloat16):
        x = rows(*shape, dtype=dtype).requires_grad_()
        torch.library.opcheck(torch.ops.freqrank.dct.default, (x, *arguments))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    if backend == "inductor":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    f = lambda x: freqrank.dctn(x, s=(64, 50), norm="ortho").square() + freqrank.idct(x, 4, n=50).sum(0)  # noqa: E731
    g = torch.compile(f, fullgraph=True, backend=backend, dynamic=True)
    for shape in ((4, 6), (9, 3)):
        x, y = (rows(*shape).requires_grad_() for _ in range(2))
        want, got = f(x), g(y)
        torch.testing.assert_close(got, want)
        want.sum().backward()
        got.sum().backward()
        torch.testing.assert_close(y.grad, x.grad)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x):
            return freqrank.dct(x, 2, dim=1, norm="ortho")

    sizes = {0: torch.export.Dim("b"), 1: torch.export.Dim("n", min=2)}
    program = torch.export.export(Module(), (rows(3, 8),), dynamic_shapes=(sizes,))
    x = rows(5, 13)
    assert torch.equal(program.module()(x), freqrank.dct(x, 2, norm="ortho"))


# --- bad input ----------------------------------------------------------------------------------------------------


def test_bad_input():
    x = rows(3, 4)
    for arguments, kind, says in (
        ({"dim": 2}, ValueError, "dim out of range"),
        ({"n": 0}, ValueError, "at least 1"),
        ({"type": 5}, ValueError, "type must be one of"),
    ):
        with pytest.raises(kind, match=says):
            freqrank.dct(x, **arguments)
    with pytest.raises(TypeError, match="x must be real"):
        freqrank.dct(torch.complex(x, x))
