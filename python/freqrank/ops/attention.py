"""Causal linear attention: the chunked scan and one decoding step of it, as they are and behind a feature map.

Shapes: B batch, T time, H query heads, Hk key heads (H a multiple of Hk), K and V the dimensions of a key and a value,
N sequences (B, or the sequences that ``cu_seqlens`` cuts out of one row).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from freqrank.ops._checks import check_device, check_dtype, check_option, check_tensor, check_values
from freqrank.ops._derivatives import carries_tangent, register_derivatives

MAX_DIM = 256
MAX_FEATURES = 512
# Of channels, features and values: what CUDA kernels make features of themselves.
_FUSED_DIM = 128
# With more than 64 of them, on a GPU that gives a block this much shared memory.
_FUSED_SHARED_BYTES = 160 * 1024


class LinearAttentionState(NamedTuple):
    """What linear attention remembers of the tokens so far.

    ``kv`` is [N, Hk, K, V], or [N, H, K, V] where the decay differs between the query heads of a key head; ``z``, the
    decayed sum of keys that ``normalize=True`` divides by, is the same without V, or None. Both are float32 (float64
    for float64 inputs).
    """

    kv: Tensor
    z: Tensor | None = None


# --- checks -------------------------------------------------------------------------------------------------------


def _real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic, and of states and decay."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch's matrix products do: float tensors, but not float64, go to the autocast dtype."""
    device = tensors[0].device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
    return tensors


def _check_qkv(q: object, k: object, v: object, layout: str) -> tuple[Tensor, ...]:
    """Checked, and as autocast has them."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
    assert isinstance(q, Tensor)
    assert isinstance(k, Tensor)
    assert isinstance(v, Tensor)
    dims = len(layout.split(","))
    lead = layout.removesuffix(",H,D")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions [{layout}]; got shape {tuple(x.shape)}")
        check_device(name, x, "q", q)
    check_dtype("q", q)
    q, k, v = _autocast(q, k, v)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}; got {x.dtype}")
    if k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k must be [{lead},Hk,K] with the {lead} and K of q, whose shape is {tuple(q.shape)}; got {tuple(k.shape)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"v must be [{lead},Hk,V] with the {lead} and Hk of k, whose shape is {tuple(k.shape)}; "
            f"got {tuple(v.shape)}"
        )
    if k.shape[-2] == 0 or q.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"the heads of q must be a multiple of those of k, and neither 0; got {q.shape[-2]} and {k.shape[-2]} "
            f"from shapes {tuple(q.shape)} and {tuple(k.shape)}"
        )
    return q, k, v


def _check_dim(name: str, size: int, limit: int) -> None:
    if not 1 <= size <= limit:
        raise ValueError(f"{name} must be between 1 and {limit}; got {size}")


def _check_log_decay(log_decay: object, q: Tensor, key_heads: int, lead: str) -> Tensor | None:
    if log_decay is None:
        return None
    check_tensor("log_decay", log_decay)
    assert isinstance(log_decay, Tensor)
    check_dtype("log_decay", log_decay)
    check_device("log_decay", log_decay, "q", q)
    heads = q.shape[-2]
    per_token = tuple(q.shape[:-2])
    # compared one by one: torch.compile takes `in` on symbolic sizes for a comparison of objects
    right = log_decay.dim() >= 1 and (log_decay.shape[-1] == heads or log_decay.shape[-1] == key_heads)
    if not right or not (
        log_decay.dim() == 1 or (log_decay.dim() == len(per_token) + 1 and log_decay.shape[:-1] == q.shape[:-2])
    ):
        raise ValueError(
            f"log_decay must be [H], [Hk], [{lead},H] or [{lead},Hk] with H = {heads}, Hk = {key_heads}, "
            f"[{lead}] = {list(per_token)}; got shape {tuple(log_decay.shape)}"
        )
    if check_values(log_decay) and bool((log_decay.detach() > 0).any()):
        raise ValueError(f"log_decay must not be positive; its largest value is {log_decay.detach().max().item():g}")
    return log_decay.to(_real(q.dtype))


def _check_mask(mask: object, q: Tensor, lead: str) -> None:
    if mask is None:
        return
    check_tensor("mask", mask)
    assert isinstance(mask, Tensor)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must have dtype bool; got {mask.dtype}")
    if mask.shape != q.shape[:-2]:
        raise ValueError(f"mask must be [{lead}] = {list(q.shape[:-2])}; got shape {tuple(mask.shape)}")
    check_device("mask", mask, "q", q)


def _check_cu_seqlens(cu_seqlens: object, q: Tensor) -> Tensor | None:
    if cu_seqlens is None:
        return None
    check_tensor("cu_seqlens", cu_seqlens)
    assert isinstance(cu_seqlens, Tensor)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must have dtype int32 or int64; got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be a vector of N + 1 offsets; got shape {tuple(cu_seqlens.shape)}")
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1 that holds all sequences; q has B = {q.shape[0]}")
    check_device("cu_seqlens", cu_seqlens, "q", q)
    if check_values(cu_seqlens):
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != q.shape[1] or any(b < a for a, b in itertools.pairwise(offsets)):
            shown = str(offsets) if len(offsets) <= 12 else f"{str(offsets[:6])[:-1]}, ..., {str(offsets[-6:])[1:]}"
            raise ValueError(f"cu_seqlens must start at 0, not decrease and end at T = {q.shape[1]}; got {shown}")
    return cu_seqlens.to(torch.int64).contiguous()


def _check_state(
    name: str, state: object, q: Tensor, shape: tuple[int, ...], normalize: bool
) -> tuple[Tensor | None, Tensor | None]:
    if state is None:
        return None, None
    if isinstance(state, Tensor) or not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"{name} must be a LinearAttentionState(kv, z); got {type(state).__name__}")
    kv, z = state
    real = _real(q.dtype)
    for part, x, expected in ((f"{name}.kv", kv, shape), (f"{name}.z", z, shape[:-1])):
        if x is None and part.endswith(".z"):
            continue
        check_tensor(part, x)
        check_dtype(part, x, (real,))
        check_device(part, x, "q", q)
        if tuple(x.shape) != expected:
            letters = "[N,Hs,K,V]" if part.endswith("kv") else "[N,Hs,K]"
            raise ValueError(f"{part} must be {letters} = {list(expected)}; got shape {tuple(x.shape)}")
    if normalize and z is None:
        raise ValueError(f"{name}.z must be given when normalize=True; got None (start from zeros for an empty state)")
    return kv, z


def _check_numbers(scale: float | None, eps: float) -> None:
    for name, x in (("scale", scale), ("eps", eps)):
        if x is not None and (isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat))):
            raise TypeError(f"{name} must be a number; got {type(x).__name__}")
    if eps < 0:
        raise ValueError(f"eps must not be negative; got {eps!r}")


def _refuse_gradients(scan: str, tensors: dict[str, Tensor | None]) -> None:
    """Of a step; ``scan`` is the op for whole sequences."""
    if torch.is_grad_enabled():
        wanting = [name for name, x in tensors.items() if x is not None and x.requires_grad]
        if wanting:
            raise RuntimeError(
                f"{scan}_step has no gradient, and {', '.join(wanting)} require one: call it under "
                f"torch.no_grad() (or detach them), or use {scan} with initial_state to train"
            )
    if carries_tangent(*tensors.values()):
        raise RuntimeError(f"{scan}_step has no forward-mode derivative: detach its inputs")


def _check_step(
    scan: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_dim: int,
    state: LinearAttentionState,
    log_decay: Tensor | None,
    normalize: bool,
    mask: Tensor | None,
    **more: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Checked and converted (kv, z, log_decay) of a step, for keys of key_dim numbers in the state.

    ``scan`` is the op for whole sequences; ``more`` are tensors that must not require a gradient either.
    """
    log_decay = _check_log_decay(log_decay, q, k.shape[1], "B")
    _check_mask(mask, q, "B")
    if state is None:
        raise TypeError("state must be a LinearAttentionState(kv, z); got None (start from zeros for an empty state)")
    state_heads = k.shape[1] if log_decay is None else log_decay.shape[-1]
    kv, z = _check_state("state", state, q, (q.shape[0], state_heads, key_dim, v.shape[2]), normalize)
    assert kv is not None
    _refuse_gradients(scan, {"q": q, "k": k, "v": v, "state.kv": kv, "state.z": z, "log_decay": log_decay, **more})
    for name, x in (("state.kv", kv), ("state.z", z)):
        if x is not None and any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            raise ValueError(f"{name} is updated in place and must not be expanded; got strides {x.stride()}")
    return kv, z, log_decay


