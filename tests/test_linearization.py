"""Linearised models: the layer against the released quadratic formula, cache, masks, generation, training."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import textwrap

import freqrank
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from freqrank import distill, linearize
from freqrank.attention import sampling
from freqrank.attention.dijiang import DiJiangAttention, DiJiangOptions
from freqrank.attention.feature_maps import FEATURE_MAPS, FeatureMap
from freqrank.models.cache import LinearStateLayer
from freqrank.models.linearization import FLOAT32_TENSORS, install
from freqrank.models.masks import attention_mask_2d, packed_cu_seqlens
from scipy import stats
from scipy.fft import dct, idct
from scipy.stats import qmc
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    masking_utils,
)

VOCABULARY = 61


def small_model(kv_heads: int = 4, layers: int = 3, seed: int = 0, **more) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=4096, pad_token_id=0, eos_token_id=None,
        bos_token_id=None, **more,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    # Random weights of this size give near-uniform logits; sharper ones make a wrong token visible.
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4.0)
    return model


def linear_model(kv_heads: int = 4, layers: int = 3, convert=None, seed: int = 0, **options) -> LlamaForCausalLM:
    """A converted model whose new tensors are all away from their neutral first values."""
    model = small_model(kv_heads, layers, seed)
    linearize(model, layers=convert, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("_factors", ".norm.", "gate_proj")) and "self_attn" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(row.numel() for row in rows)
    ids = torch.stack([F.pad(row, (length - row.numel(), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (length - row.numel(), 0)) for row in rows])
    return ids, mask


def released_attention(layer: DiJiangAttention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The released forward pass in float64: the T x T scores with D1 and D2, a 0/1 mask, GroupNorm, the SiLU gate."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    time, dim, heads = x.shape[1], layer.head_dim, layer.num_heads

    def split(linear: nn.Linear) -> torch.Tensor:
        return (x @ linear.weight.double().T).view(*x.shape[:2], -1, dim).transpose(1, 2)

    def rotated(h: torch.Tensor) -> torch.Tensor:
        half = dim // 2
        return h * cos[:, None] + torch.cat([-h[..., half:], h[..., :half]], -1) * sin[:, None]

    def features(h: torch.Tensor) -> torch.Tensor:
        return torch.softmax(torch.from_numpy(idct(h.numpy(), norm="ortho")) * layer.feature_map.scales.double(), -1)

    groups = heads // layer.num_key_value_heads
    q, k, v = features(rotated(split(layer.q_proj))), features(rotated(split(layer.k_proj))), split(layer.v_proj)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    position = torch.arange(time)
    gamma = layer.decay(x).double().exp().repeat_interleave(groups)[:, None]
    a, b = torch.ones(heads, time).double(), torch.ones(heads, time).double()
    table = min(time, layer.options.position_table)
    if table:
        a[:, :table] = layer.query_factors.weight.double()[:, :table]
        b[:, :table] = layer.key_factors.weight.double()[:, :table].repeat_interleave(groups, 0)
    d1, d2 = a * gamma**position, b * gamma ** (-position)
    scores = (d1[..., None] * q) @ (d2[..., None] * k).mT * (position[:, None] >= position)
    o = (scores @ v).transpose(1, 2).reshape(*x.shape[:2], -1)
    count = dim if layer.options.norm_groups == "head_dim" else heads
    o = F.group_norm(o.reshape(-1, heads * dim), count, layer.norm.weight.double(), layer.norm.bias.double(), 1e-5)
    gate = x @ layer.gate_proj.weight.double().T
    if layer.gate_proj.bias is not None:
        gate = gate + layer.gate_proj.bias.double()
    return (F.silu(gate) * o.view(*x.shape[:2], -1)) @ layer.o_proj.weight.double().T


# --- the layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_groups": "heads", "gate": "open"},
        {"position_table": 7},
        {"position_table": 0, "decay": "learned", "shortest_span": 2.0, "longest_span": 64},
    ],
)
@torch.no_grad()
def test_layer_equals_the_released_quadratic_form(kv_heads, options):
    model = linear_model(kv_heads, layers=1, **options)
    layer = model.model.layers[0].self_attn
    x = torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(1))
    cos, sin = model.model.rotary_emb(x, torch.arange(37)[None])
    got, _ = layer(x, (cos, sin))
    expected = released_attention(layer, x, cos, sin)
    assert (got - expected).norm() <= 2e-5 * expected.norm()


def test_released_defaults():
    model = small_model()
    report = linearize(model)
    layer = model.model.layers[1].self_attn
    assert layer.options == DiJiangOptions(
        "dijiang", None, None, "multi-scale", "group", "head_dim", "released", 2048, 32.0, 512.0, 0, 0
    )
    assert layer.norm.num_groups == layer.head_dim
    assert layer.gate_proj.bias is None
    assert layer.gate_proj.weight.abs().max() <= 2**-2.5 * math.sqrt(6 / 64)
    gamma = layer.decay.log_decay.double().exp()
    expected = 1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), 4).double().exp()
    torch.testing.assert_close(gamma, expected, atol=1e-7, rtol=0)
    assert (layer.query_factors.weight == 1).all()
    assert layer.query_factors.weight.shape == (4, 2048)
    assert not any("scales" in name or "log_decay" in name for name, _ in model.named_parameters())
    assert model.freqrank_report is report
    assert report.to_dict()["layers"] == [0, 1, 2]
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    # 32 x 32 gate, 2 x 32 norm, 2 x 4 x 2048 factors a layer.
    assert report.parameters_after - report.parameters_before == 3 * (32 * 32 + 64 + 2 * 4 * 2048)
    assert report.break_even_tokens == 4.0


def test_projections_stay_and_layers_differ():
    model = small_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    linearize(model)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    scales = [layer.self_attn.feature_map.scales for layer in model.model.layers]
    assert not torch.equal(scales[0], scales[1])
    again = small_model()
    linearize(again)
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    other = small_model()
    linearize(other, seed=1)
    assert not torch.equal(other.model.layers[0].self_attn.feature_map.scales, scales[0])


def formula_of_the_map(fmap: FeatureMap, x: torch.Tensor) -> torch.Tensor:
    """phi(x) [B, T, H, features] in float64, from the map's own numbers and SciPy's transform."""
    kind, count = fmap.kind, fmap.num_frequencies
    if fmap.matrix is not None:
        p = torch.einsum("bthk,hkm->bthm", x, fmap.matrix.detach().double())
    elif fmap.scales is None:
        p = x @ fmap.frequencies.double()
    else:
        transform = idct if kind.frequencies == "idct" else dct
        blocks = [x] if fmap.signs is None else [x * signs for signs in fmap.signs.double()]
        p = torch.cat([torch.from_numpy(transform(block.numpy(), norm="ortho")) for block in blocks], -1)[..., :count]
        p = p * fmap.scales.double()
    if kind.feature == "exp":
        phi = p.exp()
        if kind.prefactor:
            y = x * fmap.temperature
            phi = phi * torch.exp(-kind.prefactor * y.square().sum(-1, keepdim=True)) / count**0.5
    else:
        phi = torch.softmax(torch.cat([p, -p], -1) if kind.feature == "softmax_pm" else p, -1)
    return phi if fmap.weights is None else phi * fmap.weights.detach().double()


@pytest.mark.parametrize("count", [None, 5, 19])
@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
def test_feature_map_equals_its_formula_and_the_fused_op(name, count):
    fmap = FeatureMap(8, name, num_frequencies=count, num_heads=2, temperature=0.7)
    fmap.reset_parameters(torch.Generator().manual_seed(3))
    with torch.no_grad():
        for p in fmap.parameters():
            p.add_(torch.rand(p.shape, generator=torch.Generator().manual_seed(4)))
    assert fmap.num_features == (count or 8) * (2 if fmap.kind.feature == "softmax_pm" else 1)
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = formula_of_the_map(fmap, x)
    torch.testing.assert_close(fmap.features(x), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fmap.features(x.float()), expected.float(), atol=1e-4, rtol=1e-4)
    v = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    y = fmap.augment(x)
    o, _ = freqrank.feature_map_attention(
        y, y, v, fmap.projection(torch.float64), feature=fmap.kind.feature, weights=fmap.weights
    )
    scores = torch.einsum("bihm,bjhm->bhij", expected, expected).tril()
    torch.testing.assert_close(o, torch.einsum("bhij,bjhv->bihv", scores, v), atol=1e-6, rtol=1e-5)


def test_maps_that_transforms_and_released_code_share():
    """The released map is dijiang_attention's, and the first of several transforms has no signs it would not have."""
    x = torch.randn(1, 5, 1, 8)
    for name in ("dijiang", "dcf"):
        fmap = FeatureMap(8, name)
        fmap.reset_parameters(torch.Generator().manual_seed(0))
        o, _ = freqrank.feature_map_attention(x, x, x, fmap.projection()[:8], feature=fmap.kind.feature)
        expected, _ = freqrank.dijiang_attention(
            x, x, x, fmap.scales, transform=fmap.kind.frequencies, feature=fmap.kind.feature,
            signs=None if fmap.signs is None else fmap.signs[0],
        )  # fmt: skip
        torch.testing.assert_close(o, expected)
    wide = FeatureMap(8, "dijiang", num_frequencies=20)
    wide.reset_parameters(torch.Generator().manual_seed(0))
    assert (wide.signs[0] == 1).all()
    assert (wide.signs[1:].abs() == 1).all()
    assert (wide.signs[1] != wide.signs[2]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cosine"}, "feature_map must be one of 'dijiang', .*; got 'cosine'"),
        ({"num_frequencies": 0}, "num_frequencies must be at least 1; got 0"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
    ],
)
def test_bad_feature_maps(options, message):
    with pytest.raises(ValueError, match=message):
        FeatureMap(8, **options)


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
@torch.no_grad()
def test_decoding_follows_the_map_of_the_moment(name):
    model = linear_model(2, feature_map=name, position_table=0)
    ids = tokens(2, 12)
    for factor in (1.0, 0.5, 0.75):
        for layer in model.model.layers:
            for numbers in ("scales", "frequencies", "matrix"):
                tensor = getattr(layer.self_attn.feature_map, numbers)
                if tensor is not None:
                    tensor.mul_(factor)
        cache = DynamicCache(config=model.config)
        got = [model(token, past_key_values=cache).logits for token in ids.split(1, 1)]
        torch.testing.assert_close(torch.cat(got, 1), model(ids).logits, atol=2e-4, rtol=1e-4)


