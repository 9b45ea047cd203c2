"""A run's state as tensors and JSON values, to be kept on disk: optimisers, random numbers, and the report so far."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from freqrank.attention.training.processes import Processes
from freqrank.attention.training.report import TrainingReport

#: The report's numbers for each step.
_SERIES = ("losses", "next_token", "learning_rates", "gradient_norms")


def report_to_tensors(report: TrainingReport) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A report's numbers for each step as tensors, and the rest of what a run adds to it."""
    found = {f"report.{name}": torch.tensor(getattr(report, name), dtype=torch.float64) for name in _SERIES}
    found["report.validation"] = torch.tensor(report.validation, dtype=torch.float64).view(-1, 2)
    return found, {
        "stages": [(name, len(list(run))) for name, run in groupby(report.stages)],
        "tokens": report.tokens,
        "seconds": report.seconds,
    }


def report_from_tensors(report: TrainingReport, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    for name in _SERIES:
        setattr(report, name, tensors[f"report.{name}"].tolist())
    report.validation = [(int(step), loss) for step, loss in tensors["report.validation"].tolist()]
    report.stages = [name for name, count in values["stages"] for _ in range(count)]
    report.tokens, report.seconds = values["tokens"], values["seconds"]


def random_state(device: torch.device, processes: Processes) -> dict[str, Tensor]:
    """The states of the generators that every process draws from, uint8 [processes, n]."""
    found = {"random.cpu": processes.stack(torch.get_rng_state())}
    if device.type != "cpu":
        found["random.device"] = processes.stack(torch.get_device_module(device).get_rng_state(device))
    return found


def set_random_state(device: torch.device, tensors: dict[str, Tensor], processes: Processes) -> None:
    # copies, since torch takes a row of a larger tensor for the memory that the tensor begins with
    torch.set_rng_state(tensors["random.cpu"][processes.index].clone())
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(tensors["random.device"][processes.index].clone(), device)


def optimizers_to_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], list[Any]]:
    """What optimisers keep: tensors by name, and for each optimiser its plain values.

    Raises:
        TypeError: an optimiser keeps something else than tensors, numbers, strings and sequences of these.
    """
    tensors: dict[str, Tensor] = {}
    plain: list[Any] = []
    for i, optimizer in enumerate(optimizers):
        groups, state = [], []
        for g, group in enumerate(optimizer.param_groups):
            values = {key: value for key, value in group.items() if key != "params"}
            groups.append(_split(values, f"optimizer.{i}.group.{g}", tensors, optimizer))
        for n, p in enumerate(_parameters(optimizer)):
            state.append(_split(optimizer.state.get(p, {}), f"optimizer.{i}.state.{n}", tensors, optimizer))
        plain.append({"groups": groups, "state": state})
    return tensors, plain


def optimizers_from_tensors(
    optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor], plain: list[Any]
) -> None:
    """Give optimisers back what they kept, bit for bit: their own ``load_state_dict`` would change dtypes."""
    for i, (optimizer, kept) in enumerate(zip(optimizers, plain, strict=True)):
        for g, (group, values) in enumerate(zip(optimizer.param_groups, kept["groups"], strict=True)):
            for key, value in _join(values, f"optimizer.{i}.group.{g}", tensors, group["params"][0].device).items():
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        for n, (p, values) in enumerate(zip(_parameters(optimizer), kept["state"], strict=True)):
            if values["plain"] or values["tensors"]:
                optimizer.state[p] = _join(values, f"optimizer.{i}.state.{n}", tensors, p.device)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _split(values: dict[str, Any], name: str, tensors: dict[str, Tensor], optimizer: Any) -> dict[str, Any]:
    """Tensors go where they belong, with a note of which were on the CPU; the rest is what JSON can say."""
    plain: dict[str, Any] = {}
    places: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Tensor):
            tensors[f"{name}.{key}"] = value
            places[key] = value.device.type
        elif _is_plain(value):
            plain[key] = value
        else:
            raise TypeError(
                f"{type(optimizer).__name__} keeps {key} as {type(value).__name__}, and a checkpoint holds tensors, "
                "numbers, strings and sequences of these: use another optimizer, or no checkpoint"
            )
    return {"plain": plain, "tensors": places}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _join(kept: dict[str, Any], name: str, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    places = {key: torch.device("cpu") if place == "cpu" else device for key, place in kept["tensors"].items()}
    return {**kept["plain"], **{key: tensors[f"{name}.{key}"].to(place) for key, place in places.items()}}
