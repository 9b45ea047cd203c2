"""Compressed and linearised models as transformers loads and saves them: settings in config.json, plain safetensors.

transformers calls `FreqrankQuantizer` while it loads a folder whose `quantization_config` says "freqrank": the modules
are swapped on the meta device, then the weights are read into them. Afterwards the model is an ordinary one. It keeps
its settings in ``model.config.quantization_config`` and nothing else of the quantization machinery, which would refuse
`half`, `float`, gathered state dicts and training for no reason here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from freqrank.lowrank.modules import STORAGES, Int8LowRankLinear, LowRankLinear, install_lowrank, shared_groups
from freqrank.models.registration import QUANT_METHOD

__all__ = ["FreqrankConfig", "FreqrankQuantizer", "attach", "declare_ties"]

_FORMAT = 2  # 1 knows no storage of groups


class FreqrankConfig(QuantizationConfigMixin):
    """What was done to a model, in JSON types: the `quantization_config` of its config.json.

    `lowrank`: ``{"groups": [{"modules": [name, ...], "rank": k}, ...], ...}``, the layers that share a basis, with
    ``"storage": "int8"`` where their factors are stored so, and whatever settings made them. `linear_attention`: what
    `freqrank.models.linearization.install` takes. `format` is the version of this layout that a reader must know; what
    is written is the lowest that will do. Raises ValueError for a layout that is newer than this library, or not one.

    >>> FreqrankConfig(lowrank={"groups": [{"modules": ["q_proj"], "rank": 4}]}).to_dict()["quant_method"]
    'freqrank'
    """

    def __init__(
        self,
        lowrank: Mapping[str, Any] | None = None,
        linear_attention: Mapping[str, Any] | None = None,
        format: int = 1,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if not isinstance(format, int) or format > _FORMAT:
            raise ValueError(f"quantization_config has format {format!r}, this freqrank reads up to {_FORMAT}")
        if quant_method != QUANT_METHOD or unknown:
            wrong = sorted(unknown) or f"quant_method={quant_method!r}"
            raise ValueError(f"quantization_config of freqrank may hold lowrank, linear_attention, format; got {wrong}")
        self.quant_method: Any = QUANT_METHOD
        self.lowrank = _json_copy("lowrank", lowrank)
        self.linear_attention = _json_copy("linear_attention", linear_attention)
        if self.lowrank is not None:
            groups = self.lowrank.get("groups")
            for group in groups if isinstance(groups, list) else [groups]:
                if not isinstance(group, dict) or not {"modules", "rank"} <= group.keys():
                    expected = "'groups', a list of {'modules': [name, ...], 'rank': k}"
                    raise ValueError(f"lowrank must hold {expected}; got {group!r:.200}")
                if group.get("storage") not in list(STORAGES):  # a list, since JSON may hold what has no hash
                    allowed = ", ".join(map(repr, STORAGES))
                    raise ValueError(f"storage of a group must be one of {allowed}; got {group['storage']!r}")
        groups = self.lowrank["groups"] if self.lowrank is not None else []
        self.format = 2 if any(group.get("storage") is not None for group in groups) else 1

    def to_dict(self) -> dict[str, Any]:
        """The settings as a new dictionary, without the conversions that were not made."""
        return {key: value for key, value in super().to_dict().items() if value is not None}


class FreqrankQuantizer(HfQuantizer):
    """Swaps the modules that a `FreqrankConfig` describes into a model before its weights are read."""

    requires_calibration = True  # a dense model cannot be converted while it loads: that is what `compress` does
    quantization_config: FreqrankConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        dense = _shapes(model)
        settings = self.quantization_config
        if settings.linear_attention is not None:
            from freqrank.models import linearization  # which imports more of transformers than is loaded by now

            linearization.install(model, settings.linear_attention)
        if settings.lowrank is not None:
            install_lowrank(model, _local_groups(model, settings.lowrank["groups"]))
        for module in model.modules():
            if isinstance(module, Int8LowRankLinear):  # left on disk they stay placeholders, which would be drawn anew
                for integers in (module.basis, module.weight):
                    integers._is_hf_initialized = True  # type: ignore[attr-defined]
        declare_ties(model)
        if checkpoint_files:
            _check_files(model, checkpoint_files, dense)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            model.__dict__.pop(name, None)
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.__dict__.pop("_is_quantized", None)
        return model

    def is_serializable(self) -> bool:
        """Whether the model can be saved: yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the model: yes."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the model's own weights can be trained: yes, they are ordinary parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` takes the model: yes."""
        return True


