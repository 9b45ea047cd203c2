"""Makes `import freqrank` enough for transformers to read and write compressed and linearised models.

transformers takes seconds to import, so nothing of it is imported here: what has to be told to it is told at the
moment a program imports it, or at once if it is there already.

A folder that freqrank saved must not be read by a program that lacks freqrank: transformers skips a quantization
method it does not know, fills what it misses with random numbers and goes on. So `config.json` is *locked* on the way
out, and unlocked on the way in: one field that every model needs holds a sentence instead of its number. With freqrank
imported nobody sees it; without, the config classes of transformers, which check their types, stop and print it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

__all__ = ["QUANT_METHOD", "lock", "register", "unlock"]

QUANT_METHOD = "freqrank"
_NOTICE = "made by freqrank: run `import freqrank` before this model is loaded"
# the first of these that a config has is locked: the size of the vocabulary, or the sub-config that holds it
_LOCKED_FIELDS = ("vocab_size", "text_config")


def lock(config: dict[str, Any]) -> dict[str, Any]:
    """Copy of a model's config.json of ours that only a program which imported freqrank can use.

    >>> locked = lock({"vocab_size": 256, "quantization_config": {"quant_method": "freqrank"}})
    >>> locked["vocab_size"]
    'made by freqrank: run `import freqrank` before this model is loaded'
    >>> unlock(locked)
    {'vocab_size': 256, 'quantization_config': {'quant_method': 'freqrank'}}
    """
    field = next((field for field in _LOCKED_FIELDS if field in config), None)
    if field is None:
        raise ValueError(f"cannot save a model whose config has none of {_LOCKED_FIELDS}")
    settings = config["quantization_config"] | {"locked": {field: config[field]}}
    return config | {field: _NOTICE, "quantization_config": settings}


def unlock(config: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `lock`; any other config comes back as it is. ValueError if the locked value is gone."""
    if all(config.get(field) != _NOTICE for field in _LOCKED_FIELDS):
        return config
    settings = dict(config.get("quantization_config") or {})
    locked = settings.pop("locked", None)
    if not locked:
        raise ValueError("config.json is damaged: its quantization_config has lost the entry 'locked'")
    return config | locked | {"quantization_config": settings}


def register() -> None:
    """Tell transformers about freqrank, now if it is imported, else when it will be. Calling it again does nothing."""
    for name, action in _ACTIONS.items():
        module = sys.modules.get(name)
        if module is not None:
            action(module)
        else:
            _finder.waiting[name] = action
    if _finder.waiting and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _supported() -> bool:
    """Whether this transformers is one that models can be loaded with; an older one must still import as ever."""
    return int(sys.modules["transformers"].__version__.split(".")[0]) >= 5


def _register_config(module: ModuleType) -> None:
    """Lock and unlock where a config is written to and read from JSON, for all config classes at once."""
    if not _supported():
        return
    base: Any = module.PreTrainedConfig
    if getattr(base, "_freqrank_locks", False):
        return
    write, read = base.to_json_file, base._dict_from_json_file.__func__

    def to_json_file(self: Any, json_file_path: Any, use_diff: bool = True) -> None:
        settings = getattr(self, "quantization_config", None) or {}
        method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
        if method != QUANT_METHOD:
            return write(self, json_file_path, use_diff)
        text = json.dumps(lock(json.loads(self.to_json_string(use_diff=use_diff))), indent=2, sort_keys=True)
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(text + "\n")

    def _dict_from_json_file(cls: Any, json_file: Any) -> dict[str, Any]:
        return unlock(read(cls, json_file))

    base.to_json_file = to_json_file
    base._dict_from_json_file = classmethod(_dict_from_json_file)
    base._freqrank_locks = True


def _register_quantizer(module: ModuleType) -> None:
    if _supported():
        importlib.import_module("freqrank.models.quantizer")  # registers itself


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.configuration_utils": _register_config,
    "transformers.quantizers.auto": _register_quantizer,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are waited for as usual, and runs their action right after their own code."""

    def __init__(self) -> None:
        self.waiting: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        action = self.waiting.pop(fullname, None)
        if action is None:
            return None
        spec = importlib.util.find_spec(fullname)  # asks the other finders: this one no longer waits for the name
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, action)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, action: Callable[[ModuleType], None]) -> None:
        self.loader, self.action = loader, action

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.action(module)


_finder = _Finder()
