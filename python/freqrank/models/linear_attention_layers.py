"""What a converted layer does around DiJiang attention: a small class an architecture, found by the attention's class.

To add an attention, subclass :class:`LinearizedAttention` where it projects, rotates or returns in another way, and
enter its class name into :data:`ATTENTION_CLASSES`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from freqrank.attention.dijiang import WINDOW_ONLY, DiJiangAttention, DiJiangOptions
from freqrank.attention.feature_maps import FEATURE_MAPS
from freqrank.models.cache import linear_cache_layer
from freqrank.models.masks import attention_mask_2d
from freqrank.ops.attention import MAX_DIM


class LinearizedAttention(DiJiangAttention):
    """A :class:`DiJiangAttention` that a transformers decoder block can call, around the pretrained projections.

    They stay children of the names that they have in the attention module which it replaces. As it stands, the class
    is Llama's: separate projections of q, k and v, rotated, and ``o_proj``.

    Args:
        attention: the pretrained module. Its children are taken over, and nothing of it is changed.
        options: how the layer is built.
        rotary: the decoder's module that makes cosines and sines; None for one without.

    Raises:
        ValueError: options out of range. Ask :meth:`refusal` first.

    Attributes:
        output_name: the child that projects the result.
        rotates: whether ``apply_rotary_pos_emb`` of the pretrained module's own file goes over q and k.
        query_scale: factor on q by which the scale of the pretrained logits differs from head_dim**-0.5.
    """

    output_name: ClassVar[str] = "o_proj"
    rotates: ClassVar[bool] = True
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(self, attention: Any, options: DiJiangOptions, rotary: nn.Module | None = None) -> None:
        tensors = (*attention.parameters(), *attention.buffers())
        weight = next(tensor for tensor in tensors if tensor.is_floating_point())
        heads, groups = attention.config.num_attention_heads, getattr(attention, "num_key_value_groups", 1)
        super().__init__(
            hidden_size=attention.config.hidden_size,
            num_heads=heads,
            num_key_value_heads=heads // groups,
            head_dim=self.size_of_a_head(attention),
            options=options,
            device=weight.device,
            dtype=weight.dtype,
        )
        for name, child in attention.named_children():
            self.add_module(name, child)
        self.layer_idx: int = attention.layer_idx
        self.config = attention.config
        scale = attention.scaling * self.head_dim**0.5
        self.query_scale = 1.0 if math.isclose(scale, 1.0, rel_tol=1e-6) else scale
        self.rotate: Callable[..., tuple[Tensor, Tensor]] | None = None
        if self.rotates:
            self.rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        self._rotary = (rotary,)  # the decoder's own; in a tuple, or its buffers would be this layer's too
        self.train(attention.training)

    @staticmethod
    def size_of_a_head(attention: Any) -> int:
        """Channels of one head of a pretrained module."""
        return int(attention.head_dim)

    @classmethod
    def refusal(cls, attention: Any, options: DiJiangOptions) -> str | None:
        """Why a pretrained module cannot be converted with these options, or None if it can."""
        if not getattr(attention, "is_causal", True):
            return f"{type(attention).__name__} attends in both directions, a linear layer only to earlier tokens"
        if options.feature_map == WINDOW_ONLY:
            return None
        size = cls.size_of_a_head(attention)
        # the logarithm of a factor is one more channel of q and k, the denominator's sum one of v
        exponential = FEATURE_MAPS[options.feature_map].feature == "exp"
        more = exponential or (options.norm == "denominator" and options.position_table)
        limit = MAX_DIM - bool(more)
        if size > limit:
            return (
                f"head_dim is {size}, and linear attention with these options takes heads of up to {limit} channels: "
                "keep such layers softmax (layers=), or give them a window alone (feature_map='none', window=64, say)"
            )
        return None

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, head_dim] and k, v [B, T, Hk, head_dim], neither rotated nor scaled."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(hidden_states).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def output(self, mixed: Tensor) -> Tensor:
        """What the block gets, from what the heads made [B, T, H head_dim]."""
        projected: Tensor = getattr(self, self.output_name)(mixed)
        return projected

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[B, T, hidden_size] to the same, and None for attention weights, which there are none of.

        Blocks hand the cache over as ``cache``, ``past_key_values`` (before transformers 5.24) or ``layer_past``.
        """
        past = next((kwargs[name] for name in ("past_key_values", "layer_past") if kwargs.get(name) is not None), cache)
        length = hidden_states.shape[1]
        q, k, v = self.project(hidden_states)
        layer = None if past is None else linear_cache_layer(past, self.layer_idx, self, v)
        start = layer.length if layer is not None else 0
        if position_ids is None:
            position_ids = (torch.arange(length, device=hidden_states.device) + start)[None]
        if self.query_scale != 1.0:
            q = q * self.query_scale
        sink_q = self._sink_queries(q, k, position_ids) if self.options.sinks else None
        if self.rotate is not None:
            assert position_embeddings is not None
            q, k = self.rotate(q, k, *position_embeddings, unsqueeze_dim=2)
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        mixed, state = self.mix(
            hidden_states,
            q,
            k,
            v,
            position_ids,
            mask=attention_mask_2d(attention_mask, length, start) if cu_seqlens is None else None,  # packed: no padding
            sink_q=sink_q,
            state=layer.state if layer is not None else None,
            output_state=layer is not None,
            cu_seqlens=cu_seqlens,
        )
        if layer is not None and state is not None:
            layer.advance(state, length)
        return self.output(mixed), None

    def _sink_queries(self, q: Tensor, k: Tensor, position_ids: Tensor) -> Tensor | None:
        """Queries rotated to the first position from which the last sink is out of the window, whatever their own.

        Distances to the sinks then stay within what the model was trained with, however long the text
        (StreamingLLM, Xiao et al., ICLR 2024).
        """
        rotary = self._rotary[0]
        if self.rotate is None or rotary is None:
            return None
        first = torch.full((), self.options.window + self.options.sinks - 1, device=q.device)
        # Frequencies that depend on the text's length (LongRoPE, dynamic scaling) go by the largest position there is.
        cos, sin = (x[:, :1] for x in rotary(q, torch.stack([first, position_ids.amax()])[None]))
        return self.rotate(q, k[:, :1], cos, sin, unsqueeze_dim=2)[0]


