"""Models whose weights stay on disk: each is read when it is needed and dropped again, what is found goes to disk too.

Such a model comes from `load_offloaded`, or from transformers with ``device_map={"": "disk"}``: its parameters are on
the meta device, and accelerate's hooks read a module's weights, from the safetensors files that they are in, whenever
it runs. Here are those hooks as compression needs them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from accelerate.utils.offload import PrefixedDataset
from torch import Tensor, nn

from freqrank._progress import quiet
from freqrank.lowrank.modules import LowRankLinear
from freqrank.models.files import read_tensor, write_tensors

__all__ = ["load_offloaded"]


def load_offloaded(source: str | os.PathLike[str], offload_folder: str | os.PathLike[str], **options: Any) -> Any:
    """A causal language model of `transformers` whose weights stay in the safetensors files of its folder.

    It runs, and can be compressed and saved, in the memory that one decoder block takes and the embeddings: a weight is
    read whenever it is needed. The files must stay where they are for as long as the model is used.

    Args:
        source: a model folder.
        offload_folder: what does not fit into memory is written here: factors that `freqrank.compress` finds, which
            stay, as they are the compressed model's weights, and hidden states while it runs.
        options: of ``AutoModelForCausalLM.from_pretrained``, ``dtype`` and others.

    Returns:
        The model, or what ``options`` say (``output_loading_info``).

    Raises:
        OSError: no such folder, or ``offload_folder`` cannot be made.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    ...                                  num_attention_heads=1)).save_pretrained(f"{folder}/model")
    ...     model = load_offloaded(f"{folder}/model", f"{folder}/offload")
    ...     model.lm_head.weight.device, model(torch.tensor([[1, 2, 3]])).logits.shape
    (device(type='meta'), torch.Size([1, 3, 8]))
    """
    from transformers import AutoModelForCausalLM

    # paths that still hold when the program goes to another folder
    place = os.path.abspath(source) if os.path.isdir(source) else source
    # accelerate warns that parameters are on the meta device: here they were asked to be
    with _unmapped(), quiet("accelerate.big_modeling"):
        loaded = AutoModelForCausalLM.from_pretrained(
            place, device_map={"": "disk"}, offload_folder=os.path.abspath(offload_folder), **options
        )
    adopt(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


@contextmanager
def _unmapped() -> Iterator[None]:
    """Let transformers read files and not map them all at once, see `read_tensor`: it has no option for that."""
    from transformers import modeling_utils
    from transformers.integrations import accelerate

    def reading(file: Any, framework: str = "pt", device: str = "cpu", **_: Any) -> Any:
        return safetensors.safe_open(file, framework=framework, device=device, backend="pread")

    users: tuple[Any, ...] = (modeling_utils, accelerate)
    before = [user.safe_open for user in users]
    try:
        for user in users:
            user.safe_open = reading
        yield
    finally:
        for user, own in zip(users, before, strict=True):
            user.safe_open = own


# --- hooks ------------------------------------------------------------------------------------------------------------


class OffloadedWeights(Mapping[str, Tensor]):
    """Tensors by name, read from disk whenever they are asked for.

    Args:
        index: for each name its "safetensors_file", maybe its "weight_name" in it and the "dtype" it is wanted in, as
            accelerate keeps them.
        rest: has what is not in a safetensors file.
    """

    def __init__(self, index: Mapping[str, Mapping[str, str]], rest: Mapping[str, Tensor]) -> None:
        self.index, self.rest = index, rest

    def __getitem__(self, name: str) -> Tensor:
        entry = self.index.get(name, {})
        if entry.get("safetensors_file") is None:
            return self.rest[name]
        tensor = read_tensor(entry["safetensors_file"], entry.get("weight_name", name))
        return tensor.to(getattr(torch, entry["dtype"])) if "dtype" in entry else tensor

    def __iter__(self) -> Iterator[str]:
        return iter({**self.index, **dict.fromkeys(self.rest)})

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedWeights:
        return self  # nothing of it changes

    def place(self, name: str) -> tuple[str, str] | None:
        """File and name in it: where it is the same, the tensor is."""
        entry = self.index.get(name, {})
        file = entry.get("safetensors_file")
        return None if file is None else (file, entry.get("weight_name", name))


class OffloadHook(AlignDevicesHook):
    """accelerate's hook, but a Parameter without data is the same object after a forward pass as before it.

    accelerate makes new ones each time, so that after the first pass nothing says that a basis is shared or a head
    tied any more, and both would be counted and saved twice.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.empty: dict[str, nn.Parameter] = {}

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.offload:
            self.empty |= _empty(module)
        return super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        output = super().post_forward(module, output)
        if self.offload:
            module._parameters.update(self.empty)
        return output


