"""What `convert` did, and what came of it: bytes, memory, speed and loss of the original and the converted model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from freqrank import report
from freqrank.attention.training.report import TrainingReport
from freqrank.models.compression_report import CompressionReport
from freqrank.models.costs import Cost, ModelSize
from freqrank.models.linearization import LinearizationReport
from freqrank.report import COLOURS, Picture, Report, Section, Table

__all__ = ["ConversionReport", "Memory"]

MODELS = ("original", "converted")


@dataclass
class Memory:
    """Bytes that each model keeps of one sequence of ``context`` tokens while it generates.

    Attributes:
        context: tokens of the sequence.
        original, converted: bytes; None where they do not follow from what was measured.
        measured: whether the tensors of real caches were counted. Else every layer showed, at the measured lengths,
            either a fixed size or a fixed size for each token, and that was carried on.
    """

    context: int
    original: int | None
    converted: int | None
    measured: bool


@dataclass
class ConversionReport:
    """What :func:`freqrank.convert` did. ``str()`` gives tables, ``to_dict()`` what fits into JSON.

    Attributes:
        settings: what was asked for; the stages' own reports have all of their options.
        compression, linearization, training: the report of each stage; the last is None if nothing was trained.
        original, converted: parameters and bytes; a tensor that several modules share counts once.
        losses: nats a token on the held-out tokens, of the model as it was ("original") and after each stage
            ("compressed", "linearised", "trained"); empty without such tokens.
        held_out: how they were scored: "tokens" and "window".
        costs: of "original" and "converted", time and memory of sequences of several lengths.
        side_by_side: whether both were timed in turns; else the original before and the converted model after the work.
        memory: bytes of one sequence at these lengths, and beyond where that is exact.
        memory_per_token: of each, bytes that one more token adds; None where that depends on the length.
        machine: where it was measured.
        seconds: how long each stage took.
        notes: what a reader should know.
    """

    settings: dict[str, Any]
    compression: CompressionReport
    linearization: LinearizationReport
    training: TrainingReport | None
    original: ModelSize
    converted: ModelSize
    losses: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, int] = field(default_factory=dict)
    costs: dict[str, list[Cost]] = field(default_factory=dict)
    side_by_side: bool = True
    memory: list[Memory] = field(default_factory=list)
    memory_per_token: dict[str, int | None] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Fraction of the original's bytes that is gone; negative where layers added more than factors saved."""
        return 1 - self.converted.bytes / self.original.bytes

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists of JSON types."""
        stages = {name: getattr(self, name) for name in ("compression", "linearization", "training")}
        found = {name: value for name, value in asdict(self).items() if name not in stages}
        found |= {name: getattr(self, name)._asdict() for name in MODELS}
        found |= {name: None if stage is None else stage.to_dict() for name, stage in stages.items()}
        found["costs"] = {name: [cost.to_dict() for cost in costs] for name, costs in self.costs.items()}
        return {**found, "ratio": self.ratio}

    def tables(self) -> list[Table]:
        """Size and quality, loss after each stage, memory, speed: what there is of it."""
        tables = [self._summary(), self._stages(), self._memory(), self._speed()]
        return [table for table in tables if table.rows]

    def _summary(self) -> Table:
        rows: list[Sequence[str]] = [
            _compared("parameters", self.original.parameters, self.converted.parameters, "{:,}".format),
            _compared("bytes of the weights", self.original.bytes, self.converted.bytes, report.size),
        ]
        first, last = (self.memory_per_token.get(name) for name in MODELS)
        if first is not None and last is not None:
            rows.append(_compared("memory of one more token", first, last, report.size))
        for before, after in zip(*self.costs.values(), strict=True):
            at = f" at {before.context:,} tokens"
            rows.append(
                _compared("milliseconds a token" + at, 1e3 * before.token_seconds, 1e3 * after.token_seconds, _number)
            )
        if self.losses:
            loss, others = self.losses["original"], list(self.losses.values())[-1]
            rows.append(["loss, nats a token", f"{loss:.4f}", f"{others:.4f}", f"{others - loss:+.4f}"])
        return Table(["", *MODELS, "change"], rows, "Original and converted model")

    def _stages(self) -> Table:
        rows: list[Sequence[str]] = [
            [stage, f"{nats:.4f}", f"{_perplexity(nats):.4g}", f"{nats - self.losses['original']:+.4f}"]
            for stage, nats in self.losses.items()
        ]
        how = ", ".join(f"{name} {count:,}" for name, count in self.held_out.items())
        return Table(
            ["model", "loss, nats a token", "perplexity", "above the original"], rows, f"Held-out loss ({how})"
        )

    def _memory(self) -> Table:
        def cell(count: int | None) -> str:
            return "-" if count is None else report.size(count)

        rows: list[Sequence[str]] = [
            [
                f"{m.context:,}",
                cell(m.original),
                cell(m.converted),
                f"{m.original / m.converted:.3g}x" if m.original and m.converted else "-",
                "caches, counted" if m.measured else "carried on",
            ]
            for m in self.memory
        ]
        head = ["tokens", *MODELS, "ratio", "from"]
        return Table(head, rows, "Memory of one sequence while it generates")

    def _speed(self) -> Table:
        rows: list[Sequence[str]] = []
        for before, after in zip(*self.costs.values(), strict=True):
            prefill = [cost.context / cost.prefill_seconds for cost in (before, after)]
            token = [1e3 * cost.token_seconds for cost in (before, after)]
            rows.append(
                [
                    f"{before.context:,}",
                    f"{prefill[0]:,.0f} -> {prefill[1]:,.0f}",
                    f"{prefill[1] / prefill[0]:.2f}x",
                    f"{token[0]:.3g} -> {token[1]:.3g}",
                    f"{token[0] / token[1]:.2f}x",
                ]
            )
        head = ["tokens", "prompt, tokens a second", "faster", "one more token, ms", "faster"]
        cpu = self.machine.get("cpu", {})
        where = [f"{cpu.get('model')}, {cpu.get('threads')} of {cpu.get('cores')} cores", *self.machine.get("cuda", [])]
        how = "in turns" if self.side_by_side else "one before and one after the work"
        return Table(head, rows, f"Speed on one sequence, medians, {how} ({', '.join(where)})")

    def page(self) -> Report:
        """Tables, the learning curve and the numbers, for :func:`freqrank.report.write_folder`."""
        parts: list[Any] = list(self.tables())
        if self.training is not None:
            parts.append(_curve(self.training))
        what = self.summary + "".join(f" {note}." for note in self.notes)
        section = Section(
            "conversion", "Conversion", what, parts, report.plain(self.to_dict()), sum(self.seconds.values())
        )
        return Report("Converted by freqrank", "Compressed and made linear-time.", [section])

    @property
    def summary(self) -> str:
        """What was done, in a sentence."""
        done, layer, trained = self.compression.settings, self.linearization, "Not trained."
        if (t := self.training) is not None:
            trained = f"Trained by {t.recipe!r} for {t.steps:,} steps on {t.tokens:,} tokens."
        chosen = ", ".join(f"{name} {done[name]}" for name in ("group_size", "share", "refit"))
        options = ("feature_map", "decay", "norm", "gate", "window")
        built = ", ".join(f"{name} {layer.options[name]}" for name in options)
        took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return (
            f"Compressed by {done['method']} ({chosen}): {self.compression.block_ratio:.2%} of the linears removed, "
            f"{done['ratio']:.2%} asked for. {len(layer.layers)} of {len(layer.layers) + len(layer.kept)} layers made "
            f"linear ({built}). {trained} Took: {took}."
        )

    def __str__(self) -> str:
        notes = "\n".join(f"note: {note}" for note in self.notes)
        return "\n\n".join(filter(None, [self.summary, *map(str, self.tables()), notes]))


def _compared(name: str, before: float, after: float, shown: Callable[[Any], str]) -> Sequence[str]:
    change = f"{after / before - 1:+.1%}" if before else "-"
    return [name, shown(before), shown(after), change]


def _number(value: float) -> str:
    return f"{value:.3g}"


def _perplexity(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _curve(training: TrainingReport) -> Picture:
    with report.plot(width=8, height=3.6) as (figure, (axes,)):
        steps = range(1, training.steps + 1)
        axes.plot(steps, training.next_token, color=COLOURS["blue"], label="training text")
        if training.validation:
            axes.plot(*zip(*training.validation, strict=True), "o-", color=COLOURS["orange"], label="validation")
            axes.legend()
        axes.set_xlabel("steps")
        axes.set_ylabel("next-token loss, nats a token")
        axes.set_title("Training")
        return Picture("training", report.png(figure), "Next-token loss of each training step.")
