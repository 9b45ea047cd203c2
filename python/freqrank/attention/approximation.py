"""How well a feature map stands for softmax attention, on given queries and keys."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from freqrank.attention.feature_maps import FeatureMap

# Scores of one piece of queries stay below this many elements.
_SCORES = 1 << 24


@dataclass(frozen=True)
class KernelError:
    """What :func:`kernel_error` found, averaged over sequences, heads and queries; 0 is perfect, but for the last two.

    Attributes:
        kernel: relative root-mean-square error of phi(q) . phi(k) against exp(scale q . k), each head's estimate
            multiplied by the factor that suits it best (what a normaliser takes out).
        total_variation: half the sum of |softmax row - normalised kernel row|, between 0 and 1; a row is what one query
            gives to the keys that it sees.
        uniform: the same of rows that give every key the same: what a map is worth nothing without beating.
        output: relative error of the normalised kernel's outputs against softmax attention's; NaN without values.
        slope: of log(phi(q) . phi(k)) regressed on scale q . k, query by query: 1 where the map's temperature is right.
        correlation: of the same two.
    """

    kernel: float
    total_variation: float
    uniform: float
    output: float
    slope: float
    correlation: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def kernel_error(
    feature_map: FeatureMap | str,
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    num_frequencies: int | None = None,
    temperature: float | str | None = None,
    seed: int = 0,
) -> KernelError:
    """Compare the kernel of a feature map with softmax attention's exp(scale q . k), quadratically and in float64.

    Args:
        feature_map: a :class:`FeatureMap`, or the name of one to draw with ``num_frequencies``, ``temperature`` and
            ``seed``.
        q, k, v: [B, T, H, D], [B, T, Hk, D] and [B, T, Hk, V] or None, as the pretrained attention has them: rotated,
            not scaled. A model's own: :func:`freqrank.models.heads.attention_heads`.
        scale: of the pretrained logits, by default D**-0.5.
        causal: a query sees the keys up to its own; otherwise all.

    Returns:
        a :class:`KernelError`.

    Raises:
        TypeError, ValueError: what are no such tensors; an unknown map.

    >>> q = torch.randn(1, 32, 2, 8, generator=torch.Generator().manual_seed(0))
    >>> error = kernel_error("prf", q, q, num_frequencies=256, temperature="pretrained")
    >>> 0 < error.total_variation < error.uniform < 1
    True
    """
    for name, x in ({"q": q, "k": k} | ({} if v is None else {"v": v})).items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor; got {getattr(x, 'dtype', type(x).__name__)}")
    if q.dim() != 4 or k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3] or q.numel() == 0:
        raise ValueError(f"q must be [B, T, H, D] and k [B, T, Hk, D]; got {tuple(q.shape)} and {tuple(k.shape)}")
    batch, length, heads, dim = q.shape
    key_heads = k.shape[2]
    if heads % key_heads or (v is not None and v.shape[:3] != k.shape[:3]):
        what = f"{heads} and {key_heads} heads" if heads % key_heads else f"v {tuple(v.shape)}"  # type: ignore[union-attr]
        raise ValueError(f"H must be a multiple of Hk, and v must be [B, T, Hk, V]; got {what}")
    if isinstance(feature_map, str):
        feature_map = FeatureMap(
            dim, feature_map, num_frequencies=num_frequencies, num_heads=key_heads, temperature=temperature
        ).to(q.device)
        feature_map.reset_parameters(torch.Generator().manual_seed(seed))
    group = heads // key_heads
    scale = dim**-0.5 if scale is None else scale

    def by_head(x: Tensor, repeat: int) -> Tensor:
        return x.double().movedim(1, 2).repeat_interleave(repeat, 1)

    def features(x: Tensor, repeat: int) -> Tensor:  # a learned map has a matrix for each key head
        x = x.double().unflatten(2, (key_heads, -1)).movedim(3, 2)
        return by_head(feature_map.features(x).movedim(2, 3).flatten(2, 3), repeat)

    queries, keys = by_head(q, 1), by_head(k, group)
    phi_q, phi_k = features(q, 1), features(k, group)
    values = None if v is None else by_head(v, group)
    sums = {name: torch.zeros(batch, heads, dtype=torch.float64, device=q.device) for name in ("kk", "ee", "ke")}
    variation = uniform = output = norm = slope = correlation = 0.0
    counted = 0
    step = max(1, _SCORES // (batch * heads * length))
    pieces = [slice(start, min(start + step, length)) for start in range(0, length, step)]
    top = torch.stack([(queries[:, :, rows] @ keys.mT).mul(scale).amax((-2, -1)) for rows in pieces]).amax(0)
    for rows in pieces:
        logits = queries[:, :, rows] @ keys.mT * scale
        estimate = phi_q[:, :, rows] @ phi_k.mT
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device)
        seen = seen.tril(rows.start) if causal else seen
        exact = (logits - top[..., None, None]).exp() * seen
        estimate = estimate * seen
        sums["kk"] += exact.square().sum((-2, -1))
        sums["ee"] += estimate.square().sum((-2, -1))
        sums["ke"] += (exact * estimate).sum((-2, -1))
        p = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        e = estimate / estimate.sum(-1, keepdim=True)
        flat = seen.double() / seen.sum(-1, keepdim=True)
        variation += (p - e).abs().sum().item() / 2
        uniform += (p - flat).abs().sum().item() / 2
        if values is not None:
            target = p @ values
            output += (e @ values - target).square().sum().item()
            norm += target.square().sum().item()
        many = seen.sum(-1) > 2  # a line through fewer points says nothing
        if many.any():
            count = seen[many].sum(-1)
            x, y = logits[:, :, many], estimate[:, :, many].clamp_min(1e-300).log()
            x, y = ((z - (z * seen[many]).sum(-1, keepdim=True) / count[:, None]) * seen[many] for z in (x, y))
            xx, yy, xy = (x * x).sum(-1), (y * y).sum(-1), (x * y).sum(-1)
            slope += (xy / xx.clamp_min(1e-300)).sum().item()
            correlation += (xy / (xx * yy).sqrt().clamp_min(1e-300)).sum().item()
            counted += xx.numel()
    rows_total = batch * heads * length
    kernel = (1 - sums["ke"].square() / (sums["kk"] * sums["ee"]).clamp_min(1e-300)).clamp_min(0).sqrt().mean().item()
    return KernelError(
        kernel=kernel,
        total_variation=variation / rows_total,
        uniform=uniform / rows_total,
        output=(output / norm) ** 0.5 if values is not None else float("nan"),
        slope=slope / counted if counted else float("nan"),
        correlation=correlation / counted if counted else float("nan"),
    )
