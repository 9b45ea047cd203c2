"""Inference of linearised models: decoding, padding, caches of every kind, compiled steps, states in files."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path

import freqrank
import pytest
import torch
import torch.nn.functional as F
from freqrank import linearize
from freqrank.attention.dijiang import DiJiangAttention
from freqrank.attention.feature_maps import dct_matrix
from freqrank.models.cache import LinearStateLayer, prepare_cache, state_shapes, state_tensors
from freqrank.models.masks import attention_mask_2d
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeCopyMode, FakeTensorMode
from transformers import (
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from bench.python import language_models
from bench.python.families import decoding
from bench.python.measure import relative_error

VOCABULARY = 61
CLOSE = {"atol": 2e-4, "rtol": 1e-4}
# Each with a head count of its own for keys and values.
OPTIONS = {
    "released": (4, {}),
    "hybrid": (2, {"window": 4, "sinks": 2, "position_table": 16}),
    "window alone": (1, {"feature_map": "none", "window": 4, "sinks": 1}),
    "denominator": (2, {"norm": "denominator", "position_table": 0}),
    "denominator and factors": (1, {"norm": "denominator", "position_table": 8}),
    "decay by token": (4, {"decay": "token", "norm": "rms"}),
    "hedgehog": (2, {"feature_map": "hedgehog", "gate": "none"}),
    "wdcf": (1, {"feature_map": "wdcf", "num_frequencies": 5, "norm": "denominator", "window": 3}),
    "prf": (4, {"feature_map": "prf", "temperature": "pretrained", "norm": "none", "decay": "learned"}),
}
every = pytest.mark.parametrize("name", OPTIONS)


def small_model(kv_heads: int = 2, layers: int = 2, seed: int = 0, family: str = "Llama", **more) -> LlamaForCausalLM:
    """Random weights large enough to make a wrong token visible."""
    torch.manual_seed(seed)
    config_class, model_class = (
        (LlamaConfig, LlamaForCausalLM) if family == "Llama" else (MistralConfig, MistralForCausalLM)
    )
    settings = {"num_attention_heads": 4, "max_position_embeddings": 4096, **more}
    config = config_class(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_key_value_heads=kv_heads, pad_token_id=0, eos_token_id=None, bos_token_id=None, **settings,
    )  # fmt: skip
    model = model_class(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4.0)
    return model


def moved(model: LlamaForCausalLM, seed: int = 0) -> LlamaForCausalLM:
    """The same model, what conversion added moved away from its neutral first values."""
    generator = torch.Generator().manual_seed(seed)
    new = ("_factors", ".norm.", "gate_proj", "mix_proj", "decay.", "feature_map.")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "self_attn" in name and any(part in name for part in new):
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def linear_model(name: str = "released", convert=None, layers: int = 2, **more) -> LlamaForCausalLM:
    kv_heads, options = OPTIONS[name]
    model = small_model(kv_heads, layers, **more)
    linearize(model, layers=convert, **options)
    return moved(model)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    length = max(row.numel() for row in rows)
    missing = [length - row.numel() for row in rows]
    ids = torch.stack([F.pad(row, (n, 0) if side == "left" else (0, n)) for row, n in zip(rows, missing, strict=True)])
    return ids, (ids != 0).long()


def read(model, ids: torch.Tensor, cache=None, **more):
    """Logits, and the cache behind them: the argument for it has two names in the versions of transformers."""
    out = model(ids, past_key_values=DynamicCache(config=model.config) if cache is None else cache, **more)
    return out.logits, out.past_key_values


def addresses(cache) -> list[int]:
    held = [x for layer in cache.layers for x in (*state_tensors(layer.state).values(), layer.count)]
    return [x.data_ptr() for x in held]


# --- decoding --------------------------------------------------------------------------------------------------------


@every
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
@torch.no_grad()
def test_pieces_of_any_length_equal_one_forward(name, data):
    model = _kept_model(name)
    ids = tokens(2, 23, seed=1)
    padding = data.draw(st.integers(0, 9))  # left of the first row
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    cuts = sorted(data.draw(st.sets(st.integers(1, 22), max_size=12)))
    cache, got = DynamicCache(config=model.config), []
    for start, end in zip([0, *cuts], [*cuts, 23], strict=True):
        got.append(read(model, ids[:, start:end], cache, attention_mask=mask[:, :end])[0])
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], expected[mask.bool()], **CLOSE)
    assert cache.get_seq_length() == 23


_models: dict[str, LlamaForCausalLM] = {}


def _kept_model(name: str) -> LlamaForCausalLM:
    """One model for all examples of a property; nothing changes it."""
    if name not in _models:
        _models[name] = linear_model(name)
    return _models[name]


@every
@torch.no_grad()
def test_generation_of_a_padded_batch_equals_one_by_one(name):
    model = _kept_model(name)
    rows = [tokens(1, n, seed=n)[0] for n in (9, 1, 5)]
    ids, mask = padded(rows)
    for how in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        options = {"max_new_tokens": 5, "do_sample": False, **how}
        got = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
        alone = [model.generate(row[None], **options)[:, row.numel() :] for row in rows]
        assert torch.equal(got, torch.cat(alone))


@every
@torch.no_grad()
def test_sampling_repeats_and_needs_no_cache(name):
    model = _kept_model(name)
    ids, mask = padded([tokens(1, n, seed=n)[0] for n in (6, 4)])
    runs = []
    for how in ({}, {}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}):
        torch.manual_seed(3)
        runs.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=True, top_p=0.9, **how))
    assert all(torch.equal(run, runs[0]) for run in runs[1:])
    torch.manual_seed(4)
    assert not torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=True), runs[0])


@every
@pytest.mark.parametrize("convert", [None, [1]])
@torch.no_grad()
def test_decoding_goes_on_after_padding_on_the_right(name, convert):
    model = linear_model(name, convert)
    rows = [tokens(1, n, seed=n)[0] for n in (8, 3)]
    ids, mask = padded(rows, "right")
    new = tokens(2, 3, seed=7)
    _, cache = read(model, ids, attention_mask=mask)
    got = []
    for step in range(3):
        mask = F.pad(mask, (0, 1), value=1)
        got.append(read(model, new[:, step : step + 1], cache, attention_mask=mask)[0])
    for i, row in enumerate(rows):
        whole = model(torch.cat([row, new[i]])[None]).logits[:, -3:]
        torch.testing.assert_close(torch.cat(got, 1)[i : i + 1], whole, **CLOSE)


@pytest.mark.parametrize("name", ["released", "hybrid"])
@torch.no_grad()
def test_100_000_tokens(name):
    model = linear_model(name, layers=1)
    ids = tokens(1, 100_000)
    whole = model.model(ids, use_cache=False).last_hidden_state
    assert whole.isfinite().all()
    cache = DynamicCache(config=model.config)
    model.model(ids[:, :-3], past_key_values=cache)
    steps = [model.model(token, past_key_values=cache).last_hidden_state for token in ids[:, -3:].split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, -3:], **CLOSE)


@every
@torch.no_grad()
def test_memory_does_not_depend_on_the_length(name):
    model = _kept_model(name)
    heads = [m for m in model.modules() if isinstance(m, DiJiangAttention)]

    def held(cache) -> int:
        """Bytes of the memory behind the states: of a view, all that it keeps alive."""
        return sum(x.untyped_storage().nbytes() for y in cache.layers for x in state_tensors(y.state).values())

    sizes = set()
    for length in (1, 5, 300):
        _, cache = read(model, tokens(1, length))
        sizes.add(held(cache))
        read(model, tokens(1, 2), cache)
        sizes.add(held(cache))
        read(model, tokens(1, 1), cache)
        sizes.add(held(cache))
    [size] = sizes
    # 4 bytes a number; the window has a mask and a counter besides
    more = sum(m.options.window + 8 for m in heads if m.options.window)
    assert size == 4 * sum(m.state_elements for m in heads) + more


@every
@torch.no_grad()
def test_shapes_of_states_are_what_layers_make(name):
    model = _kept_model(name)
    _, cache = read(model, tokens(3, 7))
    for layer, block in zip(cache.layers, model.model.layers, strict=True):
        found = {key: tuple(x.shape) for key, x in state_tensors(layer.state).items()}
        assert found == {key: (3, *shape) for key, shape in state_shapes(block.self_attn).items()}


# --- caches ----------------------------------------------------------------------------------------------------------


@every
@torch.no_grad()
def test_batches_of_states(name):
    model = _kept_model(name)
    ids, new = tokens(3, 7), tokens(3, 1, seed=1)
    expected = model(torch.cat([ids, new], 1)).logits[:, -1]
    _, cache = read(model, ids)
    for change, rows in (
        (lambda c: None, [0, 1, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.reset(), None),
    ):
        branch = copy.deepcopy(cache)
        change(branch)
        if rows is None:
            got, want = read(model, ids, branch)[0], model(ids).logits
        else:
            got, want = read(model, new[rows], branch)[0][:, 0], expected[rows]
        torch.testing.assert_close(got, want, **CLOSE)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    want = model(torch.cat([ids[order], new], 1)).logits[:, -1]
    torch.testing.assert_close(read(model, new, cache)[0][:, 0], want, **CLOSE)


@torch.no_grad()
def test_reset_keeps_the_memory_and_takes_any_batch():
    model = linear_model("hybrid")
    _, cache = read(model, tokens(2, 9))
    before = addresses(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = tokens(2, 6, seed=1)
    torch.testing.assert_close(read(model, ids, cache)[0], model(ids).logits, **CLOSE)
    assert addresses(cache) == before
    cache.reset()
    ids = tokens(3, 6, seed=2)
    torch.testing.assert_close(read(model, ids, cache)[0], model(ids).logits, **CLOSE)


@torch.no_grad()
def test_steps_that_the_host_does_not_see_are_counted(monkeypatch):
    """A CUDA graph runs a step's kernels again and none of its Python."""
    model = linear_model("hybrid")
    ids = tokens(2, 6)
    _, cache = read(model, ids[:, :4])
    with monkeypatch.context() as patch:
        patch.setattr("freqrank.models.cache._is_recorded", lambda tensor: True)
        read(model, ids[:, 4:5], cache)
    for layer in cache.layers:  # what the graph does
        layer.count.add_(1)
    assert cache.get_seq_length() == 6
    cache.reset()
    assert cache.get_seq_length() == 0
    read(model, ids[:, :4], cache)
    for layer in cache.layers:
        layer.count.add_(1)
    assert cache.get_seq_length() == 5
    cache.reset()
    ids = tokens(3, 6, seed=2)
    torch.testing.assert_close(read(model, ids, cache)[0], model(ids).logits, **CLOSE)


