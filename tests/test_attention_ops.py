"""Linear attention, its decoding step and its feature maps against the float64 quadratic and recurrent forms."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import scipy.signal
import torch
import torch._dynamo.testing
from freqrank import (
    LinearAttentionState,
    dijiang_attention,
    dijiang_attention_step,
    feature_map_attention,
    feature_map_attention_step,
    linear_attention,
    linear_attention_step,
)
from freqrank.ops import reference
from hypothesis import given, settings

HALF = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3.3e-3, torch.bfloat16: 3.3e-3}
DECAY_TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def real(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def error(actual, expected):
    """Relative RMS error."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    norm = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / (norm if norm > 0 else 1.0)


def make_decay(kind, batch, time, heads, key_heads, dtype, strength=0.3):
    shapes = {
        "H": (heads,), "Hk": (key_heads,), "BTH": (batch, time, heads), "BTHk": (batch, time, key_heads),
    }  # fmt: skip
    return None if kind is None else -strength * torch.rand(shapes[kind], dtype=real(dtype))


def make(dtype, batch, time, heads, key_heads, key_dim, value_dim, *, decay=None, positive=False, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(batch, time, heads, key_dim).to(dtype)
    k = torch.randn(batch, time, key_heads, key_dim).to(dtype)
    v = torch.randn(batch, time, key_heads, value_dim).to(dtype)
    if positive:
        q, k = q.abs(), k.abs()
    return q, k, v, make_decay(decay, batch, time, heads, key_heads, dtype)


def make_state(dtype, sequences, heads, key_dim, value_dim):
    return LinearAttentionState(
        torch.randn(sequences, heads, key_dim, value_dim, dtype=real(dtype)),
        torch.rand(sequences, heads, key_dim, dtype=real(dtype)),
    )


def check_against(call, twin, tensors, names, dtype):
    """Outputs and all gradients of call(*tensors) -> (o, kv, z) against those of the float64 twin."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in tensors]
    actual = [x for x in call(*leaves) if x is not None]
    expected = list(twin(*leaves))[: len(actual)]
    for name, a, e in zip(("o", "kv", "z"), actual, expected, strict=False):
        assert error(a, e) <= TOLERANCE[dtype], (name, error(a, e))
    directions = [torch.randn_like(x) for x in actual]
    wanted = [x for x in leaves if x is not None]
    wanted_names = [n for n, x in zip(names, leaves, strict=True) if x is not None]
    got = torch.autograd.grad(actual, wanted, directions, allow_unused=True)
    want = torch.autograd.grad(expected, wanted, [d.double() for d in directions], allow_unused=True)
    for name, a, e in zip(wanted_names, got, want, strict=True):
        if a is None or e is None:
            assert a is None or a.count_nonzero() == 0, name
            assert e is None or e.count_nonzero() == 0, name
            continue
        limit = DECAY_TOLERANCE[dtype] if name == "log_decay" else TOLERANCE[dtype]
        assert error(a, e) <= limit, (name, error(a, e))


NAMES = ("q", "k", "v", "log_decay", "kv", "z")

# batch, time, heads, key heads, K, V, decay, normalize, mask, initial state
CASES = [
    (1, 1, 1, 1, 1, 1, None, False, False, False),
    (2, 1, 2, 1, 3, 5, "BTH", False, False, True),
    (2, 70, 4, 2, 17, 9, "H", False, True, True),
    (2, 70, 4, 2, 17, 9, "Hk", True, True, True),
    (1, 64, 3, 3, 32, 32, "BTH", True, False, False),
    (1, 65, 6, 2, 16, 24, "BTH", True, True, True),
    (1, 129, 6, 2, 16, 24, "BTHk", False, True, False),
    (1, 200, 2, 2, 64, 48, "BTHk", True, False, True),
    (3, 33, 2, 1, 31, 33, None, True, True, True),
    (1, 97, 1, 1, 100, 130, "H", False, False, True),
    (1, 40, 2, 1, 256, 256, "BTHk", False, False, True),
    (2, 7, 8, 1, 8, 8, "BTH", True, False, True),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_quadratic_form(case, dtype):
    batch, time, heads, key_heads, key_dim, value_dim, decay, normalize, masked, initial = case
    q, k, v, log_decay = make(dtype, batch, time, heads, key_heads, key_dim, value_dim, decay=decay, positive=normalize)
    mask = torch.rand(batch, time) > 0.3 if masked else None
    state_heads = key_heads if log_decay is None else log_decay.shape[-1]
    state = make_state(dtype, batch, state_heads, key_dim, value_dim) if initial else (None, None)
    options = {"normalize": normalize, "eps": 0.1, "mask": mask}

    def call(q, k, v, log_decay, kv, z):
        before = None if kv is None else LinearAttentionState(kv, z)
        o, after = linear_attention(
            q, k, v, log_decay=log_decay, initial_state=before, output_final_state=True, **options
        )
        assert o.dtype == dtype
        assert after.kv.dtype == real(dtype)
        return o, after.kv, after.z

    def twin(q, k, v, log_decay, kv, z):
        before = None if kv is None else (kv, z)
        return reference.linear_attention(q, k, v, log_decay=log_decay, initial_state=before, **options)

    check_against(call, twin, (q, k, v, log_decay, *state), NAMES, dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dims", [(1, 7), (8, 8), (33, 17), (64, 64), (128, 128), (255, 3), (256, 256)], ids=str)
@pytest.mark.parametrize("decay", [None, "H", "Hk", "BTH", "BTHk"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("time", [0, 1, 31, 63, 64, 65, 127, 257])
def test_matches_the_quadratic_form_sweep(time, normalize, decay, dims, dtype):
    test_matches_the_quadratic_form((2, time, 4, 2, *dims, decay, normalize, True, True), dtype)


@pytest.mark.parametrize("decay", [None, "H", "Hk", "BTH", "BTHk"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_two_references_agree(decay, normalize):
    q, k, v, log_decay = make(torch.float64, 1, 23, 4, 2, 3, 5, decay=decay, positive=normalize)
    heads = 2 if log_decay is None else log_decay.shape[-1]
    options = {
        "log_decay": log_decay, "normalize": normalize, "mask": torch.rand(1, 23) > 0.3,
        "cu_seqlens": torch.tensor([0, 5, 5, 23]), "initial_state": make_state(torch.float64, 3, heads, 3, 5),
    }  # fmt: skip
    for a, b in zip(
        reference.linear_attention(q, k, v, **options),
        reference.linear_attention_recurrent(q, k, v, **options),
        strict=True,
    ):
        assert error(a, b) < 1e-13


def test_any_strides():
    q, k, v, log_decay = make(torch.float32, 2, 37, 4, 2, 8, 6, decay="BTH")
    plain, _ = linear_attention(q, k, v, log_decay=log_decay)

    def scattered(x):  # head first, and every third element of a longer last dimension
        wide = torch.full((x.shape[0], x.shape[2], x.shape[1], 3 * x.shape[3]), torch.nan)
        out = wide.transpose(1, 2)[..., 1::3]
        out.copy_(x)
        return out.requires_grad_()

    views = [scattered(x) for x in (q, k, v)]
    decay = log_decay.transpose(0, 2).contiguous().transpose(0, 2)
    o, _ = linear_attention(*views, log_decay=decay)
    assert torch.equal(o, plain)
    # an expanded gradient, as sum() gives it
    got = torch.autograd.grad(o.sum(), views)
    same = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(linear_attention(*same, log_decay=log_decay)[0], same, torch.ones_like(plain))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    shared = torch.randn(1, 1, 1, 8).expand(2, 37, 2, 8)
    assert torch.equal(linear_attention(q, shared, v)[0], linear_attention(q, shared.clone(), v)[0])
    state = make_state(torch.float32, 1, 2, 8, 6)
    expanded = LinearAttentionState(state.kv.expand(2, -1, -1, -1), state.z.expand(2, -1, -1))
    cloned = LinearAttentionState(*(x.clone() for x in expanded))
    assert torch.equal(
        linear_attention(q, k, v, initial_state=expanded)[0], linear_attention(q, k, v, initial_state=cloned)[0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_masked_tokens_do_nothing_whatever_they_hold(dtype, normalize):
    q, k, v, log_decay = make(dtype, 2, 90, 4, 2, 8, 8, decay="BTH", positive=True)
    mask = torch.rand(2, 90) > 0.4
    mask[1] = False
    for x in (q, k, v, log_decay):
        x[~mask] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v, log_decay)]
    o, state = linear_attention(
        q, k, v, log_decay=log_decay, normalize=normalize, eps=0.0, mask=mask, output_final_state=True
    )
    assert (o[~mask] == 0).all()
    assert o.isfinite().all()
    assert state.kv.isfinite().all()
    assert (state.kv[1] == 0).all()
    grads = torch.autograd.grad((o.float().pow(2).sum(), state.kv.sum()), leaves)
    for x in grads:
        assert x.isfinite().all()
        assert (x[~mask] == 0).all()
    # as if the masked tokens were not there
    short = [x.detach()[:1][mask[:1]].unsqueeze(0) for x in leaves]
    expected, after = linear_attention(
        *short[:3], log_decay=short[3], normalize=normalize, eps=0.0, output_final_state=True
    )
    assert error(o[:1][mask[:1]].unsqueeze(0), expected) < TOLERANCE[dtype]
    assert error(state.kv[:1], after.kv) < TOLERANCE[real(dtype)]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("decay", "normalize"), [(None, False), ("H", True), ("BTHk", True), ("BTH", False)])
def test_sequences_in_one_row_equal_each_alone(index_dtype, decay, normalize):
    offsets = [0, 0, 1, 70, 70, 135, 200]
    q, k, v, log_decay = make(torch.float64, 1, 200, 4, 2, 5, 6, decay=decay, positive=normalize)
    heads = 2 if log_decay is None else log_decay.shape[-1]
    state = make_state(torch.float64, 6, heads, 5, 6)
    mask = torch.rand(1, 200) > 0.2
    leaves = [x.requires_grad_() for x in (q, k, v, *([] if log_decay is None else [log_decay]), *state)]
    o, after = linear_attention(
        q, k, v, log_decay=log_decay, normalize=normalize, mask=mask, initial_state=state, output_final_state=True,
        cu_seqlens=torch.tensor(offsets, dtype=index_dtype),
    )  # fmt: skip
    outputs, kvs, zs = [], [], []
    for n, (a, b) in enumerate(itertools.pairwise(offsets)):
        g = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, a:b]
        own, end = linear_attention(
            q[:, a:b], k[:, a:b], v[:, a:b], log_decay=g, normalize=normalize, mask=mask[:, a:b],
            initial_state=LinearAttentionState(state.kv[n : n + 1], state.z[n : n + 1]), output_final_state=True,
        )  # fmt: skip
        outputs.append(own)
        kvs.append(end.kv)
        zs.append(end.z)
    assert torch.equal(o, torch.cat(outputs, 1))
    assert torch.equal(after.kv, torch.cat(kvs))
    assert torch.equal(after.z, torch.cat(zs))
    directions = [torch.randn_like(x) for x in (o, after.kv, after.z)]
    got = torch.autograd.grad((o, *after), leaves, directions)
    want = torch.autograd.grad((torch.cat(outputs, 1), torch.cat(kvs), torch.cat(zs)), leaves, directions)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-12


def test_empty_sizes():
    q, k, v, log_decay = make(torch.float32, 2, 0, 4, 2, 3, 5, decay="BTH")
    state = make_state(torch.float32, 2, 4, 3, 5)
    leaves = [x.requires_grad_() for x in (q, k, v, log_decay, *state)]
    o, after = linear_attention(
        q, k, v, log_decay=log_decay, normalize=True, initial_state=state, output_final_state=True
    )
    assert o.shape == (2, 0, 4, 5)
    assert torch.equal(after.kv, state.kv)
    grads = torch.autograd.grad((o.sum(), after.kv.sum(), after.z.sum()), leaves)
    assert [x.shape for x in grads] == [x.shape for x in leaves]
    assert (grads[4] == 1).all()
    assert (grads[5] == 1).all()
    _, zero = linear_attention(q, k, v, output_final_state=True)
    assert (zero.kv == 0).all()
    o, after = linear_attention(*make(torch.float32, 0, 7, 4, 2, 3, 5)[:3], output_final_state=True)
    assert o.shape == (0, 7, 4, 5)
    assert after.kv.shape == (0, 2, 3, 5)
    o, after = linear_attention(
        *make(torch.float32, 1, 0, 1, 1, 3, 5)[:3], output_final_state=True, cu_seqlens=torch.tensor([0])
    )
    assert after.kv.shape == (0, 1, 3, 5)
    one = make_state(torch.float32, 0, 1, 3, 5)
    q, k, v = (torch.zeros(0, 1, d) for d in (3, 3, 5))
    assert linear_attention_step(q, k, v, one).shape == (0, 1, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_strong_decay_forgets_and_never_overflows(dtype):
    q, k, v, log_decay = make(dtype, 1, 150, 2, 1, 8, 8, decay="BTH", positive=True)
    log_decay[:, 20] = -torch.inf
    log_decay[:, 40:43] = -1e4
    log_decay[:, 64] = -torch.inf
    log_decay[:, 100] = -1e30
    log_decay[:, 101] = 0
    leaves = [x.requires_grad_() for x in (q, k, v, log_decay)]
    o, state = linear_attention(q, k, v, log_decay=log_decay, normalize=True, output_final_state=True)
    want, kv, _ = reference.linear_attention(q, k, v, log_decay=log_decay, normalize=True)
    assert error(o, want) < TOLERANCE[dtype]
    assert error(state.kv, kv) < TOLERANCE[real(dtype)]
    direction = torch.randn_like(o)
    got = torch.autograd.grad(o, leaves, direction)
    expected = torch.autograd.grad(want, leaves, direction.double())
    for name, a, b in zip(NAMES, got, expected, strict=False):
        limit = DECAY_TOLERANCE[dtype] if name == "log_decay" else TOLERANCE[dtype]
        assert a.isfinite().all(), name
        assert error(a, b) < max(limit, 2e-5 if dtype == torch.float32 else 0), (name, error(a, b))
    for heads_decay in (torch.tensor([-torch.inf, -1e4]), torch.tensor([0.0, -50.0])):
        o, _ = linear_attention(q, k, v, log_decay=heads_decay)
        want, *_ = reference.linear_attention(q, k, v, log_decay=heads_decay)
        assert error(o, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("decay", ["H", "BTH"])
def test_a_long_sequence_stays_linear_and_accurate(decay):
    time = 200_000
    q, k, v, log_decay = make(torch.float32, 1, time, 1, 1, 4, 4, decay=decay, positive=True)
    log_decay = log_decay * 1e-3
    leaves = [x.requires_grad_() for x in (q, k, v, log_decay)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    direction = torch.randn(1, time, 1, 4)
    got, want = [], []
    for store, (a, b, c, g), d in ((got, leaves, direction), (want, doubles, direction.double())):
        o, state = linear_attention(a, b, c, log_decay=g, normalize=True, output_final_state=True)
        store += [o, state.kv, *torch.autograd.grad(o, (a, b, c, g), d)]
    assert [error(a, b) < 1e-5 for a, b in zip(got[:-1], want[:-1], strict=True)] == [True] * 5
    assert error(got[-1], want[-1]) < 3e-5
    recurrent, *_ = reference.linear_attention_recurrent(
        *(x[:, :500] for x in doubles[:3]), log_decay=doubles[3] if decay == "H" else doubles[3][:, :500],
        normalize=True,
    )  # fmt: skip
    assert error(want[0][:, :500], recurrent) < 1e-12


@pytest.mark.parametrize(("gamma", "normalize"), [(1.0, True), (31 / 32, False)])
def test_a_million_tokens(gamma, normalize):
    torch.manual_seed(0)
    time = 1_000_000
    q, k, v = (torch.rand(1, time, 1, 4) for _ in range(3))
    options = {"log_decay": torch.tensor([math.log(gamma)]), "scale": 1.0, "normalize": normalize}
    o, state = linear_attention(q, k, v, **options, output_final_state=True)
    # the recurrence itself: x_t = gamma x_{t-1} + u_t, with the gamma that float32 holds
    factors = [1.0], [1.0, -options["log_decay"].double().exp().item()]
    q64, k64, v64 = (x[0, :, 0].double().numpy() for x in (q, k, v))
    kv = scipy.signal.lfilter(*factors, k64[:, :, None] * v64[:, None, :], axis=0)
    z = scipy.signal.lfilter(*factors, k64, axis=0)
    expected = (q64[:, :, None] * kv).sum(1) / ((q64 * z).sum(1, keepdims=True) + 1e-6 if normalize else 1)
    assert o.isfinite().all()
    assert error(o[0, :, 0], torch.from_numpy(expected)) < 1e-5
    assert error(state.kv[0, 0], torch.from_numpy(kv[-1])) < 1e-5
    # in two calls
    cut = 700_001
    first, between = linear_attention(*(x[:, :cut] for x in (q, k, v)), **options, output_final_state=True)
    second, last = linear_attention(
        *(x[:, cut:] for x in (q, k, v)), **options, initial_state=between, output_final_state=True
    )
    assert error(torch.cat([first, second], 1), o) < 1e-5
    assert error(last.kv, state.kv) < 1e-5


@pytest.mark.long
def test_offsets_beyond_32_bits():
    # 2^31 + elements of address space, of which a few pages are ever touched
    step = 2**26
    wide = torch.empty(40 * step, dtype=torch.float16).as_strided((1, 40, 1, 8), (0, step, 8, 1))
    wide.normal_()
    small = wide.clone()
    assert torch.equal(linear_attention(wide, wide, wide)[0], linear_attention(small, small, small)[0])


@pytest.mark.parametrize("time", [1, 2, 40, 512, 513, 2000])
@pytest.mark.parametrize("strength", [0.01, 1.0, 20.0])
def test_the_gradient_of_the_decay_is_accurate_at_every_length(time, strength):
    q, k, v, _ = make(torch.float32, 1, time, 2, 2, 16, 16)
    log_decay = make_decay("BTHk", 1, time, 2, 2, torch.float32, strength).requires_grad_()
    state = make_state(torch.float32, 1, 2, 16, 16)
    o, after = linear_attention(q, k, v, log_decay=log_decay, initial_state=state, output_final_state=True)
    double = log_decay.detach().double().requires_grad_()
    o2, kv2, _ = reference.linear_attention(q, k, v, log_decay=double, initial_state=state)
    directions = [torch.randn_like(x) for x in (o, after.kv)]
    (got,) = torch.autograd.grad((o, after.kv), log_decay, directions)
    (want,) = torch.autograd.grad((o2, kv2), double, [x.double() for x in directions])
    assert error(got, want) < 3e-5


@pytest.mark.parametrize("chunked", [(64,), (65,), (130,), (30, 100, 130)], ids=str)
@pytest.mark.parametrize("strength", [5.0, 15.0, 25.0])
def test_the_gradient_of_a_strong_decay_does_not_drown(chunked, strength):
    # the gradient is as small as exp(-strength); what the rest of the sequence adds up to must leave no trace in it
    time, heads = chunked[-1], 2
    q, k, v, _ = make(torch.float32, 1, time, heads, heads, 8, 8)
    offsets = torch.tensor([0, *chunked])
    sequences = len(chunked)
    state = make_state(torch.float32, sequences, heads, 8, 8)
    direction, after = torch.randn(1, time, heads, 8), torch.randn(sequences, heads, 8, 8)
    log_decay = torch.full((heads,), -strength)
    got, want = log_decay.clone().requires_grad_(), log_decay.double().requires_grad_()
    o, final = linear_attention(
        q, k, v, log_decay=got, initial_state=state, output_final_state=True, cu_seqlens=offsets
    )
    torch.autograd.backward((o, final.kv), (direction, after))
    # the recurrence multiplies the decay out: no difference of large sums in its gradient either
    o, kv, _ = reference.linear_attention_recurrent(q, k, v, log_decay=want, initial_state=state, cu_seqlens=offsets)
    torch.autograd.backward((o, kv), (direction.double(), after.double()))
    assert error(got.grad, want.grad) < 3e-5


def test_the_gradient_of_the_decay_is_zero_where_there_is_nothing_to_forget():
    q, k, v, _ = make(torch.float32, 2, 1, 2, 2, 16, 16)
    log_decay = torch.full((2, 1, 2), -0.5, requires_grad=True)
    o, _ = linear_attention(q, k, v, log_decay=log_decay)
    (got,) = torch.autograd.grad(o.sum(), log_decay)
    assert (got == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("normalize", [False, True])
def test_nan_stays_in_its_sequence_and_head(bad, normalize):
    q, k, v, log_decay = make(torch.float32, 2, 80, 4, 2, 8, 8, decay="BTH", positive=True)

    def run():
        leaves = [x.detach().requires_grad_() for x in (q, k, v, log_decay)]
        o, state = linear_attention(*leaves[:3], log_decay=leaves[3], normalize=normalize, output_final_state=True)
        return [o, *(x for x in state if x is not None), *torch.autograd.grad(o.sum() + state.kv.sum(), leaves)]

    clean = run()
    for x in (k, v):
        x[1, 30, 1, 3] = bad
    q[1, 30, 2, 3] = bad
    log_decay[1, 20, 3] = -torch.inf
    dirty = run()
    for a, b in zip(clean, dirty, strict=True):
        if a.shape[:2] == (2, 80):  # [B, T, heads, ...]
            a, b = a.transpose(1, 2), b.transpose(1, 2)
        half = a.shape[1] // 2
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1, :half], b[1, :half])


@pytest.mark.parametrize("normalize", [False, True])
def test_bitwise_the_same_for_any_number_of_threads(normalize):
    q, k, v, log_decay = make(torch.float32, 1, 300, 4, 2, 24, 130, decay="BTH", positive=True)

    def run(threads):
        torch.set_num_threads(threads)
        leaves = [x.detach().requires_grad_() for x in (q, k, v, log_decay)]
        o, state = linear_attention(*leaves[:3], log_decay=leaves[3], normalize=normalize, output_final_state=True)
        return [o, state.kv, *torch.autograd.grad(o.square().sum(), leaves)]

    before = torch.get_num_threads()
    try:
        once = run(1)
        for threads in (1, 2, 3):
            assert all(torch.equal(a, b) for a, b in zip(once, run(threads), strict=True))
    finally:
        torch.set_num_threads(before)


@settings(max_examples=25, deadline=None)
@given(
    time=st.integers(1, 150),
    cut=st.integers(0, 150),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    dims=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    decay=st.sampled_from([None, "H", "Hk", "BTH", "BTHk"]),
    normalize=st.booleans(),
)
def test_a_sequence_can_be_cut_anywhere(time, cut, heads, dims, decay, normalize):
    cut = min(cut, time)
    q, k, v, log_decay = make(torch.float64, 2, time, *heads, *dims, decay=decay, positive=normalize)
    options = {"normalize": normalize, "output_final_state": True}
    o, state = linear_attention(q, k, v, log_decay=log_decay, **options)
    parts, carried = [], None
    for a, b in ((0, cut), (cut, time)):
        g = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, a:b]
        own, carried = linear_attention(q[:, a:b], k[:, a:b], v[:, a:b], log_decay=g, initial_state=carried, **options)
        parts.append(own)
    assert error(torch.cat(parts, 1), o) < 1e-12
    assert error(carried.kv, state.kv) < 1e-12
    assert (carried.z is None) == (not normalize)


# --- the step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("decay", [None, "H", "Hk", "BTH", "BTHk"])
@pytest.mark.parametrize("normalize", [False, True])
def test_step_equals_the_scan_token_by_token(dtype, decay, normalize):
    q, k, v, log_decay = make(dtype, 3, 6, 4, 2, 7, 11, decay=decay, positive=normalize)
    mask = torch.rand(3, 6) > 0.3
    heads = 2 if log_decay is None else log_decay.shape[-1]
    state = make_state(dtype, 3, heads, 7, 11)
    scanned, after = linear_attention(
        q, k, v, log_decay=log_decay, normalize=normalize, mask=mask, initial_state=state, output_final_state=True
    )
    # a state of awkward strides, updated where it lies
    kv = state.kv.transpose(1, 3).contiguous().transpose(1, 3)
    kept = LinearAttentionState(kv, state.z.clone())
    outputs = []
    for t in range(6):
        g = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, t]
        outputs.append(
            linear_attention_step(q[:, t], k[:, t], v[:, t], kept, log_decay=g, normalize=normalize, mask=mask[:, t])
        )
    assert kept.kv is kv
    assert error(torch.stack(outputs, 1), scanned) < TOLERANCE[dtype]
    assert error(kept.kv, after.kv) < TOLERANCE[real(dtype)]
    assert error(kept.z, after.z) < TOLERANCE[real(dtype)]


def test_step_is_for_inference_only():
    q = k = torch.ones(1, 1, 2)
    v = torch.ones(1, 1, 3, requires_grad=True)
    state = LinearAttentionState(torch.zeros(1, 1, 2, 3))
    with pytest.raises(RuntimeError, match=r"v require one.*no_grad"):
        linear_attention_step(q, k, v, state)
    assert (state.kv == 0).all()
    with torch.no_grad():
        linear_attention_step(q, k, v, state)
    assert (state.kv == 1).all()
    with pytest.raises(ValueError, match="expanded"):
        linear_attention_step(q, k, v.detach(), LinearAttentionState(torch.zeros(1, 1, 2, 1).expand(1, 1, 2, 3)))


def test_step_leaves_masked_rows_alone_whatever_they_hold():
    q, k, v = (torch.full((2, 1, 4), torch.nan) for _ in range(3))
    for x in (q, k, v):
        x[1] = 1
    state = LinearAttentionState(torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4))
    o = linear_attention_step(q, k, v, state, mask=torch.tensor([False, True]), normalize=True)
    assert (o[0] == 0).all()
    assert (state.kv[0] == 1).all()
    assert (state.z[0] == 1).all()
    assert (state.kv[1] == 2).all()


# --- feature maps -------------------------------------------------------------------------------------------------

FEATURE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature", ["softmax", "exp", "softmax_pm"])
@pytest.mark.parametrize(("per_head", "weighted", "decay", "normalize"), [
    (False, None, None, False), (True, "F", "BTH", True), (True, "HkF", "H", False), (False, "HkF", "Hk", True),
])  # fmt: skip
def test_feature_map_matches_the_reference(dtype, feature, per_head, weighted, decay, normalize):
    q, k, v, log_decay = make(dtype, 2, 75, 4, 2, 12, 10, decay=decay)
    shape = (2, 12, 16) if per_head else (12, 16)
    count = 32 if feature == "softmax_pm" else 16
    projection = (torch.randn(shape) * 0.3).to(real(dtype)).requires_grad_()
    weights = None
    if weighted:
        weights = torch.rand((count,) if weighted == "F" else (2, count), dtype=real(dtype)) + 0.5
        weights.requires_grad_()
    mask = torch.rand(2, 75) > 0.2
    options = {"feature": feature, "normalize": normalize, "mask": mask}
    leaves = [x.requires_grad_() for x in (q, k, v, log_decay, weights) if x is not None] + [projection]
    o, state = feature_map_attention(
        q, k, v, projection, weights=weights, log_decay=log_decay, output_final_state=True, **options
    )
    want, kv, _ = reference.feature_map_attention(q, k, v, projection, weights=weights, log_decay=log_decay, **options)
    assert o.dtype == dtype
    assert state.kv.shape[-2] == count
    assert error(o, want) < FEATURE_TOLERANCE[dtype]
    assert error(state.kv, kv) < FEATURE_TOLERANCE[dtype]
    direction = torch.randn_like(o)
    got = torch.autograd.grad(o, leaves, direction)
    expected = torch.autograd.grad(want, leaves, direction.double())
    for x, a, b in zip(leaves, got, expected, strict=True):
        limit = max(FEATURE_TOLERANCE[dtype], DECAY_TOLERANCE[dtype]) if x is log_decay else FEATURE_TOLERANCE[dtype]
        assert error(a, b) < limit, (tuple(x.shape), error(a, b))


def test_feature_map_keeps_masked_nan_out_of_every_gradient():
    q, k, v, _ = make(torch.float32, 1, 20, 2, 2, 4, 4)
    mask = torch.arange(20)[None] >= 5
    for x in (q, k, v):
        x[~mask] = torch.nan
    projection = torch.randn(4, 6, requires_grad=True)
    leaves = [x.requires_grad_() for x in (q, k, v)] + [projection]
    o, _ = feature_map_attention(q, k, v, projection, mask=mask, normalize=True)
    for x in torch.autograd.grad(o.square().sum(), leaves):
        assert x.isfinite().all()


FEATURE_NAMES = ("q", "k", "v", "projection", "weights", "log_decay", "kv", "z")


def check_feature_map(dtype, time, heads, dims, feature, shared, weighted, decay, normalize, masked, state, offsets):
    """Outputs and every gradient, those of and through the final state included, against the float64 twin."""
    query_heads, key_heads = heads
    key_dim, columns, value_dim = dims
    batch = 2 if offsets is None else 1
    q, k, v, log_decay = make(dtype, batch, time, query_heads, key_heads, key_dim, value_dim, decay=decay)
    lead = () if shared else (key_heads,)
    count = 2 * columns if feature == "softmax_pm" else columns
    projection = torch.randn(*lead, key_dim, columns, dtype=real(dtype)) * 0.3
    weights = torch.rand(*lead, count, dtype=real(dtype)) + 0.5 if weighted else None
    mask = torch.rand(batch, time) > 0.3 if masked else None
    sequences = batch if offsets is None else len(offsets) - 1
    state_heads = key_heads if log_decay is None else log_decay.shape[-1]
    before = make_state(dtype, sequences, state_heads, count, value_dim) if state else (None, None)
    options = {
        "feature": feature, "normalize": normalize, "eps": 0.1, "mask": mask,
        "cu_seqlens": None if offsets is None else torch.tensor(offsets),
    }  # fmt: skip

    def call(q, k, v, projection, weights, log_decay, kv, z):
        initial = None if kv is None else LinearAttentionState(kv, z)
        o, after = feature_map_attention(
            q, k, v, projection, weights=weights, log_decay=log_decay, initial_state=initial, output_final_state=True,
            **options,
        )  # fmt: skip
        return o, after.kv, after.z

    def twin(q, k, v, projection, weights, log_decay, kv, z):
        return reference.feature_map_attention(
            q, k, v, projection, weights=weights, log_decay=log_decay,
            initial_state=None if kv is None else (kv, z), **options,
        )  # fmt: skip

    check_against(call, twin, (q, k, v, projection, weights, log_decay, *before), FEATURE_NAMES, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("feature", ["softmax", "exp", "softmax_pm"])
@pytest.mark.parametrize("case", [
    # heads, dims, shared map, weights, decay, normalize, mask, state, cu_seqlens
    ((1, 1), (5, 3, 4), True, False, None, False, False, False, None),
    ((4, 2), (17, 20, 9), False, True, "BTH", True, True, True, None),
    ((4, 2), (16, 33, 5), True, True, "BTHk", False, True, True, [0, 7, 7, 70, 130]),
    ((2, 2), (33, 16, 40), False, False, "H", True, False, True, [0, 1, 129, 130]),
    ((6, 1), (8, 8, 8), True, True, None, True, True, False, None),
], ids=str)  # fmt: skip
def test_feature_map_with_all_options(case, feature, dtype):
    heads, dims, shared, weighted, decay, normalize, masked, state, offsets = case
    check_feature_map(dtype, 130, heads, dims, feature, shared, weighted, decay, normalize, masked, state, offsets)


@pytest.mark.long
@pytest.mark.parametrize("feature", ["softmax", "exp", "softmax_pm"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
@pytest.mark.parametrize("decay", [None, "H", "Hk", "BTH", "BTHk"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("offsets", "state"), [(None, False), ([0, 0, 515, 540], True)])
def test_feature_map_sweep(feature, weighted, masked, heads, decay, normalize, offsets, state):
    for shared in (False, True):
        check_feature_map(
            torch.float32, 540, heads, (12, 16, 10), feature, shared, weighted, decay, normalize, masked, state, offsets
        )


def test_features_of_any_size_stay_finite_and_right():
    # far beyond what exp() of a float holds, for the softmax; infinite where exp() is
    q, k, v, _ = make(torch.float32, 1, 70, 2, 2, 8, 4)
    projection = torch.randn(8, 24) * 100
    o, _ = feature_map_attention(q, k, v, projection, normalize=True)
    want, *_ = reference.feature_map_attention(q, k, v, projection, normalize=True)
    assert o.isfinite().all()
    assert error(o, want) < 1e-3
    spread = torch.linspace(-110, 110, 441)
    _, state = feature_map_attention(
        torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), spread[None], feature="exp",
        output_final_state=True,
    )  # fmt: skip
    got, want = state.kv.flatten().double(), spread.double().exp()
    normal = (spread > -87) & (spread < 88.7)
    assert ((got - want).abs() <= 2e-7 * want)[normal].all()
    assert torch.equal(got[spread > 88.8].isinf(), torch.ones_like(got[spread > 88.8], dtype=torch.bool))
    assert (got[spread < -87] < 2e-38).all()


def test_features_do_not_fill_memory():
    program = """
import resource, torch
from freqrank import feature_map_attention
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
x = torch.randn(1, 65536, 1, 16).bfloat16().requires_grad_()
projection = torch.randn(16, 256, requires_grad=True)
run = lambda x: feature_map_attention(x, x, x, projection)[0].sum().backward()
run(x[:, :600])
before = peak()
run(x)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40  # the features of q or k would be 64 MiB; so much are o and the gradients


@pytest.mark.parametrize(("normalize", "decay", "offsets"), [
    (False, None, None), (True, "BTH", None), (True, "H", [0, 1100, 1100, 1101, 1300]),
])  # fmt: skip
def test_split_sequences_give_the_same_bits(normalize, decay, offsets):
    # with more threads than key heads, segments of a sequence are computed at the same time
    q, k, v, log_decay = make(torch.float32, 1, 1300, 4, 2, 24, 20, decay=decay, positive=True)
    projection, weights = torch.randn(2, 24, 16), torch.rand(16)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    sequences, heads = 1 if offsets is None else len(offsets) - 1, 2 if decay is None else 4
    options = {"normalize": normalize, "output_final_state": True, "cu_seqlens": cu_seqlens}

    def run(threads):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        leaves = [x.detach().requires_grad_() for x in (q, k, v, projection, weights, log_decay) if x is not None]
        g = None if log_decay is None else leaves[5]
        results = []
        for dim in (24, 16):
            state = make_state(torch.float32, sequences, heads, dim, 20)
            if dim == 24:
                o, after = linear_attention(*leaves[:3], log_decay=g, initial_state=state, **options)
            else:
                o, after = feature_map_attention(
                    *leaves[:4], weights=leaves[4], log_decay=g, initial_state=state, **options
                )
            loss = o.square().sum() + after.kv.square().sum()
            results += [o, *after, *torch.autograd.grad(loss, leaves, allow_unused=True)]
        return [x for x in results if x is not None]

    before = torch.get_num_threads()
    try:
        once = run(1)
        for threads in (2, 3, 5, 16):
            assert all(torch.equal(a, b) for a, b in zip(once, run(threads), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("transform", ["idct", "dct"])
@pytest.mark.parametrize("key_dim", [1, 2, 7, 16])
@pytest.mark.parametrize("per_head", [False, True])
def test_dijiang_matches_its_definition(transform, key_dim, per_head):
    q, k, v, log_decay = make(torch.float64, 2, 40, 4, 2, key_dim, 6, decay="H")
    scales = torch.randn((2, key_dim) if per_head else (key_dim,), dtype=torch.float64, requires_grad=True)
    signs = torch.where(torch.rand(key_dim) < 0.5, -1.0, 1.0)
    options = {"transform": transform, "signs": signs, "log_decay": log_decay, "normalize": True}
    o, _ = dijiang_attention(q, k, v, scales, **options)
    want, *_ = reference.dijiang_attention(q, k, v, scales, **options)
    assert error(o, want) < 1e-12
    direction = torch.randn_like(o)
    (got,) = torch.autograd.grad(o, scales, direction)
    (expected,) = torch.autograd.grad(want, scales, direction)
    if key_dim > 1:  # a softmax of one feature is 1 and has no gradient
        assert error(got, expected) < 1e-9


# --- the step behind a feature map --------------------------------------------------------------------------------


def stepped(step, q, k, v, state, *more, log_decay=None, mask=None, **options):
    """The outputs of steps over [B, T, ...]."""
    outputs = []
    for t in range(q.shape[1]):
        g = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, t]
        live = None if mask is None else mask[:, t]
        outputs.append(step(q[:, t], k[:, t], v[:, t], state, *more, log_decay=g, mask=live, **options))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature", ["softmax", "exp", "softmax_pm"])
@pytest.mark.parametrize("case", [
    # heads, dims, a map a head, weights, decay, normalize, mask
    ((1, 1), (5, 3, 4), False, None, None, False, False),
    ((4, 2), (17, 20, 9), True, "F", "BTH", True, True),
    ((4, 2), (16, 33, 5), True, "HkF", "BTHk", False, True),
    ((2, 2), (33, 70, 40), False, "HkF", "H", True, False),
    ((9, 1), (128, 128, 64), False, "F", "Hk", True, True),
    ((3, 3), (64, 48, 130), True, None, None, True, False),
], ids=str)  # fmt: skip
def test_feature_map_step_equals_the_scan_token_by_token(case, feature, dtype):
    heads, (key_dim, columns, value_dim), per_head, weighted, decay, normalize, masked = case
    q, k, v, log_decay = make(dtype, 3, 6, *heads, key_dim, value_dim, decay=decay)
    count = 2 * columns if feature == "softmax_pm" else columns
    projection = torch.randn(*([heads[1]] if per_head else []), key_dim, columns, dtype=real(dtype)) * key_dim**-0.5
    weights = None
    if weighted:
        weights = torch.rand((count,) if weighted == "F" else (heads[1], count), dtype=real(dtype)) + 0.5
    mask = torch.rand(3, 6) > 0.3 if masked else None
    if masked:
        for x in (q, k, v):
            x[~mask] = torch.nan
    state = make_state(dtype, 3, heads[1] if log_decay is None else log_decay.shape[-1], count, value_dim)
    state = LinearAttentionState(state.kv, state.z.abs())
    options = {"feature": feature, "weights": weights, "log_decay": log_decay, "normalize": normalize, "mask": mask}
    scanned, after = feature_map_attention(q, k, v, projection, initial_state=state, output_final_state=True, **options)
    clean = [x if mask is None else x.masked_fill(~mask[..., None, None], 0) for x in (q, k, v)]
    want, kv, z = reference.feature_map_attention(*clean, projection, initial_state=state, **options)
    # a state of awkward strides, updated where it lies
    kept = LinearAttentionState(state.kv.transpose(1, 3).contiguous().transpose(1, 3), state.z.clone())
    place = kept.kv.data_ptr()
    o = stepped(feature_map_attention_step, q, k, v, kept, projection, **options)
    assert o.dtype == dtype
    assert kept.kv.data_ptr() == place
    for got, others in ((o, (scanned, want)), (kept.kv, (after.kv, kv)), (kept.z, (after.z, z))):
        for other in others:
            assert error(got, other) < (TOLERANCE[dtype] if got is o else TOLERANCE[real(dtype)])


@pytest.mark.parametrize("transform", ["idct", "dct"])
@pytest.mark.parametrize("per_head", [False, True])
def test_dijiang_step_equals_the_scan_token_by_token(transform, per_head):
    q, k, v, log_decay = make(torch.float64, 2, 5, 4, 2, 7, 6, decay="H")
    scales = torch.randn((2, 7) if per_head else (7,), dtype=torch.float64)
    options = {
        "transform": transform, "signs": torch.where(torch.rand(7) < 0.5, -1.0, 1.0), "log_decay": log_decay,
        "normalize": True, "feature": "softmax_pm", "weights": torch.rand(14, dtype=torch.float64) + 0.5,
    }  # fmt: skip
    scanned, after = dijiang_attention(q, k, v, scales, output_final_state=True, **options)
    state = LinearAttentionState(*(torch.zeros_like(x) for x in after))
    o = stepped(dijiang_attention_step, q, k, v, state, scales, **options)
    want, kv, z = reference.dijiang_attention(q, k, v, scales, **options)
    for got, others in ((o, (scanned, want)), (state.kv, (after.kv, kv)), (state.z, (after.z, z))):
        assert all(error(got, other) < 1e-12 for other in others)


def test_feature_map_step_takes_any_strides():
    q, k, v, _ = make(torch.float32, 2, 1, 6, 2, 12, 9)
    q, k, v = q[:, 0], k[:, 0], v[:, 0]
    projection, weights = torch.randn(2, 12, 21), torch.rand(2, 42)
    state = torch.randn(2, 2, 42, 9)
    options = {"feature": "softmax_pm", "weights": weights}
    kept = LinearAttentionState(state.clone())
    want = feature_map_attention_step(q, k, v, kept, projection, **options)
    spread = lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)  # noqa: E731
    gaps = torch.zeros(2, 12, 63)[..., ::3].copy_(projection)
    for p, w in ((spread(projection), spread(weights)), (gaps, weights), (projection, weights.double())):
        other = LinearAttentionState(spread(state))
        o = feature_map_attention_step(spread(q), spread(k), spread(v), other, p, feature="softmax_pm", weights=w)
        assert error(o, want) < 1e-6
        assert error(other.kv, kept.kv) < 1e-6
    # one key and one projection for all, without a copy
    one = k[:1, :1].expand(2, 2, 12)
    states = [LinearAttentionState(state.clone()) for _ in range(2)]
    o = feature_map_attention_step(q, one, v, states[0], projection[:1].expand(2, 12, 21), **options)
    want = feature_map_attention_step(q, one.clone(), v, states[1], projection[0], **options)
    assert torch.equal(o, want)


def test_feature_map_step_at_its_limits():
    q, v = torch.randn(1, 2, 256), torch.randn(1, 1, 512)
    projection, weights = torch.randn(256, 512) / 16, torch.rand(512)
    state = LinearAttentionState(torch.zeros(1, 1, 512, 512), torch.zeros(1, 1, 512))
    o = feature_map_attention_step(q, q[:, :1], v, state, projection, weights=weights, normalize=True, eps=0.0)
    assert error(o, v.expand(1, 2, 512)) < 1e-5
    phi = reference.feature_map(q[:, None, :1], 1, projection, "softmax", weights)[:, 0]
    assert error(state.z, phi) < 1e-5
    assert error(state.kv, phi[..., None] * v.double()[:, :, None]) < 1e-5
    empty = LinearAttentionState(torch.zeros(0, 1, 512, 512))
    assert feature_map_attention_step(q[:0], q[:0, :1], v[:0], empty, projection).shape == (0, 2, 512)
    wide = torch.randn(1, 1, 257)
    with pytest.raises(ValueError, match=r"K.* between 1 and 256; got 257"):
        feature_map_attention_step(wide, wide, v, state, torch.randn(257, 512))
    with pytest.raises(ValueError, match=r"V.* between 1 and 512; got 513"):
        feature_map_attention_step(q, q[:, :1], torch.zeros(1, 1, 513), state, projection)


@pytest.mark.parametrize("feature", ["softmax", "exp", "softmax_pm"])
def test_feature_map_step_keeps_nan_to_its_row_and_head(feature):
    q, k, v, _ = make(torch.float32, 2, 1, 4, 2, 6, 5)
    q, k, v = q[:, 0], k[:, 0], v[:, 0]
    projection = torch.randn(6, 16)
    zeros = torch.zeros(2, 2, 32 if feature == "softmax_pm" else 16, 5)

    def run(q, k):
        state = LinearAttentionState(zeros.clone())
        return feature_map_attention_step(q, k, v, state, projection, feature=feature), state.kv

    o, kv = run(q, k)
    q[0, 1, 2], k[1, 1, 3] = torch.nan, torch.nan
    got, after = run(q, k)
    o[0, 1], o[1, 2:], kv[1, 1] = torch.nan, torch.nan, torch.nan
    assert torch.equal(got.nan_to_num(7), o.nan_to_num(7))
    assert torch.equal(after.nan_to_num(7), kv.nan_to_num(7))


@pytest.mark.parametrize("step", [linear_attention_step, lambda *a: feature_map_attention_step(*a, torch.ones(2, 3))])
def test_steps_write_where_autograd_sees_it(step):
    q = torch.ones(1, 1, 2)
    features = 2 if step is linear_attention_step else 3
    for saved in range(2):
        state = LinearAttentionState(torch.zeros(1, 1, features, 2), torch.zeros(1, 1, features))
        w = torch.ones((), requires_grad=True)
        loss = (w * state[saved]).sum()
        step(q, q, q, state)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with pytest.raises(RuntimeError, match="step has no forward-mode derivative"):
        torch.func.jvp(lambda q: step(q, q, q, state), (q,), (q,))


def test_vmap_over_log_decay():
    q, log_decay = torch.randn(3, 1, 5, 2, 4), -torch.rand(3, 2)
    run = lambda q, log_decay: linear_attention(q, q, q, log_decay=log_decay)[0]  # noqa: E731
    want = torch.stack([run(*each) for each in zip(q, log_decay, strict=True)])
    assert torch.equal(torch.func.vmap(run)(q, log_decay), want)


def test_feature_map_step_is_for_inference_only():
    q = torch.ones(1, 1, 2)
    state = LinearAttentionState(torch.zeros(1, 1, 3, 2))
    projection, weights, scales = (torch.ones(shape, requires_grad=True) for shape in ((2, 3), (3,), (2,)))
    message = "feature_map_attention_step has no gradient, and {} require one.*or use feature_map_attention with"
    with pytest.raises(RuntimeError, match=message.format("projection, weights")):
        feature_map_attention_step(q, q, q, state, projection, weights=weights)
    with pytest.raises(RuntimeError, match="dijiang_attention_step has no gradient, and scales require one"):
        dijiang_attention_step(q, q, q, LinearAttentionState(torch.zeros(1, 1, 2, 2)), scales)
    assert (state.kv == 0).all()
    with torch.no_grad():
        feature_map_attention_step(q, q, q, state, projection, weights=weights)
    assert (state.kv != 0).all()
    with pytest.raises(TypeError, match=r"state must be a LinearAttentionState\(kv, z\); got None"):
        feature_map_attention_step(q, q, q, None, projection)
    with pytest.raises(ValueError, match=r"state.kv must be \[N,Hs,K,V\] = \[1, 1, 6, 2\]; got shape \(1, 1, 3, 2\)"):
        feature_map_attention_step(q, q, q, state, projection.detach(), feature="softmax_pm")


def test_dijiang_transform_is_the_inverse_dct_of_scipy():
    fft = pytest.importorskip("scipy.fft")
    x = torch.randn(1, 3, 1, 8, dtype=torch.float64)
    v = torch.randn(1, 3, 1, 2, dtype=torch.float64)
    for transform, apply in (("idct", fft.idct), ("dct", fft.dct)):
        p = torch.tensor(apply(x.numpy(), norm="ortho"))
        want, _ = linear_attention(p.exp(), p.exp(), v, scale=1.0)
        got, _ = dijiang_attention(x, x, v, torch.ones(8), transform=transform, feature="exp")
        assert error(got, want) < 1e-13


# --- derivatives of higher order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "H", "Hk", "BTH", "BTHk"])
@pytest.mark.parametrize(("normalize", "varlen"), [(True, False), (False, True), (True, True)])
def test_gradcheck_and_gradgradcheck(kind, normalize, varlen):
    batch = 1 if varlen else 2
    q, k, v, log_decay = make(torch.float64, batch, 4, 2, 1, 2, 2, decay=kind, positive=True)
    log_decay = None if log_decay is None else log_decay - 0.1
    sequences = 3 if varlen else 2
    heads = 1 if log_decay is None else log_decay.shape[-1]
    state = make_state(torch.float64, sequences, heads, 2, 2)
    mask = torch.tensor([[True, True, False, True]] * batch)
    offsets = torch.tensor([0, 1, 1, 4]) if varlen else None

    def run(q, k, v, kv, z, log_decay=None):
        o, after = linear_attention(
            q, k, v, log_decay=log_decay, normalize=normalize, mask=mask, initial_state=LinearAttentionState(kv, z),
            output_final_state=True, cu_seqlens=offsets,
        )  # fmt: skip
        return o, *after

    tensors = [x.requires_grad_() for x in (q, k, v, *state, *([] if log_decay is None else [log_decay]))]
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("feature", ["softmax", "exp", "softmax_pm"])
@pytest.mark.parametrize("masked", [False, True])
def test_feature_map_gradgradcheck(feature, masked):
    q, k, v, log_decay = make(torch.float64, 1, 3, 2, 1, 2, 2, decay="BTH")
    projection = torch.randn(2, 2, dtype=torch.float64)
    mask = torch.tensor([[True, False, True]]) if masked else None
    weights = torch.rand(4 if feature == "softmax_pm" else 2, dtype=torch.float64) + 0.5

    def run(q, k, v, projection, weights, log_decay):
        return feature_map_attention(
            q, k, v, projection, feature=feature, weights=weights, log_decay=log_decay - 0.1, normalize=True, mask=mask
        )[0]

    tensors = [x.requires_grad_() for x in (q, k, v, projection, weights, log_decay)]
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def test_third_derivatives():
    x = torch.rand(1, 3, 1, 2, dtype=torch.float64, requires_grad=True)

    def values(f):
        y = f(x, x, x.pow(2))
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            y = y.pow(2)
        return y

    got = values(lambda q, k, v: linear_attention(q, k, v, normalize=True)[0])
    want = values(lambda q, k, v: reference.linear_attention(q, k, v, normalize=True)[0])
    assert error(got, want) < 1e-10


def test_second_derivatives_across_chunks_with_strong_decay():
    q, k, v, log_decay = make(torch.float64, 1, 150, 2, 1, 3, 3, decay="BTH", positive=True)
    log_decay[0, 70] = -torch.inf
    leaves = [x.requires_grad_() for x in (q, k, v, log_decay)]
    results = []
    for f in (linear_attention, reference.linear_attention):
        o = f(q, k, v, log_decay=log_decay, normalize=True)[0]
        first = torch.autograd.grad(o.square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        assert error(a, b) < 1e-10


# --- torch's machinery --------------------------------------------------------------------------------------------


def test_opcheck():
    q, k, v, log_decay = make(torch.float32, 1, 9, 2, 1, 3, 4, decay="BTH", positive=True)
    state = make_state(torch.float32, 2, 2, 3, 4)
    mask = torch.arange(9)[None] > 0
    offsets = torch.tensor([0, 4, 9])
    leaves = [x.requires_grad_() for x in (q, k, v, log_decay)]
    op = torch.ops.freqrank.linear_attention.default
    torch.library.opcheck(op, (*leaves, mask, offsets, *state, 0.5, True, 1e-6, True, True))
    torch.library.opcheck(op, (q, k, v, None, None, None, None, None, 0.5, False, 1e-6, False, False))
    backward = torch.ops.freqrank.linear_attention_backward.default
    plain = [x.detach() for x in leaves]
    torch.library.opcheck(
        backward,
        (torch.randn(1, 9, 2, 4), *state, *plain, mask, offsets, *state, None, None, None, 0.5, True, 1e-6, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    projection, weights = torch.randn(1, 3, 2, requires_grad=True), torch.rand(4, requires_grad=True)
    own = make_state(torch.float32, 2, 2, 4, 4)
    op = torch.ops.freqrank.feature_map_attention.default
    options = (True, 1e-6, True, True)
    torch.library.opcheck(op, (*leaves[:3], projection, weights, 2, leaves[3], mask, offsets, *own, *options))
    torch.library.opcheck(op, (q, k, v, projection, None, 0, None, None, None, None, None, False, 1e-6, False, False))
    backward = torch.ops.freqrank.feature_map_attention_backward.default
    torch.library.opcheck(
        backward,
        (
            torch.randn(1, 9, 2, 4), *own, *plain[:3], projection.detach(), weights.detach(), 2, plain[3], mask,
            offsets, *own, None, None, None, True, 1e-6, True, True,
        ),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
    token = [x[:, 0] for x in plain]
    step = torch.ops.freqrank.linear_attention_step.default
    torch.library.opcheck(
        step, (*token[:3], state.kv[:1].clone(), state.z[:1].clone(), token[3], None, 0.5, True, 1e-6)
    )
    step = torch.ops.freqrank.feature_map_attention_step.default
    kv, z = own.kv[:1].clone(), own.z[:1].clone()
    map_of_token = (projection.detach(), weights.detach(), 2)
    torch.library.opcheck(step, (*token[:3], *map_of_token, kv, z, token[3], mask[:, 0], True, 1e-6))
    torch.library.opcheck(
        step, (*token[:3], projection.detach(), None, 0, kv[:, :1, :2].clone(), None, None, None, False, 1e-6)
    )


def test_function_transforms_and_forward_mode():
    q, k, v, log_decay = make(torch.float64, 1, 3, 2, 1, 2, 2, decay="BTH")
    run = lambda q, g: linear_attention(q, k, v, log_decay=g, normalize=True)[0].square().sum()  # noqa: E731
    leaves = [x.clone().requires_grad_() for x in (q, log_decay)]
    want = torch.autograd.grad(run(*leaves), leaves)
    for got, expected in zip(torch.func.grad(run, argnums=(0, 1))(q, log_decay), want, strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(NotImplementedError, match=r"linear_attention has no forward-mode derivative"):
        torch.func.jvp(run, (q, log_decay), (q, log_decay))


def test_compiles_to_one_graph_for_every_length():
    torch._dynamo.reset()

    def f(q, k, v, log_decay, projection, mask):
        o, state = linear_attention(q, k, v, log_decay=log_decay, normalize=True, mask=mask, output_final_state=True)
        p, _ = feature_map_attention(q, k, v, projection, log_decay=log_decay, initial_state=None)
        return o + p + state.kv.sum()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for time in (33, 70, 129):
        q, k, v, log_decay = make(torch.float32, 2, time, 4, 2, 8, 6, decay="BTH", positive=True)
        projection = torch.randn(8, 8)
        mask = torch.rand(2, time) > 0.2
        leaves = [x.requires_grad_() for x in (q, k, v, log_decay, projection)]
        got = compiled(*leaves, mask)
        want = f(*leaves, mask)
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
        for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
            assert error(a, b) < 1e-5
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, compilations


def test_step_compiles_and_still_writes_in_place():
    torch._dynamo.reset()
    state = LinearAttentionState(torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 4))
    twin = LinearAttentionState(*(x.clone() for x in state))

    def f(q, k, v, kv, z):
        return linear_attention_step(q, k, v, LinearAttentionState(kv, z), normalize=True)

    def g(q, k, v, kv, z):
        state = LinearAttentionState(kv, z)
        o = dijiang_attention_step(q, k, v, state, torch.ones(4), normalize=True)
        return o + feature_map_attention_step(q, k, v, state, torch.eye(4), log_decay=torch.full((2,), -0.1))

    for function in (f, g):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            q, k, v = torch.rand(1, 2, 4), torch.rand(1, 2, 4), torch.rand(1, 2, 3)
            assert torch.equal(compiled(q, k, v, *state), function(q, k, v, *twin))
        assert torch.equal(state.kv, twin.kv)
        assert torch.equal(state.z, twin.z)


def test_compiles_with_tensors_of_constant_size_among_symbolic_ones():
    def call(q, k, v):
        o, _ = linear_attention(q, k, v, log_decay=torch.full((2,), -0.1))
        p, _ = dijiang_attention(q, k, v, torch.ones(8), weights=torch.ones(2, 8), log_decay=torch.full((4,), -0.1))
        state = LinearAttentionState(torch.zeros(3, 2, 8, 5))
        token, g = (q[:, 0], k[:, 0], v[:, 0]), torch.full((2,), -0.1)
        one = linear_attention_step(*token, state, log_decay=g)
        return o, p, one, feature_map_attention_step(*token, state, torch.eye(8), weights=torch.ones(2, 8), log_decay=g)

    torch._dynamo.reset()
    q, k, v, _ = make(torch.float32, 3, 7, 4, 2, 8, 5)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for got, want in zip(compiled(q, k, v), call(q, k, v), strict=True):
        assert torch.equal(got, want)


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return linear_attention(q, k, v, log_decay=q[..., 0].abs().neg(), normalize=True)[0]

    time = torch.export.Dim("time", min=2, max=4096)
    tensors = make(torch.float32, 1, 20, 2, 2, 4, 4, positive=True)[:3]
    program = torch.export.export(Module(), tensors, dynamic_shapes=[{1: time}] * 3)
    other = make(torch.float32, 1, 77, 2, 2, 4, 4, positive=True)[:3]
    assert torch.equal(program.module()(*other), Module()(*other))


def test_autocast_casts_as_a_matrix_product_does():
    q, k, v, log_decay = make(torch.float32, 1, 20, 2, 2, 4, 4, decay="H")
    projection = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = linear_attention(q, k.bfloat16().float(), v, log_decay=log_decay, output_final_state=True)
        p, _ = feature_map_attention(q, k, v, projection)
    assert o.dtype == p.dtype == torch.bfloat16
    assert state.kv.dtype == torch.float32
    halves = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(o, linear_attention(*halves, log_decay=log_decay)[0])
    with torch.autocast("cpu", torch.bfloat16):  # of several dtypes, as layers under autocast have them
        assert torch.equal(o, linear_attention(halves[0], k, v, log_decay=log_decay)[0])
    assert torch.equal(p, feature_map_attention(*halves, projection)[0])
    states = [LinearAttentionState(torch.zeros(1, 2, 4, 4)) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        p = feature_map_attention_step(q[:, 0], k[:, 0], v[:, 0], states[0], projection)
    want = feature_map_attention_step(*(x[:, 0] for x in halves), states[1], projection)
    assert p.dtype == torch.bfloat16
    assert torch.equal(p, want)
    assert torch.equal(states[0].kv, states[1].kv)


# --- bad input ----------------------------------------------------------------------------------------------------

STATE = torch.zeros(1, 2, 3, 6)
GOOD = {"q": (1, 5, 4, 3), "k": (1, 5, 2, 3), "v": (1, 5, 2, 6)}


@pytest.mark.parametrize(("change", "kind", "message"), [
    ({"q": [1.0]}, TypeError, "q must be a torch.Tensor; got list"),
    ({"q": torch.zeros(1, 5, 4, 3, dtype=torch.int64)}, TypeError, "q must have dtype float16, bfloat16"),
    ({"q": torch.zeros(5, 4, 3)}, ValueError, r"q must have 4 dimensions \[B,T,H,D\]; got shape \(5, 4, 3\)"),
    ({"k": torch.zeros(1, 5, 2, 3, dtype=torch.bfloat16)}, TypeError, "k must have the dtype of q, torch.float32"),
    ({"k": torch.zeros(1, 5, 3, 3), "v": torch.zeros(1, 5, 3, 6)}, ValueError, "multiple of those of k.*4 and 3"),
    ({"k": torch.zeros(1, 4, 2, 3)}, ValueError, r"k must be \[B,T,Hk,K\].*got \(1, 4, 2, 3\)"),
    ({"v": torch.zeros(1, 5, 4, 6)}, ValueError, r"v must be \[B,T,Hk,V\].*got \(1, 5, 4, 6\)"),
    ({"v": torch.zeros(1, 5, 2, 257)}, ValueError, "V.* must be between 1 and 256; got 257"),
    ({"v": torch.zeros(1, 5, 2, 0)}, ValueError, "V.* must be between 1 and 256; got 0"),
    ({"v": torch.zeros(1, 5, 2, 6, device="meta")}, ValueError, "v must be on the device of q, cpu; got meta"),
    ({"log_decay": 0.5}, TypeError, "log_decay must be a torch.Tensor; got float"),
    ({"log_decay": torch.zeros(3)}, ValueError, r"log_decay must be \[H\], \[Hk\].*H = 4, Hk = 2.*got shape \(3,\)"),
    ({"log_decay": torch.zeros(1, 4, 2)}, ValueError, r"log_decay must be .*got shape \(1, 4, 2\)"),
    ({"log_decay": torch.zeros(2, dtype=torch.int32)}, TypeError, "log_decay must have dtype"),
    ({"log_decay": torch.tensor([-1.0, 0.25])}, ValueError, "must not be positive; its largest value is 0.25"),
    ({"mask": torch.ones(1, 5)}, TypeError, "mask must have dtype bool; got torch.float32"),
    ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask must be \[B,T\] = \[1, 5\]; got shape \(5,\)"),
    ({"scale": "1"}, TypeError, "scale must be a number; got str"),
    ({"eps": -1.0}, ValueError, "eps must not be negative; got -1.0"),
    ({"initial_state": torch.zeros(1, 2, 3, 6)}, TypeError, "initial_state must be a LinearAttentionState"),
    ({"initial_state": (torch.zeros(1, 4, 3, 6), None)}, ValueError, r"initial_state.kv must be .*\[1, 2, 3, 6\]"),
    ({"initial_state": (STATE.bfloat16(), None)}, TypeError, "initial_state.kv must have dtype float32"),
    ({"initial_state": (STATE, None), "normalize": True}, ValueError, "initial_state.z must be given"),
    ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens must have dtype int32 or int64"),
    ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, r"end at T = 5; got \[0, 4\]"),
    ({"cu_seqlens": torch.tensor([1, 5])}, ValueError, r"start at 0.*got \[1, 5\]"),
    ({"cu_seqlens": torch.tensor([0, 3, 2, 5])}, ValueError, "not decrease"),
    ({"cu_seqlens": torch.tensor([[0, 5]])}, ValueError, "vector of N"),
])  # fmt: skip
def test_bad_input(change, kind, message):
    arguments = {name: torch.zeros(shape) for name, shape in GOOD.items()} | change
    with pytest.raises(kind, match=message):
        linear_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_offsets_need_a_batch_of_one():
    q, k, v, _ = make(torch.float32, 2, 5, 1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"batch of 1.*B = 2"):
        linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 5]))


@pytest.mark.parametrize(("change", "kind", "message"), [
    ({"projection": torch.zeros(4, 8)}, ValueError, r"projection must be \[K, M\].*K = 3.*got shape \(4, 8\)"),
    ({"projection": torch.zeros(4, 3, 8)}, ValueError, r"projection must be .*got shape \(4, 3, 8\)"),
    ({"projection": torch.zeros(3, 513)}, ValueError, "number of features.*between 1 and 512; got 513"),
    ({"projection": torch.zeros(3, 257), "feature": "softmax_pm"}, ValueError, "2M .*got 514"),
    ({"feature": "relu"}, ValueError, "feature must be one of 'softmax', 'exp', 'softmax_pm'; got 'relu'"),
    ({"weights": torch.ones(7)}, ValueError, r"weights must be \[8\].*got shape \(7,\)"),
])  # fmt: skip
def test_bad_feature_maps(change, kind, message):
    arguments = {name: torch.zeros(shape) for name, shape in GOOD.items()} | {"projection": torch.zeros(3, 8)} | change
    positional = [arguments.pop(name) for name in ("q", "k", "v", "projection")]
    with pytest.raises(kind, match=message):
        feature_map_attention(*positional, **arguments)
    state = LinearAttentionState(torch.zeros(1, 2, 8, 6))
    with pytest.raises(kind, match=message):
        feature_map_attention_step(*(x[:, 0] for x in positional[:3]), state, positional[3], **arguments)


@pytest.mark.parametrize(("change", "kind", "message"), [
    ({"scales": torch.ones(4)}, ValueError, r"scales must be \[K\] or \[Hk, K\] with K = 3.*got shape \(4,\)"),
    ({"transform": "fft"}, ValueError, "transform must be one of 'idct', 'dct'; got 'fft'"),
    ({"signs": torch.ones(2)}, ValueError, r"signs must be a real vector \[K\] with K = 3"),
    ({"signs": torch.ones(3, dtype=torch.bool)}, ValueError, r"signs must be a real vector .* got torch.bool"),
    ({"signs": torch.tensor([1.0, 0.5, -1.0])}, ValueError, r"signs must be \+1 and -1 only"),
])  # fmt: skip
def test_bad_dijiang(change, kind, message):
    arguments = {name: torch.zeros(shape) for name, shape in GOOD.items()} | {"scales": torch.ones(3)} | change
    positional = [arguments.pop(name) for name in ("q", "k", "v", "scales")]
    with pytest.raises(kind, match=message):
        dijiang_attention(*positional, **arguments)
    state = LinearAttentionState(torch.zeros(1, 2, 3, 6))
    with pytest.raises(kind, match=message):
        dijiang_attention_step(*(x[:, 0] for x in positional[:3]), state, positional[3], **arguments)


def test_scale_defaults_to_the_root_of_the_key_dimension():
    q, k, v, _ = make(torch.float64, 1, 5, 1, 1, 9, 2)
    assert torch.equal(linear_attention(q, k, v)[0], linear_attention(q, k, v, scale=1 / math.sqrt(9))[0])
