"""Linear layers beside the softmax layers that they take the place of: one token after a long text, and the text.

``decode``: one token of the bundled models. The key-value caches hold random keys: to read 64k tokens would take longer
than all that is measured, and costs the step nothing. States of linear layers are those after a short text: they have
one size. ``layer`` and ``padded layer``: a whole text through one attention layer, projections included.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import freqrank
import torch
import torch.nn.functional as F
from freqrank.attention.dijiang import DiJiangAttention, DiJiangOptions
from freqrank.models.cache import state_tensors
from torch import Tensor

from bench.python import language_models
from bench.python.language_models import BUNDLED, SIZES
from bench.python.registry import Case, Family, Inputs, NotApplicable

LENGTHS = tuple(1024 << i for i in range(7))  # to 64k
BATCHES = (1, 8)
PROMPT = 128  # tokens that the states come from
# What a chart in DiJiang's repository shows: tokens a second of its model over the softmax model's, read off the plot.
# Neither batch nor GPU are said.
PUBLISHED = {2048: "2.2x", 4096: "3.8x", 8192: "7.3x"}
HEADS, HEAD_DIM = 4, 64  # of the layer
TWIN = Path(freqrank.__file__).parent / "bundled" / "linear"
TOLERANCE = {"float32": 2e-4, "bfloat16": 5e-2}
SIZE = {"bfloat16": 2, "float32": 4}
GROWING_LIMIT = {"cpu": 2 << 30, "cuda": 16 << 30}  # bytes of keys and values
STATIC_LIMIT = {"cpu": 4 << 30, "cuda": 16 << 30}
QUADRATIC_LIMIT = {"layer": 8192, "padded layer": 4096}  # tokens: matrices of all pairs in memory
SOFTMAX_LIMIT = {"layer": 16384, "padded layer": 8192}
EXACT_LIMIT = 2048  # tokens up to which the reference takes all pairs


# --- one token -------------------------------------------------------------------------------------------------------


def cache_bytes(batch: int, context: int, dtype: str) -> int:
    """Keys and values of the bundled base model after so many tokens."""
    hidden, _, _, layers = SIZES[BUNDLED]
    return 2 * batch * context * hidden * layers * SIZE[dtype]


@lru_cache(maxsize=1)
def _state_elements() -> int:
    """Numbers in the twin's states of one sequence, all layers together."""
    config = json.loads((TWIN / "config.json").read_text())
    heads = config["num_attention_heads"]
    layer = DiJiangAttention(
        hidden_size=config["hidden_size"], num_heads=heads, num_key_value_heads=config["num_key_value_heads"],
        head_dim=config["hidden_size"] // heads, device=torch.device("meta"),
        options=DiJiangOptions(**config["quantization_config"]["linear_attention"]["options"]),
    )  # fmt: skip
    return layer.state_elements * config["num_hidden_layers"]


def state_bytes(batch: int) -> int:
    """The states of the linearised twin, in float32 whatever the model's dtype."""
    return 4 * batch * _state_elements()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}MB" if size < 1e7 else f"{size / 1e6:.0f}MB"