def test_sampling_matches_scipy():
    u = torch.linspace(0.01, 0.99, 33, dtype=torch.float64)
    for degrees in (1, 2, 32, 257):
        expected = torch.from_numpy(stats.chi(degrees).ppf(u.numpy()))
        torch.testing.assert_close(sampling.chi_quantile(u, degrees), expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(sampling.normal_quantile(u), torch.from_numpy(stats.norm.ppf(u.numpy())))
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="points must be one of"):
        sampling.uniform_points(4, points="lattice", generator=generator)
    with pytest.raises(ValueError, match="count and dimensions"):
        sampling.uniform_points(4, 0, generator=generator)
    with pytest.raises(ValueError, match="at most 21201 dimensions"):
        sampling.uniform_points(4, 30000, points="sobol", generator=generator)
    with pytest.raises(ValueError, match="radii must be one of"):
        sampling.sample_scales(4, 4, radii="cauchy", generator=generator)
    with pytest.raises(ValueError, match="directions must be one of"):
        sampling.sample_frequencies(4, 4, directions="lattice", generator=generator)
    with pytest.raises(ValueError, match="degrees"):
        sampling.chi_quantile(u, 0)


@pytest.mark.parametrize("points", sampling.POINTS)
def test_points_are_seeded_uniform_and_as_even_as_they_claim(points):
    def draw(count: int, dimensions: int, seed: int) -> torch.Tensor:
        return sampling.uniform_points(count, dimensions, points=points, generator=torch.Generator().manual_seed(seed))

    assert draw(8, 3, 0).shape == (8, 3)
    assert draw(8, 3, 0).dtype == torch.float64
    assert torch.equal(draw(8, 3, 0), draw(8, 3, 0))
    assert not torch.equal(draw(8, 3, 0), draw(8, 3, 1))
    # Randomised rules are uniform point by point: over many seeds any one point's coordinates pass for uniform ones.
    first = torch.stack([draw(4, 3, seed)[0] for seed in range(400)])
    assert ((first > 0) & (first < 1)).all()
    for coordinate in first.T:
        assert stats.kstest(coordinate.numpy(), "uniform").pvalue > 1e-4
    # discrepancy against independent draws of as many points, averaged over seeds
    mean = sum(qmc.discrepancy(draw(64, 2, seed).numpy()) for seed in range(20)) / 20
    independent = sum(qmc.discrepancy(np.random.default_rng(seed).random((64, 2))) for seed in range(20)) / 20
    factor = {"random": 2.0, "stratified": 0.7, "sobol": 0.1, "halton": 0.15}[points]
    assert mean < factor * independent


@pytest.mark.parametrize("directions", sampling.DIRECTIONS)
def test_frequencies_are_standard_normal(directions):
    draws = [
        sampling.sample_frequencies(4, 7, directions=directions, generator=torch.Generator().manual_seed(seed))
        for seed in range(400)
    ]
    w = torch.stack(draws)  # [seed, 4, 7]
    assert w.dtype == torch.float32
    for values in (w[:, 0, 0], w[:, 3, 6]):
        assert stats.kstest(values.numpy(), "norm").pvalue > 1e-4
    lengths = w.norm(dim=1)
    assert stats.kstest(lengths[:, 2].numpy(), stats.chi(4).cdf).pvalue > 1e-4
    if directions == "orthogonal":
        gram = w[:, :, :4].mT @ w[:, :, :4]
        off = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
        assert off.abs().max() < 1e-4


# --- precision, copies, devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16().float()])
def test_decay_and_frequencies_stay_float32(cast):
    model = linear_model()
    before = copy.deepcopy(model.state_dict())
    cast(model)
    kept = [n for n in before if any(n.endswith(name) for name in FLOAT32_TENSORS)]
    assert len(kept) == 2 * 3
    for name in kept:
        assert model.state_dict()[name].dtype == torch.float32
        assert torch.equal(model.state_dict()[name], before[name])
    assert model.model.layers[0].self_attn.gate_proj.weight.dtype == model.lm_head.weight.dtype


@torch.no_grad()
def test_bfloat16_model_is_near_the_float32_one():
    model = linear_model(norm_groups="heads")
    ids = tokens(2, 40)
    expected = model(ids).logits
    model.to(torch.bfloat16)
    assert (model(ids).logits.float() - expected).norm() <= 0.1 * expected.norm()
    step = model(ids[:, :39], use_cache=True)
    last = model(ids[:, 39:], past_key_values=step.past_key_values).logits
    assert step.past_key_values.layers[0].state.linear.kv.dtype == torch.float32
    assert (last[:, 0].float() - expected[:, -1]).norm() <= 0.1 * expected[:, -1].norm()


@torch.no_grad()
def test_deepcopy_and_install_on_meta():
    model = linear_model(norm_groups="heads", position_table=16)
    ids = tokens(2, 20)
    expected = model(ids).logits
    assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
    with torch.device("meta"):
        empty = LlamaForCausalLM(copy.deepcopy(model.config))
    spec = {"layers": [0, 1, 2], "options": model.model.layers[0].self_attn.options.to_dict()}
    install(empty, spec)
    assert all(t.is_meta for t in empty.state_dict().values())
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.model.rotary_emb = model.model.rotary_emb  # its frequencies are in no state dict
    assert torch.equal(empty.eval()(ids).logits, expected)
    assert {"decay.log_decay", "feature_map.scales"} <= set(empty._keep_in_fp32_modules_strict)


