"""How much of the original's quality each way of linearising and training brings back, on the same tokens.

    python -m bench.python.recovery [--steps 400] [--seeds 0 1] [--only NAME ...] [--out bench/results/recovery]

The bundled model is converted in several ways, each is trained on the same batches of the standard library's source,
and scored on held-out files at the training context and at four times of it. A run that is in the results already is
not repeated, so that a run can be stopped and go on. The results are one JSON file, from which the tables and plots are
made.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import freqrank
import torch
from freqrank import distill, evaluate, linearize
from freqrank.attention.dijiang import PRESETS
from freqrank.data import RandomWindows, stdlib_bytes, windows
from freqrank.models.cache import state_tensors
from freqrank.report import machine
from transformers import AutoModelForCausalLM, PreTrainedModel

BASE = Path(freqrank.__file__).parent / "bundled" / "base"


@dataclass(frozen=True)
class Way:
    """One way to convert and to train.

    Args:
        about: what it is, in a few words.
        options: of `linearize`; None leaves the model softmax.
        training: of `distill`; None leaves it as it is.
        scratch: start from random weights.
    """

    about: str
    options: Mapping[str, Any] | None = field(default_factory=dict)
    training: Mapping[str, Any] | None = field(default_factory=dict)
    scratch: bool = False


ALIGNED = {"recipe": "align", "hidden_weight": 1.0}
#: What starts near the original is not to be driven away from it: a third of the rate, but for what is new.
GENTLY = {**ALIGNED, "lr": 1e-3, "new_lr": 1e-2}
#: What the recommended layer has around its map.
AROUND_THE_MAP = ("decay", "norm", "gate", "position_table", "shortest_span")
#: The hybrid's window is an eighth of the training context. Its scan keeps 2 x 32 features of 32 values a head, as many
#: numbers as the keys and values of 32 tokens: a window alone gets those.
WAYS: dict[str, Way] = {
    "original": Way("the softmax model itself", None, None),
    "scratch": Way("the softmax model, trained from scratch", None, scratch=True),
    "released": Way("released layer, next-token loss (the released recipe)", {"feature_map": "dijiang"}),
    "temperature": Way(
        "released layer at the pretrained temperature, next-token loss",
        {"feature_map": "dijiang", "temperature": "pretrained"},
    ),
    "released-aligned": Way("released layer, aligned and distilled", {"feature_map": "dijiang"}, ALIGNED),
    "recommended-next-token": Way("recommended layer, next-token loss", {"feature_map": "recommended"}),
    "recommended": Way("recommended layer, aligned and distilled", {"feature_map": "recommended"}, ALIGNED),
    "fixed-decay": Way(
        "the same, but the released kind of decay (spans from 2 tokens)",
        {"feature_map": "recommended", "decay": "multi-scale"},
        ALIGNED,
    ),
    "released-map": Way(
        "the same, but the released map",
        {"feature_map": "dijiang", **{name: getattr(PRESETS["recommended"], name) for name in AROUND_THE_MAP}},
        ALIGNED,
    ),
    "hybrid": Way(
        "recommended layer with a window of 64 and 4 sinks, aligned and distilled", {"feature_map": "hybrid"}, GENTLY
    ),
    "window": Way(
        "a window of 96 and 4 sinks alone (equal state), aligned and distilled",
        {"feature_map": "none", "window": 96, "sinks": 4},
        GENTLY,
    ),
    "window-untrained": Way(
        "a window of 96 and 4 sinks alone, untrained", {"feature_map": "none", "window": 96, "sinks": 4}, None
    ),
}


def converted(way: Way, teacher: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model that a way starts training with."""
    if way.scratch:
        torch.manual_seed(seed)
        model = type(teacher)(copy.deepcopy(teacher.config)).float()
    else:
        model = copy.deepcopy(teacher).requires_grad_(True)
    if way.options is not None:
        linearize(model, seed=seed, **way.options)
    return model