def _token(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    return (torch.randint(1, 256, case.shape, generator=generator, device=device),)


@lru_cache(maxsize=2)
def _linear(dtype: torch.dtype, device: torch.device, has_window: bool) -> Any:
    """The bundled twin; with a window the base, converted and not trained: as fast."""
    import transformers

    if has_window:
        made = copy.deepcopy(language_models.dense(BUNDLED, dtype, device))
        freqrank.linearize(made, feature_map="hybrid")
        return made
    transformers.utils.logging.disable_progress_bar()
    twin: Any = transformers.AutoModelForCausalLM.from_pretrained(TWIN, dtype=dtype)
    return twin.to(device).eval()


def _cache_name(model: Any) -> str:
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24


def _state_step(case: Case, model: Any, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """One token of a linearised model. The state is put back after each call, in its place."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    name, generator = _cache_name(model), torch.Generator(ids.device).manual_seed(1)
    with torch.no_grad():
        text = torch.randint(1, 256, (len(ids), PROMPT), generator=generator, device=ids.device)
        model(text, use_cache=True, **{name: cache})
    states = [x for layer in cache.layers for x in state_tensors(layer.state).values()]
    before = [x.clone() for x in states]
    positions = torch.full_like(ids, case.n)

    @torch.no_grad()
    def step(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, position_ids=positions, use_cache=True, **{name: cache}).logits
        for x, y in zip(states, before, strict=True):
            x.copy_(y)
        return logits

    return step


def _cached_step(case: Case, model: Any, ids: Tensor, cache: Any) -> Callable[[Tensor], Tensor]:
    """One token of the softmax model after random keys and values, the same for each sequence."""
    config, name = model.config, _cache_name(model)
    size = (2, 1, config.num_key_value_heads, case.n, config.hidden_size // config.num_attention_heads)
    generator = torch.Generator(ids.device).manual_seed(1)
    for layer in range(config.num_hidden_layers):
        made = torch.randn(size, generator=generator, device=ids.device).to(case.torch_dtype).to(model.dtype)
        keys, values = made.expand(-1, len(ids), -1, -1, -1)
        cache.update(keys, values, layer)
    positions = torch.full_like(ids, case.n)

    @torch.no_grad()
    def step(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, position_ids=positions, use_cache=True, **{name: cache}).logits
        cache.crop(-1)
        return logits

    return step


def _softmax_step_exactly(case: Case, ids: Tensor) -> Tensor:
    """Sequence by sequence, or the keys in float64 would not fit."""
    from transformers import DynamicCache

    model = copy.deepcopy(language_models.dense(BUNDLED, case.torch_dtype, ids.device)).double()
    step = _cached_step(case, model, ids[:1], DynamicCache(config=model.config))
    return torch.cat([step(row) for row in ids.split(1)])


def _window_step_exactly(case: Case, ids: Tensor) -> Tensor:
    model = copy.deepcopy(_linear(case.torch_dtype, ids.device, True)).double()
    return _state_step(case, model, ids)(ids)


# --- a whole text ----------------------------------------------------------------------------------------------------


def _text(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    return (torch.randn(case.shape, generator=generator, device=device).to(case.torch_dtype),)


@lru_cache(maxsize=2)
def _layer(dtype: torch.dtype, device: torch.device, is_linear: bool) -> Any:
    """A model of one layer, released form or softmax, with random weights; both have the same projections."""
    import transformers

    hidden = HEADS * HEAD_DIM
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=hidden, intermediate_size=8, num_hidden_layers=1, num_attention_heads=HEADS,
        max_position_embeddings=LENGTHS[-1],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.LlamaModel(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4.0)
    if is_linear:
        freqrank.linearize(model)
    return model.to(device, dtype).eval()


def real_tokens(case: Case, device: torch.device) -> Tensor | None:
    """Of a padded batch, bool [B, T]: a quarter of the first row is padding, on the left."""
    if case.op == "layer":
        return None
    real = torch.ones(case.shape[:2], dtype=torch.bool, device=device)
    real[0, : case.n // 4] = False
    return real


def _rotation(case: Case, model: Any, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Positions, not counting padding, and what the model makes of them: once for all layers, so before the time."""
    real = real_tokens(case, x.device)
    positions = torch.arange(case.n, device=x.device)[None]
    if real is not None:
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
    return positions, model.rotary_emb(x, positions)


def _of_real(o: Tensor, real: Tensor | None) -> Tensor:
    """What comes out at padding is of no use, and differs."""
    return o if real is None else o * real[..., None]


def _through_layer(case: Case, model: Any, x: Tensor) -> Callable[[Tensor], Tensor]:
    positions, rotation = _rotation(case, model, x)
    attention, real = model.layers[0].self_attn, real_tokens(case, x.device)

    @torch.no_grad()
    def forward(x: Tensor) -> Tensor:
        return _of_real(attention(x, rotation, real, position_ids=positions)[0], real)

    return forward


def _through_pairs(case: Case, model: Any, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The released forward pass: scores of all pairs of tokens, with D1, D2 and the causal mask as one matrix a head.

    As released they are factors of queries and keys, and gamma^-j is infinite from some thousand tokens on.
    """
    positions, rotation = _rotation(case, model, x)
    layer, real = model.layers[0].self_attn, real_tokens(case, x.device)
    with torch.no_grad():
        i = torch.arange(case.n, device=x.device)
        age = (i[:, None] - i).clamp(min=0).to(x.dtype)
        pairs = (layer.decay(x).to(x.dtype)[:, None, None] * age).exp_().tril_()[None]
        a, b = (f(positions).to(x.dtype).transpose(1, 2) for f in (layer.query_factors, layer.key_factors))
        pairs = pairs * a[..., None] * b[:, :, None]
        if real is not None:
            pairs = pairs * real[:, None, None]

    @torch.no_grad()
    def forward(x: Tensor) -> Tensor:
        q, k, v = layer.project(x)
        q, k = layer.rotate(q, k, *rotation, unsqueeze_dim=2)
        q, k = (layer.feature_map.features(each).to(v.dtype).transpose(1, 2) for each in (q, k))
        o = ((q @ k.mT).mul_(pairs) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
        o = F.group_norm(o.flatten(0, 1), HEAD_DIM, layer.norm.weight, layer.norm.bias, 1e-5).view(o.shape)
        return _of_real(layer.o_proj(F.silu(layer.gate_proj(x)) * o), real)

    return forward


def _through_softmax(case: Case, model: Any, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Scaled dot-product attention. A padded batch has a mask of T x T, made once for all layers."""
    _, rotation = _rotation(case, model, x)
    attention, real = model.layers[0].self_attn, real_tokens(case, x.device)
    mask = None
    if real is not None:
        mask = real[:, None, None] & torch.ones(case.n, case.n, dtype=torch.bool, device=x.device).tril()
        mask |= torch.eye(case.n, dtype=torch.bool, device=x.device)  # padding sees itself, or it would be NaN

    @torch.no_grad()
    def forward(x: Tensor) -> Tensor:
        return _of_real(attention(x, rotation, mask)[0], real)

    return forward


def _exactly(through: Callable[..., Callable[[Tensor], Tensor]], is_linear: bool) -> Callable[..., Tensor]:
    def reference(case: Case, x: Tensor) -> Tensor:
        model = copy.deepcopy(_layer(case.torch_dtype, x.device, is_linear)).double()
        return through(case, model, x.double())(x.double())

    return reference


_pairs_exactly = _exactly(_through_pairs, True)
_scan_exactly = _exactly(_through_layer, True)
_softmax_exactly = _exactly(_through_softmax, False)


def _released_exactly(case: Case, x: Tensor) -> Tensor:
    return _pairs_exactly(case, x) if case.n <= EXACT_LIMIT else _scan_exactly(case, x)


def _linear_step_exactly(case: Case, ids: Tensor) -> Tensor:
    model = copy.deepcopy(_linear(case.torch_dtype, ids.device, False)).double()
    return _state_step(case, model, ids)(ids)


# --- cases -----------------------------------------------------------------------------------------------------------


def cases(device: str) -> Iterator[Case]:
    dtype = "float32" if device == "cpu" else "bfloat16"
    for batch in BATCHES:
        for n in LENGTHS:
            held = {"state": _megabytes(state_bytes(batch)), "cache": _megabytes(cache_bytes(batch, n, dtype))}
            published = {"published": PUBLISHED[n]} if n in PUBLISHED else {}
            yield Case(
                op="decode",
                shape=(batch, 1),
                dtype=dtype,
                n=n,
                series=f"one token after a text of so many, the bundled models, batch of {batch}",
                bytes=SIZE[dtype] * language_models.linears(BUNDLED) + 2 * state_bytes(batch),
                tolerance=TOLERANCE[dtype],
                inputs=_token,
                reference=_linear_step_exactly,
                options={"context": n, **held, **published},
                quick=(batch, n) == (1, LENGTHS[0]),
            )
    for op, batch in (("layer", 1), ("padded layer", 2)):
        for n in LENGTHS:
            hidden = HEADS * HEAD_DIM
            yield Case(
                op=op,
                shape=(batch, n, hidden),
                dtype=dtype,
                n=n,
                series="a text through one layer" + (", two rows, one of them padded" if batch == 2 else ""),
                bytes=SIZE[dtype] * (2 * batch * n * hidden + 5 * hidden**2),
                # five projections; of each head a state written and read, and a map of q and of k
                flops=batch * n * (10.0 * hidden**2 + 8.0 * HEADS * HEAD_DIM**2),
                tolerance=TOLERANCE[dtype],
                inputs=_text,
                reference=_released_exactly,
                quick=n == LENGTHS[0],
            )


family = Family("decoding", "Linear layers beside softmax in long texts", "tokens", cases, minutes=4.5)
NEEDS = ("transformers",)


@family.implementation("freqrank", needs=NEEDS)
def _freqrank(case: Case, x: Tensor) -> Callable[[Tensor], Tensor]:
    if case.op == "decode":
        return _state_step(case, _linear(case.torch_dtype, x.device, False), x)
    return _through_layer(case, _layer(case.torch_dtype, x.device, True), x)


@family.implementation("with a window of 64 and 4 sinks", needs=NEEDS, reference=_window_step_exactly)
def _windowed(case: Case, x: Tensor) -> Callable[[Tensor], Tensor]:
    if case.op != "decode":
        raise NotApplicable("is shown for one token")
    return _state_step(case, _linear(case.torch_dtype, x.device, True), x)


def _check_cache(case: Case, x: Tensor, limit: dict[str, int]) -> None:
    if case.op != "decode":
        raise NotApplicable("is for one token")
    if cache_bytes(len(x), case.n, case.dtype) > limit[x.device.type]:
        raise NotApplicable(f"is measured with caches up to {limit[x.device.type] >> 30} GiB")


@family.implementation("softmax, cache that grows", needs=NEEDS, reference=_softmax_step_exactly)
def _growing(case: Case, x: Tensor) -> Callable[[Tensor], Tensor]:
    """What `generate` takes by default: keys and values are copied for each token."""
    from transformers import DynamicCache

    _check_cache(case, x, GROWING_LIMIT)
    model = language_models.dense(BUNDLED, case.torch_dtype, x.device)
    return _cached_step(case, model, x, DynamicCache(config=model.config))


@family.implementation("softmax, static cache", needs=NEEDS, reference=_softmax_step_exactly)
def _static(case: Case, x: Tensor) -> Callable[[Tensor], Tensor]:
    """With just enough room: nothing is copied, and nothing is read that is not there."""
    from transformers import StaticCache

    _check_cache(case, x, STATIC_LIMIT)
    model = language_models.dense(BUNDLED, case.torch_dtype, x.device)
    return _cached_step(case, model, x, StaticCache(config=model.config, max_cache_len=case.n + 1))


@family.implementation("all pairs, as released", needs=NEEDS)
def _quadratic(case: Case, x: Tensor) -> Callable[[Tensor], Tensor]:
    limit = QUADRATIC_LIMIT.get(case.op)
    if limit is None:
        raise NotApplicable("is for whole texts")
    if case.n > limit:
        raise NotApplicable(f"is measured up to {limit} tokens")
    return _through_pairs(case, _layer(case.torch_dtype, x.device, True), x)


@family.implementation("softmax (SDPA)", needs=NEEDS, reference=_softmax_exactly)
def _sdpa(case: Case, x: Tensor) -> Callable[[Tensor], Tensor]:
    limit = SOFTMAX_LIMIT.get(case.op)
    if limit is None:
        raise NotApplicable("is for whole texts")
    if case.n > limit:
        raise NotApplicable(f"is measured up to {limit} tokens")
    return _through_softmax(case, _layer(case.torch_dtype, x.device, False), x)
