"""What models take: bytes of their weights, bytes kept of a sequence, seconds for a prompt and for a token."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from freqrank.models.streaming import evaluating

#: Decoding steps before those that are timed: the first ones find cold caches.
_WARM_STEPS = 2


class ModelSize(NamedTuple):
    """Parameters of a model, and bytes of parameters and buffers."""

    parameters: int
    bytes: int


def model_size(model: nn.Module) -> ModelSize:
    """Size of a model; a tensor that several modules share counts once.

    >>> layer = nn.Linear(3, 2, bias=False)
    >>> model_size(nn.Sequential(layer, layer))
    ModelSize(parameters=6, bytes=24)
    """
    parameters = {id(p): p for p in model.parameters()}
    tensors = parameters | {id(b): b for b in model.buffers()}
    return ModelSize(
        sum(p.numel() for p in parameters.values()), sum(t.numel() * t.element_size() for t in tensors.values())
    )


def cache_bytes(cache: Cache) -> list[int]:
    """Bytes of all tensors in each layer of a transformers cache: keys and values, or the state of a linear layer."""
    return [
        sum({id(t): t.numel() * t.element_size() for t in _tensors(vars(layer))}.values()) for layer in cache.layers
    ]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


@dataclass
class Cost:
    """What one sequence costs a model once it has ``context`` tokens.

    Attributes:
        context: tokens of the sequence.
        prefill_times: seconds of reading them all at once into an empty cache, for the logits of the last.
        token_times: seconds of each of the last tokens, read one by one through the cache.
        layer_bytes: what each layer's cache holds in the end.
        slides: of each layer, whether it keeps the newest tokens only.
        prefill_seconds, token_seconds: the medians.
    """

    context: int
    prefill_times: list[float]
    token_times: list[float]
    layer_bytes: list[int]
    slides: list[bool]

    @property
    def prefill_seconds(self) -> float:
        return statistics.median(self.prefill_times)

    @property
    def token_seconds(self) -> float:
        return statistics.median(self.token_times)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "prefill_seconds": self.prefill_seconds, "token_seconds": self.token_seconds}


def growth(costs: Sequence[Cost]) -> list[tuple[int, int]] | None:
    """Of each layer the bytes that it keeps whatever the length, and those that it keeps for each token.

    Known where two measured lengths show either nothing but the first or nothing but the second: then bytes at any
    length follow exactly. None where a layer does neither, such as one that forgets all but the newest tokens.

    >>> growth([Cost(8, [], [], [64, 100], [False] * 2), Cost(32, [], [], [256, 100], [False] * 2)])
    [(0, 8), (100, 0)]
    """
    first, last = costs[0], costs[-1]
    found = []
    for before, after, slides in zip(first.layer_bytes, last.layer_bytes, last.slides, strict=True):
        if slides or first.context == last.context:
            return None
        if before == after:
            found.append((before, 0))
        elif before * last.context == after * first.context and after % last.context == 0:
            found.append((0, after // last.context))
        else:
            return None
    return found


@torch.no_grad()
def measure(
    models: Mapping[str, PreTrainedModel],
    contexts: Sequence[int],
    repeats: int = 5,
    *,
    seed: int = 0,
    advance: Callable[[str], None] = lambda what: None,
) -> dict[str, list[Cost]]:
    """Time models side by side on one sequence of each length, and count what they keep of it.

    Models take turns, repeat by repeat and token by token, so that a busy machine slows all of them. A sequence is
    random tokens: which they are does not change what a token costs.

    Args:
        models: by name, with one vocabulary; each runs where it is, in its own dtype.
        contexts: tokens of a sequence, each more than ``decoded_tokens(repeats)``, the last of which come one by one.
        repeats: timed readings of a prompt; three times as many single tokens are timed.
        seed: of the tokens.
        advance: called after each context with a word on it.
    """
    generator = torch.Generator().manual_seed(seed)
    single = decoded_tokens(repeats)
    found: dict[str, list[Cost]] = {name: [] for name in models}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        vocabulary = next(iter(models.values())).config.get_text_config().vocab_size
        for context in contexts:
            ids = torch.randint(vocabulary, (1, context), generator=generator)
            inputs = {name: ids.to(model.device) for name, model in models.items()}
            prefill: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(repeats + 1):
                for name, model in models.items():
                    prefill[name].append(_timed(model, inputs[name], DynamicCache(config=model.config)))
            caches = {name: DynamicCache(config=model.config) for name, model in models.items()}
            for name, model in models.items():
                _timed(model, inputs[name][:, :-single], caches[name])
            tokens: dict[str, list[float]] = {name: [] for name in models}
            for step in range(context - single, context):
                for name, model in models.items():
                    tokens[name].append(_timed(model, inputs[name][:, step : step + 1], caches[name]))
            for name in models:
                found[name].append(
                    Cost(
                        context,
                        prefill[name][1:],
                        tokens[name][_WARM_STEPS:],
                        cache_bytes(caches[name]),
                        [bool(getattr(layer, "is_sliding", False)) for layer in caches[name].layers],
                    )
                )
            advance(f"{context} tokens")
    return found


def read_once(model: PreTrainedModel, context: int) -> None:
    """Read a sequence of so many tokens, as :func:`measure` does; raises what the model raises."""
    with evaluating(model):
        _timed(model, torch.zeros(1, context, dtype=torch.long, device=model.device), DynamicCache(config=model.config))


def decoded_tokens(repeats: int) -> int:
    """Tokens of a sequence that :func:`measure` gives a model one by one."""
    return _WARM_STEPS + 3 * repeats


def _timed(model: PreTrainedModel, ids: Tensor, cache: Cache) -> float:
    """Seconds of reading ``ids`` [1, T] behind what ``cache`` holds, for the logits of the last token."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24
    wait = torch.cuda.synchronize if ids.is_cuda else lambda device: None
    wait(ids.device)
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
    wait(ids.device)
    return time.perf_counter() - start