def _written(kv: Tensor, z: Tensor | None) -> None:
    """A backward pass that saved the state must notice that a step has changed it."""
    increment_version(kv)
    if z is not None:
        increment_version(z)


# --- the scan -----------------------------------------------------------------------------------------------------


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    mask: Tensor | None = None,
    initial_state: LinearAttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, LinearAttentionState | None]:
    """Causal linear attention in O(T) time, ``S_t = exp(g_t) S_{t-1} + k_t v_t^T``, ``o_t = scale q_t^T S_t``.

    Args:
        q: [B, T, H, K]; k: [B, T, Hk, K]; v: [B, T, Hk, V]; one dtype of float16, bfloat16, float32, float64; K and V
            from 1 to 256; any strides, expanded tensors included, without a copy. H is a multiple of Hk: key head j
            serves query heads j H/Hk to (j + 1) H/Hk - 1. Under autocast they are cast to its dtype.
        log_decay: g <= 0, natural logarithm: None, [H] or [Hk] (per head), [B, T, H] or [B, T, Hk] (per token), any of
            the dtypes, used in float32 (float64 for float64 q). -inf forgets everything.
        scale: default ``K ** -0.5``.
        normalize: divide o_t by ``scale q_t . z_t + eps`` with ``z_t = exp(g_t) z_{t-1} + k_t``.
        mask: bool [B, T]; a token that is False writes nothing to the state, does not decay it, outputs 0 and gets zero
            gradients, whatever its q, k and v hold.
        initial_state: a :class:`LinearAttentionState` of N sequences. Its z, if given, is carried on also without
            ``normalize``.
        output_final_state: return the state after the last token of each sequence.
        cu_seqlens: int32 or int64 [N + 1] with B == 1: sequence n is the tokens from ``cu_seqlens[n]`` up to, not
            including, ``cu_seqlens[n + 1]``.

    Returns:
        ``(o, final_state)``: o [B, T, H, V] in the dtype of v, and a :class:`LinearAttentionState` or None.

    Raises:
        TypeError, ValueError: a wrong shape, dtype, device or option; for CPU tensors in eager mode also a positive
            ``log_decay`` or offsets that do not start at 0, decrease, or do not end at T.

    Gradients reach q, k, v, log_decay and the initial state, of first order natively and of higher order through torch
    operations that are linear in T. Sums are float32 (float64 for float64) and do not depend on the number of threads.
    The layout is that of flash-linear-attention; decay is applied as products of ``exp(g) <= 1`` within chunks, so no
    length overflows.

    >>> q = k = torch.ones(1, 3, 1, 4); v = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    >>> o, state = linear_attention(q, k, v, scale=0.25, output_final_state=True)
    >>> o.flatten().tolist(), state.kv.shape
    ([1.0, 3.0, 6.0], torch.Size([1, 1, 4, 1]))
    >>> linear_attention(q, k, v, normalize=True, eps=0.0)[0].flatten().tolist()
    [1.0, 1.5, 2.0]
    """
    q, k, v = _check_qkv(q, k, v, "B,T,H,D")
    _check_dim("K, the last dimension of q,", q.shape[-1], MAX_DIM)
    _check_dim("V, the last dimension of v,", v.shape[-1], MAX_DIM)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _scan(q, k, v, log_decay, scale, normalize, eps, mask, initial_state, output_final_state, cu_seqlens)


def _check_options(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_dim: int,
    log_decay: Tensor | None,
    normalize: bool,
    mask: Tensor | None,
    initial_state: LinearAttentionState | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Checked and converted (log_decay, mask, cu_seqlens, kv, z), for keys of key_dim numbers in the scan."""
    log_decay = _check_log_decay(log_decay, q, k.shape[2], "B,T")
    _check_mask(mask, q, "B,T")
    cu_seqlens = _check_cu_seqlens(cu_seqlens, q)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_heads = k.shape[2] if log_decay is None else log_decay.shape[-1]
    kv, z = _check_state("initial_state", initial_state, q, (sequences, state_heads, key_dim, v.shape[3]), normalize)
    return log_decay, mask, cu_seqlens, kv, z


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
    mask: Tensor | None,
    initial_state: LinearAttentionState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, LinearAttentionState | None]:
    """:func:`linear_attention` behind the checks of q, k and v; v may be of a smaller dtype than q and k."""
    _check_numbers(scale, eps)
    options = _check_options(q, k, v, q.shape[3], log_decay, normalize, mask, initial_state, cu_seqlens)
    tensors = (q, k, v, *options)
    for_backward = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    *outputs, _, _ = torch.ops.freqrank.linear_attention(
        *tensors, float(scale), bool(normalize), float(eps), bool(output_final_state), for_backward
    )
    return _with_state(outputs, output_final_state, normalize or options[-1] is not None)


def _with_state(outputs: Sequence[Tensor], wanted: bool, with_z: bool) -> tuple[Tensor, LinearAttentionState | None]:
    o, kv, z = outputs
    return o, LinearAttentionState(kv, z if with_z else None) if wanted else None


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearAttentionState,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """One token of :func:`linear_attention`: updates ``state`` in place and returns the output. Inference only.

    Args:
        q: [B, H, K]; k: [B, Hk, K]; v: [B, Hk, V]; dtypes as in :func:`linear_attention`; K and V from 1 to 512, so
            that the state of :func:`feature_map_attention` can be stepped with its features as q and k and scale 1.
        state: kv [B, Hs, K, V] and z [B, Hs, K] or None (needed if ``normalize``), float32 (float64 for float64), with
            Hs the heads of log_decay, or Hk without one. Any strides under which no two elements share memory.
        log_decay: None, [H] or [Hk], [B, H] or [B, Hk].
        mask: bool [B]; where False the state stays as it is and o is 0.

    Returns:
        o [B, H, V] in the dtype of v.

    Raises:
        TypeError, ValueError: as :func:`linear_attention`.
        RuntimeError: gradients are being recorded and an input requires one, or an input has a tangent.

    >>> state = LinearAttentionState(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2))
    >>> one = torch.ones(1, 1, 2); v = torch.full((1, 1, 1), 3.0)
    >>> linear_attention_step(one, one, v, state, scale=0.5).item(), state.kv.flatten().tolist()
    (3.0, [3.0, 3.0])
    """
    q, k, v = _check_qkv(q, k, v, "B,H,D")
    _check_dim("K, the last dimension of q,", q.shape[-1], MAX_FEATURES)
    _check_dim("V, the last dimension of v,", v.shape[-1], MAX_FEATURES)
    _check_numbers(scale, eps)
    kv, z, log_decay = _check_step("linear_attention", q, k, v, q.shape[2], state, log_decay, normalize, mask)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    o = torch.ops.freqrank.linear_attention_step(
        q, k, v, kv, z, log_decay, mask, float(scale), bool(normalize), float(eps)
    )
    _written(kv, z)
    return o


# --- feature maps -------------------------------------------------------------------------------------------------

FEATURES = ("softmax", "exp", "softmax_pm")


def _features(x: Tensor, key_heads: int, projection: Tensor, feature: str, weights: Tensor | None) -> Tensor:
    """phi(x) for x [B, T, H, K], in the dtype of the projection."""
    with torch.autocast(x.device.type, enabled=False):
        groups = x.to(projection.dtype).unflatten(2, (key_heads, -1))
        if projection.dim() == 2:
            p = groups @ projection
        else:
            p = torch.einsum("bthrk,hkm->bthrm", groups, projection)
        if feature == "exp":
            p = p.exp()
        else:
            p = torch.softmax(p if feature == "softmax" else torch.cat([p, -p], -1), -1)
        if weights is not None:
            p = p * (weights if weights.dim() == 1 else weights.unsqueeze(1))
        return p.flatten(2, 3)


def _query_and_key_features(
    q: Tensor, k: Tensor, projection: Tensor, weights: Tensor | None, feature: str, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if mask is not None:  # what a masked token holds, NaN included, must not reach the gradients of the map
        q, k = (torch.where(mask[:, :, None, None], x, 0) for x in (q, k))
    key_heads = k.shape[2]
    return _features(q, key_heads, projection, feature, weights), _features(k, key_heads, projection, feature, weights)


def _check_map(
    q: Tensor, k: Tensor, projection: Tensor, feature: str, weights: Tensor | None
) -> tuple[Tensor, Tensor | None, int]:
    """Checked and converted (projection, weights, number of features)."""
    check_option("feature", feature, FEATURES)
    check_tensor("projection", projection)
    check_dtype("projection", projection)
    check_device("projection", projection, "q", q)
    key_heads, key_dim = k.shape[-2], q.shape[-1]
    if (
        projection.dim() not in (2, 3)
        or projection.shape[-2] != key_dim
        or (projection.dim() == 3 and projection.shape[0] != key_heads)
    ):
        raise ValueError(
            f"projection must be [K, M] or [Hk, K, M] with K = {key_dim}, Hk = {key_heads}; "
            f"got shape {tuple(projection.shape)}"
        )
    features = projection.shape[-1] * (2 if feature == "softmax_pm" else 1)
    _check_dim(
        f"the number of features, {'2M' if feature == 'softmax_pm' else 'M'} of the projection,", features, MAX_FEATURES
    )
    if weights is not None:
        check_tensor("weights", weights)
        check_dtype("weights", weights)
        check_device("weights", weights, "q", q)
        if weights.shape != (features,) and weights.shape != (key_heads, features):
            raise ValueError(
                f"weights must be [{features}] or [Hk, {features}] = {[key_heads, features]}, one weight a feature; "
                f"got shape {tuple(weights.shape)}"
            )
    real = _real(q.dtype)
    return projection.to(real), None if weights is None else weights.to(real), features


def feature_map_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    feature: str = "softmax",
    weights: Tensor | None = None,
    log_decay: Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    mask: Tensor | None = None,
    initial_state: LinearAttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, LinearAttentionState | None]:
    """Linear attention with scale 1 over features ``phi(x) = feature(x projection) * weights`` of the queries and keys.

    Args:
        q, k, v: as in :func:`linear_attention`.
        projection: [K, M], or [Hk, K, M] with one map for a key head and its queries; any of the dtypes, used in
            float32 (float64 for float64 q).
        feature: "softmax" over the M products, "exp" of each, or "softmax_pm", the softmax over the 2M products
            [xP, -xP].
        weights: one weight a feature, [M] or [Hk, M] (2M for "softmax_pm"); the number of features goes to 512.
        log_decay, normalize, eps, mask, initial_state, output_final_state, cu_seqlens: as in :func:`linear_attention`,
            the state's K being the number of features.

    Returns:
        ``(o, final_state)`` as :func:`linear_attention`.

    Raises:
        TypeError, ValueError: as :func:`linear_attention`, and for projection, feature and weights.

    Gradients reach q, k, v, projection, weights, log_decay and the initial state, and do not depend on the number of
    threads. Features are made a few tokens at a time, in forward and backward alike, and are never written to memory:
    on the CPU always, in float32 (float64 for float64); on CUDA for float16 and bfloat16, whose dtype they then have,
    up to 128 channels, features and V, unless a gradient of log_decay is wanted or, in float16, features may be larger
    than 1 ("exp", or weights), or 128 need more shared memory than the GPU has. There a projection counts to 2^-17, or
    2^-22 in float16, where its elements must be below 65504. Otherwise features are tensors on CUDA, in the dtype of a
    16-bit v where tensor cores can take them. The softmax features are those of the released DiJiang
    code (arXiv 2403.19928), "exp" those of its paper.

    >>> q = torch.randn(1, 5, 2, 4); v = torch.ones(1, 5, 2, 3)
    >>> o, _ = feature_map_attention(q, q, v, torch.eye(4), normalize=True, eps=0.0)
    >>> torch.allclose(o, v)
    True
    """
    q, k, v = _check_qkv(q, k, v, "B,T,H,D")
    _check_dim("K, the last dimension of q,", q.shape[-1], MAX_DIM)
    _check_dim("V, the last dimension of v,", v.shape[-1], MAX_DIM)
    projection, weights, features = _check_map(q, k, projection, feature, weights)
    _check_numbers(None, eps)
    if q.device.type == "cuda" and not _makes_features(q, v, features, feature, weights, log_decay):
        _check_mask(mask, q, "B,T")
        phi_q, phi_k = _query_and_key_features(q, k, projection, weights, feature, mask)
        # tensor cores take q, k and v of one dtype, but only features between 0 and 1 are sure to fit into float16
        bounded = feature != "exp" and weights is None
        if features <= MAX_DIM and (v.dtype == torch.bfloat16 or (v.dtype == torch.float16 and bounded)):
            phi_q, phi_k = phi_q.to(v.dtype), phi_k.to(v.dtype)
        return _scan(
            phi_q, phi_k, v, log_decay, 1.0, normalize, eps, mask, initial_state, output_final_state, cu_seqlens
        )
    options = _check_options(q, k, v, features, log_decay, normalize, mask, initial_state, cu_seqlens)
    tensors = (q, k, v, projection, weights, *options)
    for_backward = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    *outputs, _, _ = torch.ops.freqrank.feature_map_attention(
        q, k, v, projection, weights, FEATURES.index(feature), *options,
        bool(normalize), float(eps), bool(output_final_state), for_backward,
    )  # fmt: skip
    return _with_state(outputs, output_final_state, normalize or options[-1] is not None)


def _makes_features(
    q: Tensor, v: Tensor, features: int, feature: str, weights: Tensor | None, log_decay: Tensor | None
) -> bool:
    """Whether CUDA's kernels make these features themselves."""
    largest = max(q.shape[3], v.shape[3], features)
    if q.dtype.itemsize != 2 or largest > _FUSED_DIM:
        return False
    if q.dtype == torch.float16 and (feature == "exp" or weights is not None):
        return False
    if torch.is_grad_enabled() and log_decay is not None and log_decay.requires_grad:
        return False
    if largest <= 64 or not torch.cuda.is_available():  # fake tensors may be on a GPU that is not there
        return True
    properties = torch.cuda.get_device_properties(q.device)
    return properties.shared_memory_per_block_optin >= _FUSED_SHARED_BYTES  # type: ignore[attr-defined]


