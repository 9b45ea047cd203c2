"""The command line: ``freqrank`` or ``python -m freqrank``."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import torch

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from typer.core import TyperGroup
except ImportError as _error:
    print(
        f"freqrank: the command line needs typer and rich ({_error}): pip install 'freqrank[cli]'",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

from freqrank import data, evaluate, report
from freqrank.lowrank.methods import METHODS

if TYPE_CHECKING:
    from torch import Tensor, nn

BUNDLED = ("base", "linear")
_BUNDLED_FOLDER = Path(__file__).parent / "bundled"

out = Console(highlight=False)
#: progress and messages, so that what a command prints to stdout can be piped
err = Console(stderr=True, highlight=False)


class _Group(TyperGroup):
    """Turns what the library raises about bad input into one line on stderr and exit code 2."""

    def main(self, *args: Any, **options: Any) -> Any:
        if not options.get("standalone_mode", True) or os.environ.get("FREQRANK_TRACEBACK"):
            return super().main(*args, **options)
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except Exception as error:
            _fail(error)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Exception) -> NoReturn:
    """Say in one line what was wrong, and leave; what is no one's input comes through as the bug that it is."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's and click's own
        context = getattr(error, "ctx", None)
        if message := error.format_message():  # empty where the help was shown for want of a command
            _say(message + (f" (see {context.command_path} --help)" if context is not None else ""))
        sys.exit(error.exit_code)
    if type(error).__name__ == "Abort":
        _say("stopped")
        sys.exit(1)
    names = {base.__name__ for base in type(error).__mro__}
    if isinstance(error, ImportError) and error.name is None:  # it says itself what to install
        _say(str(error))
    elif isinstance(error, ImportError) and not (error.name or "").startswith("freqrank"):
        _say(f"{error}; pip install 'freqrank[cli]' installs what the command line needs")
    elif isinstance(error, (ValueError, TypeError, OSError, FloatingPointError)) or "SafetensorError" in names:
        _say(str(error) or type(error).__name__)
    else:
        raise error
    sys.exit(2)


def _say(message: str) -> None:
    print("freqrank: " + " ".join(message.split()), file=sys.stderr)


app = typer.Typer(
    name="freqrank",
    cls=_Group,
    help="Make a trained language model linear-time and smaller.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="FREQRANK_TRACEBACK=1 shows where an error came from.",
)

Model = Annotated[
    str, typer.Argument(help="A Hugging Face model folder, or bundled:base or bundled:linear.", show_default=False)
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to write; must not exist, or be empty.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Download = Annotated[
    bool,
    typer.Option("--download", help="Allow fetching a model that is not a local folder from the Hugging Face hub."),
]
Dtype = Annotated[
    str, typer.Option(help="Number format to compute and save in: auto (the model's own), float32, bfloat16, float16.")
]
_TEXT_HELP = "a text file, or stdlib:train, stdlib:validation, stdlib:test (the running Python's own source)."
Window = Annotated[
    int | None, typer.Option(help="Tokens that the model sees at once; default: its context, at most 2048.", min=2)
]
Limit = Annotated[int | None, typer.Option(help="Score only the first so many tokens.", min=2)]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")]

# Of what compresses.
Calibration = Annotated[str, typer.Option(help="Text that the model is measured on: " + _TEXT_HELP)]
MethodName = Annotated[str, typer.Option("--method", help="svd, fwsvd, asvd, svd-llm, basis-sharing, lisc or best.")]
Ratio = Annotated[float, typer.Option(help="Fraction of the compressed linears' parameters to remove.")]
GroupSize = Annotated[int, typer.Option(help="Layers that share one basis.")]
Share = Annotated[str, typer.Option(help="What shares a basis: layers, modules or both.")]
Refit = Annotated[str | None, typer.Option(help="Refit of the coefficients: own, sequential or cross.")]
Samples = Annotated[int, typer.Option(help="Calibration samples.", min=1)]
Scored = Annotated[str | None, typer.Option("--text", help="Score the model before and after on: " + _TEXT_HELP)]
Checkpointed = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="Folder that keeps what is finished: a run that was stopped goes on there.",
        show_default=False,
    ),
]

# Of what makes attention linear. None is what the feature map, or the whole combination, comes with.
FeatureMapName = Annotated[
    str,
    typer.Option(
        "--feature-map",
        help="A whole combination of the layer's options, dijiang (as released), recommended or hybrid, or a feature "
        "map: hedgehog, wdcf, prf, ...",
    ),
]
Frequencies = Annotated[
    int | None, typer.Option("--num-frequencies", help="Columns of the map's projection.", show_default=False)
]
MapTemperature = Annotated[
    str | None,
    typer.Option("--temperature", help="Factor before the map: a number, or pretrained.", show_default=False),
]
DecayName = Annotated[
    str | None,
    typer.Option("--decay", help="Of the state: multi-scale, learned, token or none.", show_default=False),
]
Norm = Annotated[
    str | None,
    typer.Option(help="For softmax's denominator: group, rms, denominator or none.", show_default=False),
]
NormGroups = Annotated[str | None, typer.Option(help="Groups of norm group: head_dim or heads.", show_default=False)]
Gate = Annotated[str | None, typer.Option(help="Of the output: released, open or none.", show_default=False)]
PositionTable = Annotated[int | None, typer.Option(help="Positions with learned factors; 0: none.", show_default=False)]
SoftmaxWindow = Annotated[
    int | None,
    typer.Option("--attention-window", help="Newest tokens that softmax attention sees.", show_default=False),
]
Sinks = Annotated[int | None, typer.Option(help="First tokens that it sees besides.", show_default=False)]
KeepLayers = Annotated[
    str | None,
    typer.Option(help="Layers that stay softmax, 0,5 or -1; none if not given.", show_default=False),
]

