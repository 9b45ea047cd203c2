"""Loads the compiled libraries and says which ones were loaded, and why others were not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.library import Library

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
        try:
            torch.ops.load_library(str(cuda))
            libraries["cuda"] = f"loaded ({torch.ops.freqrank.cuda_targets()})"
        except OSError as error:  # the CPU kernels work all the same
            libraries["cuda"] = f"not loaded: {error}"


def cuda_loaded() -> bool:
    """Whether the CUDA kernels can be used."""
    return libraries["cuda"].startswith("loaded")


# --- ops without kernels for a device ------------------------------------------------------------------------------

BUILD_WITH_CUDA = "`FREQRANK_CUDA=1 pip install . --no-build-isolation`, with the CUDA toolkit's nvcc"
_REFUSING = Library("freqrank", "IMPL")


def _refuse(name: str, arguments: tuple[Any, ...], options: dict[str, Any], key: str) -> NoReturn:
    schema = getattr(torch.ops.freqrank, name).default._schema
    values = [options.get(a.name, arguments[i] if i < len(arguments) else None) for i, a in enumerate(schema.arguments)]
    device = key.lower()
    where = next(
        (
            f"{argument.name} is on {value.device}"
            for argument, value in zip(schema.arguments, values, strict=True)
            if isinstance(value, torch.Tensor) and value.device.type == device
        ),
        f"the input is on a device of type {device}",
    )
    if key == "CUDA" and not cuda_loaded():
        raise ValueError(
            f"{where}, and freqrank's CUDA library is {libraries['cuda']}. Build it with {BUILD_WITH_CUDA}, or move "
            "the tensor: x.cpu()"
        )
    raise ValueError(f"{where}, and freqrank has no kernel of {name} for {key}; move the tensors: x.cpu()")


def _refuse_other_devices() -> None:
    """Registers, for every op, an error in place of each missing kernel: eager and compiled calls then say what to do.

    Fake and meta tensors never reach a kernel, so shapes can be traced for devices that this machine does not have.
    """
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, name = qualified.partition("::")
        has_kernel = partial(torch._C._dispatch_has_kernel_for_dispatch_key, qualified)
        if namespace != "freqrank" or not has_kernel("CPU"):
            continue
        for key in ("CUDA", "XPU", "MPS"):
            if not has_kernel(key):
                _REFUSING.impl(name, lambda *args, _name=name, _key=key, **kw: _refuse(_name, args, kw, _key), key)


_load()
_refuse_other_devices()
