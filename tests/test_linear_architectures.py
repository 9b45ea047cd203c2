"""Every architecture that linearize takes: the layer against float64, generation, training, saving, compression."""

from __future__ import annotations

import copy
import math

import freqrank
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from freqrank import distill, linearize
from freqrank.attention.dijiang import DiJiangAttention
from freqrank.lowrank.modules import Int8LowRankLinear, LowRankLinear
from freqrank.models.architectures import find_architecture
from freqrank.models.linear_attention_layers import ATTENTION_CLASSES, LinearizedAttention
from scipy.fft import idct
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache, masking_utils
from transformers.pytorch_utils import Conv1D

VOCAB, LAYERS = 61, 2
COMMON = {"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 64}
COMMON |= {"hidden_size": 32, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
GATED = COMMON | {"intermediate_size": 40, "num_key_value_heads": 2}
NEOX = COMMON | {"intermediate_size": 40}
OPT = COMMON | {"ffn_dim": 40}
CASES = {
    "llama": ("Llama", GATED | {"attention_bias": True}),
    "mistral": ("Mistral", GATED | {"sliding_window": 16}),
    "qwen2": ("Qwen2", GATED | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("Qwen3", GATED | {"head_dim": 16}),
    "gemma": ("Gemma", GATED | {"num_key_value_heads": 1, "head_dim": 12}),
    "phi3": ("Phi3", GATED | {"partial_rotary_factor": 0.5}),
    "gpt-neox": ("GPTNeoX", NEOX | {"rotary_pct": 0.25}),
    "gpt-neox-sequential": ("GPTNeoX", NEOX | {"rotary_pct": 1.0, "use_parallel_residual": False}),
    "opt": ("OPT", OPT | {"word_embed_proj_dim": 32}),
    "opt-350m": ("OPT", OPT | {"word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "gpt2": ("GPT2", COMMON | {"n_inner": 40, "scale_attn_by_inverse_layer_idx": True}),
}
OUTPUT = {"GPTNeoX": "dense", "OPT": "out_proj", "GPT2": "c_proj"}  # o_proj elsewhere
MIXTURES = {
    "released": {},
    "window": {"window": 4, "sinks": 2},
    "window alone": {"feature_map": "none", "window": 8},
}
every = pytest.mark.parametrize("case", CASES)
mixture = pytest.mark.parametrize("options", MIXTURES.values(), ids=MIXTURES)
CLOSE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()


def build(case: str, dtype: torch.dtype = torch.float32, **more):
    """A small random model with biases and norms of its own, whose logits are far from uniform."""
    family, options = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options | more)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.2)
            elif p.dim() == 1:
                p.uniform_(0.5, 1.5)
            else:
                p.mul_(4.0)
    return model


def attentions(model) -> list[nn.Module]:
    architecture = find_architecture(model)
    return [architecture.attention(index) for index in range(len(architecture.blocks))]


def converted(case: str, dtype: torch.dtype = torch.float32, convert=None, implementation=None, **options):
    """A linearised model whose new tensors are all away from their neutral first values."""
    model = build(case, dtype)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    linearize(model, layers=convert, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for attention in attentions(model):
            if isinstance(attention, DiJiangAttention):
                for name, p in attention.named_parameters():
                    if name.startswith(("query_factors", "key_factors", "norm.", "gate_proj", "mix_proj")):
                        p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(*lengths: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    rows = [tokens(1, length, seed=length) for length in lengths]
    ids = torch.cat([F.pad(row, (max(lengths) - row.shape[1], 0)) for row in rows])
    return rows, ids, (ids != 0).long()


def heads_of(model, index: int, ids: torch.Tensor):
    """What the pretrained attention of a layer reads, and the q, k, v [B, heads, T, D] and scale it attends with."""
    seen = {}

    def capture(module, q, k, v, mask, scaling=None, **more):
        if module is attentions(model)[index]:
            seen.update(q=q, k=k, v=v, scale=scaling)
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(
            module, q, k, v, mask, scaling=scaling, **more
        )

    def inputs(module, args, kwargs):
        seen.update(args=args, kwargs=kwargs, x=args[0] if args else kwargs["hidden_states"])

    AttentionInterface.register("test_capture", capture)
    AttentionMaskInterface.register("test_capture", masking_utils.sdpa_mask)
    model.set_attn_implementation("test_capture")
    handle = attentions(model)[index].register_forward_pre_hook(inputs, with_kwargs=True)
    model(ids, use_cache=False)
    handle.remove()
    model.set_attn_implementation("sdpa")
    return seen


def released(layer: DiJiangAttention, output: nn.Module, seen: dict) -> np.ndarray:
    """The released forward pass in float64, from the pretrained heads: scores of D1 phi(q) and D2 phi(k), no scan."""
    x, q, k, v = (seen[name].double().numpy() for name in ("x", "q", "k", "v"))
    parameters = {name: p.detach().double().numpy() for name, p in layer.named_parameters()}
    batch, heads, time, dim = q.shape
    scales = layer.feature_map.scales.double().numpy()

    def phi(h: np.ndarray) -> np.ndarray:
        e = idct(h, norm="ortho") * scales
        e = np.exp(e - e.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    gamma = np.exp(layer.decay.log_decay.double().numpy())
    group = heads // len(gamma)
    o = np.zeros((batch, time, heads, dim))
    for h in range(heads):
        j = h // group
        d1 = parameters["query_factors.weight"][h, :time] * gamma[j] ** np.arange(time)
        d2 = parameters["key_factors.weight"][j, :time] * gamma[j] ** -np.arange(time)
        query = phi(q[:, h] * (seen["scale"] * dim**0.5))  # the map takes q as exp(q . k / sqrt(dim)) does
        scores = np.einsum("i,bic,j,bjc->bij", d1, query, d2, phi(k[:, j]))
        o[:, :, h] = np.tril(scores) @ v[:, j]
    grouped = o.reshape(batch, time, dim, heads)  # as many groups as a head has channels
    grouped = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 1e-5)
    o = grouped.reshape(batch, time, -1) * parameters["norm.weight"] + parameters["norm.bias"]
    gate = x @ parameters["gate_proj.weight"].T
    o = o * gate / (1 + np.exp(-gate))
    weight = output.weight.detach().double().numpy()
    o = o @ (weight if isinstance(output, Conv1D) else weight.T)
    return o if output.bias is None else o + output.bias.detach().double().numpy()


# --- the layer --------------------------------------------------------------------------------------------------------


@every
@torch.no_grad()
def test_layer_equals_the_released_quadratic_form(case):
    model = build(case, torch.float64)
    seen = heads_of(model, 1, tokens(2, 37))
    layer = attentions(converted(case, torch.float64))[1]
    got, weights = layer(*seen["args"], **seen["kwargs"])
    assert weights is None
    output = layer.get_submodule(OUTPUT.get(CASES[case][0], "o_proj"))
    expected = released(layer, output, seen)
    assert np.linalg.norm(got.numpy() - expected) <= 1e-9 * np.linalg.norm(expected)
    assert len({expected.shape, seen["x"].shape}) == 1


@every
@torch.no_grad()
def test_a_window_over_the_whole_text_is_the_pretrained_model(case):
    """No linear part and a window as long as the text: what is left is the projections, rotation and scale."""
    rows, ids, mask = left_padded(16, 5)
    dense, model = build(case), build(case)
    linearize(model, feature_map="none", window=16)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # GPT-2 alone counts padding if it is not told otherwise
    expected = dense(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask == 1], expected[mask == 1], **CLOSE)
    torch.testing.assert_close(model(rows[1]).logits, dense(rows[1]).logits, **CLOSE)


@every
def test_children_keep_names_values_and_modules(case):
    dense, model = build(case), build(case)
    report = linearize(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in dense.state_dict().items())
    for attention, layer in zip(attentions(dense), attentions(model), strict=True):
        children = dict(layer.named_children())
        assert [*dict(attention.named_children())] == [n for n in children if n in dict(attention.named_children())]
        assert type(layer) is ATTENTION_CLASSES[type(attention).__name__]
        assert not layer.training
    state = sum(layer.num_key_value_heads * layer.head_dim**2 for layer in attentions(model))
    assert report.state_elements == state
    assert report.parameters_after == sum(p.numel() for p in model.parameters())


# --- caches, padding and generation -----------------------------------------------------------------------------------


@every
@mixture
@torch.no_grad()
def test_pieces_equal_one_forward(case, options):
    model = converted(case, position_table=12, **options)
    ids = tokens(2, 21)
    expected = model(ids).logits
    assert expected.isfinite().all()
    for pieces in ([1] * 21, [9, 1, 1, 10]):
        cache = DynamicCache(config=model.config)
        got = [model(piece, past_key_values=cache).logits for piece in ids.split(pieces, 1)]
        torch.testing.assert_close(torch.cat(got, 1), expected, **CLOSE)
        assert cache.get_seq_length() == 21


@every
@mixture
@torch.no_grad()
def test_generation(case, options):
    """Greedy tokens are those of a forward pass without a cache; a padded batch gives each row's own."""
    model = converted(case, **options)
    rows, ids, mask = left_padded(9, 2)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    beams = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, num_beams=3)
    for i, row in enumerate(rows):
        text = row
        for _ in range(6):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(got[i, ids.shape[1] :], text[0, row.shape[1] :])
        alone = model.generate(row, max_new_tokens=4, do_sample=False, num_beams=3)
        assert torch.equal(beams[i, ids.shape[1] :], alone[0, row.shape[1] :])


@every
@torch.no_grad()
def test_static_cache_and_16_bits(case):
    model = converted(case, norm_groups="heads")
    ids = tokens(2, 12)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    logits = model(ids).logits
    assert (model.bfloat16()(ids).logits.float() - logits).norm() <= 0.03 * logits.norm()


@every
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("convert", [[0], [1]])
@torch.no_grad()
def test_beside_softmax_layers(case, implementation, convert):
    model = converted(case, convert=convert, implementation=implementation)
    assert [isinstance(layer, DiJiangAttention) for layer in attentions(model)] == [i in convert for i in range(LAYERS)]
    assert model.config._attn_implementation == implementation
    rows, ids, mask = left_padded(19, 6)  # longer than Mistral's and Qwen2's windows
    got = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(got[i, -row.shape[1] :], model(row).logits[0], **CLOSE)
    cache = DynamicCache(config=model.config)
    for start, end in ((0, 8), (8, 18), (18, 19)):
        piece = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
        real = mask[:, start:end] == 1
        torch.testing.assert_close(piece[real], got[:, start:end][real], **CLOSE)


@every
@torch.no_grad()
def test_no_square_mask_is_built(case, monkeypatch):
    model = converted(case)
    seen = []
    forward = DiJiangAttention.mix

    def spy(self, *args, mask=None, **more):
        seen.append(None if mask is None else tuple(mask.shape))
        return forward(self, *args, mask=mask, **more)

    monkeypatch.setattr(DiJiangAttention, "mix", spy)
    for name in ("sdpa_mask", "eager_mask"):
        monkeypatch.setattr(masking_utils, name, None)
    _, ids, mask = left_padded(9, 4)
    model(ids, attention_mask=mask)
    model(ids)
    assert seen == [(2, 9)] * LAYERS + [None] * LAYERS


@every
@torch.no_grad()
def test_packed_sequences_stay_apart(case):
    model = converted(case)
    rows = [tokens(1, n, seed=n) for n in (7, 3, 6)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    got = model(torch.cat(rows, 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, torch.cat([model(row).logits for row in rows], 1), **CLOSE)


@torch.no_grad()
def test_queries_of_sinks_go_by_the_frequencies_of_the_text():
    """LongRoPE chooses frequencies by the largest position: to rotate a few queries early must not change them."""
    short, long = [1.0] * 4, [1.5, 2.0, 3.0, 4.0]
    rope = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "rope_theta": 1e4}
    rope |= {"original_max_position_embeddings": 16}
    model = build("phi3", rope_parameters=rope, partial_rotary_factor=1.0, original_max_position_embeddings=16)
    plain = copy.deepcopy(model)
    linearize(model, window=4, sinks=2)
    for length in (12, 20):
        ids = tokens(1, length)
        model(ids, use_cache=False)
        plain(ids, use_cache=False)
        assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    unscaled = 1e4 ** -(torch.arange(4) / 4)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, unscaled / torch.tensor(long))


# --- training, saving, compression ------------------------------------------------------------------------------------


@every
def test_trained_saved_and_loaded(case, tmp_path):
    model = build(case)
    linearize(model, norm_groups="heads", position_table=32)
    ids = tokens(4, 16)
    report = distill(model, build(case), [ids], recipe="distill", steps=9, lr=6e-3, hidden_weight=0.1, progress=False)
    assert report.losses[-1] < 0.92 * report.losses[0]
    freqrank.save_model(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert [type(layer) for layer in attentions(loaded)] == [type(layer) for layer in attentions(model)]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded.generate(ids[:1], max_new_tokens=4), model.generate(ids[:1], max_new_tokens=4))
    model.train()(ids, labels=ids, use_cache=False).loss.backward()
    zero = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert zero == []


@every
@torch.no_grad()
def test_compressed_models_are_linearised(case, tmp_path):
    dense = build(case)
    freqrank.compress(dense, tokens(12, 24), ratio=0.3, share="both", group_size=2, progress=False)
    model, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    linearize(model)
    freqrank.merge(plain)
    linearize(plain)
    ids = tokens(2, 14)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, **CLOSE)
    for before, after in zip(attentions(dense), attentions(model), strict=True):
        for name, child in before.named_children():
            if isinstance(child, LowRankLinear):
                assert after.get_submodule(name).siblings == child.siblings
    separate = "q_proj" in dict(attentions(model)[0].named_children())
    assert (max(child.siblings for child in attentions(model)[0].children() if hasattr(child, "siblings")) > 1) == (
        separate
    )
    freqrank.save_model(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@every
@torch.no_grad()
def test_linearised_models_are_compressed(case, tmp_path):
    model = converted(case, norm_groups="heads")
    ids = tokens(12, 24)
    before = model(ids).logits
    report = freqrank.compress(model, ids, ratio=0.1, group_size=1, storage="int8", progress=False)
    after = model(ids).logits
    assert (after - before).norm() > 0
    plain = copy.deepcopy(model)
    freqrank.merge(plain)
    torch.testing.assert_close(after, plain(ids).logits, **CLOSE)
    inside = {layer.module for layer in report.layers if layer.rank is not None}
    assert inside == {name for name, m in model.named_modules() if isinstance(m, Int8LowRankLinear)}
    assert any("att" in name for name in inside)
    assert not any("gate_proj" in name and "mlp" not in name for name in inside)
    freqrank.save_model(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, after)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(model, match: str, **options) -> None:
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=match):
        linearize(model, **options)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not hasattr(model, "freqrank_report")


@pytest.mark.parametrize(
    ("family", "options", "attention"),
    [
        ("Gemma2", GATED | {"head_dim": 8}, "Gemma2Attention"),
        ("OpenAIGPT", COMMON, "Attention"),
        ("GPTNeoXJapanese", COMMON | {"intermediate_multiple_size": 2}, "GPTNeoXJapaneseAttention"),
    ],
)
def test_an_unknown_attention_is_named_with_what_is_known(family, options, attention):
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**options))
    refused(model, f"layer 0 has attention {attention}, which linearize does not know; known: GPT2Attention, GPTNeoX")


