"""Softmax attention over the last ``window`` tokens and the first few, the sinks, in time and memory linear in T.

Queries are taken ``window`` at a time; such a block sees the keys of its own and of the previous block, of which a mask
leaves the newest ``window`` to each query, and the sinks. What is kept between calls has a fixed size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class WindowState(NamedTuple):
    """What later tokens need of earlier ones.

    Attributes:
        k, v: keys and values of the last W tokens, [B, W, Hk, D], newest last; zeros where there were none.
        mask: which of them there are, bool [B, W].
        sink_k, sink_v: keys and values of the first tokens, [B, S, Hk, D]; zeros where there were none.
        tokens: how many so far, int64 [B]; masked ones do not count.
    """

    k: Tensor
    v: Tensor
    mask: Tensor
    sink_k: Tensor
    sink_v: Tensor
    tokens: Tensor


def empty_window(k: Tensor, v: Tensor, window: int, sinks: int) -> WindowState:
    """The state before the first token, for keys like ``k`` [B, T, Hk, D] and values like ``v``."""
    batch = k.shape[0]

    def zeros(like: Tensor, length: int) -> Tensor:
        return like.new_zeros(batch, length, *like.shape[2:])

    return WindowState(
        zeros(k, window),
        zeros(v, window),
        torch.zeros(batch, window, dtype=torch.bool, device=k.device),
        zeros(k, sinks),
        zeros(v, sinks),
        torch.zeros(batch, dtype=torch.int64, device=k.device),
    )


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    mask: Tensor | None = None,
    sink_q: Tensor | None = None,
    state: WindowState | None = None,
    output_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, WindowState | None]:
    """Causal softmax attention of each token to the ``window`` newest tokens, itself included, and the first ``sinks``.

    Args:
        q: [B, T, H, D]; k, v: [B, T, Hk, D], H a multiple of Hk.
        window: at least 1. ``sinks``: first tokens of a sequence that stay visible once they are out of the window.
        scale: factor on the products, by default D**-0.5.
        mask: bool [B, T]; a token that is False is seen by no other, is no sink and does not count. Padding inside of
            a sequence (not before or after it) shortens the windows that span it.
        sink_q: queries for the sinks in place of ``q``, where positions are rotated into q and k.
        state: what earlier tokens left, on the right of which these go on.
        output_state: return the state after the last token.
        cu_seqlens: int [N + 1], several sequences in one row (B == 1); without sinks only.

    Returns:
        the output [B, T, H, D], and the :class:`WindowState` or None.

    Raises:
        ValueError: a window below 1, sinks below 0, packed sequences with sinks or a state.

    >>> x = torch.randn(1, 5, 2, 4)
    >>> o, _ = window_attention(x, x, x, window=1)  # each token sees itself alone
    >>> torch.allclose(o, x, atol=1e-6)
    True
    """
    if window < 1 or sinks < 0:
        raise ValueError(f"window must be at least 1 and sinks at least 0; got {window} and {sinks}")
    if cu_seqlens is not None and (sinks or state is not None):
        raise ValueError(
            "sequences packed into one row cannot have sinks or a state in window attention: pad them into rows of "
            "their own, or use sinks=0"
        )
    batch, length, heads, dim = q.shape
    key_heads = k.shape[2]
    past = empty_window(k, v, window, sinks) if state is None else state
    if mask is not None:  # what padding holds, NaN included, must not reach anyone
        k, v = (torch.where(mask[:, :, None, None], x, 0) for x in (k, v))
    seen = torch.ones(batch, length, dtype=torch.bool, device=q.device) if mask is None else mask.bool()
    number = past.tokens[:, None] + seen.cumsum(1) - 1  # of each token among the real ones
    all_k, all_v = torch.cat([past.k.to(k.dtype), k], 1), torch.cat([past.v.to(v.dtype), v], 1)
    valid = torch.cat([past.mask, seen], 1)
    if sinks:
        slots = torch.arange(sinks, device=q.device)
        here = seen[:, None] & (number[:, None] == slots[:, None])  # [B, S, T]
        found, index = here.any(-1)[..., None, None], here.int().argmax(-1)[..., None, None]
        sink_k, sink_v = (
            torch.where(found, x.gather(1, index.expand(-1, -1, *x.shape[2:])), old.to(x.dtype))
            for x, old in ((k, past.sink_k), (v, past.sink_v))
        )
    else:
        slots, sink_k, sink_v = number.new_empty(0), past.sink_k.to(k.dtype), past.sink_v.to(v.dtype)

    if length == 1:  # a decoding step: one block of one query
        block, blocks = 1, 1
        keys, values, visible = (x[:, None, -window:] for x in (all_k, all_v, valid))
        allowed = visible[:, :, None].clone()
        allowed[..., -1] = True  # a padded query sees itself, or softmax would have nothing to sum over
    else:
        block, blocks = window, -(-length // window)
        fill = blocks * window - length
        keys, values, visible = (
            _pairs(F.pad(x, (0, 0) * (x.dim() - 2) + (0, fill)), window) for x in (all_k, all_v, valid)
        )
        age = torch.arange(window, 2 * window, device=q.device)[:, None] - torch.arange(2 * window, device=q.device)
        allowed = visible[:, :, None] & ((age >= 0) & (age < window))
        if cu_seqlens is not None:
            document = torch.bucketize(torch.arange(length, device=q.device), cu_seqlens[1:].long(), right=True)
            document = F.pad(document, (0, fill), value=-1)[None]
            others = _pairs(F.pad(document, (window, 0), value=-1), window)
            allowed = allowed & (document.view(1, blocks, window, 1) == others[:, :, None])
        allowed = allowed | (age == 0)
        q, number = F.pad(q, (0, 0, 0, 0, 0, fill)), F.pad(number, (0, fill))
        sink_q = None if sink_q is None else F.pad(sink_q, (0, 0, 0, 0, 0, fill))
    # [B, T, H, D] -> [B, blocks, Hk, group, block, D]
    group = heads // key_heads

    def queries(x: Tensor) -> Tensor:
        return x.view(batch, blocks, block, key_heads, group, dim).permute(0, 1, 3, 4, 2, 5)

    scale = dim**-0.5 if scale is None else scale
    scores = queries(q * scale) @ keys.permute(0, 1, 3, 4, 2)[:, :, :, None]
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    scores = scores.masked_fill(~allowed[:, :, None, None], -torch.inf)
    if sinks:
        of_sinks = queries((q if sink_q is None else sink_q) * scale) @ sink_k.permute(0, 2, 3, 1)[:, None, :, None]
        outside = slots <= number.view(batch, blocks, block, 1) - window
        scores = torch.cat([scores, of_sinks.to(scores.dtype).masked_fill(~outside[:, :, None, None], -torch.inf)], -1)
    weights = scores.softmax(-1).to(v.dtype)
    o = weights[..., : keys.shape[2]] @ values.permute(0, 1, 3, 2, 4)[:, :, :, None]
    if sinks:
        o = o + weights[..., keys.shape[2] :] @ sink_v.permute(0, 2, 1, 3)[:, None, :, None]
    o = o.permute(0, 1, 4, 2, 3, 5).reshape(batch, blocks * block, heads, v.shape[-1])[:, :length]
    if not output_state:
        return o, None
    if mask is None:
        last_k, last_v, last = (x[:, -window:] for x in (all_k, all_v, valid))
    else:  # real tokens to the right, in their order: padding after a text must not push it out
        order = valid.long().argsort(dim=1, stable=True)[:, -window:]
        last = valid.gather(1, order)
        last_k, last_v = (x.gather(1, order[..., None, None].expand(-1, -1, *x.shape[2:])) for x in (all_k, all_v))
    return o, WindowState(last_k, last_v, last, sink_k, sink_v, past.tokens + seen.sum(1))


def _pairs(x: Tensor, window: int) -> Tensor:
    """Each block of ``window`` entries of x [B, (n + 1) W, ...] with the one before it: [B, n, 2 W, ...]."""
    blocks = x.unflatten(1, (-1, window))
    return torch.cat([blocks[:, :-1], blocks[:, 1:]], 2)
