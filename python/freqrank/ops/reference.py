"""Plain float64 torch twins of every op: slow, short, independent of the native code. The tests' oracle."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

# --- transforms ---------------------------------------------------------------------------------------------------


def _cosines(k: Tensor, n: Tensor, period: int) -> Tensor:
    """cos(2 pi k n / period) for every pair, the product reduced as an integer."""
    turns = (k[:, None] * n[None, :]) % period
    return torch.cos(2 * torch.pi * turns.double() / period)


def dct_matrix(type: int, n: int, norm: str | None = None, orthogonalize: bool | None = None) -> Tensor:
    """The n x n matrix that :func:`scipy.fft.dct` of this type multiplies a column with."""
    if orthogonalize is None:
        orthogonalize = norm == "ortho"
    i = torch.arange(n)
    if type == 1:
        matrix = 2 * _cosines(i, i, 2 * (n - 1))
        ends = torch.ones(n, dtype=torch.float64)
        ends[0] = ends[-1] = 0.5
        matrix = ends.sqrt()[:, None] * matrix * ends.sqrt() if orthogonalize else matrix * ends
    elif type == 2:
        matrix = 2 * _cosines(i, 2 * i + 1, 4 * n)
        if orthogonalize:
            matrix[0] /= 2**0.5
    elif type == 3:
        matrix = 2 * _cosines(2 * i + 1, i, 4 * n)
        matrix[:, 0] /= 2**0.5 if orthogonalize else 2
    else:
        matrix = 2 * _cosines(2 * i + 1, 2 * i + 1, 8 * n)
    period = 2 * (n - 1 if type == 1 else n)
    return matrix / {None: 1, "backward": 1, "ortho": period**0.5, "forward": period}[norm]


def _dct(
    x: Tensor, type: int, s: list[int], dims: list[int], norm: str | None, orthogonalize: bool | None, inverse: bool
) -> Tensor:
    x = x.double()
    if inverse:
        orthogonalize = norm == "ortho" if orthogonalize is None else orthogonalize
        type = {1: 1, 2: 3, 3: 2, 4: 4}[type]
        norm = {None: "forward", "backward": "forward", "ortho": "ortho", "forward": "backward"}[norm]
    for n, dim in zip(s, dims, strict=True):
        row = x.movedim(dim, -1)
        row = torch.nn.functional.pad(row, (0, n - row.shape[-1]))
        x = (row @ dct_matrix(type, n, norm, orthogonalize).T).movedim(-1, dim)
    return x


def dct(
    x: Tensor,
    type: int = 2,
    n: int | None = None,
    dim: int = -1,
    norm: str | None = None,
    *,
    orthogonalize: bool | None = None,
) -> Tensor:
    """:func:`freqrank.dct` by the dense matrix."""
    return _dct(x, type, [x.shape[dim] if n is None else n], [dim], norm, orthogonalize, False)


def idct(
    x: Tensor,
    type: int = 2,
    n: int | None = None,
    dim: int = -1,
    norm: str | None = None,
    *,
    orthogonalize: bool | None = None,
) -> Tensor:
    """:func:`freqrank.idct` by the dense matrix."""
    return _dct(x, type, [x.shape[dim] if n is None else n], [dim], norm, orthogonalize, True)


def _shape(x: Tensor, s: object, dim: object) -> tuple[list[int], list[int]]:
    lengths = [s] if isinstance(s, int) else s
    dims = [dim] if isinstance(dim, int) else dim
    if dims is None:
        dims = range(x.dim()) if lengths is None else range(x.dim() - len(lengths), x.dim())  # type: ignore[arg-type]
    dims = list(dims)  # type: ignore[call-overload]
    sizes = [x.shape[d] for d in dims]
    if lengths is None:
        return sizes, dims
    return [size if n == -1 else n for n, size in zip(lengths, sizes, strict=True)], dims  # type: ignore[call-overload]


def dctn(
    x: Tensor,
    type: int = 2,
    s: object = None,
    dim: object = None,
    norm: str | None = None,
    *,
    orthogonalize: bool | None = None,
) -> Tensor:
    """:func:`freqrank.dctn` by dense matrices."""
    return _dct(x, type, *_shape(x, s, dim), norm, orthogonalize, False)


def idctn(
    x: Tensor,
    type: int = 2,
    s: object = None,
    dim: object = None,
    norm: str | None = None,
    *,
    orthogonalize: bool | None = None,
) -> Tensor:
    """:func:`freqrank.idctn` by dense matrices."""
    return _dct(x, type, *_shape(x, s, dim), norm, orthogonalize, True)


# --- attention ----------------------------------------------------------------------------------------------------


def _decay_by_token(log_decay: Tensor | None, q: Tensor, mask: Tensor | None) -> Tensor | None:
    """log_decay as float64 [B, T, heads], 0 where masked; below -800, where exp() is 0, it makes no difference."""
    if log_decay is None:
        return None
    g = log_decay.double().clamp(min=-800).expand(*q.shape[:2], log_decay.shape[-1])
    return g if mask is None else torch.where(mask[..., None], g, 0)


def _per_query_head(x: Tensor, heads: int, dim: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[dim], dim)


def _split(cu_seqlens: Tensor | None, batch: int, time: int) -> list[tuple[int, int, int]]:
    if cu_seqlens is None:
        return [(b, 0, time) for b in range(batch)]
    offsets = cu_seqlens.tolist()
    return [(0, begin, end) for begin, end in itertools.pairwise(offsets)]


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None = None, scale: float | None = None,
    normalize: bool = False, eps: float = 1e-6, mask: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor | None] | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, kv, z) of linear attention in the quadratic form: every pair of tokens of a sequence, head by head."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads, key_heads = q.shape[2], k.shape[2]
    g = _decay_by_token(log_decay, q, mask)
    state_heads = key_heads if g is None else g.shape[-1]
    q, k, v = (x.double() if mask is None else torch.where(mask[..., None, None], x.double(), 0) for x in (q, k, v))
    parts, kv, z = [], [], []
    for n, (b, begin, end) in enumerate(_split(cu_seqlens, q.shape[0], q.shape[1])):
        rows, kv_rows, z_rows = [], [], []
        length = end - begin
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        for h in range(heads):
            j, s = h * key_heads // heads, h * state_heads // heads
            qh, kh, vh = q[b, begin:end, h], k[b, begin:end, j], v[b, begin:end, j]
            total = torch.zeros(length, dtype=torch.float64) if g is None else g[b, begin:end, s].cumsum(0)
            weight = scale * (qh @ kh.mT) * (total[:, None] - total).masked_fill(later, -torch.inf).exp()
            numerator, denominator = weight @ vh, weight.sum(1)
            after = (total[-1:] - total).exp() if length else total
            kv_end, z_end = (kh * after[:, None]).mT @ vh, (kh * after[:, None]).sum(0)
            whole = total[-1].exp() if length else 1.0
            if initial_state is not None:
                before = qh * (scale * total.exp())[:, None]
                numerator = numerator + before @ initial_state[0][n, s].double()
                kv_end = kv_end + whole * initial_state[0][n, s].double()
                if initial_state[1] is not None:
                    denominator = denominator + before @ initial_state[1][n, s].double()
                    z_end = z_end + whole * initial_state[1][n, s].double()
            rows.append(numerator / (denominator + eps)[:, None] if normalize else numerator)
            if h == next(i for i in range(heads) if i * state_heads // heads == s):
                kv_rows.append(kv_end)
                z_rows.append(z_end)
        out = torch.stack(rows, 1)
        if mask is not None:
            out = torch.where(mask[b, begin:end, None, None], out, 0)
        parts.append(out)
        kv.append(torch.stack(kv_rows))
        z.append(torch.stack(z_rows))
    shape = (0, state_heads, q.shape[3], v.shape[3])
    if not parts:
        o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    else:
        o = torch.stack(parts) if cu_seqlens is None else torch.cat(parts)[None]
    return o, torch.stack(kv) if kv else torch.zeros(shape), torch.stack(z) if z else torch.zeros(shape[:-1])


def linear_attention_recurrent(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None = None, scale: float | None = None,
    normalize: bool = False, eps: float = 1e-6, mask: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor | None] | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, kv, z) of linear attention as its definition reads, token by token; O(T), not meant for gradients."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = q.shape[2]
    state_heads = k.shape[2] if log_decay is None else log_decay.shape[-1]
    o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    kvs, zs = [], []
    for n, (b, begin, end) in enumerate(_split(cu_seqlens, q.shape[0], q.shape[1])):
        kv = torch.zeros(state_heads, q.shape[3], v.shape[3], dtype=torch.float64)
        z = torch.zeros(state_heads, q.shape[3], dtype=torch.float64)
        if initial_state is not None:
            kv = initial_state[0][n].double()
            z = z if initial_state[1] is None else initial_state[1][n].double()
        for t in range(begin, end):
            if mask is not None and not mask[b, t]:
                continue
            if log_decay is not None:
                factor = (log_decay if log_decay.dim() == 1 else log_decay[b, t]).double().exp()
                kv, z = factor[:, None, None] * kv, factor[:, None] * z
            key, value = (_per_query_head(x[b, t].double(), state_heads, 0) for x in (k, v))
            kv, z = kv + key[:, :, None] * value[:, None, :], z + key
            query = scale * q[b, t].double()
            o[b, t] = torch.einsum("hk,hkv->hv", query, _per_query_head(kv, heads, 0))
            if normalize:
                o[b, t] /= ((query * _per_query_head(z, heads, 0)).sum(-1) + eps)[:, None]
        kvs.append(kv)
        zs.append(z)
    shape = (0, state_heads, q.shape[3], v.shape[3])
    return o, torch.stack(kvs) if kvs else torch.zeros(shape), torch.stack(zs) if zs else torch.zeros(shape[:-1])


def feature_map(
    x: Tensor, key_heads: int, projection: Tensor, feature: str = "softmax", weights: Tensor | None = None
) -> Tensor:
    """phi(x) for x [B, T, H, K], head by head."""
    out = []
    for h in range(x.shape[2]):
        j = h * key_heads // x.shape[2]
        p = x[:, :, h].double() @ (projection if projection.dim() == 2 else projection[j]).double()
        if feature == "exp":
            phi = p.exp()
        else:
            p = torch.cat([p, -p], -1) if feature == "softmax_pm" else p
            e = (p - p.amax(-1, keepdim=True)).exp()
            phi = e / e.sum(-1, keepdim=True)
        if weights is not None:
            phi = phi * (weights if weights.dim() == 1 else weights[j]).double()
        out.append(phi)
    return torch.stack(out, 2)


def feature_map_attention(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, *, feature: str = "softmax", weights: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, kv, z) of the quadratic form over float64 features, with scale 1."""
    if options.get("mask") is not None:
        q, k = (torch.where(options["mask"][..., None, None], x, 0) for x in (q, k))
    phi_q, phi_k = (feature_map(x, k.shape[2], projection, feature, weights) for x in (q, k))
    return linear_attention(phi_q, phi_k, v, scale=1.0, **options)


def dijiang_projection(scales: Tensor, *, transform: str = "idct", signs: Tensor | None = None) -> Tensor:
    """diag(signs) C diag(scales) (C^T for "dct") from the definition of the orthonormal DCT-II matrix C."""
    n = scales.shape[-1]
    rows = [
        [(1 / n if i == 0 else 2 / n) ** 0.5 * math.cos(math.pi * (2 * j + 1) * i / (2 * n)) for j in range(n)]
        for i in range(n)
    ]
    matrix = torch.tensor(rows, dtype=torch.float64)
    matrix = matrix if transform == "idct" else matrix.mT
    if signs is not None:
        matrix = torch.diag(signs.double()) @ matrix
    return matrix * scales.double().unsqueeze(-2)


def dijiang_attention(
    q: Tensor, k: Tensor, v: Tensor, scales: Tensor, *, transform: str = "idct", signs: Tensor | None = None, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, kv, z) of :func:`feature_map_attention` with DiJiang's projection."""
    projection = dijiang_projection(scales, transform=transform, signs=signs)
    return feature_map_attention(q, k, v, projection, **options)


# --- linalg -------------------------------------------------------------------------------------------------------


def gram(x: Tensor, y: Tensor | None = None, *, weight: Tensor | None = None) -> Tensor:
    """X^T diag(weight) Y, a float64 copy at a time."""
    y = x if y is None else y
    scaled = x.double() if weight is None else x.double() * weight.double().unsqueeze(-1)
    return scaled.mT @ y.double()


