"""The Gram kernels under the host executor, against sums of Python's integers."""

from fractions import Fraction

import freqrank_simt as simt
import numpy as np
import pytest

RANDOM = np.random.default_rng
DTYPES = ("float16", "bfloat16", "float32", "float64")
KERNELS = {0: "gram_{}", 1: "gram_{}_small"}
INTEGERS = {"gram_exponents_{}", "gram_integers_{}"}
ONE_SM = {"sms": 1}  # tokens are hardly split
WAYS = {"double": {}, "integers": {"float_per_double": 64}}


def stored(values, dtype):
    """As the kernels read it: bfloat16 as its bits, rounded to nearest even."""
    if dtype != "bfloat16":
        return np.asarray(values, dtype)
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def value(x):
    """The float64 numbers that an array as stored stands for."""
    return (x.astype(np.uint32) << 16).view(np.float32).astype(float) if x.dtype == np.uint16 else x.astype(float)


def integers(x):
    """Floating-point numbers as Python's integers and the power of two that they are to be divided by."""
    parts = [v.as_integer_ratio() for v in x.ravel().tolist()]
    grid = max((bottom.bit_length() - 1 for _, bottom in parts), default=0)
    whole = np.empty(len(parts), object)
    whole[:] = [top << grid - (bottom.bit_length() - 1) for top, bottom in parts]
    return whole.reshape(x.shape), grid


def exact(x, y=None, weight=None):
    """X^T diag(weight) Y of one matrix, as `integers` gives numbers."""
    (a, of_a), (b, of_b) = integers(value(x)), integers(value(x if y is None else y))
    w, of_w = (np.ones(len(a), object), 0) if weight is None else integers(weight)
    return (a * w[:, None]).T.dot(b), of_a + of_b + of_w


def error(got, x, y=None, weight=None):
    """The worst element's, relative to sqrt(G_ii G_jj)."""
    (found, of_found), (wanted, of_wanted) = integers(got), exact(x, y, weight)
    grid = max(of_found, of_wanted)
    difference = (found << grid - of_found) - (wanted << grid - of_wanted)
    size = np.ones(len(x)) if weight is None else np.abs(weight)
    norms = [np.sqrt((value(side) ** 2 * size[:, None]).sum(0)) for side in (x, x if y is None else y)]
    relative = np.array([float(Fraction(abs(d), 1 << grid)) for d in difference.ravel()]).reshape(difference.shape)
    return float((relative / np.maximum(np.outer(*norms), 1e-300)).max(initial=0.0))


def run(x, y=None, weight=None, out=None, *, accumulate=False, half="bfloat16", limits=ONE_SM, seed=0):
    executor = simt.Executor(seed)
    if out is None:
        out = np.full((*x.shape[:-2], x.shape[-1], (x if y is None else y).shape[-1]), np.nan)
        executor.expect_written(out)
    plan = simt.gram(executor, out, x, y, weight, accumulate=accumulate, half=half, limits=limits)
    executor.check_written()
    return out, plan, executor


def total(executor, name):
    return sum(kernel[name] for kernel in executor.counters.values())


def half_of(dtype):
    return {"half": dtype if dtype == "float16" else "bfloat16"}


def kernels(plan, dtype):
    names = INTEGERS if plan["integers"] else {KERNELS[plan["shape"]]}
    return {name.format(dtype) for name in names}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("tokens", "n", "m"),
    [(1, 1, 1), (5, 8, 3), (33, 64, 64), (70, 65, 17), (40, 130, 70), (67, 7, 200), (9, 128, 64), (5, 384, 1)],
)
def test_against_exact_sums(tokens, n, m, way, dtype):
    random = RANDOM(tokens)
    x, y = (stored(random.standard_normal((tokens, k)), dtype) for k in (n, m))
    for other in (None, y):
        results = []
        for seed in range(3):
            out, plan, executor = run(x, other, **half_of(dtype), limits=ONE_SM | WAYS[way], seed=seed)
            results.append(out)
            executor.require_no_bank_conflicts()
        assert all(np.array_equal(out, results[0]) for out in results)
        assert error(results[0], x, other) < 4e-15
        assert set(executor.counters) == kernels(plan, dtype)
        if other is None:
            assert np.array_equal(results[0], results[0].T)


