"""The losses of recovery training, one function each.

Every one is a sum of fractions, a numerator with a gradient over a denominator without: the summed cross-entropy over
the number of targets, say. Added up over micro-batches and processes before they are divided, they give what one large
batch gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from freqrank.attention.training.batches import Batch, real_tokens, targets
from freqrank.attention.training.parameters import ConvertedLayer

#: The losses, in the order in which a recovery comes to count them.
LOSSES = ("attention", "hidden", "logits", "next-token")


class Fractions(NamedTuple):
    """A loss as sum of ``numerators / denominators``, both [N]; gradients reach the former alone."""

    numerators: Tensor
    denominators: Tensor

    def value(self) -> Tensor:
        return (self.numerators / self.denominators).sum()


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def next_token(logits: Tensor, batch: Batch) -> Fractions:
    """Cross-entropy of each token given those before it, over the number of tokens that are a target."""
    wanted = targets(batch)
    labels = batch["input_ids"][:, 1:].masked_fill(~wanted, -100)
    loss = F.cross_entropy(wide(logits[:, :-1].flatten(0, 1)), labels.flatten(), ignore_index=-100, reduction="sum")
    return Fractions(loss[None], wanted.sum()[None])


def divergence(student: Tensor, teacher: Tensor, batch: Batch, temperature: float = 1.0) -> Fractions:
    """KL(teacher || student) of the distributions at ``temperature``, times its square, over the number of tokens."""
    real = real_tokens(batch)
    if real is not None:
        student, teacher = student[real], teacher[real]
    q, p = ((wide(x) / temperature).log_softmax(-1) for x in (student, teacher))
    kl = F.kl_div(q, p, log_target=True, reduction="sum") * temperature**2
    return Fractions(kl[None], _count(batch))


def hidden_mismatch(student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Fractions:
    """Mean over layers of |h_student - h_teacher|^2 / |h_teacher|^2; the first state, the embeddings, is left out."""
    found = [_mismatch(s, t, batch) for s, t in zip(student[1:], teacher[1:], strict=True)]
    numerators, denominators = (torch.stack(terms) for terms in zip(*found, strict=True))
    return Fractions(numerators / len(found), denominators)


def attention_mismatch(student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Fractions:
    """Sum over layers of |a_student - a_teacher|^2 / |a_teacher|^2, for outputs of attention on the same inputs."""
    found = [_mismatch(s, t, batch) for s, t in zip(student, teacher, strict=True)]
    numerators, denominators = (torch.stack(terms) for terms in zip(*found, strict=True))
    return Fractions(numerators, denominators)


def _mismatch(student: Tensor, teacher: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    real = real_tokens(batch)
    if real is not None:
        student, teacher = student[real], teacher[real]
    student, teacher = wide(student), wide(teacher)
    return (student - teacher).square().sum(), teacher.square().sum()


def _count(batch: Batch) -> Tensor:
    """Tokens that are not padding, [1]."""
    ids, real = batch["input_ids"], real_tokens(batch)
    return torch.tensor([ids.numel()], device=ids.device) if real is None else real.sum()[None]


class Objective:
    """The loss of a stage: a weighted sum of the above.

    Args:
        student, teacher: called as ``model(input_ids=..., attention_mask=..., position_ids=..., use_cache=False)``.
        weights: loss -> weight, of :data:`LOSSES`. What weighs nothing is not computed, nor is the teacher run for it;
            "next-token" always is, for the report.
        layers: those whose attention is matched. In a student that checkpoints its activations none of theirs are kept
            either; they run once more in the backward pass.
        temperature: of "logits".
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        weights: Mapping[str, float],
        *,
        layers: Sequence[ConvertedLayer] = (),
        temperature: float = 1.0,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.weights = {name: weights[name] for name in LOSSES if weights.get(name)}
        self.layers, self.temperature = layers, temperature
        self.recompute = recomputes(student)
        self._hidden = {"output_hidden_states": True} if "hidden" in self.weights else {}

    def __call__(self, batch: Batch) -> dict[str, Fractions]:
        """The losses on a batch."""
        found: dict[str, Fractions] = {}
        if "attention" in self.weights:
            own, other, logits = self._attention_outputs(batch)
            found["attention"] = attention_mismatch(own, other, batch)
        if self.weights.keys() - {"attention"}:
            student = self.student(**batch, use_cache=False, **self._hidden)
            logits = student.logits
            teacher = self._teacher(batch)
            if "hidden" in self.weights:
                found["hidden"] = hidden_mismatch(student.hidden_states, teacher.hidden_states, batch)
            if "logits" in self.weights:
                found["logits"] = divergence(logits, teacher.logits, batch, self.temperature)
        with torch.set_grad_enabled("next-token" in self.weights):
            found["next-token"] = next_token(logits, batch)
        return found

    @torch.no_grad()
    def denominators(self, batch: Batch) -> dict[str, Tensor]:
        """The denominators alone of what a call returns, as cheaply as they are to be had."""
        found: dict[str, Tensor] = {}
        if "attention" in self.weights:
            _, other, _ = self._attention_outputs(batch)
            found["attention"] = attention_mismatch(other, other, batch).denominators
        if "hidden" in self.weights:
            states = self._teacher(batch, logits=False).hidden_states
            found["hidden"] = hidden_mismatch(states, states, batch).denominators
        if "logits" in self.weights:
            found["logits"] = _count(batch)
        found["next-token"] = targets(batch).sum()[None]
        return found

    @torch.no_grad()
    def _teacher(self, batch: Batch, logits: bool | None = None) -> Any:
        """The teacher's outputs, or None where nothing reads them."""
        if not self.weights.keys() & {"hidden", "logits"}:
            return None
        assert self.teacher is not None
        logits = "logits" in self.weights if logits is None else logits
        # a decoder without its head, where there is one to leave out
        model = self.teacher if logits else getattr(self.teacher, "base_model", self.teacher)
        return model(**batch, use_cache=False, **self._hidden)

    def _attention_outputs(self, batch: Batch) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """What each layer's attention gives in the student, the teacher's on the same input, and the student's logits.

        Gradients are on inside the student's attention modules alone, if they are on at all. The teacher runs as
        always, so that its attention gets the masks and positions that it knows; only the input of each attention that
        is matched is exchanged on its way in. What else the teacher computes is of no account.
        """
        assert self.teacher is not None
        calls: list[tuple[Any, Any]] = []
        own: list[Tensor] = []
        other: list[Tensor] = []
        gradients = torch.is_grad_enabled()

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append((args, kwargs))
            torch.set_grad_enabled(gradients and not self.recompute)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            torch.set_grad_enabled(False)
            own.append(_first(output))

        def exchange(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            inputs, named = calls[len(other)]
            x = inputs[0] if inputs else named["hidden_states"]
            if args:
                return (x.to(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": x.to(kwargs["hidden_states"])}

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            other.append(_first(output))

        with torch.no_grad():
            with _hooked([layer.student for layer in self.layers], before, after):
                logits = self.student(**batch, use_cache=False).logits
            with _hooked([layer.teacher for layer in self.layers], exchange, keep):
                getattr(self.teacher, "base_model", self.teacher)(**batch, use_cache=False)
        if gradients and self.recompute:
            modules = [layer.student for layer in self.layers]
            own = [
                _first(checkpoint(module, *args, use_reentrant=False, **kwargs))
                for module, (args, kwargs) in zip(modules, calls, strict=True)
            ]
        return own, other, logits


def recomputes(model: nn.Module) -> bool:
    """Whether activation checkpointing is on in a model of transformers."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _hooked(modules: Iterable[nn.Module], before: Any, after: Any) -> Iterator[None]:
    """Functions to call before and after the forward of each module; gone in the end."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield
