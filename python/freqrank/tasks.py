"""Benchmarks such as HellaSwag and PIQA through lm-evaluation-harness (`lm-eval`, an extra), on a model that is loaded.

So a compressed or a linearised model runs as any other does, without a detour over the hub.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any
from unittest import mock

from torch import nn

from freqrank._network import network
from freqrank._progress import quiet

__all__ = ["TaskResult", "run_tasks"]


@dataclass(frozen=True)
class TaskResult:
    """One task, or a group of tasks.

    Attributes:
        task: its name.
        metrics: by name, such as "acc"; where several filters make an answer of what a model wrote, "exact_match
            (strict-match)".
        errors: standard errors of some of them.
        examples: how many were scored; None for a group.
        shots: worked examples put before each question. A task may fix them, whatever was asked for.
        version: of the task, as lm-eval counts it.
    """

    task: str
    metrics: dict[str, float]
    errors: dict[str, float]
    examples: int | None
    shots: int | None
    version: str

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of JSON types."""
        return asdict(self)


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: str | os.PathLike[str] | None = None,
    download: bool = False,
    seed: int = 0,
) -> list[TaskResult]:
    """Score a model on tasks of lm-evaluation-harness.

    Args:
        model: a causal language model of transformers, compressed or linearised or neither.
        tokenizer: of transformers, or None: bytes.
        tasks: names of tasks, groups or tags of lm-eval, or of those in ``include_path``.
        num_fewshot: worked examples before each question; None: what the task says.
        limit: only the first so many examples of each task.
        batch_size: sequences that run together.
        include_path: a folder with more tasks, as YAML files.
        download: fetch data that is not in the local cache of the Hugging Face hub.
        seed: of everything that is drawn, the worked examples among it.

    Returns:
        One result a task, groups after the tasks they are made of.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: no tasks, an unknown one (the message names near ones), numbers out of range, a task whose data is
            not here and may not be fetched, that wants to run code, or whose metric is not among lm-eval's own.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(f"tasks need lm-evaluation-harness ({error}): pip install 'freqrank[eval]'") from None
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks must be names of tasks in a list, at least one; got {tasks!r}")
    for name, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an integer; got {value!r}")
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    if include_path is not None and not os.path.isdir(include_path):
        raise ValueError(f"include_path must be a folder with tasks as YAML files; got {os.fspath(include_path)!r}")

    was_training = model.training
    try:
        with quiet("lm_eval"), network(download), _no_metric_scripts() as refused:
            manager = _manager(tasks, include_path)
            _check_names(tasks, manager.all_tasks)
            wrapped = HFLM(
                pretrained=model,  # type: ignore[arg-type]
                backend="causal",
                tokenizer=byte_tokenizer() if tokenizer is None else tokenizer,
                batch_size=batch_size,
            )
            try:
                found: Any = lm_eval.simple_evaluate(
                    model=wrapped,
                    tasks=list(tasks),
                    num_fewshot=num_fewshot,
                    limit=limit,
                    batch_size=batch_size,
                    task_manager=manager,
                    log_samples=False,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
            except Exception as error:
                _check_metrics(refused)  # what follows from a metric that is not there says less
                if not isinstance(error, OSError):  # the hub's errors and those of an offline cache are
                    raise
                first = (str(error).splitlines() or [type(error).__name__])[0]
                advice = "" if download else "; it is fetched only with --download"
                raise ValueError(f"the data of a task cannot be read ({first}){advice}") from error
            _check_metrics(refused)
    finally:
        model.train(was_training)
    return [_result(name, found) for name in [*found["results"]]]


def _check_metrics(refused: Sequence[str]) -> None:
    if refused:
        raise ValueError(f"lm-eval has no metric called {refused[0]!r}, and no script is fetched from the hub for it")


def _result(name: str, found: dict[str, Any]) -> TaskResult:
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in found["results"][name].items():
        metric, comma, rule = key.partition(",")
        if not comma or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue  # "alias" and the like; an error that could not be estimated is "N/A"
        into = errors if metric.endswith("_stderr") else metrics
        label = metric.removesuffix("_stderr")
        into[label if rule == "none" else f"{label} ({rule})"] = float(value)
    counted = found["n-samples"].get(name)
    return TaskResult(
        task=name,
        metrics=metrics,
        errors=errors,
        examples=None if counted is None else int(counted["effective"]),
        shots=found["n-shot"].get(name),
        version=str(found["versions"].get(name, "")),
    )


def _manager(tasks: Sequence[str], include_path: str | os.PathLike[str] | None) -> Any:
    """An index of tasks, without lm-eval's own 12,000 files, which take seconds to read, where the folder suffices."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return _own_tasks()
    folder = os.fspath(include_path)
    alone = TaskManager(include_path=folder, include_defaults=False)
    # a group of the folder may be made of lm-eval's tasks
    return alone if set(tasks) <= set(alone.all_subtasks) else TaskManager(include_path=folder)


@cache
def _own_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=5)
            raise ValueError(
                f"no task is called {task!r}"
                + (f"; near: {', '.join(near)}" if near else f"; lm-eval has {len(known)}")
                + "; a folder with more is given by --include-path"
            )


def byte_tokenizer() -> Any:
    """A tokenizer whose ids are the bytes of a text, for models that have none; byte 0 ends a text.

    >>> byte_tokenizer()("aé")["input_ids"]
    [97, 195, 169]
    """
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers

    # the printable characters that byte-level tokenizers write bytes as: visible bytes are themselves
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    end = "<|endoftext|>"
    vocabulary = {end: 0} | {characters[byte]: byte for byte in range(1, 256)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=end))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end, unk_token=end)


@contextmanager
def _no_metric_scripts() -> Iterator[list[str]]:
    """A metric that lm-eval does not have would be a script from the hub; yields the names of those it asked for."""
    import evaluate

    refused: list[str] = []

    def refuse(name: str, *_: Any, **__: Any) -> Any:
        refused.append(name)
        raise ValueError(name)  # lm-eval goes on without the metric

    with mock.patch.object(evaluate, "load", refuse):
        yield refused