def test_what_a_linear_layer_cannot_do_is_refused():
    wide = build("llama", num_attention_heads=1, num_key_value_heads=1, head_dim=258)
    refused(wide, r"layer 0: head_dim is 258, .* up to 256 channels: keep such layers softmax")
    assert isinstance(linearize(wide, feature_map="none", window=4).kept, list)
    full = build("qwen3", head_dim=256)
    refused(full, r"head_dim is 256, .* up to 255", norm="denominator")
    refused(full, r"head_dim is 256, .* up to 255", feature_map="prf", num_frequencies=16)
    linearize(full, norm="denominator", position_table=0)
    assert full(tokens(1, 3)).logits.isfinite().all()
    refused(build("opt"), "features|num_frequencies", num_frequencies=513)
    refused(build("opt"), "features|num_frequencies", feature_map="hedgehog", num_frequencies=257)
    refused(build("gpt2", add_cross_attention=True), "layer 0: the model has cross-attention")
    gemma = build("gemma")
    attentions(gemma)[1].is_causal = False
    refused(gemma, "layer 1: GemmaAttention attends in both directions")


def test_a_class_of_ones_own(monkeypatch):
    """A subclass entered under the name of an attention is all that a new architecture needs."""

    class OtherAttention(type(attentions(build("llama"))[0])):
        pass

    class Halved(LinearizedAttention):
        def output(self, mixed):
            return 0.5 * super().output(mixed)

    model = build("llama")
    for attention in attentions(model):
        attention.__class__ = OtherAttention
    monkeypatch.setitem(ATTENTION_CLASSES, "OtherAttention", Halved)
    OtherAttention.__module__ = type(attentions(build("llama"))[0]).__module__
    linearize(model, feature_map="none", window=8)
    plain = build("llama")
    linearize(plain, feature_map="none", window=8)
    x, cos = torch.randn(1, 6, 32), torch.ones(1, 6, 8)
    got, expected = (attentions(m)[0](x, (cos, 0 * cos))[0] for m in (model, plain))
    torch.testing.assert_close(got, 0.5 * expected)
    assert math.isclose(float((got.norm() / expected.norm()).detach()), 0.5, rel_tol=1e-5)
