"""Compressing whole models: seconds and the growth of the resident set, each run in a process of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import freqrank
import torch
from torch import Tensor

from bench.python import language_models
from bench.python.language_models import BUNDLED, HALF_BILLION
from bench.python.registry import Case, Family, Inputs

METHODS = ("svd", "fwsvd", "asvd", "svd-llm", "basis-sharing", "lisc", "best")
# sequences and their length
TEXTS = {BUNDLED: (64, 256), HALF_BILLION: (4, 512)}
QUICK = (8, 128)


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    vocabulary = 256 if case.options["model"] == BUNDLED else language_models.VOCABULARY
    return (torch.randint(0, vocabulary, case.shape, generator=generator, device=device),)


def _nothing(case: Case, tokens: Tensor) -> tuple[Tensor, ...]:
    return ()


def output_error(report: Any, reference: Any) -> float:
    """Root mean square of the relative errors of the linears' outputs, which random tokens make large."""
    return math.sqrt(sum(layer.error**2 for layer in report.layers) / len(report.layers))


def cases(device: str) -> Iterator[Case]:
    for model, methods in ((BUNDLED, METHODS), (HALF_BILLION, ("basis-sharing",))):
        shapes = [TEXTS[model], QUICK] if model == BUNDLED else [TEXTS[model]]
        for shape in shapes:
            for method in methods if shape != QUICK else ("basis-sharing",):
                yield Case(
                    op="compress",
                    shape=shape,
                    dtype="float32",
                    n=math.prod(shape),
                    series="the bundled model" if model == BUNDLED else "0.5B's shape, 24 layers",
                    bytes=4 * language_models.linears(model),
                    tolerance=1.0,
                    inputs=_inputs,
                    reference=_nothing,
                    error=output_error,
                    options={"model": model, "method": method},
                    quick=shape == QUICK,
                    alone=True,
                )


family = Family("compression", "Compressing a model, a fifth removed, groups of 2", "tokens", cases, minutes=5)


@family.implementation("freqrank", needs=("transformers",))
def _freqrank(case: Case, tokens: Tensor) -> Callable[[Tensor], Any]:
    model = copy.copy(language_models.dense(case.options["model"], case.torch_dtype, tokens.device))
    language_models.dense.cache_clear()  # what is replaced can be given back
    return lambda tokens: freqrank.compress(model, tokens, method=case.options["method"], progress=False)
