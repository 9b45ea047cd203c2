"""Linear attention in place of softmax attention: feature maps, the layer, training, several processes."""

from importlib import import_module as _import_module
from typing import Any as _Any

# Imported when first asked for: who uses one layer needs none of it.
_LAZY = {
    "KernelError": "approximation",
    "kernel_error": "approximation",
    "linear_attention_parallel": "parallel",
    "feature_map_attention_parallel": "parallel",
    "sequence_parallel": "parallel",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'freqrank.attention' has no attribute {name!r}")
    return getattr(_import_module(f"freqrank.attention.{_LAZY[name]}"), name)