# --- cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv_heads", "convert"), [(4, None), (2, None), (2, [0, 2]), (4, [1])])
@torch.no_grad()
def test_steps_and_chunks_equal_one_forward(kv_heads, convert):
    model = linear_model(kv_heads, convert=convert, position_table=24)
    ids = tokens(2, 40)
    expected = model(ids).logits
    for pieces in ([1] * 40, [17, 1, 1, 21], [40]):
        cache, got = DynamicCache(config=model.config), []
        for piece in ids.split(pieces, 1):
            got.append(model(piece, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(got, 1), expected, atol=2e-4, rtol=1e-4)
        assert cache.get_seq_length() == 40
        assert [isinstance(layer, LinearStateLayer) for layer in cache.layers] == [
            i in (convert or range(3)) for i in range(3)
        ]
    # A cache made without a configuration grows its layers as they come.
    cache = DynamicCache()
    first = model(ids[:, :30], past_key_values=cache).logits
    rest = model(ids[:, 30:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_state_does_not_grow_and_copies_are_independent():
    model = linear_model()
    cache = model(tokens(1, 9), use_cache=True).past_key_values
    size = sum(layer.state.linear.kv.numel() for layer in cache.layers)
    branch = copy.deepcopy(cache)
    kept = branch.layers[0].state.linear.kv.clone()
    model(tokens(1, 50), past_key_values=cache)
    model(tokens(1, 1), past_key_values=cache)
    assert sum(layer.state.linear.kv.numel() for layer in cache.layers) == size
    assert cache.get_seq_length() == 60
    assert torch.equal(branch.layers[0].state.linear.kv, kept)
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = tokens(1, 7)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


@torch.no_grad()
def test_batch_operations_on_the_cache():
    model = linear_model()
    ids = tokens(3, 11)
    nxt = tokens(3, 1, seed=1)
    expected = model(torch.cat([ids, nxt], 1)).logits[:, -1]

    def after(change, rows):
        cache = model(ids, use_cache=True).past_key_values
        change(cache)
        torch.testing.assert_close(
            model(nxt[rows], past_key_values=cache).logits[:, 0], expected[rows], atol=2e-4, rtol=1e-4
        )

    order = torch.tensor([2, 0, 0])
    cache = model(ids, use_cache=True).past_key_values
    cache.reorder_cache(order)
    reordered = model(torch.cat([ids[order], nxt], 1)).logits[:, -1]
    torch.testing.assert_close(model(nxt, past_key_values=cache).logits[:, 0], reordered, atol=2e-4, rtol=1e-4)
    after(lambda c: c.batch_select_indices(torch.tensor([1, 2])), [1, 2])
    after(lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])


@torch.no_grad()
def test_static_cache_works_and_going_back_is_refused():
    model = linear_model()
    ids = tokens(2, 12)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    static = StaticCache(config=model.config, max_cache_len=32)
    got = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=static)
    assert torch.equal(got, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static"), expected)
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(0)
    with pytest.raises(RuntimeError, match="cannot forget"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], assistant_model=small_model(), max_new_tokens=4)
    softmax = small_model()
    with pytest.raises(TypeError, match="cannot take keys and values"):
        softmax(ids, past_key_values=cache)
    filled = softmax(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"already holds keys and values of 12 tokens"):
        model(ids, past_key_values=filled)
    with pytest.raises(TypeError, match="past_key_values must be"):
        model.model.layers[0].self_attn(torch.zeros(1, 1, 32), (torch.ones(1, 1, 8),) * 2, past_key_values=[])


# --- generation and padding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [None, [0, 2]])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@torch.no_grad()
def test_left_padded_generation_equals_one_by_one(convert, how):
    model = linear_model(convert=convert, norm_groups="heads", position_table=16)
    rows = [tokens(1, n, seed=n)[0] for n in (13, 1, 6)]
    ids, mask = left_padded(rows)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **how)
    count = how.get("num_return_sequences", 1)
    for i, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=8, do_sample=False, **how)
        assert torch.equal(got[i * count : (i + 1) * count, ids.shape[1] :], alone[:, row.numel() :])


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@pytest.mark.parametrize("convert", [[0], [1, 2]])
@torch.no_grad()
def test_beside_softmax_layers_every_cache_and_window_gives_the_same(family, convert):
    # Softmax layers' masks hide what has left a sliding window, and have columns for a static cache's empty places:
    # neither is padding to a linear layer.
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    if family == "Mistral":
        config.sliding_window = 4
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.mul_(4.0)
    linearize(model, layers=convert, gate="open", norm_groups="heads")
    rows = [tokens(1, n, seed=n)[0] for n in (9, 6)]
    ids, mask = left_padded(rows)

    def scores(**how):
        options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        made = model.generate(ids, attention_mask=mask, **options, **how)
        return torch.stack(made.logits)

    expected = scores(use_cache=False)
    for i, row in enumerate(rows):
        torch.testing.assert_close(expected[0, i], model(row[None]).logits[0, -1], atol=2e-4, rtol=1e-4)
    for how in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}):
        torch.testing.assert_close(scores(**how), expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_greedy_generation_equals_forward_without_a_cache():
    model = linear_model()
    ids = tokens(2, 5)
    expected = ids
    for _ in range(10):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False), expected)
    torch.manual_seed(0)
    first = model.generate(ids, max_new_tokens=10, do_sample=True, top_k=5)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=True, top_k=5, use_cache=False), first)


@pytest.mark.parametrize("convert", [None, [0, 2], [1]])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_leaves_no_trace(convert, implementation, side):
    model = small_model()
    model.set_attn_implementation(implementation)
    linearize(model, layers=convert)
    rows = [tokens(1, n, seed=n)[0] for n in (9, 4)]
    ids, mask = left_padded(rows)
    if side == "right":
        ids, mask = torch.stack([rows[0], F.pad(rows[1], (0, 5))]), mask.flip(1)
    got = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(got[i][mask[i].bool()], model(row[None]).logits[0], atol=2e-4, rtol=1e-4)
    # A second padded piece on top of a cache.
    cache = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    rest = model(ids[:, 6:], attention_mask=mask, past_key_values=cache).logits
    real = mask[:, 6:].bool()
    torch.testing.assert_close(rest[real], got[:, 6:][real], atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="attention_mask must cover"):
        model(ids[:, 6:], attention_mask=mask[:, 6:], past_key_values=cache)


@pytest.mark.parametrize("convert", [None, [1]])
@torch.no_grad()
def test_packed_sequences_stay_apart(convert):
    model = linear_model(convert=convert)
    rows = [tokens(1, n, seed=n) for n in (9, 4, 6)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    got = model(torch.cat(rows, 1), position_ids=positions, use_cache=False).logits
    expected = torch.cat([model(row).logits for row in rows], 1)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="a batch of one row"):
        model(torch.cat(rows, 1).expand(2, -1), position_ids=positions.expand(2, -1), use_cache=False)
    assert packed_cu_seqlens(torch.arange(5)[None]) is None


