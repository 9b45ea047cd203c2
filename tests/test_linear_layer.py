"""The layer's every option against one quadratic float64 form: forward, gradients, pieces, padding."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from freqrank.attention.dijiang import AttentionState, DiJiangAttention, DiJiangOptions
from freqrank.attention.window import window_attention

HIDDEN, HEADS, KEY_HEADS, DIM = 20, 4, 2, 8


def built(seed: int = 0, key_heads: int = KEY_HEADS, **options) -> DiJiangAttention:
    """A layer in float64 whose every parameter has left its initial value."""
    options = DiJiangOptions(**{"position_table": 5, "shortest_span": 2.0, "longest_span": 16.0, **options})
    layer = DiJiangAttention(
        hidden_size=HIDDEN, num_heads=HEADS, num_key_value_heads=key_heads, head_dim=DIM, options=options
    )
    layer.reset_parameters(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return layer.double()


def inputs(length: int, batch: int = 2, key_heads: int = KEY_HEADS, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, HIDDEN), *((batch, length, h, DIM) for h in (HEADS, key_heads, key_heads))]
    return [torch.randn(shape, dtype=torch.float64, generator=g) for shape in shapes]


def quadratic(layer: DiJiangAttention, x, q, k, v, mask=None):
    """dijiang.md section 2 and its options, with T x T scores: D1 and D2 as the released code has them where it can."""
    options, batch, length = layer.options, x.shape[0], x.shape[1]
    group = HEADS // layer.num_key_value_heads
    mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    causal = torch.ones(length, length).tril().bool() & mask[:, None, None]
    k, v = (torch.where(mask[..., None, None], z, 0) for z in (k, v))
    softmax = None
    if options.window:
        softmax, _ = window_attention(q, k, v, window=options.window, sinks=options.sinks, mask=mask)
        if options.feature_map == "none":
            return softmax.flatten(2)
    fmap = layer.feature_map
    phi_k = fmap.features(k).repeat_interleave(group, 2)
    phi_q = torch.stack([fmap.features(q[:, :, r::group]) for r in range(group)], 3).flatten(2, 3)
    if fmap.kind.feature == "exp" and options.norm != "none":
        # a factor that the norm takes out, but for its eps: features before their weights go up to 1
        weights = 1.0 if fmap.weights is None else fmap.weights.detach().double()
        phi_q = phi_q / (phi_q.detach() / weights).amax(-1, keepdim=True)
    number = (mask.cumsum(1) - 1).clamp(min=0)
    one = torch.ones((), dtype=torch.float64)
    a = b = torch.ones(batch, length, HEADS, dtype=torch.float64)
    if options.position_table:
        tables = [
            torch.cat([t.weight.double(), one.expand(t.weight.shape[0], length)], 1)[:, :length]
            for t in (layer.query_factors, layer.key_factors)
        ]
        a = tables[0].T[number]
        b = tables[1].T[number].repeat_interleave(group, 2)
    if options.decay == "none":
        log_gamma = torch.zeros(batch, length, HEADS, dtype=torch.float64)
    elif options.decay == "multi-scale":
        log_gamma = layer.decay.log_decay.double().repeat_interleave(group).expand(batch, length, HEADS)
    else:
        rate = layer.decay.log_rate.double()
        if options.decay == "token":
            rate = rate + (x @ layer.decay.weight.double().T).clamp(-8, 3)
        log_gamma = -rate.exp().repeat_interleave(group, -1).expand(batch, length, HEADS)
    log_gamma = log_gamma * mask[..., None]
    total = log_gamma.cumsum(1)
    d1, d2 = a * total.exp(), b * (-total).exp()
    scores = torch.einsum("bihm,bjhm->bhij", d1[..., None] * phi_q, d2[..., None] * phi_k) * causal
    o = torch.einsum("bhij,bjhd->bihd", scores, v.repeat_interleave(group, 2))
    if options.norm == "denominator":
        # a is a factor of the output, so it is no part of the denominator
        denominator = (scores / a.transpose(1, 2)[..., None]).sum(-1).transpose(1, 2)[..., None]
        o = o / (denominator + 1e-6)
    elif options.norm == "group":
        count = DIM if options.norm_groups == "head_dim" else HEADS
        flat = F.group_norm(o.flatten(2).flatten(0, 1), count, layer.norm.weight, layer.norm.bias, 1e-5)
        o = flat.view(o.shape)
    elif options.norm == "rms":
        o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight
    if options.gate != "none":
        gate = x @ layer.gate_proj.weight.T + (0 if layer.gate_proj.bias is None else layer.gate_proj.bias)
        o = o * (gate * torch.sigmoid(gate)).view(o.shape)
    if softmax is not None:
        share = torch.sigmoid(x @ layer.mix_proj.weight.T + layer.mix_proj.bias)[..., None]
        o = (1 - share) * softmax + share * o
    return o.flatten(2)


OPTIONS = [
    {},  # released
    {"norm_groups": "heads", "gate": "open", "position_table": 0},
    {"feature_map": "hedgehog", "decay": "token", "temperature": "pretrained", "num_frequencies": 13},
    {"feature_map": "wdcf", "decay": "learned", "norm": "rms", "gate": "none", "temperature": "pretrained"},
    {"feature_map": "prf", "decay": "none", "norm": "denominator", "temperature": "pretrained"},
    {"feature_map": "dijiang-pm", "norm": "denominator", "position_table": 0, "decay": "token", "gate": "none"},
    {"feature_map": "hedgehog", "norm": "none", "window": 4, "sinks": 2},
    {"feature_map": "none", "window": 3, "sinks": 1},
    {"window": 16, "norm": "denominator", "position_table": 0},
]
NAMES = ["-".join(f"{v}" for v in options.values()) or "released" for options in OPTIONS]


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@pytest.mark.parametrize("key_heads", [4, 1])
def test_forward_and_gradients_equal_the_quadratic_form(options, key_heads):
    layer = built(key_heads=key_heads, **options)
    tensors = [t.requires_grad_() for t in inputs(23, key_heads=key_heads)]
    positions = torch.arange(23)[None]
    got, state = layer.mix(*tensors, positions)
    assert state is None
    expected = quadratic(layer, *tensors)
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-6)
    weight = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = [*tensors, *layer.parameters()]
    grads, references = (torch.autograd.grad((o * weight).sum(), wanted, allow_unused=True) for o in (got, expected))
    for name, g, r in zip(["x", "q", "k", "v", *dict(layer.named_parameters())], grads, references, strict=True):
        if r is None:  # x, where neither gate nor decay reads it
            assert g is None
            continue
        error = (g - r).norm() / r.norm()
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@torch.no_grad()
def test_pieces_and_padding_equal_the_whole(options):
    layer = built(**options)
    tensors = inputs(17)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[0, :5] = False
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = quadratic(layer, *tensors, mask=mask)
    for cuts in ([17], [6, 1, 1, 9], [1] * 17):
        state, pieces, start = None, [], 0
        for length in cuts:
            piece = slice(start, start + length)
            o, state = layer.mix(
                *(t[:, piece] for t in tensors), positions[:, piece], mask=mask[:, piece], state=state,
                output_state=True,
            )  # fmt: skip
            assert isinstance(state, AttentionState)
            pieces.append(o)
            start += length
        torch.testing.assert_close(torch.cat(pieces, 1)[mask], expected[mask], atol=1e-6, rtol=1e-5)
    kept = [x for part in state if part is not None for x in part if x is not None and x.is_floating_point()]
    assert sum(x.numel() for x in kept) == 2 * layer.state_elements


def test_state_elements_are_those_of_the_state_without_a_table():
    layer = built(norm="denominator", position_table=0, feature_map="hedgehog", window=4, sinks=1)
    _, state = layer.mix(*inputs(3), torch.arange(3)[None], output_state=True)
    assert state.linear.z is not None
    floats = [x for part in state for x in part if x is not None and x.is_floating_point()]
    assert sum(x.numel() for x in floats) == 2 * layer.state_elements


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, "norm must be one of 'group', 'rms', 'denominator', 'none'; got 'layer'"),
        ({"decay": "fast"}, "decay must be one of"),
        ({"gate": "closed"}, "gate must be one of"),
        ({"window": -1}, "window must be an integer >= 0; got -1"),
        ({"sinks": 2}, "sinks=2 needs a window"),
        ({"feature_map": "none"}, "feature_map='none' needs a window"),
        ({"temperature": "warm"}, "temperature must be a positive number, \"pretrained\" or None; got 'warm'"),
        ({"temperature": math.nan}, "temperature must be a positive number"),
        ({"num_frequencies": 0}, "num_frequencies must be None or an integer >= 1; got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DiJiangOptions(**options)


def test_more_features_than_the_kernels_take():
    with pytest.raises(ValueError, match="has 514 features; the kernels take up to 512"):
        built(feature_map="hedgehog", num_frequencies=257)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_sixteen_bit_layers(options, dtype):
    """What is float32 stays so, whatever the model's dtype, and the rest is one rounding or two away."""
    layer = built(**options)
    tensors = inputs(23)
    expected = quadratic(layer, *tensors)
    layer = layer.to(dtype)
    assert all(p.dtype == torch.float32 for n, p in layer.named_parameters() if n.startswith(("decay", "feature_map")))
    o, state = layer.mix(*(t.to(dtype).requires_grad_() for t in tensors), torch.arange(23)[None], output_state=True)
    assert o.dtype == dtype
    assert (o.double() - expected).norm() < 3e-2 * expected.norm()
    if state.linear is not None:
        assert state.linear.kv.dtype == torch.float32
    o.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
