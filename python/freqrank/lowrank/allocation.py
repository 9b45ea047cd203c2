"""How many directions each group of linears keeps."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

ALLOCATIONS = ("uniform", "effective-rank", "auto", "sensitivity", "loss")

# What "sensitivity" tries to keep of each group, beside the target itself: ASVD's grid.
_KEEPS = tuple(Fraction(tenths, 10) for tenths in range(1, 10))


@dataclass(frozen=True)
class Shape:
    """Sizes of the linears that share one basis: ``inputs`` features in, ``outputs`` features out of all together."""

    inputs: int
    outputs: int

    @property
    def dense(self) -> int:
        """Parameters of the dense weights."""
        return self.inputs * self.outputs

    @property
    def per_rank(self) -> int:
        """Parameters of one direction: a column of the basis and a row of the coefficients."""
        return self.inputs + self.outputs

    @property
    def break_even(self) -> int:
        """The smallest rank at which factors cost as much as the dense weights, or more."""
        return -(-self.dense // self.per_rank)


def kept(ratio: float) -> Fraction:
    """1 - ratio without binary rounding, so that 0.2 keeps four fifths exactly."""
    return 1 - Fraction(repr(float(ratio)))


def uniform_rank(shape: Shape, ratio: float) -> int:
    """floor(keep * d1 * D2 / (d1 + D2)), D2 the outputs of all linears of the group (n * d2 for n layers alike).

    The rule of SVD-LLM (n = 1) and Basis Sharing. It never costs more than ``keep`` of the dense weights, and never
    reaches min(d1, D2), so no rank is useless.

    >>> uniform_rank(Shape(4096, 2 * 4096), 0.2)
    2184
    """
    return math.floor(kept(ratio) * shape.dense / shape.per_rank)


def trial_ranks(shape: Shape, ratio: float) -> list[int]:
    """The ranks of a group whose loss "sensitivity" wants to know: a tenth to nine tenths kept, and the target.

    >>> trial_ranks(Shape(16, 16), 0.75)
    [1, 2, 3, 4, 5, 6, 7]
    """
    ranks = {math.floor(keep * shape.dense / shape.per_rank) for keep in (*_KEEPS, kept(ratio))}
    return sorted(rank for rank in ranks if rank > 0)


def allocate(
    kind: str,
    shapes: Sequence[Shape],
    ratio: float,
    spectra: Sequence[Tensor] | None = None,
    losses: Sequence[Mapping[int, float]] | None = None,
) -> list[int | None]:
    """Rank of each group, or None where it stays dense; the parameters never exceed the target.

    Args:
        kind: "uniform": :func:`uniform_rank` of each group alone.
            "effective-rank": D-Rank's rule (arXiv 2509.25622): ranks proportional to sqrt(R_g / w_g), R_g the
            exponential of the entropy of the normalised singular values, w_g the parameters of one direction.
            "auto": spends parameters where they remove the largest share of a group's squared error, each group
            keeping at least half of its uniform rank; a group that reaches the cost of its dense weights stays dense.
            "loss": spends parameters where they lower the loss most: as "auto", but with squared singular values in
            units of the loss, so that groups compare as they are, and at least a quarter of each uniform rank.
            "sensitivity": ASVD's search (arXiv 2312.05821): each group takes the least of its ``trial_ranks`` that
            alone costs no more than a loss which all groups have in common, or stays dense where there is none; that
            loss is as low as the target allows. What a step of a tenth leaves over is not spent.
        shapes: sizes of the groups.
        ratio: fraction of their parameters that is removed.
        spectra: squared singular values of each group, largest first, for all but "uniform" and
            "sensitivity"; for "loss" those of S [W_1 T_1 | ...] per token, T the root of the outputs' Fisher
            information (`freqrank.lowrank.outputs`).
        losses: the model's loss with each group alone cut off at each of its :func:`trial_ranks`, for "sensitivity".

    Raises:
        ValueError: the ratio leaves a group without a single direction.

    >>> allocate("uniform", [Shape(64, 64), Shape(64, 256)], 0.5)
    [16, 25]
    >>> flat, steep = torch.ones(64), 10.0 ** -torch.arange(64)
    >>> allocate("effective-rank", [Shape(64, 64), Shape(64, 64)], 0.5, [flat, steep])
    [26, 5]
    >>> allocate("auto", [Shape(64, 64), Shape(64, 64)], 0.5, [flat, steep])
    [24, 8]
    >>> allocate("loss", [Shape(64, 64), Shape(64, 64)], 0.5, [flat, 5 * flat])
    [4, 28]
    >>> robust, touchy = ({rank: x / rank for rank in trial_ranks(Shape(64, 64), 0.5)} for x in (1, 5))
    >>> allocate("sensitivity", [Shape(64, 64), Shape(64, 64)], 0.5, losses=[robust, touchy])
    [6, 25]
    """
    ranks = [uniform_rank(shape, ratio) for shape in shapes]
    for shape, rank in zip(shapes, ranks, strict=True):
        if rank < 1:
            raise ValueError(
                f"ratio {ratio} leaves no direction for linears of {shape.inputs} inputs and {shape.outputs} outputs; "
                f"it must be at most {float(1 - Fraction(shape.per_rank, shape.dense)):.6g} for them"
            )
    if kind == "uniform":
        return list(ranks)
    budget = math.floor(kept(ratio) * sum(shape.dense for shape in shapes))
    if kind == "sensitivity":
        assert losses is not None
        return _sensitivity(shapes, losses, budget)
    assert spectra is not None
    if kind == "effective-rank":
        return _effective_rank(shapes, spectra, budget)
    floor = 4 if kind == "loss" else 2
    totals = [1.0 if kind == "loss" else float(spectrum.double().clamp(min=0).sum()) for spectrum in spectra]
    return _steepest(shapes, spectra, totals, budget, [max(1, rank // floor) for rank in ranks])


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of the normalised singular values; ``spectrum`` holds their squares.

    >>> round(effective_rank(torch.ones(8)), 6)
    8.0
    """
    values = spectrum.double().clamp(min=0).sqrt()
    if not bool(values.sum() > 0):
        return 1.0
    p = values / values.sum()
    return float(torch.exp(torch.special.entr(p).sum()))


