"""Tensors in safetensors files: written whole or not at all, and read without mapping the file into memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["disk_errors", "read_tensor", "write_tensors"]


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise what safetensors says of a disk that is full or cannot be written as the OSError that it is.

    >>> with disk_errors("weights"):
    ...     raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    Traceback (most recent call last):
        ...
    OSError: [Errno 28] No space left on device: 'weights'
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), os.fspath(path)) from error


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write CPU or GPU tensors of any strides. Raises OSError where that fails; no half-written file is left.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(Path(folder) / "x.safetensors", {"x": torch.ones(2)})
    ...     read_tensor(Path(folder) / "x.safetensors", "x")
    tensor([1., 1.])
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with disk_errors(path):
        save_file(held, path, metadata=None if metadata is None else dict(metadata))


def read_tensor(path: str | os.PathLike[str], name: str) -> Tensor:
    """One tensor of a file, in memory of its own.

    safetensors would map the file by default, privately and writable: Linux then counts all of it as memory that may
    be needed, and refuses a file that is larger than what the machine has. Raises SafetensorError for a damaged file.
    """
    with safe_open(Path(path), framework="pt", backend="pread") as file:
        return file.get_tensor(name)
