"""`compress`: calibrated low-rank weights, shared between layers, in place of a model's dense linears."""

from __future__ import annotations

import copy
import inspect
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import freqrank
from freqrank import _progress
from freqrank._distributed import Ranks, world
from freqrank.lowrank.allocation import ALLOCATIONS, Shape, allocate, kept, trial_ranks
from freqrank.lowrank.factorize import (
    Root,
    adapted,
    decompose,
    factorize,
    refit,
    squared_norm,
    squared_singular_values,
)
from freqrank.lowrank.grouping import GROUPINGS, similar_groups, similarity, sketch
from freqrank.lowrank.methods import METHODS, Method, Pool, pooled
from freqrank.lowrank.modules import (
    STORAGES,
    Int8LowRankLinear,
    LowRankLinear,
    install_lowrank,
    linear_weight,
    share,
    share_products,
)
from freqrank.lowrank.outputs import OUTPUT_WEIGHTS, OutputRoot
from freqrank.lowrank.rounding import balanced, rounded
from freqrank.lowrank.scales import BLOCK_WEIGHTS, SCALES, by_depth, input_scale
from freqrank.lowrank.statistics import Batch, Grams, Magnitudes, first_tokens, read_calibration
from freqrank.models import offload
from freqrank.models.architectures import Architecture, find_architecture
from freqrank.models.checkpoint import Checkpoint, fingerprint
from freqrank.models.compression_report import CompressionReport, GroupReport, LayerReport
from freqrank.models.streaming import BlockStream, evaluating
from freqrank.models.whole import backward_bytes, next_token_loss, output_fisher, squared_gradients

__all__ = ["CompressionReport", "GroupReport", "LayerReport", "compress", "install"]

REFITS = (None, "own", "sequential", "cross")
SHARES = ("layers", "modules", "both")
STATISTICS = ("original", "error-aware")

# The search for sensitive groups scores the model on the first calibration sequences of about so many tokens.
_TRIAL_TOKENS = 8192

_ALONE = Ranks()

T = TypeVar("T")

