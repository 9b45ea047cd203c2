"""The eigenproblem of a shared basis: how it is formed and solved, and what whitening costs where Grams are hard."""

import freqrank
import pytest
import torch
from freqrank.lowrank import factorize as fz
from freqrank.lowrank.subspace import leading_eigenvectors


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(values, seed=0):
    """A symmetric matrix with these eigenvalues, and its eigenvectors."""
    n = len(values)
    q = torch.linalg.qr(random(n, n, seed=seed)).Q
    matrix = (q * values) @ q.mT
    return (matrix + matrix.mT) / 2, q


# --- the symmetric matrix ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(700, [300, 520]), (300, [500, 40]), (60, [61]), (700, [1]), (1, [5])])
def test_half_of_the_symmetric_matrix_is_formed(inputs, outputs, whitened):
    weights = [random(inputs, columns, seed=i) for i, columns in enumerate(outputs)]
    b = [0.5 + i for i in range(len(outputs))]
    x = random(inputs + 50, inputs, seed=9)
    gram = freqrank.gram(x) if whitened else None
    problem = fz._problem(weights, gram, b)
    whole = torch.cat([weight * scale for weight, scale in zip(weights, b, strict=True)], 1)
    y = x @ whole if whitened else whole
    if sum(outputs) <= inputs:
        expected = y.mT @ y
        assert not problem.by_inputs
    else:
        root = torch.linalg.qr(x).R if whitened else torch.eye(inputs, dtype=torch.float64)
        root = root * root.diagonal().sign().unsqueeze(-1)
        expected = root @ whole @ whole.mT @ root.mT
        assert problem.by_inputs
    torch.testing.assert_close(problem.matrix.tril(), expected.tril(), rtol=1e-9, atol=1e-12 * float(expected.trace()))
    energy = [float(part.square().sum()) for part in y.split(outputs, 1)]
    assert problem.energy == pytest.approx(energy, rel=1e-12)


def test_weights_are_widened_as_they_are_read():
    for outputs in (40, 10):
        weights = [random(24, outputs, seed=i).bfloat16() for i in range(2)]
        gram = freqrank.gram(random(60, 24, seed=5))
        narrow, wide = (
            fz.factorize([w.to(dtype) for w in weights], gram, 6) for dtype in (torch.bfloat16, torch.float64)
        )
        assert torch.equal(narrow.basis, wide.basis)
        assert narrow.basis.dtype == torch.float64


def test_weights_may_require_gradients():
    for outputs in (6, 3):
        weight = torch.nn.Linear(4, outputs).weight.mT
        gram = freqrank.gram(random(20, 4))
        for metric in (gram, None):
            want = fz.factorize([weight.detach()], metric, 2)
            assert torch.equal(fz.factorize([weight], metric, 2).basis, want.basis)
            torch.testing.assert_close(fz.squared_singular_values([weight], metric), want.spectrum)


def test_damping_counts_in_the_energy():
    x = random(100, 20)
    x[:, 3] = 0
    gram = freqrank.gram(x)
    weights = [random(20, 30, seed=i) for i in (1, 2)]
    f = fz.factorize(weights, gram, 5)
    assert f.damping == 1e-12
    damped = freqrank.whiten(gram).factor
    energy = [float((damped @ weight).square().sum()) for weight in weights]
    assert f.energy == pytest.approx(energy, rel=1e-14)
    assert sum(f.lost) == pytest.approx(float(f.spectrum[5:].sum()), rel=1e-12)