class LinearQwen3(LinearizedAttention):
    """Qwen3: norms of each head's queries and keys before they are rotated."""

    q_norm: nn.Module
    k_norm: nn.Module

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(hidden_states)
        return self.q_norm(q), self.k_norm(k), v


class LinearPhi3(LinearizedAttention):
    """Phi-3: one linear gives all heads of q, then all of k, then all of v."""

    qkv_proj: nn.Module

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(hidden_states)
        heads = qkv.view(*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = heads.split([self.num_heads, self.num_key_value_heads, self.num_key_value_heads], -2)
        return q, k, v


class LinearGPTNeoX(LinearizedAttention):
    """GPT-NeoX and Pythia: one linear gives q, k and v of one head after the other; only some channels are rotated."""

    output_name = "dense"
    query_key_value: nn.Module

    @staticmethod
    def size_of_a_head(attention: Any) -> int:
        return int(attention.head_size)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.query_key_value(hidden_states)
        q, k, v = qkv.view(*hidden_states.shape[:-1], self.num_heads, 3, self.head_dim).unbind(-2)
        return q, k, v


class LinearOPT(LinearizedAttention):
    """OPT: Llama's projections under another name, and positions that were added to the embeddings."""

    output_name = "out_proj"
    rotates = False


class LinearGPT2(LinearizedAttention):
    """GPT-2: one ``Conv1D`` gives all of q, then k, then v; positions as OPT; dropout behind the output projection."""

    output_name = "c_proj"
    rotates = False
    c_attn: nn.Module
    resid_dropout: nn.Module

    @classmethod
    def refusal(cls, attention: Any, options: DiJiangOptions) -> str | None:
        if attention.config.add_cross_attention:
            return "the model has cross-attention (add_cross_attention), which is not converted: a decoder alone is"
        return super().refusal(attention, options)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.c_attn(hidden_states)
        q, k, v = qkv.view(*hidden_states.shape[:-1], 3, self.num_heads, self.head_dim).unbind(-3)
        return q, k, v

    def output(self, mixed: Tensor) -> Tensor:
        dropped: Tensor = self.resid_dropout(super().output(mixed.contiguous()))  # Conv1D asks for that
        return dropped


#: Class name of a pretrained attention -> what takes its place. A sliding window of its own (Mistral, Phi-3, Qwen2) is
#: no part of a linear layer, which reads the whole text; the option ``window`` is another thing.
ATTENTION_CLASSES: dict[str, type[LinearizedAttention]] = {
    "GPT2Attention": LinearGPT2,
    "GPTNeoXAttention": LinearGPTNeoX,
    "GemmaAttention": LinearizedAttention,
    "LlamaAttention": LinearizedAttention,
    "MistralAttention": LinearizedAttention,
    "OPTAttention": LinearOPT,
    "Phi3Attention": LinearPhi3,
    "Qwen2Attention": LinearizedAttention,
    "Qwen3Attention": LinearQwen3,
}
