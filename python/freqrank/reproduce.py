"""`reproduce`: a row of a published table measured again, by that paper's own protocol, beside what was published.

Models, texts and protocols are pinned in `freqrank.published`. Nothing is fetched unless ``download`` says so, and
`plan` tells everything about a run, its cost among it, without touching the network or a weight.
"""

from __future__ import annotations

import difflib
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freqrank import evaluate, report
from freqrank._network import network
from freqrank.lowrank.allocation import trial_ranks, uniform_rank
from freqrank.lowrank.methods import METHODS
from freqrank.models.architectures import find_architecture
from freqrank.models.compression import _TRIAL_TOKENS, compress, group_linears
from freqrank.models.whole import backward_bytes
from freqrank.published import DATA, MODELS, PAPERS, PROTOCOLS, ROWS, ZERO_SHOT, Model, Protocol, Row, TextData
from freqrank.report import Report, Section, Table
from freqrank.tasks import TaskResult, run_tasks

__all__ = [
    "Estimate",
    "Measurement",
    "Plan",
    "Reproduction",
    "encoder",
    "estimate",
    "find_row",
    "lines_of",
    "names",
    "plan",
    "reproduce",
    "sample_chunks",
    "sample_offsets",
]

Encode = Callable[[str], list[int]]


# --- rows by name -----------------------------------------------------------------------------------------------------


def names(text: str = "") -> list[str]:
    """Names of the published rows that hold ``text``.

    >>> names("table2")
    ['svd-llm/table2/llama-2-7b-20-svd-llm']
    """
    return [name for name in ROWS if text in name]


def find_row(name: str) -> Row:
    """The published row of that name.

    Raises:
        ValueError: there is none; the message suggests names that are near.

    >>> find_row("basis-sharing/table1/llama-7b-20-svd-llm").values["wikitext2"]
    7.94
    """
    if name in ROWS:
        return ROWS[name]
    last = name.rsplit("/", 1)[-1]
    same = [known for known in ROWS if known.rsplit("/", 1)[-1] == last]
    near = same or difflib.get_close_matches(name, ROWS, n=5, cutoff=0.5) or names(last)[:5]
    raise ValueError(
        f"no published row is called {name!r}; "
        + (f"near: {', '.join(near)}" if near else "a name is PAPER/TABLE/MODEL-REMOVED-METHOD")
        + f"; `freqrank reproduce --list` shows all {len(ROWS)}"
    )


# --- the protocols ----------------------------------------------------------------------------------------------------


def encoder(tokenizer: Any, bos: int | None) -> Encode:
    """What turns a text into token ids, with one beginning-of-text token or none, whatever the tokenizer would do.

    Args:
        tokenizer: of transformers, or None: bytes.
        bos: id to put before every text, or None.

    >>> encoder(None, bos=None)("ab"), encoder(None, bos=0)("ab")
    ([97, 98], [0, 97, 98])
    """
    first = [] if bos is None else [bos]
    if tokenizer is None:
        return lambda text: first + list(text.encode())
    # verbose=False: that a whole text is longer than the model's context is no news here
    return lambda text: first + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def sample_offsets(
    rows: Sequence[str], encode: Encode, *, samples: int, length: int, seed: int, separator: str = "\n\n"
) -> Tensor:
    """SVD-LLM's calibration: text from random characters on, tokenised from there, its first ``length`` tokens.

    ``samples`` + 1 offsets are drawn by Python's ``random`` from the joined rows. From each, ten characters a token are
    tokenised; an offset with too few tokens behind it is left out, and not drawn again. The last sequence is dropped.
    All of this is what the released code (utils/data_utils.py) does.

    Returns:
        LongTensor [n, length], n at most ``samples``.

    Raises:
        ValueError: the text is too short, or none of the offsets has enough tokens.

    >>> sample_offsets(["abcdefgh" * 9], lambda text: list(text.encode()), samples=2, length=4, seed=3).shape
    torch.Size([2, 4])
    """
    text = separator.join(rows)
    if len(text) <= length:
        raise ValueError(f"the calibration text has {len(text)} characters; more than {length} are needed")
    draw = random.Random(seed)
    found = []
    for _ in range(samples + 1):
        start = draw.randint(0, len(text) - length - 1)
        ids = encode(text[start : start + 10 * length])
        if len(ids) >= length:
            found.append(ids[:length])
    if len(found) < 2:
        raise ValueError(
            f"of {samples + 1} places in the calibration text only {len(found)} have {length} tokens in the "
            f"{10 * length} characters behind them; take a longer text or shorter windows"
        )
    return torch.tensor(found[:-1], dtype=torch.long)