def _empty(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: held for name, held in module._parameters.items() if held is not None and held.is_meta}


def _hook(module: nn.Module) -> Any:
    """The hook that reads this module's weights, or None if they are in memory."""
    hook: Any = module.__dict__.get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload and h.weights_map is not None), None)


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights of a model, or of a module and what is in it, are read when they are needed."""
    return any(_hook(module) is not None and _empty(module) for module in model.modules())


def adopt(model: nn.Module) -> None:
    """Hooks of ours in place of accelerate's, and one Parameter again for each tensor on disk; what is ours stays."""
    sources: dict[int, OffloadedWeights] = {}
    first: dict[Any, nn.Parameter] = {}
    for module in model.modules():
        hook = _hook(module)
        if hook is None or isinstance(hook, OffloadHook):
            continue
        dataset = getattr(hook.weights_map, "dataset", hook.weights_map)
        prefix = getattr(hook.weights_map, "prefix", "")
        weights = sources.setdefault(id(dataset), OffloadedWeights(getattr(dataset, "index", {}), dataset))
        for name, parameter in _empty(module).items():
            place = weights.place(prefix + name)
            module._parameters[name] = parameter if place is None else first.setdefault(place, parameter)
        ours = OffloadHook(
            execution_device=hook.execution_device,
            offload=True,
            io_same_device=hook.io_same_device,
            weights_map=PrefixedDataset(weights, prefix),
            offload_buffers=hook.offload_buffers,
            place_submodules=hook.place_submodules,
            skip_keys=hook.skip_keys,
            tied_params_map=hook.tied_params_map,
        )
        whole: Any = module._hf_hook
        if whole is hook:
            add_hook_to_module(module, ours)
        else:
            ours.init_hook(module)
            whole.hooks = tuple(ours if h is hook else h for h in whole.hooks)


# --- reading ----------------------------------------------------------------------------------------------------------


