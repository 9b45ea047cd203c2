"""A long sequence over several ranks: each scans its own piece, and the states of the pieces are passed on.

A piece that starts from a zero state ends with S_r, and multiplies what came before it by exp(G_r), G_r the sum of its
log decays. Behind rank r - 1 the state of the whole sequence therefore is sum_{p < r} exp(sum_{p < u < r} G_u) S_p. One
gather brings every S_p and G_p to every rank. Only sums of log decays, never positive, are exponentiated.

A rank scans its piece twice, for S_r and, from the state before it, for its outputs. Scanning once and adding
exp(..) phi(q) times that state would take less arithmetic unless several queries share a key, but features of the
queries would go through memory, a 16-bit output would be rounded twice, and one divided by its normalizer would have to
be multiplied by it again. The first scan has one query a state, of zeros that are nowhere in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from freqrank._distributed import Ranks, gathered, ranks
from freqrank.ops import LinearAttentionState, feature_map_attention, linear_attention
from freqrank.ops.attention import MAX_DIM, _check_dim, _check_map, _check_numbers, _check_options, _check_qkv, _real

__all__ = [
    "current_group",
    "feature_map_attention_parallel",
    "linear_attention_parallel",
    "next_token_labels",
    "piece_of",
    "positions_of",
    "scan_piece",
    "sequence_parallel",
]

_Result = tuple[Tensor, LinearAttentionState | None]


def linear_attention_parallel(
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
    group: dist.ProcessGroup | None = None,
) -> _Result:
    """:func:`freqrank.linear_attention` of a sequence of which each rank of a process group holds a contiguous piece.

    Collective: every rank calls it. Where gradients are recorded, every rank runs the backward pass too.

    Args:
        q: [B, T_r, H, K]; k: [B, T_r, Hk, K]; v: [B, T_r, Hk, V]: this rank's piece, pieces being in the order of
            ranks. T_r may differ from rank to rank and be 0; all else is the same on all ranks. Dtypes and limits are
            those of :func:`freqrank.linear_attention`.
        log_decay: None, [H] or [Hk], the same on every rank, or this piece's, [B, T_r, H] or [B, T_r, Hk].
        scale, normalize, eps: as in :func:`freqrank.linear_attention`.
        mask: bool [B, T_r], of this piece.
        initial_state: before the first token of the sequence: that of the first rank counts, what others pass is only
            checked. So the final state of one call is the initial state of the next on every rank.
        output_final_state: return the state after the last token of the sequence.
        group: a process group that serves the device of q; None: that of all ranks.

    Returns:
        ``(o, final_state)``: this rank's piece of o, [B, T_r, H, V] in the dtype of v; the same state on every rank, or
        None.

    Raises:
        TypeError, ValueError: as :func:`freqrank.linear_attention`, on every rank if on one, and naming the first where
            it is; shapes, dtypes or options that differ between ranks; no process group, or one without this process.

    Gradients are those of the sum of what all ranks differentiate. For q, k, v, a log_decay of tokens and the initial
    state (on the first rank) they are this piece's part of the gradients of the whole sequence. For a log_decay of
    heads they are this piece's summands: add them up over the ranks, as data-parallel training does for parameters.

    What moves between ranks is one state of each, float32 (float64 for float64), whatever the length, and in backward
    its gradient. Eager mode only.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> o, _ = linear_attention_parallel(*torch.ones(3, 1, 2, 1, 4))
    >>> dist.destroy_process_group()
    >>> o[0, :, 0, 0].tolist()
    [2.0, 4.0]
    """

    def check() -> tuple[Any, ...]:
        qkv = _check_qkv(q, k, v, "B,T,H,D")
        _check_dim("K, the last dimension of q,", q.shape[-1], MAX_DIM)
        _check_dim("V, the last dimension of v,", v.shape[-1], MAX_DIM)
        _check_numbers(scale, eps)
        return *qkv, q.shape[-1], (), ("linear_attention_parallel", None, scale)

    def scan(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> _Result:
        return linear_attention(q, k, v, scale=scale, eps=eps, **options)

    return _parallel(check, scan, log_decay, normalize, eps, mask, initial_state, output_final_state, group)


def feature_map_attention_parallel(
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
    group: dist.ProcessGroup | None = None,
) -> _Result:
    """:func:`freqrank.feature_map_attention` of a sequence of which each rank holds a contiguous piece.

    Args:
        q, k, v, log_decay, normalize, eps, mask, initial_state, output_final_state, group: as in
            :func:`linear_attention_parallel`.
        projection, feature, weights: as in :func:`freqrank.feature_map_attention`, the same on every rank.

    Returns:
        ``(o, final_state)`` as :func:`linear_attention_parallel`.

    Raises:
        TypeError, ValueError: as :func:`linear_attention_parallel`, and for projection, feature and weights.

    Gradients as in :func:`linear_attention_parallel`; those of projection and weights are this piece's summands.

    >>> q, v = torch.randn(1, 5, 2, 4), torch.ones(1, 5, 2, 3)
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> o, _ = feature_map_attention_parallel(q, q, v, torch.eye(4), normalize=True, eps=0.0)
    >>> dist.destroy_process_group()
    >>> torch.allclose(o, v)
    True
    """

    def check() -> tuple[Any, ...]:
        checked = _check_qkv(q, k, v, "B,T,H,D")
        _check_dim("K, the last dimension of q,", q.shape[-1], MAX_DIM)
        _check_dim("V, the last dimension of v,", v.shape[-1], MAX_DIM)
        _check_numbers(None, eps)
        *maps, features = _check_map(q, k, projection, feature, weights)
        return *checked, features, maps, ("feature_map_attention_parallel", feature, None)

    def scan(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> _Result:
        return feature_map_attention(q, k, v, projection, feature=feature, weights=weights, eps=eps, **options)

    return _parallel(check, scan, log_decay, normalize, eps, mask, initial_state, output_final_state, group)


def _parallel(
    check: Callable[[], tuple[Any, ...]],
    scan: Callable[..., _Result],
    log_decay: Tensor | None,
    normalize: bool,
    eps: float,
    mask: Tensor | None,
    initial_state: LinearAttentionState | None,
    output_final_state: bool,
    group: dist.ProcessGroup | None,
) -> _Result:
    """The scan of a whole sequence.

    ``check`` gives q, k and v, the number of features of a key, tensors of the feature map, and (op, feature, scale).
    """
    among = ranks(group)
    error: TypeError | ValueError | None = None
    same: dict[str, Any] = {}
    told = [0, 0, 0]
    try:
        q, k, v, features, maps, (op, feature, scale) = check()
        decay, mask, _, kv, z = _check_options(q, k, v, features, log_decay, normalize, mask, initial_state, None)
        of_decay = "None" if decay is None else f"{'[B,T,' if decay.dim() == 3 else '['}{decay.shape[-1]}]"
        same = {
            "the op": op, "B": q.shape[0], "H, the heads of q,": q.shape[2], "Hk, the heads of k,": k.shape[2],
            "K, the last dimension of q,": q.shape[3], "V, the last dimension of v,": v.shape[3],
            "the dtype of q": q.dtype, "the shape of log_decay": of_decay, "the number of features": features,
            "feature": feature, "scale": scale, "normalize": bool(normalize), "eps": float(eps),
            "whether gradients are recorded": torch.is_grad_enabled(),
        }  # fmt: skip
        wanting = [x for x in (k, v, decay, kv, z, *maps) if x is not None and x.requires_grad]
        told = [kv is not None, z is not None, torch.is_grad_enabled() and bool(wanting)]
    except (TypeError, ValueError) as wrong:
        error = wrong
    everywhere = among.agree(same, told, error)
    options = {"log_decay": log_decay, "mask": mask}
    if among.size == 1:
        return scan(
            q, k, v, normalize=normalize, initial_state=initial_state, output_final_state=output_final_state, **options
        )

    # The state of this piece, the first one's with all that was before it. z is carried without `normalize` too, which
    # would divide by zeros here.
    with_z = normalize or bool(everywhere[0][1])
    heads = k.shape[2] if decay is None else decay.shape[-1]
    zeros = q.new_zeros((q.shape[0], heads, features, v.shape[3]), dtype=_real(q.dtype))
    start = LinearAttentionState(zeros, zeros[..., 0] if with_z else None)
    if among.first and kv is not None:
        start = LinearAttentionState(kv, z)
    nothing = q.new_zeros(()).expand(q.shape[0], q.shape[1], heads, q.shape[3])
    _, own = scan(nothing, k, v, normalize=False, initial_state=start, output_final_state=True, **options)
    assert own is not None
    state, total = _one_tensor(own), _total(decay, mask, q)

    packed = torch.cat([state.flatten(), total.flatten()])
    packed = gathered(packed, among, any(wants for _, _, wants in everywhere))
    flat_states, flat_totals = packed.split([state.numel(), total.numel()], 1)
    states, totals = flat_states.unflatten(1, state.shape), flat_totals.unflatten(1, total.shape)
    before = _behind(states[: among.rank], totals[: among.rank])
    if among.first:
        before = before + _one_tensor(start)
    o, _ = scan(q, k, v, normalize=normalize, initial_state=_state(before, with_z), output_final_state=False, **options)
    return o, _state(_behind(states, totals), with_z) if output_final_state else None


def _behind(states: Tensor, totals: Tensor) -> Tensor:
    """The state behind pieces that end with ``states`` [R, B, Hs, ..], each from zeros, over the decays of each."""
    # zeros of the graph: the first rank, which has no piece before it, takes part in the backward pass too
    state = states[:0].sum(0)
    for x, g in zip(states, totals, strict=True):
        state = state * g.exp()[..., None, None] + x
    return state


def _one_tensor(state: LinearAttentionState) -> Tensor:
    """kv [.., V], with z as one more column if there is one."""
    return state.kv if state.z is None else torch.cat([state.kv, state.z[..., None]], -1)


def _state(x: Tensor, with_z: bool) -> LinearAttentionState:
    return LinearAttentionState(x[..., :-1], x[..., -1]) if with_z else LinearAttentionState(x)


def _total(log_decay: Tensor | None, mask: Tensor | None, q: Tensor) -> Tensor:
    """The sum of log decays over the tokens of this piece that count: [B, Hs], or [1, 1] of zeros without decay."""
    if log_decay is None:
        return q.new_zeros((1, 1), dtype=_real(q.dtype))
    g = log_decay.double()
    if g.dim() == 1:
        batch, time = q.shape[:2]
        count = q.new_full((batch,), time, dtype=torch.float64) if mask is None else mask.sum(1).double()
        # no token forgets nothing, also where one would forget everything, by -inf
        total = torch.where(count[:, None] > 0, count[:, None] * g, 0)
    else:
        total = (g if mask is None else torch.where(mask[..., None], g, 0)).sum(1)
    return total.to(log_decay.dtype)


# --- whole models -----------------------------------------------------------------------------------------------------

# Of the process, not of a thread: backward passes on a GPU, which may run a layer again, have threads of their own.
_groups: list[dist.ProcessGroup] = []


@contextmanager
def sequence_parallel(group: dist.ProcessGroup | None = None) -> Iterator[dist.ProcessGroup]:
    """Inside, linear-attention layers take what they get for this rank's piece of a long sequence.

    Every rank has the whole model and its own tokens (:func:`piece_of`), and calls it with positions from
    :func:`positions_of`, without a cache. Everything else in a decoder works on one token at a time; layers that are
    still softmax would see this rank's piece alone, so all must be linear. The loss of a rank is the sum over its
    tokens of the cross-entropy with :func:`next_token_labels`; over all ranks these add up to that of the whole
    sequence, and so do the gradients of the parameters. The backward pass, on every rank, runs inside too if
    activations are checkpointed, since layers then run again.

    Args:
        group: as in :func:`linear_attention_parallel`.

    Yields:
        The group, that of all ranks for None.

    Raises:
        ValueError: no process group, or one without this process.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> with sequence_parallel() as group:
    ...     current_group() is group
    True
    >>> current_group() is None
    True
    >>> dist.destroy_process_group()
    """
    ranks(group)
    _groups.append(dist.group.WORLD if group is None else group)  # type: ignore[arg-type]  # it is there
    try:
        yield _groups[-1]
    finally:
        _groups.pop()


def current_group() -> dist.ProcessGroup | None:
    """The group of the innermost :func:`sequence_parallel`, None outside of any."""
    return _groups[-1] if _groups else None


def scan_piece(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, *, cu_seqlens: Tensor | None = None, **options: Any
) -> _Result:
    """:func:`freqrank.feature_map_attention`, or inside of :func:`sequence_parallel` its twin for a piece.

    Raises:
        ValueError: ``cu_seqlens`` inside of :func:`sequence_parallel`: a sequence over several ranks is not packed.

    >>> q = torch.randn(1, 5, 2, 4)
    >>> torch.equal(scan_piece(q, q, q, torch.eye(4))[0], feature_map_attention(q, q, q, torch.eye(4))[0])
    True
    """
    group = current_group()
    if group is None:
        return feature_map_attention(q, k, v, projection, cu_seqlens=cu_seqlens, **options)
    if cu_seqlens is not None:
        raise ValueError(
            "cu_seqlens must be None inside of sequence_parallel, where each row is one sequence over several ranks; "
            "run packed sequences on one rank"
        )
    return feature_map_attention_parallel(q, k, v, projection, group=group, **options)


def piece_of(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's piece of what every rank has whole, cut along time into pieces that differ by one token at most.

    Args:
        x: [B, T, ..].

    Returns:
        A view [B, T_r, ..].

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> piece_of(torch.arange(3)[None])
    tensor([[0, 1, 2]])
    >>> dist.destroy_process_group()
    """
    among = ranks(group)
    return x.tensor_split(among.size, 1)[among.rank]


