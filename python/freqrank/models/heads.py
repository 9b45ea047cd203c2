"""A softmax model's own queries, keys and values, to measure feature maps on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_CAPTURE = "freqrank_capture"


class Heads(NamedTuple):
    """What one layer's softmax attention is called with.

    Attributes:
        q, k, v: [B, T, H, D], [B, T, Hk, D] and [B, T, Hk, V], rotated as the model rotates them.
        scale: factor on q . k that is still to come (1 for OPT, which scales its queries).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


@torch.no_grad()
def attention_heads(model: PreTrainedModel, input_ids: Tensor) -> list[Heads]:
    """Queries, keys and values of every layer on ``input_ids`` [B, T], first layer first.

    Args:
        model: a transformers model with softmax attention, of any architecture that goes through transformers'
            attention interface (those that freqrank linearises do). Layers that are linear already are left out.

    Raises:
        TypeError: no transformers model.
        ValueError: no layer called the attention interface.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel; got {type(model).__name__}")
    found: list[Heads] = []

    def capture(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        result = sdpa_attention_forward(module, q, k, v, mask, **options)
        scale = options.get("scaling")
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        found.append(Heads(q.clone(), k.clone(), v.clone(), scale))
        return result

    config = model.config.get_text_config()
    before = config._attn_implementation
    AttentionInterface.register(_CAPTURE, capture)
    AttentionMaskInterface.register(_CAPTURE, sdpa_mask)
    was_training = model.training
    try:
        config._attn_implementation = _CAPTURE
        model.eval()(input_ids=input_ids, use_cache=False)
    finally:
        config._attn_implementation = before
        model.train(was_training)
    if not found:
        raise ValueError(f"no layer of {type(model).__name__} called transformers' attention interface")
    return found
