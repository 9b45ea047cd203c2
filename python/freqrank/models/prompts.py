"""Prompt caching on disk: what a model keeps of a text, saved once and gone on from in any later process.

One safetensors file: the state of every linear layer, keys and values of every softmax layer, and in its metadata how
many tokens went in and which model they went through. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from freqrank.attention.dijiang import DiJiangAttention
from freqrank.models.architectures import Architecture, find_architecture
from freqrank.models.cache import LinearStateLayer, new_state_layer, state_of, state_shapes, state_tensors
from freqrank.models.files import write_tensors

__all__ = ["load_state", "save_state"]

FORMAT = 1
_ENTRY = "freqrank_state"
_SAMPLE = 256  # numbers of each weight that tell one model from another


def save_state(cache: Cache, path: str | os.PathLike[str], model: PreTrainedModel) -> Path:
    """Save what ``model`` keeps of the tokens that it has read, for :func:`load_state`; returns the path.

    Args:
        cache: what ``model`` was called with, or gave back: states of linear layers and, where layers are softmax, the
            keys and values of a ``DynamicCache``. Any batch.
        path: a file, replaced if it is there. It is written whole or not at all.
        model: the model that filled the cache, linear in all layers, in some or in none. The file names its layers,
            shapes and options, and a hash of numbers taken from every weight but the head's.

    Raises:
        TypeError: ``cache`` or ``model`` is something else, or the cache has layers of another kind.
        ValueError: the cache is empty or does not fit the model.
        OSError: the file cannot be written.

    >>> import tempfile, freqrank
    >>> from transformers import LlamaConfig, LlamaModel
    >>> model = LlamaModel(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                                num_attention_heads=2)).eval()
    >>> report = freqrank.linearize(model)
    >>> with torch.no_grad():
    ...     cache = model(torch.tensor([[1, 2, 3]])).past_key_values
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     freqrank.load_state(save_state(cache, f"{folder}/prompt.safetensors", model), model).get_seq_length()
    3
    """
    architecture = _architecture(model)
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None:
        raise TypeError(f"cache must be a transformers Cache made of layers; got {type(cache).__name__}")
    if len(layers) != len(architecture.blocks):
        raise ValueError(
            f"cache must have a layer for each of the model's {len(architecture.blocks)}; got {len(layers)}"
            + ("" if layers else ": call the model with it first")
        )
    tensors: dict[str, Tensor] = {}
    about = []
    for index, layer in enumerate(layers):
        held, described = _saved(layer, index, architecture.attention(index))
        about.append(described)
        tensors |= {f"{index}.{name}": tensor for name, tensor in held.items()}
    entry = {"format": FORMAT, "layers": about, "model": _fingerprint(model, architecture)}
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        write_tensors(temporary, tensors, {_ENTRY: json.dumps(entry)})
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def load_state(path: str | os.PathLike[str], model: PreTrainedModel) -> DynamicCache:
    """The cache that :func:`save_state` wrote, on the devices of ``model``'s layers.

    What is generated from it has the bits it would have had without the file. Give it to ``model`` or
    ``model.generate`` as their cache; ``batch_repeat_interleave(n)`` makes room for n texts that begin alike.

    Args:
        path: the file.
        model: the model that filled the cache, in the dtype that it then had.

    Raises:
        TypeError: ``model`` is something else.
        ValueError: the file is no such state, or another model's; the message says in what they differ.
        OSError: the file cannot be read.
    """
    architecture = _architecture(model)
    path = Path(path)
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is no state that save_state wrote: {error}") from error
    if _ENTRY not in metadata:
        raise ValueError(f"{path} is no state that save_state wrote: its metadata has no entry {_ENTRY!r}")
    entry = json.loads(metadata[_ENTRY])
    if entry["format"] != FORMAT:
        raise ValueError(f"{path} has format {entry['format']}, and this version reads format {FORMAT}: make it anew")
    _compare(path, entry["model"], _fingerprint(model, architecture))
    cache = DynamicCache(config=model.config)
    cache.layers = []
    for index, about in enumerate(entry["layers"]):
        attention = architecture.attention(index)
        device = next(attention.parameters()).device
        start = f"{index}."
        held = {name.removeprefix(start): x.to(device) for name, x in tensors.items() if name.startswith(start)}
        cache.layers.append(_loaded(path, held, about, index, attention))
    return cache


def _architecture(model: PreTrainedModel) -> Architecture:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel; got {type(model).__name__}")
    return find_architecture(model)


def _saved(layer: Any, index: int, attention: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a cache's layer, and what else has to be known of it."""
    if isinstance(attention, DiJiangAttention) != isinstance(layer, LinearStateLayer):
        needed = "a LinearStateLayer" if isinstance(attention, DiJiangAttention) else "keys and values"
        raise ValueError(f"cache.layers[{index}] must be {needed}, as the model's layer is; got {type(layer).__name__}")
    if isinstance(layer, LinearStateLayer):
        held = {} if layer.state is None else state_tensors(layer.state)
        shapes, expected = {name: tuple(x.shape[1:]) for name, x in held.items()}, state_shapes(attention)
        if held and shapes != expected:
            raise ValueError(
                f"cache.layers[{index}] must hold a state of shapes {expected} (without the batch); got {shapes}: the "
                "cache was filled by another model"
            )
        about: dict[str, Any] = {"kind": "linear"}
    elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        held = {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
        about = {"kind": "softmax"}
        if isinstance(layer, DynamicSlidingWindowLayer):
            about = {"kind": "sliding", "window": layer.sliding_window}
    else:
        raise TypeError(
            f"cache.layers[{index}] must be a LinearStateLayer, a DynamicLayer or a DynamicSlidingWindowLayer; got "
            f"{type(layer).__name__}: read the prompt with a DynamicCache"
        )
    tokens = int(layer.get_seq_length())
    if not tokens:
        raise ValueError(f"cache.layers[{index}] is empty: call the model with the cache first")
    return held, about | {"tokens": tokens}


def _loaded(path: Path, held: dict[str, Tensor], about: dict[str, Any], index: int, attention: Any) -> Any:
    """A cache's layer from what :func:`_saved` gave."""
    is_linear = about["kind"] == "linear"
    expected = set(state_shapes(attention)) if is_linear else {"keys", "values"}
    if set(held) != expected:
        raise ValueError(
            f"{path} is damaged: layer {index} has the tensors {', '.join(sorted(held)) or 'none'}, and "
            f"{', '.join(sorted(expected))} are needed"
        )
    if is_linear:
        state = new_state_layer(DynamicLayer(), index, attention)
        state.advance(state_of(held), about["tokens"])
        return state
    layer = DynamicLayer() if about["kind"] == "softmax" else DynamicSlidingWindowLayer(about["window"])
    layer.update(held["keys"], held["values"])
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = about["tokens"]
    return layer


def _fingerprint(model: PreTrainedModel, architecture: Architecture) -> dict[str, Any]:
    """What a state depends on, JSON-serialisable; equal for the same model loaded again."""
    layers: list[dict[str, Any]] = []
    for index in range(len(architecture.blocks)):
        attention = architecture.attention(index)
        if isinstance(attention, DiJiangAttention):
            layers.append({"linear": attention.options.to_dict()})
        else:
            layers.append({"softmax": type(attention).__name__})
    weights = hashlib.sha256()
    for name, x in sorted(architecture.decoder.state_dict().items()):
        if x.is_meta:
            raise ValueError(
                "the model's weights are offloaded, and a state is known by them: load the model into memory"
            )
        weights.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        flat = x.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLE)].cpu().contiguous()
        weights.update(some.view(torch.uint8).numpy().tobytes())
    config = model.config.get_text_config()
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": layers,
        "heads": [config.num_attention_heads, getattr(config, "num_key_value_heads", None)],
        "positions": json.loads(json.dumps(getattr(config, "rope_parameters", None))),
        "weights": weights.hexdigest(),
    }


def _compare(path: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    refused = f"the state in {path} was saved from another model: "
    if len(saved["layers"]) != len(own["layers"]):
        raise ValueError(f"{refused}it has {len(saved['layers'])} layers, this one {len(own['layers'])}")
    for index, (theirs, ours) in enumerate(zip(saved["layers"], own["layers"], strict=True)):
        if theirs != ours:
            raise ValueError(f"{refused}its layer {index} is {theirs}, here it is {ours}")
    for what in ("dtype", "heads", "positions"):
        if saved[what] != own[what]:
            raise ValueError(f"{refused}it has {what} {saved[what]}, this one {own[what]}")
    if saved["weights"] != own["weights"]:
        raise ValueError(f"{refused}layers and options are the same, the weights are not")
