"""The demonstration: what the library does, on a small model that ships with it, measured while one waits.

Each section is a function of the :class:`Demo` and returns a :class:`freqrank.report.Section`. No number is stored
here: all come from what just ran.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import freqrank
from freqrank import data, evaluate
from freqrank.compare import model_bytes, ramp, round_to_bits, spread_scales
from freqrank.lowrank.factorize import factorize, squared_error
from freqrank.lowrank.methods import METHODS as METHODS_BY_NAME
from freqrank.lowrank.methods import Method
from freqrank.models.architectures import find_architecture
from freqrank.models.costs import cache_bytes
from freqrank.report import COLOURS, Picture, Report, Section, Table, Text, label_ends, log_losses, plot, png, size

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """How much of everything: chosen so that two CPU cores need less than four minutes."""

    window: int = 512
    test_windows: int = 12
    calibration: tuple[int, int] = (24, 256)
    ratios: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    groups: tuple[int, ...] = (2, 3, 6)
    spread_groups: tuple[int, ...] = (2, 6)
    spread_ratio: float = 0.4
    steps: int = 40
    batch: tuple[int, int] = (8, 256)
    written: int = 160
    contexts: tuple[int, ...] = (128, 512, 1024, 2048, 4096, 8192)
    decode_steps: int = 15
    repeats: int = 9
    op_scale: int = 1


QUICK = Sizes(
    window=128, test_windows=4, calibration=(8, 128), ratios=(0.4, 0.8), groups=(2, 6), spread_groups=(2,), steps=4,
    batch=(2, 64), written=24, contexts=(32, 128), decode_steps=3, repeats=3, op_scale=8,
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A compressed model, when it is gone."""

    loss: float
    bytes: int
    report: freqrank.CompressionReport


@dataclass
class Demo:
    """The models, the texts and the seed that all sections share."""

    base: Any
    twin: Any
    sizes: Sizes
    seed: int

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        train, test = data.stdlib_bytes("train"), data.stdlib_bytes("test")
        count, length = self.sizes.calibration
        self.calibration = data.windows(train, length, count, seed=self.seed)
        self.test = data.windows(test, self.sizes.window, self.sizes.test_windows, seed=self.seed)
        self.train_text = train
        self.prompt = bytes(test[:4000].tolist())
        self.base_loss = self.loss(self.base)
        self._measured: dict[tuple[Any, ...], Measured] = {}

    def loss(self, model: nn.Module) -> float:
        """Held-out loss in nats a byte."""
        return evaluate.loss(model, self.test, window=self.sizes.window)

    def compressed(self, model: nn.Module | None = None, **options: Any) -> Any:
        """A compressed copy of the base model, or of another one."""
        copied = copy.deepcopy(self.base if model is None else model)
        freqrank.compress(copied, self.calibration, seed=self.seed, progress=False, **options)
        return copied

    def measured(self, model: nn.Module, **options: Any) -> Measured:
        """Loss, bytes and report of a compressed copy; what was measured before is not compressed again."""
        key = (id(model), *sorted(options.items()))
        if key not in self._measured:
            done = self.compressed(model, **options)
            self._measured[key] = Measured(self.loss(done), model_bytes(done), done.freqrank_report)
        return self._measured[key]


SectionFunction = Callable[[Demo, Tick], Section]


# ---------------------------------------------------------------- 1. loss against bytes

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "SVD": (COLOURS["grey"], {"method": "svd", "group_size": 1}),
    "ASVD": (COLOURS["green"], {"method": "asvd", "group_size": 1}),
    "SVD-LLM": (COLOURS["sky"], {"method": "svd-llm", "group_size": 1}),
    "Basis Sharing": (COLOURS["blue"], {"method": "basis-sharing"}),
    "LISC": (COLOURS["orange"], {"method": "lisc"}),
    "LISC + refit": (COLOURS["red"], {"method": "lisc", "refit": "own"}),
    "best": (COLOURS["purple"], {"method": "best", "group_size": 1}),
}


