"""What a training run did: every step's loss, stage, learning rate and gradient, and their picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainingReport:
    """What :func:`freqrank.distill` did. ``to_dict`` is JSON-serialisable.

    Attributes:
        recipe: "released", "distill" or "align".
        settings: every option that shaped the run.
        losses: the loss of each step, as it was minimised: the weighted sum of what the step's stage counts.
        next_token: the next-token loss of each step, nats a token, whether or not it was minimised.
        stages: the stage of each step: "attention", "hidden", "logits" or "next-token".
        learning_rates: of each step, of the first optimiser's first group.
        gradient_norms: of each step, before clipping.
        validation: (steps done, mean next-token loss) pairs.
        tokens: input tokens that were trained on.
        seconds: wall-clock time, validation included.
    """

    recipe: str
    settings: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    next_token: list[float] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.losses)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "steps": self.steps}