def feature_map_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearAttentionState,
    projection: Tensor,
    *,
    feature: str = "softmax",
    weights: Tensor | None = None,
    log_decay: Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """One token of :func:`feature_map_attention`: updates ``state`` in place and returns the output. Inference only.

    Args:
        q: [B, H, K]; k: [B, Hk, K]; v: [B, Hk, V]; dtypes as in :func:`linear_attention`; K from 1 to 256, V from 1 to
            512.
        state: kv [B, Hs, F, V] and z [B, Hs, F] or None, F being the number of features; otherwise as in
            :func:`linear_attention_step`.
        projection, feature, weights: as in :func:`feature_map_attention`.
        log_decay, mask: as in :func:`linear_attention_step`.

    Returns:
        o [B, H, V] in the dtype of v.

    Raises:
        TypeError, ValueError: as :func:`feature_map_attention`.
        RuntimeError: gradients are being recorded and an input requires one, or an input has a tangent.

    Features are float32 (float64 for float64) and made where they are used: one kernel on either device.

    >>> state = LinearAttentionState(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2))
    >>> q = torch.zeros(1, 1, 3); v = torch.full((1, 1, 1), 4.0)
    >>> feature_map_attention_step(q, q, v, state, torch.ones(3, 2)).item(), state.kv.flatten().tolist()
    (2.0, [2.0, 2.0])
    """
    q, k, v = _check_qkv(q, k, v, "B,H,D")
    _check_dim("K, the last dimension of q,", q.shape[-1], MAX_DIM)
    _check_dim("V, the last dimension of v,", v.shape[-1], MAX_FEATURES)
    projection, weights, features = _check_map(q, k, projection, feature, weights)
    _check_numbers(None, eps)
    kv, z, log_decay = _check_step(
        "feature_map_attention", q, k, v, features, state, log_decay, normalize, mask, projection=projection,
        weights=weights,
    )  # fmt: skip
    o = torch.ops.freqrank.feature_map_attention_step(
        q, k, v, projection, weights, FEATURES.index(feature), kv, z, log_decay, mask, bool(normalize), float(eps)
    )
    _written(kv, z)
    return o


