"""The power-of-two DCT kernels' source under the host executor, against scipy in float64."""

import freqrank_simt
import numpy as np
import pytest
import scipy.fft

LENGTHS = [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
LIMITS = {"sms": 1}
KERNEL = "dct_power_of_two"
NORMS = {"backward": 0, "ortho": 1, "forward": 2}


def rows_of(n):
    """So many that a block loops over tiles and the last tile is not full."""
    return {32: 300, 64: 170, 128: 70, 256: 40}.get(n, 40 if n < 2048 else 9)


def to_bfloat16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float(x, dtype):
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)


def storage(dtype):
    return {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype]


def array(shape, dtype):
    element = np.dtype(storage(dtype))
    size = int(np.prod(shape))
    return freqrank_simt.memory(max(size * element.itemsize, 1))[: size * element.itemsize].view(element).reshape(shape)


def samples(shape, dtype, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    x = array(shape, dtype)
    x[...] = to_bfloat16(values) if dtype == "bfloat16" else values
    return x


def ends(type, norm):
    """Which end scalings make the kernel's transform scipy's."""
    orthogonal = norm == "ortho"
    return {1: (0, 0), 2: (0, int(orthogonal)), 3: (1 if orthogonal else 2, 0), 4: (0, 0)}[type]


def transform(x, out, dtype, dim, n, type, norm="backward", seed=0, executor=None):
    executor = executor or freqrank_simt.Executor(seed)
    into, outof = ends(type, norm)
    steps = freqrank_simt.dct(executor, x, out, dtype, [dim], [n], type, NORMS[norm], into, outof, LIMITS)
    assert [step["algorithm"] for step in steps] == ["power of two"]
    return executor


def error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def check(out, dtype, expected, n):
    actual = to_float(out, dtype)
    bound = 4e-7 * np.log2(n)
    if dtype == "float32":
        assert error(actual, expected) <= bound
    else:  # within one rounding of a result that is within the bound
        unit = 2.0**-11 if dtype == "float16" else 2.0**-8
        slack = unit * np.abs(expected) + bound * np.sqrt(np.mean(expected**2)) * 8 + 6e-8
        assert np.all(np.abs(actual - expected) <= slack)


@pytest.mark.parametrize("type", [2, 3, 4])
@pytest.mark.parametrize("n", LENGTHS)
def test_rows_are_read_and_written_once(n, type):
    rows, bits = rows_of(n), []
    x = samples((rows, n), "float32")
    expected = scipy.fft.dct(x.astype(np.float64), type)
    for seed in range(3):
        out = array((rows, n), "float32")
        executor = freqrank_simt.Executor(seed)
        executor.expect_written(out)
        transform(x, out, "float32", 1, n, type, executor=executor)
        executor.check_written()
        check(out, "float32", expected, n)
        bits.append(out.tobytes())
        executor.require_no_bank_conflicts(KERNEL)
        executor.require_full_sectors(KERNEL)
        counts = executor.counters[KERNEL]
        for kind in "read", "written":
            assert counts[f"global_{kind}_bytes"] == counts[f"global_{kind}_unique_bytes"] == x.nbytes
            assert 32 * counts[f"global_{kind}_sectors"] == x.nbytes
        assert counts["bank_conflicts"] == 0
    assert bits[0] == bits[1] == bits[2]


@pytest.mark.parametrize("norm", list(NORMS))
@pytest.mark.parametrize("type", [2, 3, 4])
@pytest.mark.parametrize("n", [32, 64, 256, 2048])
def test_norms(n, type, norm):
    x = samples((5, n), "float32")
    out = array((5, n), "float32")
    transform(x, out, "float32", 1, n, type, norm)
    check(out, "float32", scipy.fft.dct(x.astype(np.float64), type, norm=norm), n)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("type", [2, 3, 4])
@pytest.mark.parametrize("n", LENGTHS)
def test_sixteen_bits(n, type, dtype):
    rows = rows_of(n) // 3 // 2 * 2 + 1
    x = samples((rows, n), dtype)
    out = array((rows, n), dtype)
    executor = transform(x, out, dtype, 1, n, type, "ortho")
    check(out, dtype, scipy.fft.dct(to_float(x, dtype).astype(np.float64), type, norm="ortho"), n)
    counts = executor.counters[KERNEL]
    assert counts["bank_conflicts"] == 0
    for kind in "read", "written":
        assert counts[f"global_{kind}_bytes"] == 32 * counts[f"global_{kind}_sectors"] == x.nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("type", [2, 3, 4])
@pytest.mark.parametrize("n", [32, 128, 512, 1024])
def test_along_the_first_dimension(n, type, dtype):
    """Neighbouring rows side by side: whole sectors too."""
    columns = 64
    x = samples((n, columns), dtype)
    out = array((n, columns), dtype)
    executor = transform(x, out, dtype, 0, n, type)
    check(out, dtype, scipy.fft.dct(to_float(x, dtype).astype(np.float64), type, axis=0), n)
    counts = executor.counters[KERNEL]
    for kind in "read", "written":
        assert counts[f"global_{kind}_bytes"] == 32 * counts[f"global_{kind}_sectors"] == x.nbytes
    assert 3 * counts["bank_conflicts"] <= counts["shared_passes"]


@pytest.mark.parametrize("type", [2, 3, 4])
@pytest.mark.parametrize("n", [32, 64, 1024, 4096])
@pytest.mark.parametrize(("filled", "size"), [(-5, 0), (0, -7), (3, 9), (-1, 40)])
def test_crops_and_pads(n, type, filled, size):
    x = samples((6, n + filled), "float32")
    out = array((6, n + size), "float32")
    executor = freqrank_simt.Executor(1)
    executor.expect_written(out)
    transform(x, out, "float32", 1, n, type, executor=executor)
    executor.check_written()
    expected = scipy.fft.dct(x.astype(np.float64), type, n=n)
    check(out[:, : n + min(size, 0)], "float32", expected[:, : n + min(size, 0)], n)
    assert not out[:, n:].any()


@pytest.mark.parametrize("type", [2, 3, 4])
@pytest.mark.parametrize("n", [64, 512, 2048])
def test_strides(n, type):
    wide = samples((3, 4, 2 * n + 3), "float32")
    for x in (wide[:, :, 1 : n + 1], wide[:, ::2, : 2 * n : 2], wide[::-1, :, n - 1 :: -1], wide[:, :, :n]):
        assert x.shape[-1] == n
        out = array((*x.shape[:2], n), "float32")
        transform(x, out, "float32", 2, n, type)
        check(out, "float32", scipy.fft.dct(x.astype(np.float64), type), n)


@pytest.mark.parametrize("type", [2, 3, 4])
@pytest.mark.parametrize("n", LENGTHS)
def test_nan_stays_in_its_row(n, type):
    rows = min(rows_of(n), 40)
    x = samples((rows, n), "float32")
    out = array((rows, n), "float32")
    clean = array((rows, n), "float32")
    transform(x, clean, "float32", 1, n, type)
    x[3, 5] = np.nan
    x[7, n - 1] = np.inf
    transform(x, out, "float32", 1, n, type)
    others = [r for r in range(rows) if r not in (3, 7)]
    assert np.isnan(out[3]).all()
    assert not np.isfinite(out[7]).any()
    assert np.array_equal(out[others], clean[others])
