"""Window attention with sinks against a quadratic float64 reference, in one piece and in several."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from freqrank.attention.window import window_attention
from hypothesis import given, settings
from hypothesis import strategies as st


def reference(q, k, v, window, sinks, mask=None, documents=None):
    """Token i sees j iff j is no padding and i - window < j <= i, or j is among the first real tokens."""
    q, k, v = q.double(), k.double(), v.double()
    batch, length, heads, dim = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[2], 2) for x in (k, v))
    mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    number = mask.cumsum(1) - 1
    age = torch.arange(length)[:, None] - torch.arange(length)
    seen = ((age >= 0) & (age < window))[None] | ((age >= 0) & (number < sinks)[:, None])
    seen = seen & mask[:, None]
    if documents is not None:
        seen = seen & (documents[:, None] == documents)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / dim**0.5
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).nan_to_num(), v)


def inputs(batch, length, heads, key_heads, dim, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, length, h, dim, generator=g) for h in (heads, key_heads, key_heads))


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 40),
    window=st.integers(1, 12),
    sinks=st.integers(0, 5),
    groups=st.sampled_from([1, 3]),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    padding=st.sampled_from(["none", "left", "right"]),
    seed=st.integers(0, 1000),
)
def test_equals_the_quadratic_form_in_any_pieces(length, window, sinks, groups, cuts, padding, seed):
    q, k, v = inputs(2, length, 2 * groups, 2, 4, seed)
    mask = None
    if padding != "none":
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[0, slice(length // 3) if padding == "left" else slice(length - length // 3, length)] = False
    expected = reference(q, k, v, window, sinks, mask)
    edges = sorted({0, length, *(min(c, length) for c in cuts)})
    state, outputs = None, []
    for start, stop in pairwise(edges):
        piece = slice(start, stop)
        o, state = window_attention(
            q[:, piece], k[:, piece], v[:, piece], window=window, sinks=sinks, state=state, output_state=True,
            mask=None if mask is None else mask[:, piece],
        )  # fmt: skip
        outputs.append(o)
        assert state.k.shape == (2, window, 2, 4)
        assert state.sink_k.shape == (2, sinks, 2, 4)
    got = torch.cat(outputs, 1)
    real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(got[real], expected[real].float(), atol=2e-5, rtol=1e-4)
    assert torch.equal(state.tokens, real.sum(1))
    assert got.isfinite().all()


def test_padding_at_the_end_of_a_piece_does_not_push_the_window_out():
    q, k, v = inputs(1, 12, 2, 2, 4)
    expected, _ = window_attention(q, k, v, window=4, sinks=2)
    first, state = window_attention(
        *(torch.cat([x[:, :7], torch.full_like(x[:, :6], torch.nan)], 1) for x in (q, k, v)),
        window=4, sinks=2, output_state=True, mask=torch.arange(13)[None] < 7,
    )  # fmt: skip
    rest, _ = window_attention(q[:, 7:], k[:, 7:], v[:, 7:], window=4, sinks=2, state=state)
    torch.testing.assert_close(torch.cat([first[:, :7], rest], 1), expected)


def test_packed_sequences_do_not_see_each_other():
    q, k, v = inputs(1, 23, 4, 2, 8)
    ends = torch.tensor([0, 5, 6, 6, 23], dtype=torch.int32)
    documents = torch.bucketize(torch.arange(23), ends[1:].long(), right=True)
    o, _ = window_attention(q, k, v, window=4, cu_seqlens=ends)
    torch.testing.assert_close(o, reference(q, k, v, 4, 0, documents=documents).float(), atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="cannot have sinks"):
        window_attention(q, k, v, window=4, sinks=1, cu_seqlens=ends)


def test_a_window_of_the_whole_text_is_softmax_attention_and_gradients_agree():
    q, k, v = (x.double().requires_grad_() for x in inputs(2, 13, 4, 2, 8))
    o, _ = window_attention(q, k, v, window=13, sinks=3)
    full = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(o, full)
    short, _ = window_attention(q, k, v, window=3, sinks=2)
    weight = torch.randn(short.shape, dtype=torch.float64)
    got = torch.autograd.grad((short * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((reference(q, k, v, 3, 2) * weight).sum(), (q, k, v))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_queries_of_their_own_for_the_sinks():
    q, k, v = inputs(1, 9, 2, 2, 4)
    other, _, _ = inputs(1, 9, 2, 2, 4, seed=1)
    o, _ = window_attention(q, k, v, window=2, sinks=1, sink_q=other)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2
    scores[..., 2:, 0] = torch.einsum("bihd,bhd->bhi", other, k[:, 0])[..., 2:] / 2
    age = torch.arange(9)[:, None] - torch.arange(9)
    seen = (age >= 0) & ((age < 2) | (torch.arange(9) == 0))
    expected = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(o, expected)


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (-1, 2), (3, -1)])
def test_bad_sizes(window, sinks):
    with pytest.raises(ValueError, match=f"got {window} and {sinks}"):
        window_attention(*inputs(1, 4, 1, 1, 2), window=window, sinks=sinks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    q, k, v = (x.to(dtype) for x in inputs(2, 50, 4, 2, 16))
    o, state = window_attention(q, k, v, window=8, sinks=2, output_state=True)
    assert o.dtype == state.k.dtype == dtype
    expected = reference(q, k, v, 8, 2)
    assert (o.double() - expected).norm() < 2e-2 * expected.norm()