def test_masks():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert attention_mask_2d(mask, 2).tolist() == [[True, True], [True, True]]
    causal = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]])  # the first is padding, the fourth yet to come
    additive = torch.zeros(1, 1, 3, 4).masked_fill(causal == 0, -1e9)
    for start in (0, None):
        window = (causal == 1)[None, None] if start == 0 else additive[..., :3]
        assert attention_mask_2d(window, 3, start).tolist() == [[False, True, True]]
    assert attention_mask_2d(additive, 3, 0).tolist() == [[False, True, True]]
    assert attention_mask_2d((causal == 1)[None, None, 2:], 1, 2).tolist() == [[True]]
    assert attention_mask_2d(None, 3) is None
    for wrong in (torch.ones(3), torch.ones(1, 2), torch.ones(1, 1, 2, 3)):
        with pytest.raises(ValueError, match="attention_mask must be"):
            attention_mask_2d(wrong, 3)


def test_no_square_mask_is_built(monkeypatch):
    seen = []
    model = linear_model()
    forward = DiJiangAttention.mix

    def spy(self, *args, mask=None, **kwargs):
        seen.append(None if mask is None else tuple(mask.shape))
        return forward(self, *args, mask=mask, **kwargs)

    monkeypatch.setattr(DiJiangAttention, "mix", spy)
    for name in ("sdpa_mask", "eager_mask"):
        monkeypatch.setattr(masking_utils, name, None)
    ids, mask = left_padded([tokens(1, n, seed=n)[0] for n in (9, 4)])
    model(ids, attention_mask=mask)
    model(ids)
    assert seen == [(2, 9)] * 3 + [None] * 3
    assert not hasattr(model.config, "layer_types") or set(model.config.layer_types) == {"full_attention"}


MEMORY = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaModel
from freqrank import linearize
from freqrank.models.architectures import Llama

torch.set_num_threads(1)
model = LlamaModel(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                               num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1 << 17)).eval()
linearize(model)
length = int(sys.argv[1])
ids = torch.ones(2, length, dtype=torch.long)
mask = torch.ones_like(ids)
mask[0, :100] = 0
with torch.no_grad():
    model(ids[:, :64], attention_mask=mask[:, -64:])
    out = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
