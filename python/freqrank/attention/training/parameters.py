"""Which parameters are trained, and where a converted model differs from the original."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from freqrank.lowrank.modules import LowRankLinear

TRAIN = ("all", "attention", "lora")


class ConvertedLayer(NamedTuple):
    """A layer whose attention is another in the student than in the teacher: both modules, and their name."""

    name: str
    student: nn.Module
    teacher: nn.Module


def converted_layers(student: nn.Module, teacher: nn.Module) -> list[ConvertedLayer]:
    """The layers whose attention modules are of another class in ``student`` than in ``teacher``, first to last.

    Raises:
        ValueError: a model whose decoder is of no known architecture, two of different depth, or no such layer.
    """
    from freqrank.models.architectures import find_architecture

    try:
        own, other = find_architecture(student), find_architecture(teacher)
    except ValueError as error:
        raise ValueError(f"to match or train attention, it must be found in student and teacher: {error}") from None
    if len(own.blocks) != len(other.blocks):
        raise ValueError(
            f"teacher must have the student's {len(own.blocks)} layers, one attention beside the other; "
            f"got {len(other.blocks)}"
        )
    found = [
        ConvertedLayer(own.full_name(i, own.attention_path), own.attention(i), other.attention(i))
        for i in range(len(own.blocks))
        if type(own.attention(i)) is not type(other.attention(i))
    ]
    if not found:
        raise ValueError(
            f"student must have converted attention, of another class than the teacher's; all {len(own.blocks)} layers "
            f"of both have {type(own.attention(0)).__name__}. Call freqrank.linearize(student) first"
        )
    return found


@contextmanager
def trained(
    student: nn.Module,
    teacher: nn.Module | None,
    train: str = "all",
    *,
    layers: Sequence[ConvertedLayer] = (),
    lora_rank: int = 8,
    seed: int = 0,
) -> Iterator[None]:
    """Let gradients reach what is to be trained, for as long as the context lasts.

    Args:
        student: the model.
        teacher: the original model, which says what is new in the student; "all" does without.
        train: "all" (whatever requires a gradient), "attention" (the parameters of converted attention modules) or
            "lora" (peft's LoRA beside the blocks' linears that the teacher has too, and all parameters that it has not;
            merged into the linears in the end).
        layers: the converted layers, of "attention".
        lora_rank, seed: of LoRA.

    Raises:
        ValueError: "lora" for a decoder of no known architecture, or beside low-rank linears.
        ImportError: "lora" without peft.
    """
    if train == "all":
        yield
        return
    flags = [(p, p.requires_grad) for p in student.parameters()]
    try:
        if train == "attention":
            chosen = {id(p) for layer in layers for p in layer.student.parameters()}
            for p, _ in flags:
                p.requires_grad_(id(p) in chosen)
            yield
        else:
            assert teacher is not None
            with _lora(student, teacher, lora_rank, seed):
                yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@contextmanager
def _lora(student: nn.Module, teacher: nn.Module, rank: int, seed: int) -> Iterator[None]:
    from freqrank.models.architectures import find_architecture

    try:
        from peft import LoraConfig, LoraModel
    except ImportError:
        raise ImportError('train="lora" needs peft: pip install peft') from None
    try:
        architecture = find_architecture(student)
    except ValueError as error:
        raise ValueError(f"the linears of student must be found to have LoRA beside them: {error}") from None
    known = {name for name, _ in teacher.named_parameters()}
    linears = {
        architecture.full_name(i, path): module
        for i, block in enumerate(architecture.blocks)
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear) and f"{architecture.full_name(i, path)}.weight" in known
    }
    if low_rank := [name for name, module in linears.items() if isinstance(module, LowRankLinear)]:
        raise ValueError(
            f'train="lora" cannot merge into low-rank linears such as {low_rank[0]}; use train="all", or call '
            "freqrank.merge(student) first"
        )
    new = [p for name, p in student.named_parameters() if name not in known]
    # A's first values come from the seed, and the caller's generators stay where they are.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(linears), lora_dropout=0.0, bias="none")
        tuner = LoraModel(student, config, "default")
    for p in new:
        p.requires_grad_(True)
    try:
        yield
    finally:
        tuner.merge_and_unload()
