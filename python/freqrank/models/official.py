"""Reads checkpoints of the released DiJiang code (github.com/YuchuanTian/DiJiang): GPT-NeoX models, by their tensors.

Beside what a GPT-NeoX model has, each ``attention`` of such a checkpoint holds

- ``proj_matrix`` [d, d] = C diag(t), the frozen frequencies, C the orthonormal DCT-II: here the map's ``scales`` t;
- ``D1`` and ``D2`` [1, H, n, 1], at first gamma^i and gamma^-j of each head and position: here the fixed decay gamma
  and the factors a = D1 / gamma^i, b = D2 gamma^j, which neither overflow nor vanish;
- ``W_G`` [hidden, hidden], multiplied from the right: here ``gate_proj``, its transpose;
- ``group_norm``: here ``norm``.

Names and shapes are facts about its files; no code of that repository is used.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, GPTNeoXConfig, GPTNeoXForCausalLM

from freqrank.attention.dijiang import DiJiangOptions, multiscale_log_decay
from freqrank.attention.feature_maps import dct_matrix
from freqrank.models.linearization import install
from freqrank.models.quantizer import attach

__all__ = ["load_official"]

_OWN = ("proj_matrix", "D1", "D2", "W_G", "group_norm.weight", "group_norm.bias")
_LAYER = re.compile(rf"(?P<attention>gpt_neox\.layers\.(?P<index>\d+)\.attention\.)(?P<name>{'|'.join(_OWN)})")
# made from the config: the table of angles, and the masks of old GPT-NeoX files
_DERIVED = re.compile(r"\.attention\.(rotary_emb\.inv_freq|bias|masked_bias)$")


def load_official(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    config: GPTNeoXConfig | None = None,
    dtype: torch.dtype | None = None,
) -> GPTNeoXForCausalLM:
    """A checkpoint of the released DiJiang code as a linearised model, on the CPU and in evaluation mode.

    It computes the released forward pass, in linear time and beyond the length of its tables, and is saved like any
    other linearised model: ``freqrank.save_model(load_official("theirs"), "ours")``.

    Args:
        source: a local folder with config.json and safetensors, or the tensors by their names.
        config: of the model; needed with tensors, and with a folder in place of its config.json.
        dtype: of the model's weights; None: what the file has for ``query_key_value``.

    Raises:
        TypeError: ``source`` is neither, ``config`` or ``dtype`` of another type.
        ValueError: no such folder, weights that are pickled or damaged, another kind of model; a tensor that is
            missing, left over or of another shape; a ``proj_matrix`` that is not C diag(t); entries of D1 or D2 that
            the file's dtype has lost (0, subnormal, infinite or NaN), or factors that ``dtype`` would lose.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be None or a floating-point torch.dtype; got {dtype!r}")
    if config is not None and not isinstance(config, GPTNeoXConfig):
        raise TypeError(f"config must be a GPTNeoXConfig; got {type(config).__name__}")
    folder = None
    if isinstance(source, Mapping):
        if config is None:
            raise ValueError("config must be given with tensors: transformers.GPTNeoXConfig(...)")
        if wrong := [name for name, x in source.items() if not isinstance(x, Tensor)]:
            raise TypeError(f"source must map names to tensors; got {type(source[wrong[0]]).__name__} for {wrong[0]!r}")
        tensors = {name: x.detach().clone() for name, x in source.items()}  # the model is trained in place
    elif isinstance(source, (str, os.PathLike)):
        folder = Path(source)
        config = config or _read_config(folder)
        tensors = _read_tensors(folder)
    else:
        raise TypeError(f"source must be a folder or a mapping of tensors; got {type(source).__name__}")
    if dtype is None:
        weights = [x for name, x in tensors.items() if name.endswith("attention.query_key_value.weight")]
        dtype = weights[0].dtype if weights else torch.float32
    tensors, length = _translated(tensors, config, dtype)
    config = copy.deepcopy(config)
    config.dtype = dtype
    config.__dict__.pop("auto_map", None)  # would send AutoModel to code that is not here
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config)
    model.gpt_neox.rotary_emb = type(model.gpt_neox.rotary_emb)(config)  # its numbers are in no file
    spec = {
        "layers": list(range(config.num_hidden_layers)),
        "options": DiJiangOptions(position_table=length).to_dict(),
    }
    install(model, spec)
    _check_names_and_shapes(tensors, model)
    model.load_state_dict(tensors, strict=False, assign=True)  # strict, but for a head that is tied
    model.tie_weights()
    attach(model, linear_attention=spec)
    if folder is not None and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _check_names_and_shapes(tensors: Mapping[str, Tensor], model: GPTNeoXForCausalLM) -> None:
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if missing := sorted(expected.keys() - found.keys() - tied):
        raise ValueError(f"checkpoint lacks {len(missing)} tensors: {', '.join(missing[:4])}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise ValueError(f"checkpoint has {len(unknown)} tensors that the model does not: {', '.join(unknown[:4])}")
    for name, shape in found.items():
        if shape != expected[name]:
            raise ValueError(f"{name} must be {list(expected[name])} by the config; got {list(shape)}")


def _translated(
    tensors: Mapping[str, Tensor], config: GPTNeoXConfig, dtype: torch.dtype
) -> tuple[dict[str, Tensor], int]:
    """The tensors under the names of a linearised model, and the length of the tables of D1 and D2."""
    log_decay = multiscale_log_decay(config.num_attention_heads)
    result: dict[str, Tensor] = {}
    own: dict[tuple[int, str], tuple[str, Tensor]] = {}
    for name, value in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is not None:
            own[int(match["index"]), match["name"]] = match["attention"], value
        elif not _DERIVED.search(name):
            result["lm_head.weight" if name == "embed_out.weight" else name] = value.to(dtype)
    expected = [(index, name) for index in range(config.num_hidden_layers) for name in _OWN]
    if expected != sorted(own, key=lambda key: (key[0], _OWN.index(key[1]))):
        differing = sorted({*expected} ^ {*own})
        shown = ", ".join(f"layers.{index}.attention.{name}" for index, name in differing[:4])
        raise ValueError(
            f"checkpoint must have {', '.join(_OWN)} in each attention of {config.num_hidden_layers} layers, as the "
            f"released DiJiang code writes them; missing or left over: {len(differing)}, such as {shown}"
        )
    lengths = {}
    for (index, name), (attention, value) in own.items():
        full = f"{attention}{name}"
        if name == "proj_matrix":
            result[f"{attention}feature_map.scales"] = _scales(full, value)
            result[f"{attention}decay.log_decay"] = log_decay.clone()
        elif name in ("D1", "D2"):
            factors = _factors(full, value, log_decay, name == "D1", dtype)
            result[f"{attention}{'query' if name == 'D1' else 'key'}_factors.weight"] = factors
            lengths[index, name] = factors.shape[1]
        elif name == "W_G":
            if value.dim() != 2:
                raise ValueError(f"{full} must be a matrix; got shape {tuple(value.shape)}")
            result[f"{attention}gate_proj.weight"] = value.T.contiguous().to(dtype)
        else:
            result[f"{attention}norm.{name.removeprefix('group_norm.')}"] = value.to(dtype)
    if len({*lengths.values()}) > 1:
        shown = ", ".join(f"{name} of layer {index}: {length}" for (index, name), length in lengths.items())
        raise ValueError(f"D1 and D2 must have as many positions in all layers; got {shown:.200}")
    return result, next(iter(lengths.values()))


def _scales(name: str, matrix: Tensor) -> Tensor:
    """t of matrix = C diag(t), in float32."""
    size = matrix.shape[-1]
    if matrix.shape != (size, size) or not matrix.isfinite().all():
        raise ValueError(f"{name} must be a finite square matrix; got shape {tuple(matrix.shape)}")
    dct = dct_matrix(size, torch.device("cpu"), dtype=torch.float64)
    columns = matrix.double()
    scales = (dct * columns).sum(0)  # the diagonal of C^T matrix
    error = (columns - dct * scales).norm(dim=0)
    rounding = max(torch.finfo(matrix.dtype).eps, torch.finfo(torch.float32).eps)
    allowed = 4 * rounding * scales.abs() + size * torch.finfo(matrix.dtype).tiny
    if not bool((error <= allowed).all()):
        worst = int((error - allowed).argmax())
        raise ValueError(
            f"{name} must be C diag(t), C the orthonormal DCT-II: column {worst} is {float(error[worst]):.2g} away "
            f"from {float(scales[worst]):.2g} times that of C, where rounding explains {float(allowed[worst]):.2g}"
        )
    return scales.float()


def _factors(name: str, table: Tensor, log_decay: Tensor, of_queries: bool, dtype: torch.dtype) -> Tensor:
    """a = D1 / gamma^i or b = D2 gamma^j, [H, n], from a table [1, H, n, 1]."""
    heads = len(log_decay)
    if table.dim() != 4 or table.shape[:2] != (1, heads) or table.shape[3] != 1 or table.shape[2] < 1:
        raise ValueError(f"{name} must be [1, {heads}, positions, 1]; got shape {tuple(table.shape)}")
    values = table[0, :, :, 0]
    _refuse_lost(name, values, "the file's")
    exponent = log_decay.double()[:, None] * torch.arange(values.shape[1], dtype=torch.float64)
    factors = (values.double() * torch.exp(-exponent if of_queries else exponent)).to(dtype)
    _refuse_lost(f"the factor of {name}", factors, "the model's")
    return factors


def _refuse_lost(name: str, values: Tensor, whose: str) -> None:
    """ValueError if entries [H, n] are no normal numbers of their dtype."""
    lost = ~values.isfinite() | (values.abs() < torch.finfo(values.dtype).tiny)
    if not bool(lost.any()):
        return
    shown = []
    for head in lost.any(1).nonzero()[:, 0].tolist():
        positions = lost[head].nonzero()[:, 0]
        shown.append(f"head {head}: {len(positions)} from position {int(positions[0])} to {int(positions[-1])}")
    more = f" and {len(shown) - 4} more heads" if len(shown) > 4 else ""
    raise ValueError(
        f"{name}: {whose} {values.dtype} has lost {int(lost.sum())} entries, which are 0, subnormal, infinite or NaN "
        f"({'; '.join(shown[:4])}{more}). "
        + ("Take a file in float32" if whose == "the file's" else "Give dtype=torch.float32")
    )


def _read_config(folder: Path) -> GPTNeoXConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no local folder with a config.json; nothing is downloaded")
    try:
        entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if entries.get("model_type") != "gpt_neox":
        raise ValueError(
            f"{path} has model_type {entries.get('model_type')!r}; the released code made 'gpt_neox' models only"
        )
    if "quantization_config" in entries:
        raise ValueError(f"{folder} was converted already: load it with AutoModelForCausalLM.from_pretrained")
    return GPTNeoXConfig.from_dict(entries)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{index} names files outside of its folder")
    else:
        names = ["model.safetensors"]
    if not all((folder / name).is_file() for name in names):
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if not pickled or index.is_file():
            raise ValueError(f"{folder} lacks weights: expected {', '.join(names)}")
        raise ValueError(
            f"{folder} has its weights in {pickled[0]}, a pickle, which may run code as it is opened and is not read. "
            "If you trust where it is from, convert it once, there: `import torch; from safetensors.torch import "
            f'save_file; x = torch.load("{pickled[0]}", weights_only=True); '
            'save_file({k: v.clone() for k, v in x.items()}, "model.safetensors")`'
        )
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt", backend="pread") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"the weights file {folder / name} is damaged or incomplete: {error}") from error
    return tensors
