"""Causal linear attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import freqrank
import torch
from torch import Tensor

from bench.python.registry import Case, Family, Inputs, NotApplicable

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    batch, time, heads, dim = case.shape
    q, k, v = (
        torch.randn(batch, time, heads, dim, generator=generator, device=device).to(case.torch_dtype) for _ in range(3)
    )
    log_decay = torch.linspace(-0.1, -0.001, heads, device=device) if case.options.get("decay") else None
    return q, k, v, log_decay


def reference(case: Case, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, block: int = 512) -> Tensor:
    """Every pair of tokens, some rows of the matrix of pairs at a time."""
    batch, time, heads, dim = case.shape
    o = torch.empty(batch, time, heads, dim, dtype=torch.float64, device=q.device)
    for b, h in itertools.product(range(batch), range(heads)):
        query, key, value = (x[b, :, h].double() for x in (q, k, v))
        for begin in range(0, time, block):
            end = min(begin + block, time)
            pairs = (query[begin:end] @ key[:end].mT * dim**-0.5).tril_(begin)
            if log_decay is not None:
                i = torch.arange(end, device=q.device)
                pairs *= (log_decay[h].double() * (i[begin:, None] - i).clamp(min=0)).exp()
            o[b, begin:end, h] = pairs @ value[:end]
    return o


def cases(device: str) -> Iterator[Case]:
    heads, dtypes = (8, ("float32",)) if device == "cpu" else (64, ("bfloat16", "float32"))
    for dtype in dtypes:
        for dim, times in ((64, (512, 1024, 2048, 4096, 8192)), (128, (2048,))):
            for time in times:
                for options in ({}, {"decay": "head"}) if time == 2048 else ({},):
                    yield Case(
                        op="linear_attention",
                        shape=(1, time, heads, dim),
                        dtype=dtype,
                        n=time,
                        series=f"forward, heads of {dim}, {dtype}" + (", with decay" if options else ""),
                        bytes=4 * time * heads * dim * (2 if dtype == "bfloat16" else 4),
                        tolerance=TOLERANCE[dtype],
                        inputs=_inputs,
                        reference=reference,
                        options=options,
                        flops=4.0 * time * heads * dim * dim,  # one update and one read of the state for each token
                        quick=(time, dim) == (2048, 64),
                    )


family = Family("linear_attention", "Causal linear attention", "T", cases)


@family.implementation("freqrank")
def _freqrank(case: Case, *_: Any) -> Callable[..., Tensor]:
    return lambda q, k, v, g: freqrank.linear_attention(q, k, v, log_decay=g)[0]


@family.implementation("torch matmuls, chunked")
def _chunked(case: Case, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Callable[..., Tensor]:
    batch, time, heads, dim = case.shape
    size = 128 if dim > 64 else 64
    chunks = time // size
    if time % size:
        raise NotApplicable(f"takes multiples of {size} tokens")
    scale = dim**-0.5
    causal = torch.ones(size, size, device=q.device).tril()
    before = torch.ones(chunks, chunks, device=q.device).tril(-1)
    weight, enter, leave = causal * scale, None, None
    if g is not None:
        i = torch.arange(size, device=q.device)
        weight = weight * (g[:, None, None] * (i[:, None] - i).clamp(min=0)).exp()  # [H, C, C]
        enter = (g[:, None] * (i + 1)).exp()[..., None] * scale  # state -> token
        leave = (g[:, None] * (size - 1 - i)).exp()[..., None]  # token -> state
        c = torch.arange(chunks, device=q.device)
        before = before * (g[:, None, None] * size * (c[:, None] - c - 1).clamp(min=0)).exp()
        weight, enter, leave = (x[:, None].to(q.dtype) for x in (weight, enter, leave))
    weight = weight.to(q.dtype)

    def attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
        q, k, v = (x.view(batch, chunks, size, heads, dim).permute(0, 3, 1, 2, 4).contiguous() for x in (q, k, v))
        states = torch.matmul((k if leave is None else k * leave).mT, v).float()  # [B, H, chunks, K, V]
        states = torch.matmul(before, states.flatten(3)).view_as(states).to(q.dtype)
        o = torch.matmul((q @ k.mT).mul_(weight), v)
        o += torch.matmul(q * (scale if enter is None else enter), states)
        return o.permute(0, 2, 3, 1, 4).reshape(batch, time, heads, dim)

    return attention


def _softmax_reference(case: Case, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
    heads = []
    for h in range(case.shape[2]):
        scores = q[0, :, h].double() @ k[0, :, h].double().mT * case.shape[3] ** -0.5
        later = torch.ones_like(scores, dtype=torch.bool).triu_(1)
        heads.append(scores.masked_fill_(later, -torch.inf).softmax(-1) @ v[0, :, h].double())
    return torch.stack(heads, 1)[None]


# Another function: what linear attention takes the place of.
@family.implementation("softmax attention (SDPA)", reference=_softmax_reference)
def _sdpa(case: Case, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Callable[..., Tensor]:
    if g is not None:
        raise NotApplicable("has no decay")
    if case.n > 4096 and q.device.type == "cpu":
        raise NotApplicable("is measured up to 4096 tokens")

    def attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attention