def _effective_rank(shapes: Sequence[Shape], spectra: Sequence[Tensor], budget: int) -> list[int | None]:
    weight = [
        math.sqrt(effective_rank(spectrum) / shape.per_rank) for shape, spectrum in zip(shapes, spectra, strict=True)
    ]
    ranks: list[int | None] = [1] * len(shapes)
    open_groups, left = set(range(len(shapes))), budget
    while open_groups:
        total = sum(weight[g] * shapes[g].per_rank for g in open_groups)
        share = {g: left * weight[g] / total for g in open_groups}
        # Who would get less than one direction takes one, then who would pay as much as for its dense weights keeps
        # them; the others share what is left.
        least = {g for g in open_groups if share[g] < 1}
        full = {g for g in open_groups if share[g] >= shapes[g].break_even}
        if not least and not full:
            for g in open_groups:
                ranks[g] = math.floor(share[g])
            break
        for g in least or full:
            if not least:
                ranks[g] = None
            left -= shapes[g].per_rank if least else shapes[g].dense
            open_groups.remove(g)
    return ranks


def _steepest(
    shapes: Sequence[Shape], spectra: Sequence[Tensor], totals: Sequence[float], budget: int, least: Sequence[int]
) -> list[int | None]:
    """Directions in the order of what they hold of their group's total a parameter, until the budget is spent."""
    left = budget - sum(shape.per_rank * rank for shape, rank in zip(shapes, least, strict=True))
    gains, owners = [], []
    for g, (shape, spectrum) in enumerate(zip(shapes, spectra, strict=True)):
        tail = spectrum.double().cpu().clamp(min=0)[least[g] : shape.break_even]
        gains.append(tail / (totals[g] * shape.per_rank) if totals[g] > 0 else torch.zeros_like(tail))
        owners.append(torch.full((tail.numel(),), g))
    gain, owner = torch.cat(gains), torch.cat(owners)
    ranks: list[int | None] = list(least)
    spent = set()
    for g in owner[torch.argsort(gain, descending=True, stable=True)].tolist():
        rank = ranks[g]
        if rank is None or g in spent:
            continue
        cost = min(shapes[g].per_rank, shapes[g].dense - rank * shapes[g].per_rank)
        if cost > left:
            spent.add(g)
            continue
        left -= cost
        ranks[g] = rank + 1 if rank + 1 < shapes[g].break_even else None
    return ranks


def _sensitivity(shapes: Sequence[Shape], losses: Sequence[Mapping[int, float]], budget: int) -> list[int | None]:
    # What is no number (an overflow) comes last; of equal losses the larger rank comes first.
    trials = sorted(
        (loss if math.isfinite(loss) else math.inf, -rank, g)
        for g, found in enumerate(losses)
        for rank, loss in found.items()
    )

    def ranks(allowed: int) -> list[int | None]:
        least: list[int | None] = [None] * len(shapes)
        for _, negative, g in trials[:allowed]:
            least[g] = min(-negative, least[g] or -negative)
        return least

    def fits(allowed: int) -> bool:
        cost = (
            shape.dense if rank is None else rank * shape.per_rank
            for shape, rank in zip(shapes, ranks(allowed), strict=True)
        )
        return sum(cost) <= budget

    # With every trial allowed no group has more than its uniform rank, so this finds one that fits.
    return ranks(bisect_left(range(len(trials)), True, key=fits))