def test_states_keep_gradients_apart():
    """A state with a gradient is not written over, nor is one that was made in inference mode outside of it."""
    model = linear_model("hybrid")
    ids = tokens(2, 8)
    logits, cache = read(model, ids[:, :4])
    logits = logits.sum() + read(model, ids[:, 4:], cache)[0].sum()
    logits.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(ids).logits.sum().backward()
    for p, g in zip(model.parameters(), got, strict=True):
        torch.testing.assert_close(g, p.grad, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        expected = model(ids).logits
        with torch.inference_mode():
            _, cache = read(model, ids[:, :4])
        rest = [read(model, piece, cache)[0] for piece in ids[:, 4:].split([1, 2, 1], 1)]
        torch.testing.assert_close(torch.cat(rest, 1), expected[:, 4:], **CLOSE)


def test_assistants_are_refused():
    model = linear_model("hybrid")
    for how in ({"assistant_model": small_model()}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(tokens(1, 4), max_new_tokens=4, **how)
    with torch.no_grad():
        _, cache = read(model, tokens(1, 4))
    with pytest.raises(RuntimeError, match="keeps no past to go back to"):
        cache.activate_past_recording()
    with pytest.raises(RuntimeError, match=r"crop\(-2\): .* cannot forget its last tokens"):
        cache.crop(-2)
    assert not cache.is_croppable


@torch.no_grad()
def test_a_cache_of_another_model_is_refused():
    ids = tokens(2, 5)
    model = linear_model("hybrid")
    for other, match in [
        (linear_model("released"), r"layers\[0\] must hold a state of shapes .*window.k.*; got .*another model"),
        (linear_model("window alone"), r"layers\[0\] must hold a state of shapes"),
        (linear_model("hybrid", num_attention_heads=2), r"must hold a state of shapes .*linear.kv.*\(2, 8, 8\)"),
        (linear_model("hybrid", convert=[1]), r"layers\[0\] already holds keys and values of 5 tokens"),
        (linear_model("hybrid", layers=1), r"must have a layer for each of the model's; got 1 layers"),
        (small_model(), r"layers\[0\] already holds keys and values of 5 tokens"),
    ]:
        cache = DynamicCache(config=other.config)
        read(other, ids, cache)
        with pytest.raises(ValueError, match=match):
            read(model, ids[:, :1], cache)
    kv_heads, options = OPTIONS["hybrid"]
    other = small_model(kv_heads)
    linearize(other, **{**options, "gate": "none"})  # a state of the same shapes
    _, cache = read(other, ids)
    for each in (cache, copy.deepcopy(cache)):
        with pytest.raises(ValueError, match=r"must hold the state of a layer with .*gate='released'.*; got .*'none'"):
            read(model, ids[:, :1], each)
    # and the other way round
    _, cache = read(model, ids)
    with pytest.raises(TypeError, match="must hold keys and values where a layer is softmax; got the state of a lin"):
        read(small_model(), ids[:, :1], cache)
    with pytest.raises(ValueError, match=r"a state for each of the 3 sequences of the batch; got 2"):
        read(model, tokens(3, 1), cache)
    cache.layers[0] = object()
    with pytest.raises(TypeError, match="must be a layer for keys and values or a LinearStateLayer; got object"):
        model.model.layers[0].self_attn(torch.zeros(2, 1, 32), (torch.ones(1, 1, 8),) * 2, past_key_values=cache)
    moved_away = copy.deepcopy(model.to("meta"))
    with pytest.raises(ValueError, match="must be on the device of its layer, meta; got cpu"):
        read(moved_away, torch.zeros(2, 1, dtype=torch.long, device="meta"), read(linear_model("hybrid"), ids)[1])


# --- compiled steps --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_recompiling():
    """Every function may be compiled once: any guard that fails is an error."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "convert", "static"),
    [
        ("hybrid", None, False),
        ("denominator", None, True),
        ("decay by token", [0], True),
    ],
)
@torch.no_grad()
def test_a_step_is_compiled_once_for_all_lengths(name, convert, static, no_recompiling):
    model = linear_model(name, convert)
    ids = tokens(2, 32)
    expected = model(ids).logits
    counters.clear()
    step = torch.compile(model, fullgraph=True, backend="eager")
    caches = []
    for _ in range(2):  # another cache is no reason either
        cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
        got = [read(model, ids[:, :9], cache)[0]]
        where = addresses(cache) if convert is None else None
        for i in range(9, 32):
            got.append(read(step, ids[:, i : i + 1], cache, position_ids=torch.tensor([[i]]))[0])
        torch.testing.assert_close(torch.cat(got, 1), expected, **CLOSE)
        assert cache.get_seq_length() == 32
        assert where is None or addresses(cache) == where
        caches.append(cache)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # eager steps and batches go on from there
    cache = caches[0]
    if not static:
        cache.batch_select_indices(torch.tensor([1]))
        rest = tokens(1, 2, seed=5)
        whole = model(torch.cat([ids[1:], rest], 1)).logits[:, -2:]
        torch.testing.assert_close(read(model, rest, cache)[0], whole, **CLOSE)
        assert cache.get_seq_length() == 34


@pytest.mark.parametrize(("convert", "layers", "with_mask"), [([0], 2, False), (None, 1, True)])
@torch.no_grad()
def test_beside_what_grows_a_step_is_compiled_twice(convert, layers, with_mask):
    """Once for the first length, once for all others: keys of softmax layers, a mask that covers all tokens."""
    torch.compiler.reset()
    counters.clear()
    model = linear_model("released", convert, layers)
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask if with_mask else None).logits
    step = torch.compile(model, fullgraph=True, backend="eager")

    def more(start: int, end: int) -> dict[str, torch.Tensor]:
        if with_mask:
            return {"attention_mask": mask[:, :end].contiguous()}
        return {"position_ids": torch.arange(start, end)[None]}

    cache = DynamicCache(config=model.config)
    got = [read(model, ids[:, :9], cache, **more(0, 9))[0]]
    got += [read(step, ids[:, i : i + 1], cache, **more(i, i + 1))[0] for i in range(9, 30)]
    torch.testing.assert_close(torch.cat(got, 1)[:, 3:], expected[:, 3:], **CLOSE)
    assert counters["stats"]["unique_graphs"] == 2
    torch.compiler.reset()


def compiled_generate(model, ids: torch.Tensor, fullgraph: bool, **options) -> torch.Tensor:
    """What ``generate`` does with a static cache on a GPU, where it compiles by itself."""
    compiled = CompileConfig(backend="eager", mode=None, fullgraph=fullgraph)
    compiled._compile_all_devices = True
    return model.generate(ids, cache_implementation="static", compile_config=compiled, do_sample=False, **options)


@pytest.mark.parametrize(("name", "convert"), [("released", None), ("hybrid", [1])])
@torch.no_grad()
def test_generate_compiles_steps_in_a_static_cache(name, convert, no_recompiling):
    model = linear_model(name, convert)
    ids, mask = padded([tokens(1, n, seed=n)[0] for n in (6, 4)])
    options = {"attention_mask": mask, "max_new_tokens": 24}
    expected = model.generate(ids, do_sample=False, **options)
    counters.clear()
    assert torch.equal(compiled_generate(model, ids, fullgraph=True, **options), expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.long
@pytest.mark.parametrize(("name", "convert"), [("released", None), ("hybrid", [1])])
@torch.no_grad()
def test_generate_compiles_pieces_of_a_prompt_too(name, convert):
    torch.compiler.reset()
    model = linear_model(name, convert)
    ids, mask = padded([tokens(1, n, seed=n)[0] for n in (6, 4)])
    options = {"attention_mask": mask, "max_new_tokens": 8}
    expected = model.generate(ids, do_sample=False, **options)
    got = compiled_generate(model, ids, fullgraph=False, prefill_chunk_size=4, **options)
    assert torch.equal(got, expected)
    torch.compiler.reset()


@torch.no_grad()
def test_a_compiled_model_reads_a_prompt_into_a_prepared_cache():
    torch.compiler.reset()
    model = linear_model(layers=1)
    ids = tokens(2, 9)
    cache = StaticCache(config=model.config, max_cache_len=16)
    prepare_cache(cache, model, 2)
    before = addresses(cache)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(read(compiled, ids, cache)[0], model(ids).logits, **CLOSE)
    assert addresses(cache) == before
    assert cache.get_seq_length() == 9
    torch.compiler.reset()


@pytest.mark.long
@torch.no_grad()
def test_a_compiled_model_reads_a_prompt_into_a_new_cache():
    torch.compiler.reset()
    model = linear_model("hybrid", layers=1)
    ids = tokens(2, 9)
    expected = model(ids).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cache = DynamicCache(config=model.config)
    torch.testing.assert_close(read(compiled, ids[:, :6], cache)[0], expected[:, :6], **CLOSE)
    torch.testing.assert_close(read(compiled, ids[:, 6:], cache)[0], expected[:, 6:], **CLOSE)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="prepare_cache before"):
        read(compiled, ids, StaticCache(config=model.config, max_cache_len=16))
    torch.compiler.reset()


@pytest.mark.long
@torch.no_grad()
def test_steps_compiled_by_inductor():
    """What the default backend makes of a step: states written in place, the same text."""
    torch.compiler.reset()
    model = linear_model("hybrid", layers=1)
    ids = tokens(2, 16)
    expected = model(ids).logits
    cache = DynamicCache(config=model.config)
    got = [read(model, ids[:, :9], cache)[0]]
    before = addresses(cache)
    step = torch.compile(model, fullgraph=True)
    got += [read(step, ids[:, i : i + 1], cache, position_ids=torch.tensor([[i]]))[0] for i in range(9, 16)]
    torch.testing.assert_close(torch.cat(got, 1), expected, **CLOSE)
    assert addresses(cache) == before
    torch.compiler.reset()


@every
@torch.no_grad()
def test_a_step_leaves_states_where_they_are_and_never_asks_the_device(name):
    model = _kept_model(name)
    _, cache = read(model, tokens(2, 9))
    before = addresses(cache)
    for position in range(9, 15):
        read(model, tokens(2, 1, seed=position), cache, position_ids=torch.tensor([[position]]))
    assert addresses(cache) == before
    # Tensors without values: to ask for one is an error. That includes all that would make the host wait for a GPU.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        fake = copy.deepcopy(model)
    with mode:
        prepared = DynamicCache(config=model.config)
        prepare_cache(prepared, fake, 2)
        for position in range(3):
            ids, positions = (mode.from_tensor(x) for x in (tokens(2, 1), torch.tensor([[position]])))
            logits, _ = read(fake, ids, prepared, position_ids=positions)
        assert logits.shape == (2, 1, VOCABULARY)
        with pytest.raises(DataDependentOutputException):
            logits.max().item()


def test_compiled_steps_do_not_make_the_cosines_again():
    torch.compiler.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: x @ dct_matrix(8, x.device), fullgraph=True, backend=keep)
    x = torch.randn(3, 8)
    torch.testing.assert_close(compiled(x), x @ dct_matrix(8, x.device))
    [graph] = graphs
    assert {str(node.target) for node in graph.graph.nodes if node.op.startswith("call")} == {
        "<built-in function matmul>"
    }
    torch.compiler.reset()


def test_masks_start_at_a_number_or_a_tensor():
    generator = torch.Generator().manual_seed(0)
    for length, columns in ((3, 7), (1, 5), (2, 2)):
        mask = torch.rand(2, 1, length, columns, generator=generator) < 0.5
        for start in range(columns + 2):
            want = attention_mask_2d(mask, length, start)
            assert torch.equal(attention_mask_2d(mask, length, torch.tensor(start)), want)
            additive = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
            assert torch.equal(attention_mask_2d(additive, length, torch.tensor(start)), want)


# --- states in files -------------------------------------------------------------------------------------------------


def all_tensors(cache) -> list[torch.Tensor]:
    held = []
    for layer in cache.layers:
        is_linear = isinstance(layer, LinearStateLayer)
        held += list(state_tensors(layer.state).values()) if is_linear else [layer.keys, layer.values]
    return held


@pytest.mark.parametrize(
    ("name", "convert", "family"),
    [*((name, None, "Llama") for name in OPTIONS), ("hybrid", [1], "Llama"), ("released", [0], "Mistral")],
)
@torch.no_grad()
def test_a_state_from_a_file_goes_on_with_the_same_bits(name, convert, family, tmp_path):
    more = {"sliding_window": 4} if family == "Mistral" else {}
    model = linear_model(name, convert, family=family, **more)
    _, cache = read(model, tokens(2, 9))
    read(model, tokens(2, 1, seed=2), cache)
    path = freqrank.save_state(cache, tmp_path / "folder" / "prompt.safetensors", model)
    assert [file.name for file in path.parent.iterdir()] == ["prompt.safetensors"]
    again = linear_model(name, convert, family=family, **more)  # as another process would have it
    loaded = freqrank.load_state(path, again)
    assert loaded.get_seq_length() == 10
    for a, b in zip(all_tensors(cache), all_tensors(loaded), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    for piece in tokens(2, 7, seed=3).split([1, 1, 4, 1], 1):
        assert torch.equal(read(model, piece, cache)[0], read(again, piece, loaded)[0])
    # one prompt, three texts that begin with it
    prompt, branches = tokens(1, 6), tokens(3, 4, seed=4)
    freqrank.save_state(read(model, prompt)[1], path, model)
    loaded = freqrank.load_state(path, model)
    loaded.batch_repeat_interleave(3)
    whole = model(torch.cat([prompt.expand(3, -1), branches], 1)).logits[:, 6:]
    torch.testing.assert_close(read(model, branches, loaded)[0], whole, **CLOSE)


@torch.no_grad()
def test_generate_goes_on_from_a_file(tmp_path):
    model = linear_model("hybrid", [1])
    prompt, question = tokens(1, 8), tokens(1, 3, seed=1)
    path = freqrank.save_state(read(model, prompt)[1], tmp_path / "prompt.safetensors", model)
    ids = torch.cat([prompt, question], 1)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    cache = freqrank.load_state(path, model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache), expected)
    assert cache.get_seq_length() == 16  # the last token was not read


@torch.no_grad()
def test_a_state_of_another_model_is_refused(tmp_path):
    model = linear_model("hybrid")
    _, cache = read(model, tokens(2, 5))
    path = freqrank.save_state(cache, tmp_path / "state.safetensors", model)
    other_weights = moved(linear_model("hybrid"), seed=1)
    for other, match in [
        (linear_model("hybrid", layers=3), "it has 2 layers, this one 3"),
        (linear_model("released"), r"its layer 0 is .*'window': 4.*, here it is .*'window': 0"),
        (linear_model("hybrid", [0]), "its layer 1 is .*, here it is {'softmax': 'LlamaAttention'}"),
        (linear_model("hybrid", num_attention_heads=2), r"it has heads \[4, 2\], this one \[2, 2\]"),
        (linear_model("hybrid").to(torch.bfloat16), "it has dtype float32, this one bfloat16"),
        (linear_model("hybrid", seed=1), "layers and options are the same, the weights are not"),
        (other_weights, "layers and options are the same, the weights are not"),
        (
            linear_model("hybrid", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
            "it has positions .*10000.*, this one .*500000",
        ),
    ]:
        with pytest.raises(ValueError, match=f"was saved from another model: {match}"):
            freqrank.load_state(path, other)
    with pytest.raises(ValueError, match="weights are offloaded"):
        freqrank.load_state(path, copy.deepcopy(model).to("meta"))
    model.lm_head.weight.zero_()  # behind all states
    freqrank.load_state(path, model)


@torch.no_grad()
def test_files_that_are_no_states_and_caches_that_cannot_be_saved(tmp_path):
    model = linear_model("hybrid", [1])
    _, cache = read(model, tokens(2, 5))
    path = freqrank.save_state(cache, tmp_path / "state.safetensors", model)
    before = path.read_bytes()
    for wrong, error, match in [
        ([], TypeError, "cache must be a transformers Cache made of layers; got list"),
        (DynamicCache(), ValueError, "a layer for each of the model's 2; got 0: call the model"),
        (DynamicCache(config=model.config), ValueError, r"layers\[0\] is empty: call the model"),
        (
            read(small_model(), tokens(2, 5))[1],
            ValueError,
            r"layers\[1\] must be a LinearStateLayer, as the model's layer is",
        ),
        (read(linear_model("hybrid"), tokens(2, 5))[1], ValueError, r"layers\[0\] must be keys and values"),
        (read(model, tokens(2, 5), StaticCache(config=model.config, max_cache_len=9))[1], TypeError, "a DynamicCache"),
        (
            read(linear_model("hybrid", [1], num_attention_heads=2), tokens(1, 5))[1],
            ValueError,
            r"must hold a state of shapes .*; got",
        ),
    ]:
        with pytest.raises(error, match=match):
            freqrank.save_state(wrong, path, model)
    cache.reset()
    with pytest.raises(ValueError, match=r"layers\[0\] is empty: call the model"):
        freqrank.save_state(cache, path, model)
    for call in (lambda m: freqrank.save_state(cache, path, m), lambda m: freqrank.load_state(path, m)):
        with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel; got int"):
            call(3)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1

    with pytest.raises(FileNotFoundError):
        freqrank.load_state(tmp_path / "nothing", model)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(before[:-1])
    with pytest.raises(ValueError, match="is no state that save_state wrote"):
        freqrank.load_state(bad, model)
    tensors = load_file(path)
    save_file(tensors, bad)
    with pytest.raises(ValueError, match="has no entry 'freqrank_state'"):
        freqrank.load_state(bad, model)
    with safe_open(path, framework="pt") as file:
        entry = file.metadata()["freqrank_state"]
    save_file({key: x for key, x in tensors.items() if key != "1.window.k"}, bad, {"freqrank_state": entry})
    with pytest.raises(
        ValueError, match=r"is damaged: layer 1 has the tensors linear.kv, .*, and .*window.k.* are needed"
    ):
        freqrank.load_state(bad, model)
    save_file(tensors, bad, {"freqrank_state": json.dumps({**json.loads(entry), "format": 2})})
    with pytest.raises(ValueError, match="has format 2, and this version reads format 1"):
        freqrank.load_state(bad, model)


@torch.no_grad()
def test_a_disk_that_is_full_leaves_the_older_file(tmp_path, monkeypatch):
    model = linear_model()
    _, cache = read(model, tokens(1, 5))
    path = freqrank.save_state(cache, tmp_path / "state.safetensors", model)
    before = path.read_bytes()

    def full(*args, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("freqrank.models.prompts.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        freqrank.save_state(cache, path, model)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_what_the_page_on_inference_says_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = linear_model(layers=1)
    freqrank.save_model(model, "path/to/linear")
    page = (Path(__file__).parent.parent / "docs" / "inference.md").read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["cache"].get_seq_length() == 12
    assert names["branch"].get_seq_length() == 13  # of 14 tokens the last was not read
    torch.compiler.reset()


# --- what is measured ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_bench_counts_the_bytes_that_caches_hold():
    token = torch.zeros(1, 1, dtype=torch.long)
    for kind, batch, context in (("state", 1, 20), ("state", 3, 20), ("cache", 3, 20), ("cache", 1, 7)):
        model = (
            decoding._linear(torch.float32, token.device, False)
            if kind == "state"
            else language_models.dense(language_models.BUNDLED, torch.float32, token.device)
        )
        _, cache = read(model, tokens(batch, context))
        got = sum(x.untyped_storage().nbytes() for x in all_tensors(cache))
        assert got == (
            decoding.state_bytes(batch) if kind == "state" else decoding.cache_bytes(batch, context, "float32")
        )


@pytest.mark.parametrize("op", ["layer", "padded layer"])
def test_bench_compares_with_the_released_pairs(op):
    case = next(case for case in decoding.cases("cpu") if case.op == op)
    case = dataclasses.replace(case, shape=(case.shape[0], 37, case.shape[2]), n=37)
    [x] = case.inputs(case, torch.Generator().manual_seed(0), torch.device("cpu"))
    pairs, scan = decoding._pairs_exactly(case, x), decoding._scan_exactly(case, x)
    assert relative_error(scan, pairs) < 1e-6  # frequencies and decay are float32
    assert decoding.real_tokens(case, x.device) is None or (pairs[0, : 37 // 4] == 0).all()
    for prepare in (decoding._freqrank, decoding._quadratic):
        assert relative_error(prepare(case, x)(x), pairs) < case.tolerance
    softmax = decoding._softmax_exactly(case, x)
    assert relative_error(decoding._sdpa(case, x)(x), softmax) < case.tolerance
    assert relative_error(softmax, pairs) > 0.1


def test_bench_puts_the_published_ratio_beside_its_length():
    cases = [case for case in decoding.cases("cpu") if case.op == "decode"]
    assert [case.options["context"] for case in cases if case.shape[0] == 8] == [1024 << i for i in range(7)]
    found = {(case.n, case.options["published"]) for case in cases if "published" in case.options}
    assert found == {(2048, "2.2x"), (4096, "3.8x"), (8192, "7.3x")}
    assert all(f"batch of {case.shape[0]}" in case.series for case in cases)