def _dct_matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal DCT-II matrix: C[i, j] = s_i cos(pi (2j + 1) i / (2n)), rounded once from float64."""
    i = torch.arange(n, device=device)
    angle = ((2 * i + 1) * i[:, None]) % (4 * n)  # reduced as integers: exact for every n
    matrix = torch.cos(angle.to(torch.float64) * (math.pi / (2 * n))) * math.sqrt(2 / n)
    return torch.cat([torch.full_like(matrix[:1], math.sqrt(1 / n)), matrix[1:]]).to(dtype)


def _dijiang_projection(q: Tensor, k: Tensor, scales: Tensor, transform: str, signs: Tensor | None) -> Tensor:
    """diag(signs) C diag(scales) (C^T for "dct"), [K, K] or [Hk, K, K], its arguments checked."""
    check_option("transform", transform, ("idct", "dct"))
    key_heads, key_dim = k.shape[-2], q.shape[-1]
    check_tensor("scales", scales)
    check_dtype("scales", scales)
    check_device("scales", scales, "q", q)
    if scales.shape != (key_dim,) and scales.shape != (key_heads, key_dim):
        raise ValueError(
            f"scales must be [K] or [Hk, K] with K = {key_dim}, Hk = {key_heads}; got shape {tuple(scales.shape)}"
        )
    real = _real(q.dtype)
    matrix = _dct_matrix(key_dim, real, q.device)
    if transform == "dct":
        matrix = matrix.mT
    if signs is not None:
        check_tensor("signs", signs)
        check_device("signs", signs, "q", q)
        if signs.is_complex() or signs.dtype == torch.bool or tuple(signs.shape) != (key_dim,):
            raise ValueError(
                f"signs must be a real vector [K] with K = {key_dim}; got {signs.dtype} of shape {tuple(signs.shape)}"
            )
        if check_values(signs) and bool((signs.abs() != 1).any()):
            raise ValueError("signs must be +1 and -1 only; got other values")
        matrix = signs.to(real)[:, None] * matrix
    return matrix * scales.to(real).unsqueeze(-2)


def dijiang_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Tensor,
    *,
    transform: str = "idct",
    signs: Tensor | None = None,
    feature: str = "softmax",
    weights: Tensor | None = None,
    log_decay: Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    mask: Tensor | None = None,
    initial_state: LinearAttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, LinearAttentionState | None]:
    """:func:`feature_map_attention` with DiJiang's projection ``diag(signs) C diag(scales)``, C the DCT-II matrix.

    Args:
        q, k, v: as in :func:`linear_attention`.
        scales: [K] or [Hk, K], the sampled frequencies' lengths t; any of the dtypes. Gradients reach them.
        transform: "idct" for x C, as DiJiang's code was released, or "dct" for x C^T, as in its paper (arXiv
            2403.19928); C is orthonormal.
        signs: [K] of +1 and -1, or None: multiplies the channels of q and k before the transform.
        feature, weights, log_decay, normalize, eps, mask, initial_state, output_final_state, cu_seqlens: as in
            :func:`feature_map_attention`.

    Returns:
        ``(o, final_state)`` as :func:`linear_attention`.

    Raises:
        TypeError, ValueError: as :func:`feature_map_attention`, and for scales, transform and signs.

    >>> q, v = torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    >>> log_decay = torch.tensor([-0.1, -0.2])
    >>> o, state = dijiang_attention(q, q, v, torch.ones(8), log_decay=log_decay, output_final_state=True)
    >>> o.shape, state.kv.shape
    (torch.Size([2, 7, 2, 8]), torch.Size([2, 2, 8, 8]))
    """
    q, k, v = _check_qkv(q, k, v, "B,T,H,D")
    return feature_map_attention(
        q, k, v, _dijiang_projection(q, k, scales, transform, signs), feature=feature, weights=weights,
        log_decay=log_decay, normalize=normalize, eps=eps, mask=mask, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def dijiang_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearAttentionState,
    scales: Tensor,
    *,
    transform: str = "idct",
    signs: Tensor | None = None,
    feature: str = "softmax",
    weights: Tensor | None = None,
    log_decay: Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """One token of :func:`dijiang_attention`: :func:`feature_map_attention_step` with DiJiang's projection.

    The projection, [K, K], is made anew in each call; a caller that can keep it passes it to
    :func:`feature_map_attention_step`.

    Args:
        q, k, v, state, feature, weights, log_decay, normalize, eps, mask: as in :func:`feature_map_attention_step`.
        scales, transform, signs: as in :func:`dijiang_attention`.

    Returns:
        o [B, H, V] in the dtype of v.

    Raises:
        TypeError, ValueError: as :func:`dijiang_attention`.
        RuntimeError: gradients are being recorded and an input requires one, or an input has a tangent.

    >>> q, v = torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    >>> o, state = dijiang_attention(q[:, :6], q[:, :6], v[:, :6], torch.ones(8), output_final_state=True)
    >>> last = dijiang_attention_step(q[:, 6], q[:, 6], v[:, 6], state, torch.ones(8))
    >>> torch.allclose(last, dijiang_attention(q, q, v, torch.ones(8))[0][:, 6], atol=1e-6)
    True
    """
    q, k, v = _check_qkv(q, k, v, "B,H,D")
    projection = _dijiang_projection(q, k, scales, transform, signs)
    _refuse_gradients("dijiang_attention", {"scales": scales, "signs": signs})
    return feature_map_attention_step(
        q, k, v, state, projection, feature=feature, weights=weights,
        log_decay=log_decay, normalize=normalize, eps=eps, mask=mask,
    )  # fmt: skip


# --- fakes --------------------------------------------------------------------------------------------------------


def _fake_forward(q, k, v, key_dim, log_decay, cu_seqlens, initial_z, normalize, output_final_state):
    real = _real(q.dtype)
    batch, time, heads, _ = q.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_heads = k.shape[2] if log_decay is None else log_decay.shape[-1]
    with_z = output_final_state and (normalize or initial_z is not None)
    kv_shape = (sequences, state_heads, key_dim, v.shape[3])
    return (
        v.new_empty((batch, time, heads, v.shape[3])),
        v.new_empty(kv_shape if output_final_state else (0,), dtype=real),
        v.new_empty(kv_shape[:-1] if with_z else (0,), dtype=real),
    )


def _keeps_denominators(q: Tensor, normalize: bool) -> bool:
    """Whether backward takes forward's output and denominators; on the CPU it makes them again."""
    return normalize and q.device.type == "cuda"


