"""What a training run did: every step's loss, stage, learning rate and gradient, and their picture."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from itertools import accumulate, groupby, pairwise
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

    @property
    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """What :meth:`plot` draws: (steps done, value) pairs of each curve.

        >>> TrainingReport("released", {}, losses=[3.0, 2.0], next_token=[3.0, 2.0]).curves["loss"]
        [(1, 3.0), (2, 2.0)]
        """
        series = {
            "loss": self.losses,
            "next-token": self.next_token,
            "learning rate": self.learning_rates,
            "gradient norm": self.gradient_norms,
        }
        found: dict[str, list[tuple[float, float]]] = {
            name: list(enumerate(values, start=1)) for name, values in series.items()
        }
        return found | {"validation": [(step, loss) for step, loss in self.validation]}

    @property
    def stage_starts(self) -> list[tuple[str, int]]:
        """The stages that the run went through, and how many steps were done when each began.

        >>> TrainingReport("align", {}, stages=["attention", "hidden", "hidden"]).stage_starts
        [('attention', 0), ('hidden', 1)]
        """
        found, done = [], 0
        for name, steps in groupby(self.stages):
            found.append((name, done))
            done += len(list(steps))
        return found

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the losses, and below them learning rate and gradient norm, into a file of a type that its name says.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: no step was taken, or matplotlib knows no such file type.
        """
        if not self.losses:
            raise ValueError("there is nothing to plot: no step was taken")
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("plot needs matplotlib: pip install matplotlib") from None
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        losses, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        curves = self.curves
        ends = [start for _, start in self.stage_starts] + [self.steps]
        for name, colour in (("loss", "#999999"), ("next-token", "#0072b2")):
            x, y = zip(*curves[name], strict=True)
            losses.plot(x, y, color=colour, linewidth=0.6, alpha=0.5)
            for start, end in pairwise(ends):  # what one stage minimises has nothing to do with the next stage's
                losses.plot(x[start:end], _smooth(y[start:end]), color=colour, linewidth=1.4, label=name)
                name = "_nolegend_"
        if curves["validation"]:
            losses.plot(
                *zip(*curves["validation"], strict=True), "o-", color="#d55e00", markersize=4, label="validation"
            )
        losses.set_ylabel("loss")
        losses.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
        for name, start in self.stage_starts:
            for axes in (losses, below):
                axes.axvline(start, color="black", linewidth=0.8, linestyle=":")
            losses.annotate(
                name, (start, 1), xycoords=("data", "axes fraction"), xytext=(3, -3), textcoords="offset points",
                va="top", fontsize=8,
            )  # fmt: skip
        below.plot(*zip(*curves["gradient norm"], strict=True), color="#009e73", linewidth=0.8)
        below.set_yscale("log")
        below.set_ylabel("gradient norm", color="#009e73")
        rate = below.twinx()
        rate.plot(*zip(*curves["learning rate"], strict=True), color="black", linewidth=1.2)
        rate.set_ylabel("learning rate")
        below.set_xlabel("steps")
        below.set_xlim(0, self.steps)
        figure.savefig(path, dpi=150)


def _smooth(values: tuple[float, ...]) -> list[float]:
    """A running mean over a twentieth of the curve."""
    width = max(1, len(values) // 20)
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, i + 1 - width), i + 1) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]
