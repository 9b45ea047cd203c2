"""Linear-time and low-rank language models on handwritten kernels."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import Any as _Any

from freqrank import _native as _native
from freqrank.models.registration import register as _register
from freqrank.ops import *  # noqa: F403
from freqrank.ops import __all__ as _ops

__version__ = (_Path(__file__).parent / "VERSION").read_text().strip()
__all__ = [*_ops, "__version__"]

# What is imported when it is first asked for, because it is slow to import or needs transformers.
_LAZY = {
    "LowRankLinear": "freqrank.lowrank.modules",
    "distill": "freqrank.attention.distillation",
    "pack_documents": "freqrank.attention.distillation",
    "TrainingReport": "freqrank.attention.distillation",
    "compress": "freqrank.models.compression",
    "CompressionReport": "freqrank.models.compression",
    "Comparison": "freqrank.compare",
    "convert": "freqrank.conversion",
    "ConversionReport": "freqrank.conversion",
    "load_offloaded": "freqrank.models.offload",
    "load_state": "freqrank.models.prompts",
    "linearize": "freqrank.models.linearization",
    "load_official": "freqrank.models.official",
    "LinearizationReport": "freqrank.models.linearization",
    "FreqrankConfig": "freqrank.models.quantizer",
    "FreqrankQuantizer": "freqrank.models.quantizer",
    "merge": "freqrank.models.merging",
    "Reproduction": "freqrank.reproduce",
    "save_model": "freqrank.models.saving",
    "save_state": "freqrank.models.prompts",
}


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'freqrank' has no attribute {name!r}")
    value = getattr(_import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


_register()

from freqrank import evaluate as evaluate  # noqa: E402