def compression(demo: Demo, tick: Tick) -> Section:
    """Held-out loss against bytes: each method, ratio and group size, and plain rounding beside them."""
    dense = {"name": "dense", "group": "", "ratio": 0.0, "bytes": model_bytes(demo.base), "loss": demo.base_loss}
    rows: list[dict[str, Any]] = [dense]
    for bits in (8, 4):
        tick(f"{bits}-bit rounding")
        rounded = copy.deepcopy(demo.base)
        total = round_to_bits(rounded, bits)
        rows.append({"name": f"{bits}-bit rounding", "group": "", "ratio": 0.0, "bytes": total,
                     "loss": demo.loss(rounded)})  # fmt: skip
    for name, (_, options) in METHODS.items():
        for group in [options["group_size"]] if "group_size" in options else demo.sizes.groups:
            for ratio in demo.sizes.ratios:
                tick(f"{name}, group {group}, {ratio:.0%} removed")
                done = demo.measured(demo.base, ratio=ratio, **{"group_size": group, **options})
                rows.append({"name": name, "group": group, "ratio": ratio, "bytes": done.bytes, "loss": done.loss})
    ratios = demo.sizes.ratios
    table = Table(
        ["method", "layers a basis", *(f"{ratio:.0%} removed" for ratio in ratios)],
        [[name, str(group), *(_cell(rows, name, group, ratio) for ratio in ratios)]
         for name, group in dict.fromkeys((r["name"], r["group"]) for r in rows if r["ratio"])],
        "Held-out loss in nats a byte, and bytes of the model",
    )  # fmt: skip
    others = Table(
        ["reference", "loss", "bytes"],
        [[row["name"], f"{row['loss']:.4f}", size(row["bytes"])] for row in rows if not row["ratio"]],
    )
    return Section(
        "compression",
        "Loss against bytes",
        "The block linears of the model are factored by each method, on "
        f"{demo.calibration.shape[0]} x {demo.calibration.shape[1]} bytes of calibration text, and scored on "
        f"{demo.test.numel():,} held-out bytes. 'Removed' counts the parameters of those linears; bytes are of the "
        "whole model at two bytes a number, a shared basis once. Rounding is plain: one scale an output channel.",
        [_loss_plot(demo, rows), table, others],
        {"rows": rows},
    )


def _cell(rows: list[dict[str, Any]], name: str, group: Any, ratio: float) -> str:
    row = next(r for r in rows if (r["name"], r["group"], r["ratio"]) == (name, group, ratio))
    return f"{row['loss']:.4f} / {size(row['bytes'])}"


