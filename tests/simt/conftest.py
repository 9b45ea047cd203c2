"""Finds freqrank_simt, the kernels built for the host."""

import importlib.util
import os
import sys
from pathlib import Path

BUILD = Path(os.environ.get("FREQRANK_NATIVE_BUILD", Path(__file__).parents[2] / "build" / "native"))

sys.path.insert(0, str(BUILD))
if importlib.util.find_spec("freqrank_simt") is None:
    raise ImportError(
        f"no freqrank_simt for Python {sys.version_info.major}.{sys.version_info.minor} in {BUILD}: build it with"
        f" `cmake -B build/native -DPython3_EXECUTABLE={sys.executable} && cmake --build build/native`"
        " (`make test` does), or name its folder in FREQRANK_NATIVE_BUILD"
    )
