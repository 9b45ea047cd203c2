"""Linear-time and low-rank language models on handwritten kernels."""

from pathlib import Path as _Path

from freqrank import _native as _native
from freqrank.ops import *  # noqa: F403
from freqrank.ops import __all__ as _ops

__version__ = (_Path(__file__).parent / "VERSION").read_text().strip()
__all__ = [*_ops, "__version__"]