def attach(
    model: Any,
    *,
    lowrank: Mapping[str, Any] | None = None,
    linear_attention: Mapping[str, Any] | None = None,
) -> FreqrankConfig:
    """Write what was done to `model` into its config, beside what is there, so that `save_pretrained` just works.

    `lowrank` and `linear_attention` are the entries of `FreqrankConfig`; None leaves that entry as it is. Returns the
    settings, which are ``model.config.quantization_config`` from now on. Raises ValueError if the model is quantized by
    another method, or if the groups are not those of the model's low-rank layers; TypeError if a setting is not JSON.
    """
    present = getattr(model.config, "quantization_config", None)
    if present is not None and not isinstance(present, FreqrankConfig):
        raise ValueError(f"the model is already quantized by another method: {present}")
    entries = present.to_dict() if present is not None else {}
    if lowrank is not None:
        entries["lowrank"] = lowrank
    if linear_attention is not None:
        entries["linear_attention"] = linear_attention
    settings = FreqrankConfig(**entries)
    described = _local_groups(model, (settings.lowrank or {"groups": []})["groups"])
    expected = {frozenset(group["modules"]): (group["rank"], STORAGES[group.get("storage")]) for group in described}
    first = {frozenset(names): model.get_submodule(names[0]) for names in shared_groups(model)}
    actual = {names: (layer.rank, type(layer)) for names, layer in first.items()}
    if expected != actual:
        wrong = sorted(name for names, _ in expected.items() ^ actual.items() for name in names)
        raise ValueError(f"lowrank['groups'] does not describe the low-rank layers of the model: {_some(wrong)}")
    model.config.quantization_config = settings
    declare_ties(model)
    return settings


def _json_copy(name: str, value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dictionary, got {type(value).__name__}")
    try:
        return json.loads(json.dumps(dict(value)))
    except TypeError as error:
        raise TypeError(f"{name} must hold JSON types only: {error}") from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _local_groups(model: Any, groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups under the module names of `model`, which lack or have a prefix if it is not the class that was saved."""
    known = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."

    def local(name: str) -> str:
        candidates = (name, name.removeprefix(prefix), prefix + name)
        return next((candidate for candidate in candidates if candidate in known), name)

    return [{**group, "modules": [local(name) for name in group["modules"]]} for group in groups]


def declare_ties(model: Any) -> None:
    """Tell transformers which parameters are one, so that it saves the first only and ties the others on loading."""
    ties = {f"{name}.basis": f"{names[0]}.basis" for names in shared_groups(model) for name in names[1:]}
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        others = {k: v for k, v in (getattr(model, attribute, None) or {}).items() if not k.endswith(".basis")}
        setattr(model, attribute, others | ties)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if hasattr(tensor, "shape")}


def _check_files(model: Any, files: Sequence[str], dense: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError if the files are damaged or lack a tensor: transformers would warn and draw it at random.

    `dense` are the shapes before modules were swapped. Only headers are read.
    """
    stored: dict[str, tuple[int, ...]] = {}
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise ValueError(f"weights must be in safetensors files, got {path}")
        try:
            with safe_open(path, framework="pt", backend="pread") as file:  # mapping a large file may fail
                stored |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"the weights file {path} is damaged or incomplete: {error}") from error
    expected = _shapes(model)
    prefix = f"{model.base_model_prefix}."
    if not stored.keys() & expected.keys():  # saved with, or without, the head that this class adds
        bare = any(name.startswith(prefix) for name in stored)
        stored = {name.removeprefix(prefix) if bare else prefix + name: shape for name, shape in stored.items()}
    for target, source in model.all_tied_weights_keys.items():
        if target in stored:
            stored.setdefault(source, stored[target])
    for target, source in model.all_tied_weights_keys.items():
        if source in stored:
            stored.setdefault(target, stored[source])
    same_class = type(model).__name__ in (model.config.architectures or ())
    if same_class and expected.keys() <= stored.keys():
        ignored = "|".join(model._keys_to_ignore_on_load_unexpected or ()) or "(?!)"
        left_over = sorted(name for name in stored.keys() - expected.keys() if not re.search(ignored, name))
        if left_over:
            raise ValueError(f"config.json and weights disagree: the config says nothing of {_some(left_over)}")
    lowrank = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LowRankLinear))
    ours = {name for name, shape in expected.items() if dense.get(name) != shape or name.startswith(lowrank)}
    # Other tensors may be stored under other names (transformers converts them), then some name is left over; and a
    # class with a new head draws that at random, rightly.
    required = ours
    if stored.keys() <= expected.keys():
        required = {n for n in expected if n in ours or same_class or n.startswith(prefix) or model.base_model is model}
    missing = sorted(required - stored.keys())
    if missing:
        raise ValueError(f"the model folder is incomplete: its weights lack {_some(missing)}")
    for name in sorted(ours):
        if stored[name] != expected[name]:
            raise ValueError(
                f"config.json and weights disagree: {name} is {list(stored[name])} in the file, "
                f"{list(expected[name])} by the config"
            )


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(FreqrankConfig)
    register_quantizer(QUANT_METHOD)(FreqrankQuantizer)
