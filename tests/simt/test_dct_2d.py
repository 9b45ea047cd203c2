"""Two dimensions at once in shared memory, under the host executor."""

import freqrank_simt as simt
import numpy as np
import pytest
import scipy.fft
from test_dct_device import NORMS, assert_accurate, ends, moved, rng, run, scipy_dctn, stored, value

LIMITS = {"sms": 2}
SIDES = [(8, 8), (5, 7), (2, 3), (4, 16), (16, 17), (24, 13), (37, 64), (1, 9), (31, 1)]


def check(shape, dims, type, dtype="float32", norm=None, orthogonalize=None, limits=LIMITS):
    x = stored(rng().standard_normal(shape), dtype)
    lengths = [shape[d] for d in dims]
    ends_ = ends(type, norm, orthogonalize)
    out, steps, executor = run(x, dtype, dims, lengths, type, NORMS.index(norm), *ends_, limits=limits)
    assert [s["algorithm"] for s in steps[-1:]] == ["2-D tile"]
    assert_accurate(out, scipy_dctn(x, dtype, dims, lengths, type, norm, orthogonalize), dtype, lengths)
    return steps, executor


@pytest.mark.parametrize("type", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_type_and_dtype(type, dtype):
    for n1, n2 in SIDES:
        check((3, n1 + (type == 1), n2 + (type == 1)), [1, 2], type, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_largest_tiles(dtype):
    for shape, type in [
        ((2, 128, 128), 2),
        ((1, 128, 127), 3),
        ((1, 113, 128), 2),
        ((1, 125, 126), 4),
        ((1, 128, 128), 1),
    ]:
        for shared in (227 * 1024, 163 * 1024):
            steps, _ = check(shape, [1, 2], type, dtype, limits=LIMITS | {"shared_bytes": shared})
            assert steps[-1]["shared_bytes"] <= shared


@pytest.mark.parametrize("type", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("orthogonalize", [True, False])
def test_norms(type, norm, orthogonalize):
    for sides in ((12, 10), (9, 17)):
        check((2, *sides), [1, 2], type, "float64", norm, orthogonalize)


def test_small_tiles_share_a_block():
    for shape in [(1000, 8, 8), (513, 4, 4), (300, 3, 5)]:
        steps, executor = check(shape, [1, 2], 2, "float32", limits={"sms": 1})
        assert steps[-1]["rows_per_block"] > 1
        assert executor.counters["dct_tile_2d"]["blocks"] < shape[0]


def test_either_order_of_dimensions_and_dimensions_before_them():
    check((4, 10, 12), [2, 1], 2, "float64")
    for shape, dims in [((6, 10, 12), [0, 1, 2]), ((6, 10, 12), [1, 2, 0])]:
        x = rng().standard_normal(shape)
        out, steps, _ = run(x, "float64", dims, [shape[d] for d in dims], 2)
        assert len([s for s in steps if s["algorithm"] != "tables"]) == 2
        assert_accurate(out, scipy.fft.dctn(x, 2), "float64", shape)


@pytest.mark.parametrize("type", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cropping_padding_and_their_transposes(type, dtype):
    x = stored(rng().standard_normal((3, 20, 18)), dtype)
    for lengths, sizes in [((16, 14), (16, 14)), ((24, 27), (24, 27)), ((15, 12), (10, 17)), ((34, 20), (40, 9))]:
        out, steps, _ = run(x, dtype, [1, 2], list(lengths), type, 1, *ends(type, "ortho", None), sizes=sizes)
        assert steps[-1]["algorithm"] == "2-D tile"
        n1, n2 = (min(n, size) for n, size in zip(lengths, sizes, strict=True))
        expected = np.zeros((3, *sizes))
        expected[:, :n1, :n2] = scipy_dctn(x, dtype, [1, 2], lengths, type, "ortho")[:, :n1, :n2]
        assert_accurate(out, expected, dtype, lengths)


def test_no_input_along_one_dimension_is_all_padding():
    for shape in [(2, 0, 5), (2, 5, 0)]:
        out, _, _ = run(np.empty(shape, np.float32), "float32", [1, 2], [6, 8], 2)
        np.testing.assert_array_equal(out, np.zeros((2, 6, 8)))


def test_tiles_where_they_lie():
    x = rng().standard_normal((5, 4, 12, 20)).astype(np.float32)
    for view in (x, x[::-1, 1:3], x[:, :, 1:11, 3:17], x[:, :, ::-2], x.transpose(1, 0, 2, 3), x[:, :, :, 1:]):
        lengths = list(view.shape[2:])
        out, steps, _ = run(view, "float32", [2, 3], lengths, 2)
        assert steps[-1]["algorithm"] == "2-D tile"
        assert_accurate(out, scipy.fft.dctn(view.astype(np.float64), 2, axes=(2, 3)), "float32", lengths)
    for view in (x[..., ::2], x.mT):  # no side of the tile is contiguous, or not the same one
        lengths = list(view.shape[2:])
        out, _, _ = run(view, "float32", [2, 3], lengths, 2)
        assert_accurate(out, scipy.fft.dctn(view.astype(np.float64), 2, axes=(2, 3)), "float32", lengths)
    memory = np.full((5, 4, 16, 30), 77.0, np.float32)
    run(x, "float32", [2, 3], [12, 20], 2, out=memory[:, :, 2:14, 5:25])
    assert_accurate(memory[:, :, 2:14, 5:25], scipy.fft.dctn(x.astype(np.float64), 2, axes=(2, 3)), "float32", [12, 20])
    memory[:, :, 2:14, 5:25] = 77
    assert (memory == 77).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_rounded_once(dtype):
    x = stored(rng().standard_normal((3, 12, 14)), dtype)
    out, _, _ = run(x, dtype, [1, 2], [12, 14], 2, 1, 0, 1)
    single, _, _ = run(value(x, dtype).astype(np.float32), "float32", [1, 2], [12, 14], 2, 1, 0, 1)
    np.testing.assert_array_equal(out, stored(single, dtype))


@pytest.mark.parametrize("sides", [(16, 24), (15, 37)])
@pytest.mark.parametrize("type", [1, 2, 3, 4])
def test_bits_do_not_depend_on_the_order_of_threads(sides, type):
    x = rng().standard_normal((3, *sides)).astype(np.float32)
    first, *others = [run(x, "float32", [1, 2], list(sides), type, seed=seed)[0] for seed in (0, 1, 2)]
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_nan_and_infinity_stay_in_their_tiles():
    x = rng().standard_normal((40, 8, 12)).astype(np.float32)
    clean, _, _ = run(x, "float32", [1, 2], [8, 12], 2)
    x[3, 2, 5] = np.nan
    x[17, 0, 0] = np.inf
    out, steps, _ = run(x, "float32", [1, 2], [8, 12], 2)
    assert steps[-1]["rows_per_block"] > 1
    others = [i for i in range(40) if i not in (3, 17)]
    np.testing.assert_array_equal(out[others], clean[others])
    assert np.isnan(out[3]).all()
    assert not np.isfinite(out[17]).any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(2, 64, 64), (2, 128, 128), (30, 8, 8), (3, 15, 37)])
def test_each_element_is_read_and_written_once(shape, dtype):
    if shape[1] == 128 and dtype != "float32":
        shape = (1, 128, 64)
    x = simt.memory(np.prod(shape) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)  # aligned, as on a GPU
    out = simt.memory(x.nbytes).view(dtype).reshape(shape)
    x[...] = rng().standard_normal(shape)
    _, steps, executor = run(x, dtype, [1, 2], list(shape[1:]), 2, out=out)
    assert_accurate(out, scipy.fft.dctn(x.astype(np.float64), 2, axes=(1, 2)), dtype, shape[1:])
    size = np.prod(shape) * np.dtype(dtype).itemsize
    assert (steps[-1]["read_bytes"], steps[-1]["write_bytes"]) == (size, size)
    assert moved(executor, r"\btile\.h:") == (size, size)
    if shape[2] % 16 == 0:  # whole sectors
        counts = executor.counters[next(name for name in executor.counters if "tile" in name)]
        for line, c in counts["lines"].items():
            if "tile.h" in line:
                assert 32 * c["global_read_sectors"] == c["global_read_bytes"], line
                assert 32 * c["global_written_sectors"] == c["global_written_bytes"], line


def test_strides_beyond_32_bits():
    far = (1 << 31) + 16
    data = rng().standard_normal((2, 12, 10)).astype(np.float32)
    arrays = []
    for _ in range(2):
        memory = simt.memory(4 * (far + 12 * (far // 16) + 10)).view(np.float32)
        arrays.append(np.lib.stride_tricks.as_strided(memory, data.shape, (4 * far, 4 * (far // 16), 4)))
    arrays[0][...] = data
    _, steps, _ = run(arrays[0], "float32", [1, 2], [12, 10], 2, out=arrays[1])
    assert steps[-1]["algorithm"] == "2-D tile"
    assert_accurate(arrays[1], scipy.fft.dctn(data.astype(np.float64), 2, axes=(1, 2)), "float32", [12, 10])


def test_larger_sides_take_a_step_each():
    x = rng().standard_normal((1, 129, 20)).astype(np.float32)
    out, steps, _ = run(x, "float32", [1, 2], [129, 20], 2)
    assert [s["algorithm"] for s in steps if s["algorithm"] != "tables"] == ["Bluestein", "mixed radix"]
    assert_accurate(out, scipy.fft.dctn(x.astype(np.float64), 2, axes=(1, 2)), "float32", [129, 20])