# X'^T X' and X'^T X of an input, by block and the first role that reads it: X' in the compressed model, X in the dense.
Seen = Mapping[tuple[int, str], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Site:
    """One linear: the number of its block, its role, the first role that reads the same input."""

    layer: int
    role: str
    source: str


@dataclass
class _Group:
    """Linears that share a basis; after the decomposition with factors in float64 and what the report says."""

    sites: list[_Site]
    shape: Shape
    storage: str | None = None
    rank: int | None = None
    basis: Tensor | None = None
    coefficients: dict[_Site, Tensor] = field(default_factory=dict)
    energy: list[float] = field(default_factory=list)  # ||S b W||_F^2 of each linear
    report: GroupReport | None = None
    seen: _Metric | None = None  # what an error-aware decomposition was made in
    file: Path | None = None  # where its factors are, in the model's dtype, once they are found for an offloaded model

    @property
    def layers(self) -> list[int]:
        return sorted({site.layer for site in self.sites})

    @property
    def inputs(self) -> dict[tuple[int, str], None]:
        return dict.fromkeys((site.layer, site.source) for site in self.sites)

    @property
    def operations(self) -> int:
        """Multiply-adds a token: linears that read one input multiply it by the basis once."""
        if self.rank is None:
            return self.shape.dense
        return self.rank * (len(self.inputs) * self.shape.inputs + self.shape.outputs)

    def stored_bytes(self, element: int) -> int:
        """Bytes of the weights, or factors, beside numbers of ``element`` bytes."""
        if self.rank is None:
            return self.shape.dense * element
        if self.storage is None:
            return self.rank * self.shape.per_rank * element
        scales = len(self.sites) * self.rank + self.shape.outputs  # each linear has those of its basis
        return self.rank * self.shape.per_rank + scales * element


def compress(
    model: nn.Module,
    calibration: Tensor | Iterable[Tensor] | Iterable[Mapping[str, Tensor]],
    *,
    method: str = "lisc",
    ratio: float = 0.2,
    group_size: int = 2,
    share: str = "layers",
    scale: str = "trace",
    exponent: float = 1.0,
    block_weight: str | None = None,
    refit: str | None = None,
    allocation: str = "uniform",
    seed: int = 0,
    progress: bool = True,
    depth_weight: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    statistics: str = "original",
    output_weight: str | None = None,
    grouping: str = "adjacent",
    storage: str | None = None,
) -> CompressionReport:
    """Replace a model's linears by calibrated low-rank ones that share bases between layers, in place.

    The model runs over the calibration tokens one decoder block at a time; the Gram matrices X^T X of the inputs of a
    group of layers, in float64, and one block's activations are what it needs in memory. A model whose weights are on
    disk (`freqrank.load_offloaded`) stays there: weights are read when they are needed, hidden states of the
    calibration tokens and the factors go to its offload folder, and the memory that is needed does not grow with the
    number of blocks, but with grouping "similar", where Gram matrices wait for blocks far apart. Some options, which an
    offloaded model does not have, take the whole model at once: "fwsvd", output weight "fisher" and allocation "loss"
    run the calibration backwards, with all its activations (`freqrank.models.whole.backward_bytes` estimates them, the
    report says how many); allocation "sensitivity" makes about ten runs a group over up to 8,192 calibration tokens: 7
    x 32 linears of a 7B model are 2,000 runs, or 2,000 x 8,192 x 14 GFLOP = 2 x 10^17 operations. Nothing of the model
    changes before everything has been computed: if anything fails it is as it was. Embeddings, norms, biases and the
    language model head stay.

    Where torch.distributed has a process group, as under torchrun, all of its ranks call this with the same arguments,
    each with the model in its own memory. Batches of the calibration (tensors and dicts, cut to some 8,192 tokens) are
    dealt out to the ranks, what is known of them is summed, and every rank ends with the same compressed model, that of
    one process. Only the first rank shows progress, warns, and writes the checkpoint, which others read if they see its
    folder. Decompositions are not shared: each rank makes all.

    Args:
        model: a decoder of `transformers` (Llama, Mistral, Qwen2, Qwen3, Gemma, Phi-3, GPT-NeoX, OPT, GPT-2 and others
            of their structure), linearised or not, in float32, bfloat16 or float16; factors are stored in its dtype
            unless ``storage`` says otherwise.
        calibration: token ids, a LongTensor [N, T], or an iterable, consumed once, of such tensors or of dicts with
            ``input_ids`` and maybe ``attention_mask``, whose zeros mark padding.
        method: "svd", "asvd", "fwsvd" and "svd-llm" factor each weight alone, whatever ``group_size`` and ``share``: as
            it stands, with input channels weighted by (mean |x|)^(exponent / 2) or by the root of their Fisher
            information, and whitened by the Gram matrix; "basis-sharing" pools plain Gram matrices; "lisc" pools
            sum_l alpha_l G_l, alpha_l = (mean(s) / s_l)^exponent. See `freqrank.lowrank.methods`. "best" is basis
            sharing between the linears of one layer with share="modules", statistics="error-aware",
            output_weight="fisher", allocation="loss" and refit="cross", which it sets itself: on the bundled model
            the least loss of all that was tried at 40 %, while at 80 % a basis for each linear alone lost a little less
            (docs/compression.md).
        ratio: fraction of the compressed linears' parameters to remove, in (0, 1). Each basis gets
            floor((1 - ratio) d1 D2 / (d1 + D2)) directions, D2 the outputs of all its linears.
        group_size: consecutive layers that share a basis; the last group may be shorter. What is shared: q, k, v, gate
            and up; without k and v where there are fewer key than query heads; in GPT-2 the attention output too.
        share: "layers": a role's weights of neighbouring layers; "modules": q, k, v (and gate, up) of one layer, which
            read the same input, and where one linear computes them are one weight already; "both".
        scale: s_l for "lisc": "trace" (mean square input), "frobenius" or "spectral" norm of G_l, or "none" (all 1).
        exponent: for "lisc" and "asvd", >= 0; 1 is what each was published with.
        block_weight: factor on each weight of a group for "lisc": None, "norm" (1 / ||W_l||_F) or "sqrt-scale"
            (sqrt(s_l)). With one of them the result does not depend on how a norm's gain and a weight share a factor.
        refit: how coefficients are fitted again to the bases: None; "own": to each layer's own inputs; "sequential": to
            the inputs it gets in the compressed model (with "svd-llm", that method's closed-form update); "cross": to
            these, aiming at the outputs of the original model. The last two run each block eight times more.
        allocation: "uniform", "effective-rank" (D-Rank), "auto", "sensitivity" (ASVD's search, with any method) or
            "loss" (where a K-FAC estimate of the loss falls most); see `freqrank.lowrank.allocation.allocate`. All but
            the first run the calibration twice.
        seed: of the next tokens that are drawn for Fisher information, and of sketches for grouping "similar".
        progress: show a bar on standard error.
        depth_weight: g > 0 multiplies the weight of block l in its group by g^-l, with any method that shares: above 1
            early layers count more, since what they lose goes through all that follow. On top of ``block_weight``;
            None: 1. A linear that is factored alone is the same for any g. 1.5 lowered the bundled model's loss in
            groups of 6; beside a refit, which does more, 2 raised it.
        checkpoint: a folder that keeps every group's factors as soon as they are found, in float64 and so up to four
            times as large as the compressed model. A run that was killed goes on there, given the same model, tokens
            and options, and ends with the same bytes. It stays when all is done: delete it once the model is saved.
        statistics: of which inputs groups are decomposed: "original", those in the dense model; "error-aware", those
            that the compressed blocks before give, aiming at the original outputs: argmin ||X W - X' B C|| as AA-SVD
            (arXiv 2604.02119) has it. Where a group spans blocks, what its later layers read is taken from blocks that
            are dense from its first one on.
        output_weight: how the outputs of each linear are weighted: None, alike; "fisher", by the Kronecker-factored
            Fisher information (`freqrank.lowrank.outputs`), so that what is dropped is what the loss least depends on.
        grouping: which layers share a basis: "adjacent" ones, or those that are most "similar"
            (`freqrank.lowrank.grouping`), which takes another run over the calibration.
        storage: None: factors in the model's dtype; "int8": as 8-bit integers with a scale for each direction and each
            output, half the bytes of bfloat16 (`freqrank.lowrank.modules.Int8LowRankLinear`). ``ratio`` counts
            parameters as before. The basis is rounded first, and a refit fits coefficients to the rounded one. Such
            factors do not train; adapters on top do.

    Returns:
        A :class:`CompressionReport`, also left as ``model.freqrank_report``.

    Raises:
        TypeError: model, calibration, or an option of the wrong type.
        ValueError: an unknown option or architecture, options that contradict one another, a ratio outside (0, 1), a
            group size below 1, wrong calibration shapes or values, NaN or Inf in activations, gradients or weights (the
            message names the layer), a model that is compressed already, or has no language-model head where its loss
            is wanted, a checkpoint of another run, an offloaded model without an ``offload_folder`` or with an option
            that takes all of it at once, or on several ranks; ranks with unlike arguments, or more of them than
            batches. Each rank raises what one raises.
        OSError: the checkpoint, or what is found for an offloaded model, does not fit on the disk.

    Warns:
        UserWarning: fewer calibration tokens than a Gram matrix has rows.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> report = compress(model, torch.randint(64, (4, 32)), ratio=0.4, progress=False)
        >>> report.block_ratio >= 0.4, model.model.layers[0].mlp.up_proj.rank
        (True, 15)
    """
    start = time.perf_counter()
    among = world()
    with among.together():
        architecture = find_architecture(model)
        _check_options(
            method, ratio, group_size, share, scale, exponent, block_weight, refit, allocation, seed, depth_weight,
            statistics, output_weight, grouping, storage,
        )  # fmt: skip
        rule = METHODS[method](scale, float(exponent), block_weight)
        given = {
            "refit": refit, "allocation": allocation, "share": share, "statistics": statistics,
            "output_weight": output_weight,
        }  # fmt: skip
        refit, allocation, share, statistics, output_weight = _preset(rule, given).values()
        _check_model(model, architecture)
        config = getattr(model, "config", None)
        batches = read_calibration(calibration, getattr(config, "vocab_size", None))
        _check_ranks(model, batches, among)
    if among.first:
        unused = {"block_weight": block_weight is not None, "exponent": exponent != 1.0}
        for name in [name for name, given in unused.items() if given and name not in rule.switches]:
            users = ", ".join(repr(other) for other, known in METHODS.items() if name in known.switches)
            warnings.warn(f"{name} is a switch of {users}; {method!r} ignores it", stacklevel=2)
        idle = {"grouping": grouping != "adjacent", "depth_weight": depth_weight is not None}
        for name in [name for name, given in idle.items() if given and not (rule.shares and share != "modules")]:
            warnings.warn(f"no layers share a basis here, so {name} changes nothing", stacklevel=2)
    settings = {
        "method": method, "ratio": float(ratio), "group_size": group_size, "share": share, "scale": scale,
        "exponent": rule.exponent, "block_weight": block_weight, "refit": refit, "allocation": allocation,
        "seed": seed, "depth_weight": None if depth_weight is None else float(depth_weight),
        "statistics": statistics, "output_weight": output_weight, "grouping": grouping, "storage": storage,
    }  # fmt: skip
    report = CompressionReport(settings, architecture.name, sum(batch.tokens for batch in batches))
    data = None
    if among.size > 1 or checkpoint is not None:
        data = fingerprint(model, *[t for batch in batches for t in (batch.input_ids, batch.mask) if t is not None])
        among.agree({**settings, "the model, or calibration,": data})
    aware = statistics == "error-aware"
    fisher = output_weight == "fisher" or allocation == "loss"
    with offload.workspace(model) as architecture.scratch, evaluating(model):
        groups = group_linears(architecture, rule.shares, group_size, share)
        _warn_if_few(report, groups, architecture, among)
        if rule.channels == "gradient" or fisher or allocation == "sensitivity":
            _refuse_offloaded(model, architecture, batches, groups, ratio, backward=allocation != "sensitivity")
        store = None
        if checkpoint is not None:
            store = _open(checkpoint, {**settings, "data": data, "version": freqrank.__version__}, among)
        if grouping == "similar":  # groups of the same sizes
            alike = _alike(architecture, among.share(batches), rule.shares, group_size, share, seed, among)
            groups = group_linears(architecture, rule.shares, group_size, share, alike)
        for group in groups:
            group.storage = storage
        work = _Work(architecture, batches, rule, groups, depth_weight, output_weight == "fisher", store, among)
        passes = 1 + (allocation != "uniform") + (aware or refit in ("sequential", "cross"))
        steps = passes * len(architecture.blocks) + len(work.share) * ((rule.channels == "gradient") + fisher)
        if allocation == "sensitivity":
            steps += sum(len(trial_ranks(group.shape, ratio)) for group in groups)
        with _progress.bar(method, steps, progress and among.first) as advance:
            if rule.channels == "gradient":
                work.gradients(model, advance, report.notes)
            if fisher:
                work.fisher(model, seed, advance, report.notes)
            spectra = None
            if allocation in ("effective-rank", "auto", "loss"):
                spectra = work.spectra(advance, of_loss=allocation == "loss")
            losses = work.losses(model, ratio, advance, report.notes) if allocation == "sensitivity" else None
            shapes = [group.shape for group in groups]
            for group, rank in zip(groups, allocate(allocation, shapes, ratio, spectra, losses), strict=True):
                group.rank = rank
            _take_first_ranks(groups, among)
            work.factor(refit, aware, advance)

    _count(report, groups, architecture)
    report.notes += _notes(groups) + work.notes()
    if architecture.scratch is not None:
        report.notes.append(offload.note(architecture.scratch, _resident_bytes(architecture, groups)))
    before = _size(model)
    _convert(model, architecture, groups, settings, among)
    after = _size(model)
    report.model_parameters_before, report.model_bytes_before = before
    report.model_parameters_after, report.model_bytes_after = after
    report.model_ratio = 1 - after[0] / before[0]
    report.seconds = time.perf_counter() - start
    model.freqrank_report = report  # type: ignore[assignment]
    return report


def install(model: nn.Module, spec: Mapping[str, Any]) -> dict[str, LowRankLinear]:
    """Swap empty low-rank linears into a dense model, meta device included, so that weights can be loaded into them.

    Args:
        model: of the architecture that was compressed.
        spec: ``{"groups": [{"modules": [name, ...], "rank": k}, ...]}``, groups of integers with ``"storage": "int8"``;
            what `compress` left in ``model.config.quantization_config.lowrank``.

    Returns:
        The new layers by name.

    Raises:
        ValueError: names that are missing or not dense linears, ranks out of range; the model is then unchanged.

    >>> model = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4))
    >>> sorted(install(model, {"groups": [{"modules": ["0", "1"], "rank": 2}]}))
    ['0', '1']
    """
    groups = spec.get("groups") if isinstance(spec, Mapping) else None
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        raise ValueError(f"spec must be a dict with a list 'groups'; got {spec!r:.200}")
    return install_lowrank(model, groups)


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_options(
    method: object, ratio: object, group_size: object, share: object, scale: object, exponent: object,
    block_weight: object, refit: object, allocation: object, seed: object, depth_weight: object,
    statistics: object, output_weight: object, grouping: object, storage: object,
) -> None:  # fmt: skip
    for name, value, allowed in (
        ("method", method, tuple(METHODS)),
        ("share", share, SHARES),
        ("scale", scale, SCALES),
        ("block_weight", block_weight, BLOCK_WEIGHTS),
        ("refit", refit, REFITS),
        ("allocation", allocation, ALLOCATIONS),
        ("statistics", statistics, STATISTICS),
        ("output_weight", output_weight, OUTPUT_WEIGHTS),
        ("grouping", grouping, GROUPINGS),
        ("storage", storage, tuple(STORAGES)),
    ):
        if not isinstance(value, (str, type(None))) or value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio must be a number; got {type(ratio).__name__}")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must be between 0 and 1, both excluded; got {ratio}")
    if isinstance(exponent, bool) or not isinstance(exponent, (int, float)):
        raise TypeError(f"exponent must be a number; got {type(exponent).__name__}")
    if not 0 <= exponent < math.inf:
        raise ValueError(f"exponent must be finite and not negative; got {exponent}")
    if isinstance(depth_weight, bool) or not isinstance(depth_weight, (int, float, type(None))):
        raise TypeError(f"depth_weight must be a number or None; got {type(depth_weight).__name__}")
    if depth_weight is not None and not 0 < depth_weight < math.inf:
        raise ValueError(f"depth_weight must be finite and above 0; got {depth_weight}")
    for name, value in (("group_size", group_size), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
    if group_size < 1:  # type: ignore[operator]
        raise ValueError(f"group_size must be at least 1; got {group_size}")
    if statistics == "error-aware" and refit == "own":
        raise ValueError(
            "refit='own' fits coefficients to the original inputs, which statistics='error-aware' replaces by those "
            "of the compressed blocks before: use refit='cross', or None"
        )


def check_options(**options: Any) -> None:
    """Raise what `compress` raises for options that are wrong whatever the model; those not given have their defaults.

    >>> check_options(method="best", refit="own")
    Traceback (most recent call last):
        ...
    ValueError: method 'best' sets refit='cross' itself; got 'own'. Take another method to choose switches one by one
    """
    known = inspect.signature(compress).parameters
    given = {name: options.get(name, known[name].default) for name in inspect.signature(_check_options).parameters}
    _check_options(**given)
    _preset(METHODS[given["method"]](), given)


def _preset(rule: Method, given: dict[str, Any]) -> dict[str, Any]:
    """The switches, where a method sets some itself. ValueError where it sets one that was given otherwise."""
    chosen = {**given, **rule.preset}
    for name, default in inspect.signature(compress).parameters.items():
        if name in rule.preset and given[name] not in (default.default, rule.preset[name]):
            raise ValueError(
                f"method {rule.name!r} sets {name}={rule.preset[name]!r} itself; got {given[name]!r}. Take another "
                "method to choose switches one by one"
            )
    return chosen


def _check_model(model: nn.Module, architecture: Architecture) -> None:
    compressed = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    if compressed:
        raise ValueError(f"model is compressed already: {compressed[0]} is a LowRankLinear; start from the dense model")
    present = getattr(getattr(model, "config", None), "quantization_config", None)
    if present is not None and getattr(present, "quant_method", None) != "freqrank":
        raise ValueError(f"model is quantized by another method: {present}; start from the model in full precision")
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for layer in range(len(architecture.blocks)):
        for role, path in architecture.roles.items():
            name = architecture.full_name(layer, path)
            tied = names[id(architecture.linear(layer, role).get_parameter("weight"))]
            if len(tied) > 1:
                raise ValueError(
                    f"{' and '.join(tied)} are one parameter: linears that are tied cannot each get factors of their "
                    "own; untie them (model.set_submodule with a copy) first"
                )
            if architecture.placement(layer, role)[0].type == "meta":
                raise ValueError(f"{name} has no data (meta device), and no hook of accelerate to read it: load it")
            weight = architecture.weight(layer, role)
            if not weight.dtype.is_floating_point or weight.element_size() < 2:
                raise TypeError(f"{name} must have a floating-point weight of 16 bits or more; got {weight.dtype}")
            if not bool(weight.isfinite().all()):
                raise ValueError(f"{name} has NaN or Inf in its weight")


def _check_ranks(model: nn.Module, batches: Sequence[Batch], among: Ranks) -> None:
    """Raise ValueError for what cannot be shared between ranks."""
    if among.size == 1:
        return
    if offload.is_offloaded(model):
        raise ValueError(
            "an offloaded model is compressed by one process, since its factors go to its offload folder: load it into "
            f"the memory of each of the {among.size} ranks, or run one"
        )
    if len(batches) < among.size:
        raise ValueError(
            f"calibration must have a batch for each of the {among.size} ranks; got {len(batches)} of up to "
            f"{max(batch.input_ids.numel() for batch in batches):,} tokens. Give more, or the same sequences as an "
            "iterable of smaller tensors (calibration.split(1))"
        )


def _refuse_offloaded(
    model: nn.Module, architecture: Architecture, batches: Sequence[Batch], groups: Sequence[_Group], ratio: float,
    backward: bool,
) -> None:  # fmt: skip
    """Raise ValueError, with an estimate, for what runs a whole model at once if the model is offloaded."""
    if not offload.is_offloaded(model):
        return
    parameters, size = _size(model)
    if backward:
        what = "a backward pass (fwsvd, output_weight='fisher', allocation='loss', best)"
        longest = max(batch.input_ids.shape[1] for batch in batches)
        linears = [architecture.linear(site.layer, site.role) for group in groups for site in group.sites]
        extra = backward_bytes(linears, longest, getattr(getattr(model, "config", None), "vocab_size", 0))
        cost = (
            f"{size + extra:,} bytes of memory, {size:,} of them weights, for "
            f"{sum(batch.input_ids.shape[0] for batch in batches)} sequences of up to {longest} tokens"
        )
    else:
        what = "allocation 'sensitivity'"
        runs = 1 + sum(len(trial_ranks(group.shape, ratio)) for group in groups)
        tokens = sum(batch.tokens for batch in first_tokens(batches, _TRIAL_TOKENS))
        cost = (
            f"{size:,} bytes of memory for the weights, which would else be read {runs:,} times "
            f"({runs * size:,} bytes), and {2 * runs * tokens * parameters:.1e} operations"
        )
    raise ValueError(
        f"{what} would take the whole model at once, and its weights are offloaded: an estimated {cost}. Load the "
        "model into memory, or choose other options"
    )


def _warn_if_few(report: CompressionReport, groups: Sequence[_Group], architecture: Architecture, among: Ranks) -> None:
    largest = max(groups, key=lambda group: group.shape.inputs)
    if report.tokens < largest.shape.inputs:
        site = largest.sites[0]
        note = (
            f"calibration has {report.tokens} tokens, fewer than the {largest.shape.inputs} rows of the largest Gram "
            f"matrix (the input of {architecture.full_name(site.layer, architecture.roles[site.role])}); the "
            "compressed model may fit these tokens only"
        )
        if among.first:
            warnings.warn(note, stacklevel=3)
        report.notes.append(note)


# --- groups -----------------------------------------------------------------------------------------------------------


def _roles_sharing(architecture: Architecture, shares: bool, share: str) -> tuple[frozenset[str], bool]:
    """Roles that share a basis with others, and whether those of one input share one."""
    siblings = frozenset(role for group in architecture.inputs if len(group) > 1 for role in group)
    across = architecture.shared_roles()
    shared = {"layers": across, "modules": siblings, "both": siblings | across}[share] if shares else frozenset()
    return shared, share != "layers"


def _alike(
    architecture: Architecture, batches: Sequence[Batch], shares: bool, group_size: int, share: str, seed: int,
    among: Ranks,
) -> dict[tuple[int, str], int]:  # fmt: skip
    """Numbers for ``cluster`` of `group_linears`: those of layers that do alike are the same.

    ``batches`` are this rank's.
    """
    shared, together = _roles_sharing(architecture, shares, share)
    parts: dict[tuple[str, int], list[Tensor]] = {}
    cluster: dict[tuple[int, str], int] = {}
    if not shared or share == "modules" or group_size == 1:
        return cluster
    stream = BlockStream(architecture, batches)
    for layer in range(len(architecture.blocks)):
        grams = Grams()
        stream.advance(grams.add)
        grams.sum_over(among)
        for roles in architecture.inputs:
            for role in roles:
                if role in shared:
                    weight = architecture.weight(layer, role).detach().double().mT
                    moment = sketch(grams.of[roles[0]] @ weight, seed)
                    parts.setdefault((roles[0] if together else role, layer), []).append(moment)
    for name in dict.fromkeys(name for name, _ in parts):
        moments = [torch.cat(parts[name, layer], 1) for layer in range(len(architecture.blocks))]
        for number, layers in enumerate(similar_groups(similarity(moments), group_size)):
            cluster |= {(layer, name): number for layer in layers}
    return dict(zip(cluster, among.agree({}, list(cluster.values()))[0], strict=True))


def group_linears(
    architecture: Architecture,
    shares: bool,
    group_size: int,
    share: str,
    cluster: Mapping[tuple[int, str], int] | None = None,
) -> list[_Group]:
    """The linears of the model in groups that get one basis each, ordered by the last block they need.

    Args:
        shares, group_size, share: whether the method shares bases, and as for `compress`.
        cluster: of a layer and a role, or the first role of an input whose linears share: layers of one number share.
            Those it does not have, all if None, share with their neighbours.
    """
    span = 1 if share == "modules" else group_size

    def number(layer: int, name: str) -> int:
        return (cluster or {}).get((layer, name), layer // span)

    source = {role: group[0] for group in architecture.inputs for role in group}
    shared, together = _roles_sharing(architecture, shares, share)
    buckets: dict[tuple[Any, ...], list[_Site]] = {}
    for layer in range(len(architecture.blocks)):
        for role in architecture.roles:
            shape = architecture.shape(layer, role)
            key: tuple[Any, ...]
            if role not in shared:
                key = (layer, role)
            elif together:
                key = ("shared", number(layer, source[role]), source[role], shape[1])
            else:  # linears of another shape, should an architecture have them, stay apart
                key = ("shared", number(layer, role), role, *shape)
            buckets.setdefault(key, []).append(_Site(layer, role, source[role]))
    groups = []
    for sites in buckets.values():
        shapes = [architecture.shape(site.layer, site.role) for site in sites]
        groups.append(_Group(sites, Shape(shapes[0][1], sum(shape[0] for shape in shapes))))
    return sorted(groups, key=lambda group: group.layers[-1])


def _take_first_ranks(groups: Sequence[_Group], among: Ranks) -> None:
    """Directions as the first rank has allocated them: none lost to the last bit of a comparison."""
    told = among.agree({}, [-1 if group.rank is None else group.rank for group in groups])[0]
    for group, rank in zip(groups, told, strict=True):
        group.rank = None if rank < 0 else rank


def _open(folder: str | os.PathLike[str], run: Mapping[str, Any], among: Ranks) -> Checkpoint | None:
    """A checkpoint, which the first rank makes and writes to. Other ranks read it where they see its folder."""
    store = None
    with among.together():
        if among.first:
            store = Checkpoint(folder, run)
    with among.together():
        if not among.first and Path(folder).is_dir():
            store = Checkpoint(folder, run)
    return store


# --- the work ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Metric:
    """What a group is decomposed with: weights in float64, each layer's Gram matrix, their pool, b of each weight.

    ``outputs`` weigh the outputs of each linear, None: alike.
    """

    weights: list[Tensor]
    grams: list[Tensor]
    pool: Pool
    block_weights: list[float]
    outputs: list[OutputRoot] | None = None

    @property
    def weighted(self) -> list[Tensor]:
        """The weights as they are decomposed."""
        return [self.output(i, weight) for i, weight in enumerate(self.weights)]

    def output(self, i: int, weight: Tensor) -> Tensor:
        """``weight`` [.., out of linear i] with its outputs weighted."""
        return weight if self.outputs is None else self.outputs[i].weighted(weight)

    def restored(self, coefficients: Sequence[Tensor]) -> list[Tensor]:
        """Coefficients of the weighted weights, as they are for the weights."""
        if self.outputs is None:
            return list(coefficients)
        return [root.restored(c) for root, c in zip(self.outputs, coefficients, strict=True)]


class _Work:
    """Streams the calibration tokens through the model and decomposes each group once its statistics are there.

    Each rank streams its ``share`` of the ``batches``, which all have. Statistics are summed over the ranks as soon as
    a rank's are complete, and each rank does with them what one process would.
    """

    def __init__(
        self,
        architecture: Architecture,
        batches: Sequence[Batch],
        rule: Method,
        groups: Sequence[_Group],
        depth_weight: float | None,
        weigh_outputs: bool = False,
        store: Checkpoint | None = None,
        among: Ranks = _ALONE,
    ) -> None:
        self.architecture, self.batches, self.rule = architecture, batches, rule
        self.among, self.share = among, among.share(batches)
        self.tokens = sum(batch.tokens for batch in batches)
        self.groups, self.depth_weight = groups, depth_weight
        self.grams: dict[tuple[int, str], Tensor] = {}
        self.channels: dict[tuple[int, str], Tensor] = {}  # vectors, few enough to stay
        self.pools: dict[tuple[tuple[int, ...], str], Pool] = {}  # of layers and a name of what is pooled
        self.roots: dict[tuple[tuple[int, ...], str], Root] = {}  # of layers and an input
        self.weigh_outputs = weigh_outputs
        self.outputs: dict[tuple[int, str], OutputRoot] = {}
        self.store = store

    def gradients(self, model: nn.Module, advance: Any, notes: list[str]) -> None:
        """What a method wants to know of gradients, and a note on what that took."""
        names = self._names()
        linears = {name: self.architecture.linear(*at) for name, at in names.items()}
        found = squared_gradients(model, linears, self.batches, advance, self.among)
        self.channels |= {names[name]: values for name, values in found.items()}
        rows = sum(batch.input_ids.shape[0] for batch in self.batches)
        notes.append(f"{rows} backward passes through the whole model, {self._backward_cost(model)}")

    def fisher(self, model: nn.Module, seed: int, advance: Any, notes: list[str]) -> None:
        """How much each linear's outputs matter, and a note on what that took."""
        names = self._names()
        linears = {name: self.architecture.linear(*at) for name, at in names.items()}
        found = output_fisher(model, linears, self.architecture.blocks[0], self.batches, seed, advance, self.among)
        for name in list(found):
            self.outputs[names[name]] = OutputRoot(found.pop(name))
        unknown = [name for name, at in names.items() if not self.outputs[at].known]
        if unknown:
            notes.append(f"no gradient arrived, so that outputs weigh the same, for: {', '.join(unknown)}")
        size = sum(8 * block * block for at in names.values() for block in self.outputs[at].sizes)
        notes.append(
            f"Fisher information of outputs from backward passes through the whole model, {self._backward_cost(model)}"
            f", and {size:,} bytes of matrices"
        )

    def _names(self) -> dict[str, tuple[int, str]]:
        return {
            self.architecture.full_name(layer, path): (layer, role)
            for layer in range(len(self.architecture.blocks))
            for role, path in self.architecture.roles.items()
        }

    def _backward_cost(self, model: nn.Module) -> str:
        linears = [self.architecture.linear(*at) for at in self._names().values()]
        longest = max(batch.input_ids.shape[1] for batch in self.batches)
        size = backward_bytes(linears, longest, getattr(getattr(model, "config", None), "vocab_size", 0))
        return (
            f"of up to {longest} tokens a sequence, with an estimated {size:,} bytes of activations and gradients "
            "beside the weights for one"
        )

    def spectra(self, advance: Any, of_loss: bool) -> list[Tensor]:
        """Squared singular values of each group, as it will be decomposed or in units of the loss."""

        def spectrum(group: _Group) -> Tensor:
            if of_loss:
                root = self._mean_root(group)
                weights = [
                    self.outputs[s.layer, s.role].weighted(self._weight(s).to(root.gram.device)) for s in group.sites
                ]
                return squared_singular_values(weights, root)
            metric = self._metric(group)
            return squared_singular_values(metric.weighted, metric.pool.root, metric.block_weights)

        return self._each(lambda group: self._remember("spectrum", group, spectrum), advance, "spectra")

    def _mean_root(self, group: _Group) -> Root:
        """Of the mean over layers and tokens of x x^T."""
        key = tuple(group.layers), group.sites[0].source
        if key not in self.roots:
            grams = [self.grams[at] for at in group.inputs]
            grams = [gram.to(grams[0].device) for gram in grams]
            root = Root(pooled(grams, [1.0] * len(grams)) / (len(grams) * self.tokens))
            self.roots[key] = root
        return self.roots[key]

    def losses(self, model: nn.Module, ratio: float, advance: Any, notes: list[str]) -> list[dict[int, float]]:
        """The model's loss with each group alone cut off at each of its trial ranks, and a note on what that took."""
        start, runs = time.perf_counter(), 0
        sample = first_tokens(self.batches, _TRIAL_TOKENS)
        dense = next_token_loss(model, sample, self.among)

        def losses(group: _Group) -> Tensor:
            nonlocal runs
            metric, found = self._metric(group), []
            ranks = trial_ranks(group.shape, ratio)
            own = [self.architecture.weight(site.layer, site.role) for site in group.sites]
            parts = decompose(metric.weighted, metric.pool.root, metric.block_weights, rank=ranks[-1])
            for rank in ranks:
                factors = parts.truncate(rank)
                with _in_place_of(own, [factors.basis @ c for c in metric.restored(factors.coefficients)]):
                    found.append(next_token_loss(model, sample, self.among))
                advance(f"{group.sites[0].role} of block {group.layers[-1]}: rank {rank}")
            runs += len(found)
            return torch.tensor(found, dtype=torch.float64)

        def by_rank(group: _Group) -> dict[int, float]:
            ranks = trial_ranks(group.shape, ratio)
            return dict(zip(ranks, self._remember("losses", group, losses).tolist(), strict=True))

        found = self._each(by_rank, advance, "sensitivity")
        notes.append(
            f"sensitivity: {runs} runs of the whole model over {sum(b.tokens for b in sample):,} "
            f"tokens in {time.perf_counter() - start:.0f} s; its loss on them is {dense:.4f} nats a token"
        )
        return found

    def _each(self, look: Callable[[_Group], T], advance: Any, what: str) -> list[T]:
        """What ``look`` sees of each group in a first pass over the blocks.

        Ranks need it of all groups, and factors need the ranks: eigenvectors kept in between would weigh several times
        what the model does, so they are found when the blocks come by again.
        """
        found: dict[int, T] = {}
        stream = BlockStream(self.architecture, self.share)
        for layer in range(len(self.architecture.blocks)):
            self._collect(stream)
            for group in self._complete(layer):
                found[id(group)] = look(group)
            self._release(layer)
            advance(f"block {layer}: {what}")
        return [found[id(group)] for group in self.groups]

    def factor(self, how: str | None, aware: bool, advance: Any) -> None:
        """Factors and report of every group."""
        stream = BlockStream(self.architecture, self.share)
        prefix = None
        if aware or how in ("sequential", "cross"):
            prefix = _Prefix(self.architecture, self.share, how, self._factor_seen if aware else None, self.among)
        waiting: list[_Group] = []
        for layer in range(len(self.architecture.blocks)):
            self._collect(stream)
            for group in self._complete(layer):
                if not aware and not self._recall(group):
                    self._factor(group, self._metric(group), own=how == "own", measure=prefix is None)
                    self._keep(group)
                if prefix is None:
                    self._finish(group)
                waiting.append(group)
            advance(f"block {layer}")
            if prefix is not None:
                while prefix.layer <= layer and all(
                    group.layers[-1] <= layer for group in self.groups if prefix.layer in group.layers
                ):
                    prefix.block([group for group in waiting if prefix.layer in group.layers])
                    advance(f"block {prefix.layer - 1}: refit")
                for group in [group for group in waiting if group.layers[-1] < prefix.layer]:
                    self._measure(group, group.seen or self._metric(group))
                    group.seen = None
                    self._finish(group)
                    waiting.remove(group)
            self._release(layer if prefix is None else prefix.layer - 1)

    def _name(self, what: str, group: _Group) -> str:
        return f"{what}-{self.groups.index(group):05d}"

    def _remember(self, what: str, group: _Group, make: Callable[[_Group], Tensor]) -> Tensor:
        """What ``make`` finds for a group, or an earlier run has found."""
        name = self._name(what, group)
        kept = None if self.store is None else self.store.load(name)
        if kept is not None:
            return kept[0][what]
        found = make(group)
        if self.store is not None and self.among.first:
            self.store.save(name, {what: found}, {})
        return found

    def _keep(self, group: _Group) -> None:
        """The group as it was found; refits to compressed inputs are done again, with the same result."""
        if self.store is None or not self.among.first:
            return
        assert group.report is not None
        tensors = {str(i): group.coefficients[site] for i, site in enumerate(group.sites) if group.coefficients}
        if group.basis is not None:
            tensors["basis"] = group.basis
        self.store.save(self._name("group", group), tensors, {"report": asdict(group.report), "energy": group.energy})

    def _finish(self, group: _Group) -> None:
        """Write the factors of an offloaded group: until the model gets them, none is held."""
        linears = [self.architecture.linear(site.layer, site.role) for site in group.sites]
        if self.architecture.scratch is None or group.rank is None or not all(map(offload.is_offloaded, linears)):
            return
        stored = [self._stored(group, site) for site in group.sites]
        file = self.architecture.scratch / f"{self._name('factors', group)}.safetensors"
        offload.write_factors(file, stored)
        group.file, group.basis = file, None
        group.coefficients.clear()

    def _recall(self, group: _Group) -> bool:
        """Whether an earlier run has found the group; it then is as that run left it."""
        kept = None if self.store is None else self.store.load(self._name("group", group))
        if kept is None:
            return False
        tensors, about = kept
        device, _ = self.architecture.placement(group.sites[0].layer, group.sites[0].role)
        group.energy = about["energy"]
        layers = [LayerReport(**layer) for layer in about["report"].pop("layers")]
        group.report = GroupReport(**about["report"], layers=layers)
        if "basis" in tensors:
            # copies, since a file's tensors may begin anywhere
            group.basis = tensors.pop("basis").to(device, copy=True)
            group.coefficients = {site: tensors[str(i)].to(device, copy=True) for i, site in enumerate(group.sites)}
        return True

    def _collect(self, stream: BlockStream) -> None:
        """Statistics of the next block's inputs."""
        layer, grams, magnitudes = stream.layer, Grams(), Magnitudes()

        def add(role: str, x: Tensor) -> None:
            grams.add(role, x)
            if self.rule.channels == "magnitude":
                magnitudes.add(role, x)

        stream.advance(add)
        names = {
            group[0]: self.architecture.full_name(layer, self.architecture.roles[group[0]])
            for group in self.architecture.inputs
        }
        with self.among.together():
            for source, name in names.items():
                if source not in grams.of:
                    raise ValueError(
                        f"{name} did not run on the calibration tokens, so nothing is known about its input"
                    )
        grams.sum_over(self.among)
        magnitudes.sum_over(self.among)
        for source, name in names.items():
            if not grams.is_finite(source):
                raise ValueError(f"the input of {name} has NaN or Inf on the calibration tokens")
            self.grams[layer, source] = grams.of[source]
        self.channels |= {(layer, role): sums for role, sums in magnitudes.of.items()}

    def _complete(self, layer: int) -> list[_Group]:
        return [group for group in self.groups if group.layers[-1] == layer]

    def _release(self, layer: int) -> None:
        """Drop the Gram matrices that no group beyond this block needs."""
        needed = {key for group in self.groups if group.layers[-1] > layer for key in group.inputs}
        self.grams = {key: gram for key, gram in self.grams.items() if key in needed}
        self.pools = {key: pool for key, pool in self.pools.items() if key[0][-1] > layer}
        self.roots = {key: root for key, root in self.roots.items() if key[0][-1] > layer}

    def _weight(self, site: _Site) -> Tensor:
        return self.architecture.weight(site.layer, site.role).detach().double().mT

    def _factor_seen(self, group: _Group, seen: Seen) -> None:
        """Factors of a group for inputs X' of the compressed model: ``seen`` has X'^T X' and X'^T X of each."""
        group.seen = self._metric(group, seen)
        if not self._recall(group):
            self._factor(group, group.seen)
            self._keep(group)

    def _metric(self, group: _Group, seen: Seen | None = None) -> _Metric:
        weights = [self._weight(site) for site in group.sites]
        device = weights[0].device
        weights = [weight.to(device) for weight in weights]
        source = group.sites[0].source
        known = self.grams if seen is None else {at: gram for at, (gram, _) in seen.items()}
        grams = [known[layer, source].to(device) for layer in group.layers]
        if seen is not None:
            crosses = [seen[site.layer, source][1].to(device) for site in group.sites]
            at = [group.layers.index(site.layer) for site in group.sites]
            weights = [adapted(w, grams[i], cross) for w, i, cross in zip(weights, at, crosses, strict=True)]
        name = self._channel(group.sites[0])
        key = tuple(group.layers), name
        if key not in self.pools:
            channels = None
            if self.rule.channels is not None:
                channels = [self.channels[layer, name].to(device) for layer in group.layers]
            self.pools[key] = self.rule.pool(grams, self.tokens, channels)
        pool = self.pools[key]
        at = [group.layers.index(site.layer) for site in group.sites]
        given = self.rule.block_weights(weights, [pool.scales[i] for i in at])
        if self.depth_weight is not None:
            given = by_depth(given, [site.layer for site in group.sites], self.depth_weight)
        outputs = [self.outputs[site.layer, site.role] for site in group.sites] if self.weigh_outputs else None
        return _Metric(weights, grams, pool, given, outputs)

    def _channel(self, site: _Site) -> str:
        """The role under which what is known of its channels stands: all but gradients belongs to the input."""
        return site.role if self.rule.channels == "gradient" else site.source

    def _factor(self, group: _Group, metric: _Metric, own: bool = False, measure: bool = False) -> None:
        weights, grams, pool = metric.weights, metric.grams, metric.pool
        weighted = metric.weighted
        shape = group.shape
        scales = pool.scales
        if self.rule.scale == "none":  # a report says something all the same
            scales = [input_scale(gram, self.tokens, "trace") for gram in grams]
        traces = [a * float(gram.trace()) for a, gram in zip(pool.alpha, grams, strict=True)]
        layers = []
        factors = None if group.rank is None else factorize(weighted, pool.root, group.rank, metric.block_weights)
        if factors is None:
            energy = [
                b * b * squared_norm(weight, pool.gram)
                for weight, b in zip(weighted, metric.block_weights, strict=True)
            ]
        else:
            energy = factors.energy
            group.basis, coefficients = factors.basis, metric.restored(factors.coefficients)
            if group.storage == "int8":  # the basis first, so that coefficients can be fitted to what is stored
                group.basis, coefficients = balanced(group.basis, coefficients)
                _, dtype = self.architecture.placement(group.sites[0].layer, group.sites[0].role)
                group.basis = rounded(group.basis.mT, dtype).mT
            # laid out as a checkpoint gives them back, since bits of later products depend on it
            group.basis = group.basis.contiguous()
            group.coefficients = {
                site: coefficient.contiguous() for site, coefficient in zip(group.sites, coefficients, strict=True)
            }
        group.energy = energy
        for i, site in enumerate(group.sites):
            at = group.layers.index(site.layer)
            size = weights[i].numel()
            lost = 0.0 if factors is None else factors.lost[i]
            layers.append(
                LayerReport(
                    module=self.architecture.full_name(site.layer, self.architecture.roles[site.role]),
                    layer=site.layer,
                    role=site.role,
                    rank=group.rank,
                    predicted_error=_relative(lost, energy[i]),
                    error=0.0,
                    input_scale=scales[at],
                    alpha=pool.alpha[at],
                    block_weight=metric.block_weights[i],
                    input_share=_share(traces[at], traces),
                    output_share=_share(energy[i], energy),
                    parameters_before=size,
                    parameters_after=size if group.rank is None else group.rank * weights[i].shape[1],
                )
            )
            if own and group.basis is not None:
                group.coefficients[site] = refit(
                    group.basis, group.coefficients[site], grams[at], grams[at] @ weights[i]
                )
        element = self.architecture.placement(group.sites[0].layer, group.sites[0].role)[1].itemsize
        after = shape.dense if group.rank is None else group.rank * shape.per_rank
        group.report = GroupReport(
            rank=group.rank,
            full_rank=min(shape.inputs, shape.outputs),
            predicted_error=0.0 if factors is None else _relative(sum(factors.lost), sum(factors.energy)),
            measured_error=0.0,
            whitening="none" if factors is None else factors.whitening,
            damping=0.0 if factors is None else factors.damping,
            parameters_before=shape.dense,
            parameters_after=after,
            bytes_before=shape.dense * element,
            bytes_after=group.stored_bytes(element),
            operations_before=shape.dense,
            operations_after=group.operations,
            layers=layers,
        )  # fmt: skip
        if measure:
            self._measure(group, metric)

    def _measure(self, group: _Group, metric: _Metric) -> None:
        """Errors of the factors as they will be stored."""
        if group.rank is None:
            return
        assert group.report is not None
        pool, lost = metric.pool.gram, 0.0
        for i, site in enumerate(group.sites):
            product = self._stored(group, site).dense_weight(torch.float64).mT
            weight, own = self._weight(site), self.grams[site.layer, site.source].to(product.device)
            error = squared_norm(weight - product, own)
            group.report.layers[i].error = _relative(error, squared_norm(weight, own))
            if pool is not own or metric.outputs is not None:
                aim = metric.weights[i]  # on the device of the group's first
                error = squared_norm(metric.output(i, aim - product.to(aim.device)), pool)
            lost += error * metric.block_weights[i] ** 2
        group.report.measured_error = _relative(lost, sum(group.energy))

    def _stored(self, group: _Group, site: _Site) -> LowRankLinear:
        return _stored(group, site, self.architecture)

    def notes(self) -> list[str]:
        """What a reader should know of the statistics."""
        blank = [
            self.architecture.full_name(site.layer, self.architecture.roles[site.role])
            for group in self.groups
            for site in group.sites
            if self.rule.channels is not None and not bool(self.channels[site.layer, self._channel(site)].any())
        ]
        if not blank:
            return []
        return [f"no {self.rule.channels} is above zero, so that channels weigh the same, for: {', '.join(blank)}"]


@contextmanager
def _in_place_of(weights: Sequence[Tensor], products: Sequence[Tensor]) -> Iterator[None]:
    """Weights [out, in] with products [in, out] instead of their own values, which come back afterwards."""
    before = [weight.detach().clone() for weight in weights]
    try:
        for weight, product in zip(weights, products, strict=True):
            weight.detach().copy_(product.mT)
        yield
    finally:
        for weight, own in zip(weights, before, strict=True):
            weight.detach().copy_(own)


def _stored(group: _Group, site: _Site, architecture: Architecture) -> LowRankLinear:
    """The layer that takes a linear's place, with the linear's bias, on its device."""
    assert group.basis is not None
    linear: Any = architecture.linear(site.layer, site.role)
    device, dtype = architecture.placement(site.layer, site.role)
    basis, coefficient = (t.mT.to(device).contiguous() for t in (group.basis, group.coefficients[site]))
    layer = _layer(group, basis, coefficient, linear, dtype)
    if not all(bool(t.isfinite().all()) for t in layer.factors(torch.float64)):
        raise ValueError(
            f"the factors of {architecture.full_name(site.layer, architecture.roles[site.role])} do not fit into "
            f"{dtype}; convert the model to float32 or bfloat16 first"
        )
    return layer


def _empty(group: _Group, site: _Site, architecture: Architecture) -> LowRankLinear:
    """As `_stored`, without data: that is in a file."""
    assert group.rank is not None
    outputs, inputs = architecture.shape(site.layer, site.role)
    _, dtype = architecture.placement(site.layer, site.role)
    with torch.device("meta"):
        basis, coefficient = torch.empty(group.rank, inputs), torch.empty(outputs, group.rank)
    return _layer(group, basis, coefficient, architecture.linear(site.layer, site.role), dtype)


def _layer(group: _Group, basis: Tensor, coefficient: Tensor, linear: Any, dtype: torch.dtype) -> LowRankLinear:
    """The layer of such factors that takes a linear's place, with its bias, mode and whether it is trained."""
    if group.storage == "int8":
        layer: LowRankLinear = Int8LowRankLinear.from_factors(basis, coefficient, linear.bias, dtype=dtype)
    else:
        layer = LowRankLinear.from_factors(basis.to(dtype), coefficient.to(dtype), linear.bias)
        layer.weight.requires_grad_(linear.weight.requires_grad)
    return layer.train(linear.training)


def _relative(part: float, whole: float) -> float:
    return math.sqrt(max(part, 0.0) / whole) if whole > 0 else 0.0


def _share(part: float, parts: Sequence[float]) -> float:
    return part / sum(parts) if sum(parts) > 0 else 1 / len(parts)


class _Prefix:
    """Goes through the compressed model block by block: decomposes and refits for the inputs that it gives.

    Args:
        how: the refit, None, "sequential" or "cross".
        decompose: finds the factors of a group from X'^T X' and X'^T X of the inputs of its layers, X' in the
            compressed model and X in the original one; None where groups have theirs already.
        among: the ranks, of which this one has these ``batches``.
    """

    def __init__(
        self,
        architecture: Architecture,
        batches: Sequence[Batch],
        how: str | None,
        decompose: Callable[[_Group, Seen], None] | None,
        among: Ranks,
    ) -> None:
        self.architecture, self.how, self.decompose, self.among = architecture, how, decompose, among
        self.original = BlockStream(architecture, batches)
        self.compressed = BlockStream(architecture, batches)

    @property
    def layer(self) -> int:
        """The block that comes next."""
        return self.compressed.layer

    def block(self, groups: Sequence[_Group]) -> None:
        """Compress one block's linears, one input after the other, and move on to the next block."""
        ahead = self._ahead([group for group in groups if group.layers[0] == self.layer])
        with offload.resident(self.architecture.running(self.architecture.blocks[self.layer])):
            self._block(groups, ahead)

    def _block(self, groups: Sequence[_Group], ahead: Seen) -> None:
        layer = self.layer
        block = copy.deepcopy(self.architecture.blocks[layer])
        copied = list(block.modules())
        for roles in self.architecture.inputs:
            here = [
                (group, site)
                for group in groups
                for site in group.sites
                if site.layer == layer and site.role in roles and (group.rank is not None or self.decompose is not None)
            ]
            if not here:
                continue
            gram, cross = self._statistics(block, roles[0])
            for group, site in here:
                if self.decompose is not None and group.layers[0] == layer and group.report is None:
                    self.decompose(group, {**ahead, (layer, roles[0]): (gram, cross)})
                if group.rank is None:
                    continue
                linear: Any = self.architecture.linear(site.layer, site.role)
                assert group.basis is not None
                if self.how is not None:
                    weight = linear_weight(linear).detach().double().mT
                    aim = cross if self.how == "cross" else gram
                    group.coefficients[site] = refit(
                        group.basis.to(gram.device), group.coefficients[site].to(gram.device), gram, aim @ weight
                    )
                block.set_submodule(self.architecture.roles[site.role], _stored(group, site, self.architecture))
        self.original.advance()
        self.compressed.advance(block=block)
        for module in (*copied, *block.modules()):  # hooks of accelerate hold them in cycles: let the weights go now
            module._parameters.clear()

    def _ahead(self, groups: Sequence[_Group]) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
        """Statistics of the later inputs of groups that begin at this block, from dense blocks from this one on."""
        found: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        last = max((group.layers[-1] for group in groups), default=self.layer)
        if self.decompose is None or last == self.layer:
            return found
        wanted = {at for group in groups for at in group.inputs}
        original, compressed = self.original.fork(), self.compressed.fork()
        for layer in range(self.layer, last + 1):
            sums = Grams()
            with offload.resident(self.architecture.running(self.architecture.blocks[layer])):
                for i in range(len(compressed)):
                    ours, theirs = compressed.step(i), original.step(i)
                    for source in [source for at, source in wanted if at == layer > self.layer]:
                        sums.add(source, ours[source])
                        sums.add(f"{source} cross", ours[source], theirs[source])
            sums.sum_over(self.among)
            found |= {
                (layer, source): (sums.of[source], sums.of[f"{source} cross"])
                for at, source in wanted
                if at == layer > self.layer
            }
        return found

    def _statistics(self, block: nn.Module, source: str) -> tuple[Tensor, Tensor]:
        """X'^T X' and X'^T X, X' the input in the compressed model and X the original one; X' twice if not needed."""
        grams = Grams()
        both = self.how == "cross" or self.decompose is not None
        for i in range(len(self.compressed)):
            x = self.compressed.input(i, source, block)
            grams.add("gram", x)
            if both:
                grams.add("cross", x, self.original.input(i, source))
        grams.sum_over(self.among)
        return grams.of["gram"], grams.of["cross" if both else "gram"]


# --- the result -------------------------------------------------------------------------------------------------------


def _count(report: CompressionReport, groups: Sequence[_Group], architecture: Architecture) -> None:
    report.groups = [group.report for group in groups if group.report is not None]
    for name in (f"{what}_{when}" for what in ("parameters", "bytes", "operations") for when in ("before", "after")):
        setattr(report, name, sum(getattr(group, name) for group in report.groups))
    report.block_ratio = 1 - report.parameters_after / report.parameters_before
    assert report.parameters_after <= kept(report.settings["ratio"]) * report.parameters_before


def _notes(groups: Sequence[_Group]) -> list[str]:
    reports = [group.report for group in groups if group.report is not None]
    notes = []
    dense = [layer.module for group in reports if group.rank is None for layer in group.layers]
    if dense:
        notes.append(f"left dense, as the ranks were allocated: {', '.join(dense)}")
    eigh = [group.layers[0].module for group in reports if group.whitening == "eigh"]
    if eigh:
        notes.append(f"singular beyond any damping, so whitened by eigenvalues: {', '.join(eigh)}")
    slow: dict[tuple[Any, ...], list[str]] = {}
    for group in reports:
        times = group.operations_after / group.operations_before
        if group.rank is not None and times >= 1:
            roles, blocks = group.roles_and_blocks
            slow.setdefault((roles, group.rank, group.full_rank, f"{times:.2f}"), []).append(blocks)
    if slow:
        what = [
            f"{roles} of blocks {', '.join(blocks)} (rank {rank} of {full}: {times} times)"
            for (roles, rank, full, times), blocks in slow.items()
        ]
        notes.append(
            "smaller but not faster, since every layer multiplies by the basis that it shares: a token takes as many "
            f"operations as with dense weights, or more, in {'; '.join(what)}"
        )
    return notes


def _size(model: nn.Module) -> tuple[int, int]:
    """Parameters and bytes, the scales of integers among them; what several modules share counts once."""
    parameters = list(model.parameters())
    lowrank = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    scales = [buffer for module in lowrank for buffer in module.buffers(recurse=False)]
    return sum(p.numel() for p in parameters), sum(t.numel() * t.element_size() for t in (*parameters, *scales))


def _resident_bytes(architecture: Architecture, groups: Sequence[_Group]) -> int:
    """An estimate of what the run of an offloaded model has in memory at once.

    That is one block and all that is outside of blocks, the weights of a group in float64 twice, the Gram matrices that
    groups wait for. Hidden states of one batch, factors and what eigenvalues take come on top.
    """
    blocks = [_size(block)[1] for block in architecture.blocks]
    outside = _size(architecture.decoder)[1] - sum(blocks)
    grams = 0
    for layer in range(len(blocks)):
        waiting = {at for group in groups if group.layers[-1] >= layer for at in group.inputs if at[0] <= layer}
        grams = max(grams, sum(8 * architecture.shape(*at)[1] ** 2 for at in waiting))
    return outside + max(blocks) + 16 * max(group.shape.dense for group in groups) + grams


def _convert(
    model: nn.Module, architecture: Architecture, groups: Sequence[_Group], settings: dict[str, Any], among: Ranks
) -> None:
    """Put the factors into the model and the settings into its config; on failure put everything back."""
    spec_groups: list[dict[str, Any]] = []
    new: dict[str, LowRankLinear] = {}
    for group in groups:
        if group.rank is None:
            continue
        names = [architecture.full_name(site.layer, architecture.roles[site.role]) for site in group.sites]
        make = _stored if group.file is None else _empty
        layers = [make(group, site, architecture) for site in group.sites]
        basis = share(layers)
        if basis.is_floating_point():
            basis.requires_grad_(any(layer.weight.requires_grad for layer in layers))
        for i, (site, layer) in enumerate(zip(group.sites, layers, strict=True)):
            linear: Any = architecture.linear(site.layer, site.role)
            if group.file is not None:
                offload.read_factors(layer, linear, group.file, i)
            elif layer.bias is not None and layer.bias.is_meta:  # of a group that is partly in memory
                layer.bias = nn.Parameter(offload.value(linear, "bias"), requires_grad=layer.bias.requires_grad)
        new |= dict(zip(names, layers, strict=True))
        stored = {} if group.storage is None else {"storage": group.storage}
        spec_groups.append({"modules": names, "rank": group.rank, **stored})
    # A factor is the same on all ranks already, or differs in its last bits where they have unlike processors.
    factors = {id(t): t for module in new.values() for t in (*module.parameters(recurse=False), *module.buffers())}
    among.take_first_(factors.values())
    old = {name: model.get_submodule(name) for name in new}
    try:
        for name, module in new.items():
            model.set_submodule(name, module)
        share_products(model)
        if hasattr(model, "config"):
            from freqrank.models.quantizer import attach

            attach(model, lowrank={"groups": spec_groups, **settings})
    except BaseException:
        for name, former in old.items():
            model.set_submodule(name, former)
        share_products(model)
        offload.discard(architecture.scratch)
        raise