def sample_chunks(
    rows: Sequence[str],
    encode: Encode,
    *,
    samples: int,
    length: int,
    seed: int,
    shards: int = 4,
    batch: int = 1024,
) -> Tensor:
    """Basis Sharing's calibration: rows tokenised one by one, concatenated, cut into chunks, some of them drawn.

    As in its released code (prepare_data.py, model_factory.py), rows are cut into ``shards`` contiguous parts, one a
    process, and these into batches of ``batch`` rows; what is left of a batch after its last whole chunk is dropped.
    Of all chunks the first ``samples`` of a permutation by torch's generator are taken. Every row, an empty one too,
    brings its beginning-of-text token along.

    Returns:
        LongTensor [n, length], n at most ``samples``.

    Raises:
        ValueError: no batch has as many tokens as one chunk.

    >>> sample_chunks(["abc"] * 8, lambda text: list(text.encode()), samples=2, length=4, seed=0).shape
    torch.Size([2, 4])
    """
    shards = min(shards, len(rows)) or 1
    size, more = divmod(len(rows), shards)
    chunks: list[list[int]] = []
    for shard in range(shards):
        start = shard * size + min(shard, more)
        part = rows[start : start + size + (shard < more)]
        for first in range(0, len(part), batch):
            ids = [token for row in part[first : first + batch] for token in encode(row)]
            chunks += [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    if not chunks:
        raise ValueError(
            f"the calibration text gives no chunk of {length} tokens: its {len(rows)} rows are tokenised in "
            f"{shards} parts; take a longer text or shorter windows"
        )
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(seed))[:samples]
    return torch.tensor([chunks[i] for i in order.tolist()], dtype=torch.long)


def _sample(protocol: Protocol, rows: Sequence[str], encode: Encode, samples: int, length: int) -> Tensor:
    if protocol.sampling == "offsets":
        return sample_offsets(
            rows, encode, samples=samples, length=length, seed=protocol.seed, separator=protocol.separator
        )
    return sample_chunks(rows, encode, samples=samples, length=length, seed=protocol.seed)


def _evaluated(data: TextData, protocol: Protocol, rows: Sequence[str], encode: Encode) -> Tensor:
    """Token ids [T] of what is evaluated."""
    return torch.tensor(encode(protocol.separator.join(rows[: data.documents])), dtype=torch.long)


def lines_of(path: str | os.PathLike[str]) -> list[str]:
    """The rows of a local text file: its lines with their ends, blank ones empty, as the hub's WikiText-2 has them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is empty, or not UTF-8 text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no text file {str(path)!r}")
    try:
        # split at line feeds alone: form feeds and the like are part of a line
        rows = path.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if rows[-1] == "":
        rows.pop()
    if not rows:
        raise ValueError(f"{path} is empty")
    return [row + "\n" if row.strip() else "" for row in rows]


# --- what a run needs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What a run takes, counted from shapes; operations of attention's scores are left out.

    Attributes:
        parameters, linear_parameters: of the dense model, and of the linears that are compressed.
        parameters_after: of the compressed model, with uniform ranks.
        memory: bytes at the peak, by what they are for; they add up.
        disk: bytes to fetch, by what is fetched; models at two bytes a parameter.
        operations: multiplications and additions, by what they are for.
    """

    parameters: int
    linear_parameters: int
    parameters_after: int
    memory: Mapping[str, int]
    disk: Mapping[str, int]
    operations: Mapping[str, float]


@cache
def _shapes(name: str) -> Any:
    """The pinned model without data."""
    import transformers

    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**MODELS[name].config)
        return transformers.AutoModelForCausalLM.from_config(config)


