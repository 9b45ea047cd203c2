"""Decoding steps of linear layers on a GPU: recorded in CUDA graphs, compiled, and never waiting for the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from freqrank.attention.dijiang import AttentionState, DiJiangAttention, DiJiangOptions
from on_device import DEVICE, assert_waits_for_nothing, needs_cuda, skip_module_without_device

skip_module_without_device()
pytestmark = pytest.mark.gpu

OPTIONS: dict[str, dict[str, Any]] = {
    "released": {},
    "hybrid": {"window": 8, "sinks": 2, "decay": "token", "gate": "open"},
    "denominator": {"norm": "denominator", "position_table": 0, "feature_map": "hedgehog"},
    "window alone": {"feature_map": "none", "window": 8, "sinks": 1},
}
every = pytest.mark.parametrize("name", OPTIONS)
HEADS, KEY_HEADS, DIM, HIDDEN = 4, 2, 64, 256
CLOSE = {"atol": 2e-3, "rtol": 2e-3}


# --- the layer alone: needs torch and nothing else -------------------------------------------------------------------


def tensors(state: AttentionState) -> list[torch.Tensor]:
    return [x for part in state if part is not None for x in part if x is not None]


class Layer:
    """A layer, a text of random projections for it, and the state after its first tokens."""

    def __init__(self, name: str, dtype: torch.dtype, batch: int = 2, time: int = 40, prompt: int = 30) -> None:
        torch.manual_seed(0)
        self.layer = DiJiangAttention(
            hidden_size=HIDDEN, num_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=DIM,
            options=DiJiangOptions(**OPTIONS[name]), device=torch.device(DEVICE), dtype=dtype,
        )  # fmt: skip
        self.layer.reset_parameters()
        if hasattr(self.layer, "mix_proj"):  # the scan counts as much as the window
            self.layer.mix_proj.bias.data.zero_()
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(batch, time, *shape, generator=generator).to(DEVICE, dtype)

        self.inputs = [normal(HIDDEN), normal(HEADS, DIM), normal(KEY_HEADS, DIM), normal(KEY_HEADS, DIM)]
        self.positions = torch.arange(time, device=DEVICE).expand(batch, -1).contiguous()
        self.time, self.prompt = time, prompt

    def at(self, start: int, end: int) -> list[torch.Tensor]:
        return [x[:, start:end].contiguous() for x in (*self.inputs, self.positions)]

    @torch.no_grad()
    def whole(self) -> torch.Tensor:
        return self.layer.mix(*self.inputs, self.positions)[0]

    @torch.no_grad()
    def state(self) -> AttentionState:
        _, state = self.layer.mix(*self.at(0, self.prompt), output_state=True)
        parts = (None if p is None else type(p)(*(x if x is None else x.clone() for x in p)) for p in state)
        return AttentionState(*parts)

    @torch.no_grad()
    def step(self, state: AttentionState, inputs: list[torch.Tensor]) -> torch.Tensor:
        """One token, the state written in its place."""
        o, new = self.layer.mix(*inputs, state=state, output_state=True)
        for old, x in zip(tensors(state), tensors(new), strict=True):
            if x is not old:
                old.copy_(x)
        return o


@every
def test_steps_equal_the_whole(name):
    case = Layer(name, torch.float32)
    state, whole = case.state(), case.whole()
    for i in range(case.prompt, case.time):
        torch.testing.assert_close(case.step(state, case.at(i, i + 1)), whole[:, i : i + 1], **CLOSE)


@needs_cuda
@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_recorded_steps(name, dtype):
    case = Layer(name, dtype)
    inputs, state = case.at(case.prompt, case.prompt + 1), case.state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.step(case.state(), inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.step(state, inputs)
    for x, y in zip(tensors(state), tensors(case.state()), strict=True):
        x.copy_(y)
    eager = case.state()
    for i in range(case.prompt, case.time):
        for x, y in zip(inputs, case.at(i, i + 1), strict=True):
            x.copy_(y)
        graph.replay()
        assert torch.equal(captured, case.step(eager, case.at(i, i + 1)))
        assert all(torch.equal(x, y) for x, y in zip(tensors(state), tensors(eager), strict=True))


@needs_cuda
@every
def test_a_step_waits_for_nothing(name):
    case = Layer(name, torch.bfloat16)
    state, inputs = case.state(), case.at(case.prompt, case.prompt + 1)
    assert_waits_for_nothing(lambda: case.step(state, inputs))


# --- whole models: where transformers is installed -------------------------------------------------------------------


def model_and_text(name: str, convert: list[int] | None = None) -> tuple[Any, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    from freqrank import linearize

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    linearize(model, layers=convert, **OPTIONS[name])
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    return model.to(DEVICE), ids.to(DEVICE)


def new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, cache: Any, **more: Any) -> torch.Tensor:
    return model(ids, past_key_values=cache, **more).logits


@every
def test_a_model_decodes_what_it_reads(name):
    model, ids = model_and_text(name)
    with torch.no_grad():
        whole = model(ids).logits
    cache = new_cache(model)
    read(model, ids[:, :30], cache)
    for i in range(30, 40):
        got = read(model, ids[:, i : i + 1], cache, position_ids=torch.tensor([[i]], device=DEVICE))
        torch.testing.assert_close(got, whole[:, i : i + 1], **CLOSE)


@needs_cuda
@every
def test_recorded_steps_of_a_model(name):
    model, ids = model_and_text(name)
    cache = new_cache(model)
    read(model, ids[:, :30], cache)
    token, position = ids[:, 30:31].clone(), torch.full((1, 1), 30, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        read(model, token, copy.deepcopy(cache), position_ids=position)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = read(model, token, cache, position_ids=position)
    for seed in range(2):  # the graph serves another text too: reset() leaves states where they are
        cache.reset()
        text = ids.roll(seed, 1)
        read(model, text[:, :30], cache)
        eager = copy.deepcopy(cache)
        for i in range(30, 40):
            token.copy_(text[:, i : i + 1])
            position.fill_(i)
            graph.replay()
            want = read(model, text[:, i : i + 1], eager, position_ids=torch.tensor([[i]], device=DEVICE))
            assert torch.equal(captured, want)
        assert cache.get_seq_length() == eager.get_seq_length() == 40


@needs_cuda
@every
def test_a_compiled_model_is_recorded(name):
    pytest.importorskip("triton")
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model, ids = model_and_text(name)
    with torch.no_grad():
        whole = model(ids).logits
    cache = new_cache(model)
    read(model, ids[:, :30], cache)
    step = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(30, 40):
            position = torch.tensor([[i]], device=DEVICE)
            got = read(step, ids[:, i : i + 1], cache, position_ids=position).clone()
            torch.testing.assert_close(got, whole[:, i : i + 1], **CLOSE)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert cache.get_seq_length() == 40
    torch.compiler.reset()


@needs_cuda
@pytest.mark.parametrize(("name", "convert"), [("released", None), ("hybrid", None), ("hybrid", [1])])
def test_generate_compiles_with_a_static_cache(name, convert):
    pytest.importorskip("triton")
    torch.compiler.reset()
    model, ids = model_and_text(name, convert)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids[:, :20], **options)
    for how in ({}, {"prefill_chunk_size": 7}):
        assert torch.equal(model.generate(ids[:, :20], cache_implementation="static", **how, **options), expected)
    torch.compiler.reset()
