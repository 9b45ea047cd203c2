"""How kernel_error measures, and what the theory of random features says must come out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from freqrank.attention import kernel_error
from freqrank.attention.feature_maps import FEATURE_MAPS, FeatureMap, FeatureMapKind, pretrained_temperature
from freqrank.models.heads import attention_heads
from transformers import LlamaConfig, LlamaForCausalLM


def heads(length: int, query_heads: int, key_heads: int, dim: int, std: float = 1.0, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, length, h, dim, generator=g) * std for h in (query_heads, key_heads, key_heads))


def drawn(name, dim: int, seed: int = 0, **options) -> FeatureMap:
    fmap = FeatureMap(dim, name, **options)
    fmap.reset_parameters(torch.Generator().manual_seed(seed))
    return fmap


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["dijiang", "hedgehog", "wpff"])
def test_equals_a_loop_over_heads_and_queries(name, causal):
    q, k, v = heads(6, 4, 2, 8)
    fmap = drawn(name, 8, num_heads=2, temperature=0.8)
    got = kernel_error(fmap, q, k, v, causal=causal)
    kernels, variations, flats, slopes, correlations = [], [], [], [], []
    out = norm = 0.0
    phi_k = fmap.features(k.double())
    # head h of q belongs to key head h // 2: its features come from that head's matrix
    for b in range(2):
        for h in range(4):
            one = q.double()[b, :, h : h + 1].expand(-1, 2, -1)
            phi_q = fmap.features(one)[:, h // 2]
            exact, estimate = [], []
            for i in range(6):
                last = i + 1 if causal else 6
                logits = k.double()[b, :last, h // 2] @ q.double()[b, i, h] / 8**0.5
                e = phi_k[b, :last, h // 2] @ phi_q[i]
                exact.append(logits.exp())
                estimate.append(e)
                p, a = logits.softmax(0), e / e.sum()
                variations.append((p - a).abs().sum() / 2)
                flats.append((p - 1 / last).abs().sum() / 2)
                out += (((a - p) @ v.double()[b, :last, h // 2]) ** 2).sum()
                norm += ((p @ v.double()[b, :last, h // 2]) ** 2).sum()
                if last > 2:
                    x, y = logits - logits.mean(), e.log() - e.log().mean()
                    slopes.append((x @ y) / (x @ x))
                    correlations.append((x @ y) / (x.norm() * y.norm()))
            a, e = torch.cat(exact), torch.cat(estimate)
            kernels.append((a - e * (a @ e) / (e @ e)).norm() / a.norm())
    expected = [kernels, variations, flats, slopes, correlations]
    values = [got.kernel, got.total_variation, got.uniform, got.slope, got.correlation]
    for value, terms in zip(values, expected, strict=True):
        assert value == pytest.approx(torch.stack(terms).mean().item(), rel=1e-9)
    assert got.output == pytest.approx((out / norm).sqrt().item(), rel=1e-9)


@pytest.mark.parametrize("name", ["prf", "orthogonal-prf", "pff"])
def test_random_features_are_unbiased(name):
    """The mean of phi(q) . phi(k) over draws is exp(q . k), for PFF the Gaussian kernel (dijiang.md 3.1)."""
    q, k, _ = (x.double() for x in heads(3, 1, 1, 4, std=0.4))
    total = 0.0
    for seed in range(100):
        fmap = drawn(name, 4, seed, num_frequencies=192, temperature=1.0)
        total = total + fmap.features(q)[:, :, 0] @ fmap.features(k)[:, :, 0].mT
    dots = q[:, :, 0] @ k[:, :, 0].mT
    if name == "pff":
        dots = -torch.cdist(q[:, :, 0], k[:, :, 0]).square() / 2
    torch.testing.assert_close(total / 100, dots.exp(), rtol=0.05, atol=0.0)


def test_more_features_and_the_right_temperature_help():
    q, k, v = heads(48, 2, 2, 16, std=0.5)
    coarse, fine = (
        kernel_error("orthogonal-prf", q, k, v, num_frequencies=m, temperature="pretrained") for m in (16, 512)
    )
    assert fine.kernel < 0.6 * coarse.kernel
    assert fine.total_variation < 0.6 * coarse.total_variation
    assert fine.output < 0.6 * coarse.output
    assert fine.slope == pytest.approx(1, abs=0.15)
    assert fine.correlation > 0.8
    assert coarse.uniform == fine.uniform
    released, restored = (kernel_error("dijiang", q, k, v, temperature=t) for t in (1.0, "pretrained"))
    assert released.slope < 0.4 < 0.5 < restored.slope


def test_temperature_of_each_kind():
    assert pretrained_temperature(FEATURE_MAPS["hedgehog"], 16) == 2.0
    assert pretrained_temperature(FEATURE_MAPS["dcf"], 16) == 0.5
    assert FeatureMap(16, "wdcf", temperature="pretrained").temperature == 0.5


def test_kinds_of_one_s_own():
    kind = dataclasses.replace(FEATURE_MAPS["dijiang"], points="halton", signs=True)
    assert isinstance(kind, FeatureMapKind)
    q, k, _ = heads(9, 2, 1, 8)
    assert kernel_error(drawn(kind, 8), q, k).total_variation < 1


def test_errors_name_what_came():
    q, k, v = heads(4, 4, 2, 8)
    with pytest.raises(TypeError, match=r"q must be a floating-point tensor; got torch\.int64"):
        kernel_error("prf", q.long(), k)
    with pytest.raises(ValueError, match=r"q must be \[B, T, H, D\]"):
        kernel_error("prf", q[0], k)
    with pytest.raises(ValueError, match="H must be a multiple of Hk"):
        kernel_error("prf", q[:, :, :3], k)
    with pytest.raises(ValueError, match="v must be"):
        kernel_error("prf", q, k, v[:, :3])
    with pytest.raises(ValueError, match="feature_map must be one of"):
        kernel_error("fourier", q, k)


def test_heads_of_a_model_give_its_attention():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    ids = torch.randint(0, 50, (2, 11))
    inputs = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
        for layer in model.model.layers
    ]
    found = attention_heads(model, ids)
    for hook in hooks:
        hook.remove()
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert len(found) == 2
    for layer, expected in zip(found, inputs, strict=True):
        assert layer.q.shape == (2, 11, 4, 8)
        assert layer.k.shape == layer.v.shape == (2, 11, 2, 8)
        k, v = (x.repeat_interleave(2, 2) for x in (layer.k, layer.v))
        scores = torch.einsum("bihd,bjhd->bhij", layer.q, k) * layer.scale
        scores = scores.masked_fill(~torch.ones(11, 11).tril().bool(), -torch.inf)
        o = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
        torch.testing.assert_close(o, expected.detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(TypeError, match="PreTrainedModel"):
        attention_heads(torch.nn.Linear(2, 2), ids)
