"""What is measured: cases, and the implementations that are measured on them, in families."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = tuple[Any, ...]

BASELINE = "freqrank"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


class NotApplicable(Exception):
    """Raised by an implementation's `prepare` for a case that it cannot do; says why."""


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, ...]
    dtype: str
    n: int  # what plots and tables run over
    series: str  # cases that belong together in a plot
    bytes: int  # that must move: every input read once, every output written once
    tolerance: float  # error above which a result counts as wrong
    inputs: Callable[[Case, torch.Generator, torch.device], Inputs]
    # (case, *inputs) -> the result in float64, or what `error` compares with
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    flops: float = 0  # if given, times are also put beside a matrix product
    compute: str | None = None  # dtype of that product; default `dtype`
    error: Callable[[Any, Any], float] | None = None  # of a result beside the reference; default: relative L2 error
    quick: bool = False  # part of --quick
    alone: bool = False  # each call in a process of its own; memory is then all that the process takes for it

    @property
    def name(self) -> str:
        options = [f"{key}={value}" for key, value in self.options.items()]
        return " ".join([self.op, *options, "x".join(map(str, self.shape)), self.dtype])

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Implementation:
    name: str
    # (case, *inputs) -> the function of inputs that is timed. Plans, matrices and buffers are made here.
    prepare: Callable[..., Callable[..., Any]]
    needs: tuple[str, ...] = ()  # modules; the implementation is left out where one is missing
    devices: tuple[str, ...] = ("cpu", "cuda")
    convert: Callable[[Tensor], Any] | None = None  # of the inputs, before anything is timed
    reference: Callable[..., Any] | None = None  # for an implementation of something else, that is shown beside


class Family:
    """A file in `families/` makes one, called `family`."""

    def __init__(
        self, name: str, title: str, axis: str, cases: Callable[[str], Iterable[Case]], minutes: float = 1.5
    ) -> None:
        self.name, self.title, self.axis, self.minutes = name, title, axis, minutes
        self._cases = cases
        self.implementations: list[Implementation] = []

    def cases(self, device: str) -> list[Case]:
        cases = list(self._cases(device))
        names = [case.name for case in cases]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"family {self.name} lists these cases twice: {', '.join(repeated)}")
        return cases

    def implementation(self, name: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Registers the decorated `prepare` function. The one called "freqrank" is what the others are compared to."""

        def register(prepare: Callable[..., Any]) -> Callable[..., Any]:
            if any(known.name == name for known in self.implementations):
                raise ValueError(f"family {self.name} already has an implementation {name!r}")
            self.implementations.append(Implementation(name, prepare, **options))
            return prepare

        return register


def families() -> dict[str, Family]:
    from bench.python import families as folder

    found = {}
    for module in sorted(pkgutil.iter_modules(folder.__path__), key=lambda module: module.name):
        family = importlib.import_module(f"{folder.__name__}.{module.name}").family
        found[family.name] = family
    return found
