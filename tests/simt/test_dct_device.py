"""The DCT's CUDA kernels under the host executor, against SciPy in float64: every branch of the plan."""

import math
import re

import freqrank_simt as simt
import numpy as np
import pytest
import scipy.fft

NORMS = [None, "ortho", "forward"]
EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0.0, "float64": 0.0}
SMALL = {"sms": 2}  # several rows in a block though tests have few


def rng():
    return np.random.default_rng(7)


def to_bfloat16(x):
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def stored(x, dtype):
    return to_bfloat16(x) if dtype == "bfloat16" else np.asarray(x).astype(dtype)


def value(x, dtype):
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def ends(type, norm, orthogonalize):
    """The factors that make type's matrix SciPy's, as freqrank.dct gives them."""
    orthogonalize = norm == "ortho" if orthogonalize is None else orthogonalize
    return (0 if type in (2, 4) else 1 if orthogonalize else 2), (1 if orthogonalize and type in (1, 2) else 0)


def run(x, dtype, dims, lengths, type, norm=0, in_ends=0, out_ends=0, *, sizes=None, out=None, seed=0, limits=SMALL):
    """The transform of x, every element of which must have been written, and what the plan says of its steps."""
    if out is None:
        shape = list(x.shape)
        for d, size in zip(dims, lengths if sizes is None else sizes, strict=True):
            shape[d] = size
        out = np.empty(shape, x.dtype)
    executor = simt.Executor(seed, limits.get("shared_bytes", 227 * 1024))
    if out.size and out.flags.c_contiguous:
        executor.expect_written(out, by_next_launch=False)
    steps = simt.dct(executor, x, out, dtype, dims, lengths, type, norm, in_ends, out_ends, limits)
    executor.check_written()
    return out, steps, executor


def scipy_dctn(x, dtype, dims, lengths, type, norm, orthogonalize=None):
    return scipy.fft.dctn(value(x, dtype), type, lengths, dims, norm, orthogonalize=orthogonalize)


def assert_accurate(out, expected, dtype, lengths):
    error = np.linalg.norm(value(out, dtype) - expected)
    size = np.linalg.norm(expected)
    stages = sum(max(1.0, np.log2(n)) for n in lengths)
    bound = (1e-15 if dtype == "float64" else 4e-7) * stages + EPSILON[dtype]
    assert error <= bound * size + 1e-300, f"relative error {error / size:.2e}, allowed {bound:.2e}"


def check(shape, dim, type, dtype="float32", norm=None, orthogonalize=None, algorithm=None, limits=SMALL):
    x = stored(rng().standard_normal(shape), dtype)
    n = shape[dim]
    out, steps, executor = run(
        x, dtype, [dim], [n], type, NORMS.index(norm), *ends(type, norm, orthogonalize), limits=limits
    )
    assert algorithm is None or steps[-1]["algorithm"] == algorithm
    assert_accurate(out, scipy_dctn(x, dtype, [dim], [n], type, norm, orthogonalize), dtype, [n])
    return steps, executor


TINY = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15]
SMOOTH = [18, 22, 26, 30, 36, 48, 55, 63, 100, 110, 182, 256, 360]
PRIMES = [17, 23, 34, 37, 38, 59, 101, 202, 359]


@pytest.mark.parametrize("type", [1, 2, 3, 4])
def test_every_length_up_to_forty(type):
    for n in range(2 if type == 1 else 1, 41):
        check((3, n), 1, type, "float64", limits=SMALL | {"largest_power_of_two": 0})