def positions_of(input_ids: Tensor, mask: Tensor | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """Positions in the whole sequence of the tokens of this rank's piece, padding not counted. Collective.

    Args:
        input_ids: int64 [B, T_r].
        mask: bool [B, T_r], of this piece: which tokens count.

    Returns:
        int64 [B, T_r], to be given as ``position_ids`` to a linearised model.

    Raises:
        TypeError, ValueError: ids or a mask of another dtype or shape, batches of unlike sizes; on every rank.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> positions_of(torch.tensor([[5, 6, 7]]))
    tensor([[0, 1, 2]])
    >>> dist.destroy_process_group()
    """
    among = ranks(group)
    _check_tokens(input_ids, mask, among)
    counts = (torch.ones_like(input_ids) if mask is None else mask.long()).cumsum(1)
    total = counts[:, -1] if counts.shape[1] else counts.new_zeros(counts.shape[0])
    before = among.gather(total)[: among.rank].sum(0)
    return (before[:, None] + counts - 1).clamp(min=0)


def next_token_labels(
    input_ids: Tensor, mask: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, int]:
    """What each token of this rank's piece is to predict: the next one, at the end the first of the next rank's piece.

    Collective. Labels are shifted already: ``cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")``,
    whose -100 is what ``torch.nn.functional.cross_entropy`` ignores.

    Args:
        input_ids: int64 [B, T_r].
        mask: bool [B, T_r], of this piece: where False, no target.

    Returns:
        ``(labels, count)``: int64 [B, T_r], -100 where there is no target, as at the end of the sequence; and how many
        targets all ranks have, which makes a mean of the sum.

    Raises:
        TypeError, ValueError: ids or a mask of another dtype or shape, batches of unlike sizes; on every rank.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> next_token_labels(torch.tensor([[5, 6, 7]]))
    (tensor([[   6,    7, -100]]), 2)
    >>> dist.destroy_process_group()
    """
    among = ranks(group)
    lengths = _check_tokens(input_ids, mask, among)
    targets = input_ids if mask is None else input_ids.masked_fill(~mask, -100)
    nothing = targets.new_full((targets.shape[0], 1), -100)
    firsts = among.gather(targets[:, :1] if targets.shape[1] else nothing)
    following = next((rank for rank in range(among.rank + 1, among.size) if lengths[rank]), None)
    labels = torch.cat([targets[:, 1:], nothing if following is None else firsts[following]], 1)[:, : targets.shape[1]]
    (count,) = among.totals(int((labels != -100).sum()))
    return labels, int(count)


def _check_tokens(input_ids: Tensor, mask: Tensor | None, among: Ranks) -> list[int]:
    """The lengths of all pieces; raises on all ranks what is wrong on one."""
    with among.together():
        if input_ids.dtype != torch.int64:
            raise TypeError(f"input_ids must have dtype int64; got {input_ids.dtype}")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [B, T]; got shape {tuple(input_ids.shape)}")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask must have dtype bool; got {mask.dtype}")
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(f"mask must be [B, T] = {list(input_ids.shape)}; got shape {tuple(mask.shape)}")
    return [length for (length,) in among.agree({"B": input_ids.shape[0]}, [input_ids.shape[1]])]
