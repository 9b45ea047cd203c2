"""The Cholesky, whitening and triangular kernels of the GPU under the host executor, against LAPACK in float64."""

from __future__ import annotations

import freqrank.ops.linalg  # noqa: F401  (the CPU kernels)
import freqrank_simt
import numpy as np
import pytest
import torch
from freqrank_simt import Executor

DTYPES = (np.float32, np.float64)
SMALL = 72 * 1024  # of shared memory: panels begin at n = 129, double 81, and have 64 rows a step
LEVELS = (0.0, *(10.0**-k for k in range(12, 5, -1)))


def epsilon(dtype) -> float:
    return float(np.finfo(dtype).eps)


def positive_definite(rng, *shape, dtype=np.float64, condition=None):
    """Random; `condition` is that of each matrix."""
    n = shape[-1]
    x = rng.standard_normal(shape)
    if condition is not None:
        q = np.linalg.qr(x)[0]
        return ((q * np.geomspace(1, 1 / condition, n)) @ np.swapaxes(q, -1, -2)).astype(dtype)
    return (x @ np.swapaxes(x, -1, -2) / n + np.eye(n)).astype(dtype)


def cholesky(a, *, upper=True, seed=0, shared_bytes=0, executor=None):
    """(factor [.., n, n] as torch returns it, info, plan)."""
    executor = executor or Executor(seed)
    factor, info = np.full(a.shape, np.nan, a.dtype), np.full(a.shape[:-2], -1, np.int32)
    executor.expect_written(factor)
    executor.expect_written(info)
    plan = freqrank_simt.cholesky(executor, a, upper, factor, info, shared_bytes)
    executor.check_written()
    return (factor if upper else np.swapaxes(factor, -1, -2)), info, plan


def cholesky_solve(a, b, *, upper=True, seed=0, shared_bytes=0, executor=None, x=None):
    """(X, factor [.., n, n] as torch returns it, info, plan)."""
    executor = executor or Executor(seed)
    factor, info = np.full(a.shape, np.nan, a.dtype), np.full(a.shape[:-2], -1, np.int32)
    for result in (factor, info):
        executor.expect_written(result)
    if x is None:
        x = np.full(b.shape, np.nan, b.dtype)
        executor.expect_written(x)
    plan = freqrank_simt.cholesky(executor, a, upper, factor, info, shared_bytes, b, x)
    executor.check_written()
    return x, (factor if upper else np.swapaxes(factor, -1, -2)), info, plan


def whiten(gram, scale=None, *, seed=0, shared_bytes=0, executor=None):
    executor = executor or Executor(seed)
    batch = gram.shape[:-2]
    factor, damping, info = np.full(gram.shape, -7.0), np.full(batch, -7.0), np.full(batch, -7, np.int32)
    for x in (factor, damping, info):
        executor.expect_written(x)
    freqrank_simt.whiten(executor, gram, scale, factor, damping, info, shared_bytes)
    executor.check_written()
    return factor, damping, info


def solve(a, b, *, upper, left=True, unit=False, seed=0, shared_bytes=0, executor=None):
    executor = executor or Executor(seed)
    x = np.full(b.shape, np.nan, b.dtype)
    executor.expect_written(x)
    plan = freqrank_simt.solve_triangular(executor, a, b, x, upper, left, unit, shared_bytes)
    executor.check_written()
    return x, plan


def check_factor(u, a):
    """Upper triangular, and U^T U = A to what the dtype allows; of A only the upper triangle counts."""
    n = a.shape[-1]
    assert (np.tril(u, -1) == 0).all()
    assert (np.diagonal(u, axis1=-2, axis2=-1) > 0).all()
    wide = u.astype(np.float64)
    full = np.triu(a).astype(np.float64) + np.swapaxes(np.triu(a, 1), -1, -2)
    residual = np.abs(np.swapaxes(wide, -1, -2) @ wide - full).max()
    assert residual <= 5 * n * epsilon(a.dtype) / 2 * max(np.abs(full).max(), 1e-300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*range(1, 71), 97, 127, 128, 131, 151, 160])
def test_sizes(n, dtype):
    a = positive_definite(np.random.default_rng(n), 2, n, n, dtype=dtype)
    u, info, plan = cholesky(a)
    assert plan["kernel"] == ("warp" if n <= 32 else "block")
    assert plan["launches"] == 1
    assert (info == 0).all()
    check_factor(u, a)
    np.testing.assert_allclose(u, np.swapaxes(np.linalg.cholesky(a.astype(float)), -1, -2), atol=50 * epsilon(dtype))


