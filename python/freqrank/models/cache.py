"""The cache of a linear-attention layer: a state of fixed size and a token count, inside a transformers ``Cache``.

A state is written in place wherever no gradient hangs on it, so that its address is the same from step to step: what
``torch.compile`` and CUDA graphs ask of a decoding step. How many tokens went into it is known twice, as a number on
the host and as a tensor on the state's device. A compiled step reads and counts up the tensor alone: a number would
be part of the graph, and there would be another graph for each length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionLayer, StaticLayer

from freqrank.attention.dijiang import WINDOW_ONLY, AttentionState, DiJiangAttention, DiJiangOptions
from freqrank.attention.window import WindowState
from freqrank.models.masks import ALL_LINEAR
from freqrank.ops import LinearAttentionState


class LinearStateLayer(LinearAttentionLayer, DynamicLayer):  # type: ignore[misc]  # both have a dtype and device
    """The state of one layer (:class:`freqrank.attention.dijiang.AttentionState`) and the tokens that went into it.

    A ``LinearAttentionLayer`` for its state, so that it counts as one wherever transformers asks, and a
    ``DynamicLayer`` for its length, which ``generate`` asks any Llama-like model's cache for.
    :func:`linear_cache_layer` puts it into the cache that a model is called with, so that ``config.layer_types``
    stays the base model's.

    Args:
        options: of the attention layer whose state this is; None where they are not known.
        is_compileable: whether it is in a static cache, for which ``generate`` compiles decoding steps where it can.
        static_length: that cache's length, if it is the softmax layers' too.
        counts_on_host: keep the number of tokens on the host in compiled steps too. Softmax layers beside this one ask
            it for the size of their mask, which grows with their keys and values anyway.
    """

    is_compileable = False  # type: ignore[assignment]  # a property of LinearAttentionLayer, and the next as well
    is_croppable = False  # type: ignore[assignment]
    supports_early_init = False
    dtype: Any
    device: Any

    def __init__(
        self,
        options: DiJiangOptions | None = None,
        *,
        is_compileable: bool = False,
        static_length: int | None = None,
        counts_on_host: bool = False,
    ) -> None:
        DynamicLayer.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=1)
        self.options, self.is_compileable = options, is_compileable
        self.static_length, self.counts_on_host = static_length, counts_on_host
        self.state: AttentionState | None = None  # what the tokens so far left; None before the first
        self.count: Tensor | None = None  # of these tokens, int64 []; None before the first
        self.known: int | None = 0  # the same number; None where only the tensor has it

    @property
    def length(self) -> int | Tensor:
        """Tokens so far: a number, or a tensor [] in a compiled step and wherever the host has not seen all steps."""
        if self.count is None:
            return 0
        if torch.compiler.is_compiling() and not self.counts_on_host:
            return self.count
        return self.count if self.known is None else self.known

    def advance(self, state: AttentionState, tokens: int) -> None:
        """Keep ``state`` as it is after ``tokens`` more tokens."""
        self.keep(state)
        assert self.count is not None
        self.count.add_(tokens)
        if not self.has_previous_state[0]:
            self.has_previous_state[0] = True
        if not self.counts_on_host and _is_recorded(self.count):
            self.known = None
        elif self.known is not None:
            self.known += tokens

    def keep(self, state: AttentionState) -> None:
        """Keep ``state``, in the memory of the one before it where that may be written; the count stays."""
        if self.state is None:
            self.state = map_state(_owned, state)
            first = next(iter(state_tensors(state).values()))
            self.dtype, self.device = first.dtype, first.device
            self.is_initialized = True
        else:
            linear, window = (_part_written(old, new) for old, new in zip(self.state, state, strict=True))
            self.state = AttentionState(linear, window)
        if self.count is None:
            self.count = _owned(torch.zeros((), dtype=torch.int64, device=self.device))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.keep(map_state(change, self.state))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError(
            "past_key_values must hold keys and values where a layer is softmax; got the state of a linear layer, "
            "which cannot take keys and values: the cache was used by a linearised model. Give this model a cache of "
            "its own"
        )

    def get_seq_length(self) -> int:
        return self.length  # type: ignore[return-value]  # a tensor where a static cache of transformers has one too

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # transformers may ask this layer, if it is the first one, on behalf of the softmax layers
        return self.static_length or self.length + query_length, 0  # type: ignore[return-value]

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        self._change(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change(lambda x: x.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forget every token. The state stays where it is, all zero, so that a recorded graph still finds it."""
        if self.state is not None:
            zeros = map_state(torch.zeros_like, self.state)
            self.keep(zeros)
        if self.count is not None:
            self.count.zero_()
        if self.known is not None:  # a graph that was recorded will count on without the host
            self.known = 0
        self.has_previous_state[0] = False

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


