"""Recover a converted model: next-token training as released, or distillation from the original."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RECIPES = ("released", "distill")

Batch = dict[str, Tensor]
Data = Tensor | Iterable[Tensor | Mapping[str, Tensor]]


@dataclass
class TrainingReport:
    """What :func:`distill` did. ``to_dict`` is JSON-serialisable.

    Attributes:
        recipe: "released" or "distill".
        settings: every option that shaped the run.
        losses: the loss of each step, as it was minimised (nats a token, plus the weighted distillation terms).
        next_token: the next-token part of each step's loss, nats a token.
        validation: (steps done, mean next-token loss) pairs.
        tokens: input tokens that were trained on.
        seconds: wall-clock time, validation included.
    """

    recipe: str
    settings: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    next_token: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.losses)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "steps": self.steps}


def cosine_schedule(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Factor on the learning rate: linear warm-up over ``warmup`` steps, then a half cosine down to ``floor``.

    >>> [round(cosine_schedule(s, 10, 2), 2) for s in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.55, 0.13]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def next_token_loss(logits: Tensor, input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Mean cross-entropy of each token given those before it; where ``mask`` [B, T] is False, no target."""
    labels = input_ids if mask is None else input_ids.masked_fill(~mask, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


def divergence(student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    """Mean KL(teacher || student) over tokens of the distributions at ``temperature``, times temperature squared."""
    p = (teacher.float() / temperature).log_softmax(-1)
    q = (student.float() / temperature).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return (kl.mean() if mask is None else kl[mask].mean()) * temperature**2


def hidden_mismatch(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Mean over layers of |h_student - h_teacher|^2 / |h_teacher|^2, the embeddings left out."""
    terms = []
    for s, t in zip(student[1:], teacher[1:], strict=True):
        s, t = (s.float(), t.float()) if mask is None else (s[mask].float(), t[mask].float())
        terms.append((s - t).square().sum() / t.square().sum())
    return torch.stack(terms).mean()


def _as_batch(item: Any) -> Batch:
    batch = dict(item) if isinstance(item, Mapping) else {"input_ids": item}
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2 or ids.shape[1] < 2:
        what = f"a tensor {ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"data must give integer token ids [B, T] with T >= 2 (or dicts with them as input_ids); got {what}"
        )
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}; got {tuple(mask.shape)}"
        )
    return {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}


def _batches(data: Data, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Endless batches: rows of a tensor in a new random order each epoch, or an iterable's items over and over."""
    if isinstance(data, Tensor):
        _as_batch(data)
        while True:
            for rows in torch.randperm(len(data), generator=generator).split(batch_size):
                yield {"input_ids": data[rows]}
    seen = 0
    while True:
        start = seen
        for item in data:
            seen += 1
            yield _as_batch(item)
        if seen == start:
            raise ValueError(
                f"data ran out after {seen} batches; give more, or an iterable that can be gone through again"
            )


def _vocabulary(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    return getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "vocab_size", None)


def default_optimizer(model: nn.Module, *, lr: float, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    """AdamW as released: betas 0.9 and 0.95; weight decay on matrices, none on norms, biases and position factors."""
    factors = {id(p) for n, p in model.named_parameters() if "_factors." in n}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() >= 2 and id(p) not in factors]
    kept = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in kept], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95))