# Of what trains. None is what freqrank.distill does.
Train = Annotated[str | None, typer.Option(help="Fine-tune after converting, on: " + _TEXT_HELP)]
Steps = Annotated[int, typer.Option(help="Fine-tuning steps.", min=1)]
Batch = Annotated[int, typer.Option(help="Sequences of a fine-tuning batch.", min=1)]
TrainLength = Annotated[int, typer.Option("--length", help="Tokens in a fine-tuning sequence.", min=2)]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.", show_default=False)]
Accumulate = Annotated[int | None, typer.Option(help="Batches a fine-tuning step.", min=1, show_default=False)]
Trained = Annotated[
    str | None,
    typer.Option("--trained", help="What is fine-tuned: all, attention or lora.", show_default=False),
]
Precision = Annotated[
    str | None,
    typer.Option(help="What fine-tuning computes in: float32 or bfloat16; weights stay.", show_default=False),
]
Recompute = Annotated[
    bool, typer.Option("--recompute", help="Keep one block's activations while fine-tuning: less memory, more time.")
]


# ---------------------------------------------------------------- what the commands share


@contextmanager
def _progress(description: str) -> Iterator[Callable[..., None]]:
    """A bar on stderr; yields ``update(done, total, description)``, which may be called any number of times."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(description, total=None)

        def update(done: float | None = None, total: float | None = None, text: str | None = None) -> None:
            progress.update(task, completed=done, total=total, description=text)

        yield update


def _load(name: str, *, download: bool = False, dtype: str = "float32", offload: str | None = None) -> tuple[Any, Any]:
    """The causal language model called ``name`` and its tokenizer (None for a byte-level model without one).

    With a folder ``offload`` its weights stay on disk.
    """
    import transformers
    from safetensors import SafetensorError

    from freqrank.models.offload import load_offloaded

    _check_dtype("--dtype", dtype)
    source, local = _resolve(name, download)
    options: dict[str, Any] = {"local_files_only": local or not download}
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with _progress(f"load {name}"):
        try:
            load: Any = transformers.AutoModelForCausalLM.from_pretrained
            loaded: Any = (load if offload is None else partial(load_offloaded, offload_folder=offload))(
                source,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, all of them and in our words
                **options,
            )
        except SafetensorError as error:
            raise ValueError(f"the weights in {source} are damaged or incomplete: {error}") from error
    model, loading = loaded
    lost = sorted(loading["missing_keys"]) + sorted(str(key[0]) for key in loading["mismatched_keys"])
    if lost:
        raise ValueError(
            f"the model folder {source} is incomplete: {len(lost)} weights are missing or misshapen, {lost[0]} first"
        )
    model.eval()
    return model, _tokenizer(model, source, options)


def _check_dtype(option: str, name: str) -> None:
    dtypes = ("auto", "float32", "bfloat16", "float16")
    if name not in dtypes:
        raise ValueError(f"{option} must be one of {', '.join(dtypes)}; got {name!r}")


def _check_device(name: str) -> None:
    """Raise unless torch can use the device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def _resolve(name: str, download: bool) -> tuple[str, bool]:
    """Where to load ``name`` from, and whether that is a folder here."""
    if name.startswith("bundled:"):
        which = name.removeprefix("bundled:")
        if which not in BUNDLED:
            raise ValueError(f"bundled models are {', '.join('bundled:' + b for b in BUNDLED)}; got {name!r}")
        folder = _BUNDLED_FOLDER / which
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{name} is missing from this installation: no {folder / 'config.json'}")
        return str(folder), True
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name} is not a Hugging Face model folder: it has no config.json")
        try:
            config = json.loads((folder / "config.json").read_text())
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'} is damaged: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{folder / 'config.json'} is damaged: it must hold a JSON object")
        return name, True
    if folder.exists():
        raise ValueError(f"{name} is a file; a model is a folder with config.json and safetensors in it")
    if not download:
        raise ValueError(
            f"no model folder {name!r} here; a name on the Hugging Face hub is fetched only with --download, and the "
            "models that ship with freqrank are bundled:base and bundled:linear"
        )
    return name, False


def _tokenizer(model: nn.Module, source: str, options: dict[str, Any]) -> Any:
    import transformers

    has_files = not Path(source).is_dir() or any(
        (Path(source) / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    )
    if has_files:
        try:
            return transformers.AutoTokenizer.from_pretrained(source, **options)
        except (ValueError, OSError) as error:
            raise ValueError(f"the tokenizer files in {source} cannot be read: {error}") from error
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    if vocabulary != 256:
        raise ValueError(
            f"{source} has no tokenizer files; only a model with a vocabulary of 256 is read as bytes, and this one "
            f"has {vocabulary}"
        )
    return None


def _check_text(name: str | None, option: str) -> None:
    """Raise unless ``name``, if given, is one of a text; cheaper than to load a model first."""
    if name is not None and not name.startswith("stdlib:") and not Path(name).is_file():
        raise FileNotFoundError(f"{option} must name a text file or stdlib:train, :validation, :test; got {name!r}")


def _read(name: str, tokenizer: Any, option: str) -> Tensor:
    """Token ids [T] of a text file, or of a split of the standard library's source."""
    _check_text(name, option)
    if name.startswith("stdlib:"):
        ids = data.stdlib_bytes(name.removeprefix("stdlib:"))
        if tokenizer is None:
            return ids
        raw = bytes(ids.tolist())
    else:
        raw = Path(name).read_bytes()
        if not raw:
            raise ValueError(f"{option}: {name} is empty")
        if tokenizer is None:
            return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {name} is not UTF-8 text: {error}") from None
    return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)