def _fake_kept(q, v, normalize, for_backward):
    kept = _keeps_denominators(q, normalize)
    rest = kept and for_backward and v.dtype.itemsize == 2
    return (
        v.new_empty((q.shape[0], q.shape[2], q.shape[1]) if kept else (0,), dtype=_real(q.dtype)),
        v.new_empty((*q.shape[:3], v.shape[3]) if rest else (0,)),
    )


def _fake_gradient(x: Tensor | None, q: Tensor) -> Tensor:
    """Of something in the dtype of the arithmetic; empty for None."""
    return q.new_empty((0,) if x is None else x.shape, dtype=_real(q.dtype))


@torch.library.register_fake("freqrank::linear_attention")
def _(
    q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z, scale, normalize, eps, output_final_state,
    for_backward,
):  # fmt: skip
    outputs = _fake_forward(q, k, v, q.shape[3], log_decay, cu_seqlens, initial_z, normalize, output_final_state)
    return *outputs, *_fake_kept(q, v, normalize, for_backward)


@torch.library.register_fake("freqrank::linear_attention_backward")
def _(
    grad_o, grad_kv, grad_z, q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z, o, denominator, rest,
    scale, normalize, eps, decay_gradient,
):  # fmt: skip
    others = (log_decay if decay_gradient else None, initial_kv, initial_z)
    return *(x.new_empty(x.shape) for x in (q, k, v)), *(_fake_gradient(x, q) for x in others)


@torch.library.register_fake("freqrank::feature_map_attention")
def _(
    q, k, v, projection, weights, feature, log_decay, mask, cu_seqlens, initial_kv, initial_z, normalize, eps,
    output_final_state, for_backward,
):  # fmt: skip
    features = projection.shape[-1] * (2 if FEATURES[feature] == "softmax_pm" else 1)
    outputs = _fake_forward(q, k, v, features, log_decay, cu_seqlens, initial_z, normalize, output_final_state)
    return *outputs, *_fake_kept(q, v, normalize, for_backward)


