"""Masks of a linearised model: linear layers get [B, T], and nothing of size T x T is built for them.

transformers builds one mask a forward pass, chosen by the name of the attention implementation: [B, 1, T, T] for
"sdpa" and a padded batch. A model whose layers are all linear gets the implementation "freqrank_linear", registered
here, whose mask is [B, T]. Where some layers are still softmax the base's mask stays, and linear layers read the
padding off it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from freqrank.attention.parallel import current_group

ALL_LINEAR = "freqrank_linear"


def attention_mask_2d(mask: Tensor | None, length: int, start: int | Tensor | None = None) -> Tensor | None:
    """Which of the newest ``length`` tokens are real, bool [B, length], from a mask of [B, >= T] or [B, 1, T, >= T].

    None, which says that all are, stays None. Of a four-dimensional mask the diagonal is read: a token that is not
    padding sees itself, whatever else a sliding window or a packed neighbour hides from it. ``start`` is how many
    tokens came before, a number or a tensor []; a mask of a static cache has columns for tokens that are still to come.

    Raises:
        ValueError: another number of dimensions, or fewer columns than tokens.

    >>> causal = torch.ones(3, 5).tril().bool()  # three tokens at the start of a cache with room for five
    >>> attention_mask_2d(causal[None, None], 3, start=0)
    tensor([[True, True, True]])
    """
    if mask is None:
        return None
    if mask.dim() not in (2, 4) or mask.shape[-1] < length or (mask.dim() == 4 and mask.shape[2] != length):
        raise ValueError(
            f"attention_mask must be [B, columns] or [B, 1, {length}, columns] with at least {length} columns; "
            f"got shape {tuple(mask.shape)}"
        )
    if mask.dim() == 2:
        return mask[:, -length:].bool()
    newest = mask.shape[-1] - length
    # a sliding window's cache has dropped the oldest columns
    if isinstance(start, Tensor):
        columns = torch.arange(length, device=mask.device) + start.clamp(max=newest)
        mask = mask[:, 0].gather(2, columns[None, :, None].expand(len(mask), -1, 1))[..., 0]
    else:
        mask = mask[:, 0].diagonal(newest if start is None else min(start, newest), dim1=-2, dim2=-1)
    return mask == 0 if mask.is_floating_point() else mask.bool()


def linear_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function of a model whose layers are all linear: bool [B, q_length], None where nothing is padded."""
    mask = attention_mask_2d(attention_mask, q_length)
    if mask is None or (not torch.compiler.is_compiling() and bool(mask.all())):
        return None
    return mask


AttentionMaskInterface.register(ALL_LINEAR, linear_mask)
# Linear layers never call it; what else a model may hold (a vision tower, say) goes on as before.
AttentionInterface.register(ALL_LINEAR, sdpa_attention_forward)


def positions_from_mask(mask: Tensor, length: int) -> Tensor:
    """Positions of the last ``length`` tokens among the real ones, int64 [B, length]; padding gets 0 or a neighbour's.

    >>> positions_from_mask(torch.tensor([[0, 0, 1, 1, 1]]), 5)
    tensor([[0, 0, 0, 1, 2]])
    """
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def packed_cu_seqlens(position_ids: Tensor) -> Tensor | None:
    """Boundaries of sequences packed into one row, int32 [N + 1], or None if ``position_ids`` only go up by one.

    >>> packed_cu_seqlens(torch.tensor([[0, 1, 2, 0, 1]]))
    tensor([0, 3, 5], dtype=torch.int32)
    """
    jumps = position_ids.diff(dim=-1) != 1
    if not bool(jumps.any()):
        return None
    if position_ids.shape[0] != 1:
        raise ValueError(
            "sequences packed by position_ids need a batch of one row in a linearised model; got "
            f"{position_ids.shape[0]} rows"
        )
    starts = jumps[0].nonzero()[:, 0] + 1
    ends = torch.tensor([0, position_ids.shape[1]], device=position_ids.device)
    return torch.cat([ends[:1], starts, ends[1:]]).int()


def _check_piece(decoder: Any, positions: Tensor | None, cache: Any) -> None:
    """Raise where a model would take a rank's piece of a sequence for a sequence of its own, and not say so."""
    wrong = None
    if decoder.config._attn_implementation != ALL_LINEAR:
        wrong = "its softmax layers would see this rank's piece alone: convert all layers"
    elif positions is None:
        wrong = "positions would begin anew on each rank: give position_ids, from positions_of"
    elif cache is not None:
        wrong = "a cache would count this rank's tokens alone: call it without one"
    if wrong is not None:
        raise ValueError(f"the model cannot run inside of sequence_parallel like this, {wrong}")


def _prepare_positions(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Before the decoder's forward: positions that skip padding, and the boundaries of packed sequences.

    softmax(x C T) of a rotated vector depends on its absolute position, so a left-padded row gives the same as the
    row alone only if padding is not counted, also where the caller gives no ``position_ids``.
    """
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None or len(args) > 1:
        return None
    length = tokens.shape[1]
    mask, positions, cache = (kwargs.get(name) for name in ("attention_mask", "position_ids", "cache"))
    cache = kwargs.get("past_key_values") if cache is None else cache  # its name before transformers 5.24
    if current_group() is not None:
        _check_piece(decoder, positions, cache)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        if positions is None:
            past = cache.get_seq_length() if isinstance(cache, Cache) else 0
            # a tensor where a step is compiled for all lengths: what it holds is not known then
            if not (torch.compiler.is_compiling() and isinstance(past, Tensor)) and mask.shape[1] != int(past) + length:
                raise ValueError(
                    f"attention_mask must cover the {int(past)} cached and the {length} new tokens: expected "
                    f"{int(past) + length} columns; got shape {tuple(mask.shape)}"
                )
            return args, {**kwargs, "position_ids": positions_from_mask(mask, length)}
    elif mask is None and positions is not None and cache is None and not torch.compiler.is_compiling():
        boundaries = packed_cu_seqlens(positions)
        if boundaries is not None and kwargs.get("cu_seq_lens_q") is None:
            return args, {**kwargs, "cu_seq_lens_q": boundaries}
    return None


def attach_masks(model: PreTrainedModel, decoder: nn.Module, all_linear: bool) -> None:
    """Give ``model`` the [B, T] mask if all of its layers are linear, and its decoder positions that skip padding."""
    if all_linear:
        model.config.get_text_config()._attn_implementation = ALL_LINEAR
    if _prepare_positions not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_prepare_positions, with_kwargs=True)
