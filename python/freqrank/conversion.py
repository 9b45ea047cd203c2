"""`convert`: compress and linearise one model in one run, train it against the original, and say what it is now."""

from __future__ import annotations

import copy
import inspect
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from freqrank import _progress, evaluate, report
from freqrank.attention import distillation
from freqrank.attention.dijiang import DiJiangOptions, preset_options
from freqrank.attention.training.batches import Data, as_batch
from freqrank.attention.training.settings import Settings
from freqrank.conversion_report import MODELS, ConversionReport, Memory
from freqrank.models import compression, linearization
from freqrank.models.architectures import find_architecture
from freqrank.models.checkpoint import Checkpoint
from freqrank.models.costs import Cost, decoded_tokens, growth, measure, model_size, read_once
from freqrank.models.offload import is_offloaded

__all__ = ["ConversionReport", "check_options", "convert", "remove_checkpoint"]

#: Where the stages keep what is finished, in the folder of a checkpoint.
_PIECES = ("compression", "training")

#: Lengths beyond the longest measured one at which the report states memory, in multiples of it.
_BEYOND = (4, 16)

#: Where the quartiles of times are so far apart, the report says that the machine was busy.
_NOISY = 1.5

#: What `convert` gives each stage itself.
_OWN = {
    "compress_options": {"model", "calibration", "ratio", "method", "seed", "progress", "checkpoint"},
    "linearize_options": {"model", "feature_map", "seed", "options"},
    "distill_options": {
        "student", "teacher", "data", "recipe", "steps", "seed", "progress", "checkpoint", "tokenizer",
        "teacher_tokenizer",
    },
}  # fmt: skip