@torch.library.register_fake("freqrank::feature_map_attention_backward")
def _(
    grad_o, grad_kv, grad_z, q, k, v, projection, weights, feature, log_decay, mask, cu_seqlens, initial_kv, initial_z,
    o, denominator, rest, normalize, eps, decay_gradient, map_gradient,
):  # fmt: skip
    of_map = (projection, weights) if map_gradient else (None, None)
    rest = (*of_map, log_decay if decay_gradient else None, initial_kv, initial_z)
    return *(x.new_empty(x.shape) for x in (q, k, v)), *(_fake_gradient(x, q) for x in rest)


@torch.library.register_fake("freqrank::linear_attention_step")
def _(q, k, v, kv, z, log_decay, mask, scale, normalize, eps):
    return v.new_empty((q.shape[0], q.shape[1], v.shape[2]))


@torch.library.register_fake("freqrank::feature_map_attention_step")
def _(q, k, v, projection, weights, feature, kv, z, log_decay, mask, normalize, eps):
    return v.new_empty((q.shape[0], q.shape[1], v.shape[2]))


# --- gradients ----------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    *tensors, scale, normalize, eps, output_final_state, _ = inputs
    _keep(ctx, tensors, output, normalize)
    ctx.options = (scale, normalize, eps)
    ctx.output_final_state = output_final_state


def _keep(ctx, tensors, output, normalize):
    o, _, _, denominator, rest = output
    ctx.mark_non_differentiable(denominator, rest)
    kept = (o, denominator, rest) if _keeps_denominators(tensors[0], normalize) else (None, None, None)
    ctx.save_for_backward(*tensors, *kept)
    ctx.set_materialize_grads(False)


def _directions(ctx, grads, q, v, normalize, z):
    """The gradients of the outputs, without those of outputs that are empty because nobody asked for them."""
    grad_o, grad_kv, grad_z = grads
    if not ctx.output_final_state:
        grad_kv = None
    if not (ctx.output_final_state and (normalize or z is not None)):
        grad_z = None
    if grad_o is None:
        grad_o = v.new_zeros(()).expand(*q.shape[:-1], v.shape[-1])
    return grad_o, grad_kv, grad_z


def _backward(ctx, *grads):
    q, k, v, log_decay, mask, cu_seqlens, kv, z, *kept = ctx.saved_tensors
    wants_decay = log_decay is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dlog_decay, dkv, dz = torch.ops.freqrank.linear_attention_backward(
        *_directions(ctx, grads[:3], q, v, ctx.options[1], z),
        q, k, v, log_decay, mask, cu_seqlens, kv, z, *kept, *ctx.options, wants_decay,
    )  # fmt: skip
    return (
        dq, dk, dv, dlog_decay if wants_decay else None, None, None,
        None if kv is None else dkv, None if z is None else dz, None, None, None, None, None,
    )  # fmt: skip


register_derivatives("linear_attention", _backward, setup_context=_setup)


def _setup_features(ctx, inputs, output):
    *tensors, normalize, eps, output_final_state, _ = inputs
    ctx.feature = tensors.pop(5)
    _keep(ctx, tensors, output, normalize)
    ctx.options = (normalize, eps)
    ctx.output_final_state = output_final_state


def _backward_features(ctx, *grads):
    q, k, v, projection, weights, log_decay, mask, cu_seqlens, kv, z, *kept = ctx.saved_tensors
    wants_map = any(ctx.needs_input_grad[3:5])
    wants_decay = log_decay is not None and ctx.needs_input_grad[6]
    dq, dk, dv, dprojection, dweights, dlog_decay, dkv, dz = torch.ops.freqrank.feature_map_attention_backward(
        *_directions(ctx, grads[:3], q, v, ctx.options[0], z),
        q, k, v, projection, weights, ctx.feature, log_decay, mask, cu_seqlens, kv, z, *kept, *ctx.options, wants_decay,
        wants_map,
    )  # fmt: skip
    return (
        dq, dk, dv, dprojection if wants_map else None, dweights if wants_map and weights is not None else None, None,
        dlog_decay if wants_decay else None, None, None,
        None if kv is None else dkv, None if z is None else dz, None, None, None, None,
    )  # fmt: skip


register_derivatives("feature_map_attention", _backward_features, setup_context=_setup_features)