def _is_recorded(tensor: Tensor) -> bool:
    """Whether what is done now will be done again without this code being run."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _owned(x: Tensor) -> Tensor:
    """A copy in memory of its own (a view would keep all keys of a long text alive) that graphs may rely on."""
    if torch.compiler.is_compiling():
        return x.clone(memory_format=torch.contiguous_format)
    # a tensor of inference mode could not be written outside of it
    with torch.inference_mode(False) if x.is_inference() else nullcontext():
        x = x.clone(memory_format=torch.contiguous_format)
    torch._dynamo.mark_static_address(x, guard=False)
    return x


def _written(old: Tensor, new: Tensor) -> Tensor:
    """``new`` in the memory of ``old``, or in its own if it has another size or a gradient hangs on either."""
    if new is old:
        return old
    fits = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    return old.copy_(new) if fits and not old.requires_grad and not new.requires_grad else _owned(new)


def _part_written(old: Any, new: Any) -> Any:
    """The same of every tensor of a state's part; a step has changed the scan's in its place already."""
    if new is old:
        return old
    return type(new)(*(None if y is None else _written(x, y) for x, y in zip(old, new, strict=True)))


def state_tensors(state: AttentionState) -> dict[str, Tensor]:
    """Every tensor of a layer's state by its name: "linear.kv", "window.k" and so on."""
    return {
        f"{name}.{field}": x
        for name, part in zip(state._fields, state, strict=True)
        if part is not None
        for field, x in zip(part._fields, part, strict=True)
        if x is not None
    }


def state_of(tensors: Mapping[str, Tensor]) -> AttentionState:
    """The state with these tensors, named as :func:`state_tensors` does."""
    linear, window = None, None
    if "linear.kv" in tensors:
        linear = LinearAttentionState(tensors["linear.kv"], tensors.get("linear.z"))
    if "window.k" in tensors:
        window = WindowState(*(tensors[f"window.{field}"] for field in WindowState._fields))
    return AttentionState(linear, window)


def map_state(change: Callable[[Tensor], Tensor], state: AttentionState) -> AttentionState:
    """The state with ``change`` applied to every tensor, whose first dimension is the batch."""
    return state_of({name: change(x) for name, x in state_tensors(state).items()})


def state_shapes(attention: DiJiangAttention) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a layer's state, without their first dimension, the batch.

    >>> state_shapes(DiJiangAttention(hidden_size=8, num_heads=2, num_key_value_heads=1, head_dim=4))
    {'linear.kv': (1, 4, 4)}
    """
    options, heads, dim = attention.options, attention.num_key_value_heads, attention.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if options.feature_map != WINDOW_ONLY:
        features, has_denominator = attention.feature_map.num_features, options.norm == "denominator"
        # beside position factors the denominator is one more channel of the values
        extra = 1 if has_denominator and options.position_table else 0
        shapes["linear.kv"] = (heads, features, dim + extra)
        if has_denominator and not extra:
            shapes["linear.z"] = (heads, features)
    if options.window:
        newest, first = (options.window, heads, dim), (options.sinks, heads, dim)
        shapes |= {"window.k": newest, "window.v": newest, "window.mask": newest[:1]}
        shapes |= {"window.sink_k": first, "window.sink_v": first, "window.tokens": ()}
    return shapes


def empty_state(attention: DiJiangAttention, like: Tensor) -> AttentionState:
    """The state of a layer before the first token, for keys and values like ``like`` [B, ...]."""
    real = torch.float64 if like.dtype == torch.float64 else torch.float32
    dtypes = {"linear.kv": real, "linear.z": real, "window.mask": torch.bool, "window.tokens": torch.int64}
    return state_of(
        {
            name: like.new_zeros((like.shape[0], *shape), dtype=dtypes.get(name, like.dtype))
            for name, shape in state_shapes(attention).items()
        }
    )


def linear_cache_layer(cache: Cache, layer_idx: int, attention: DiJiangAttention, like: Tensor) -> LinearStateLayer:
    """The state layer at ``layer_idx`` of ``cache``, put there at first use in place of the layer that was there.

    Works in ``DynamicCache``, ``StaticCache`` and any other ``Cache`` made of layers; only the place is taken over,
    since a state has the same size however long the text.

    Args:
        cache: what the model was called with.
        layer_idx: number of the decoder block.
        attention: the layer that asks.
        like: its keys or values, [B, ...]: batch, dtype and device of the state.

    Raises:
        TypeError: ``cache`` is not made of layers that hold keys and values or states.
        ValueError: it is another model's: too few layers, keys and values of earlier tokens (which are lost to a
            state), or a state of other shapes or options; or its batch has another size.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None:
        raise TypeError(f"past_key_values must be a transformers Cache made of layers; got {type(cache).__name__}")
    while len(layers) <= layer_idx:
        if cache.layer_class_to_replicate is None:
            raise ValueError(
                f"past_key_values must have a layer for each of the model's; got {len(layers)} layers, and layer "
                f"{layer_idx} was asked for: the cache was made for another model"
            )
        layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]  # a class
    if not isinstance(layers[layer_idx], LinearStateLayer):
        if isinstance(layers[layer_idx], StaticLayer) and torch.compiler.is_compiling():
            _install_outside_of_graphs(layers, layer_idx, attention, like)
        else:
            layers[layer_idx] = new_state_layer(layers[layer_idx], layer_idx, attention)
    layer = layers[layer_idx]
    if layer.state is not None:
        _check_state(layer, layer_idx, attention, like)
    return layer


