"""`compare`: compression methods beside one another on one model: chosen on one text, reported on another.

Every row is a compressed copy of the model that was measured and thrown away. What was measured is on disk at once, so
that a run that is stopped goes on where it was.
"""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import freqrank
from freqrank import _progress, evaluate, report
from freqrank.lowrank.methods import METHODS
from freqrank.models.architectures import find_architecture
from freqrank.models.checkpoint import fingerprint
from freqrank.models.compression import REFITS, check_options, compress
from freqrank.report import COLOURS, Picture, Report, Section, Table

__all__ = ["Comparison", "Row", "compare", "model_bytes", "round_to_bits", "spread_scales"]

SPREADS = ("none", "rising", "falling")
ROUNDINGS = (8, 4)
_STATE = "rows.json"


def model_bytes(model: nn.Module) -> int:
    """Bytes of the saved weights at two bytes a number; a basis that several layers share counts once."""
    return 2 * sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def round_to_bits(model: nn.Module, bits: int) -> int:
    """Round the block linears to ``bits`` per weight in place, plainly; returns the bytes the model then needs.

    One fp16 scale an output channel, its largest magnitude over the largest integer; no calibration, no grouping.
    """
    architecture = find_architecture(model)
    total = model_bytes(model)
    top = 2 ** (bits - 1) - 1
    for layer in range(len(architecture.blocks)):
        for role in architecture.roles:
            weight = architecture.weight(layer, role).detach()
            scale = (weight.abs().amax(1, keepdim=True) / top).half().to(weight.dtype).clamp_min(1e-8)
            weight.copy_((weight / scale).round().clamp(-top, top) * scale)
            total += -2 * weight.numel() + weight.numel() * bits // 8 + 2 * weight.shape[0]
    return total


def spread_scales(model: nn.Module, exponents: Sequence[int]) -> Any:
    """A copy that computes the same function with layer l's norm gains times 2^e_l and the weights behind them divided.

    Powers of two make it exact in floating point. Raises ValueError for blocks that are not Llama's: others have their
    norms elsewhere.
    """
    copied = copy.deepcopy(model)
    architecture = find_architecture(copied)
    if architecture.name != "llama":
        raise ValueError(f"scales can be spread in blocks like Llama's only; got {architecture.name}")
    with torch.no_grad():
        for layer, exponent in enumerate(exponents):
            block: Any = architecture.blocks[layer]
            for norm, roles in (("input_layernorm", ("q", "k", "v")), ("post_attention_layernorm", ("gate", "up"))):
                block.get_submodule(norm).weight.mul_(2.0**exponent)
                for role in roles:
                    architecture.weight(layer, role).mul_(2.0**-exponent)
    return copied


