"""Recover a converted model: next-token training as released, distillation, or alignment in stages, then both."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from freqrank.attention.training.batches import Batch, Data, as_batch, batches, on, pack_documents
from freqrank.attention.training.objectives import next_token, recomputes
from freqrank.attention.training.parameters import ConvertedLayer, converted_layers, trained
from freqrank.attention.training.processes import Processes, unwrapped
from freqrank.attention.training.report import TrainingReport
from freqrank.attention.training.run import Run, default_optimizer
from freqrank.attention.training.settings import Settings, cosine_schedule

__all__ = ["TrainingReport", "cosine_schedule", "default_optimizer", "distill", "pack_documents", "validation_loss"]


def validation_loss(model: nn.Module, data: Data, batch_size: int = 8) -> float:
    """Mean next-token loss over all tokens of ``data`` that are a target, nats a token, in evaluation mode.

    Raises:
        ValueError: ``data`` holds no target, or is none, see :func:`distill`.
    """
    return _validation_loss(model, data, batch_size, Processes())


@torch.no_grad()
def _validation_loss(model: nn.Module, data: Data, batch_size: int, processes: Processes) -> float:
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    items: Iterable[Any] = data.split(batch_size) if isinstance(data, Tensor) else data
    try:
        for item in processes.turns(items):
            batch = on(as_batch(item), device)
            loss = next_token(model(**batch, use_cache=False).logits, batch)
            sums += torch.cat([loss.numerators, loss.denominators])
    finally:
        model.train(was_training)
    total, count = processes.sum({"sums": sums})["sums"].tolist()
    if not count:
        raise ValueError("validation must hold at least one token to predict; got none")
    return total / count


def _vocabulary(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    return getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "vocab_size", None)


def check_models(student: nn.Module, teacher: nn.Module | None, settings: Settings) -> None:
    """Raise TypeError or ValueError where :func:`distill` cannot train these with these settings."""
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a torch.nn.Module; got {type(student).__name__}")
    if teacher is None and settings.recipe != "released":
        raise ValueError(
            f'recipe="{settings.recipe}" needs a teacher; give the original model, or use recipe="released"'
        )
    if teacher is None and settings.new_lr is not None:
        raise ValueError("new_lr needs the teacher, which says what is new in the student")
    if teacher is None and settings.train != "all":
        raise ValueError(f"train={settings.train!r} needs the teacher, which says what is new in the student")
    if teacher is student:
        raise ValueError("teacher must be another model than student; copy.deepcopy the model before converting it")
    if teacher is not None:
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a torch.nn.Module or None; got {type(teacher).__name__}")
        own, other = _vocabulary(student), _vocabulary(teacher)
        if own is not None and other is not None and own != other:
            raise ValueError(f"teacher must have the student's vocabulary of {own} tokens; got {other}")
    if settings.precision == "bfloat16":
        for name, p in student.named_parameters():
            if p.is_floating_point() and p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f'precision="bfloat16" computes in bfloat16 and keeps float32 weights; {name} is {p.dtype}: call '
                    "student.float() first"
                )


def _check_tokenizers(tokenizer: Any, teacher_tokenizer: Any) -> None:
    if tokenizer is None and teacher_tokenizer is None:
        return
    if tokenizer is None or teacher_tokenizer is None:
        missing = "tokenizer" if tokenizer is None else "teacher_tokenizer"
        raise ValueError(f"tokenizer and teacher_tokenizer are compared with each other: give both; {missing} is None")
    for name, given in (("tokenizer", tokenizer), ("teacher_tokenizer", teacher_tokenizer)):
        if not hasattr(given, "get_vocab"):
            raise TypeError(f"{name} must have get_vocab, as transformers' tokenizers do; got {type(given).__name__}")
    own, other = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if own == other:
        return
    first = min((i, token) for token, i in own.items() ^ other.items())[0]
    tokens = [next((repr(token) for token, i in ids.items() if i == first), "none") for ids in (own, other)]
    raise ValueError(
        f"teacher_tokenizer must give the ids of tokenizer, since the teacher reads the same ids and its predictions "
        f"are compared token by token; the first that differs is {first}: {tokens[0]} in tokenizer, {tokens[1]} in "
        f"teacher_tokenizer (of {len(own)} and {len(other)} tokens)"
    )


def _check_data(data: Any, vocabulary: int | None, name: str = "data") -> None:
    if not isinstance(data, (Tensor, Iterable)):
        raise TypeError(f"{name} must be a LongTensor [N, T] or an iterable of batches; got {type(data).__name__}")
    if not isinstance(data, Tensor):
        return
    if data.numel() == 0:
        raise ValueError(f"{name} must hold at least one row; got none")
    as_batch(data)
    if vocabulary and not (data.min() >= 0 and data.max() < vocabulary):
        raise ValueError(
            f"{name} must hold token ids from 0 to {vocabulary - 1}; got values from {int(data.min())} to "
            f"{int(data.max())}"
        )


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Data,
    *,
    recipe: str = "released",
    steps: int,
    batch_size: int = 8,
    accumulate: int = 1,
    lr: float = 1e-3,
    new_lr: float | None = None,
    warmup: int | None = None,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    hidden_weight: float = 0.0,
    align_steps: int = 0,
    stages: Sequence[tuple[str, float]] | None = None,
    train: str = "all",
    lora_rank: int = 8,
    precision: str = "float32",
    checkpointing: bool = False,
    validation: Data | None = None,
    validate_every: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    optimizer: Callable[[nn.Module], Sequence[torch.optim.Optimizer]] | None = None,
    schedule: Callable[[int], float] | None = None,
    on_step: Callable[[int, TrainingReport], None] | None = None,
    tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> TrainingReport:
    """Train a converted model in place until it is of use again.

    Recipe "released": next-token cross-entropy on all parameters, AdamW (betas 0.9, 0.95), weight decay 0.1, a cosine
    schedule with warm-up, gradients clipped to norm 1 (the released script of arXiv 2403.19928; its learning rate is
    3e-4 for 70 M parameters, small models want more). Recipe "distill" adds ``kl_weight`` times KL(teacher || student)
    of the next-token distributions, and ``hidden_weight`` times the relative distance of the hidden states; during
    the first ``align_steps`` steps only the latter counts. Recipe "align" goes through ``stages``, one schedule over
    all of them:

    - "attention": each converted attention gives what the teacher's gives on the same input, the one that it has in
      the student; gradients stay inside it. Loss: squared error over the squared norm, summed over layers.
    - "hidden": the hidden states are the teacher's, end to end. Loss: the same fraction, its mean over layers.
    - "logits": the loss of "distill", next-token and ``kl_weight`` and ``hidden_weight`` times the others.
    - "next-token": that alone.

    Args:
        student: the model to train; called as ``model(input_ids=..., attention_mask=..., position_ids=...,
            use_cache=False)``, the second and third where the data has them.
        teacher: the original model. "released" may have None, and leaves a teacher unused.
        data: LongTensor [N, T], shuffled anew each epoch and cut into batches of ``batch_size`` rows, or an iterable
            of batches: tensors [B, T] or dicts with ``input_ids`` (and ``attention_mask``, ``position_ids``), gone
            through again when it ends.
        recipe: "released", "distill" or "align".
        steps: optimiser steps.
        accumulate: batches an optimiser step: to rounding what one batch of all their rows gives. Relative errors
            then need their norms first, for which the teacher (and in "attention" the student) runs once more.
        lr, weight_decay: of the default optimiser. ``warmup``: steps, by default a twentieth of ``steps``.
        new_lr: learning rate of the parameters that the teacher has none of (gates, maps, decays), which have further
            to go than pretrained ones; by default ``lr``.
        clip: largest norm of the gradient.
        kl_weight, temperature, hidden_weight: of "distill" and "align". ``align_steps``: of "distill".
        stages: of "align": pairs of a name and its fraction of the steps; by default attention 0.2, hidden 0.2,
            logits 0.5, next-token 0.1.
        train: "all" (what requires a gradient), "attention" (the converted attention modules) or "lora" (what the
            teacher has not, and adapters of rank ``lora_rank`` beside the other linears of the blocks, merged in the
            end; needs peft). The last two need a teacher.
        precision: "float32", or "bfloat16": computed by autocast, weights stay as they are.
        checkpointing: keep the activations of one block at a time and compute the others again: less memory, more time.
        validation, validate_every: data to measure on before the first, every so many, and after the last step.
        checkpoint, checkpoint_every: a folder, where the run's state is kept every so many steps, and at the end. A run
            with the same arguments that was killed goes on there and ends with the same bits. Batches of an iterable
            are gone through once more up to there; of ``optimizer`` the state counts, of ``schedule`` nothing.
        optimizer: makes other optimisers from the model; their learning rates are the peaks of the schedule.
        schedule: another factor on the learning rate, a function of the step.
        on_step: called after each step with (steps done, report so far).
        tokenizer, teacher_tokenizer: both or none; they are compared, and must give the same ids.
        seed: of the shuffling.
        progress: show a bar.

    Under ``torchrun`` or ``accelerate launch`` the processes share the work, by accelerate: each goes through the same
    data and takes its rows of every batch (or its batches, where ``accumulate`` is a multiple of their number), models
    are moved to its device, the main process's weights count, and results are those of one process to rounding. The
    main process alone writes, shows the bar and calls ``on_step``.

    Returns:
        a :class:`TrainingReport`, also kept as ``student.freqrank_report``.

    Raises:
        TypeError, ValueError: an argument that cannot be right; the model is then as it was. A checkpoint of other
            arguments, which the message names.
        FloatingPointError: the loss, a gradient or a parameter is not finite. Names the step and the first module whose
            output or gradient is not; the model is put back to the last state whose loss was finite, at most 50 steps
            earlier, and a checkpoint stays what it was.
        ImportError: train="lora" without peft, or ``checkpoint`` or several processes without the extra "models".

    >>> class Bigrams(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.table = nn.Embedding(4, 4)
    ...     def forward(self, input_ids, use_cache=False):
    ...         return type("Output", (), {"logits": self.table(input_ids)})
    >>> data = torch.tensor([[0, 1, 2, 3]]).repeat(8, 2)
    >>> report = distill(Bigrams(), None, data, steps=30, lr=0.3, progress=False)
    >>> report.steps, report.tokens, report.losses[-1] < 0.1
    (30, 1920, True)
    """
    settings = Settings(
        recipe, steps, batch_size, accumulate, clip, seed, lr, weight_decay, warmup, kl_weight, temperature,
        hidden_weight, align_steps, stages, train, lora_rank, precision, checkpointing, new_lr,
    )  # fmt: skip
    given = student
    student, teacher = unwrapped(student), unwrapped(teacher)
    check_models(student, teacher, settings)
    _check_tokenizers(tokenizer, teacher_tokenizer)
    _check_data(data, _vocabulary(student))
    if validation is not None:
        _check_data(validation, _vocabulary(student), "validation")
    for name, count in (("validate_every", validate_every), ("checkpoint_every", checkpoint_every)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"{name} must be an integer of at least 1; got {count!r}")
    for name, function in (("optimizer", optimizer), ("schedule", schedule), ("on_step", on_step)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function; got {type(function).__name__}")
    layers: list[ConvertedLayer] = []
    if train == "attention" or any(stage == "attention" for stage, _ in settings.plan):
        assert teacher is not None
        layers = converted_layers(student, teacher)
    processes = Processes.find()
    processes.place(student, teacher)
    started = {} if checkpoint is None else _fingerprints(student, teacher, data)
    with ExitStack() as stack:
        stack.enter_context(trained(student, teacher, train, layers=layers, lora_rank=lora_rank, seed=seed))
        if not any(p.requires_grad for p in student.parameters()):
            raise ValueError("student has no parameter that requires a gradient; nothing can be trained")
        stack.enter_context(_modes(student, teacher))
        if checkpointing:
            stack.enter_context(_checkpointing(student))
        run = Run(student, teacher, layers, settings, optimizer, schedule, processes)
        stack.callback(run.clear_gradients)
        source = batches(data, batch_size, torch.Generator().manual_seed(seed))
        if checkpoint is not None:
            run.resume(checkpoint, {**run.report.settings, **started}, source)
        bar = stack.enter_context(_progress_bar(run.report.steps, steps, progress and processes.is_main))
        _train(run, source, validation, validate_every, checkpoint_every, on_step, bar)
    student.freqrank_report = given.freqrank_report = run.report  # type: ignore[assignment]
    return run.report


def _train(
    run: Run,
    source: Iterator[Batch],
    validation: Data | None,
    validate_every: int | None,
    checkpoint_every: int,
    on_step: Callable[[int, TrainingReport], None] | None,
    bar: Callable[[float], None],
) -> None:
    """The training loop."""
    settings, report = run.settings, run.report
    start = time.perf_counter() - report.seconds

    def measure() -> None:
        if validation is not None:
            loss = _validation_loss(run.student, validation, settings.batch_size, run.processes)
            report.validation.append((report.steps, loss))

    if report.steps == 0:
        measure()
    while report.steps < settings.steps:
        run.step([next(source) for _ in range(settings.accumulate)])
        done = report.steps
        if (validate_every and done % validate_every == 0) or done == settings.steps:
            measure()
        report.seconds = time.perf_counter() - start
        if done % checkpoint_every == 0 or done == settings.steps:
            run.save()
        if on_step is not None and run.processes.is_main:
            on_step(done, report)
        bar(report.losses[-1])


def _fingerprints(student: nn.Module, teacher: nn.Module | None, data: Data) -> dict[str, str | None]:
    """What a run starts from, so that a checkpoint of another start is known as such; an iterable cannot be read."""
    from freqrank.models.checkpoint import fingerprint

    held = [data] if isinstance(data, Tensor) else data if isinstance(data, (list, tuple)) else []
    tensors = [tensor for item in held for tensor in as_batch(item).values()]
    return {
        "student": fingerprint(student),
        "teacher": None if teacher is None else fingerprint(teacher),
        "data": fingerprint(nn.Module(), *tensors) if tensors else None,
    }


@contextmanager
def _modes(student: nn.Module, teacher: nn.Module | None) -> Iterator[None]:
    """The student in training mode, the teacher in evaluation mode, and both back again."""
    models = [model for model in (student, teacher) if model is not None]
    before = [model.training for model in models]
    try:
        for model in models:
            model.train(model is student)
        yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)


@contextmanager
def _checkpointing(student: nn.Module) -> Iterator[None]:
    """Activation checkpointing as transformers does it, unless it is on already."""
    model: Any = student
    # names before and since transformers 5.24
    old, new = (getattr(model, f"{kind}_checkpointing_enable", None) for kind in ("gradient", "activation"))
    enable = new or old
    if enable is None:
        raise ValueError(
            "checkpointing=True needs a student with gradient_checkpointing_enable, as transformers models have it; "
            f"got {type(student).__name__}"
        )
    if recomputes(student):
        yield
        return
    had_hooks = bool(getattr(model, "_require_grads_hooks", None))
    enable({"use_reentrant": False})
    try:
        yield
    finally:
        (model.activation_checkpointing_disable if new else model.gradient_checkpointing_disable)()
        if not had_hooks:  # they come with checkpointing and would stay
            model.disable_input_require_grads()


@contextmanager
def _progress_bar(done: int, steps: int, show: bool) -> Iterator[Callable[[float], None]]:
    """A function to call with each step's loss."""
    if not show:
        yield lambda loss: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=steps, initial=done, desc="training", unit="step") as bar:

        def advance(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        yield advance
