"""Whole language models with factored linears beside the dense ones: reading a text, and generating after it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from freqrank.lowrank.modules import LowRankLinear, share_products
from torch import Tensor

from bench.python import language_models
from bench.python.language_models import BUNDLED, HALF_BILLION, SIZES
from bench.python.registry import Case, Family, Inputs, NotApplicable

PERCENT = (20, 40, 60, 80)
TEXT = 512  # tokens that are read
CONTEXT = 256  # tokens before the one that is generated
PREFILL_LAYERS = {BUNDLED: None, HALF_BILLION: 8}  # of 24: all are alike, and a dense forward pass takes seconds
SHARES = {"layers": "groups of 2 layers", "modules": "q, k, v and gate, up of a layer"}
SIZE = {"bfloat16": 2, "float32": 4}


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    vocabulary = 256 if case.options["model"] == BUNDLED else language_models.VOCABULARY
    return (torch.randint(0, vocabulary, case.shape, generator=generator, device=device),)


def _dense(case: Case, device: torch.device) -> Any:
    return language_models.dense(case.options["model"], case.torch_dtype, device, _layers(case))


def _factored(case: Case, device: torch.device, storage: str | None = None) -> Any:
    options = case.options
    return language_models.factored(
        options["model"], case.n / 100, options["share"], storage, case.torch_dtype, device, _layers(case)
    )


def _layers(case: Case) -> int | None:
    return PREFILL_LAYERS[case.options["model"]] if case.op == "prefill" else None


def _run(case: Case, model: Any, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """Logits of a text, or of a token that follows others: the cache is cut back after each call."""
    if case.op == "prefill":
        return torch.no_grad()(lambda ids: model(ids, use_cache=False).logits)
    from transformers import DynamicCache

    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24
    config, cache = model.config, DynamicCache(config=model.config)
    size = (len(ids), config.num_key_value_heads, CONTEXT, config.hidden_size // config.num_attention_heads)
    generator = torch.Generator(ids.device).manual_seed(1)
    for layer in range(config.num_hidden_layers):  # random, since a text of 0.5B's would take longer than its token
        keys, values = (
            torch.randn(size, generator=generator, device=ids.device).to(case.torch_dtype).to(model.dtype)
            for _ in range(2)
        )
        cache.update(keys, values, layer)

    @torch.no_grad()
    def step(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, use_cache=True, **{name: cache}).logits
        cache.crop(-1)
        return logits

    return step


def _exactly(case: Case, ids: Tensor, model: Any) -> Tensor:
    return _run(case, copy.deepcopy(model).double(), ids)(ids)


def _factored_exactly(case: Case, ids: Tensor) -> Tensor:
    return _exactly(case, ids, _factored(case, ids.device))


def _integers_exactly(case: Case, ids: Tensor) -> Tensor:
    return _exactly(case, ids, _factored(case, ids.device, "int8"))


_known: dict[tuple[Any, ...], Tensor] = {}


def _dense_exactly(case: Case, ids: Tensor) -> Tensor:
    """The same in many cases, and takes long."""
    key = case.options["model"], case.op, case.dtype, tuple(ids.flatten().tolist())
    if key not in _known:
        _known[key] = _exactly(case, ids, _dense(case, ids.device))
    return _known[key]


def cases(device: str) -> Iterator[Case]:
    dtype = "float32" if device == "cpu" else "bfloat16"
    for model in (BUNDLED, HALF_BILLION):
        for op, rows, columns in (("prefill", 1, TEXT), ("decode", 1, 1), ("decode", 8, 1)):
            layers = PREFILL_LAYERS[model] if op == "prefill" else None
            depth = layers or SIZES[model][3]
            name = "the bundled model" if model == BUNDLED else f"0.5B's shape, {depth} layers"
            for share, what in SHARES.items():
                for percent in PERCENT:
                    yield Case(
                        op=op,
                        shape=(rows, columns),
                        dtype=dtype,
                        n=percent,
                        series=f"{op} of {rows if op == 'decode' else columns}, {name}, {what}",
                        bytes=round(language_models.linears(model, layers) * (1 - percent / 100)) * SIZE[dtype],
                        tolerance=1e-4 if dtype == "float32" else 5e-2,
                        inputs=_inputs,
                        reference=_factored_exactly,
                        options={"model": model, "share": share, "percent": percent},
                        quick=model == BUNDLED and percent == 40 and rows == 1,
                    )


family = Family("models", "Language models with factors in place of weights", "percent removed", cases, minutes=10)
NEEDS = ("transformers",)


@family.implementation("freqrank", needs=NEEDS)
def _freqrank(case: Case, ids: Tensor) -> Callable[[Tensor], Tensor]:
    return _run(case, _factored(case, ids.device), ids)


@family.implementation("dense", needs=NEEDS, reference=_dense_exactly)
def _before(case: Case, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """The model before it was compressed."""
    return _run(case, _dense(case, ids.device), ids)


@family.implementation("int8 factors", needs=NEEDS, reference=_integers_exactly)
def _integers(case: Case, ids: Tensor) -> Callable[[Tensor], Tensor]:
    if case.op == "prefill" and case.options["model"] == HALF_BILLION:
        raise NotApplicable("left out of the long cases")
    return _run(case, _factored(case, ids.device, "int8"), ids)


@family.implementation("a product for each linear", needs=NEEDS)
def _apart(case: Case, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """Siblings that each multiply by their basis."""
    if case.options["share"] != "modules":
        raise NotApplicable("nothing is shared inside a layer")
    model = copy.deepcopy(_factored(case, ids.device))
    for module in model.modules():
        if isinstance(module, LowRankLinear):  # a basis of one's own has no siblings
            module.basis = torch.nn.Parameter(module.basis.detach().clone())
    share_products(model)
    return _run(case, model, ids)