def _context(network: Any) -> int:
    """Tokens that the model was made for, at most 2048."""
    return min(2048, getattr(network.config, "max_position_embeddings", None) or 2048)


def _samples(ids: Tensor, count: int, length: int, seed: int, option: str) -> Tensor:
    if ids.numel() < length:
        raise ValueError(f"{option}: the text has {ids.numel()} tokens, fewer than one sample of --length {length}")
    return data.windows(ids, length, count, seed=seed)


def _calibration(ids: Tensor, count: int, length: int, seed: int) -> list[Tensor]:
    """``count`` random samples, or the whole text once where it is no longer than they are together."""
    if ids.numel() > count * length:
        return [data.windows(ids, length, count, seed=seed)]
    whole = ids.numel() // length * length
    return [ids[:whole].view(-1, length), ids[None, whole:]]


def _save(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    from freqrank.models.saving import save_model

    with _progress(f"write {folder}"):
        save_model(model, folder, tokenizer=tokenizer)


def _count(model: nn.Module) -> dict[str, int]:
    """Parameters and bytes; a tensor that several modules share counts once."""
    from freqrank.models.costs import model_size

    return model_size(model)._asdict()


def _emit(result: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(report.plain(result), indent=1))
    else:
        show()


def _facts(title: str, facts: dict[str, str]) -> None:
    report.Table(["", ""], [[name, value] for name, value in facts.items()], title).print(out)


# ---------------------------------------------------------------- the commands


@app.callback()
def _root() -> None:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        _say(f"warning: {message}")

    warnings.showwarning = show
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(
            f"the command line runs in one process, and this is one of {size} (WORLD_SIZE): under torchrun, call "
            "freqrank.compress or freqrank.distill from a script, on every rank, and save on the first"
        )


@app.command()
def info(as_json: AsJson = False) -> None:
    """Versions, devices, and which native libraries were loaded and why."""
    facts = report.machine()
    bundled = {name: (_BUNDLED_FOLDER / name / "config.json").is_file() for name in BUNDLED}

    def show() -> None:
        cpu = facts["cpu"]
        _facts(
            "freqrank " + facts["versions"]["freqrank"],
            {
                **{name: version for name, version in facts["versions"].items() if name != "freqrank"},
                "processor": f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads",
                "instructions": f"{cpu['isa']}, chosen at run time",
                "GPUs": ", ".join(facts["cuda"]) or "none that torch can use",
                **{f"{name} library": state for name, state in facts["libraries"].items()},
                **{f"bundled:{name}": "present" if here else "missing" for name, here in bundled.items()},
            },
        )

    _emit({**facts, "bundled": bundled}, as_json, show)


@app.command()
def compress(
    context: typer.Context,
    model: Model,
    output: Output,
    calibration: Calibration,
    method: MethodName = "lisc",
    ratio: Ratio = 0.2,
    group_size: GroupSize = 2,
    share: Share = "layers",
    scale: Annotated[str, typer.Option(help="A layer's input scale: trace, frobenius, spectral or none.")] = "trace",
    exponent: Annotated[
        float, typer.Option(help="Power of lisc's scale correction, twice that of asvd's channel weights; 0 is none.")
    ] = 1.0,
    block_weight: Annotated[str | None, typer.Option(help="Weight of a layer's block: norm or sqrt-scale.")] = None,
    refit: Refit = None,
    allocation: Annotated[
        str, typer.Option(help="Ranks: uniform, effective-rank, auto, sensitivity or loss.")
    ] = "uniform",
    depth_weight: Annotated[
        float | None, typer.Option(help="g of a weight g^-l for block l of a group; above 1 early blocks count more.")
    ] = None,
    statistics: Annotated[
        str, typer.Option(help="Inputs that count: original, or error-aware (of the compressed blocks before).")
    ] = "original",
    output_weight: Annotated[str | None, typer.Option(help="Weight of a linear's outputs: fisher.")] = None,
    grouping: Annotated[str, typer.Option(help="Layers that share a basis: adjacent or similar.")] = "adjacent",
    storage: Annotated[
        str | None,
        typer.Option(help="int8: factors as 8-bit integers. Default: the model's dtype.", show_default=False),
    ] = None,
    samples: Samples = 256,
    length: Annotated[
        int | None, typer.Option(help="Tokens in a calibration sample; default: as --window.", min=2)
    ] = None,
    text: Scored = None,
    window: Window = None,
    limit: Limit = None,
    dtype: Dtype = "auto",
    checkpoint: Checkpointed = None,
    offload: Annotated[
        Path | None,
        typer.Option(
            help="Folder for a model larger than memory: its weights stay where they are and are read as needed; "
            "hidden states and factors go there until the smaller model is saved.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    download: Download = False,
    as_json: AsJson = False,
) -> None:
    """Replace a model's linears by calibrated low-rank factors that layers share, and save the smaller model."""
    from freqrank.models.checkpoint import Checkpoint
    from freqrank.models.compression import check_options
    from freqrank.models.compression import compress as compress_model
    from freqrank.models.saving import check_output_folder

    check_output_folder(output)
    options: dict[str, Any] = {
        "method": method, "ratio": ratio, "group_size": group_size, "share": share, "scale": scale,
        "exponent": exponent, "block_weight": block_weight, "refit": refit, "allocation": allocation, "seed": seed,
        "depth_weight": depth_weight, "statistics": statistics, "output_weight": output_weight, "grouping": grouping,
        "storage": storage,
    }  # fmt: skip
    check_options(**options)
    scratch = None
    if offload is not None:
        offload.mkdir(parents=True, exist_ok=True)
        scratch = context.with_resource(TemporaryDirectory(prefix="freqrank-", dir=offload))
    network, tokenizer = _load(model, download=download, dtype=dtype, offload=scratch)
    window = window or _context(network)
    length = length or _context(network)
    ids = _read(calibration, tokenizer, "--calibration")
    held_out = None if text is None else _read(text, tokenizer, "--text")[:limit]
    before = _count(network)
    losses: dict[str, float] = {}
    if held_out is not None:
        losses["before"] = evaluate.loss(network, held_out, window=window, progress=True)
    done = compress_model(
        network,
        _calibration(ids, samples, length, seed),
        progress=True,
        checkpoint=checkpoint,
        **options,
    )
    if held_out is not None:
        losses["after"] = evaluate.loss(network, held_out, window=window, progress=True)
    _save(network, output, tokenizer)
    if checkpoint is not None:
        Checkpoint.remove(checkpoint)
    after = _count(network)

    def show() -> None:
        out.print(str(done), markup=False, soft_wrap=True)
        facts = {"from": model, "to": str(output)}
        if losses:
            facts["loss"] = f"{losses['before']:.4f} -> {losses['after']:.4f} nats a token"
        _facts("", facts)

    _emit({"model": model, "output": str(output), "before": before, "after": after, "loss": losses, "report": done},
          as_json, show)  # fmt: skip


@app.command()
def compare(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder of the results; one that was begun is finished.", show_default=False
        ),
    ],
    calibration: Calibration,
    validation: Annotated[str, typer.Option(help="Text that group sizes are chosen on: " + _TEXT_HELP)],
    test: Annotated[str, typer.Option(help="Text whose loss is reported: " + _TEXT_HELP)],
    methods: Annotated[
        str, typer.Option(help="Methods, with commas between, switches behind them: 'lisc block_weight=norm'.")
    ] = ",".join(METHODS),
    ratios: Annotated[str, typer.Option(help="Fractions to remove, with commas between.")] = "0.2,0.4,0.6,0.8",
    group_sizes: Annotated[str, typer.Option(help="Layers a basis, with commas between.")] = "1,2,3,6",
    refits: Annotated[str, typer.Option(help="Refits: none, own, sequential, cross, with commas between.")] = "none",
    spreads: Annotated[
        str, typer.Option(help="Input scales over the layers: none, rising, falling, with commas between.")
    ] = "none",
    samples: Samples = 64,
    length: Annotated[int, typer.Option(help="Tokens in a calibration sample.", min=2)] = 256,
    window: Window = None,
    limit: Limit = None,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    download: Download = False,
    as_json: AsJson = False,
) -> None:
    """Compress copies of a model by several methods and compare their losses: a table, plots, CSV, JSON and a page."""
    from freqrank.compare import compare as compare_methods

    network, tokenizer = _load(model, download=download, dtype=dtype)
    done = compare_methods(
        network,
        _samples(_read(calibration, tokenizer, "--calibration"), samples, length, seed, "--calibration"),
        _read(validation, tokenizer, "--validation")[:limit],
        _read(test, tokenizer, "--test")[:limit],
        methods=_listed(methods, str, "--methods"),
        ratios=_listed(ratios, float, "--ratios"),
        group_sizes=_listed(group_sizes, int, "--group-sizes"),
        refits=[None if refit == "none" else refit for refit in _listed(refits, str, "--refits")],
        spreads=_listed(spreads, str, "--spreads"),
        window=window or _context(network),
        seed=seed,
        folder=output,
    )

    def show() -> None:
        for table in done.tables():
            table.print(out)
        out.print(f"Written: {output}", markup=False, soft_wrap=True)

    _emit({"model": model, "output": str(output), **done.to_dict()}, as_json, show)


def _listed(text: str, kind: Callable[[str], Any], option: str) -> list[Any]:
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be values with commas between; got {text!r}") from None


@app.command()
def reproduce(
    row: Annotated[
        str | None,
        typer.Argument(help="PAPER/TABLE/ROW; with --list, a part of the names to show.", show_default=False),
    ] = None,
    list_rows: Annotated[bool, typer.Option("--list", help="Print the published rows there are.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be run and what it takes; no network, no weights.")
    ] = False,
    on: Annotated[
        str | None, typer.Option("--data", help="Texts to evaluate, with commas between; all of the row if not given.")
    ] = None,
    zero_shot: Annotated[
        bool, typer.Option("--zero-shot", help="Measure the table's accuracy on zero-shot tasks too, by lm-eval.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="A model in place of the pinned one: a folder, bundled:base or bundled:linear.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A text file to calibrate on in place of the pinned data; a line is a row.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file to evaluate in place of the pinned data; a line is a row.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration sequences, in place of the protocol's.", min=1)
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens in a sequence and in a window, in place of the protocol's.", min=2)
    ] = None,
    device: Device = "cpu",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for a page and the numbers.", show_default=False)
    ] = None,
    checkpoint: Checkpointed = None,
    download: Annotated[
        bool, typer.Option("--download", help="Allow fetching the pinned model and data from the Hugging Face hub.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a row of a published table again, by that paper's own protocol, beside the published value.

    A model, a text or a size given here stands in for what the paper used; then the published value does not apply, and
    the output says so.
    """
    from freqrank import reproduce as reproducing
    from freqrank.models.checkpoint import Checkpoint

    if list_rows:
        _list_rows(row or "", as_json)
        return
    if row is None:
        raise ValueError("name a row, PAPER/TABLE/ROW; `freqrank reproduce --list` shows what there is")
    chosen = None if on is None else _listed(on, str, "--data")
    if dry_run:
        given = {
            "--model": model,
            "--calibration": calibration,
            "--text": text,
            "--samples": samples,
            "--window": window,
            "--output": output,
            "--checkpoint": checkpoint,
        }
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"--dry-run describes the published run and writes nothing; leave out {option}")
        planned = reproducing.plan(row, chosen, zero_shot=zero_shot)

        def tell() -> None:
            for table in planned.tables():
                table.print(out)

        _emit(planned.to_dict(), as_json, tell)
        return
    reproducing.plan(row, chosen, zero_shot=zero_shot)  # a wrong name is not worth loading a model
    if output is not None:
        report.check_folder(output)
    _check_device(device)
    network = tokenizer = None
    rows = {
        option: None if path is None else reproducing.lines_of(path)
        for option, path in (("calibration", calibration), ("text", text))
    }
    if model is not None:
        network, tokenizer = _load(model, dtype="auto")
        network.to(device)
    done = reproducing.reproduce(
        row,
        data=chosen,
        zero_shot=zero_shot,
        model=network,
        tokenizer=tokenizer,
        calibration=rows["calibration"],
        text=rows["text"],
        samples=samples,
        window=window,
        device=device,
        download=download,
        checkpoint=checkpoint,
    )
    if output is not None:
        done.write(output)
    if checkpoint is not None:
        Checkpoint.remove(checkpoint)
    if not done.applies and as_json:
        _say(f"warning: {done.warning}")

    def show() -> None:
        if not done.applies:
            out.print(done.warning, style="bold red", markup=False, soft_wrap=True)
        for table in done.tables():
            table.print(out)
        for note in done.notes:
            out.print(f"note: {note}", markup=False, soft_wrap=True)
        if output is not None:
            out.print(f"Written: {output}", markup=False, soft_wrap=True)

    _emit(done.to_dict(), as_json, show)


def _list_rows(text: str, as_json: bool) -> None:
    from freqrank import reproduce as reproducing
    from freqrank.published import ROWS

    found = {name: dict(ROWS[name].values) for name in reproducing.names(text)}
    if not found:
        raise ValueError(f"no published row has {text!r} in its name; `freqrank reproduce --list` shows all")

    def show() -> None:
        for name, values in found.items():
            shown = ", ".join(f"{where} {value:,}" for where, value in values.items())
            out.print(f"{name}  {shown}", markup=False, soft_wrap=True)

    _emit(found, as_json, show)


@app.command()
def linearize(
    context: typer.Context,
    model: Model,
    output: Output,
    feature_map: FeatureMapName = "dijiang",
    num_frequencies: Frequencies = None,
    temperature: MapTemperature = None,
    decay: DecayName = None,
    norm: Norm = None,
    norm_groups: NormGroups = None,
    gate: Gate = None,
    position_table: PositionTable = None,
    attention_window: SoftmaxWindow = None,
    sinks: Sinks = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to convert, 0,2,4 or -1; all if not given.", show_default=False)
    ] = None,
    keep_layers: KeepLayers = None,
    train: Train = None,
    recipe: Annotated[str, typer.Option(help="Fine-tuning recipe: released (next token), distill or align.")] = (
        "released"
    ),
    steps: Steps = 300,
    batch: Batch = 8,
    length: TrainLength = 256,
    lr: LearningRate = None,
    accumulate: Accumulate = None,
    trained: Trained = None,
    precision: Precision = None,
    recompute: Recompute = False,
    checkpoint: Checkpointed = None,
    text: Scored = None,
    window: Window = None,
    limit: Limit = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Seed = 0,
    download: Download = False,
    as_json: AsJson = False,
) -> None:
    """Turn softmax attention into frequency-domain linear attention, fine-tune if asked, and save the model.

    A converted model predicts badly until it is fine-tuned.
    """
    import copy

    from freqrank.attention.dijiang import preset_options
    from freqrank.attention.distillation import distill
    from freqrank.attention.training.settings import Settings
    from freqrank.models.checkpoint import Checkpoint
    from freqrank.models.linearization import linearize as linearize_model
    from freqrank.models.saving import check_output_folder

    check_output_folder(output)
    _check_device(device)
    if layers is not None and keep_layers is not None:
        raise ValueError("--layers names layers to convert, --keep-layers those that stay: give one of the two")
    options = _layer_options(context)
    layer = preset_options(feature_map, **options).to_dict()
    training = _training_options(context)
    settings = Settings(**training, seed=seed) if training else None
    if checkpoint is not None and settings is None:
        raise ValueError("--checkpoint keeps the state of fine-tuning, which needs --train")
    _check_text(train, "--train")
    _check_text(text, "--text")
    chosen = _numbers(layers, "--layers")
    kept = _numbers(keep_layers, "--keep-layers")
    network, tokenizer = _load(model, download=download, dtype=dtype)
    network.to(device)
    window = window or _context(network)
    chosen = _others(kept, network) if kept is not None else chosen
    rows = None if train is None else _training_rows(train, tokenizer, training, length, seed)
    held_out = None if text is None else _read(text, tokenizer, "--text")[:limit]
    losses: dict[str, float] = {}
    if held_out is not None:
        losses["before"] = evaluate.loss(network, held_out, window=window, progress=True)
    with_teacher = settings is not None and (settings.recipe != "released" or settings.train != "all")
    teacher = copy.deepcopy(network) if with_teacher else None
    done = linearize_model(network, feature_map=feature_map, layers=chosen, seed=seed, **options)
    if held_out is not None:
        losses["converted"] = evaluate.loss(network, held_out, window=window, progress=True)
    curve = None
    if rows is not None:
        curve = distill(network, teacher, rows, seed=seed, checkpoint=checkpoint, **training)
        network.eval()
        if held_out is not None:
            losses["trained"] = evaluate.loss(network, held_out, window=window, progress=True)
    _save(network, output, tokenizer)
    picture = _plot(curve, output)
    if checkpoint is not None:
        Checkpoint.remove(checkpoint)

    def show() -> None:
        facts = {"layers": ", ".join(map(str, done.layers)) if done.kept else "all"}
        facts["layer"] = ", ".join(f"{name} {value}" for name, value in layer.items() if value is not None)
        facts |= {f"loss {when}": f"{nats:.4f} nats a token" for when, nats in losses.items()}
        if curve is None:
            facts["next"] = "fine-tune it: --train FILE here, or any trainer"
        else:
            facts["training"] = f"{curve.steps:,} steps, {curve.tokens:,} tokens, {curve.seconds:.0f} s: {picture}"
        _facts(f"{model} linearised into {output}", facts)

    result = {"model": model, "output": str(output), "loss": losses, "report": done, "training": curve}
    _emit(result, as_json, show)


#: Options of the command line that are options of the layer, by the name that they have there.
_LAYER = {
    name: name for name in ("num_frequencies", "decay", "norm", "norm_groups", "gate", "position_table", "sinks")
} | {"temperature": "temperature", "attention_window": "window"}
#: And those of freqrank.distill.
_TRAINING = {
    "recipe": "recipe", "steps": "steps", "batch": "batch_size", "lr": "lr", "accumulate": "accumulate",
    "trained": "train", "precision": "precision", "recompute": "checkpointing",
}  # fmt: skip


def _layer_options(context: typer.Context) -> dict[str, Any]:
    """The layer's options that were given, by the names that they have there."""
    given = {name: context.params[option] for option, name in _LAYER.items() if context.params[option] is not None}
    if "temperature" in given and given["temperature"] != "pretrained":
        try:
            given["temperature"] = float(given["temperature"])
        except ValueError:
            raise ValueError(f"--temperature must be a number or pretrained; got {given['temperature']!r}") from None
    return given


def _training_options(context: typer.Context) -> dict[str, Any]:
    """Options of freqrank.distill that have a value; none without --train, which all of them need."""
    values = context.params
    if values["train"] is None:
        for option in (*_TRAINING, "length"):
            if (source := context.get_parameter_source(option)) is not None and source.name == "COMMANDLINE":
                raise ValueError(f"--{option} is for fine-tuning, which needs --train")
        return {}
    return {name: values[option] for option, name in _TRAINING.items() if values[option] is not None}


def _training_rows(train: str, tokenizer: Any, options: dict[str, Any], length: int, seed: int) -> Tensor:
    """As many sequences as all steps take."""
    count = options["steps"] * options["batch_size"] * options.get("accumulate", 1)
    return _samples(_read(train, tokenizer, "--train"), count, length, seed, "--train")


def _plot(curve: Any, folder: Path) -> Path | None:
    """Draw a learning curve into the model's folder."""
    if curve is None:
        return None
    picture = folder / "training.png"
    curve.plot(picture)
    return picture


def _numbers(text: str | None, option: str) -> list[int] | None:
    return None if text is None else _listed(text, int, option)


def _saved_dtype(model: str, name: str, download: bool) -> torch.dtype | None:
    """The number format to save in; None: as it was computed in."""
    import transformers

    _check_dtype("--save-dtype", name)
    if name != "auto":
        return getattr(torch, name)
    source, local = _resolve(model, download)
    config = transformers.AutoConfig.from_pretrained(source, local_files_only=local or not download)
    return config.dtype if isinstance(config.dtype, torch.dtype) else None


def _others(kept: Sequence[int], network: Any) -> list[int]:
    """All layers but these."""
    from freqrank.models.architectures import find_architecture

    count = len(find_architecture(network).blocks)
    for layer in kept:
        if not -count <= layer < count:
            raise ValueError(f"--keep-layers must be from {-count} to {count - 1}, the model has {count}; got {layer}")
    return [layer for layer in range(count) if not {layer, layer - count} & set(kept)]


@app.command()
def convert(
    context: typer.Context,
    model: Model,
    output: Output,
    calibration: Calibration,
    train: Train = None,
    method: MethodName = "lisc",
    ratio: Ratio = 0.2,
    group_size: GroupSize = 2,
    share: Share = "layers",
    refit: Refit = None,
    samples: Samples = 256,
    calibration_length: Annotated[
        int | None, typer.Option(help="Tokens in a calibration sample; default: as --window.", min=2)
    ] = None,
    feature_map: FeatureMapName = "recommended",
    num_frequencies: Frequencies = None,
    temperature: MapTemperature = None,
    decay: DecayName = None,
    norm: Norm = None,
    norm_groups: NormGroups = None,
    gate: Gate = None,
    position_table: PositionTable = None,
    attention_window: SoftmaxWindow = None,
    sinks: Sinks = None,
    keep_layers: KeepLayers = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Fine-tuning recipe: align (in stages, beside the original), distill or released (next token). "
            "Default: align, or released with --no-teacher.",
            show_default=False,
        ),
    ] = None,
    steps: Steps = 300,
    batch: Batch = 8,
    length: TrainLength = 256,
    lr: LearningRate = None,
    accumulate: Accumulate = None,
    trained: Trained = None,
    precision: Precision = None,
    recompute: Recompute = False,
    no_teacher: Annotated[
        bool, typer.Option("--no-teacher", help="Keep no copy of the original: less memory, and only recipe released.")
    ] = False,
    checkpoint: Checkpointed = None,
    text: Scored = None,
    window: Window = None,
    limit: Limit = None,
    contexts: Annotated[
        str | None,
        typer.Option(
            help="Lengths to measure speed and memory at, 64,512, or none. Default: an eighth of the model's "
            "context, and all of it.",
            show_default=False,
        ),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Folder for a page with the tables, and JSON.", show_default=False)
    ] = None,
    dtype: Dtype = "float32",
    save_dtype: Annotated[
        str, typer.Option(help="Number format to save in: auto (the model's own), float32, bfloat16, float16.")
    ] = "auto",
    device: Device = "cpu",
    seed: Seed = 0,
    download: Download = False,
    as_json: AsJson = False,
) -> None:
    """Compress a model and make it linear-time, train it against the original, and save it with what came of it.

    Without --train it is converted only, and predicts badly.
    """
    from freqrank.conversion import check_options, remove_checkpoint
    from freqrank.conversion import convert as convert_model
    from freqrank.models.saving import check_output_folder

    check_output_folder(output)
    if page is not None:
        report.check_folder(page)
        if page.absolute() == output.absolute():
            raise ValueError(f"--page and --output must be two folders; got {page} for both")
    _check_device(device)
    training = _training_options(context)
    training_steps, named_recipe = training.pop("steps", steps), training.pop("recipe", None)
    options: dict[str, Any] = {
        "ratio": ratio, "method": method, "feature_map": feature_map, "recipe": named_recipe, "steps": training_steps,
        "seed": seed, "keep_original": not no_teacher, "distill_options": training,
        "compress_options": {"group_size": group_size, "share": share, "refit": refit},
        "linearize_options": _layer_options(context),
    }  # fmt: skip
    check_options(**options, training=train is not None)
    for option, name in (("--calibration", calibration), ("--train", train), ("--text", text)):
        _check_text(name, option)
    kept = _numbers(keep_layers, "--keep-layers")
    lengths = [] if contexts == "none" else _numbers(contexts, "--contexts")
    saved_as = _saved_dtype(model, save_dtype, download)
    network, tokenizer = _load(model, download=download, dtype=dtype)
    network.to(device)
    if kept is not None:
        options["linearize_options"]["layers"] = _others(kept, network)
    rows = None
    if train is not None:
        rows = _training_rows(train, tokenizer, {**training, "steps": steps}, length, seed)
    window = window or _context(network)
    held_out = None if text is None else _read(text, tokenizer, "--text")[:limit]
    ids = _read(calibration, tokenizer, "--calibration")
    done = convert_model(
        network,
        _calibration(ids, samples, calibration_length or window, seed),
        rows,
        held_out=held_out,
        window=window,
        contexts=lengths,
        checkpoint=checkpoint,
        **options,
    )
    scored = None
    if saved_as is not None and saved_as != network.dtype:
        network.to(saved_as)
        if held_out is not None:
            scored = evaluate.loss(network, held_out, window=window, progress=True)
    _save(network, output, tokenizer)
    _plot(done.training, output)
    if page is not None:
        report.write_folder(done.page(), page)
    if checkpoint is not None:
        remove_checkpoint(checkpoint)
    size = _count(network)
    saved = {"dtype": str(network.dtype).removeprefix("torch."), **size, "loss": scored}

    def show() -> None:
        out.print(done.summary, markup=False, soft_wrap=True)
        for table in done.tables():
            table.print(out)
        for note in done.notes:
            out.print(f"note: {note}", markup=False, soft_wrap=True)
        facts = {"from": model, "to": str(output), "saved as": f"{saved['dtype']}, {report.size(size['bytes'])}"}
        if scored is not None:
            facts["loss as saved"] = f"{scored:.4f} nats a token"
        _facts("", facts)

    _emit({"model": model, "output": str(output), "saved": saved, "report": done}, as_json, show)


@app.command()
def merge(
    model: Model,
    output: Output,
    dtype: Dtype = "auto",
    download: Download = False,
    as_json: AsJson = False,
) -> None:
    """Multiply a compressed model's factors out, into a dense model of the same function that plain tools can load."""
    from freqrank.models.merging import merge as merge_model
    from freqrank.models.saving import check_output_folder

    check_output_folder(output)
    network, tokenizer = _load(model, download=download, dtype=dtype)
    before = _count(network)
    names = merge_model(network)
    _save(network, output, tokenizer)
    after = _count(network)

    def show() -> None:
        size = f"{report.size(before['bytes'])} -> {report.size(after['bytes'])}"
        _facts(f"{model} merged into {output}", {"linears": str(len(names)), "model": size})

    _emit({"model": model, "output": str(output), "linears": names, "before": before, "after": after}, as_json, show)


@app.command("eval")
def evaluate_model(
    model: Model,
    text: Annotated[str | None, typer.Option(help="Text to score: " + _TEXT_HELP, show_default=False)] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness, with commas between: hellaswag,piqa,...", show_default=False
        ),
    ] = None,
    window: Window = None,
    stride: Annotated[int | None, typer.Option(help="Distance of two windows; --window if not given.")] = None,
    reduction: Annotated[str, typer.Option(help="Mean over tokens, or over windows: token, window.")] = "token",
    remainder: Annotated[str, typer.Option(help="A shorter last window: keep or drop.")] = "keep",
    limit: Annotated[
        int | None, typer.Option(help="Score only the first so many tokens of a text, or examples of each task.", min=2)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Worked examples before each question; default: what the task says.", min=0)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences of a task that run together.", min=1)] = 8,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder with more tasks, as YAML files.", show_default=False)
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    download: Annotated[
        bool, typer.Option("--download", help="Allow fetching a model and tasks' data from the Hugging Face hub.")
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Loss and perplexity of a model on a text, accuracy on tasks of lm-evaluation-harness, or both."""
    if text is None and tasks is None:
        raise ValueError("nothing to evaluate on: give --text FILE, --tasks NAME,NAME or both")
    if text is not None and tasks is not None and limit is not None:
        raise ValueError("--limit counts tokens of a text and examples of a task: evaluate one of the two at a time")
    if tasks is None and (num_fewshot is not None or include_path is not None):
        raise ValueError("--num-fewshot and --include-path are for --tasks, which is not given")
    _check_device(device)
    torch.manual_seed(seed)
    network, tokenizer = _load(model, download=download, dtype=dtype)
    network.to(device)
    size = _count(network)
    result: dict[str, Any] = {"model": model}
    facts: dict[str, str] = {}
    if text is not None:
        window = window or _context(network)
        ids = _read(text, tokenizer, "--text")[:limit]
        start = time.perf_counter()
        nats = evaluate.loss(
            network, ids, window=window, stride=stride, reduction=reduction, remainder=remainder, progress=True
        )
        seconds = time.perf_counter() - start
        perplexity = float(torch.tensor(nats, dtype=torch.float64).exp())
        conventions = {"window": window, "stride": stride or window, "reduction": reduction, "remainder": remainder}
        result |= {"text": text, "tokens": ids.numel(), "loss": nats, "perplexity": perplexity}
        result |= {**conventions, "seconds": seconds}
        facts = {
            "loss": f"{nats:.4f} nats a token" + (" (a byte)" if tokenizer is None else ""),
            "perplexity": f"{perplexity:.4f}",
            "tokens": f"{ids.numel():,} in {seconds:.1f} s",
            "conventions": ", ".join(f"{name} {value}" for name, value in conventions.items()),
        }
    lines: list[Sequence[str]] = []
    if tasks is not None:
        from freqrank.tasks import run_tasks

        found = run_tasks(
            network,
            tokenizer,
            _listed(tasks, str, "--tasks"),
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            include_path=include_path,
            download=download,
            seed=seed,
        )
        result["tasks"] = found
        for one in found:
            about = ["-" if n is None else str(n) for n in (one.shots, one.examples)]
            for metric, value in one.metrics.items():
                error = one.errors.get(metric)
                lines.append([one.task, metric, f"{value:.4f}", "-" if error is None else f"{error:.4f}", *about])
    result |= size
    facts["model"] = f"{size['parameters']:,} parameters, {report.size(size['bytes'])}"

    def show() -> None:
        _facts(model if text is None else f"{model} on {text}", facts)
        if lines:
            report.Table(["task", "metric", "value", "standard error", "shots", "examples"], lines).print(out)

    _emit(result, as_json, show)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.", min=0)] = 0.0,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    download: Download = False,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    if not prompt:
        raise ValueError("--prompt must not be empty")
    network, tokenizer = _load(model, download=download, dtype=dtype)
    torch.manual_seed(seed)
    start = time.perf_counter()
    with _progress("generate"):
        written, tokens = continuation(network, tokenizer, prompt, max_new_tokens, temperature)
    seconds = time.perf_counter() - start
    result = {"model": model, "prompt": prompt, "text": written, "tokens": tokens, "seconds": seconds}
    result["tokens_per_second"] = tokens / seconds

    def show() -> None:
        out.print(prompt + written, markup=False, soft_wrap=True)
        err.print(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} a second", style="dim")

    _emit(result, as_json, show)


def continuation(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float = 0.0
) -> tuple[str, int]:
    """What the model writes after ``prompt``, and how many tokens that were; bytes without a tokenizer."""
    ids = list(prompt.encode()) if tokenizer is None else tokenizer(prompt)["input_ids"]
    inputs = torch.tensor([ids], device=model.device)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    made = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens, **options
    )  # fmt: skip
    new = made[0, len(ids) :].tolist()
    if tokenizer is None:
        return bytes(new).rstrip(b"\0").decode(errors="replace"), len(new)
    return tokenizer.decode(new, skip_special_tokens=True), len(new)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the report; a report of an earlier run is replaced.")] = Path(
        "demo-output"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Very small sizes: seconds, and numbers that mean little.")
    ] = False,
    base: Annotated[str, typer.Option(help="Byte-level model to work on.")] = "bundled:base",
    twin: Annotated[str, typer.Option(help="The same model, linearised and recovered.")] = "bundled:linear",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show everything on the small model that ships with freqrank: tables here, plots and a page in a folder."""
    from freqrank import demo as demonstration

    report.check_folder(output)
    models = []
    for name in (base, twin):
        network, tokenizer = _load(name)
        if tokenizer is not None:
            raise ValueError(f"the demo works on byte-level models; {name} has a tokenizer")
        models.append(network)
    with _demo_progress(demonstration.STEPS[quick]) as on_tick:
        done = demonstration.run(models[0], models[1], quick=quick, seed=seed, on_tick=on_tick)
    files = report.write_folder(done, output)

    def show() -> None:
        for section in done.sections:
            section.print(out)
        out.rule(align="left")
        seconds = {section.title: section.seconds for section in done.sections}
        parts = ", ".join(f"{title} {took:.0f} s" for title, took in seconds.items())
        out.print(f"Computed in {sum(seconds.values()):.0f} s: {parts}", markup=False)
        out.print(f"Written: {', '.join(str(file) for file in files)}", markup=False, soft_wrap=True)

    _emit({"files": [str(file) for file in files], **done.to_dict()}, as_json, show)


@contextmanager
def _demo_progress(total: int) -> Iterator[Callable[[str, str], None]]:
    columns = (
        TextColumn("{task.description:<20}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[now]}"),
    )  # fmt: skip
    sections: list[str] = []
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("start", total=total, now="")

        def on_tick(section: str, now: str) -> None:
            if section not in sections:
                sections.append(section)
                if not err.is_terminal:  # a log gets a line a section instead of a bar
                    err.print(section, markup=False)
            progress.update(task, advance=1, description=section, now=now)

        yield on_tick


def main() -> None:
    """Entry point of the ``freqrank`` command."""
    app()


if __name__ == "__main__":
    main()