def estimate(row: Row, data: Sequence[str] | None = None) -> Estimate:
    """Memory, disk and operations of a row's run, from shapes alone.

    >>> round(estimate(find_row("svd-llm/table2/llama-2-7b-20-svd-llm")).parameters / 1e9, 3)
    6.738
    """
    pin, protocol = MODELS[row.model], PROTOCOLS[row.protocol]
    model = _shapes(row.model)
    architecture = find_architecture(model)
    linears = [architecture.linear(i, role) for i in range(len(architecture.blocks)) for role in architecture.roles]
    inside = sum(
        architecture.shape(i, role).numel() for i in range(len(architecture.blocks)) for role in architecture.roles
    )
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    element = getattr(torch, pin.dtype).itemsize
    hidden, vocabulary = model.config.hidden_size, model.config.vocab_size
    used = [DATA[name] for name in _chosen(row, data)]
    tokens = sum(each.test_tokens for each in used)
    # logits of one batch of windows, and the same in float32
    logits = max(pin.window * vocabulary, 1 << 26) * (element + 4)
    memory = {"weights": total * element, "logits": logits}
    disk = {pin.hub: 2 * total} | {each.hub: each.size for each in used}
    operations: dict[str, float] = {"evaluation": 2.0 * tokens * (inside + hidden * vocabulary)}
    if not row.options:
        return Estimate(total, inside, total, memory, disk, operations)

    calibration = DATA[row.calibration]
    disk[calibration.hub] = calibration.size
    sampled = protocol.samples * pin.window
    shares = METHODS[row.options["method"]].shares
    groups = group_linears(architecture, shares, row.options.get("group_size", 1), "layers")
    shapes = [group.shape for group in groups]
    after = sum(uniform_rank(shape, row.ratio) * shape.per_rank for shape in shapes)
    widths = [architecture.shape(0, inputs[0])[1] for inputs in architecture.inputs]
    span = max(len(group.layers) for group in groups)
    largest = max(shapes, key=lambda shape: shape.dense)
    sides = [min(shape.inputs, shape.outputs) for shape in shapes]
    refit = row.options.get("refit") in ("sequential", "cross")
    searched = row.options.get("allocation", "uniform") != "uniform"
    memory |= {
        # not at the same time as logits, which are small beside them
        "activations": sampled * hidden * element * (3 if refit else 1),
        "Gram matrices": span * sum(width * width for width in widths) * 8,
        "factors found": after * 8,
        "one decomposition": 8 * (2 * largest.dense + 4 * max(sides) ** 2),
    }
    passes = 1 + searched + (8 if refit else 0)
    layers = len(architecture.blocks)
    operations |= {
        "calibration": 2.0 * sampled * inside * passes,
        "Gram matrices": float(sampled) * layers * sum(width * width for width in widths) * (1 + searched),
        "decompositions": sum(
            side * side * max(shape.inputs, shape.outputs) + 13.0 * side**3
            for side, shape in zip(sides, shapes, strict=True)
        )
        * (1 + searched),
    }
    operations["evaluation"] += 2.0 * tokens * (after + hidden * vocabulary)
    if row.options["method"] == "fwsvd":
        memory["backward pass"] = backward_bytes(linears, pin.window, vocabulary)
        operations["backward passes"] = 6.0 * sampled * inside
    if row.options.get("allocation") == "sensitivity":
        runs = sum(len(trial_ranks(shape, row.ratio)) for shape in shapes)
        operations["search for ranks"] = 2.0 * runs * min(_TRIAL_TOKENS, sampled) * (inside + hidden * vocabulary)
    return Estimate(total, inside, total - inside + after, memory, disk, operations)


def _chosen(row: Row, data: Sequence[str] | None) -> list[str]:
    """Names of the texts to evaluate: those of the table's perplexities, or some of them."""
    there = [name for name in row.values if name in DATA]
    if data is None:
        return there
    for name in data:
        if name not in there:
            raise ValueError(f"{row.name} has values for {', '.join(there)}; got data {name!r}")
    if not data:
        raise ValueError(f"data must not be empty; {row.name} has values for {', '.join(there)}")
    return list(data)


def _differences(row: Row, data: Sequence[str]) -> list[str]:
    """Where what is run here is known to differ from what was run then."""
    protocol = PROTOCOLS[row.protocol]
    found: list[str] = []
    texts = [DATA[name] for name in dict.fromkeys((*data, *[row.calibration] * bool(row.options)))]
    pins: list[Model | TextData] = [MODELS[row.model], *texts]
    loose = [pin.hub for pin in pins if pin.revision == "main"]
    found.append(f"no paper names a revision, so the present state is taken of {', '.join(loose)}")
    found += [note for text in texts for note in text.notes]
    if row.options:
        found.append(
            "statistics and decompositions are in float64, and singular Gram matrices are damped relative to their "
            "diagonal; the originals sum in float32 and shift eigenvalues"
        )
    layers, group = _layers(MODELS[row.model]), row.options.get("group_size", 1)
    if layers % group:
        found.append(
            f"the last group has {layers % group} layers and the rank of its own size; the original gives it the rank "
            f"of {group} layers, a little more than the ratio allows"
        )
    if protocol.sampling == "offsets" and protocol.source.startswith("SVD-LLM"):
        found.append("windows whose logits are not finite are left out there without a word; here they count")
    return found


