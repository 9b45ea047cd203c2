"""The cache of a linear-attention layer: a state of fixed size and a token count, inside a transformers ``Cache``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer, StaticLayer

from freqrank.attention.dijiang import AttentionState


class LinearStateLayer(LinearAttentionLayer, DynamicLayer):  # type: ignore[misc]  # both have a dtype and device
    """The state of one layer (:class:`freqrank.attention.dijiang.AttentionState`) and the tokens that went into it.

    A ``LinearAttentionLayer`` for its state, so that it counts as one wherever transformers asks, and a
    ``DynamicLayer`` for its length, which ``generate`` asks any Llama-like model's cache for.
    :func:`linear_cache_layer` puts it into the cache that a model is called with, so that ``config.layer_types``
    stays the base model's.
    """

    is_compileable = False
    dtype: Any
    device: Any
    is_croppable = False  # type: ignore[assignment]  # a property of LinearAttentionLayer
    supports_early_init = False

    def __init__(self, static_length: int | None = None) -> None:
        DynamicLayer.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=1)
        self.length = 0
        self.static_length = static_length  # of the static cache around it
        self.state: AttentionState | None = None  # what the tokens so far left; None before the first

    def advance(self, state: AttentionState, tokens: int) -> None:
        """Keep ``state`` as it is after ``tokens`` more tokens."""
        self.state = state
        self.has_previous_state[0] = self.is_initialized = True
        first = state_tensors(state)[0]
        self.dtype, self.device = first.dtype, first.device
        self.length += tokens

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = map_state(change, self.state)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError(
            "this cache layer holds a linear-attention state and cannot take keys and values: the cache was used by a "
            "linearised model; give the softmax model a cache of its own"
        )

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # transformers may ask this layer, if it is the first one, on behalf of the softmax layers
        return self.static_length or self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        self._change(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change(lambda x: x.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forget every token. The state is dropped, not zeroed: somebody may hold it."""
        self.__init__(self.static_length)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda x: x[indices])

    def activate_past_recording(self) -> None:
        raise RuntimeError(
            "assisted decoding needs a cache that can go back, and a linear-attention state keeps no past to go back "
            "to; generate without an assistant, or keep the layers softmax"
        )

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise RuntimeError(
                f"crop({tokens_to_remove}): a linear-attention state cannot forget its last tokens, they are summed "
                "into it; copy.deepcopy the cache before going on, and go back to the copy"
            )


def state_tensors(state: AttentionState) -> list[Tensor]:
    """Every tensor of a layer's state."""
    return [x for part in state if part is not None for x in part if x is not None]


def map_state(change: Callable[[Tensor], Tensor], state: AttentionState) -> AttentionState:
    """The state with ``change`` applied to every tensor, whose first dimension is the batch."""

    def mapped(part: Any) -> Any:
        return None if part is None else type(part)(*(None if x is None else change(x) for x in part))

    return AttentionState(mapped(state.linear), mapped(state.window))


def linear_cache_layer(cache: Cache, layer_idx: int) -> LinearStateLayer:
    """The state layer at ``layer_idx`` of ``cache``, put there at first use in place of the layer that was there.

    Works in ``DynamicCache``, ``StaticCache`` and any other ``Cache`` made of layers; only the place is taken over,
    since a state has the same size however long the text.

    Raises:
        TypeError: ``cache`` is not made of layers.
        ValueError: the layer already holds keys and values, so the tokens behind them are lost to a state.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None:
        raise TypeError(f"past_key_values must be a transformers Cache made of layers; got {type(cache).__name__}")
    while len(layers) <= layer_idx:
        layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]  # set wherever layers are made lazily
    layer = layers[layer_idx]
    if isinstance(layer, LinearStateLayer):
        return layer
    filled = layer.get_seq_length()
    if torch.compiler.is_compiling() or int(filled) == 0:
        static = isinstance(layer, StaticLayer) and not layer.is_sliding
        layers[layer_idx] = LinearStateLayer(layer.max_cache_len if static else None)
        return layers[layer_idx]
    raise ValueError(
        f"past_key_values.layers[{layer_idx}] already holds keys and values of {int(filled)} tokens, which a linear "
        "layer cannot take over: the cache was filled by a softmax model; start from an empty cache"
    )
