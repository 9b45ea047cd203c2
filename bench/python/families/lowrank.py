"""From activations and weights to the factors of a shared basis: Gram matrix, whitening, decomposition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import freqrank
import torch
from freqrank.lowrank.allocation import Shape, uniform_rank
from freqrank.lowrank.factorize import factorize
from torch import Tensor

from bench.python.registry import Case, Family, Inputs

SIZE = {"bfloat16": 2, "float32": 4}
RATIO = 0.2
EXACT_ORDER = 2048  # up to here the optimum comes from the outputs themselves, beyond from a float64 Gram matrix
MASSIVE = 1000.0  # four tokens are so many times the others

# inputs, outputs, layers that share
SMALL = ((128, 192, 2), (256, 384, 2), (512, 640, 2))
MODELS = {
    "LLaMA-2-7B": ((4096, 4096, 2), (4096, 11008, 2), (11008, 4096, 1)),
    "LLaMA-3-8B": ((4096, 1024, 2), (4096, 14336, 2), (14336, 4096, 1)),
    "Qwen3-8B": ((4096, 12288, 2), (12288, 4096, 1)),
}


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    tokens, n, outputs = case.shape
    decades = 3.75 if n <= EXACT_ORDER else 2.0
    x = torch.randn(tokens, n, generator=generator, device=device)
    x *= 10 ** torch.linspace(0, -decades, n, device=device)
    # no channel is a direction of its own: mixed by a product of reflections, cheaper than a rotation
    for _ in range(4):
        v = torch.nn.functional.normalize(torch.randn(n, generator=generator, device=device), dim=0)
        x -= 2 * torch.outer(x @ v, v)
    if case.options["data"] == "massive":
        x[:4] *= MASSIVE
    weights = torch.randn(case.options["layers"], n, outputs, generator=generator, device=device)
    return x.to(case.torch_dtype), weights.to(case.torch_dtype)


def _beside(weights: Tensor) -> Tensor:
    """All layers' weights in one matrix."""
    return torch.cat(list(weights), 1)


def reference(case: Case, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Activations and weights in float64, and the least squared loss that factors of this rank can have."""
    x, w = x.double(), _beside(weights).double()
    if case.n <= EXACT_ORDER:
        squares = torch.linalg.svdvals(x @ w).square()
    else:
        squares = torch.linalg.eigvalsh(symmetric(x, w)).flip(0)
    return x, w, squares[case.options["rank"] :].sum()


def symmetric(x: Tensor, w: Tensor) -> Tensor:
    """The smaller matrix whose eigenvalues are the squared singular values, from float64."""
    if w.shape[1] <= w.shape[0]:
        y = x @ w
        return y.mT @ y
    y = torch.linalg.cholesky(x.mT @ x).mT @ w
    return y @ y.mT


def excess(result: Any, reference: Any) -> float:
    """Squared loss ||X (W - B C)||^2 beyond the least, relative to it; rounding may make it a little negative."""
    x, w, least = reference
    basis, coefficients = (factor.double() for factor in result)
    loss = (x @ (w - basis @ coefficients)).square().sum()
    found = float(loss / least - 1)
    return max(found, 0.0) if found == found else float("inf")


def cases(device: str) -> Iterator[Case]:
    shapes = [("small", shape) for shape in SMALL]
    if device == "cuda":
        shapes += [(model, shape) for model, found in MODELS.items() for shape in found]
    for series, (n, outputs, layers) in shapes:
        small = series == "small"
        tokens = 8 * n if small else 16384
        dtype = "float32" if small else "bfloat16"
        rank = uniform_rank(Shape(n, layers * outputs), RATIO)
        for data in ("mild", "massive") if small else ("mild",):
            read = tokens * n + layers * n * outputs
            yield Case(
                op="factors",
                shape=(tokens, n, outputs),
                dtype=dtype,
                n=n,
                series=f"Shared bases, {data} activations" if small else f"Shared bases of {series}",
                bytes=read * SIZE[dtype] + rank * (n + layers * outputs) * 8,
                tolerance=1e3,  # recipes that lose much are shown with what they lose
                inputs=_inputs,
                reference=reference,
                error=excess,
                options={"layers": layers, "rank": rank, "data": data},
                quick=n == SMALL[0][0] and data == "mild",
            )


family = Family("lowrank", "Factors of a shared basis", "n", cases, minutes=1.0)
Factors = tuple[Tensor, Tensor]


@family.implementation("freqrank")
def _freqrank(case: Case, x: Tensor, weights: Tensor) -> Callable[[Tensor, Tensor], Factors]:
    def factors(x: Tensor, weights: Tensor) -> Factors:
        found = factorize(list(weights), freqrank.gram(x), case.options["rank"])
        return found.basis, torch.cat(found.coefficients, 1)

    return factors


@family.implementation("float64 throughout")
def _float64(case: Case, x: Tensor, weights: Tensor) -> Callable[[Tensor, Tensor], Factors]:
    """The best that torch alone does: no inverse, but an SVD of the whitened weights."""

    def factors(x: Tensor, weights: Tensor) -> Factors:
        wide, w = x.double(), _beside(weights).double()
        root = torch.linalg.cholesky(wide.mT @ wide).mT
        rows = torch.linalg.svd(root @ w, full_matrices=False).Vh[: case.options["rank"]]
        return w @ rows.mT, rows

    return factors


def _shifted_root(x: Tensor, shift: float) -> Tensor:
    """S with S^T S = G from a float32 Gram matrix, made definite by its smallest eigenvalue where it is not."""
    single = x.float()
    gram = (single.mT @ single).double()
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:
        gram.diagonal().add_(shift - torch.linalg.eigvalsh(gram)[0])
        factor = torch.linalg.cholesky(gram)
    return factor.mT


@family.implementation("recipe of SVD-LLM")
def _svd_llm(case: Case, x: Tensor, weights: Tensor) -> Callable[[Tensor, Tensor], Factors]:
    """float32 Gram, float64 Cholesky and inverse, float32 SVD (arXiv 2403.07378, as released)."""

    def factors(x: Tensor, weights: Tensor) -> Factors:
        root = _shifted_root(x, 1e-6)
        inverse = torch.linalg.inv(root).float()
        u, sigma, rows = torch.linalg.svd(root.float() @ _beside(weights).float(), full_matrices=False)
        scale = sigma[: case.options["rank"]].sqrt()
        return inverse @ (u[:, : len(scale)] * scale), scale[:, None] * rows[: len(scale)]

    return factors


@family.implementation("recipe of Basis Sharing")
def _basis_sharing(case: Case, x: Tensor, weights: Tensor) -> Callable[[Tensor, Tensor], Factors]:
    """float32 Gram, float64 Cholesky, inverse and SVD (arXiv 2410.03765, as released)."""

    def factors(x: Tensor, weights: Tensor) -> Factors:
        root = _shifted_root(x, 7e-6)
        u, sigma, rows = torch.linalg.svd(root @ _beside(weights).double(), full_matrices=False)
        rank = case.options["rank"]
        return torch.linalg.inv(root) @ (u[:, :rank] * sigma[:rank]), rows[:rank]

    return factors


def _eigenvalues(case: Case, x: Tensor, weights: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(symmetric(x.double(), _beside(weights).double()))


@family.implementation("eigh of its order alone", reference=_eigenvalues)
def _eigh(case: Case, x: Tensor, weights: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What no implementation by eigenvectors can be faster than."""
    matrix = symmetric(x.double(), _beside(weights).double())
    return lambda x, weights: torch.linalg.eigh(matrix).eigenvalues
