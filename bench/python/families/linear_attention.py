"""Causal linear attention: forward, forward and backward, one step of decoding; and behind DiJiang's feature map."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import freqrank
import torch
from freqrank.ops import reference as twins
from torch import Tensor

from bench.python.registry import Case, Family, Inputs, NotApplicable

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
CHUNKS = (64, 128, 256)
LONGEST_PAIRS = 8192
STEPS = ("linear_attention_step", "feature_map_attention_step")


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    batch, length, heads, dim = case.shape
    q, k, v = (
        torch.randn(batch, length, heads, dim, generator=generator, device=device).to(case.torch_dtype)
        for _ in range(3)
    )
    if case.options.get("normalize"):  # else the denominators come close to 0
        q, k = q.abs(), k.abs()
    log_decay = torch.linspace(-0.1, -0.001, heads, device=device) if case.options.get("decay") else None
    if case.op != "linear_attention backward":
        return q, k, v, log_decay
    return q, k, v, log_decay, torch.randn(v.shape, generator=generator, device=device).to(v.dtype)


def reference(case: Case, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, block: int = 512) -> Tensor:
    """Every pair of tokens, some rows of the matrix of pairs at a time; for long sequences the chunked form."""
    batch, length, heads, dim = q.shape
    if length > LONGEST_PAIRS:
        q, k, v = (x.double() for x in (q, k, v))
        return _chunked_forward(case, 64, q, k, v, log_decay)(q, k, v, log_decay)
    scale = 1.0 if case.op == "dijiang_attention" else dim**-0.5
    o = torch.empty(batch, length, heads, v.shape[-1], dtype=torch.float64, device=q.device)
    for b, h in itertools.product(range(batch), range(heads)):
        query, key, value = (x[b, :, h].double() for x in (q, k, v))
        for begin in range(0, length, block):
            end = min(begin + block, length)
            pairs = (query[begin:end] @ key[:end].mT * scale).tril_(begin)
            if log_decay is not None:
                i = torch.arange(end, device=q.device)
                pairs *= (log_decay[h].double() * (i[begin:, None] - i).clamp(min=0)).exp()
            total = pairs.sum(-1, keepdim=True) + 1e-6 if case.options.get("normalize") else 1.0
            o[b, begin:end, h] = pairs @ value[:end] / total
    return o


def _gradient_reference(case: Case, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, do: Tensor) -> Inputs:
    """The chunked form and its gradients, in float64."""
    q, k, v, do = (x.double() for x in (q, k, v, do))
    return _with_gradients(_chunked_forward(case, 64, q, k, v, g), q, k, v, g, do)


def _feature_reference(case: Case, q: Tensor, k: Tensor, v: Tensor, scales: Tensor) -> Tensor:
    projection = twins.dijiang_projection(scales.cpu()).to(q.device)
    phi_q, phi_k = (twins.feature_map(x, q.shape[2], projection) for x in (q, k))
    return reference(case, phi_q, phi_k, v, None)


def _feature_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    q, k, v, _ = _inputs(case, generator, device)
    return q, k, v, torch.rand(case.shape[3], generator=generator, device=device) + 0.5


def _step_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    batch, heads, dim = case.shape
    q, v = (torch.randn(case.shape, generator=generator, device=device).to(case.torch_dtype) for _ in range(2))
    # keys of 0: the state is read and written, and stays what it is from call to call
    return q, torch.zeros_like(q), v, torch.randn(batch, heads, dim, dim, generator=generator, device=device)


def _step_reference(case: Case, q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> Tensor:
    q, k, v, kv = (x.double() for x in (q, k, v, kv))
    return torch.einsum("bhk,bhkv->bhv", q * case.shape[2] ** -0.5, kv + k[..., None] * v[..., None, :])


def _mapped_step_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    q, k, _, kv = _step_inputs(case, generator, device)
    k = torch.randn(case.shape, generator=generator, device=device).to(case.torch_dtype)
    scales = torch.rand(case.shape[2], generator=generator) + 0.5
    # features are positive: here values of 0 leave the state what it is
    return q, k, torch.zeros_like(q), kv, twins.dijiang_projection(scales).float().to(device)


def _mapped_step_reference(case: Case, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, projection: Tensor) -> Tensor:
    phi_q, phi_k = (torch.softmax(x.double() @ projection.double(), -1) for x in (q, k))
    state = kv.double() + phi_k[..., None] * v.double()[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", phi_q, state)


def _case(op: str, shape: tuple[int, ...], dtype: str, series: str, **options: Any) -> Case:
    """One of whole sequences."""
    batch, length, heads, dim = shape
    tokens = batch * length * heads  # of all heads
    backward = op.endswith("backward")
    passes = 3 if backward else 1
    # once each: q, k, v, o; and backward q, k, v, do, dq, dk, dv
    size = (11 if backward else 4) * tokens * dim * (2 if dtype == "bfloat16" else 4)
    mapped = op == "dijiang_attention"
    inputs, check = (_feature_inputs, _feature_reference) if mapped else (_inputs, reference)
    return Case(
        op=op, shape=shape, dtype=dtype, n=length, series=series, bytes=size, tolerance=TOLERANCE[dtype], inputs=inputs,
        reference=_gradient_reference if backward else check, options=options,
        # one update and one read of the state for each token, and with a map two products of q and k
        flops=passes * (8.0 if mapped else 4.0) * tokens * dim * dim,
        quick=not options and (shape, dtype) in (((1, 2048, 8, 64), "float32"), ((4, 2048, 16, 128), "bfloat16")),
    )  # fmt: skip


def _step_case(batch: int, heads: int, dim: int, dtype: str, *, mapped: bool = False) -> Case:
    size = 2 if dtype == "bfloat16" else 4
    return Case(
        op=STEPS[mapped], shape=(batch, heads, dim), dtype=dtype, n=batch,
        series="decoding step behind DiJiang's map" if mapped else "decoding step",
        bytes=batch * heads * (2 * dim * dim * 4 + 4 * dim * size) + mapped * dim * dim * 4, tolerance=TOLERANCE[dtype],
        inputs=_mapped_step_inputs if mapped else _step_inputs,
        reference=_mapped_step_reference if mapped else _step_reference, quick=batch == 8,
    )  # fmt: skip


OPS = (("linear_attention", "forward"), ("linear_attention backward", "forward and backward"))
# Batch, time, heads, dimension: the shapes that flash-linear-attention publishes its own times for.
PUBLISHED = (
    (1, 8192, 96, 128), (2, 16384, 16, 128), (4, 2048, 16, 128), (4, 4096, 64, 128), (8, 2048, 32, 256),
    (8, 1024, 8, 64),
)  # fmt: skip


def _cases_on_a_gpu() -> Iterator[Case]:
    """What matters most first: a run may be cut short."""
    for op, what in OPS:
        for shape in PUBLISHED:
            yield _case(op, shape, "bfloat16", f"{what}, published shapes, bfloat16")
    for batch in (1, 8, 32, 64, 128, 256):
        yield _step_case(batch, 32, 128, "bfloat16")
    for batch in (1, 8, 64):
        yield _step_case(batch, 32, 128, "bfloat16", mapped=True)
    for op, what in OPS:
        for name, options in (("a decay a head", {"decay": "head"}), ("normalised", {"normalize": True})):
            for shape in ((4, 2048, 16, 128), (8, 1024, 8, 64)):
                yield _case(op, shape, "bfloat16", f"{what}, {name}, bfloat16", **options)
        for heads, length in itertools.product((1, 4, 16), (8192, 65536)):
            yield _case(op, (1, length, heads, 128), "bfloat16", f"{what}, few heads of 128, bfloat16")
    for shape in ((4, 2048, 16, 64), (4, 2048, 16, 128)):
        yield _case("dijiang_attention", shape, "bfloat16", "behind DiJiang's map, bfloat16")
    for dim, heads in ((64, 32), (128, 32), (256, 16)):
        for length in (512, 2048, 8192, 65536):
            yield _case("linear_attention", (1, length, heads, dim), "bfloat16", f"forward, heads of {dim}, bfloat16")
    for op, what in OPS:
        for shape in ((4, 2048, 16, 64), (4, 2048, 16, 128)):
            yield _case(op, shape, "float32", f"{what}, float32")


def cases(device: str) -> Iterator[Case]:
    if device == "cuda":
        yield from _cases_on_a_gpu()
        return
    heads, dtypes = 8, ("float32", "bfloat16")
    for op, what in OPS:
        for dtype in dtypes:
            for dim, times in ((64, (512, 1024, 2048, 4096, 8192)), (128, (2048, 4096)), (256, (2048,))):
                for length in times:
                    if dtype == "bfloat16" and length != 2048:
                        continue
                    yield _case(op, (1, length, heads, dim), dtype, f"{what}, heads of {dim}, {dtype}")
        for name, options in (("decay", {"decay": "head"}), ("normalised", {"normalize": True})):
            for dim in (64, 128):
                series = f"{what}, heads of {dim}, {dtypes[0]}, {name}"
                yield _case(op, (1, 2048, heads, dim), dtypes[0], series, **options)
        for few, length in itertools.product((1, 2), (16384, 65536)):
            if few == 2 and length == 65536:
                continue
            yield _case(op, (1, length, few, 64), dtypes[0], f"{what}, heads of 64, {dtypes[0]}, {few} of them")
    for dim in (64, 128):
        series = f"behind DiJiang's map, heads of {dim}, {dtypes[0]}"
        yield _case("dijiang_attention", (1, 2048, heads, dim), dtypes[0], series)
    for batch in (1, 8, 32, 256):
        yield _step_case(batch, heads, 64, "float32")
    for batch in (1, 8, 32):
        yield _step_case(batch, heads, 64, "float32", mapped=True)


family = Family("linear_attention", "Causal linear attention", "T", cases, minutes=5)


def _with_gradients(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, g: Any, do: Tensor) -> Inputs:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        o = attention(*leaves, g)
    return (o.detach(), *torch.autograd.grad(o, leaves, do))


@family.implementation("freqrank")
def _freqrank(case: Case, *inputs: Any) -> Callable[..., Any]:
    normalize = bool(case.options.get("normalize"))
    if case.op == "dijiang_attention":
        return lambda q, k, v, scales: freqrank.dijiang_attention(q, k, v, scales)[0]
    if case.op == "linear_attention_step":
        step = freqrank.linear_attention_step
        return lambda q, k, v, kv: step(q, k, v, freqrank.LinearAttentionState(kv))
    if case.op == "feature_map_attention_step":
        mapped = freqrank.feature_map_attention_step
        return lambda q, k, v, kv, projection: mapped(q, k, v, freqrank.LinearAttentionState(kv), projection)
    attention = lambda q, k, v, g: freqrank.linear_attention(q, k, v, log_decay=g, normalize=normalize)[0]  # noqa: E731
    if case.op == "linear_attention backward":
        return lambda q, k, v, g, do: _with_gradients(attention, q, k, v, g, do)
    return attention


def _chunked_forward(case: Case, size: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Callable[..., Tensor]:
    """The chunked formula in matrix products, with what depends on the sizes alone made before."""
    batch, length, heads, dim = q.shape
    chunks = length // size
    if length % size:
        raise NotApplicable(f"takes multiples of {size} tokens")
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = 1.0 if case.op == "dijiang_attention" else dim**-0.5
    weight = torch.ones(size, size, device=q.device, dtype=real).tril() * scale
    before = torch.ones(chunks, chunks, device=q.device, dtype=real).tril(-1)
    enter, leave = None, None
    if g is not None:
        g = g.to(real)
        i = torch.arange(size, device=q.device)
        weight = weight * (g[:, None, None] * (i[:, None] - i).clamp(min=0)).exp()  # [H, C, C]
        enter = (g[:, None] * (i + 1)).exp()[..., None] * scale  # state -> token
        leave = (g[:, None] * (size - 1 - i)).exp()[..., None]  # token -> state
        c = torch.arange(chunks, device=q.device)
        before = before * (g[:, None, None] * size * (c[:, None] - c - 1).clamp(min=0)).exp()
        weight, enter, leave = (x[:, None].to(q.dtype) for x in (weight, enter, leave))
    weight = weight.to(q.dtype)

    def sum_before(x: Tensor) -> Tensor:
        """[B, H, chunks, ...]: of all chunks before each."""
        x = x.to(real)
        if g is None and chunks > 128:  # where the square of the number of chunks is no longer small
            return (x.cumsum(2) - x).to(q.dtype)
        return torch.matmul(before, x.flatten(3)).view_as(x).to(q.dtype)

    def attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
        q, k, v = (x.reshape(batch, chunks, size, heads, -1).permute(0, 3, 1, 2, 4).contiguous() for x in (q, k, v))
        keys = k if leave is None else k * leave
        scores = (q @ k.mT) * weight
        queries = q * (scale if enter is None else enter)
        o = torch.matmul(scores, v) + torch.matmul(queries, sum_before(torch.matmul(keys.mT, v)))
        if case.options.get("normalize"):
            z = sum_before(keys.sum(3)[..., None])
            o = o / (scores.sum(-1, keepdim=True) + torch.matmul(queries, z) + 1e-6)
        return o.permute(0, 2, 3, 1, 4).reshape(batch, length, heads, -1)

    return attention


def _best(candidates: list[Callable[..., Any]], inputs: Inputs) -> Callable[..., Any]:
    """The fastest of them on these inputs."""

    def seconds(call: Callable[..., Any]) -> float:
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            call(*inputs)
            if inputs[0].is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)

    return min(candidates, key=seconds)


@family.implementation("torch matmuls, chunked")
def _chunked(case: Case, *inputs: Any) -> Callable[..., Any]:
    if case.op in STEPS:
        raise NotApplicable("is for whole sequences")
    q, k, v = inputs[:3]
    g = None if case.op == "dijiang_attention" else inputs[3]
    forms = [_chunked_forward(case, size, q, k, v, g) for size in CHUNKS if q.shape[1] % size == 0]
    if case.op == "linear_attention backward":
        return _best([lambda *x, f=f: _with_gradients(f, *x) for f in forms], inputs)
    if case.op == "linear_attention":
        return _best(forms, inputs)
    matrix = twins.dijiang_projection(torch.ones(q.shape[3])).to(q.device, torch.float32)

    def behind_map(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor, scales: Tensor) -> Tensor:
            projection = matrix * scales
            return f(torch.softmax(q @ projection, -1), torch.softmax(k @ projection, -1), v, None)

        return attention

    return _best([behind_map(f) for f in forms], inputs)


@family.implementation("torch, the same step")
def _torch_step(case: Case, *inputs: Any) -> Callable[..., Tensor]:
    if case.op not in STEPS:
        raise NotApplicable("is for one token")
    batch, heads, dim = case.shape
    scale = dim**-0.5 if case.op == "linear_attention_step" else 1.0

    def step(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, projection: Tensor | None = None) -> Tensor:
        state = kv.view(batch * heads, dim, dim)
        wide_q, wide_k, wide_v = (x.to(kv.dtype) for x in (q, k, v))
        if projection is not None:
            wide_q, wide_k = (torch.softmax(x @ projection, -1) for x in (wide_q, wide_k))
        state.baddbmm_(wide_k.reshape(-1, dim, 1), wide_v.reshape(-1, 1, dim))
        return torch.bmm(wide_q.reshape(-1, 1, dim) * scale, state).view(batch, heads, dim).to(v.dtype)

    return step


@family.implementation("torch features, then linear_attention_step")
def _features_then_step(case: Case, *inputs: Any) -> Callable[..., Tensor]:
    if case.op != "feature_map_attention_step":
        raise NotApplicable("is for one token behind a map")

    def step(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, projection: Tensor) -> Tensor:
        phi_q, phi_k = (torch.softmax(x.to(kv.dtype) @ projection, -1) for x in (q, k))
        state = freqrank.LinearAttentionState(kv)
        return freqrank.linear_attention_step(phi_q, phi_k, v.to(kv.dtype), state, scale=1.0).to(v.dtype)

    return step


# The Triton kernels that others are measured against. chunk_linear_attn without a normaliser is chunk_simple_gla.
@family.implementation("flash-linear-attention", needs=("fla", "triton"), devices=("cuda",))
def _fla(case: Case, *inputs: Any) -> Callable[..., Any]:
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    if case.dtype == "float32":
        raise NotApplicable("is for 16 bits: its products of float32 are of TF32")
    if case.op == "feature_map_attention_step":
        raise NotApplicable("has no feature maps: its step is shown without one")
    if case.op == "linear_attention_step":

        def step(q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> Tensor:
            q, k, v = (x[:, None] for x in (q, k, v))
            return fused_recurrent_simple_gla(q, k, v, initial_state=kv, output_final_state=True)[0][:, 0]

        return step
    if case.op == "dijiang_attention":
        matrix = twins.dijiang_projection(torch.ones(case.shape[3])).to(inputs[0].device, torch.float32)

        def behind_map(q: Tensor, k: Tensor, v: Tensor, scales: Tensor) -> Tensor:
            projection = (matrix * scales).to(q.dtype)
            phi_q, phi_k = (torch.softmax(x @ projection, -1) for x in (q, k))
            return chunk_simple_gla(phi_q, phi_k, v, scale=1.0)[0]

        return behind_map

    def attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
        if case.options.get("normalize"):
            return chunk_linear_attn(q, k, v, normalize=True)[0]
        return chunk_simple_gla(q, k, v, g_gamma=g)[0]

    if case.op == "linear_attention backward":
        return lambda q, k, v, g, do: _with_gradients(attention, q, k, v, g, do)
    return attention


def _softmax_reference(case: Case, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
    o = torch.empty(v.shape, dtype=torch.float64, device=q.device)
    for b, h in itertools.product(range(case.shape[0]), range(case.shape[2])):
        scores = q[b, :, h].double() @ k[b, :, h].double().mT * case.shape[3] ** -0.5
        later = torch.ones_like(scores, dtype=torch.bool).triu_(1)
        o[b, :, h] = scores.masked_fill_(later, -torch.inf).softmax(-1) @ v[b, :, h].double()
    return o


# Other functions: what linear attention takes the place of.
@family.implementation("softmax attention (SDPA)", reference=_softmax_reference)
def _sdpa(case: Case, *inputs: Any) -> Callable[..., Tensor]:
    if case.op != "linear_attention":
        raise NotApplicable("is shown beside the forward pass")
    if case.options:
        raise NotApplicable("has neither decay nor another normalisation")
    longest = 4096 if inputs[0].device.type == "cpu" else LONGEST_PAIRS
    if case.n > longest:
        raise NotApplicable(f"is measured up to {longest} tokens")

    def attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attention


CACHE_LIMIT = {"cpu": 1 << 30, "cuda": 1 << 34}  # bytes


def _add_cached_softmax(length: int) -> None:
    """One token of softmax attention over a cache of constant keys and values: its output is that value."""

    def expected(case: Case, q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> Tensor:
        return torch.ones(case.shape, dtype=torch.float64, device=q.device)

    @family.implementation(f"softmax attention over {length} cached tokens", reference=expected)
    def _cached(case: Case, *inputs: Any) -> Callable[..., Tensor]:
        if case.op != "linear_attention_step":
            raise NotApplicable("is shown beside linear_attention_step")
        batch, heads, dim = case.shape
        device, dtype = inputs[0].device, inputs[0].dtype
        limit = CACHE_LIMIT[device.type]
        if 2 * dtype.itemsize * batch * heads * length * dim > limit:
            raise NotApplicable(f"is measured with caches up to {limit >> 30} GiB")
        keys, values = (torch.ones(batch, heads, length, dim, device=device, dtype=dtype) for _ in range(2))

        def step(q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values)[:, :, 0]

        return step


for _length in (2048, 16384, 65536):
    _add_cached_softmax(_length)