assert out.isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_of_a_padded_forward_grows_linearly():
    """At 64k tokens one bool mask of T x T would take 4 GiB a row."""
    peaks = []
    for length in (1 << 14, 1 << 15, 1 << 16):
        done = subprocess.run([sys.executable, "-c", MEMORY, str(length)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
    first, second = peaks[1] - peaks[0], peaks[2] - peaks[1]
    # Twice the tokens, twice the growth; four times as much, and gigabytes of it, if anything were quadratic. What
    # imports once took hides some of the first growth.
    assert second < max(3 * first, 256), f"MiB at 16k, 32k, 64k tokens: {peaks}"
    assert second < 400, f"MiB at 16k, 32k, 64k tokens: {peaks}"


# --- training
# ----------------------------------------------------------------------------------------------------------


def test_gradients_reach_everything_and_checkpointing_changes_nothing():
    model = linear_model(kv_heads=2).train()
    ids = tokens(2, 24)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    assert all(g.isfinite().all() for g in plain.values())
    assert all(g.abs().max() > 0 for g in plain.values())
    model.gradient_checkpointing_enable()
    for name, g in gradients().items():
        torch.testing.assert_close(g, plain[name], atol=1e-6, rtol=1e-5, msg=name)


def test_position_factors_beyond_the_table_are_one():
    model = linear_model(layers=1, position_table=8)
    layer = model.model.layers[0].self_attn
    factors = layer.query_factors(torch.tensor([[0, 7, 8, 5000]]))
    assert torch.equal(factors[0, 2:], torch.ones(2, 4))
    torch.testing.assert_close(factors[0, :2], layer.query_factors.weight[:, [0, 7]].T)


@torch.no_grad()
def test_compiled_forward():
    model = linear_model(layers=1, norm_groups="heads")
    ids = tokens(2, 24)
    expected = model(ids).logits
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["released", "distill"])
def test_distill_recovers_and_repeats(recipe):
    teacher = small_model()
    data = tokens(12, 33)
    reports = []
    for _ in range(2):
        student = copy.deepcopy(teacher)
        linearize(student, norm_groups="heads")
        teacher_before = copy.deepcopy(teacher.state_dict())
        report = distill(
            student, teacher if recipe == "distill" else None, data, recipe=recipe, steps=12, batch_size=4, lr=3e-3,
            validation=data, validate_every=6, progress=False, hidden_weight=0.5,
        )  # fmt: skip
        reports.append(report)
        assert all(torch.equal(v, teacher_before[k]) for k, v in teacher.state_dict().items())
        assert not student.training
        assert all(p.grad is None for p in student.parameters())
    first, second = reports
    assert first.losses == second.losses
    assert first.steps == len(first.losses) == 12
    assert first.tokens == 12 * 4 * 33
    assert [step for step, _ in first.validation] == [0, 6, 12]
    assert first.validation[-1][1] < first.validation[0][1] - 0.1
    assert first.to_dict()["recipe"] == recipe
    assert ("kl_weight" in first.settings) == (recipe == "distill")


def test_distill_loss_is_what_it_says():
    teacher = small_model(seed=1)
    student = linear_model()
    ids, mask = left_padded([tokens(1, n, seed=n)[0] for n in (12, 7)])
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        s, t = (m(**batch, output_hidden_states=True) for m in (student, teacher))
    real = mask.bool()
    targets = real[:, 1:]
    ce = F.cross_entropy(s.logits[:, :-1][targets], ids[:, 1:][targets])
    p, q = (x.logits[real].double().div(2).log_softmax(-1) for x in (t, s))
    kl = (p.exp() * (p - q)).sum(-1).mean() * 4
    hidden = sum(
        (a[real] - b[real]).square().sum() / b[real].square().sum()
        for a, b in zip(s.hidden_states[1:], t.hidden_states[1:], strict=True)
    )
    report = distill(
        student, teacher, [batch], recipe="distill", steps=1, kl_weight=0.7, temperature=2.0, hidden_weight=0.3,
        progress=False,
    )  # fmt: skip
    expected = ce + 0.7 * kl + 0.3 * hidden / 3
    assert report.losses[0] == pytest.approx(expected.item(), rel=1e-4)
    # The first target after left padding has a padded query; it is still predicted from nothing, as in transformers.
    assert report.next_token[0] == pytest.approx(ce.item(), rel=1e-4)


def test_hidden_state_alignment_counts_alone_at_first():
    teacher, student = small_model(seed=1), linear_model()
    data = tokens(8, 24)
    with torch.no_grad():
        s, t = (m(data, output_hidden_states=True).hidden_states[1:] for m in (student, teacher))
    mismatch = sum((a - b).square().sum() / b.square().sum() for a, b in zip(s, t, strict=True)) / 3
    report = distill(
        student, teacher, data, recipe="distill", steps=9, align_steps=6, lr=3e-3, hidden_weight=1.0, progress=False
    )
    assert report.losses[0] == pytest.approx(mismatch.item(), rel=1e-4)
    assert report.losses[5] < report.losses[0]
    assert all(loss > ce for loss, ce in zip(report.losses[6:], report.next_token[6:], strict=True))


def test_distill_stops_at_a_loss_that_is_not_finite():
    model = linear_model()
    good = tokens(2, 16)
    poisoned = copy.deepcopy(model)
    calls = []

    def poison(done, report):
        calls.append(done)
        if done == 3:
            with torch.no_grad():
                poisoned.lm_head.weight[0, 0] = float("nan")

    with pytest.raises(FloatingPointError, match=r"not finite at step 4; .*after step 0"):
        distill(poisoned, None, [good], steps=9, progress=False, on_step=poison)
    assert calls == [1, 2, 3]
    assert all(torch.equal(p, q) for p, q in zip(poisoned.parameters(), model.parameters(), strict=True))
    assert not poisoned.training


def test_distill_refuses_bad_input():
    model, teacher = linear_model(layers=1), small_model(layers=1)
    data = tokens(4, 16)
    torch.manual_seed(0)
    other = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    good = {"recipe": "released", "steps": 1, "progress": False}
    for change, error, match in [
        ({"recipe": "lora"}, ValueError, "recipe must be one of 'released', 'distill', 'align'; got 'lora'"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": 1.5}, TypeError, "steps must be an integer"),
        ({"lr": float("nan")}, ValueError, "lr must be a positive number"),
        ({"clip": 0}, ValueError, "clip must be"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"align_steps": 2}, ValueError, "align_steps needs"),
        ({"teacher": None, "recipe": "distill"}, ValueError, "needs a teacher"),
        ({"teacher": model}, ValueError, "another model"),
        ({"teacher": other}, ValueError, "vocabulary of 61 tokens; got 50"),
        ({"data": data.float()}, ValueError, "integer token ids"),
        ({"data": data[0]}, ValueError, "integer token ids"),
        ({"data": data[:0]}, ValueError, "at least one row"),
        ({"data": data + 60}, ValueError, "data must hold token ids from 0 to 60; got"),
        ({"warmup": -1}, ValueError, "warmup must be a number of at least 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be"),
        ({"kl_weight": float("inf"), "recipe": "distill"}, ValueError, "kl_weight must be"),
        ({"seed": None}, TypeError, "seed must be an integer"),
        ({"data": iter([data])}, ValueError, "ran out after 1 batches"),
        ({"data": [{"tokens": data}]}, ValueError, "input_ids"),
        ({"data": 3}, TypeError, "data must be"),
    ]:
        arguments = {"student": model, "teacher": teacher, "data": data, **good, **change}
        if "ran out" in match:
            arguments["steps"] = 2
        with pytest.raises(error, match=match):
            distill(**arguments)
    with pytest.raises(TypeError, match="student must be"):
        distill(3, None, data, steps=1)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        distill(model, None, data, steps=1)


# --- bad input
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"feature_map": ["dijiang"]}, ValueError, "feature_map must be one of"),
        ({"feature_map": "fourier"}, ValueError, "feature_map must be one of 'dijiang'"),
        ({"norm_groups": "layer"}, ValueError, "norm_groups must be one of 'head_dim', 'heads'"),
        ({"gate": "tanh"}, ValueError, "gate must be one of"),
        ({"temperature": 0}, ValueError, "temperature must be a positive number"),
        ({"position_table": -1}, ValueError, "position_table"),
        ({"shortest_span": 1}, ValueError, "shortest_span and longest_span must be"),
        ({"shortest_span": 64, "longest_span": 32}, ValueError, "shortest_span and longest_span must be"),
        ({"windows": 3}, TypeError, "unknown option windows; linearize knows decay, gate"),
        ({"layers": [0, 3]}, ValueError, "layers must hold indices from -3 to 2"),
        ({"layers": [0.5]}, TypeError, "layers must hold integers"),
        ({"layers": [True]}, TypeError, "layers must hold integers"),
        ({"layers": "all"}, TypeError, "layers must be None or an iterable"),
        ({"layers": 2}, TypeError, "layers must be None or an iterable"),
        ({"layers": []}, ValueError, "at least one layer"),
        ({"layers": [0, -3]}, ValueError, "twice"),
        ({"seed": "x"}, TypeError, "seed must be an integer"),
    ],
)
def test_linearize_refuses_bad_input(arguments, error, match):
    model = small_model()
    before = {name: type(m) for name, m in model.named_modules()}
    config = model.config.to_dict()
    with pytest.raises(error, match=match):
        linearize(model, **arguments)
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert model.config.to_dict() == config
    assert not model.model._forward_pre_hooks


