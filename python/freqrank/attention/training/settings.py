"""The options of a training run that shape its result, checked, and what follows from them: stages and their losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from freqrank.attention.training.objectives import LOSSES
from freqrank.attention.training.parameters import TRAIN

RECIPES = ("released", "distill", "align")
PRECISIONS = ("float32", "bfloat16")

#: The stages of recipe "align" and the fraction of the steps that each takes.
ALIGN_STAGES = (("attention", 0.2), ("hidden", 0.2), ("logits", 0.5), ("next-token", 0.1))


@dataclass(frozen=True)
class Settings:
    """The options of a run that shape its result, checked; see :func:`distill`."""

    recipe: str
    steps: int
    batch_size: int = 8
    accumulate: int = 1
    clip: float = 1.0
    seed: int = 0
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: int | None = None
    kl_weight: float = 1.0
    temperature: float = 1.0
    hidden_weight: float = 0.0
    align_steps: int = 0
    stages: Sequence[tuple[str, float]] | None = None
    train: str = "all"
    lora_rank: int = 8
    precision: str = "float32"
    checkpointing: bool = False
    new_lr: float | None = None
    plan: list[tuple[str, int]] = field(init=False)

    def __post_init__(self) -> None:
        self._check()
        if self.warmup is None:
            object.__setattr__(self, "warmup", max(1, self.steps // 20))
        if self.recipe == "released":
            plan = [("next-token", self.steps)]
        elif self.recipe == "distill":
            aligned = min(self.align_steps, self.steps)
            plan = [("hidden", aligned), ("logits", self.steps - aligned)]
        else:
            plan = self._planned(ALIGN_STAGES if self.stages is None else self.stages)
        object.__setattr__(self, "plan", [(name, count) for name, count in plan if count])

    def _check(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(map(repr, RECIPES))}; got {self.recipe!r}")
        for name in ("steps", "seed"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer; got {value!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")
        for name in ("lr", "clip", "temperature", *(["new_lr"] if self.new_lr is not None else [])):
            if not _is_number(value := getattr(self, name)) or value <= 0:
                raise ValueError(f"{name} must be a positive number; got {value!r}")
        for name in ("weight_decay", "kl_weight", "hidden_weight", "align_steps", "warmup"):
            if (value := getattr(self, name)) is not None and (not _is_number(value) or value < 0):
                raise ValueError(f"{name} must be a number of at least 0; got {value!r}")
        for name in ("batch_size", "accumulate", "lora_rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
        for name, allowed in (("train", TRAIN), ("precision", PRECISIONS)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
        if not isinstance(self.checkpointing, bool):
            raise TypeError(f"checkpointing must be True or False; got {self.checkpointing!r}")
        if self.align_steps and self.recipe != "distill":
            raise ValueError('align_steps needs recipe="distill"; with "align", stages says how long each is')
        if self.stages is not None and self.recipe != "align":
            raise ValueError(f'stages needs recipe="align"; got recipe={self.recipe!r}')

    def _planned(self, stages: Sequence[tuple[str, float]]) -> list[tuple[str, int]]:
        """Stages with their steps: each ends at the nearest step to its share of all."""
        pairs = list(stages) if isinstance(stages, Iterable) and not isinstance(stages, str) else []
        for pair in pairs:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and pair[0] in LOSSES):
                raise ValueError(
                    f"stages must be pairs of one of {', '.join(map(repr, LOSSES))} and a fraction of the steps; "
                    f"got {pair!r}"
                )
            if not _is_number(pair[1]) or not 0 < pair[1] <= 1:
                raise ValueError(f"stages must have fractions above 0 and up to 1; got {pair!r}")
        if not pairs or abs(sum(share for _, share in pairs) - 1) > 1e-6:
            raise ValueError(f"stages must have fractions that sum to 1; got {stages!r}")
        ends, total = [0], 0.0
        for _, share in pairs:
            total += share
            ends.append(round(total * self.steps))
        return [(name, ends[i + 1] - ends[i]) for i, (name, _) in enumerate(pairs)]

    def stage(self, step: int) -> str:
        """The stage of a step, counted from 0."""
        for name, count in self.plan:
            if step < count:
                return name
            step -= count
        raise AssertionError("the plan has all steps")

    def weights(self, stage: str) -> dict[str, float]:
        """Which losses a stage counts, and how much."""
        if stage == "logits":
            return {"next-token": 1.0, "logits": self.kl_weight, "hidden": self.hidden_weight}
        return {stage: 1.0}

    def to_dict(self) -> dict[str, Any]:
        """What a report shows: the options that this recipe reads."""
        names = ["steps", "batch_size", "accumulate", "clip", "seed", "lr", "weight_decay", "warmup", "train"]
        names += ["precision", "checkpointing"]
        if self.new_lr is not None:
            names.append("new_lr")
        if self.train == "lora":
            names.append("lora_rank")
        if self.recipe != "released":
            names += ["kl_weight", "temperature", "hidden_weight"]
        if self.recipe == "distill":
            names.append("align_steps")
        found = {name: getattr(self, name) for name in names}
        return found if self.recipe != "align" else {**found, "stages": [list(stage) for stage in self.plan]}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def cosine_schedule(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Factor on the learning rate: linear warm-up over ``warmup`` steps, then a half cosine down to ``floor``.

    >>> [round(cosine_schedule(s, 10, 2), 2) for s in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.55, 0.13]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