def cholesky_ex(A: Tensor, *, upper: bool = False) -> tuple[Tensor, Tensor]:
    """Cholesky column by column; (L, info). Columns from the failing one on are NaN."""
    A = A.double()
    lower = A.triu().mT if upper else A.tril()
    n = A.shape[-1]
    L = torch.zeros_like(lower)
    info = torch.zeros(A.shape[:-2], dtype=torch.int32)
    for j in range(n):
        column = lower[..., j] - (L @ L[..., j, :].unsqueeze(-1)).squeeze(-1)
        pivot = column[..., j]
        info = torch.where((info == 0) & ~(pivot > 0), j + 1, info).to(torch.int32)
        column = column / pivot.clamp(min=0).sqrt().unsqueeze(-1)
        column = torch.where((info == 0).unsqueeze(-1), column, float("nan"))
        L[..., j] = torch.where(torch.arange(n) >= j, column, 0.0)
    return (L.mT if upper else L), info


def solve_triangular(A: Tensor, B: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Tensor:
    """Substitution, one unknown at a time."""
    if not left:
        return solve_triangular(A.mT, B.mT, upper=not upper, unitriangular=unitriangular).mT
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    A, B = A.double(), B.double().expand(*batch, *B.shape[-2:])
    n = A.shape[-1]
    rows: dict[int, Tensor] = {}
    for i in reversed(range(n)) if upper else range(n):
        row = B[..., i, :]
        for k, known in rows.items():
            row = row - A[..., i, k, None] * known
        rows[i] = row if unitriangular else row / A[..., i, i, None]
    return torch.stack([rows[i] for i in range(n)], dim=-2) if n else B


def logdet(L: Tensor) -> Tensor:
    """The log-determinant of L L^T, from the determinant of L."""
    return 2 * torch.linalg.slogdet(L.double()).logabsdet


def whiten(gram: Tensor, *, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(factor, damping, info) by :func:`cholesky_ex` on more and more damped copies."""
    G = gram.double() * torch.as_tensor(scale, dtype=torch.float64)[..., None, None]
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    diagonal = torch.where(diagonal == 0, diagonal.mean(-1, keepdim=True), diagonal)
    factor = torch.full_like(G, float("nan")).triu()
    damping = torch.zeros(G.shape[:-2], dtype=torch.float64)
    info = torch.ones(G.shape[:-2], dtype=torch.int32)
    for level in (0.0, *(10.0**-k for k in range(12, 5, -1))):
        candidate, failed = cholesky_ex(G + level * torch.diag_embed(diagonal), upper=True)
        damping = torch.where(info > 0, level, damping)
        factor = torch.where(((info > 0) & (failed == 0))[..., None, None], candidate, factor)
        info = torch.where(info > 0, failed, info)
    return factor, damping, info
