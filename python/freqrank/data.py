"""The text that every machine has: the running Python's own standard-library source, as bytes.

Token ids are byte values (0..255), so no tokenizer is needed: ``list(text.encode())`` and ``bytes(ids)`` do its work.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

SPLITS = ("train", "validation", "test")

# Character tables and generated help texts are near-copies of one another: held out, they would flatter the loss.
_NEVER_HELD_OUT = ("encodings/", "pydoc_data/")

# Test suites are absent from some distributions' Python, so they are left out everywhere.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def stdlib_files() -> list[Path]:
    """Sorted source files of the running Python's standard library, test suites left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in root.rglob("*.py") if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def split_of(name: str) -> str | None:
    """Split that a source file belongs to, from the hash of its name: 1/20 test, 1/20 validation, the rest train.

    The name is the path relative to the standard library's folder, with forward slashes, so a file keeps its split
    from one machine and one Python version to the next. None for character tables and generated texts outside train.

    >>> split_of("argparse.py")
    'train'
    """
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 20
    split = {0: "test", 1: "validation"}.get(bucket, "train")
    return None if split != "train" and name.startswith(_NEVER_HELD_OUT) else split


def stdlib_bytes(split: str) -> Tensor:
    """The standard library's source text of one split as a 1-D int64 tensor of byte values.

    Files follow one another in the order of their names, each closed by a zero byte.

    Args:
        split: "train", "validation" or "test".

    Raises:
        ValueError: ``split`` is none of these.
        FileNotFoundError: this Python has no source files (a frozen or stripped installation).
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    root = Path(sysconfig.get_paths()["stdlib"])
    chosen = [path for path in stdlib_files() if split_of(path.relative_to(root).as_posix()) == split]
    if not chosen:
        raise FileNotFoundError(f"no standard-library source files under {root}; install Python's source modules")
    text = b"".join(path.read_bytes() + b"\0" for path in chosen)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def windows(ids: Tensor, length: int, count: int, *, seed: int = 0) -> Tensor:
    """``count`` random windows of ``length`` tokens from the 1-D ``ids``: a LongTensor [count, length].

    Raises:
        ValueError: ``ids`` is shorter than one window.
    """
    if ids.dim() != 1 or ids.numel() < length:
        raise ValueError(f"ids must be 1-D with at least {length} tokens; got shape {tuple(ids.shape)}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, ids.numel() - length + 1, (count, 1), generator=generator)
    return ids[starts + torch.arange(length)]


class RandomWindows:
    """Endless batches of random windows of a text: an iterable of LongTensors [batch, length]; each pass is the same.

    Raises:
        ValueError: ``ids`` is not 1-D or not longer than one window.

    >>> next(iter(RandomWindows(torch.arange(100), length=4, batch=2))).shape
    torch.Size([2, 4])
    """

    def __init__(self, ids: Tensor, length: int, batch: int, seed: int = 0) -> None:
        if ids.dim() != 1 or ids.numel() <= length:
            raise ValueError(f"ids must be 1-D with more than {length} tokens; got shape {tuple(ids.shape)}")
        self.ids, self.length, self.batch, self.seed = ids, length, batch, seed

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        offsets = torch.arange(self.length)
        while True:
            starts = torch.randint(0, self.ids.numel() - self.length, (self.batch, 1), generator=generator)
            yield self.ids[starts + offsets]