def ramp(layers: int, spread: str) -> list[int]:
    """Exponents of :func:`spread_scales` over a model's layers, centred on 0.

    >>> ramp(4, "rising"), ramp(4, "falling"), ramp(2, "none")
    ([-2, -1, 0, 1], [1, 0, -1, -2], [0, 0])
    """
    if spread == "none":
        return [0] * layers
    rising = [layer - layers // 2 for layer in range(layers)]
    return rising if spread == "rising" else rising[::-1]


@dataclass(frozen=True)
class Row:
    """One model that was measured.

    Attributes:
        name: the method with its switches, "dense", or "8-bit rounding".
        spread: how the layers' input scales were spread before.
        ratio: fraction of the linears' parameters that was asked to be removed, 0 for what is not compressed.
        group_size: layers a basis, 1 where each weight is factored alone.
        refit: as for `compress`.
        bytes: of the whole model, at two bytes a number (rounded linears: fewer).
        parameters_removed: fraction of the linears' parameters that is gone.
        validation, test: loss in nats a token.
        seconds: how long compressing took.
    """

    name: str
    spread: str
    ratio: float
    group_size: int
    refit: str | None
    bytes: int
    parameters_removed: float
    validation: float
    test: float
    seconds: float

    @property
    def key(self) -> tuple[str, str, float, int, str | None]:
        """What it is the measurement of."""
        return self.name, self.spread, self.ratio, self.group_size, self.refit


@dataclass
class Comparison:
    """All rows. ``str()`` gives the table of the best by validation, ``write()`` a folder, ``to_dict()`` JSON."""

    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def best(self, name: str, ratio: float, spread: str = "none", refit: str | None = None) -> Row:
        """A method's row at a ratio whose validation loss is least, whatever its group size."""
        found = [r for r in self.rows if (r.name, r.ratio, r.spread, r.refit) == (name, ratio, spread, refit)]
        if not found:
            raise ValueError(f"no row of {name!r} at ratio {ratio}, spread {spread!r}, refit {refit!r}")
        return min(found, key=lambda row: row.validation)

    @property
    def references(self) -> list[Row]:
        """The dense model and its roundings."""
        return [row for row in self.rows if row.ratio == 0]

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists of JSON types."""
        return {"settings": self.settings, "rows": [asdict(row) for row in self.rows]}

    def to_csv(self) -> str:
        """One line a row."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [*Row.__dataclass_fields__], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()

    def tables(self) -> list[Table]:
        """Test loss of each method's best row by validation, a table a spread; then what stands beside them."""
        ratios = sorted({row.ratio for row in self.rows if row.ratio})
        made: list[Table] = []
        for spread in dict.fromkeys(row.spread for row in self.rows if row.ratio):
            methods = dict.fromkeys((r.name, r.refit) for r in self.rows if r.ratio and r.spread == spread)
            title = "Test loss in nats a token (layers a basis, chosen on the validation text)"
            lines: list[Sequence[str]] = []
            for name, refit in methods:
                measured = {
                    row.ratio for row in self.rows if (row.name, row.spread, row.refit) == (name, spread, refit)
                }
                best = [self.best(name, ratio, spread, refit) if ratio in measured else None for ratio in ratios]
                cells = ("-" if row is None else f"{row.test:.4f} ({row.group_size})" for row in best)
                lines.append([_label(name, refit), *cells])
            title += "" if spread == "none" else f", input scales {spread} with depth"
            made.append(Table(["method", *(f"{ratio:.0%} removed" for ratio in ratios)], lines, title))
        beside: list[Sequence[str]] = [[row.name, f"{row.test:.4f}", report.size(row.bytes)] for row in self.references]
        return [*made, Table(["reference", "test loss", "bytes"], beside)]

    def __str__(self) -> str:
        return "\n".join(map(str, self.tables()))

    def report(self) -> Report:
        """Tables and plots, for :func:`freqrank.report.write_folder`."""
        s = self.settings
        section = Section(
            "comparison",
            "Compression methods",
            f"{s['model']}: the block linears are factored on {s['calibration_tokens']:,} calibration tokens; group "
            f"sizes are chosen by the loss on a validation text of {s['validation_tokens']:,} tokens, and the loss on "
            f"a test text of {s['test_tokens']:,} is what is shown. 'Removed' counts the parameters of those linears; "
            "bytes are of the whole model at two bytes a number, a shared basis once. Rounding is plain: one scale an "
            "output channel.",
            [*(self._plot(spread) for spread in dict.fromkeys(r.spread for r in self.rows if r.ratio)), *self.tables()],
            self.to_dict(),
            sum(row.seconds for row in self.rows),
        )
        title = f"freqrank: compression methods on {s['model']}"
        return Report(title, "Every number was measured, none is stored with the library.", [section])

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """A page, plots, ``results.json``, ``rows.csv`` and ``rows.json``, in place of an earlier comparison."""
        files = {_STATE: _json(self.to_dict()), "rows.csv": self.to_csv().encode()}
        return report.write_folder(self.report(), Path(folder), files)

    def _plot(self, spread: str) -> Picture:
        colours = list(COLOURS.values())[1:]
        with report.plot(1, width=8, height=4.4) as (figure, (axes,)):
            for number, (name, refit) in enumerate(
                dict.fromkeys((r.name, r.refit) for r in self.rows if r.ratio and r.spread == spread)
            ):
                found = [r for r in self.rows if r.ratio and (r.name, r.spread, r.refit) == (name, spread, refit)]
                ratios = sorted({r.ratio for r in found})
                best = sorted((self.best(name, ratio, spread, refit) for ratio in ratios), key=lambda row: row.bytes)
                axes.plot(
                    [row.bytes / 1e6 for row in best],
                    [row.test for row in best],
                    ("o-" if number < len(colours) else "s:") if refit is None else "o--",
                    color=colours[number % len(colours)],
                    label=_label(name, refit),
                )
            for row, marker in zip(self.references, "Ds^", strict=False):
                axes.plot(row.bytes / 1e6, row.test, marker, color="black", label=row.name, linestyle="none")
            shown = [
                row.test for row in self.rows if math.isfinite(row.test) and (row.spread == spread or not row.ratio)
            ]
            report.log_losses(axes, shown)
            axes.set_xlabel("bytes of the model (MB)")
            axes.set_ylabel("test loss (nats a token, log scale)")
            axes.set_xlim(left=0)
            axes.legend(loc="best", fontsize=8)
            caption = "Test loss against bytes, group sizes chosen on the validation text"
            caption += "." if spread == "none" else f"; input scales {spread} with depth."
            return Picture(f"loss-against-bytes-{spread}", report.png(figure), caption)


def _label(name: str, refit: str | None) -> str:
    return name if refit is None else f"{name} + {refit} refit"


def compare(
    model: nn.Module,
    calibration: Tensor,
    validation: Tensor,
    test: Tensor,
    *,
    methods: Sequence[str] = ("svd", "fwsvd", "asvd", "svd-llm", "basis-sharing", "lisc"),
    ratios: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    group_sizes: Sequence[int] = (2, 3, 6),
    refits: Sequence[str | None] = (None,),
    spreads: Sequence[str] = ("none",),
    window: int = 512,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Comparison:
    """Compress copies of a model by every method, ratio, group size and refit, and measure the losses.

    The model stays as it is; a copy of it is held beside it. With ``folder`` every row is written to ``rows.json``
    there as soon as it is known, and rows that are there already are not measured again: a run that was stopped goes
    on. At the end the folder holds a page, plots, CSV and JSON (`Comparison.write`).

    Args:
        model: as for `freqrank.compress`, in evaluation mode or not.
        calibration: token ids [N, T].
        validation, test: token ids [T] or [N, T]; group sizes are chosen on the first, the second is reported.
        methods: names, or names with other switches of `freqrank.compress` behind them: "lisc block_weight=norm
            depth_weight=1.5". Those that factor each weight alone get one row a ratio, whatever ``group_sizes``; one
            that sets its refit itself, as "best" does, has no other, whatever ``refits``.
        ratios, group_sizes: as ``ratio`` and ``group_size`` of `freqrank.compress`.
        refits: refits of `freqrank.compress`; None is none.
        spreads: "none": the model as it is; "rising", "falling": its layers' input scales spread by powers of two from
            the first to the last layer, the function unchanged (`spread_scales`).
        window: tokens that the model sees at once when it is measured.
        seed: for methods that draw random numbers.
        folder: absent, empty, or of an earlier comparison of the same model, texts and window.
        progress: show a bar on standard error.

    Returns:
        A :class:`Comparison`; its first rows are the dense model and plain 8- and 4-bit rounding of the same linears.

    Raises:
        ValueError: an unknown method, switch, refit or spread, switches that contradict one another, an empty list, a
            folder that holds a comparison of other data, all before anything is measured; what `freqrank.compress` and
            `freqrank.evaluate.loss` raise.
        FileExistsError: a folder that holds something else.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> model, ids = LlamaForCausalLM(config), torch.randint(64, (4, 32))
        >>> done = compare(model, ids, ids, ids, methods=["svd", "lisc"], ratios=[0.4], group_sizes=[2], progress=False)
        >>> [row.name for row in done.rows]
        ['dense', '8-bit rounding', '4-bit rounding', 'svd', 'lisc']
    """
    for method in methods:
        _parse(method)
    for name, values, allowed in (
        ("refits", refits, REFITS),
        ("spreads", spreads, SPREADS),
    ):
        for value in values:
            if value not in allowed:
                raise ValueError(f"{name} must be of {', '.join(map(repr, allowed))}; got {value!r}")
    for name, several in (("methods", methods), ("ratios", ratios), ("group_sizes", group_sizes), ("refits", refits),
                          ("spreads", spreads)):  # fmt: skip
        if len(several) == 0:
            raise ValueError(f"{name} must not be empty")
    wanted = _wanted(methods, ratios, group_sizes, refits, spreads)
    for name, _, ratio, group_size, refit in wanted:
        if ratio:
            method, switches = _parse(name)
            check_options(method=method, ratio=ratio, group_size=group_size, refit=refit, seed=seed, **switches)
    architecture = find_architecture(model)
    settings = {
        "model": type(model).__name__,
        "calibration_tokens": calibration.numel(),
        "validation_tokens": validation.numel(),
        "test_tokens": test.numel(),
        "window": window,
        "seed": seed,
        "version": freqrank.__version__,
    }
    done = Comparison(settings)
    state, known = None, {}
    if folder is not None:
        state = Path(folder) / _STATE
        settings["data"] = fingerprint(model, calibration, validation, test)
        known = _known(state, settings)
    layers = len(architecture.blocks)
    spread_models: dict[str, nn.Module] = {"none": model}
    with _progress.bar("compare", len(wanted), progress) as advance:
        for key in wanted:
            if key not in known:
                name, spread, *_ = key
                if spread not in spread_models:
                    spread_models = {"none": model, spread: spread_scales(model, ramp(layers, spread))}
                known[key] = _measure(key, spread_models[spread], calibration, validation, test, window, seed)
                if state is not None:
                    _write_state(state, Comparison(settings, [*known.values()]))
            done.rows.append(known[key])
            advance(_label(key[0], key[4]))
    if folder is not None:
        rest = [row for key, row in known.items() if key not in set(wanted)]
        Comparison(settings, [*done.rows, *rest]).write(folder)
    return done


Key = tuple[str, str, float, int, "str | None"]
#: Switches that may stand behind a method's name, and how their values are read.
SWITCHES: dict[str, Callable[[str], Any]] = {
    "allocation": str, "block_weight": str, "depth_weight": float, "exponent": float, "grouping": str,
    "output_weight": str, "scale": str, "share": str, "statistics": str,
}  # fmt: skip


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    """A method and its switches.

    >>> _parse("lisc block_weight=norm depth_weight=1.5")
    ('lisc', {'block_weight': 'norm', 'depth_weight': 1.5})
    """
    if not isinstance(spec, str) or not spec.split() or spec.split()[0] not in METHODS:
        raise ValueError(f"methods must begin with one of {', '.join(map(repr, METHODS))}; got {spec!r}")
    method, *parts = spec.split()
    switches = {}
    for part in parts:
        name, _, value = part.partition("=")
        if name not in SWITCHES or not value:
            raise ValueError(f"behind a method stand switches NAME=VALUE of {', '.join(SWITCHES)}; got {part!r}")
        try:
            switches[name] = SWITCHES[name](value)
        except ValueError:
            raise ValueError(f"{name} must be a number; got {value!r}") from None
    return method, switches


def _wanted(
    methods: Sequence[str],
    ratios: Sequence[float],
    group_sizes: Sequence[int],
    refits: Sequence[str | None],
    spreads: Sequence[str],
) -> list[Key]:
    keys: list[Key] = [("dense", "none", 0.0, 1, None)]
    keys += [(f"{bits}-bit rounding", "none", 0.0, 1, None) for bits in ROUNDINGS]
    for spread, method, refit in itertools.product(spreads, methods, refits):
        name, switches = _parse(method)
        spans = METHODS[name].spans_layers() and switches.get("share") != "modules"
        sizes = group_sizes if spans else (1,)
        other = None if "refit" in METHODS[name].preset else refit
        keys += [(method, spread, float(ratio), size, other) for size in sizes for ratio in ratios]
    return list(dict.fromkeys(keys))


def _measure(
    key: Key, model: nn.Module, calibration: Tensor, validation: Tensor, test: Tensor, window: int, seed: int
) -> Row:
    name, spread, ratio, group_size, refit = key
    start, removed = time.perf_counter(), 0.0
    measured: nn.Module = model
    if name == "dense":
        size = model_bytes(model)
    else:
        measured = copy.deepcopy(model)
        if ratio == 0:
            size = round_to_bits(measured, int(name.split("-")[0]))
        else:
            method, switches = _parse(name)
            done = compress(
                measured, calibration, method=method, ratio=ratio, group_size=group_size, refit=refit, seed=seed,
                progress=False, **switches,
            )  # fmt: skip
            size, removed = model_bytes(measured), done.block_ratio
    seconds = time.perf_counter() - start
    losses = [evaluate.loss(measured, text, window=window) for text in (validation, test)]
    return Row(name, spread, ratio, group_size, refit, size, removed, losses[0], losses[1], seconds)


# --- on disk ----------------------------------------------------------------------------------------------------------


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(report.plain(value), indent=1) + "\n").encode()


def _known(state: Path, settings: Mapping[str, Any]) -> dict[Key, Row]:
    """The rows of an earlier run in this folder."""
    if not state.is_file():
        report.check_folder(state.parent)
        return {}
    try:
        stored = json.loads(state.read_text())
        rows = [_row(row) for row in stored["rows"]]
        before = stored["settings"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{state} is damaged ({error}): delete it, or name another folder") from None
    for name in ("data", "window", "seed", "version"):
        if before.get(name) != settings[name]:
            what = {"data": "another model or other texts"}.get(name, f"{name} {before.get(name)!r}")
            raise ValueError(f"{state.parent} holds a comparison with {what}: name another folder, or delete it")
    return {row.key: row for row in rows}


def _row(stored: dict[str, Any]) -> Row:
    for name in ("validation", "test"):  # what JSON has no number for was written as a word
        stored[name] = float(stored[name])
    return Row(**stored)


def _write_state(state: Path, comparison: Comparison) -> None:
    state.parent.mkdir(parents=True, exist_ok=True)
    new = state.with_suffix(".new.json")
    new.write_bytes(_json(comparison.to_dict()))
    os.replace(new, state)
