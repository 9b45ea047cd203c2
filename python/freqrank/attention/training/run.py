"""A model in training: one step after the other, put back where a number is not finite, kept on disk and resumed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from freqrank.attention.training import diagnosis, state
from freqrank.attention.training.batches import Batch, on
from freqrank.attention.training.objectives import Objective
from freqrank.attention.training.parameters import ConvertedLayer
from freqrank.attention.training.processes import Processes
from freqrank.attention.training.report import TrainingReport
from freqrank.attention.training.settings import Settings, cosine_schedule

if TYPE_CHECKING:
    from freqrank.models.checkpoint import Checkpoint

#: At most so many steps lie between a loss that is not finite and the state that the model is put back to.
_STEPS_BETWEEN_COPIES = 50

#: What a checkpoint's only piece is called.
_PIECE = "training"


def default_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    new_lr: float | None = None,
    teacher: nn.Module | None = None,
) -> torch.optim.Optimizer:
    """AdamW as released: betas 0.9 and 0.95; weight decay on matrices, none on norms, biases and position factors.

    ``new_lr`` is the learning rate of what ``teacher`` has no parameter of that name for; None: ``lr``.
    """
    factors = {id(p) for n, p in model.named_parameters() if "_factors." in n}
    known = {name for name, _ in teacher.named_parameters()} if teacher is not None else set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = lr if new_lr is None or name in known else new_lr
            decay = weight_decay if p.dim() >= 2 and id(p) not in factors else 0.0
            groups.setdefault((rate, decay), []).append(p)
    chosen = [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]
    return torch.optim.AdamW(chosen, lr=lr, betas=(0.9, 0.95))


class Run:
    """A model in training: its optimisers, its objectives, its last good state, its checkpoint, and the report."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        layers: Sequence[ConvertedLayer],
        settings: Settings,
        optimizer: Callable[[nn.Module], Sequence[torch.optim.Optimizer]] | None,
        schedule: Callable[[int], float] | None,
        processes: Processes,
    ) -> None:
        self.student, self.teacher, self.settings, self.processes = student, teacher, settings, processes
        self.device = next(student.parameters()).device
        if optimizer is None:
            made = default_optimizer(
                student, lr=settings.lr, weight_decay=settings.weight_decay, new_lr=settings.new_lr, teacher=teacher
            )
            self.optimizers = [made]
        else:
            self.optimizers = list(optimizer(student))
        self.peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.trained = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        names = {id(p): name for name, p in student.named_parameters()}
        self.names = [names.get(id(p), f"other.{i}") for i, p in enumerate(self.trained)]
        self.schedule = schedule or self._cosine
        self.good, self.good_step = [p.detach().clone() for p in self.trained], 0
        self.checkpoint: Checkpoint | None = None
        self.objectives = {
            name: Objective(
                student,
                teacher,
                settings.weights(name),
                layers=layers,
                temperature=settings.temperature,
            )
            for name, _ in settings.plan
        }
        shown = settings.to_dict() | {"schedule": "cosine" if schedule is None else "given"}
        for name in ["lr", "new_lr", "weight_decay"] * (optimizer is not None) + ["warmup"] * (schedule is not None):
            shown.pop(name, None)
        shown["optimizers"] = [
            {"name": type(o).__name__, "lr": peaks} for o, peaks in zip(self.optimizers, self.peaks, strict=True)
        ]
        if processes.count > 1:
            shown["processes"] = processes.count
        self.report = TrainingReport(settings.recipe, shown)

    def _cosine(self, step: int) -> float:
        assert self.settings.warmup is not None
        return cosine_schedule(step, self.settings.steps, self.settings.warmup)

    def step(self, micro_batches: list[Batch]) -> None:
        """One optimiser step."""
        step = self.report.steps
        factor = self.schedule(step)
        for o, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(o.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        stage = self.settings.stage(step)
        objective = self.objectives[stage]
        own = [(on(batch, self.device), counts) for batch, counts in self.processes.share(micro_batches)]
        values = self.backward(objective, own)
        loss = sum(weight * values[name] for name, weight in objective.weights.items())
        if not math.isfinite(loss):
            self.stop(f"the loss ({loss})", step, self.where(self.first_output(objective, own)))
        if step - self.good_step >= _STEPS_BETWEEN_COPIES:
            self.keep(step)
        self.processes.sum_gradients(self.trained)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.settings.clip).item()
        if not math.isfinite(norm):
            self.stop("the gradient", step, self.where(self.first_gradient(objective, own)))
        for o in self.optimizers:
            _step(o)
        self.clear_gradients()
        report = self.report
        report.losses.append(loss)
        report.next_token.append(values["next-token"])
        report.stages.append(stage)
        report.learning_rates.append(self.optimizers[0].param_groups[0]["lr"])
        report.gradient_norms.append(norm)
        report.tokens += sum(batch["input_ids"].numel() for batch in micro_batches)

    def backward(self, objective: Objective, own: Sequence[tuple[Batch, float]]) -> dict[str, float]:
        """Leave this process's part of the loss's gradient in the parameters; return each loss, of all processes.

        ``own`` are its batches of this step, and whether they count. The denominators of all come first; where there is
        one batch, they are those that its losses have.
        """
        autocast = self.autocast()
        denominators: dict[str, Tensor] | None = None
        if len(own) > 1:
            denominators = {}
            for batch, counts in own:
                with autocast:
                    found = objective.denominators(batch)
                denominators = {name: denominators.get(name, 0) + value * counts for name, value in found.items()}
            denominators = self.processes.sum(denominators)
        values: dict[str, Tensor] = {}
        for batch, counts in own:
            with autocast:
                terms = objective(batch)
            if denominators is None:
                denominators = self.processes.sum({name: term.denominators * counts for name, term in terms.items()})
            parts = {n: (term.numerators * counts / denominators[n]).sum() for n, term in terms.items()}
            torch.stack([w * parts[n] for n, w in objective.weights.items()]).sum().backward()
            for name, part in parts.items():
                values[name] = values.get(name, 0) + part.detach()[None]
        names = list(values)
        return dict(zip(names, torch.cat(list(self.processes.sum(values).values())).tolist(), strict=True))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def clear_gradients(self) -> None:
        for p in self.trained:
            p.grad = None

    @torch.no_grad()
    def keep(self, step: int) -> None:
        """Take the parameters, as they are after ``step`` steps, for the last good ones."""
        self.good_step = step
        torch._foreach_copy_(self.good, self.trained)

    def stop(self, what: str, step: int, where: str = "") -> NoReturn:
        """Put the model back to its last good state, and raise."""
        with torch.no_grad():
            torch._foreach_copy_(self.trained, self.good)
        raise FloatingPointError(
            f"{what} is not finite at step {step + 1}; {where}the model is back at its state after step "
            f"{self.good_step}. Lower lr (now {self.peaks[0][0]}) or look at the batch"
        )

    def where(self, found: str | None) -> str:
        """What one of the processes found, in words."""
        first = next((name for name in self.processes.gather(found) if name is not None), None)
        return f"the first such number is in {first}; " if first else "no module gives such a number by itself; "

    def first_output(self, objective: Objective, own: Sequence[tuple[Batch, float]]) -> str | None:
        def again() -> None:
            for batch, _ in own:
                with self.autocast():
                    objective(batch)

        models = {"": self.student} | ({} if self.teacher is None else {"the teacher's ": self.teacher})
        return diagnosis.first_output(models, again)

    def first_gradient(self, objective: Objective, own: Sequence[tuple[Batch, float]]) -> str | None:
        # behind all modules, in the order of the backward pass
        names = [n for n, p in self.student.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]

        def again() -> None:
            for batch, _ in own:
                with self.autocast():
                    terms = objective(batch)
                sum((w * terms[n].value() for n, w in objective.weights.items()), torch.zeros(())).backward()

        found = diagnosis.first_gradient({"": self.student}, again)
        return found or (f"the gradient of {names[-1]}" if names else None)

    def resume(self, folder: str | os.PathLike[str], about: dict[str, Any], source: Iterator[Batch]) -> None:
        """Use a checkpoint's folder; go on from the state in it, if there is one, past the batches that it has seen."""
        from freqrank.models.checkpoint import Checkpoint

        about = {**about, "device": self.device.type}
        self.checkpoint = self.processes.main_first(lambda: Checkpoint(folder, about))
        if (kept := self.checkpoint.load(_PIECE)) is None:
            return
        tensors, values = kept
        with torch.no_grad():
            for name, p in zip(self.names, self.trained, strict=True):
                p.copy_(tensors[f"parameter.{name}"])
        state.optimizers_from_tensors(self.optimizers, tensors, values["optimizers"])
        state.report_from_tensors(self.report, tensors, values["report"])
        self.keep(self.report.steps)
        for _ in range(self.report.steps * self.settings.accumulate):
            next(source)
        state.set_random_state(self.device, tensors, self.processes)

    def save(self) -> None:
        """Keep the run's state in its checkpoint, if it has one; parameters that are not finite are not kept."""
        if self.checkpoint is None:
            return
        for name, p in zip(self.names, self.trained, strict=True):
            if not p.isfinite().all():
                self.stop(f"parameter {name}", self.report.steps - 1)
        tensors = {f"parameter.{name}": p for name, p in zip(self.names, self.trained, strict=True)}
        kept, plain = state.optimizers_to_tensors(self.optimizers)
        series, values = state.report_to_tensors(self.report)
        tensors |= kept | series | state.random_state(self.device, self.processes)
        if self.processes.is_main:
            self.checkpoint.save(_PIECE, tensors, {"optimizers": plain, "report": values})


def _step(optimizer: torch.optim.Optimizer) -> None:
    """Step with what has a gradient: a stage may leave parameters out, and not every optimiser skips these."""
    everything = [group["params"] for group in optimizer.param_groups]
    for group, params in zip(optimizer.param_groups, everything, strict=True):
        group["params"] = [p for p in params if p.grad is not None]
    try:
        optimizer.step()
    finally:
        for group, params in zip(optimizer.param_groups, everything, strict=True):
            group["params"] = params
