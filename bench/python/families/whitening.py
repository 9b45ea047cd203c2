"""Gram accumulation and batched Cholesky factors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import freqrank
import torch
from torch import Tensor

from bench.python.registry import Case, Family, Inputs

SIZE = {"bfloat16": 2, "float32": 4, "float64": 8}
DOWN = (11008, 12288, 14336)


def _samples(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    return (torch.randn(case.shape, generator=generator, device=device).to(case.torch_dtype),)


def _positive_definite(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    x = torch.randn(case.shape, generator=generator, device=device, dtype=torch.float64)
    return ((x @ x.mT / case.n + torch.eye(case.n, device=device)).to(case.torch_dtype),)


def _systems(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    columns = case.options["right-hand sides"]
    b = torch.randn(*case.shape[:-1], columns, generator=generator, device=device, dtype=case.torch_dtype)
    return *_positive_definite(case, generator, device), b


def cases(device: str) -> Iterator[Case]:
    tokens, widths = (4096, (128, 256, 512, 1024)) if device == "cpu" else (32768, (1024, 2048, 4096))
    grams = [(tokens, n, dtype) for n in widths for dtype in ("bfloat16", "float32")]
    if device == "cuda":  # inputs of the down projections of LLaMA-2-7B, Qwen3-8B and LLaMA-3-8B
        grams += [(8192, n, "bfloat16") for n in DOWN]
    for tokens, n, dtype in grams:
        yield Case(
            op="gram",
            shape=(tokens, n),
            dtype=dtype,
            n=n,
            series=f"Gram from {dtype}",
            bytes=tokens * n * SIZE[dtype] + n * n * 8,
            tolerance=1e-12,
            inputs=_samples,
            reference=lambda case, x: x.double().mT @ x.double(),
            flops=tokens * n * (n + 1.0),
            compute="float64",
            quick=n == widths[1] and dtype == "bfloat16",
        )
    batches = [(256, 32), (64, 64), (64, 128), (16, 256), (16, 512), (2, 1024)]
    if device == "cuda":
        batches += [(4096, 32), (4096, 128), (1, 4096)]
    factors = [(batch, n, dtype) for batch, n in batches for dtype in ("float32", "float64")]
    if device == "cuda":
        factors += [(1, n, "float64") for n in DOWN]
    for batch, n, dtype in factors:
        yield Case(
            op="cholesky_ex",
            shape=(batch, n, n),
            dtype=dtype,
            n=n,
            series=f"Cholesky, {dtype}",
            bytes=2 * batch * n * n * SIZE[dtype],
            tolerance=1e-4 if dtype == "float32" else 1e-12,
            inputs=_positive_definite,
            reference=lambda case, a: torch.linalg.cholesky(a.double()),
            flops=batch * n**3 / 3,
            quick=n in (32, 128) and dtype == "float32",
        )
    systems = [(256, 16, 1), (256, 32, 1), (256, 32, 32), (64, 64, 1), (64, 128, 1), (64, 128, 128), (16, 256, 16)]
    if device == "cuda":
        systems += [(4096, 32, 1), (4096, 32, 32), (4096, 128, 1)]
    for (batch, n, columns), dtype in itertools.product(systems, ("float32", "float64")):
        yield Case(
            op="cholesky_solve_ex",
            shape=(batch, n, n),
            dtype=dtype,
            n=n,
            series=f"Factor and solve, {dtype}",
            bytes=batch * (2 * n * n + 2 * n * columns) * SIZE[dtype],
            tolerance=1e-4 if dtype == "float32" else 1e-12,
            inputs=_systems,
            reference=lambda case, a, b: torch.cholesky_solve(b.double(), torch.linalg.cholesky(a.double())),
            flops=batch * (n**3 / 3 + 2.0 * n * n * columns),
            options={"right-hand sides": columns},
            quick=(n, columns) == (32, 1) and dtype == "float32",
        )


family = Family("whitening", "Gram matrices and Cholesky factors", "n", cases)


@family.implementation("freqrank")
def _freqrank(case: Case, *inputs: Tensor) -> Callable[..., Tensor]:
    if case.op == "gram":
        return freqrank.gram
    if case.op == "cholesky_solve_ex":
        return lambda a, b: freqrank.cholesky_solve_ex(a, b).X
    return lambda a: freqrank.cholesky_ex(a).L


@family.implementation("torch")
def _torch(case: Case, *inputs: Tensor) -> Callable[..., Tensor]:
    if case.op == "gram":

        def gram(x: Tensor) -> Tensor:
            wide = x.double()
            return wide.mT @ wide

        return gram
    if case.op == "cholesky_solve_ex":
        return lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky_ex(a).L)
    return lambda a: torch.linalg.cholesky_ex(a).L