def _layers(pin: Model) -> int:
    return pin.config.get("num_hidden_layers", 12)


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it begins. ``to_dict()`` gives JSON, ``tables()`` what a person reads."""

    row: Row
    data: tuple[str, ...]
    estimate: Estimate
    differences: tuple[str, ...]
    zero_shot: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists of JSON types."""
        row = self.row
        return report.plain(
            {
                "row": asdict(row),
                "paper": PAPERS[row.paper],
                "model": asdict(MODELS[row.model]),
                "calibration": asdict(DATA[row.calibration]) if row.options else None,
                "data": {name: asdict(DATA[name]) for name in self.data},
                "tasks": list(ZERO_SHOT) if self.zero_shot else [],
                "protocol": asdict(PROTOCOLS[row.protocol]),
                "compress": dict(row.options),
                "estimate": asdict(self.estimate),
                "differences": list(self.differences),
            }
        )

    def tables(self) -> list[Table]:
        """The published values, the protocol, and what a run takes."""
        row, cost = self.row, self.estimate
        pin, protocol = MODELS[row.model], PROTOCOLS[row.protocol]
        values: list[Sequence[str]] = [
            [_MEASURES.get(name, name), _printed(row.dense.get(name)), _printed(row.values[name])]
            for name in (*self.data, *["zero-shot"] * self.zero_shot)
        ]
        bos = pin.bos is not None and protocol.bos == "model"
        facts = {
            "row": row.name,
            "published in": f"{PAPERS[row.paper]}, {row.table}",
            "model": f"{pin.hub} (revision {pin.revision}), {pin.dtype}",
            "compress": ", ".join(f"{k}={v!r}" for k, v in row.options.items()) or "nothing: the dense model",
        }
        if row.options:
            facts["calibration text"] = _place(DATA[row.calibration], DATA[row.calibration].train)
            facts["calibration"] = (
                f"{protocol.samples} sequences of {pin.window} tokens, {_SAMPLINGS[protocol.sampling]}"
            )
            facts["seed"] = str(protocol.seed)
        for name in self.data:
            first = f", first {DATA[name].documents} rows" if DATA[name].documents else ""
            facts[f"evaluated: {name}"] = _place(DATA[name], DATA[name].test) + first
        if self.zero_shot:
            facts["zero-shot tasks"] = ", ".join(ZERO_SHOT)
        facts |= {
            "evaluation": f"rows joined by {protocol.separator!r}, windows of {pin.window} tokens side by side, mean "
            f"over {protocol.reduction}s, a shorter last window is {_KEPT[protocol.remainder]}",
            "beginning of text": (f"one token, id {pin.bos}" if bos else "none")
            + _BOS[protocol.sampling] * bool(bos and row.options),
            "protocol from": protocol.source,
        }
        facts |= {f"note {i}": note for i, note in enumerate((*protocol.notes, *row.notes, *self.differences), 1)}
        whole, inside = sum(cost.memory.values()), cost.linear_parameters
        takes = {
            "parameters": f"{cost.parameters:,} ({inside:,} in the linears), then {cost.parameters_after:,}",
            "memory": f"{report.size(whole)}: " + _parts(cost.memory, report.size),
            "to fetch": f"{report.size(sum(cost.disk.values()))}: " + _parts(cost.disk, report.size),
            "operations": f"{sum(cost.operations.values()):.1e}: " + _parts(cost.operations, lambda x: f"{x:.1e}"),
        }
        return [
            Table(["", ""], [[k, v] for k, v in facts.items()]),
            Table(["perplexity", "dense, published", "published"], values),
            Table(["", ""], [[k, f"about {v}"] for k, v in takes.items()]),
        ]

    def __str__(self) -> str:
        return "\n".join(map(str, self.tables()))


_SAMPLINGS = {
    "offsets": "from random characters of the joined text on, each tokenised again",
    "map-batches": "rows tokenised one by one, concatenated in batches of 1024 rows of each quarter, chunks permuted",
}
_MEASURES = {"zero-shot": "accuracy, zero-shot"}
_KEPT = {"keep": "kept", "drop": "dropped"}
_BOS = {"offsets": "; calibration: one a sequence", "map-batches": "; calibration: one a row, so many in a sequence"}


