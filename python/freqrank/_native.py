"""Loads the compiled libraries and says which ones were loaded, and why others were not."""

from __future__ import annotations

from pathlib import Path

import torch

_FOLDER = Path(__file__).parent / "_lib"

#: library name -> "loaded", or the reason why it was not
libraries: dict[str, str] = {}


def _load() -> None:
    cpu = _FOLDER / "libfreqrank_cpu.so"
    if not cpu.exists():
        raise ImportError(
            f"freqrank's native library is missing: {cpu} does not exist. Build it with "
            "`pip install . --no-build-isolation` (or `make build` in a source tree)."
        )
    try:
        torch.ops.load_library(str(cpu))
    except OSError as error:
        raise ImportError(
            f"freqrank's native library {cpu} could not be loaded by torch {torch.__version__}: {error}. "
            "It needs torch >= 2.10; rebuild with `pip install . --no-build-isolation`."
        ) from error
    libraries["cpu"] = f"loaded ({torch.ops.freqrank.cpu_isa()})"
    cuda = _FOLDER / "libfreqrank_cuda.so"
    if not cuda.exists():
        libraries["cuda"] = "not built"
    elif not torch.backends.cuda.is_built():
        libraries["cuda"] = f"not loaded: torch {torch.__version__} is built without CUDA"
    else:
        torch.ops.load_library(str(cuda))
        libraries["cuda"] = "loaded"


_load()