def test_any_integer_is_a_seed():
    for seed in (-1, 2**60):
        model = small_model()
        linearize(model, seed=seed)
        assert model(tokens(1, 5)).logits.isfinite().all()


def test_linearize_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="PreTrainedModel; got Linear"):
        linearize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no decoder of a known architecture"):
        linearize(BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=10)))
    model = small_model()
    model.model.layers[1].self_attn.__class__ = type("OtherAttention", (nn.Module,), {})
    with pytest.raises(ValueError, match=r"layer 1 has attention OtherAttention.*ATTENTION_CLASSES"):
        linearize(model)
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"


def test_linearize_refuses_another_quantization():
    model = small_model()
    model.config.quantization_config = {"quant_method": "other"}
    with pytest.raises(ValueError, match="quantized by another method"):
        linearize(model)
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"


def test_layers_can_be_converted_in_turn():
    ids = tokens(1, 12)
    model = small_model()
    report = linearize(model, layers=[-1], norm_groups="heads")
    assert (report.layers, report.kept) == ([2], [0, 1])
    with pytest.raises(ValueError, match="layer 2 is linear already"):
        linearize(model, norm_groups="heads")
    with pytest.raises(ValueError, match=r"layer 2 was converted with .*same options"):
        linearize(model, layers=[0])
    report = linearize(model, layers=[0, 1], norm_groups="heads")
    assert (report.layers, report.kept) == ([0, 1], [])
    whole = small_model()
    linearize(whole, norm_groups="heads")
    torch.testing.assert_close(model(ids).logits, whole(ids).logits)


def test_install_refuses_a_bad_spec():
    for spec in ({}, {"layers": [0]}, None):
        with pytest.raises(ValueError, match="spec must be a dict"):
            install(small_model(), spec)
    with pytest.raises(ValueError, match=r"spec\['options'\] must hold only"):
        install(small_model(), {"layers": [0], "options": {"windows": 4}})


def test_core_imports_without_transformers():
    code = """
    import sys
    sys.modules["transformers"] = None
    import freqrank
    from freqrank.attention.dijiang import DiJiangAttention
    assert callable(freqrank.distill)
    try:
        freqrank.linearize
    except ImportError as error:
        print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "transformers" in done.stdout