def new_state_layer(old: Any, layer_idx: int, attention: DiJiangAttention) -> LinearStateLayer:
    """The state layer that replaces an empty layer of a cache."""
    if not isinstance(old, CacheLayerMixin):
        raise TypeError(
            f"past_key_values.layers[{layer_idx}] must be a layer for keys and values or a LinearStateLayer; got "
            f"{type(old).__name__}: the cache was made for another model"
        )
    if filled := int(old.get_seq_length()):
        raise ValueError(
            f"past_key_values.layers[{layer_idx}] already holds keys and values of {filled} tokens, which a linear "
            "layer cannot take over: the cache was filled by a softmax model; start from an empty cache"
        )
    is_static = isinstance(old, StaticLayer)
    config: Any = getattr(attention, "config", None)
    has_softmax_layers = config is not None and config._attn_implementation != ALL_LINEAR
    return LinearStateLayer(
        attention.options,
        is_compileable=is_static,
        static_length=old.max_cache_len if isinstance(old, StaticLayer) and not old.is_sliding else None,
        counts_on_host=has_softmax_layers and not is_static,
    )


@torch.compiler.disable(
    reason="a state that a graph of CUDA creates would be overwritten by its next run: call the model once without "
    "torch.compile, or freqrank.models.cache.prepare_cache before"
)
def _install_outside_of_graphs(layers: list[Any], layer_idx: int, attention: DiJiangAttention, like: Tensor) -> None:
    layers[layer_idx] = new_state_layer(layers[layer_idx], layer_idx, attention)
    layers[layer_idx].keep(empty_state(attention, like))


def prepare_cache(cache: Cache, model: PreTrainedModel, batch_size: int) -> None:
    """Put empty states into ``cache`` wherever ``model`` has a linear layer.

    They come by themselves when the model is first called, but a call that is compiled with ``fullgraph=True`` or
    recorded in a CUDA graph must find them.

    Args:
        cache: an empty one, made for ``model``.
        model: a linearised model.
        batch_size: number of sequences.

    Raises:
        TypeError, ValueError: as :func:`linear_cache_layer`.
    """
    for attention in model.modules():
        if isinstance(attention, DiJiangAttention):
            weight = next(x for x in attention.parameters() if x.is_floating_point())
            shape = (batch_size, 0, attention.num_key_value_heads, attention.head_dim)
            like = torch.empty(shape, dtype=model.dtype, device=weight.device)
            index: Any = attention.layer_idx
            layer = linear_cache_layer(cache, index, attention, like)
            if layer.state is None:
                layer.keep(empty_state(attention, like))


def _check_state(layer: LinearStateLayer, layer_idx: int, attention: DiJiangAttention, like: Tensor) -> None:
    """That a state came from this layer, or from one just like it; ValueError otherwise."""
    assert layer.state is not None
    is_compiling = torch.compiler.is_compiling()
    if is_compiling or layer.options is not attention.options:  # else it was checked, or made here
        tensors = state_tensors(layer.state)
        expected = state_shapes(attention)
        # one by one: torch.compile takes symbolic sizes apart
        if tensors.keys() != expected.keys() or any(x.shape[1:] != expected[name] for name, x in tensors.items()):
            found = {name: tuple(x.shape[1:]) for name, x in tensors.items()}
            raise ValueError(
                f"past_key_values.layers[{layer_idx}] must hold a state of shapes {expected} (without the batch); got "
                f"{found}: the cache was filled by another model; start from an empty cache"
            )
        if not is_compiling:
            if layer.options is not None and layer.options != attention.options:
                raise ValueError(
                    f"past_key_values.layers[{layer_idx}] must hold the state of a layer with {attention.options}; got "
                    f"one with {layer.options}: the cache was filled by another model; start from an empty cache"
                )
            layer.options = attention.options
    part = layer.state.window if layer.state.linear is None else layer.state.linear
    assert part is not None
    first = part[0]
    if first.device != like.device:
        raise ValueError(
            f"past_key_values.layers[{layer_idx}] must be on the device of its layer, {like.device}; got {first.device}"
        )
    if first.shape[0] != like.shape[0]:
        if is_compiling or int(layer.length) != 0:
            raise ValueError(
                f"past_key_values.layers[{layer_idx}] must hold a state for each of the {like.shape[0]} sequences of "
                f"the batch; got {first.shape[0]}: cache.batch_repeat_interleave(n) makes n of each, "
                "cache.batch_select_indices(rows) keeps some"
            )
        layer.state = None  # it was reset: nothing is lost
