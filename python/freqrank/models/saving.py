"""Writes a model folder whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from freqrank.models.files import disk_errors
from freqrank.models.offload import is_offloaded

__all__ = ["check_output_folder", "save_model"]

_CARD = """---
library_name: transformers
tags: [freqrank]
---

# {title}

{made}
The weights are safetensors. No code is stored here and none is run from here.
"""
_CONVERTED = """A language model {steps} by freqrank. It needs that library to be loaded:

```python
import freqrank  # before the model is loaded: transformers alone cannot read this folder
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

What was done to it is in `config.json` under `quantization_config`{report}.
A basis that layers share is stored once."""
_PLAIN = "A language model saved by freqrank. Plain transformers loads it: nothing in it needs that library."


def check_output_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Path of a folder that may be written: absent, empty, or, with `overwrite`, an older model folder.

    Raises ValueError otherwise. Cheap enough to be asked before hours of work.
    """
    path = Path(folder)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"output folder {path} is not a folder")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"output folder {path} cannot be made: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"output folder {path} cannot be made: {parent} is not writable")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"output folder {path} is not empty: name another one, or allow overwriting it")
        if not (path / "config.json").is_file():
            raise ValueError(f"output folder {path} holds something other than a model: it is not overwritten")
    return path


def save_model(
    model: Any,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
) -> Path:
    """Save `model` into `folder`: config, safetensors, model card, report, and `tokenizer` if given; returns the path.

    Everything is written into a temporary folder beside it, which is then renamed, so that a failure leaves nothing
    half-written and an older model intact. `model.freqrank_report`, if there is one, becomes `freqrank_report.json`.
    `max_shard_size`: as in `save_pretrained`; None is "5GB", and "500MB" for a model whose weights are offloaded, since
    a shard is in memory while it is written. Raises ValueError if the folder is not empty (see `check_output_folder`),
    OSError if it cannot be written.
    """
    path = check_output_folder(folder, overwrite=overwrite).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        target = temporary / path.name
        if max_shard_size is None:
            max_shard_size = "500MB" if is_offloaded(model) else "5GB"
        with warnings.catch_warnings(), disk_errors(target):
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            model.save_pretrained(target, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        report = getattr(model, "freqrank_report", None)
        if report is not None:
            (target / "freqrank_report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        (target / "README.md").write_text(_card(model, path.name, report is not None))
        if path.exists():
            os.rename(path, temporary / "old")
        os.rename(target, path)
    except BaseException:
        if (temporary / "old").exists() and not path.exists():
            os.rename(temporary / "old", path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _card(model: Any, title: str, has_report: bool) -> str:
    settings = getattr(model.config, "quantization_config", None)
    steps = {"compressed (low-rank weights)": "lowrank", "made linear-time": "linear_attention"}
    made = " and ".join(text for text, entry in steps.items() if getattr(settings, entry, None))
    report = ", with figures in `freqrank_report.json`" if has_report else ""
    return _CARD.format(title=title, made=_CONVERTED.format(steps=made, report=report) if made else _PLAIN)