def convert(
    model: PreTrainedModel,
    calibration: Tensor | Iterable[Tensor] | Iterable[Mapping[str, Tensor]],
    training: Data | None,
    *,
    ratio: float = 0.2,
    method: str = "lisc",
    feature_map: str = "recommended",
    recipe: str | None = None,
    steps: int = 300,
    compress_options: Mapping[str, Any] | None = None,
    linearize_options: Mapping[str, Any] | None = None,
    distill_options: Mapping[str, Any] | None = None,
    held_out: Tensor | None = None,
    window: int | None = None,
    contexts: Sequence[int] | None = None,
    repeats: int = 5,
    keep_original: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ConversionReport:
    """Compress a model, make it linear-time, and train it against the original, in place.

    First :func:`freqrank.compress`, then :func:`freqrank.linearize`, then :func:`freqrank.distill` with a copy of the
    original as teacher, which repairs what both did at once. All options are checked before anything is changed. An
    error in the middle leaves the model as the last finished stage left it.

    Args:
        model: a transformers model of an architecture that :func:`freqrank.linearize` knows, dense and in memory.
        calibration: token ids, as for :func:`freqrank.compress`.
        training: token ids, as ``data`` of :func:`freqrank.distill`; None trains nothing.
        ratio, method: of :func:`freqrank.compress`.
        feature_map: of :func:`freqrank.linearize`: a whole combination of the layer's options, or a feature map.
        recipe: of :func:`freqrank.distill`; by default "align" with a copy of the original, else "released".
        steps: training steps.
        compress_options: further options of :func:`freqrank.compress`, such as ``{"group_size": 2}``.
        linearize_options: further ones of :func:`freqrank.linearize`: ``layers``, and options of the layer in place of
            those of ``feature_map``.
        distill_options: further ones of :func:`freqrank.distill`, such as ``{"lr": 1e-3, "batch_size": 4}``.
        held_out: integer ids [T] or [N, T]; the loss on them is measured at first and after each stage.
        window: tokens that the model sees at once there; by default what it was made for, at most 2048.
        contexts: lengths, at least two, at which time and memory of one sequence are measured, in turns for both
            models; by default an eighth of the model's context, at most 2048, and all of it. ``()`` measures nothing.
        repeats: how often a prompt is read at each; three times as many single tokens are timed.
        keep_original: keep a copy of the original beside the model, as a teacher and to be timed in turns. False takes
            less memory: the original is timed before the work, and ``recipe`` can only be "released".
        checkpoint: a folder where the stages keep what is finished. A run that was killed goes on there, given the same
            arguments. :func:`remove_checkpoint` deletes it once the model is saved.
        seed: of everything random.
        progress: show bars on standard error.

    Returns:
        a :class:`ConversionReport`, also kept as ``model.freqrank_report``.

    Raises:
        TypeError, ValueError: what the three functions raise, an option of theirs that is unknown or has a place of its
            own here, a wrong length, an offloaded model, one whose copy does not fit into memory. The model is then as
            it was.
        FloatingPointError: from training, see :func:`freqrank.distill`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=2, max_position_embeddings=64)
    >>> model, ids = LlamaForCausalLM(config), torch.randint(64, (8, 32))
    >>> report = convert(model, ids, ids, ratio=0.4, steps=2, repeats=1, progress=False)
    >>> report.training.steps, report.memory_per_token["original"], report.memory_per_token["converted"]
    (2, 512, 0)
    """
    start = time.perf_counter()
    options = check_options(
        training=training is not None, ratio=ratio, method=method, feature_map=feature_map, recipe=recipe, steps=steps,
        compress_options=compress_options, linearize_options=linearize_options, distill_options=distill_options,
        keep_original=keep_original, seed=seed,
    )  # fmt: skip
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel; got {type(model).__name__}")
    if is_offloaded(model):
        raise ValueError("the model's weights are offloaded, and linearize and distill need them in memory: load it")
    limit = _context(model)
    window = limit if window is None else window
    contexts = _contexts(contexts, limit, repeats)
    if contexts:
        _check_longest(model, contexts[-1])
    _rehearse(model, training, options, keep_original=keep_original)
    if keep_original:
        _check_room(model)
    folders = dict.fromkeys(_PIECES) if checkpoint is None else {name: Path(checkpoint) / name for name in _PIECES}

    seconds: dict[str, float] = {"checks": time.perf_counter() - start}
    costs: dict[str, list[Cost]] = {}
    losses: dict[str, float] = {}

    @contextmanager
    def stage(name: str, result: str) -> Iterator[None]:
        """Time a stage, and then measure the loss of what it left."""
        before = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - before
        if held_out is not None:
            losses[result] = evaluate.loss(model, held_out, window=window, progress=progress)

    def timed(models: dict[str, PreTrainedModel]) -> None:
        before = time.perf_counter()
        with _progress.bar("measure", len(contexts), progress and bool(contexts)) as advance:
            costs.update(measure(models, contexts, repeats, seed=seed, advance=advance))
        seconds["measuring"] = seconds.get("measuring", 0.0) + time.perf_counter() - before

    size = model_size(model)
    with stage("copy", "original"):
        original = copy.deepcopy(model).requires_grad_(False).eval() if keep_original else None
    if original is None:
        timed({"original": model})
    with stage("compress", "compressed"):
        compressed = compression.compress(
            model, calibration, seed=seed, progress=progress, checkpoint=folders["compression"], **options["compress"]
        )
    with stage("linearise", "linearised"):
        linearized = linearization.linearize(model, seed=seed, **options["linearize"])
    trained = None
    if training is not None:
        with stage("train", "trained"):
            trained = distillation.distill(
                model, original, training, seed=seed, progress=progress, checkpoint=folders["training"],
                **options["distill"],
            )  # fmt: skip
    timed({"converted": model} if original is None else {"original": original, "converted": model})

    done = ConversionReport(
        settings={
            "ratio": float(ratio), "method": method, "feature_map": feature_map, "keep_original": keep_original,
            "recipe": None if trained is None else trained.recipe, "steps": 0 if trained is None else steps,
            "seed": seed,
        },
        compression=compressed,
        linearization=linearized,
        training=trained,
        original=size,
        converted=model_size(model),
        losses=losses,
        held_out={} if held_out is None else {"tokens": held_out.numel(), "window": window},
        costs=costs,
        side_by_side=original is not None,
        machine=report.machine(),
        seconds=seconds,
    )  # fmt: skip
    _add_memory(done)
    done.notes += _notes(done, limit)
    model.freqrank_report = done  # type: ignore[assignment]
    return done


# --- checks -----------------------------------------------------------------------------------------------------------


def check_options(
    *,
    training: bool = True,
    ratio: float = 0.2,
    method: str = "lisc",
    feature_map: str = "recommended",
    recipe: str | None = None,
    steps: int = 300,
    seed: int = 0,
    compress_options: Mapping[str, Any] | None = None,
    linearize_options: Mapping[str, Any] | None = None,
    distill_options: Mapping[str, Any] | None = None,
    keep_original: bool = True,
) -> dict[str, dict[str, Any]]:
    """Raise what :func:`convert` raises for options that are wrong whatever the model and the data.

    Args:
        training: whether there is data to train on; the others as for :func:`convert`.

    Returns:
        the options of "compress", "linearize" and "distill", which is empty without training.

    >>> check_options(method="svd", distill_options={"lr": -1.0})
    Traceback (most recent call last):
        ...
    ValueError: lr must be a positive number; got -1.0
    """
    compress = {"ratio": ratio, "method": method, **_given("compress_options", compress_options, compression.compress)}
    compression.check_options(**compress, seed=seed)
    layer = [f.name for f in fields(DiJiangOptions)]
    given = _given("linearize_options", linearize_options, linearization.linearize, layer)
    preset_options(feature_map, **{name: value for name, value in given.items() if name in layer})
    linearize = {"feature_map": feature_map, **given}
    distill = _given("distill_options", distill_options, distillation.distill)
    if not training:
        if distill or recipe is not None:
            raise ValueError("recipe and distill_options are for training, and training is None: give it token ids")
        return {"compress": compress, "linearize": linearize, "distill": {}}
    distill |= {"recipe": recipe or ("align" if keep_original else "released"), "steps": steps}
    settings = _settings(distill, seed)
    if not keep_original and (settings.recipe != "released" or settings.train != "all"):
        raise ValueError(
            'keep_original=False leaves no teacher: it needs recipe="released" and train="all"; got '
            f"recipe={settings.recipe!r}, train={settings.train!r}"
        )
    if settings.train == "lora":
        raise ValueError(
            'distill_options must not hold train="lora": adapters cannot be merged into low-rank linears; use '
            'train="all" or train="attention"'
        )
    return {"compress": compress, "linearize": linearize, "distill": distill}


def _given(
    name: str, options: Mapping[str, Any] | None, function: Callable[..., Any], more: Iterable[str] = ()
) -> dict[str, Any]:
    """A stage's options as a dict of their own, if the stage has them (or ``more`` has) and `convert` does not."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"{name} must be a dict of options; got {type(options).__name__}")
    if own := sorted(options.keys() & _OWN[name]):
        raise ValueError(f"{name} must not hold {', '.join(own)}: convert has an argument for it, or sets it itself")
    known = [option for option in (*inspect.signature(function).parameters, *more) if option not in _OWN[name]]
    if unknown := sorted(options.keys() - set(known)):
        raise TypeError(f"unknown option {', '.join(unknown)} in {name}; it may hold {', '.join(known)}")
    return dict(options)


def _settings(options: Mapping[str, Any], seed: int) -> Settings:
    known = {f.name for f in fields(Settings) if f.init}
    return Settings(**{name: value for name, value in options.items() if name in known}, seed=seed)


def _rehearse(
    model: PreTrainedModel, training: Data | None, options: Mapping[str, Mapping[str, Any]], *, keep_original: bool
) -> None:
    """Raise what linearize and distill would raise for this model and data, on a copy that has the model's own tensors.

    What conversion adds to the copy is made, and gone at the end.
    """
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers())}
    student = copy.deepcopy(model, dict(tensors))
    linearization.linearize(student, **options["linearize"])
    if training is not None:
        settings = _settings(options["distill"], 0)
        distillation.check_models(student, model if keep_original else None, settings)
        _check_tokens("training", training, model)
        if (validation := options["distill"].get("validation")) is not None:
            _check_tokens("validation", validation, model)


def _check_tokens(name: str, data: Data, model: PreTrainedModel) -> None:
    if not isinstance(data, (Tensor, Iterable)) or isinstance(data, (str, bytes)):
        raise TypeError(f"{name} must be a LongTensor [N, T] or an iterable of batches; got {type(data).__name__}")
    vocabulary = model.config.get_text_config().vocab_size
    for item in [data] if isinstance(data, Tensor) else data if isinstance(data, (list, tuple)) else []:
        ids = as_batch(item)["input_ids"]
        if not ids.numel():
            raise ValueError(f"{name} must hold at least one row in each batch; got none")
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise ValueError(
                f"{name} must hold token ids from 0 to {vocabulary - 1}; got values from {int(ids.min())} to "
                f"{int(ids.max())}"
            )


def _contexts(contexts: Sequence[int] | None, limit: int, repeats: int) -> list[int]:
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats must be an integer of at least 1; got {repeats!r}")
    least = decoded_tokens(repeats) + 1
    if contexts is None:
        longest = max(limit, 2 * least)
        return [max(longest // 8, least), longest]
    chosen = list(contexts)
    if any(isinstance(context, bool) or not isinstance(context, int) for context in chosen):
        raise TypeError(f"contexts must hold integers; got {chosen}")
    if chosen and (len(chosen) < 2 or chosen != sorted(set(chosen)) or chosen[0] < least):
        raise ValueError(
            f"contexts must be empty, or two or more lengths in rising order from {least} tokens on, {least - 1} of "
            f"which repeats={repeats} reads one by one; got {chosen}"
        )
    return chosen


def _check_longest(model: PreTrainedModel, tokens: int) -> None:
    """Raise unless the model can read so many tokens: better now than after training."""
    table = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rotates = getattr(find_architecture(model).decoder, "rotary_emb", None) is not None
    if not rotates and table is not None and tokens > table:
        raise ValueError(f"contexts must not be longer than the model's table of {table} positions; got {tokens}")
    try:
        read_once(model, tokens)
    except RuntimeError as error:
        raise ValueError(f"contexts must be lengths that the model can read; {tokens} tokens fail: {error}") from error


def _context(model: PreTrainedModel) -> int:
    """Tokens that the model was made for, at most 2048."""
    return min(2048, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048)


def _check_room(model: PreTrainedModel) -> None:
    """Raise if memory is known not to hold a copy of the model."""
    needed, free = model_size(model).bytes, _free_bytes(model.device)
    if free is not None and free < needed:
        raise ValueError(
            f"a copy of the original, as teacher, takes {report.size(needed)}, and {report.size(free)} are free: "
            "keep_original=False does without"
        )


def _free_bytes(device: torch.device) -> int | None:
    """Free memory where that is known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines() if device.type == "cpu" else []
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


# --- the report -------------------------------------------------------------------------------------------------------


def _add_memory(done: ConversionReport) -> None:
    """What each model keeps of a sequence: as counted, and beyond where each layer's growth is known."""
    if not done.costs["original"]:
        return
    grown = {name: growth(done.costs[name]) for name in MODELS}
    for name, layers in grown.items():
        done.memory_per_token[name] = None if layers is None else sum(slope for _, slope in layers)
    for before, after in zip(*(done.costs[name] for name in MODELS), strict=True):
        done.memory.append(Memory(before.context, sum(before.layer_bytes), sum(after.layer_bytes), True))
    longest = done.memory[-1].context
    for context in (longest * factor for factor in _BEYOND):
        counts = {
            name: None if layers is None else sum(fixed + slope * context for fixed, slope in layers)
            for name, layers in grown.items()
        }
        if any(count is not None for count in counts.values()):
            done.memory.append(Memory(context, counts["original"], counts["converted"], False))


def _notes(done: ConversionReport, limit: int) -> list[str]:
    notes = []
    if done.training is None:
        notes.append("not trained: a linearised model predicts badly until it is; see freqrank.distill")
    elif done.compression.settings["storage"] is not None:
        notes.append(f"factors stored as {done.compression.settings['storage']} were not trained, all else was")
    if any(not memory.measured for memory in done.memory):
        notes.append(
            "memory beyond the measured lengths is exact: between them, each layer's bytes were either the same or "
            "grew by a whole number of bytes a token from 0"
        )
    slides = [name for name, count in done.memory_per_token.items() if count is None]
    if slides:
        notes.append(f"memory of the {' and '.join(slides)} model beyond the measured lengths depends on the length")
    if done.memory and done.memory[-1].context > limit:
        notes.append(f"lengths beyond the model's {limit:,} tokens show the cost, not the quality")
    if any(_spread(cost.token_times) > _NOISY for costs in done.costs.values() for cost in costs):
        notes.append(
            f"the machine was busy: quartiles of single tokens' times are more than {_NOISY}x apart; speeds are rough"
        )
    return notes + [f"compression: {note}" for note in done.compression.notes]


def _spread(times: Sequence[float]) -> float:
    """The third quartile over the first."""
    first, _, third = statistics.quantiles(times, n=4)
    return third / first


def remove_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Delete what :func:`convert` kept in a checkpoint's folder, and the folder if nothing else is in it."""
    path = Path(folder)
    for name in _PIECES:
        Checkpoint.remove(path / name)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