def state_bytes(model: PreTrainedModel, context: int) -> int:
    """What the model keeps of one sequence of ``context`` tokens while it generates, float32."""
    cache = model(torch.zeros(1, context, dtype=torch.long), use_cache=True).past_key_values
    total = 0
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        parts = [layer.keys, layer.values] if state is None else state_tensors(state).values()
        total += sum(x.numel() * x.element_size() for x in parts if x.is_floating_point())
    return total


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Convert, train and score one way with one seed."""
    way = WAYS[name]
    teacher = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).requires_grad_(False)
    model = converted(way, teacher, seed)
    held_out = stdlib_bytes("validation")[: args.tokens]
    row: dict[str, Any] = {
        "name": name, "about": way.about, "seed": seed, "options": way.options, "training": way.training,
        "parameters": sum(p.numel() for p in model.parameters()), "curve": [],
    }  # fmt: skip
    if way.training is not None:
        start = time.perf_counter()
        report = distill(
            model,
            teacher,
            RandomWindows(stdlib_bytes("train"), args.context, args.batch, seed),
            steps=args.steps,
            batch_size=args.batch,
            validation=windows(stdlib_bytes("validation"), args.context, 16, seed=1),
            validate_every=max(1, args.steps // 4),
            seed=seed,
            progress=False,
            **{"lr": args.lr, **way.training},
        )
        row |= {"tokens": report.tokens, "seconds": time.perf_counter() - start, "curve": report.validation}
    model.eval()
    with torch.no_grad():
        row["state_bytes"] = state_bytes(model, args.context)
        row["state_bytes_at_4"] = state_bytes(model, 4 * args.context)
        for length, key in ((args.context, "loss"), (4 * args.context, "loss_at_4")):
            row[key] = evaluate.loss(model, held_out, window=length, remainder="drop")
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a way, means over seeds with their spread, and the part of the released recipe's gap closed."""

    def mean(name: str, key: str) -> float:
        return statistics.fmean(r[key] for r in rows if r["name"] == name)

    lines = [
        "| way | loss | spread over seeds | of the released recipe's gap closed | at 4 times the context | state |",
        "|---|---|---|---|---|---|",
    ]
    names = [name for name in WAYS if any(r["name"] == name for r in rows)]
    for name in names:
        own = [r for r in rows if r["name"] == name]
        losses = [r["loss"] for r in own]
        spread = f"{max(losses) - min(losses):.3f} ({len(losses)})" if len(losses) > 1 else "one"
        closed = ""
        if {"original", "released"} <= set(names) and name not in ("original", "released"):
            gap = mean("released", "loss") - mean("original", "loss")
            closed = f"{100 * (mean('released', 'loss') - mean(name, 'loss')) / gap:.0f} %"
        state = f"{own[0]['state_bytes_at_4'] / 1e3:.0f} kB"
        lines.append(
            f"| {own[0]['about']} | {mean(name, 'loss'):.3f} | {spread} | {closed} | {mean(name, 'loss_at_4'):.3f} "
            f"| {state} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    for index, name in enumerate(name for name in WAYS if any(r["name"] == name and r["curve"] for r in rows)):
        for number, row in enumerate(r for r in rows if r["name"] == name):
            steps, losses = zip(*row["curve"], strict=True)
            label = row["about"] if number == 0 else None
            axis.plot(steps, losses, ".-", color=f"C{index % 10}", label=label, alpha=0.8)
    for row in rows:
        if row["name"] == "original":
            axis.axhline(row["loss"], color="black", linestyle=":", label=row["about"])
    axis.set_xlabel("optimiser steps")
    axis.set_ylabel("held-out loss, nats a byte")
    axis.set_yscale("log")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--tokens", type=int, default=131072, help="held-out tokens that are scored")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("bench/results/recovery"))
    args = parser.parse_args()
    settings = {key: getattr(args, key) for key in ("steps", "context", "batch", "lr", "tokens")}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    document: dict[str, Any] = {"settings": settings, "machine": machine(), "rows": []}
    if file.exists():
        document = json.loads(file.read_text())
        if document["settings"] != settings:
            parser.error(f"{file} was made with {document['settings']}, not {settings}: give another --out")
    rows = document["rows"]
    for seed in args.seeds:
        for name in args.only:
            once = WAYS[name].training is None
            if (once and seed != args.seeds[0]) or any(r["name"] == name and r["seed"] == seed for r in rows):
                continue
            rows.append(run(name, seed, args))
            file.write_text(json.dumps(document, indent=1) + "\n")
            print(f"{name} {seed}: {rows[-1]['loss']:.3f}, {rows[-1]['loss_at_4']:.3f} at 4 times", flush=True)
    (args.out / "RESULTS.md").write_text(table(rows))
    plot(rows, args.out / "curves.png")
    print(table(rows))


if __name__ == "__main__":
    main()