def test_the_largest_of_a_block():
    assert freqrank_simt.cholesky_plan([1], 224, False)["kernel"] == "block"
    assert freqrank_simt.cholesky_plan([1], 225, False)["kernel"] == "panels"
    assert freqrank_simt.cholesky_plan([1], 160, True)["kernel"] == "block"
    assert freqrank_simt.cholesky_plan([1], 161, True)["kernel"] == "panels"
    a = positive_definite(np.random.default_rng(0), 224, 224, dtype=np.float32)
    u, info, _ = cholesky(a)
    assert info == 0
    check_factor(u, a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [129, 191, 193, 257])
def test_panels_of_64_rows(n, dtype):
    a = positive_definite(np.random.default_rng(n), 2, n, n, dtype=dtype)
    u, info, plan = cholesky(a, shared_bytes=SMALL)
    assert plan["kernel"] == "panels"
    assert plan["rows"] == 64
    assert plan["shared_bytes"] <= SMALL
    assert (info == 0).all()
    check_factor(u, a)
    lower, info, _ = cholesky(a, upper=False, shared_bytes=SMALL)
    assert (info == 0).all()
    check_factor(np.swapaxes(lower, -1, -2), a)


@pytest.mark.parametrize(("n", "dtype"), [(300, np.float32), (259, np.float64)])
def test_panels_of_128_rows(n, dtype):
    a = positive_definite(np.random.default_rng(n), n, n, dtype=dtype)
    u, info, plan = cholesky(a)
    assert plan["kernel"] == "panels"
    assert plan["rows"] == 128
    assert info == 0
    check_factor(u, a)


def test_float32_panels_are_as_accurate_as_lapack():
    """The products on tensor cores lose nothing: half of tf32's bits would cost a factor of a hundred and more."""
    rng = np.random.default_rng(8)
    n = 260
    x = rng.standard_normal((n, n)) + 2 * rng.standard_normal((n, 1))
    a = (x @ x.T / n + 0.1 * np.eye(n)).astype(np.float32)

    def residual(u):
        return np.linalg.norm(u.astype(float).T @ u.astype(float) - a.astype(float))

    peer = torch.linalg.cholesky(torch.from_numpy(a), upper=True).numpy()
    assert residual(cholesky(a, shared_bytes=SMALL)[0]) <= 3 * residual(peer)
    b = rng.standard_normal((n, 5)).astype(np.float32)
    x, _ = solve(peer, b, upper=True, shared_bytes=SMALL)
    other = torch.linalg.solve_triangular(torch.from_numpy(peer), torch.from_numpy(b), upper=True).numpy()
    errors = [np.linalg.norm(peer.astype(float) @ y.astype(float) - b) for y in (x, other)]
    assert errors[0] <= 3 * errors[1]