@pytest.mark.parametrize("outputs", [40, 10])
def test_one_decomposition_gives_every_rank(outputs, monkeypatch):
    weights = [random(24, outputs, seed=i) for i in range(2)]
    gram = freqrank.gram(random(60, 24, seed=5))
    decomposition = fz.decompose(weights, gram, [1.0, 3.0])
    alone = {rank: fz.factorize(weights, gram, rank, [1.0, 3.0]) for rank in (1, 7, 20)}
    monkeypatch.setattr(torch.linalg, "eigh", None)
    for rank, f in alone.items():
        again = decomposition.truncate(rank)
        torch.testing.assert_close(again.basis, f.basis, rtol=1e-12, atol=1e-12)
        for a, b in zip(again.coefficients, f.coefficients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert again.lost == pytest.approx(f.lost, rel=1e-12, abs=1e-12 * sum(f.energy))
        assert f.spectrum.shape == decomposition.spectrum.shape
    with pytest.raises(ValueError, match=r"rank must be from 1 to 2\d, the directions that were found; got 25"):
        decomposition.truncate(25)


def test_errors():
    weights = [random(24, 10)]
    with pytest.raises(ValueError, match=r"solver must be one of 'eigh', 'subspace'; got 'svd'"):
        fz.decompose(weights, None, solver="svd")
    for rank in (0, 11):
        with pytest.raises(ValueError, match=rf"rank must be from 1 to min\(d1, sum of d2\) = 10; got {rank}"):
            fz.factorize(weights, None, rank)
    eye = torch.eye(24, dtype=torch.float64)
    with pytest.raises(ValueError, match="rank must be from 1 to 23; got 24"):
        leading_eigenvectors(eye, 24)
    with pytest.raises(ValueError, match=r"start must be \[24, 3 to 24\]; got \(24, 2\)"):
        leading_eigenvectors(eye, 3, start=eye[:, :2])


# --- the leading eigenvectors alone -----------------------------------------------------------------------------------

N, K = 320, 24
INDEX = torch.arange(N, dtype=torch.float64)
PROVEN = {
    "fast decay": 0.9**INDEX + 1e-3,
    "slow decay": 1 / (1 + INDEX),
    "flat": torch.ones(N, dtype=torch.float64),
    "a cluster across the cut": torch.where(INDEX < 10, 5.0, torch.where(INDEX < 40, 1.0, 0.1)).double(),
    "a gap at the cut": torch.where(INDEX < K, 2.0, 0.5 - INDEX / N / 4),
    "rank deficient": torch.where(INDEX < 100, 1 / (1 + INDEX), 0.0),
    "random matrix": (1 - INDEX / N) ** 2 + 0.01,
}
REFUSED = {
    "no gap within four products": 2 - INDEX / N,
    "zero": 0 * INDEX,
    "nothing is dropped": torch.where(INDEX < 10, 1.0, 0.0).double(),
    "rounding is all that is dropped": torch.where(INDEX < 3, 1e12, 1 / (1 + INDEX)),
    "no less than the cut": torch.where(INDEX < K, 1e-3, 0.0) + 1e6 * (INDEX == 0),
}


@pytest.mark.parametrize("name", PROVEN)
def test_leading_eigenvectors_lose_no_more_than_they_may(name):
    values = PROVEN[name]
    matrix, _ = with_spectrum(values)
    found = leading_eigenvectors(matrix, K)
    assert found is not None
    theta, vectors = found
    assert torch.equal(theta, theta.sort(descending=True).values)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(K, dtype=torch.float64), rtol=0, atol=1e-13)
    dropped = float(values.sort().values[:-K].sum())
    excess = float(matrix.trace() - (vectors * (matrix @ vectors)).sum()) - dropped
    assert excess <= 1e-8 * dropped
    again = leading_eigenvectors(matrix, K)
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_leading_eigenvectors_that_cannot_be_proven_are_refused(name):
    assert leading_eigenvectors(with_spectrum(REFUSED[name])[0], K) is None


def test_a_start_that_misses_a_direction_proves_nothing():
    # The last rows of a diagonal matrix: rounding would bring back what is missing anywhere else.
    matrix = torch.diag((0.8**INDEX + 0.1).flip(0))
    start = random(N, 40)
    assert leading_eigenvectors(matrix, K, start=start) is not None
    start[-5] = 0
    assert leading_eigenvectors(matrix, K, start=start) is None
    start = random(N, 40)
    start[-200] = 0  # this one is dropped anyway
    assert leading_eigenvectors(matrix, K, start=start) is not None


def test_a_tighter_tolerance_is_kept_or_refused():
    values = PROVEN["slow decay"]
    matrix, _ = with_spectrum(values)
    for tolerance in (1e-4, 1e-11, 1e-16):
        found = leading_eigenvectors(matrix, K, tolerance=tolerance)
        if tolerance == 1e-16:
            assert found is None
            continue
        assert found is not None
        _, vectors = found
        dropped = float(values[K:].sum())
        assert float(matrix.trace() - (vectors * (matrix @ vectors)).sum()) - dropped <= tolerance * dropped + 1e-13


@pytest.mark.parametrize(("inputs", "outputs"), [(320, 200), (320, 120)])
@pytest.mark.parametrize("case", ["decay", "few tokens", "zero weights", "a large share"])
def test_subspace_factors_are_eighs(inputs, outputs, case):
    x = random(400, inputs, seed=3) * 10 ** torch.linspace(0, -2, inputs, dtype=torch.float64)
    if case == "few tokens":
        x = x[:6]
    weights = [random(inputs, outputs, seed=i) * (case != "zero weights") for i in (1, 2)]
    rank = 7 if case != "a large share" else 11
    gram = freqrank.gram(x)
    f, g = (fz.factorize(weights, gram, rank, [1.0, 2.0], solver=solver) for solver in fz.SOLVERS)
    assert f.solver == "eigh"
    expected = {"decay": "subspace", "a large share": "eigh"}.get(case, "subspace, then eigh")
    assert g.solver == expected
    if expected != "subspace":  # eigh did it
        assert torch.equal(f.basis, g.basis)
        return
    assert g.spectrum.shape == (rank,)
    assert f.energy == g.energy
    assert sum(g.lost) <= sum(f.lost) * (1 + 1e-8)
    assert sum(g.lost) == pytest.approx(float(f.spectrum[rank:].sum()), rel=1e-8)
    for a, b in zip(f.coefficients, g.coefficients, strict=True):
        torch.testing.assert_close(g.basis @ b, f.basis @ a, rtol=1e-3, atol=1e-3)


# --- whitening: what it costs where the Gram is hard ------------------------------------------------------------------


def squared_loss(x, y, basis, coefficients):
    return float((y - x.double() @ basis @ coefficients).square().sum())


def massive(x):
    x[:4] *= 2600.0
    return x


def zero_channels(x):
    x[:, [3, 77]] = 0
    return x


# Condition numbers of the Gram matrices: 4e7, 2.6e12, and singular for the others. The most squared loss beyond the
# optimum that a float64 Gram may cost, relative to it (2e-15 and 4e-15 are rounding), the damping level, and the least
# that a float32 Gram costs.
LADDER = {
    "mild": (4096, lambda x: x, 280, 2e-15, 0.0, 1e-9),
    "massive tokens": (4096, massive, 280, 4e-15, 0.0, 1.0),
    "fewer tokens than channels": (256, lambda x: x, 200, 2e-15, 1e-12, 1e-9),
    "zero channels": (4096, zero_channels, 280, 2e-15, 1e-12, 1e-9),
    "massive tokens and zero channels": (4096, lambda x: zero_channels(massive(x)), 280, 1e-9, 1e-12, 1.0),
}


@pytest.mark.parametrize("name", LADDER)
def test_excess_loss_of_the_damping_ladder(name):
    tokens, change, rank, most, level, single = LADDER[name]
    n = 512
    x = random(tokens, n) * 10 ** torch.linspace(0, -3.75, n, dtype=torch.float64)
    x = change(x @ torch.linalg.qr(random(n, n, seed=1)).Q).float()
    weight = random(n, 640, seed=2)
    y = x.double() @ weight

    # the optimum from the data itself, no Gram matrix, in the arithmetic that measures the others
    right = torch.linalg.svd(y, full_matrices=False).Vh[:rank]
    optimum = squared_loss(x, y, weight @ right.mT, right)
    f = fz.factorize([weight], freqrank.gram(x), rank)
    excess = squared_loss(x, y, f.basis, f.coefficients[0]) / optimum - 1
    wrong = fz.factorize([weight], (x.mT @ x).double(), rank)
    excess_of_float32 = squared_loss(x, y, wrong.basis, wrong.coefficients[0]) / optimum - 1
    print(f"{name}: {excess:.1e} at {f.damping:g}; from a float32 Gram {excess_of_float32:.1e} at {wrong.damping:g}")
    assert f.whitening == "cholesky"
    assert f.damping == level
    assert excess <= most
    assert excess_of_float32 >= single
    # the side of the outputs, where no whitening is needed
    thin = fz.factorize([weight[:, :400]], freqrank.gram(x), 180)
    assert thin.whitening == "none"
    y = y[:, :400]
    right = torch.linalg.svd(y, full_matrices=False).Vh[:180]
    optimum = squared_loss(x, y, weight[:, :400] @ right.mT, right)
    assert squared_loss(x, y, thin.basis, thin.coefficients[0]) <= optimum * (1 + 2e-15)
