"""The eigenproblem of a shared basis on a GPU, against the CPU."""

from __future__ import annotations

import freqrank
import pytest
import torch
from freqrank.lowrank.factorize import decompose, refit, squared_error
from on_device import DEVICE, skip_module_without_device

skip_module_without_device()
pytestmark = pytest.mark.gpu


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("solver", ["eigh", "subspace"])
@pytest.mark.parametrize("outputs", [450, 150], ids=["of the inputs", "of the outputs"])
def test_factors_lose_what_the_cpus_do(outputs, solver, dtype):
    x = random(900, 512) * 10 ** torch.linspace(0, -2, 512, dtype=torch.float64)
    x[:3] *= 100
    weights = [random(512, outputs, seed=i).to(dtype) for i in (1, 2)]
    ranks = (9,) if solver == "subspace" else (9, 100, 250)
    want = decompose(weights, freqrank.gram(x), [1.0, 2.0])
    gram = freqrank.gram(x.to(DEVICE))
    on_device = [weight.to(DEVICE) for weight in weights]
    got = decompose(on_device, gram, [1.0, 2.0], rank=max(ranks), solver=solver)
    assert got.solver == solver
    assert got.damping == want.damping
    assert got.energy == pytest.approx(want.energy, rel=1e-12)
    for rank in ranks:
        f = got.truncate(rank)
        assert f.basis.device.type == gram.device.type
        errors = [
            squared_error(weight.double(), f.basis @ c, gram)[0] * b * b
            for weight, c, b in zip(on_device, f.coefficients, (1.0, 2.0), strict=True)
        ]
        assert f.lost == pytest.approx(errors, rel=1e-6)
        assert sum(f.lost) == pytest.approx(sum(want.truncate(rank).lost), rel=1e-7)


def test_refit_follows_the_data():
    x, weight, basis = random(300, 40).to(DEVICE), random(40, 30, seed=1).to(DEVICE), random(40, 8, seed=2).to(DEVICE)
    gram = freqrank.gram(x)
    fitted = refit(basis, torch.zeros(8, 30, dtype=torch.float64, device=DEVICE), gram, gram @ weight)
    solution = torch.linalg.lstsq((x @ basis).cpu(), (x @ weight).cpu()).solution
    torch.testing.assert_close(fitted.cpu(), solution, rtol=1e-4, atol=1e-4)