def value(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a module, read if it is offloaded.

    >>> layer = nn.Linear(2, 2)
    >>> value(layer, "weight") is layer.weight
    True
    """
    held = getattr(module, name)
    if not held.is_meta:
        return held
    hook = _hook(module)
    if hook is None:
        raise ValueError(f"{type(module).__name__}.{name} has no data (meta device)")
    return hook.weights_map[name].to(hook.execution_device, held.dtype)


def device(module: nn.Module, name: str = "weight") -> torch.device:
    """Where a parameter is when it is computed with."""
    held = getattr(module, name)
    hook = _hook(module) if held.is_meta else None
    return held.device if hook is None else torch.device(hook.execution_device)


def run_device(model: nn.Module) -> torch.device:
    """Where a model's first parameter is when it is computed with."""
    return next(
        device(module, name) for module in model.modules() for name, _ in module.named_parameters(recurse=False)
    )


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The entries of the state dict, one after the other, read if offloaded.

    >>> [name for name, _ in named_tensors(nn.Linear(2, 2))]
    ['weight', 'bias']
    """
    for name, tensor in model.state_dict().items():
        owner, _, key = name.rpartition(".")
        yield name, value(model.get_submodule(owner), key) if tensor.is_meta else tensor


@contextmanager
def resident(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Read the weights of these modules, not of modules in them, once, and keep them until the end of the context."""
    held = []
    try:
        for module in modules:
            hook = _hook(module)
            if hook is None:
                continue
            empty = _empty(module)
            buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
            held.append((module, hook, empty, buffers))
            for name, parameter in empty.items():
                module._parameters[name] = nn.Parameter(value(module, name), requires_grad=parameter.requires_grad)
            for name in buffers:
                module._buffers[name] = value(module, name)
            hook.offload = False
        yield
    finally:
        for module, hook, empty, buffers in held:
            module._parameters.update(empty)
            module._buffers.update(buffers)
            hook.offload = True


# --- writing ----------------------------------------------------------------------------------------------------------


class HiddenStates:
    """A tensor or None for each batch; with a folder, in files in it that go with the object."""

    def __init__(self, count: int, folder: Path | None) -> None:
        self._held: list[Tensor | None] = [None] * count
        self._devices: dict[int, torch.device] = {}
        self._folder = None
        if folder is not None:
            self._folder = Path(tempfile.mkdtemp(prefix="hidden-", dir=folder))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, i: int) -> Tensor | None:
        if i not in self._devices:
            return self._held[i]
        return read_tensor(self._file(i), "x").to(self._devices[i])

    def __setitem__(self, i: int, x: Tensor) -> None:
        if self._folder is None:
            self._held[i] = x
        else:
            write_tensors(self._file(i), {"x": x})
            self._devices[i] = x.device

    def _file(self, i: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{i}.safetensors"


@contextmanager
def workspace(model: nn.Module) -> Iterator[Path | None]:
    """A new folder for what a run on an offloaded model must not hold in memory, None for a model in memory.

    It is in the model's ``offload_folder`` and stays, unless an exception comes: then it is removed.

    Raises:
        ValueError: the model was loaded without an ``offload_folder``.
        OSError: the folder cannot be written.
    """
    if not is_offloaded(model):
        yield None
        return
    adopt(model)
    folder = next((f for f in map(_offload_folder, model.modules()) if f is not None), None)
    if folder is None:
        raise ValueError(
            "the model's weights are offloaded, and it has no folder for what is found: load it with offload_folder=..."
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="freqrank-", dir=os.path.abspath(folder)))
    try:
        yield path
    except BaseException:
        discard(path)
        raise


def _offload_folder(module: nn.Module) -> str | None:
    hook = _hook(module)
    weights = getattr(getattr(hook, "weights_map", None), "dataset", None)
    return getattr(getattr(weights, "rest", None), "save_folder", None)


def discard(folder: Path | None) -> None:
    """Remove the folder of a workspace."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def note(folder: Path, size: int) -> str:
    """What a report says of a run with this workspace and an estimate of its memory."""
    return (
        "the model's weights were read from disk when they were needed, and hidden states were kept there: an "
        f"estimated {size:,} bytes of weights and Gram matrices were in memory at once, beside what was computed from "
        f"them. The weights of the low-rank linears are in {folder}, which must stay until the model is saved"
    )


def write_factors(path: Path, layers: Sequence[LowRankLinear]) -> None:
    """Write the factors of a group as the model gets them: the first layer's basis, and what each has of its own."""
    own = {f"weight.{i}": layer.weight.detach() for i, layer in enumerate(layers)}
    own |= {f"{name}.{i}": buffer for i, layer in enumerate(layers) for name, buffer in layer.named_buffers()}
    write_tensors(path, {"basis": layers[0].basis.detach(), **own})


def read_factors(layer: LowRankLinear, linear: nn.Module, file: Path, number: int) -> None:
    """Let ``layer``, without data, read its factors whenever it runs, and its bias as ``linear`` did; scales at once.

    Args:
        file: what `write_factors` wrote.
        number: which of its layers.
    """
    hook = _hook(linear)
    for name, _ in layer.named_buffers():
        setattr(layer, name, read_tensor(file, f"{name}.{number}").to(hook.execution_device))
    index = {
        name: {"safetensors_file": str(file), "weight_name": stored}
        for name, stored in (("basis", "basis"), ("weight", f"weight.{number}"))
    }
    ours = OffloadHook(
        execution_device=hook.execution_device,
        offload=True,
        io_same_device=hook.io_same_device,
        weights_map=OffloadedWeights(index, hook.weights_map),
        skip_keys=hook.skip_keys,
    )
    add_hook_to_module(layer, ours)
