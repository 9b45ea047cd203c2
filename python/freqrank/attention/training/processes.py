"""Training in several processes, each with its own rows of a batch; a process alone is the simplest case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from freqrank.attention.training.batches import Batch


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and which of them this is."""

    count: int = 1
    index: int = 0

    def share(self, micro_batches: list[Batch]) -> list[tuple[Batch, float]]:
        """What this process takes of a step's micro-batches, and what each part counts."""
        return [(batch, 1.0) for batch in micro_batches]

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all processes, the same on each. Values are vectors."""
        return dict(values)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