def cases():
    """(n, shared_bytes) that every kernel takes."""
    return [(5, 0), (13, 0), (29, 0), (50, 0), (150, SMALL)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_triangle_is_read_and_strides_are_any(dtype):
    rng = np.random.default_rng(1)
    for n, shared in cases():
        a = positive_definite(rng, 3, 2, n, n, dtype=dtype)
        want, _, _ = cholesky(a, shared_bytes=shared)
        for upper in (True, False):
            half = (np.triu(a) if upper else np.tril(a)) + np.where(
                np.tri(n, k=-1, dtype=bool) if upper else ~np.tri(n, dtype=bool), np.nan, 0
            ).astype(dtype)
            spread = np.full((2, 3, 2 * n, n + 3), np.nan, dtype)
            views = {
                "contiguous": half,
                "columns": np.swapaxes(np.ascontiguousarray(np.swapaxes(half, -1, -2)), -1, -2),
                "spread": spread.transpose(1, 0, 2, 3)[..., ::2, 3:],
                "backwards": np.ascontiguousarray(half[::-1, :, ::-1])[::-1, :, ::-1],
            }
            views["spread"][...] = half
            for name, view in views.items():
                got, info, _ = cholesky(view, upper=upper, shared_bytes=shared)
                assert (info == 0).all(), name
                np.testing.assert_array_equal(got if upper else np.swapaxes(got, -1, -2), want, name)


def test_a_batch_that_is_expanded():
    a = positive_definite(np.random.default_rng(0), 40, 40)
    got, info, _ = cholesky(np.broadcast_to(a, (3, 2, 40, 40)))
    assert (info == 0).all()
    assert (got == got[0, 0]).all()
    check_factor(got, np.broadcast_to(a, got.shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(dtype):
    for shape in [(0, 5, 5), (0, 40, 40), (0, 300, 300)]:
        factor, info, _ = cholesky(np.zeros(shape, dtype))
        assert factor.shape == shape
        assert info.shape == (0,)
    _, info, _ = cholesky(np.zeros((3, 0, 0), dtype))
    assert (info == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_seeds(dtype):
    for n, shared in cases():
        a = positive_definite(np.random.default_rng(n), 3, n, n, dtype=dtype)
        results = [cholesky(a, seed=seed, shared_bytes=shared)[0].tobytes() for seed in (1, 2, 3)]
        assert results[0] == results[1] == results[2]


def test_condition():
    for n, shared in [(24, 0), (60, 0), (133, SMALL)]:
        for condition in (1e4, 1e10, 1e13):
            a = positive_definite(np.random.default_rng(n), n, n, condition=condition)
            u, info, _ = cholesky(a, shared_bytes=shared)
            assert info == 0
            check_factor(u, a)


def test_strides_beyond_32_bits():
    a = positive_definite(np.random.default_rng(0), 2, 5, 5, dtype=np.float32)
    memory = freqrank_simt.memory(4 * (2**32 + 100)).view(np.float32)
    far = np.lib.stride_tricks.as_strided(memory, a.shape, (4 * 2**32, 4 * 10, 4))
    far[...] = a
    np.testing.assert_array_equal(cholesky(far)[0], cholesky(a)[0])


def test_batch_dimensions():
    a = positive_definite(np.random.default_rng(0), *(2,) * 8, 3, 3, dtype=np.float32)
    order = (*range(7, -1, -1), 8, 9)
    np.testing.assert_array_equal(cholesky(a.transpose(order))[0], cholesky(a)[0].transpose(order))
    b = np.broadcast_to(a[..., None, :, :], (*a.shape[:8], 2, 3, 3)).transpose(*range(8, -1, -1), 9, 10)
    with pytest.raises(ValueError, match="at most 8 batch dimensions"):
        cholesky(b)


def test_plans():
    plan = freqrank_simt.cholesky_plan([4], 20_000, True, ladder=True)
    steps = -(-20_000 // plan["rows"])
    assert plan["rows"] == 128
    assert plan["launches"] == 8 * 2 * steps + 2
    assert plan["text"] == (
        "4 matrices of 20000 rows, float64, with the ladder: 128 rows a step; launches: 2514, "
        "bytes of shared memory: 205824"
    )
    # GPUs with 99 KB: smaller steps
    assert freqrank_simt.cholesky_plan([4], 1000, True, shared_bytes=101376)["rows"] == 64
    assert freqrank_simt.triangular_plan([4], 1000, 3, True, shared_bytes=101376)["rows"] == 64
    with pytest.raises(ValueError, match="more shared memory than this GPU's 49152 bytes"):
        freqrank_simt.cholesky_plan([1], 1000, False, shared_bytes=49152)
    with pytest.raises(ValueError, match="more shared memory than this GPU's 49152 bytes"):
        freqrank_simt.triangular_plan([1], 1000, 5, False, shared_bytes=49152)


# --- what is moved ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "kernel"), [(7, "warp"), (32, "warp"), (128, "block")])
def test_a_triangle_is_read_once_and_a_square_written(dtype, n, kernel):
    executor, count, size = Executor(), 6, np.dtype(dtype).itemsize
    a = positive_definite(np.random.default_rng(n), count, n, n, dtype=dtype)
    cholesky(a, executor=executor)
    counters = executor.counters[f"cholesky_{kernel}" + ("_double" if size == 8 else "")]
    assert counters["launches"] == 1
    assert counters["global_read_bytes"] == counters["global_read_unique_bytes"] == count * n * (n + 1) // 2 * size
    assert counters["global_written_bytes"] == count * (n * n * size + 4)
    if kernel == "block":
        assert counters["bank_conflicts"] == 0
        assert counters["barriers"] == count * (3 * (n // 16) + 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_panels_have_no_bank_conflicts(dtype):
    for upper in (True, False):
        executor = Executor()
        a = positive_definite(np.random.default_rng(0), 256, 256, dtype=dtype)
        _, _, plan = cholesky(a, upper=upper, executor=executor)
        assert sum(kernel["launches"] for kernel in executor.counters.values()) == plan["launches"]
        executor.require_no_bank_conflicts()


def test_matrices_that_are_done_leave():
    n, executor = 140, Executor()
    rng = np.random.default_rng(0)
    gram = np.stack([positive_definite(rng, n, n), needs(rng, n, 1e-10), positive_definite(rng, n, n)])
    _, damping, _ = whiten(gram, shared_bytes=SMALL, executor=executor)
    tries = [1, 1 + LEVELS.index(damping[1]), 1]
    assert tries[1] > 2
    counters = executor.counters
    assert counters["cholesky_copy_double"]["launches"] == len(LEVELS)
    # a try reads the triangle and, by each thread of its 6 tiles, the mean; a level what the one before it came to
    read = sum(tries) * (n * (n + 1) // 2 * 8 + 6 * 256 * 8) + (len(LEVELS) - 1) * len(gram) * 9 * 256 * 4
    assert counters["cholesky_copy_double"]["global_read_bytes"] == read
    alone = Executor()
    whiten(gram[:1], shared_bytes=SMALL, executor=alone)
    products = alone.counters["triangular_update_double"]["mma"]
    assert counters["triangular_update_double"]["mma"] == sum(tries) * products


# --- matrices that fail ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_info_is_lapacks(dtype):
    rng = np.random.default_rng(3)
    for n, shared in cases():
        orders = sorted({1, 2, n // 2, n - 1, n, min(n, 65), min(n, 64), min(n, 17)})
        a = positive_definite(rng, len(orders) + 1, n, n, dtype=dtype)
        for b, order in enumerate(orders):
            a[b, order - 1, order - 1] = -1 if b % 2 else 0
        for upper in (True, False):
            want = torch.linalg.cholesky_ex(torch.from_numpy(a), upper=upper).info.numpy()
            got, info, _ = cholesky(a, upper=upper, shared_bytes=shared)
            assert info.tolist() == want.tolist() == [*orders, 0]
            u = got if upper else np.swapaxes(got, -1, -2)
            check_factor(u[-1], a[-1])
            assert (np.tril(u, -1) == 0).all()
            for b, order in enumerate(orders):
                if order > 1:
                    check_factor(u[b, : order - 1, : order - 1], a[b, : order - 1, : order - 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_stay_in_their_matrix(dtype, value):
    rng = np.random.default_rng(4)
    for n, shared in cases():
        places = [(0, 0), (0, n - 1), (n // 2, n // 2), (n // 2, n - 1), (n - 1, n - 1)]
        a = positive_definite(rng, 2 * len(places) + 1, n, n, dtype=dtype)
        good, _, _ = cholesky(a, shared_bytes=shared)
        for b, (i, j) in enumerate(places):
            a[2 * b + 1, i, j] = value
        u, info, _ = cholesky(a, shared_bytes=shared)
        np.testing.assert_array_equal(u[::2], good[::2])
        assert (info[::2] == 0).all()
        if np.isnan(value):
            want = torch.linalg.cholesky_ex(torch.from_numpy(a), upper=True).info.numpy()
            assert info.tolist() == want.tolist()
            assert (info[1::2] > 0).all()


# --- the ladder ---


def damped(gram, level, scale=1.0):
    full = scale * (np.triu(gram).astype(float) + np.triu(gram, 1).astype(float).T)
    diagonal = np.diagonal(full)
    return full + level * np.diag(np.where(diagonal != 0, diagonal, diagonal.mean()))


def needs(rng, n, level):
    """A matrix that some level of the ladder saves: its smallest eigenvalue, scaled, is -level / 3."""
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    values = np.linspace(0.5, 1.5, n)
    values[0] = -level / 3
    return (q * values) @ q.T


@pytest.mark.parametrize(("n", "shared"), [(6, 0), (20, 0), (40, 0), (100, SMALL), (133, SMALL)])
def test_ladder(n, shared):
    rng = np.random.default_rng(n)
    grams = [positive_definite(rng, n, n)]
    grams += [needs(rng, n, level) for level in (1e-11, 1e-9, 1e-6)]
    grams.append(-np.eye(n))
    grams.append(np.full((n, n), np.nan))
    x = rng.standard_normal((2 * n, n))
    x[:, n // 2] = 0  # a channel that is never active
    grams.append(x.T @ x)
    gram = np.stack(grams)
    scale = rng.uniform(0.5, 2.0, len(gram))
    gram[:, np.tri(n, k=-1, dtype=bool)] = np.nan  # not read
    gram[:, np.arange(n), np.arange(n)] *= 1.0
    factor, damping, info = whiten(gram, scale, shared_bytes=shared)
    want = torch.ops.freqrank.whiten(torch.from_numpy(gram), torch.from_numpy(scale))
    assert info.tolist() == want[2].tolist()
    assert damping.tolist() == want[1].tolist()
    assert damping[0] == 0
    assert damping[4] == LEVELS[-1]
    assert damping[5] == 0
    assert damping[6] == LEVELS[1]
    assert len({*damping[1:4]}) == 3
    assert info[4] == 1
    assert info[5] == 1
    assert info[[0, 1, 2, 3, 6]].sum() == 0
    upper = ~np.tri(n, k=-1, dtype=bool)
    for b in range(len(gram)):
        assert (factor[b][~upper] == 0).all()
        if info[b]:
            assert np.isnan(factor[b][upper]).all()
        else:
            check_factor(factor[b], damped(gram[b], damping[b], scale[b]))


@pytest.mark.parametrize(("n", "shared"), [(8, 0), (33, 0), (133, SMALL)])
def test_whitening_of_float32(n, shared):
    rng = np.random.default_rng(n)
    gram = positive_definite(rng, 2, n, n, dtype=np.float32)
    results = [whiten(gram, seed=seed, shared_bytes=shared) for seed in (1, 2, 3)]
    factor, damping, info = results[0]
    assert (damping == 0).all()
    assert (info == 0).all()
    check_factor(factor, gram.astype(np.float64))
    for other in results[1:]:
        assert all(x.tobytes() == y.tobytes() for x, y in zip(results[0], other, strict=True))


def test_whitening_of_nothing():
    _, damping, info = whiten(np.zeros((2, 0, 0)))
    assert (damping == 0).all()
    assert (info == 0).all()
    assert whiten(np.zeros((0, 200, 200)), shared_bytes=SMALL)[0].shape == (0, 200, 200)


# --- triangular systems ---


def triangle(rng, *shape, dtype, upper):
    n = shape[-1]
    a = rng.standard_normal(shape) / n + 2 * np.eye(n)
    half = np.triu(a) if upper else np.tril(a)
    return half.astype(dtype)


def check_solution(a, x, b, left):
    wide, y = a.astype(np.float64), x.astype(np.float64)
    got = wide @ y if left else y @ wide
    scale = np.abs(wide).max() * max(np.abs(y).max(), 1e-300) if y.size else 1
    assert np.abs(got - b).max(initial=0) <= 4 * a.shape[-1] * epsilon(a.dtype) * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("upper", [True, False])
def test_solve(dtype, left, upper):
    rng = np.random.default_rng(5)
    for n, columns, shared in [(1, 1, 0), (7, 3, 0), (33, 65, 0), (150, 70, SMALL), (131, 1, 0)]:
        a = triangle(rng, 2, n, n, dtype=dtype, upper=upper)
        b = rng.standard_normal((2, n, columns) if left else (2, columns, n)).astype(dtype)
        other = np.tri(n, k=-1, dtype=bool) if upper else ~np.tri(n, dtype=bool)
        marked = np.where(other, np.nan, a).astype(dtype)  # the other triangle is not read
        x, _ = solve(marked, b, upper=upper, left=left, shared_bytes=shared)
        check_solution(a, x, b, left)
        for unit in (True, False):
            one = a.copy()
            if unit:
                one[:, np.arange(n), np.arange(n)] = 1
                marked[:, np.arange(n), np.arange(n)] = np.nan
                x, _ = solve(marked, b, upper=upper, left=left, unit=True, shared_bytes=shared)
                check_solution(one, x, b, left)


@pytest.mark.parametrize("dtype", DTYPES)
def test_solve_strides_and_seeds(dtype):
    rng = np.random.default_rng(6)
    for n, columns, shared in [(20, 5, 0), (140, 9, SMALL)]:
        a = triangle(rng, 2, n, n, dtype=dtype, upper=True)
        b = rng.standard_normal((2, n, columns)).astype(dtype)
        want, _ = solve(a, b, upper=True, shared_bytes=shared)
        turned = np.swapaxes(np.ascontiguousarray(np.swapaxes(a, -1, -2)), -1, -2)
        spread = np.empty((2, n, 2 * columns), dtype)[..., ::2]
        spread[...] = b
        for seed in (1, 2, 3):
            got, _ = solve(turned, spread, upper=True, seed=seed, shared_bytes=shared)
            np.testing.assert_array_equal(got, want)


def test_solve_keeps_what_is_not_finite_in_its_column():
    rng = np.random.default_rng(7)
    for n, shared in [(40, 0), (150, SMALL)]:
        a = triangle(rng, n, n, dtype=np.float32, upper=False)
        b = rng.standard_normal((n, 6)).astype(np.float32)
        want, _ = solve(a, b, upper=False, shared_bytes=shared)
        b[n // 3, 2], b[0, 4] = np.nan, np.inf
        got, _ = solve(a, b, upper=False, shared_bytes=shared)
        good = [0, 1, 3, 5]
        np.testing.assert_array_equal(got[:, good], want[:, good])
        assert np.isnan(got[n // 3 :, 2]).all()
        assert not np.isfinite(got[0, 4])
        np.testing.assert_array_equal(got[: n // 3, 2], want[: n // 3, 2])


# --- factor and solve in one launch ---


def check_symmetric_solution(a, x, b):
    wide, y = a.astype(np.float64), x.astype(np.float64)
    size = np.linalg.norm(wide, axis=(-2, -1)) * np.linalg.norm(y, axis=(-2, -1)) if y.size else np.zeros(1)
    residual = np.linalg.norm(wide @ y - b, axis=(-2, -1))
    assert (residual <= 4 * a.shape[-1] * epsilon(a.dtype) * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*range(1, 34), 47, 48, 49, 64, 65, 97, 112, 113, 128])
def test_factor_and_solve(n, dtype):
    rng = np.random.default_rng(n)
    for columns in (1, 3 + n % 67):
        a = positive_definite(rng, 3, n, n, dtype=dtype)
        b = rng.standard_normal((3, n, columns)).astype(dtype)
        x, u, info, plan = cholesky_solve(a, b)
        assert plan["launches"] == 1
        assert plan["width"] > 0
        assert (info == 0).all()
        check_symmetric_solution(a, x, b)
        np.testing.assert_array_equal(u, cholesky(a)[0])  # the same factor as without


def test_what_is_solved_in_one_launch():
    def plan(n, columns, double_precision, **more):
        return freqrank_simt.cholesky_plan([5], n, double_precision, right_sides=columns, **more)

    assert plan(224, 4, False)["width"] == 4
    assert plan(224, 1, False)["launches"] == 1
    assert plan(192, 512, False)["width"] == 64
    assert plan(193, 512, False)["launches"] == 1 + 2 * 3
    assert plan(128, 64, True)["width"] == 64
    assert plan(30, 513, False)["launches"] == 1 + 2
    assert plan(300, 4, False)["launches"] == 2 * 3 + 1 + 2 * 5
    assert plan(40, 0, False)["width"] == 0
    assert plan(40, 3, False)["text"].startswith(
        "5 matrices of 40 rows, float32, 3 right-hand sides each: one in the shared memory of a block of 128 threads, "
        "the right-hand sides in the same launch; launches: 1"
    )
    assert "by triangular solves" in plan(300, 4, False)["text"]
    assert plan(32, 4, True)["shared_bytes"] == 67584
    small = plan(32, 4, True, shared_bytes=49152)
    assert (small["width"], small["launches"]) == (0, 1 + 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_factor_and_solve_in_several_launches(dtype):
    rng = np.random.default_rng(9)
    for n, columns, shared in [(150, 3, SMALL), (131, 70, SMALL), (20, 513, 0)]:
        a = positive_definite(rng, 2, n, n, dtype=dtype)
        b = rng.standard_normal((2, n, columns)).astype(dtype)
        x, u, info, plan = cholesky_solve(a, b, shared_bytes=shared)
        assert plan["width"] == 0
        assert plan["launches"] > 2
        assert (info == 0).all()
        check_symmetric_solution(a, x, b)
        np.testing.assert_array_equal(u, cholesky(a, shared_bytes=shared)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_factor_and_solve_strides_and_seeds(dtype):
    rng = np.random.default_rng(10)
    for n, columns, shared in [(6, 5, 0), (15, 3, 0), (31, 40, 0), (50, 70, 0), (140, 9, SMALL)]:
        a = positive_definite(rng, 2, 3, n, n, dtype=dtype)
        b = rng.standard_normal((2, 3, n, columns)).astype(dtype)
        want, u, _, _ = cholesky_solve(a, b, shared_bytes=shared)
        half = np.tril(a) + np.where(np.tri(n, dtype=bool), 0, np.nan).astype(dtype)
        spread = np.empty((3, 2, 2 * n, 3 * columns), dtype)
        places = {
            "columns": np.empty((2, 3, columns, n), dtype).swapaxes(-1, -2),
            "spread": spread.swapaxes(0, 1)[..., ::2, ::3],
            "backwards": np.empty_like(b)[:, ::-1, ::-1, ::-1],
        }
        for seed, place in enumerate(places.values()):
            place[...] = b
            out = None if seed == 0 else np.full_like(place, np.nan)
            got, lower, info, _ = cholesky_solve(half, place, upper=False, seed=seed, shared_bytes=shared, x=out)
            assert (info == 0).all()
            np.testing.assert_array_equal(got, want)
            np.testing.assert_array_equal(np.swapaxes(lower, -1, -2), u)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_that_fails_has_no_solution(dtype):
    rng = np.random.default_rng(11)
    for n, shared in cases():
        a = positive_definite(rng, 5, n, n, dtype=dtype)
        b = rng.standard_normal((5, n, 3)).astype(dtype)
        b[2, :, 1] = 0
        good, _, _, _ = cholesky_solve(a, b, shared_bytes=shared)
        a[0, n - 1, n - 1], a[2, 0, 0], a[4, n // 2, n // 2] = -1, 0, np.nan
        b[3, n - 1, 1] = np.inf
        x, u, info, _ = cholesky_solve(a, b, shared_bytes=shared)
        assert info.tolist() == [n, 0, 1, 0, n // 2 + 1]
        assert np.isnan(x[[0, 2, 4]]).all()
        assert np.isnan(u[[0, 2, 4]][:, ~np.tri(n, k=-1, dtype=bool)]).all()
        np.testing.assert_array_equal(x[1], good[1])
        np.testing.assert_array_equal(x[3][:, [0, 2]], good[3][:, [0, 2]])
        assert not np.isfinite(x[3, :, 1]).any()


def test_factor_and_solve_of_nothing():
    for n, shared in cases():
        bad = np.stack([np.eye(n), -np.eye(n)])
        _, u, info, plan = cholesky_solve(bad, np.zeros((2, n, 0)), shared_bytes=shared)
        assert plan["width"] == 0
        assert info.tolist() == [0, 1]
        assert (u[0] == np.eye(n)).all()
        assert np.isnan(u[1][~np.tri(n, k=-1, dtype=bool)]).all()
    for batch, n, columns in [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 300, 3)]:
        x, u, info, _ = cholesky_solve(np.broadcast_to(np.eye(n), (batch, n, n)), np.zeros((batch, n, columns)))
        assert x.shape == (batch, n, columns)
        assert (info == 0).all()
        assert (u == np.eye(n)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "kernel"), [(7, "warp"), (32, "warp"), (128, "block")])
def test_factor_and_solve_moves_each_number_once(dtype, n, kernel):
    executor, count, columns, size = Executor(), 6, 20, np.dtype(dtype).itemsize
    rng = np.random.default_rng(n)
    a = positive_definite(rng, count, n, n, dtype=dtype)
    cholesky_solve(a, rng.standard_normal((count, n, columns)).astype(dtype), executor=executor)
    counters = executor.counters[f"cholesky_{kernel}" + ("_double" if size == 8 else "")]
    read = count * (n * (n + 1) // 2 + n * columns) * size
    assert counters["global_read_bytes"] == counters["global_read_unique_bytes"] == read
    assert counters["global_written_bytes"] == count * (n * n * size + n * columns * size + 4)


def test_solve_of_nothing():
    for shape in [(0, 4, 3), (2, 0, 3), (2, 4, 0)]:
        a = np.zeros((shape[0], shape[1], shape[1]), np.float32)
        assert solve(a, np.zeros(shape, np.float32), upper=True)[0].shape == shape