@pytest.mark.parametrize("type", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_smooth_lengths_and_primes_in_one_block(type, dtype):
    for n in SMOOTH:
        check((5, n + (type == 1)), 1, type, dtype, algorithm="mixed radix", limits=SMALL | {"largest_power_of_two": 0})
    for n in PRIMES:
        check((3, n + (type == 1)), 1, type, dtype, algorithm="Bluestein")


def test_every_radix():
    seen = set()
    for half in [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16, 32, 49, 81, 144, 150, 225, 256, 720]:
        limits = SMALL | {"largest_power_of_two": 0}
        for dtype in ["float32", "float64"]:
            steps, _ = check((2, 2 * half), 1, 2, dtype, algorithm="mixed radix", limits=limits)
            seen |= set(steps[-1]["radices"])
    assert seen == {2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16}


def test_every_stage_of_the_convolution():
    # the first radix, the radices between, and the last one, where the FFT and the one back meet
    outer, between = set(), set()
    for n in (17, 23, 37, 47, 59, 83, 101, 149, 202, 307, 359, 401, 509, 1019, 1531, 2729, 4099):
        for type in (2, 3):
            for dtype in ("float32", "float64"):
                if dtype == "float64" and n > 3000:
                    continue  # more than a block's threads hold
                x = rng().standard_normal((3, n)).astype(dtype)
                factors = ends(type, None, None)
                results = [run(x, dtype, [1], [n], type, 0, *factors, seed=seed) for seed in (0, 1, 2)]
                assert results[0][1][-1]["algorithm"] == "Bluestein"
                assert_accurate(results[0][0], scipy.fft.dct(x.astype(np.float64), type), dtype, [n])
                for other, _, _ in results[1:]:
                    np.testing.assert_array_equal(results[0][0], other)
                first, *middle, last = results[0][1][-1]["radices"]
                outer |= {("first", first), ("last", last)}
                between |= set(middle)
    assert outer == {("first", 8), ("first", 16), ("last", 4), ("last", 8), ("last", 16)}
    assert between == {5, 8, 10, 12, 16}


@pytest.mark.parametrize("n", [1018, 1019, 4099])
def test_only_the_stages_of_a_convolution_pass_through_shared_memory(n):
    for type in (2, 3):
        _, executor = check((4, n), 1, type)
        counts, (step,) = executor.counters["dct_bluestein"], plan((4, n), "float32", [1], [n])["steps"][1:]
        # reads and writes of all numbers of the convolution, a pass for 16 of them; of the row, of pairs if n is even
        halves = 4 * len(step["radices"]) - 4 + (2 if n % 2 else 4)
        passes = math.prod(step["radices"]) * halves / 16
        assert counts["shared_passes"] / 4 <= 1.3 * passes, type


@pytest.mark.parametrize("type", [1, 2, 3, 4])
def test_little_shared_memory_makes_several_passes(type):
    for n in (360, 386, 405):
        limits = SMALL | {"shared_bytes": 1200, "largest_power_of_two": 0}
        check((2, n + (type == 1)), 1, type, algorithm="several passes", limits=limits)


@pytest.mark.parametrize("type", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("orthogonalize", [None, True, False])
def test_norms(type, norm, orthogonalize):
    for n in (2, 3, 12, 15, 17, 34):
        check((4, n), 1, type, "float64", norm, orthogonalize)


@pytest.mark.parametrize("type", [1, 2, 3, 4])
def test_every_pair_of_ends_is_the_matrix_of_the_contract(type):
    for n in (2, 3, 6, 9):
        k = np.arange(n)
        angle = {
            1: k[:, None] * k / (n - 1),
            2: k[:, None] * (2 * k + 1) / (2 * n),
            3: (2 * k[:, None] + 1) * k / (2 * n),
            4: (2 * k[:, None] + 1) * (2 * k + 1) / (4 * n),
        }[type]
        last = n - 1 if type == 1 else 0
        for in_ends in (0, 1, 2) if type in (1, 3) else (0,):
            for out_ends in (0, 1, 2) if type in (1, 2) else (0,):
                matrix = 2 * np.cos(np.pi * angle)
                matrix[:, [0, last]] *= 0.5 ** (in_ends / 2)
                matrix[[0, last]] *= 0.5 ** (out_ends / 2)
                out, _, _ = run(np.eye(n), "float64", [1], [n], type, 0, in_ends, out_ends)
                np.testing.assert_allclose(out, matrix.T, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("type", [2, 3])
def test_16_bits_are_rounded_once(dtype, type):
    for n in (1, 3, 24, 34, 45, 100):
        x = stored(rng().standard_normal((6, n)), dtype)
        ends_ = ends(type, "ortho", None)
        out, _, _ = run(x, dtype, [1], [n], type, 1, *ends_)
        single, _, _ = run(value(x, dtype).astype(np.float32), "float32", [1], [n], type, 1, *ends_)
        np.testing.assert_array_equal(out, stored(single, dtype))
        check((6, n), 1, type, dtype, "ortho")


@pytest.mark.parametrize("type", [1, 2, 3, 4])
def test_cropping_padding_and_their_transposes(type):
    x = rng().standard_normal((5, 20)).astype(np.float32)
    for n, size in [(12, 12), (30, 30), (12, 5), (12, 20), (17, 11), (34, 50), (20, 21)]:
        out, _, _ = run(x, "float32", [1], [n], type, 0, *ends(type, None, None), sizes=[size])
        full = scipy.fft.dct(x.astype(np.float64), type, n)
        expected = np.zeros((5, size))
        expected[:, : min(n, size)] = full[:, :size]
        assert_accurate(out, expected, "float32", [n])


def test_a_size_of_zero_along_the_transform_is_all_padding():
    out, _, _ = run(np.empty((3, 0)), "float64", [1], [6], 2)
    np.testing.assert_array_equal(out, np.zeros((3, 6)))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_any_dimension_where_it_lies(dim, dtype):
    x = stored(rng().standard_normal((3, 6, 5, 18)), dtype)
    views = [x, x.transpose(2, 0, 3, 1), x[:, ::2, ::-1, 1::3], np.broadcast_to(x[:, :1], x.shape), x[..., 1:]]
    for view in views:
        n = view.shape[dim]
        out, _, _ = run(view, dtype, [dim], [n], 2, 0, 0, 0)
        assert_accurate(out, scipy_dctn(view, dtype, [dim], [n], 2, None), dtype, [n])


def test_strided_output_leaves_what_lies_between():
    for make in (lambda a: a[1:-1, 2::3], lambda a: a[::-1, 5:17], lambda a: a[:, :12].T[:, ::2]):
        memory = np.full((10, 36), 77.0, np.float32)
        out = make(memory)
        inside = np.zeros_like(memory, bool)
        make(inside)[...] = True
        x = rng().standard_normal(out.shape).astype(np.float32)
        run(x, "float32", [1], [out.shape[1]], 2, out=out)
        assert_accurate(out, scipy.fft.dct(x.astype(np.float64), 2), "float32", [out.shape[1]])
        assert (memory[~inside] == 77).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("dims", [[0, 1], [1, 0], [2, 0, 1], [0, 2]])
def test_several_dimensions(dims, dtype):
    x = stored(rng().standard_normal((6, 10, 9)), dtype)
    for lengths in ([x.shape[d] for d in dims], [x.shape[d] + 3 * (-1) ** d for d in dims]):
        out, _, _ = run(x, dtype, dims, lengths, 2, 1, 0, 1)
        expected = scipy_dctn(x, dtype, dims, lengths, 2, "ortho")
        assert_accurate(out, expected, dtype, lengths)
        if dtype == "float16":  # once, after the last dimension
            single, _, _ = run(x.astype(np.float32), "float32", dims, lengths, 2, 1, 0, 1)
            np.testing.assert_array_equal(out, single.astype(np.float16))


@pytest.mark.parametrize("n", [24, 45, 34, 37])
@pytest.mark.parametrize("type", [1, 2, 3, 4])
def test_bits_do_not_depend_on_the_order_of_threads(n, type):
    x = rng().standard_normal((5, n)).astype(np.float32)
    results = [run(x, "float32", [1], [n], type, seed=seed)[0] for seed in (0, 1, 2)]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


@pytest.mark.parametrize("n", [3, 24, 45, 34, 37])
@pytest.mark.parametrize("type", [1, 2, 3, 4])
def test_nan_and_infinity_stay_in_their_rows(n, type):
    x = rng().standard_normal((9, n)).astype(np.float32)
    clean, _, _ = run(x, "float32", [1], [n], type)
    x[2, n // 2] = np.nan
    x[5, 0] = np.inf
    out, steps, _ = run(x, "float32", [1], [n], type)
    assert steps[-1]["rows_per_block"] > 1
    others = [0, 1, 3, 4, 6, 7, 8]
    np.testing.assert_array_equal(out[others], clean[others])
    assert np.isnan(out[2]).all()
    assert not np.isfinite(out[5]).any()


@pytest.mark.parametrize("shape", [(0, 12), (3, 0, 12)])
def test_empty_batches_launch_nothing(shape):
    out, steps, executor = run(np.empty(shape), "float64", [len(shape) - 1], [12], 2)
    assert out.shape == shape
    assert steps == []
    assert executor.counters == {}


def moved(executor, lines):
    """Bytes that kernels read and wrote in lines of tile.h and the like, tables apart."""
    read = written = 0
    for kernel, counts in executor.counters.items():
        if "fill" in kernel:
            continue
        for line, c in counts["lines"].items():
            if re.search(lines, line):
                read += c["global_read_bytes"]
                written += c["global_written_bytes"]
    return read, written


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "dim"), [((10, 24), 1), ((24, 10), 0), ((10, 34), 1), ((3, 37, 5), 1), ((8, 45), 1)])
def test_kernels_move_what_the_plan_states(shape, dim, dtype):
    for type in (2, 3):
        steps, executor = check(shape, dim, type, dtype)
        size = np.prod(shape) * np.dtype(dtype).itemsize
        stated = steps[-1]["read_bytes"], steps[-1]["write_bytes"]
        assert stated == (size, size)
        assert moved(executor, r"\btile\.h:") == stated


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_rows_without_gaps_move_in_full_sectors(dtype):
    for n, rows in [(24, 64), (1000, 10), (384, 8), (45, 64)]:
        itemsize = np.dtype(dtype).itemsize
        x, out = (simt.memory(rows * n * itemsize).view(dtype).reshape(rows, n) for _ in range(2))
        x[...] = rng().standard_normal(x.shape)
        _, _, executor = run(x, dtype, [1], [n], 2, out=out)
        (counts,) = (c for name, c in executor.counters.items() if "fill" not in name)
        for line, c in counts["lines"].items():
            if "tile.h" in line:
                assert 32 * c["global_read_sectors"] <= c["global_read_bytes"] + 31, line
                assert 32 * c["global_written_sectors"] <= c["global_written_bytes"] + 31, line


def test_shared_memory_of_smooth_lengths_is_nearly_free_of_conflicts():
    # passes over the banks for each access, against the least that its bytes allow
    for n, bound in [(512, 1.3), (1000, 1.45), (1536, 1.35), (1500, 1.6), (2000, 1.45)]:
        _, executor = check((8, n), 1, 2, limits=SMALL | {"largest_power_of_two": 0})
        counts = executor.counters["dct_mixed_radix"]
        accesses = 2 * (counts["shared_reads"] + counts["shared_writes"])
        assert (accesses + counts["bank_conflicts"]) / accesses <= bound, n


def plan(shape, dtype, dims, lengths, type=2, limits=None):
    x = np.empty(shape, "uint16" if dtype == "bfloat16" else dtype)
    return simt.dct_plan(x, x, dtype, dims, lengths, type, limits=limits or {})


def test_the_plan_fills_the_gpu_and_fits_it():
    for rows, n in [(1, 1000), (100, 24), (20000, 24), (10**7, 3), (4096, 6000), (64, 4099)]:
        for dtype in ("float32", "float64"):
            x = np.lib.stride_tricks.as_strided(np.empty(1, dtype), (rows, n), (n * 8, 8))
            step = simt.dct_plan(x, x, dtype, [1], [n], 2)["steps"][-1]
            assert step["shared_bytes"] <= 227 * 1024
            assert step["threads"] <= 1024
            assert step["blocks"] * step["rows_per_block"] >= rows
            assert step["blocks"] >= min(rows, 264)


def test_the_largest_block_of_each_gpu():
    for shared in (227 * 1024, 163 * 1024, 48 * 1024):
        limits = {"shared_bytes": shared, "shared_bytes_per_sm": shared + 1024}
        for n in (2000, 6000, 12000, 16000, 24000, 28000, 30000):
            for dtype in ("float32", "float64"):
                assert plan((2, n), dtype, [1], [n], limits=limits)["steps"][-1]["shared_bytes"] <= shared


def test_describe_says_which_algorithm_and_why():
    text = plan((1000, 1000), "float32", [1], [1000])["text"]
    assert "mixed radix (smooth" in text
    assert "type II of length 1000, 1000 rows" in text
    assert "FFT of length 500, radices 5 10 10" in text
    assert "moves 4000000 + 4000000 bytes" in text
    assert "Bluestein (a prime factor above 13" in plan((10, 4099), "float32", [1], [4099])["text"]
    assert plan((0, 8), "float32", [1], [8])["text"].startswith("nothing to do")


def test_wrong_problems_are_refused():
    with pytest.raises(ValueError, match="type must be 1, 2, 3 or 4"):
        plan((2, 8), "float32", [1], [8], type=5)
    with pytest.raises(ValueError, match="dims out of range"):
        plan((2, 8), "float32", [2], [8])
    with pytest.raises(ValueError, match="for type I at least 2"):
        plan((2, 8), "float32", [1], [1], type=1)


@pytest.mark.long
@pytest.mark.parametrize("type", [1, 2, 3, 4])
def test_every_length_up_to_six_hundred(type):
    for n in range(2, 601):
        for dtype in ("float32", "float64"):
            check((3, n), 1, type, dtype)