def test_both_shapes_are_chosen():
    rows = np.zeros((8, 384), np.float32)
    assert simt.gram_plan(rows, limits=ONE_SM)["shape"] == 0
    assert simt.gram_plan(rows[:, :256], limits=ONE_SM)["shape"] == 1  # wastes less along the diagonal
    assert simt.gram_plan(rows[:, :64], rows, limits=ONE_SM)["shape"] == 1  # the 64 are rows
    assert simt.gram_plan(rows, rows[:, :64], limits=ONE_SM)["shape"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_ten_thousand_times_the_rest(way, dtype):
    random = RANDOM(1)
    rows = random.standard_normal((150, 40)) * np.where(random.random((150, 1)) < 0.03, 1e4, 1.0)
    x = stored(rows, dtype)
    weight = random.standard_normal(150) * 10.0 ** random.integers(-9, 3, 150)
    for w in (None, weight):
        out, *_ = run(x, weight=w, limits=ONE_SM | WAYS[way])
        assert error(out, x, weight=w) < 4e-15
        assert np.array_equal(out, out.T)


def test_integers_for_numbers_far_apart():
    """The largest hides the digits of the others, and only as many as the bound allows."""
    random = RANDOM(9)
    x = random.standard_normal((100, 40)) * 2.0 ** random.integers(-40, 41, (100, 40))
    assert error(run(x, limits=ONE_SM | WAYS["integers"])[0], x) < 1e-13
    x = x.astype(np.float32) * np.float32(2.0**-100)
    x[3, :5] = 0
    x[:, 7] = 0
    x[:, 8] = np.float32(2.0**-149) * np.arange(100)  # not normal
    assert error(run(x, limits=ONE_SM | WAYS["integers"])[0], x) < 1e-13


@pytest.mark.parametrize("scale", [1e-150, 1e150, 3e-308, 1e308])
def test_integers_at_the_ends_of_the_range(scale):
    x = RANDOM(10).uniform(-1, 1, (20, 9)) * scale
    for weight in (None, np.full(20, 1e-5 if scale > 1 else 1e5)):
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            expected = x.T @ (x if weight is None else x * weight[:, None])
        out, *_ = run(x, weight=weight, limits=ONE_SM | WAYS["integers"])
        finite = np.isfinite(expected)
        assert np.array_equal(np.isfinite(out), finite)
        out, expected = out[finite], expected[finite]
        assert np.abs(out - expected).max(initial=0) <= max(1e-14 * np.abs(expected).max(initial=0), 5e-324)


def test_integers_for_numbers_that_are_not_normal():
    """A column of them times one that is large enough for the products to be normal; weights likewise."""
    random = RANDOM(14)
    small = random.integers(-50, 50, (30, 3)) * 5e-324
    large = random.standard_normal((30, 4)) * 1e290
    limits = ONE_SM | WAYS["integers"]

    def close(out, x, y, weight):
        wanted, grid = exact(x, y, weight)
        wanted = np.vectorize(lambda v: float(Fraction(v, 1 << grid)), otypes=[float])(wanted)
        return np.abs(out - wanted).max() <= 1e-14 * np.abs(wanted).max()

    assert close(run(small, large, limits=limits)[0], small, large, None)
    ones = np.ones((30, 3))
    for weight in (small[:, 0], np.full(30, 1e-300)):
        assert close(run(ones, large, weight, limits=limits)[0], ones, large, weight)
    tiny = ones * 1e-200
    assert close(run(tiny, large, np.full(30, 1e-250), limits=limits)[0], tiny, large, np.full(30, 1e-250))


@pytest.mark.parametrize(("dtype", "spread", "digits"), [("bfloat16", 16, 4), ("bfloat16", 40, 7), ("float32", 1, 4)])
def test_digits_that_are_0_are_passed_over(dtype, spread, digits):
    """Of numbers that lie within `spread` powers of two."""
    random = RANDOM(11)
    x = stored(
        random.choice([-1, 1], (32, 64)) * (1 + random.random((32, 64))) * 2.0 ** random.integers(-spread, 1, (32, 64)),
        dtype,
    )
    _, plan, executor = run(x, limits=ONE_SM | WAYS["integers"])
    pairs = sum(k + other >= 5 for k in range(7 - digits, 7) for other in range(7 - digits, 7))
    assert total(executor, "mma") == pairs * 2 * 8 * plan["tiles"]


@pytest.mark.parametrize(
    ("way", "batch", "tokens", "splits"),
    [("double", 3, 4156, 1), ("double", 1, 8252, 2), ("integers", 3, 4156, 1), ("integers", 1, 8192, 2)],
)
def test_whole_numbers_are_summed_exactly_over_many_flushes(way, batch, tokens, splits):
    x = RANDOM(2).integers(-1000, 1000, (batch, tokens, 9)).astype(np.float32)
    out, plan, executor = run(x, limits=ONE_SM | WAYS[way])
    assert plan["splits"] == splits
    wide = x.astype(float)
    assert np.array_equal(out, wide.swapaxes(1, 2) @ wide)  # below 2^53: exact in any order
    assert total(executor, "global_read_bytes") == plan["read_bytes"]
    assert total(executor, "global_written_bytes") == plan["write_bytes"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("accumulate", [True, False])
def test_integers_move_the_bytes_that_the_plan_states(accumulate, dtype):
    random = RANDOM(12)
    x, y = (stored(random.integers(-9, 10, (2, 70, n)), dtype) for n in (100, 33))
    for other in (None, y):
        out = np.zeros((2, 100, 100 if other is None else 33)) if accumulate else None
        got, plan, executor = run(x, other, None, out, accumulate=accumulate, limits=ONE_SM | WAYS["integers"])
        assert np.array_equal(got, value(x).swapaxes(1, 2) @ value(x if other is None else other))
        assert total(executor, "global_read_bytes") == plan["read_bytes"]
        assert total(executor, "global_written_bytes") == plan["write_bytes"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_moves_the_bytes_that_the_plan_states(dtype, weighted, accumulate, split):
    random = RANDOM(3)
    tokens, n = (520, 208) if split else (40, 384)
    numbers = stored(random.integers(-9, 10, (2, tokens, n)), dtype)
    x = simt.memory(numbers.nbytes).view(numbers.dtype).reshape(numbers.shape)  # aligned as a GPU's
    x[...] = numbers
    weight = random.integers(-3, 4, (2, tokens)).astype(float) if weighted else None
    out = random.integers(-9, 10, (2, n, n)).astype(float) if accumulate else None
    wide = value(x)
    left = wide if weight is None else wide * weight[..., None]
    expected = left.swapaxes(1, 2) @ wide + (0 if out is None else out)
    limits = {"sms": 40} if split else ONE_SM
    got, plan, executor = run(x, None, weight, out, accumulate=accumulate, limits=limits, **half_of(dtype))
    assert (plan["splits"] > 1) == split
    assert np.array_equal(got, expected)
    assert total(executor, "global_read_bytes") == plan["read_bytes"]
    assert total(executor, "global_written_bytes") == plan["write_bytes"]
    executor.require_no_bank_conflicts()
    if not weighted and not accumulate:  # whole sectors
        lines = [line for counts in executor.counters.values() for line in counts["lines"].values()]
        assert all(line["global_read_sectors"] * 32 == line["global_read_bytes"] for line in lines)


@pytest.mark.parametrize("way", WAYS)
def test_two_dtypes(way):
    random = RANDOM(4)
    for dtype, other in (("bfloat16", "float32"), ("float64", "float16"), ("float32", "float64")):
        x, y = stored(random.standard_normal((37, 70)), dtype), stored(random.standard_normal((37, 20)), other)
        half = "float16" if "float16" in (dtype, other) else "bfloat16"
        out, plan, executor = run(x, y, half=half, limits=ONE_SM | WAYS[way])
        assert set(executor.counters) == kernels(plan, "float64")
        assert error(out, x, y) < 4e-15


def batch_of(random, dtype, tokens, n, layout):
    """[3, 2, tokens, n] of some layout."""
    if layout == "plain":
        return stored(random.standard_normal((3, 2, tokens, n)), dtype)
    if layout == "transposed":
        return stored(random.standard_normal((2, n, 3, tokens)), dtype).transpose(2, 0, 3, 1)
    if layout == "sliced":
        return stored(random.standard_normal((3, 2, 2 * tokens, 3 * n)), dtype)[:, :, ::2, 1::3]
    if layout == "expanded":
        return np.broadcast_to(stored(random.standard_normal((3, 1, 1, n)), dtype), (3, 2, tokens, n))
    assert layout == "backwards"
    return stored(random.standard_normal((3, 2, tokens, n)), dtype)[::-1, :, ::-1, ::-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "expanded", "backwards"])
@pytest.mark.parametrize("way", WAYS)
def test_batches_of_any_strides(way, dtype, layout):
    random, limits = RANDOM(5), ONE_SM | WAYS[way]
    x, y = batch_of(random, dtype, 19, 12, layout), batch_of(random, dtype, 19, 70, layout)
    weight = random.standard_normal((2, 19, 3)).transpose(2, 0, 1)
    for other in (None, y):
        m = 12 if other is None else 70
        out, *_ = run(x, other, weight, limits=limits, **half_of(dtype))
        before = random.standard_normal((m, 3, 24, 2)).transpose(1, 3, 2, 0)[:, :, ::2]
        after = before.copy(order="K")
        target = np.empty((m, 3, 24, 2)).transpose(1, 3, 2, 0)[:, :, ::2]
        target[...] = before
        run(x, other, weight, target, accumulate=True, limits=limits, **half_of(dtype))
        for b in np.ndindex(3, 2):
            side = None if other is None else other[b]
            assert error(out[b], x[b], side, weight[b]) < 4e-15
            assert np.abs(target[b] - (after[b] + out[b])).max() <= 1e-15 * max(1, np.abs(target[b]).max())


def test_many_batch_dimensions():
    x = RANDOM(6).standard_normal((2, 1, 3, 2, 1, 1, 2, 4, 5))
    out, *_ = run(x)
    assert np.allclose(out, x.swapaxes(-1, -2) @ x, rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="at most 6 batch dimensions may be larger than 1; got 7"):
        run(np.zeros((2, 2, 2, 2, 2, 2, 2, 1, 1)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_nothing_to_sum(accumulate, way):
    for batch, tokens, n, m in ((2, 0, 5, 3), (0, 4, 5, 3), (2, 4, 0, 3), (2, 4, 5, 0)):
        x, y = np.ones((batch, tokens, n), np.float32), np.ones((batch, tokens, m), np.float32)
        for other in (None, y):
            k = n if other is None else m
            out = np.full((batch, n, k), 7.0 if accumulate else np.nan)
            run(x, other, None, out, accumulate=accumulate, limits=ONE_SM | WAYS[way])
            if tokens == 0:
                assert np.array_equal(out, np.full_like(out, 7.0 if accumulate else 0.0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("limits", [ONE_SM, {"sms": 24}, ONE_SM | WAYS["integers"]])
def test_a_bad_number_stays_where_arithmetic_puts_it(bad, limits):
    x = RANDOM(7).standard_normal((3, 520, 70)).astype(np.float32)
    clean, plan, _ = run(x, limits=limits)
    assert (plan["splits"] > 1) == (limits["sms"] > 1)
    x[1, 300, 67] = bad
    x[1, 301, 3] = 0
    out, *_ = run(x, limits=limits)
    assert np.array_equal(out[[0, 2]], clean[[0, 2]])
    wrong = ~np.isfinite(out[1])
    assert wrong[67].all()
    assert wrong[:, 67].all()
    assert wrong.sum() == 2 * 70 - 1
    with np.errstate(invalid="ignore"):
        expected = x[1].astype(float).T @ x[1]
    assert np.array_equal(np.isnan(out[1]), np.isnan(expected))
    assert np.array_equal(out[1][np.isinf(expected)], expected[np.isinf(expected)])


@pytest.mark.parametrize("way", WAYS)
def test_a_bad_weight(way):
    x = RANDOM(13).standard_normal((2, 40, 9))
    weight = np.ones((2, 40))
    weight[1, 5], x[1, 5, 4] = np.inf, 0
    out, *_ = run(x, weight=weight, limits=ONE_SM | WAYS[way])
    assert error(out[0], x[0]) < 4e-15
    assert np.isnan(out[1, 4]).all()
    assert np.isinf(out[1][np.ix_([0, 1, 8], [0, 1, 8])]).all()


def test_far_apart_in_memory():
    """More than 2^31 elements from one token to the next, and from one matrix to the next."""
    far = 2**31 + 8
    memory = simt.memory((3 * far + 1000) * 2).view(np.uint16)
    x = np.lib.stride_tricks.as_strided(memory, (2, 2, 16), (2 * far * 2, far * 2, 2))
    x[...] = stored(RANDOM(8).standard_normal((2, 2, 16)), "bfloat16")
    out, *_ = run(x)
    for b in range(2):
        assert error(out[b], x[b]) < 1e-15


def test_the_plan_splits_long_sums_over_the_gpu():
    x = simt.memory(2 * 32768 * 4096).view(np.uint16)
    plan = {n: simt.gram_plan(x[: 32768 * n].reshape(32768, n)) for n in (64, 256, 1024, 4096)}
    assert plan[4096]["splits"] == 1
    assert plan[64]["splits"] == 128  # of 256 tokens
    assert all(1.9 * 132 <= plan[n]["blocks"] <= 8 * 132 for n in (256, 1024))
    assert plan[1024]["bytes"] == plan[1024]["blocks"] * 128 * 64 * 8
    assert "too few tiles" in plan[64]["text"]
