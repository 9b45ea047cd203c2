"""What a long run has finished, on disk: a run that was killed goes on from there and ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from freqrank.models.files import write_tensors
from freqrank.models.offload import named_tensors

_ABOUT = "checkpoint.json"


def fingerprint(model: nn.Module, *texts: Tensor) -> str:
    """SHA-256 of a model's weights and of some tensors, names, shapes and dtypes among them.

    >>> layer = nn.Linear(2, 2)
    >>> before = fingerprint(layer)
    >>> _ = nn.init.constant_(layer.bias, 3.0)
    >>> fingerprint(layer) == before, len(before)
    (False, 64)
    """
    digest = hashlib.sha256()
    for name, tensor in chain(named_tensors(model), ((str(i), text) for i, text in enumerate(texts))):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Checkpoint:
    """Named pieces, tensors and JSON, in a folder. A piece is there whole or not at all.

    Args:
        folder: absent, empty, or of an earlier run of the same thing.
        run: what the run is, in JSON types: pieces of another one are not taken.

    Raises:
        ValueError: the folder holds something else, another run's pieces, or a damaged file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Checkpoint(folder, {"seed": 0}).save("first", {"x": torch.ones(2)}, {"rank": 3})
    ...     Checkpoint(folder, {"seed": 0}).load("first"), Checkpoint(folder, {"seed": 0}).load("second")
    (({'x': tensor([1., 1.])}, {'rank': 3}), None)
    """

    def __init__(self, folder: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        about = self.folder / _ABOUT
        run = json.loads(json.dumps(dict(run)))
        if about.is_file():
            try:
                before = json.loads(about.read_text())
            except ValueError as error:
                raise ValueError(f"{about} is damaged ({error}): delete {self.folder} to begin anew") from None
            different = sorted(key for key in run.keys() | before.keys() if run.get(key) != before.get(key))
            if different:
                what = ", ".join(different)
                raise ValueError(f"{self.folder} holds a run that differs in {what}: name another folder, or delete it")
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(f"{self.folder} is not empty and holds no checkpoint: name another folder")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(_ABOUT, lambda path: path.write_text(json.dumps(run, indent=1) + "\n"))

    def save(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep a piece. Raises OSError where it does not fit on the disk; what was there before stays."""
        metadata = {"about": json.dumps(dict(about))}
        self._write(f"{name}.safetensors", lambda path: write_tensors(path, tensors, metadata))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A piece that was kept, or None."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return tensors, json.loads(file.metadata()["about"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it to make it again") from None

    @staticmethod
    def remove(folder: str | os.PathLike[str]) -> None:
        """Delete the pieces in a checkpoint's folder, and the folder if nothing else is in it."""
        path = Path(folder)
        if not (path / _ABOUT).is_file():
            return
        for piece in [*path.glob("*.safetensors"), *path.glob("*.part"), path / _ABOUT]:
            piece.unlink(missing_ok=True)
        if not any(path.iterdir()):
            path.rmdir()

    def _write(self, name: str, write: Any) -> None:
        part = self.folder / f"{name}.part"
        try:
            write(part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        os.replace(part, self.folder / name)