def _loss_plot(demo: Demo, rows: list[dict[str, Any]]) -> Picture:
    group = demo.sizes.groups[0]

    def line(name: str, sizes: Sequence[int]) -> tuple[list[float], list[float]]:
        points = sorted((r["bytes"] / 1e6, r["loss"]) for r in rows if r["name"] == name and r["group"] in sizes)
        return [x for x, _ in points], [y for _, y in points]

    with plot(2, width=10, height=4.4, sharey=True) as (figure, (left, right)):
        for axes in (left, right):
            log_losses(axes, [row["loss"] for row in rows])
            axes.set_xlim(0, 1.08 * max(row["bytes"] for row in rows) / 1e6)
            axes.set_xlabel("bytes of the model (MB)")
            axes.axhline(demo.base_loss, color="#BBBBBB", linewidth=0.8, zorder=0)
            for row, marker in zip(rows, "Ds^", strict=False):
                at = (row["bytes"] / 1e6, row["loss"])
                axes.plot(*at, marker, color="black", zorder=3)
                axes.annotate(
                    row["name"].replace(" rounding", ""),
                    at,
                    xytext=(0, 8 if marker == "^" else -12),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
        left.set_ylabel("held-out loss (nats a byte, log scale)")
        left.set_title(f"Methods ({group} layers a basis where shared)")
        right.set_title("How many layers share a basis")
        for name, (colour, _) in METHODS.items():
            left.plot(*line(name, (1, group)), "o-", color=colour, label=name)
        for name, style in (("Basis Sharing", "o:"), ("LISC + refit", "o-")):
            for n, colour in zip(demo.sizes.groups, ("sky", "blue", "black"), strict=False):
                right.plot(*line(name, (n,)), style, color=COLOURS[colour], label=f"{name}, {n} layers")
        left.legend(loc="upper right")
        right.legend(loc="upper right")
        return Picture("loss-against-bytes", png(figure), "Held-out loss against the bytes of the compressed model.")


# ---------------------------------------------------------------- 2. input scales

VARIANTS: dict[str, dict[str, Any]] = {
    "Basis Sharing": {"method": "basis-sharing"},
    "LISC": {"method": "lisc"},
    "LISC + block weight": {"method": "lisc", "block_weight": "norm"},
    "LISC + refit": {"method": "lisc", "refit": "own"},
}


def input_scales(demo: Demo, tick: Tick) -> Section:
    """LISC beside Basis Sharing on the model as it is and on copies with spread input scales."""
    depth = len(find_architecture(demo.base).blocks)
    exponents = ramp(depth, "rising")
    models = {
        "as it is": demo.base,
        "rising with depth": spread_scales(demo.base, exponents),
        "falling with depth": spread_scales(demo.base, ramp(depth, "falling")),
    }
    ratio, groups = demo.sizes.spread_ratio, demo.sizes.spread_groups
    with torch.no_grad():
        sample = demo.test[:2]
        reference = demo.base(sample, use_cache=False).logits
        change = max((m(sample, use_cache=False).logits - reference).abs().max().item() for m in models.values())
    rows: list[dict[str, Any]] = []
    details: list[dict[str, Any]] = []
    for group in groups:
        for variant, options in VARIANTS.items():
            losses = {}
            for copy_name, model in models.items():
                tick(f"{variant}, {copy_name}")
                done = demo.measured(model, ratio=ratio, group_size=group, **options)
                losses[copy_name] = done.loss
                if group == groups[-1]:
                    layers = [layer for layer in done.report.layers if layer.role == "q"]
                    details.append({
                        "variant": variant, "copy": copy_name,
                        "errors": [layer.error for layer in layers],
                        "weights": [layer.output_share for layer in layers],
                    })  # fmt: skip
            rows.append({"group": group, "variant": variant, "loss": losses})
    invariant = max(
        max(row["loss"].values()) - min(row["loss"].values()) for row in rows if "block weight" in row["variant"]
    )
    table = Table(
        ["variant", "layers a basis", *models],
        [[r["variant"], str(r["group"]), *(f"{r['loss'][m]:.4f}" for m in models)] for r in rows],
        f"Held-out loss in nats a byte, {ratio:.0%} removed",
    )
    return Section(
        "input_scales",
        "Input scales",
        "Multiplying a layer's norm gains by s and dividing the weights behind them leaves the function as it is "
        f"(largest change of a logit here: {change:.1g}) but gives the layer's inputs another scale. s goes from "
        f"2^{exponents[0]} to 2^{exponents[-1]} over the layers. Basis Sharing pools the inputs as they come; LISC "
        "divides each layer's scale out, which also changes how much each layer counts; with block weight 'norm' the "
        f"result does not depend on s (losses differ by {invariant:.1g}).",
        [table, _scales_plot(details, list(models)[1:], groups[-1])],
        {
            "ratio": ratio,
            "exponents": exponents,
            "largest_logit_change": change,
            "rows": rows,
            "query_projections": details,
        },
    )


def _scales_plot(details: list[dict[str, Any]], copies: list[str], group: int) -> Picture:
    colours = dict(zip(VARIANTS, (COLOURS[c] for c in ("blue", "orange", "green", "red")), strict=True))
    with plot(2, width=10, height=3.8, sharey=True) as (figure, axes):
        for ax, copy_name in zip(axes, copies, strict=True):
            for row in details:
                if row["copy"] == copy_name:
                    layers = range(len(row["errors"]))
                    ax.plot(layers, row["errors"], "o-", color=colours[row["variant"]], label=row["variant"])
                    ax.set_xticks(layers)
            ax.set_title(f"Input scales {copy_name}")
            ax.set_xlabel("layer")
            ax.set_ylim(bottom=0)
        axes[0].set_ylabel("relative error of q's output")
        axes[1].legend(loc="best", fontsize=8)
        return Picture("input-scales", png(figure), f"Error of each layer's query projection, {group} layers a basis.")


# ---------------------------------------------------------------- 3. planted data

PLANTED: dict[str, tuple[str, Callable[[], Method]]] = {
    "as they come": (COLOURS["blue"], lambda: METHODS_BY_NAME["basis-sharing"]()),
    "calibrated": (COLOURS["orange"], lambda: METHODS_BY_NAME["lisc"]()),
    "half correction": (COLOURS["sky"], lambda: METHODS_BY_NAME["lisc"](exponent=0.5)),
}


def planted(demo: Demo, tick: Tick) -> Section:
    """Weights that share a planted basis, inputs that differ in scale alone: what alpha does to each layer's error."""
    scales = [0.1, 0.25, 0.5, 1.0, 2.0, 4.0]
    n, outputs, shared, tokens = 128, 160, 48, 1024
    rank = shared
    generator = torch.Generator().manual_seed(demo.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    basis = randn(n, shared)
    weights = [basis @ randn(shared, outputs) / shared**0.5 + 0.3 * randn(n, outputs) for _ in scales]
    spectrum = torch.logspace(0, -2, n, dtype=torch.float64)
    inputs = [scale * randn(tokens, n) * spectrum @ torch.linalg.qr(randn(n, n)).Q for scale in scales]
    grams = [freqrank.gram(x) for x in inputs]
    rows: list[dict[str, Any]] = []
    for name, (_, method) in PLANTED.items():
        tick(name)
        rule = method()
        pool = rule.pool(grams, tokens)
        done = factorize(weights, pool.root, rank, rule.block_weights(weights, pool.scales))
        errors = []
        for weight, coefficients, gram in zip(weights, done.coefficients, grams, strict=True):
            lost, total = squared_error(weight, done.basis @ coefficients, gram)
            errors.append((lost / total) ** 0.5)
        rows.append({"variant": name, "errors": errors})
    table = Table(
        ["pooling", *(f"s={scale:g}" for scale in scales), "max / min"],
        [
            [r["variant"], *(f"{e:.4f}" for e in r["errors"]), f"{max(r['errors']) / min(r['errors']):.2f}"]
            for r in rows
        ],
        "Relative error |X W - X W'| / |X W| of each layer",
    )
    return Section(
        "planted",
        "Planted data",
        f"Layers with weights B C_l + noise (a common basis B of {shared} directions in {n}) and inputs s_l Z_l R_l: "
        "random Z_l with a falling spectrum, a random rotation R_l each, so that only the scale s_l makes one layer's "
        "inputs larger than another's. One basis of as many directions for all, from the sum of the Gram matrices as "
        "they come, or each divided by its scale (alpha = mean(s^2) / s_l^2; half correction: its root).",
        [_planted_plot(rows, scales), table],
        {"scales": scales, "rank": rank, "rows": rows},
    )


def _planted_plot(rows: list[dict[str, Any]], scales: list[float]) -> Picture:
    with plot(1, width=7.5, height=3.6) as (figure, (axes,)):
        for row in rows:
            axes.plot(scales, row["errors"], "o-", color=PLANTED[row["variant"]][0], label=row["variant"])
        axes.set_xscale("log")
        axes.set_xticks(scales, [f"{s:g}" for s in scales])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("input scale of the layer, s")
        axes.set_ylabel("relative error")
        axes.legend(loc="best")
        return Picture("planted", png(figure), "Error of each layer on planted data where only the inputs are scaled.")


# ---------------------------------------------------------------- 4. linearisation


def linearization(demo: Demo, tick: Tick) -> Section:
    """Convert the base model live and fine-tune it a little, beside the twin that was recovered ahead of time."""
    steps = demo.sizes.steps
    batch, length = demo.sizes.batch
    student = copy.deepcopy(demo.base)
    converted = freqrank.linearize(student, feature_map="recommended", seed=demo.seed)
    losses = {"base (softmax)": demo.base_loss, "converted, before training": demo.loss(student)}
    trained = freqrank.distill(
        student,
        copy.deepcopy(demo.base),
        data.windows(demo.train_text, length, steps * batch, seed=demo.seed + 1),
        recipe="align",
        steps=steps,
        batch_size=batch,
        lr=3e-3,
        seed=demo.seed,
        progress=False,
        on_step=lambda done, report: tick(f"fine-tune, step {done}"),
    )
    losses[f"converted, {steps} steps"] = demo.loss(student)
    losses["recovered twin"] = demo.loss(demo.twin)
    tick("write with three models")
    ratio = demo.sizes.ratios[0]
    small = demo.compressed(method="lisc", ratio=ratio, group_size=demo.sizes.groups[-1], refit="own")
    start = demo.prompt.find(b"\ndef ")
    prompt = demo.prompt[max(0, start - 200) : start + 5]
    written = {
        name: write(model, prompt, demo.sizes.written, demo.seed)
        for name, model in {
            "base": demo.base,
            f"compressed (LISC + refit, {ratio:.0%} removed)": small,
            "recovered linear twin": demo.twin,
        }.items()
    }
    return Section(
        "linearization",
        "Linear attention",
        f"Every attention layer of the base is converted and then trained for {steps} steps of {batch} x {length} "
        f"bytes ({trained.tokens:,} bytes, {trained.seconds:.0f} s) in stages: to match the base's attention, "
        "its hidden states, its predictions, and the next bytes. "
        "The twin that ships with the package is the same conversion after a longer run.",
        [
            _curve_plot(trained.next_token, losses),
            Table(
                ["model", "held-out loss (nats a byte)", "perplexity"],
                [[name, f"{loss:.4f}", f"{2.718281828**loss:.3f}"] for name, loss in losses.items()],
            ),
            Text("The prompt that each model continues, drawn at temperature 0.5", prompt.decode(errors="replace")),
            *(Text(name, text) for name, text in written.items()),
        ],
        {"losses": losses, "training": trained, "conversion": converted, "written": written},
    )


def write(model: Any, prompt: bytes, count: int, seed: int) -> str:
    """What a byte-level model writes after ``prompt``, drawn at temperature 0.5."""
    ids = torch.tensor([list(prompt)])
    torch.manual_seed(seed)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=True, temperature=0.5, pad_token_id=0
    )
    return bytes(made[0, len(prompt) :].tolist()).rstrip(b"\0").decode(errors="replace")


def _curve_plot(curve: Sequence[float], losses: dict[str, float]) -> Picture:
    base, before, after, twin = losses.values()
    steps = len(curve)
    with plot(1, width=7.5, height=3.8) as (figure, (axes,)):
        axes.plot(range(1, steps + 1), curve, color=COLOURS["orange"])
        axes.plot([0, steps], [before, after], "o", color=COLOURS["orange"])
        for value, colour in ((twin, COLOURS["green"]), (base, COLOURS["black"])):
            axes.axhline(value, color=colour, linewidth=1.2)
        axes.set_xlabel("training step")
        axes.set_ylabel("loss (nats a byte)")
        axes.set_xlim(0, steps)
        axes.set_ylim(min(base, twin) * 0.85, before * 1.05)
        figure.draw_without_rendering()
        label_ends(
            axes,
            [
                (steps, base, "base (softmax)", COLOURS["black"]),
                (steps, twin, "recovered twin", COLOURS["green"]),
                (steps, after, "trained just now", COLOURS["orange"]),
            ],
        )
        return Picture(
            "linearization", png(figure), "Training loss of the live conversion; dots and lines are held-out loss."
        )


# ---------------------------------------------------------------- 5. decoding


@torch.no_grad()
def decoding(demo: Demo, tick: Tick) -> Section:
    """Time of one decoded token and bytes kept between tokens, against the context length."""
    rows = []
    models = {"softmax": demo.base, "linear": demo.twin}
    generator = torch.Generator().manual_seed(demo.seed)
    for context in demo.sizes.contexts:
        tick(f"context of {context}")
        start = int(torch.randint(0, demo.train_text.numel() - context - 64, (1,), generator=generator))
        ids = demo.train_text[start : start + context + 64][None]
        caches = {
            name: model(ids[:, :context], use_cache=True, logits_to_keep=1).past_key_values
            for name, model in models.items()
        }
        row: dict[str, Any] = {"context": context}
        row |= {f"{name}_bytes": sum(cache_bytes(cache)) for name, cache in caches.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for step in range(demo.sizes.decode_steps + 2):
            token = ids[:, context + step : context + step + 1]
            for name, model in models.items():  # one after the other, so that a busy machine slows both
                before = time.perf_counter()
                model(token, past_key_values=caches[name], use_cache=True)
                seconds[name].append(time.perf_counter() - before)
        row |= {f"{name}_ms": 1e3 * statistics.median(times[2:]) for name, times in seconds.items()}
        rows.append(row)
    limit = getattr(demo.base.config, "max_position_embeddings", 0)
    table = Table(
        ["context (tokens)", "softmax, ms a token", "linear, ms a token", "KV cache", "linear state"],
        [[f"{r['context']:,}", f"{r['softmax_ms']:.2f}", f"{r['linear_ms']:.2f}", size(r["softmax_bytes"]),
          size(r["linear_bytes"])] for r in rows],
    )  # fmt: skip
    return Section(
        "decoding",
        "Decoding against context length",
        "One more token through transformers' own cache, batch 1, base model and linear twin in turns, median of "
        f"{demo.sizes.decode_steps}. The twin keeps a state of one size; the base keeps every key and value. Small "
        "models spend most of a token in Python, so the time of both starts from the same floor. Lengths beyond "
        f"{limit:,} are longer than the base model was trained for: they show the cost, not the quality.",
        [_decode_plot(rows), table],
        {"rows": rows},
    )


def _decode_plot(rows: list[dict[str, Any]]) -> Picture:
    contexts = [r["context"] for r in rows]
    with plot(2, width=10, height=3.8) as (figure, (left, right)):
        for name, text, colour in (("softmax", "softmax, KV cache", "blue"), ("linear", "linear attention", "orange")):
            left.plot(contexts, [r[f"{name}_ms"] for r in rows], "o-", color=COLOURS[colour], label=text)
            right.plot(contexts, [r[f"{name}_bytes"] / 1e6 for r in rows], "o-", color=COLOURS[colour], label=text)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(contexts, [f"{c:,}" for c in contexts])
            axes.minorticks_off()
            axes.set_xlabel("context (tokens)")
            axes.set_ylim(bottom=0)
        left.set_title("Time of one token")
        left.set_ylabel("milliseconds")
        left.legend(loc="upper left")
        right.set_title("Kept between tokens")
        right.set_ylabel("megabytes")
        return Picture("decoding", png(figure), "Cost of one more token against the length of the context.")


# ---------------------------------------------------------------- 6. kernels


def kernels(demo: Demo, tick: Tick) -> Section:
    """A few ops beside what else computes the same, in turns."""
    rows: list[dict[str, Any]] = []
    for name, shape, ours, peers in _cases(demo.sizes.op_scale):
        tick(f"{name} {shape}")
        times = in_turns({"freqrank": ours, **peers}, demo.sizes.repeats)
        rows.append({"op": name, "shape": shape, "ms": {which: 1e3 * t for which, t in times.items()}})
    table = Table(
        ["op", "size", "ms", "beside it", "ms", "ratio"],
        [[r["op"], r["shape"], f"{r['ms']['freqrank']:.2f}", peer, f"{ms:.2f}", f"{ms / r['ms']['freqrank']:.2f}"]
         for r in rows for peer, ms in r["ms"].items() if peer != "freqrank"],
    )  # fmt: skip
    threads = torch.get_num_threads()
    return Section(
        "kernels",
        "What the kernels reached",
        f"CPU ops beside what else computes the same, in turns on {threads} thread{'s' * (threads > 1)}, median of "
        f"{demo.sizes.repeats}. Ratio: their time over ours, above 1 where ours is faster. 'cached matrix': a matmul "
        "with the DCT matrix; 'chunked matmuls': the same linear attention in torch; 'sdpa': torch's softmax attention "
        "of the same shape.",
        [table],
        {"threads": threads, "rows": rows},
    )


def in_turns(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, called one after the other ``repeats`` times, so that a busy machine slows all alike."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def chunked_linear_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int = 64) -> Tensor:
    """Causal linear attention [B, T, H, D] by torch matmuls, chunk by chunk, with scale 1.

    >>> q = k = v = torch.ones(1, 4, 1, 1)
    >>> chunked_linear_attention(q, k, v, chunk=2).flatten()
    tensor([1., 2., 3., 4.])
    """
    b, t, h = q.shape[:3]
    q, k, v = (x.transpose(1, 2).reshape(b, h, t // chunk, chunk, -1) for x in (q, k, v))
    states = (k.mT @ v).cumsum(2)
    states = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], 2)
    o = q @ states + (q @ k.mT).tril() @ v
    return o.reshape(b, h, t, -1).transpose(1, 2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


Op = Callable[[], Any]


def _cases(shrink: int) -> Iterator[tuple[str, str, Op, dict[str, Op]]]:
    """(name, size, our op, peers by name) on random tensors; made one at a time, so that memory stays small."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for n in (64, 256, 1024):
        x = randn((1 << 21) // shrink // n, n)
        matrix = freqrank.dct(torch.eye(n), norm="ortho")
        peers: dict[str, Op] = {"cached matrix": partial(torch.matmul, x, matrix)}
        try:
            from scipy.fft import dct as scipy_dct
        except ImportError:
            pass
        else:
            peers["scipy.fft"] = partial(scipy_dct, x.numpy(), norm="ortho", workers=torch.get_num_threads())
        yield "dct", f"{x.shape[0]:,} x {n}", partial(freqrank.dct, x, norm="ortho"), peers
    for d in (64, 128):
        shape = (1, 4096 // shrink, 8 // min(8, shrink), d)
        q, k, v = (randn(*shape) / d**0.5 for _ in range(3))
        heads = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        yield (
            "linear_attention",
            f"{shape[1]:,} tokens, {shape[2]} x {d}",
            partial(freqrank.linear_attention, q, k, v, scale=1.0),
            {
                "chunked matmuls": partial(chunked_linear_attention, q, k, v),
                "sdpa": partial(_softmax_attention, *heads),
            },
        )
    x = randn(16384 // shrink, 512).bfloat16()
    yield (
        "gram (bf16)",
        f"{x.shape[0]:,} x 512",
        partial(freqrank.gram, x),
        {"torch in fp64": lambda: x.double().mT @ x.double()},
    )
    for count, n in ((256, 32), (64, 128), (4, 512)):
        factor = randn(max(1, count // shrink), n, 2 * n)
        matrices = factor @ factor.mT / n
        yield (
            "cholesky_ex",
            f"{matrices.shape[0]} x {n} x {n}",
            partial(freqrank.cholesky_ex, matrices),
            {"torch.linalg": partial(torch.linalg.cholesky_ex, matrices)},
        )


# ---------------------------------------------------------------- all of it


def _steps(sizes: Sizes) -> int:
    """How many pieces of work there are, for the progress bar."""
    shared = sum("group_size" not in options for _, options in METHODS.values())
    methods = (len(METHODS) - shared + shared * len(sizes.groups)) * len(sizes.ratios)
    scales = len(VARIANTS) * 3 * len(sizes.spread_groups)
    return 2 + methods + scales + len(PLANTED) + sizes.steps + 1 + len(sizes.contexts) + 9


#: pieces of work of a run, by ``quick``
STEPS = {False: _steps(Sizes()), True: _steps(QUICK)}


def run(
    base: Any,
    twin: Any,
    *,
    quick: bool = False,
    seed: int = 0,
    on_tick: Callable[[str, str], None] | None = None,
) -> Report:
    """Run every section and return the report.

    Args:
        base, twin: a byte-level causal language model and its linearised counterpart.
        quick: very small sizes, for a look in seconds; the numbers mean little.
        seed: of every random draw.
        on_tick: called with (section title, what is done now) before each piece of work.
    """
    sections: dict[str, SectionFunction] = {
        "Loss against bytes": compression,
        "Input scales": input_scales,
        "Planted data": planted,
        "Linear attention": linearization,
        "Decoding": decoding,
        "Kernels": kernels,
    }
    demo = Demo(base.eval(), twin.eval(), QUICK if quick else Sizes(), seed)
    report = Report(
        "freqrank: smaller and linear-time",
        f"A byte-level LLaMA of {model_bytes(base) / 2:,.0f} parameters, trained on the Python standard library's "
        "source, made smaller by shared low-rank factors and linear-time by frequency-domain attention. Every number "
        "below was computed in this run." + (" Quick sizes: the numbers mean little." if quick else ""),
    )
    for title, function in sections.items():
        began = time.perf_counter()

        def tick(text: str, title: str = title) -> None:
            if on_tick is not None:
                on_tick(title, text)

        section = function(demo, tick)
        section.seconds = time.perf_counter() - began
        report.sections.append(section)
    return report