@torch.no_grad()
def validation_loss(model: nn.Module, data: Data, batch_size: int = 8) -> float:
    """Mean next-token loss over ``data`` (each batch weighted by its rows), in evaluation mode."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = rows = 0.0
    items: Iterable[Any] = data.split(batch_size) if isinstance(data, Tensor) else data
    for item in items:
        batch = {name: value.to(device) for name, value in _as_batch(item).items()}
        mask = batch.get("attention_mask")
        logits = model(**batch, use_cache=False).logits
        loss = next_token_loss(logits, batch["input_ids"], None if mask is None else mask.bool())
        total += loss.item() * len(logits)
        rows += len(logits)
    model.train(was_training)
    if not rows:
        raise ValueError("validation must hold at least one batch; got none")
    return total / rows


def _check(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Any,
    recipe: str,
    steps: int,
    positive: dict[str, float],
    not_negative: dict[str, float],
) -> None:
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a torch.nn.Module; got {type(student).__name__}")
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(map(repr, RECIPES))}; got {recipe!r}")
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an integer; got {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    for name, value in positive.items():
        if not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise ValueError(f"{name} must be a positive number; got {value!r}")
    for name, value in not_negative.items():
        if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            raise ValueError(f"{name} must be a number of at least 0; got {value!r}")
    if recipe == "distill" and teacher is None:
        raise ValueError('recipe="distill" needs a teacher; give the original model, or use recipe="released"')
    if teacher is student:
        raise ValueError("teacher must be another model than student; copy.deepcopy the model before converting it")
    if teacher is not None:
        own, other = _vocabulary(student), _vocabulary(teacher)
        if own != other:
            raise ValueError(f"teacher must have the student's vocabulary of {own} tokens; got {other}")
    if isinstance(data, Tensor) and data.numel() == 0:
        raise ValueError("data must hold at least one row; got none")
    vocabulary = _vocabulary(student)
    integers = isinstance(data, Tensor) and not data.is_floating_point()
    if integers and vocabulary and not (data.min() >= 0 and data.max() < vocabulary):
        raise ValueError(
            f"data must hold token ids from 0 to {vocabulary - 1}; got values from {int(data.min())} to "
            f"{int(data.max())}"
        )
    if not isinstance(data, (Tensor, Iterable)):
        raise TypeError(f"data must be a LongTensor [N, T] or an iterable of batches; got {type(data).__name__}")
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError("student has no parameter that requires a gradient; nothing can be trained")


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Data,
    *,
    recipe: str = "released",
    steps: int,
    batch_size: int = 8,
    lr: float = 1e-3,
    warmup: int | None = None,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    hidden_weight: float = 0.0,
    align_steps: int = 0,
    validation: Data | None = None,
    validate_every: int | None = None,
    optimizer: Callable[[nn.Module], Sequence[torch.optim.Optimizer]] | None = None,
    schedule: Callable[[int], float] | None = None,
    on_step: Callable[[int, TrainingReport], None] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TrainingReport:
    """Train a converted model in place until it is of use again.

    Recipe "released": next-token cross-entropy on all parameters, AdamW (betas 0.9, 0.95), weight decay 0.1, a cosine
    schedule with warm-up, gradients clipped to norm 1 (the released script of arXiv 2403.19928; its learning rate is
    3e-4 for 70 M parameters, small models want more). Recipe "distill" adds ``kl_weight`` times KL(teacher || student)
    of the next-token distributions, and ``hidden_weight`` times the relative distance of the hidden states; during
    the first ``align_steps`` steps only the latter counts.

    Args:
        student: the model to train; called as ``model(input_ids=..., attention_mask=..., use_cache=False)``.
        teacher: the original model. "released" may have None, and leaves a teacher unused.
        data: LongTensor [N, T], shuffled anew each epoch and cut into batches of ``batch_size`` rows, or an iterable
            of batches: tensors [B, T] or dicts with ``input_ids`` (and ``attention_mask``), gone through again when
                it ends.
        recipe: "released" or "distill".
        steps: optimiser steps.
        lr, weight_decay: of the default optimiser. ``warmup``: steps, by default a twentieth of ``steps``.
        clip: largest norm of the gradient.
        kl_weight, temperature, hidden_weight, align_steps: of "distill".
        validation, validate_every: data to measure on before the first, every so many, and after the last step.
        optimizer: makes other optimisers from the model; their learning rates are the peaks of the schedule.
        schedule: another factor on the learning rate, a function of the step.
        on_step: called after each step with (steps done, report so far).
        seed: of the shuffling.
        progress: show a bar.

    Returns:
        a :class:`TrainingReport`, also kept as ``student.freqrank_report``.

    Raises:
        TypeError, ValueError: an argument that cannot be right; the model is then as it was.
        FloatingPointError: the loss or a gradient is not finite. Names the step; the model is put back to the last
            state whose loss was finite, at most 50 steps earlier.
    """
    warmup = max(1, steps // 20) if warmup is None and isinstance(steps, int) else warmup
    _check(
        student, teacher, data, recipe, steps, {"lr": lr, "clip": clip, "temperature": temperature},
        {
            "weight_decay": weight_decay, "kl_weight": kl_weight, "hidden_weight": hidden_weight,
            "align_steps": align_steps, "warmup": 0 if warmup is None else warmup,
        },
    )  # fmt: skip
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer; got {seed!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1; got {batch_size!r}")
    if align_steps and recipe == "released":
        raise ValueError('align_steps needs recipe="distill"')
    assert warmup is not None
    settings: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "clip": clip, "seed": seed}
    if optimizer is None:
        settings |= {"lr": lr, "weight_decay": weight_decay}
    settings |= {"schedule": "cosine", "warmup": warmup} if schedule is None else {"schedule": "given"}
    if recipe == "distill":
        settings |= {
            "kl_weight": kl_weight, "temperature": temperature, "hidden_weight": hidden_weight,
            "align_steps": align_steps,
        }  # fmt: skip
    report = TrainingReport(recipe, settings)
    optimizers = (
        [default_optimizer(student, lr=lr, weight_decay=weight_decay)]
        if optimizer is None
        else list(optimizer(student))
    )
    settings["optimizers"] = [{"name": type(o).__name__, "lr": [g["lr"] for g in o.param_groups]} for o in optimizers]
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    batches = _batches(data, batch_size, torch.Generator().manual_seed(seed))
    device = next(student.parameters()).device
    wants_hidden = recipe == "distill" and (hidden_weight > 0 or align_steps > 0)
    was_training, teacher_was_training = student.training, teacher is not None and teacher.training
    good: list[Tensor] = [p.detach().clone() for p in trained]
    good_step = 0
    start = time.perf_counter()
    bar = _progress_bar(steps, progress)

    def measure(done: int) -> None:
        if validation is not None:
            report.validation.append((done, validation_loss(student, validation, batch_size)))

    def losses(batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        mask = None if mask is None else mask.bool()
        out = student(**batch, use_cache=False, **({"output_hidden_states": True} if wants_hidden else {}))
        ce = next_token_loss(out.logits, ids, mask)
        if recipe == "released":
            return ce, ce
        assert teacher is not None
        with torch.no_grad():
            target = teacher(**batch, use_cache=False, **({"output_hidden_states": True} if wants_hidden else {}))
        mismatch = hidden_mismatch(out.hidden_states, target.hidden_states, mask) if wants_hidden else 0.0
        if step < align_steps:
            assert isinstance(mismatch, Tensor)
            return mismatch, ce
        return ce + kl_weight * divergence(out.logits, target.logits, mask, temperature) + hidden_weight * mismatch, ce

    def stop(what: str, step: int) -> None:
        with torch.no_grad():
            for p, saved in zip(trained, good, strict=True):
                p.copy_(saved)
        raise FloatingPointError(
            f"{what} is not finite at step {step + 1}; the model is back at its state after step {good_step}. Lower lr "
            f"(now {lr}) or look at the batch"
        )

    try:
        student.train()
        if teacher is not None:
            teacher.eval()
        measure(0)
        for step in range(steps):
            factor = cosine_schedule(step, steps, warmup) if schedule is None else schedule(step)
            for o, peak in zip(optimizers, peaks, strict=True):
                for group, group_peak in zip(o.param_groups, peak, strict=True):
                    group["lr"] = group_peak * factor
            batch = {name: value.to(device) for name, value in next(batches).items()}
            loss, ce = losses(batch, step)
            if not math.isfinite(value := loss.item()):
                stop(f"the loss ({value})", step)
            if step - good_step >= 50:
                good_step = step
                for saved, p in zip(good, trained, strict=True):
                    saved.copy_(p.detach())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, clip)
            if not math.isfinite(norm.item()):
                stop("the gradient", step)
            for o in optimizers:
                o.step()
            for p in trained:
                p.grad = None
            report.losses.append(value)
            report.next_token.append(ce.item())
            report.tokens += batch["input_ids"].numel()
            report.seconds = time.perf_counter() - start
            if (validate_every and (step + 1) % validate_every == 0) or step + 1 == steps:
                measure(step + 1)
            if on_step is not None:
                on_step(step + 1, report)
            bar(value)
    finally:
        bar(None)
        for p in trained:
            p.grad = None
        student.train(was_training)
        if teacher is not None:
            teacher.train(teacher_was_training)
    report.seconds = time.perf_counter() - start
    student.freqrank_report = report  # type: ignore[assignment]
    return report


def _progress_bar(steps: int, show: bool) -> Callable[[float | None], None]:
    """A function to call with each step's loss, and with None at the end."""
    if not show:
        return lambda loss: None
    from tqdm.auto import tqdm

    bar = tqdm(total=steps, desc="training", unit="step")

    def advance(loss: float | None) -> None:
        if loss is None:
            bar.close()
        else:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

    return advance