def _place(data: TextData, split: str) -> str:
    inside = data.config if data.files is None else data.files[split]
    return f"{data.hub} (revision {data.revision}), {inside}, split {split}, column {data.column}"


def _parts(parts: Mapping[str, Any], show: Callable[[Any], str]) -> str:
    return ", ".join(f"{name} {show(value)}" for name, value in parts.items())


def _shown(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _printed(value: float | None) -> str:
    """A published value as precise as it was printed."""
    return "-" if value is None else f"{value:,}"


def plan(row: str | Row, data: Sequence[str] | None = None, *, zero_shot: bool = False) -> Plan:
    """What `reproduce` would do, without the network, weights or data.

    Args:
        row: a name, see `names`.
        data: texts to evaluate; None: all that the table has a perplexity for.
        zero_shot: measure the mean accuracy over `freqrank.published.ZERO_SHOT` too.

    Raises:
        ValueError: no such row, or a text or an accuracy that it has no value for.

    Example:
        >>> planned = plan("basis-sharing/table1/llama-7b-20-basis-sharing-n2", data=["wikitext2"])
        >>> planned.row.values["wikitext2"], planned.to_dict()["model"]["hub"]
        (7.74, 'jeffwan/llama-7b-hf')
    """
    row = find_row(row) if isinstance(row, str) else row
    chosen = tuple(_chosen(row, data))
    if zero_shot and "zero-shot" not in row.values:
        raise ValueError(f"{row.name} has no value for the accuracy on zero-shot tasks")
    differences = _differences(row, chosen)
    if zero_shot:
        differences.append(
            "the tasks are those of the lm-eval that is installed (the original: 0.4.3), and that the mean is of 'acc' "
            "and not of 'acc_norm' is assumed; the estimate leaves them out"
        )
    return Plan(row, chosen, estimate(row, chosen), tuple(differences), zero_shot)


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """One text, or all tasks.

    Attributes:
        data: key of `freqrank.published.DATA`, or "zero-shot".
        tokens: that were read; of tasks, examples.
        dense, measured: perplexity of the model before and after it was compressed; of tasks, mean accuracy.
        dense_published, published: of the table; None where it has none.
    """

    data: str
    tokens: int
    dense: float
    measured: float
    dense_published: float | None
    published: float | None


@dataclass
class Reproduction:
    """What was measured beside what was published. ``str()`` gives a table, ``to_dict()`` JSON, ``write()`` a folder.

    Attributes:
        plan: of the run.
        stand_ins: what took the place of the pinned model, data or sizes; if there is any, the published values do not
            apply to what was measured.
        measurements: one a text.
        tokens: of the calibration, 0 for the dense model.
        notes: what a reader should know beside the plan's notes.
        report: of `freqrank.compress`, as JSON types; None for the dense model.
        tasks: results of each task on the model "dense" and "here", if they were asked for.
        seconds: how long it took.
    """

    plan: Plan
    stand_ins: dict[str, str]
    measurements: list[Measurement] = field(default_factory=list)
    tokens: int = 0
    notes: list[str] = field(default_factory=list)
    report: dict[str, Any] | None = None
    tasks: dict[str, list[TaskResult]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def applies(self) -> bool:
        """Whether the published values speak of what was measured."""
        return not self.stand_ins

    @property
    def warning(self) -> str:
        """What to say first; empty where nothing stood in."""
        if self.applies:
            return ""
        things = "; ".join(f"{name}: {what}" for name, what in self.stand_ins.items())
        return f"STAND-IN, the published values do not apply to what was measured. {things}"

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists of JSON types."""
        return report.plain(
            {
                "row": self.plan.row.name,
                "applies": self.applies,
                "stand_ins": self.stand_ins,
                "measurements": [asdict(measurement) for measurement in self.measurements],
                "calibration_tokens": self.tokens,
                "notes": self.notes,
                "seconds": self.seconds,
                "plan": self.plan.to_dict(),
                "report": self.report,
                "tasks": self.tasks,
            }
        )

    def tables(self) -> list[Table]:
        """Published and measured side by side; what does not apply is in brackets."""
        bracket = "{}" if self.applies else "({})"
        lines: list[Sequence[str]] = []
        for m in self.measurements:
            printed = [_printed(m.dense_published), _printed(m.published)]
            printed = [text if text == "-" else bracket.format(text) for text in printed]
            ratio = f"{m.measured / m.published:.3f}" if self.applies and m.published else "-"
            here = [f"{value:.3f}" if m.data in _MEASURES else _shown(value) for value in (m.dense, m.measured)]
            label = _MEASURES.get(m.data, m.data)
            lines.append([label, f"{m.tokens:,}", printed[0], here[0], printed[1], here[1], ratio])
        head = ["perplexity", "tokens", "dense, published", "dense, here", "published", "here", "here / published"]
        return [Table(head, lines, self.plan.row.name)]

    def __str__(self) -> str:
        return "\n".join([*[self.warning] * (not self.applies), *map(str, self.tables()), *self.notes])

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """A page and ``results.json``, in place of an earlier report."""
        row = self.plan.row
        text = self.warning or f"By the protocol of {PROTOCOLS[row.protocol].source}."
        text = " ".join([text, *(f"{note}." for note in self.notes)])
        section = Section(
            "reproduction", row.name, text, [*self.tables(), *self.plan.tables()], self.to_dict(), self.seconds
        )
        page = Report(f"freqrank: {row.name} reproduced", f"Published: {PAPERS[row.paper]}, {row.table}.", [section])
        return report.write_folder(page, Path(folder))


def reproduce(
    row: str | Row,
    *,
    data: Sequence[str] | None = None,
    zero_shot: bool = False,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    calibration: Sequence[str] | None = None,
    text: Sequence[str] | None = None,
    samples: int | None = None,
    window: int | None = None,
    device: str = "cpu",
    download: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Reproduction:
    """Measure a published row again: its model and texts, its protocol, its method.

    With any of ``model``, ``calibration``, ``text``, ``samples`` or ``window`` it is a stand-in that is measured, by
    the same protocol, and the result says so.

    Args:
        row: a name, see `names`.
        data: texts to evaluate; None: all that the table has a perplexity for.
        zero_shot: measure the mean accuracy over `freqrank.published.ZERO_SHOT` too, which lm-eval does.
        model: in place of the pinned one; it is compressed in place.
        tokenizer: of ``model``; None: bytes.
        calibration: rows of text to calibrate on, in place of the pinned data (`lines_of` reads a file).
        text: rows of text to evaluate in place of every pinned one, by the conventions of each.
        samples, window: another number of calibration sequences, or tokens in each and in an evaluation window.
        device: where the pinned model runs; a given one stays where it is.
        download: fetch what is not in the local cache of the Hugging Face hub.
        checkpoint: folder, as for `freqrank.compress`.
        progress: show bars on standard error.

    Returns:
        A :class:`Reproduction`.

    Raises:
        ValueError: no such row or text, a model or data that is not here and may not be fetched, a text or a context
            that is too short; what `freqrank.compress` and `freqrank.evaluate.perplexity` raise.
        ImportError: pinned data and no `datasets`, tasks and no `lm-eval`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=2, max_position_embeddings=64)
        >>> rows = ["a line of text\\n"] * 200
        >>> done = reproduce("basis-sharing/table1/llama-7b-20-svd-llm", data=["wikitext2"], progress=False,
        ...                  model=LlamaForCausalLM(config), calibration=rows, text=rows, samples=4, window=32)
        >>> done.applies, done.measurements[0].published
        (False, 7.94)
    """
    start = time.perf_counter()
    planned = plan(row, data, zero_shot=zero_shot)
    row = planned.row
    pin, protocol = MODELS[row.model], PROTOCOLS[row.protocol]
    for name, value, least in (("samples", samples, 1), ("window", window, 2)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an integer; got {value!r}")
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    if tokenizer is not None and model is None:
        raise ValueError("a tokenizer is given without its model")
    stand_ins = {}
    if model is not None:
        stand_ins["model"] = f"{type(model).__name__} in place of {pin.hub}"
    if calibration is not None and row.options:
        stand_ins["calibration"] = f"{len(calibration)} local rows in place of {DATA[row.calibration].hub}"
    if text is not None:
        stand_ins["text"] = f"{len(text)} local rows in place of {', '.join(DATA[n].hub for n in planned.data)}"
    if samples is not None and row.options:
        stand_ins["samples"] = f"{samples} in place of {protocol.samples}"
    if window is not None:
        stand_ins["window"] = f"{window} tokens in place of {pin.window}"
    done = Reproduction(planned, stand_ins)
    length = window or pin.window

    # texts before weights: they are small and may be missing
    given = model is not None
    calibrating = None
    if row.options:
        calibrating = calibration if calibration is not None else _rows(row.calibration, "train", download)
    texts = {name: text if text is not None else _rows(name, "test", download) for name in planned.data}
    if not given:
        model, tokenizer = _load(pin, download, device)
    assert model is not None
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if context is not None and context < length:
        raise ValueError(
            f"the model has a context of {context} tokens and windows have {length}; give a smaller window"
        )
    bos = pin.bos if protocol.bos == "model" else None
    if bos is not None and given:
        bos = getattr(tokenizer, "bos_token_id", None)
        if bos is None:
            done.notes.append("the stand-in has no beginning-of-text token, so none is put where the protocol has one")
    elif bos is not None and tokenizer.bos_token_id != bos:
        done.notes.append(
            f"texts begin with token {bos}, as pinned; the tokenizer of {pin.hub} names {tokenizer.bos_token_id}"
        )
    encode = encoder(tokenizer, bos)
    ids = {name: _evaluated(DATA[name], protocol, rows, encode) for name, rows in texts.items()}
    sequences = None
    if calibrating is not None:
        wanted = samples or protocol.samples
        sequences = _sample(protocol, calibrating, encode, wanted, length)
        done.tokens = sequences.numel()
        if len(sequences) < wanted:
            done.notes.append(f"the calibration text gave {len(sequences)} of {wanted} sequences")

    def perplexities() -> dict[str, float]:
        return {
            name: evaluate.perplexity(
                model,
                each,
                window=length,
                reduction=protocol.reduction,
                remainder=protocol.remainder,
                progress=progress,
            )
            for name, each in ids.items()
        }

    def scored(which: str) -> dict[str, float]:
        if not zero_shot:
            return {}
        found = run_tasks(model, tokenizer, ZERO_SHOT, num_fewshot=0, download=download)
        done.tasks[which] = found
        return {"zero-shot": sum(task.metrics["acc"] for task in found) / len(found)}

    accuracy = scored("dense")  # first: it may want what is not here
    dense = perplexities() | accuracy
    measured = dense
    if sequences is not None:
        made = compress(model, list(sequences.split(1)), checkpoint=checkpoint, progress=progress, **row.options)
        done.report = report.plain(made.to_dict())
        done.notes += made.notes
        measured = perplexities() | scored("here")
    counts = {name: each.numel() for name, each in ids.items()}
    counts["zero-shot"] = sum(task.examples or 0 for task in done.tasks.get("dense", ()))
    done.measurements = [
        Measurement(name, counts[name], dense[name], measured[name], row.dense.get(name), row.values[name])
        for name in dense
    ]
    done.seconds = time.perf_counter() - start
    return done


def _load(pin: Model, download: bool, device: str) -> tuple[Any, Any]:
    """The pinned model and its tokenizer, from the local cache or, if it may, from the hub."""
    import transformers

    where: dict[str, Any] = {"revision": pin.revision, "local_files_only": not download}
    with network(download):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(pin.hub, **where)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                pin.hub, dtype=getattr(torch, pin.dtype), **where
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the model {pin.hub} cannot be loaded ({_first_line(error)})" + _advice(download, "--model FOLDER")
            ) from error
    return model.to(device).eval(), tokenizer


def _rows(name: str, purpose: str, download: bool) -> list[str]:
    """The rows of a pinned data set's split."""
    data = DATA[name]
    split = getattr(data, purpose)
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"reading {data.hub} needs `datasets` ({error}): pip install 'freqrank[eval]', or give a local text file"
        ) from None
    options: dict[str, Any] = {"revision": data.revision, "split": split}
    if data.files is not None:
        options["data_files"] = {split: data.files[split]}
    with network(download):
        try:
            loaded = datasets.load_dataset(data.hub, data.config, **options)
        except (OSError, ValueError) as error:
            option = "--calibration FILE" if purpose == "train" else "--text FILE"
            raise ValueError(
                f"the data {data.hub} cannot be read ({_first_line(error)})" + _advice(download, option)
            ) from error
    return list(loaded[data.column])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _advice(download: bool, option: str) -> str:
    return "" if download else f"; it is fetched only with --download, and {option} stands in for it"
