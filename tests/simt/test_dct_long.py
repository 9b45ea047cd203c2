"""Rows beyond one block's shared memory, and the tables that all lengths take, under the host executor."""

import re

import freqrank_simt as simt
import numpy as np
import pytest
import scipy.fft
from test_dct_device import NORMS, assert_accurate, check, ends, rng, run, stored, value

# What makes rows of a few hundred elements long: they do not fit one block.
LIMITS = {"sms": 2, "largest_power_of_two": 0, "shared_bytes": 2048}
WIDE = LIMITS | {"shared_bytes": 4096}
LENGTHS = [512, 1000, 630, 625, 1001, 2018, 787]  # even, odd, smooth, twice a prime, prime


def limits_for(dtype):
    return WIDE if dtype == "float64" else LIMITS


@pytest.mark.parametrize("type", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_type_and_dtype(type, dtype):
    for n in LENGTHS if dtype in ("float32", "float64") else LENGTHS[1:4]:
        check((2, n + (type == 1)), 1, type, dtype, algorithm="several passes", limits=limits_for(dtype))


@pytest.mark.parametrize("type", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("orthogonalize", [True, False])
def test_norms(type, norm, orthogonalize):
    for n in (600, 675, 509):
        check((1, n), 1, type, "float64", norm, orthogonalize, "several passes", WIDE)


def test_three_passes_and_more():
    for n, shared, passes in [(4096, 2048, 3), (5250, 2048, 3), (6561, 2048, 3), (2048, 1100, 3), (16384, 1100, 4)]:
        limits = LIMITS | {"shared_bytes": shared}
        for type in (2, 3, 4):
            check((1, n), 1, type, algorithm="several passes", limits=limits)
        x = np.empty((1, n), np.float32)
        text = simt.dct_plan(x, x, "float32", [1], [n], 2, limits=limits)["text"]
        factors = [int(f) for f in re.findall(r"(\d+) \(\d+ columns", text)]
        assert len(factors) == passes, text
        assert np.prod(factors) == (n // 2 if n % 2 == 0 else n), text


@pytest.mark.parametrize("type", [1, 2, 3, 4])
def test_cropping_padding_and_their_transposes(type):
    x = rng().standard_normal((2, 600)).astype(np.float32)
    for n, size in [(540, 540), (640, 640), (560, 320), (540, 601), (567, 570), (509, 400), (509, 520)]:
        out, steps, _ = run(x, "float32", [1], [n], type, 0, *ends(type, None, None), sizes=[size], limits=LIMITS)
        assert steps[-1]["algorithm"] == "several passes"
        expected = np.zeros((2, size))
        expected[:, : min(n, size)] = scipy.fft.dct(x.astype(np.float64), type, n)[:, :size]
        assert_accurate(out, expected, "float32", [n])


@pytest.mark.parametrize("n", [500, 509])
def test_any_dimension_where_it_lies(n):
    x = rng().standard_normal((2, n, 3)).astype(np.float32)
    for view in (x, x[::-1, ::-1], x.transpose(2, 1, 0), np.broadcast_to(x[:1], (4, n, 3))):
        out, _, _ = run(view, "float32", [1], [n], 2, limits=LIMITS)
        assert_accurate(out, scipy.fft.dct(view.astype(np.float64), 2, axis=1), "float32", [n])
    memory = np.full((4, 3 * n), 77.0, np.float32)
    out = memory[1:3, 1::3]
    run(x[:, :, 0], "float32", [1], [n], 2, out=out, limits=LIMITS)
    assert_accurate(out, scipy.fft.dct(x[:, :, 0].astype(np.float64), 2), "float32", [n])
    untouched = np.ones_like(memory, bool)
    untouched[1:3, 1::3] = False
    assert (memory[untouched] == 77).all()


def test_a_long_dimension_among_others():
    x = stored(rng().standard_normal((520, 6)), "float16")
    out, _, _ = run(x, "float16", [0, 1], [520, 6], 2, 1, 0, 1, limits=LIMITS)
    assert_accurate(out, scipy.fft.dctn(value(x, "float16"), 2, norm="ortho"), "float16", [520, 6])
    single, _, _ = run(x.astype(np.float32), "float32", [0, 1], [520, 6], 2, 1, 0, 1, limits=LIMITS)
    np.testing.assert_array_equal(out, single.astype(np.float16))


@pytest.mark.parametrize("n", [512, 675, 787])
@pytest.mark.parametrize("type", [1, 2, 3, 4])
def test_bits_do_not_depend_on_the_order_of_threads(n, type):
    x = rng().standard_normal((2, n)).astype(np.float32)
    first, *others = [run(x, "float32", [1], [n], type, seed=seed, limits=LIMITS)[0] for seed in (0, 1, 2)]
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("n", [512, 675, 787])
def test_nan_and_infinity_stay_in_their_rows(n):
    x = rng().standard_normal((5, n)).astype(np.float32)
    for type in (1, 2, 3, 4):
        clean, _, _ = run(x, "float32", [1], [n], type, limits=LIMITS)
        bad = x.copy()
        bad[1, n // 2] = np.nan
        bad[3, 0] = np.inf
        out, _, _ = run(bad, "float32", [1], [n], type, limits=LIMITS)
        np.testing.assert_array_equal(out[[0, 2, 4]], clean[[0, 2, 4]])
        assert np.isnan(out[1]).all()
        assert not np.isfinite(out[3]).any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("n", [512, 1000, 2048, 675, 787, 1018])
@pytest.mark.parametrize("type", [1, 2, 3, 4])
def test_kernels_move_what_the_plan_states(n, type, dtype):
    for size in (n, n - 12):
        x = stored(rng().standard_normal((3, size)), dtype)
        _, steps, executor = run(x, dtype, [1], [n], type, sizes=[n + 5], limits=limits_for(dtype))
        moved = {"read": 0, "written": 0}
        for kernel, counts in executor.counters.items():
            assert kernel.startswith(("dct_long", "dct_fill"))
            for line, c in counts["lines"].items():
                if "passes.h:" in line:  # tables are read elsewhere
                    for way in moved:
                        moved[way] += c[f"global_{way}_bytes"]
        assert steps[-1]["algorithm"] == "several passes"
        assert (moved["read"], moved["written"]) == (steps[-1]["read_bytes"], steps[-1]["write_bytes"])


def test_smooth_lengths_pass_through_memory_once_a_pass():
    # 2^17 on a real GPU: two passes, half of the numbers complex
    x = np.lib.stride_tricks.as_strided(np.empty(1, np.float32), (10, 1 << 17), (4 << 17, 4))
    step = simt.dct_plan(x, x, "float32", [1], [1 << 17], 2)["steps"][-1]
    assert step["read_bytes"] == step["write_bytes"] == 2 * 10 * 4 * (1 << 17)


def test_strides_beyond_32_bits():
    far = (1 << 31) + 16
    for n in (512, 509):
        data = rng().standard_normal((2, n)).astype(np.float32)
        expected = scipy.fft.dct(data.astype(np.float64), 2)
        for shape, strides in [((2, n), (far, 1)), ((2, n), (1, far // 256))]:
            span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
            arrays = []
            for _ in range(2):
                memory = simt.memory(4 * span).view(np.float32)
                arrays.append(np.lib.stride_tricks.as_strided(memory, shape, [4 * s for s in strides]))
            arrays[0][...] = data
            run(arrays[0], "float32", [1], [n], 2, out=arrays[1], limits=LIMITS)
            assert_accurate(arrays[1], expected, "float32", [n])


def plan(n, dtype, type=2, rows=2, **limits):
    x = np.lib.stride_tricks.as_strided(np.empty(1, dtype), (rows, n), (0, 0))
    return simt.dct_plan(x, x, dtype, [1], [n], type, limits=limits)


@pytest.mark.parametrize("shared", [227 * 1024, 163 * 1024, 99 * 1024])
def test_plans_up_to_the_longest_row(shared):
    longest = 1 << 30
    for n in (
        1 << 16,
        3**10,
        1 << 20,
        1 << 24,
        1 << 27,
        7**9,
        13**6,
        2 * 845**2,
        (1 << 27) - 39,
        longest,
        longest - 35,
    ):
        for dtype in ("float32", "float64"):
            for type in (1, 2, 4):
                p = plan(n, dtype, type, shared_bytes=shared, shared_bytes_per_sm=shared + 1024)
                step = p["steps"][-1]
                assert step["algorithm"] == "several passes"
                assert step["shared_bytes"] <= shared
                assert step["threads"] <= 512
                inner = int(
                    (re.search(r"by two of length (\d+)", p["text"]) or re.search(r"FFT of length (\d+)", p["text"]))[1]
                )
                factors = [int(f) for f in re.findall(r"(\d+) \(\d+ columns", p["text"])]
                assert np.prod(factors, dtype=object) == inner
                assert len(factors) <= (3 if n <= 1 << 27 else 4)
    with pytest.raises(ValueError, match=f"at most {longest}; got {longest + 2}"):
        plan(longest + 2, "float32")


def test_rows_go_in_groups_that_the_cache_holds():
    p = plan(1 << 20, "float32", rows=100)
    assert "passes of 1024 (8 columns a block), 512 (8 columns a block); 6 rows at once" in p["text"]
    assert p["workspace_bytes"] < 25 << 20


# --- tables -------------------------------------------------------------------------------------------------------


def roots(numerators, period):
    """exp(-2 pi i numerators / period), the angles reduced as integers to an eighth of a turn."""
    pi = np.longdouble("3.14159265358979323846264338327950288")
    k = np.asarray(numerators, np.int64) % period
    quarter, rest = np.divmod(4 * k, period)
    upper = 2 * rest > period
    rest = np.where(upper, period - rest, rest)
    angle = pi / 2 * rest.astype(np.longdouble) / np.longdouble(period)
    cos, sin = np.cos(angle), np.sin(angle)
    cos, sin = np.where(upper, sin, cos), np.where(upper, cos, sin)
    for turn in (1, 2, 3):
        turned = quarter >= turn
        cos, sin = np.where(turned, -sin, cos), np.where(turned, cos, sin)
    return cos, -sin


def assert_within_one_ulp(table, real, imaginary):
    for got, exact in ((table.real, real), (table.imag, imaginary)):
        rounded = exact.astype(got.dtype)
        assert (np.abs(got.astype(np.longdouble) - exact) <= np.spacing(np.abs(rounded))).all()


@pytest.mark.parametrize("wide", [False, True])
def test_roots_are_exact_to_one_ulp(wide):
    for first, step, period in [
        (0, 1, 1),
        (0, 1, 12),
        (1, 8, 16 * 1009),
        (0, 1, 3**9),
        (0, 2**15, 2**30),
        (7, 1, 2**40),
    ]:
        table = simt.dct_table(simt.Executor(), "units", 2000, first, step, period, wide)
        assert_within_one_ulp(table, *roots(first + step * np.arange(2000), period))


@pytest.mark.parametrize("wide", [False, True])
def test_chirps_and_their_spectra(wide):
    for n, length in [(1, 1), (2, 3), (17, 36), (127, 256), (1009, 2025), (4099, 8640)]:
        k = np.arange(n)
        chirp = simt.dct_table(simt.Executor(), "chirp", n, period=n, wide=wide)
        real, imaginary = roots(k * k, 2 * n)
        assert_within_one_ulp(chirp, real, imaginary)
        wrapped = np.zeros(length, np.clongdouble)
        wrapped[k] = wrapped[-k] = real - 1j * imaginary
        exact = scipy.fft.fft(wrapped) / length
        spectra = [simt.dct_table(simt.Executor(seed), "spectrum", length, period=n, wide=wide) for seed in (0, 1, 2)]
        assert (spectra[0] == spectra[1]).all()
        assert (spectra[0] == spectra[2]).all()
        error = np.abs(spectra[0] - exact).max() / np.sqrt(np.mean(np.abs(exact) ** 2))
        assert error <= (2e-15 if wide else 2e-7), (n, error)