def _chunked(q, k, v, log_decay, mask, cu_seqlens, kv, z, scale, normalize, eps):
    """The op in differentiable torch operations, linear in T: what higher derivatives are taken of."""
    if cu_seqlens is not None:
        options = {"scale": scale, "normalize": normalize, "eps": eps}
        parts = []
        for n, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            a, b, c, d, e = (x if x is None or x.dim() == 1 else x[:, begin:end] for x in (q, k, v, log_decay, mask))
            own_kv, own_z = (None if x is None else x[n : n + 1] for x in (kv, z))
            parts.append(_chunked(a, b, c, d, e, None, own_kv, own_z, **options))
        if not parts:  # no sequence, so no token either: what is left is empty whichever way it is computed
            state = [None if x is None else x.new_zeros((1, *x.shape[1:])) for x in (kv, z)]
            o, kv, z = _chunked(q, k, v, log_decay, mask, None, *state, **options)
            return o, kv[:0], z[:0]
        o, kv, z = (list(x) for x in zip(*parts, strict=True))
        return torch.cat(o, 1), torch.cat(kv), torch.cat(z)

    real = _real(q.dtype)
    batch, time, heads, key_dim = q.shape
    state_heads = k.shape[2] if log_decay is None else log_decay.shape[-1]
    q, k, v = (x.to(real) for x in (q, k, v))
    if mask is not None:
        q, k, v = (torch.where(mask[:, :, None, None], x, 0) for x in (q, k, v))
    k, v = (x.repeat_interleave(state_heads // x.shape[2], 2) for x in (k, v))
    q = q.unflatten(2, (state_heads, -1)) * scale
    g = torch.zeros(batch, time, state_heads, dtype=torch.float64, device=q.device)
    if log_decay is not None:
        # float64, and nothing below what exp() sends to 0 anyway, so that differences of sums stay exact and finite
        g = g + log_decay.to(torch.float64).clamp(min=-800)
        if mask is not None:
            g = torch.where(mask[:, :, None], g, 0)
    kv = q.new_zeros(batch, state_heads, key_dim, v.shape[-1]) if kv is None else kv
    z = q.new_zeros(batch, state_heads, key_dim) if z is None else z
    outputs = []
    chunk = 64
    for begin in range(0, time, chunk):
        qc, kc, vc, gc = (x[:, begin : begin + chunk] for x in (q, k, v, g))
        total = gc.cumsum(1).transpose(1, 2)  # [B, Hs, C]
        later = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=q.device).triu(1)
        between = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp().to(real)
        start, end, whole = (x.exp().to(real) for x in (total, total[..., -1:] - total, total[..., -1]))
        scores = torch.einsum("bihrk,bjhk->bhrij", qc, kc) * between[:, :, None]
        qc = qc * start.transpose(1, 2)[..., None, None]
        o = torch.einsum("bhrij,bjhv->bihrv", scores, vc) + torch.einsum("bihrk,bhkv->bihrv", qc, kv)
        if normalize:
            denominator = scores.sum(-1).permute(0, 3, 1, 2) + torch.einsum("bihrk,bhk->bihr", qc, z)
            o = o / (denominator + eps)[..., None]
        if mask is not None:
            o = torch.where(mask[:, begin : begin + chunk, None, None, None], o, 0)
        outputs.append(o.flatten(2, 3))
        kc = kc * end.transpose(1, 2)[..., None]
        kv = kv * whole[..., None, None] + torch.einsum("bjhk,bjhv->bhkv", kc, vc)
        z = z * whole[..., None] + kc.sum(1)
    o = torch.cat(outputs, 1) if outputs else q.new_zeros(batch, 0, heads, v.shape[-1])
    return o, kv, z


def _composed(q, k, v, projection, weights, feature, log_decay, mask, cu_seqlens, kv, z, normalize, eps):
    """:func:`_chunked` over features as tensors."""
    phi_q, phi_k = _query_and_key_features(q, k, projection, weights, FEATURES[feature], mask)
    return _chunked(phi_q, phi_k, v, log_decay, mask, cu_seqlens, kv, z, 1.0, normalize, eps)


def _setup_second(ctx, inputs, output):
    # without what forward kept, which follows from the others
    tensors, options = inputs[:-7], inputs[-4:-1]
    ctx.save_for_backward(*tensors)
    ctx.formula = lambda *variables: _chunked(*variables, *options)
    ctx.wanted = (0, 1, 2, 3, 6, 7)
    ctx.set_materialize_grads(False)


def _setup_second_features(ctx, inputs, output):
    tensors, options = list(inputs[:-7]), inputs[-4:-2]
    feature, tensors[8] = tensors[8], None  # saved as an absent tensor, so that places stay those of the arguments
    ctx.save_for_backward(*tensors)

    def formula(*variables):
        arguments = [*variables, *options]
        arguments[5] = feature
        return _composed(*arguments)

    ctx.formula = formula
    ctx.wanted = (0, 1, 2, 3, 4, 6, 9, 10)
    ctx.set_materialize_grads(False)


def _second_backward(ctx, *directions):
    """Gradients of the first-order gradients, from a form in torch operations, which can be differentiated on and on.

    ``ctx.formula`` maps the arguments behind the three gradients to the op's outputs; ``ctx.wanted`` are the places
    among them of what the directions belong to.
    """
    inputs = list(ctx.saved_tensors)
    outer = torch.is_grad_enabled()
    differentiable = [i for i, x in enumerate(inputs) if x is not None and x.is_floating_point()]
    with torch.enable_grad():
        # nodes of their own: grad_o may itself depend on q, and that path is not ours to follow
        nodes = list(inputs)
        for i in differentiable:
            x = inputs[i]
            nodes[i] = x.view_as(x) if outer and x.requires_grad else x.detach().requires_grad_()
        grads, variables = nodes[:3], nodes[3:]
        outputs = ctx.formula(*variables)
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        wanted = [variables[i] for i in ctx.wanted]
        used = [i for i, x in enumerate(wanted) if x is not None and directions[i] is not None]
        if not pairs or not used:
            return (None,) * len(ctx.needs_input_grad)
        first = torch.autograd.grad(
            [o for o, _ in pairs],
            [wanted[i] for i in used],
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
        ends = [(x, directions[i]) for x, i in zip(first, used, strict=True) if x is not None and x.requires_grad]
        if not ends:
            return (None,) * len(ctx.needs_input_grad)
        targets = [i for i in differentiable if ctx.needs_input_grad[i]]
        second = torch.autograd.grad(
            [x for x, _ in ends],
            [nodes[i] for i in targets],
            [d.to(x.dtype) for x, d in ends],
            create_graph=outer,
            allow_unused=True,
        )
    out: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, x in zip(targets, second, strict=True):
        out[i] = x
    return tuple(out)


register_derivatives("linear_attention_backward", _second_backward, setup_context=_setup_second)
register_derivatives("feature_map_attention_backward", _second_backward, setup_context=_setup_second_features)
