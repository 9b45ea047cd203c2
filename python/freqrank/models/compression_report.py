"""What `compress` did: a report of every linear, of every group that shares a basis, and of the whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CompressionReport", "GroupReport", "LayerReport"]


@dataclass
class LayerReport:
    """What became of one linear.

    Attributes:
        module: its name in the model.
        layer: number of its block.
        role: "q", "k", "v", "o", "gate", "up" or "down"; "qkv" or "gate_up" where one linear computes several.
        rank: directions kept; None if it stayed dense.
        predicted_error: sqrt(share of ||S b W||_F^2 that the truncation drops), before any refit: the relative output
            error on the data the group was decomposed with. 0 if dense. With ``output_weight``, W T stands for W, here
            and in ``output_share``.
        error: measured, ||X (W - B C)||_F / ||X W||_F on the layer's own calibration inputs X in the dense model, with
            the factors as they are stored. Those made for inputs of the compressed model (error-aware statistics, refit
            "sequential" or "cross") may be above 1 here and still be right for what they get.
        input_scale: mean square of an entry of X (or what ``scale`` says).
        alpha: coefficient of the layer's Gram matrix in the group's pool.
        block_weight: factor b on its weight in the decomposition (mean 1 over the group).
        input_share: alpha_l tr G_l over the group's sum: how much of the pooled Gram matrix is this layer's.
        output_share: b_l^2 tr(W_l^T G W_l), G the pool, over the group's sum: how much of what the decomposition
            preserves is this layer's. The weight that the layer effectively got: equal shares, equal care.
        parameters_before: of the dense weight.
        parameters_after: of its own coefficient (the basis is counted with the group), or of the dense weight.
    """

    module: str
    layer: int
    role: str
    rank: int | None
    predicted_error: float
    error: float
    input_scale: float
    alpha: float
    block_weight: float
    input_share: float
    output_share: float
    parameters_before: int
    parameters_after: int


@dataclass
class GroupReport:
    """What became of the linears that share one basis (or of one that has its own).

    Attributes:
        rank: directions kept; None if the group stayed dense.
        full_rank: the most directions it could have, min(inputs, outputs of all its linears).
        predicted_error: sqrt of the share of the squared singular values that were dropped.
        measured_error: the same from the stored factors, in the same metric: equal but for rounding unless refitted.
        whitening: "cholesky", "eigh" (no damping level sufficed), or "none": the decomposition needed none.
        damping: relative damping of the pooled Gram matrix, 0 if none was needed.
        parameters_before, parameters_after, bytes_before, bytes_after: weights, the basis among them; the scales of
            integers count as bytes, not as parameters.
        operations_before, operations_after: multiply-adds a token. Parameters of a shared basis are there once, but
            each layer multiplies by it, so these may rise where parameters fall.
        layers: one entry a linear.
    """

    rank: int | None
    full_rank: int
    predicted_error: float
    measured_error: float
    whitening: str
    damping: float
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    operations_before: int
    operations_after: int
    layers: list[LayerReport]

    @property
    def roles_and_blocks(self) -> tuple[str, str]:
        """Such as "q+k" and "0-1", or "0,3" where blocks are not neighbours."""
        blocks = sorted({layer.layer for layer in self.layers})
        adjacent = len(blocks) > 1 and blocks[-1] - blocks[0] == len(blocks) - 1
        span = f"{blocks[0]}-{blocks[-1]}" if adjacent else ",".join(map(str, blocks))
        return "+".join(dict.fromkeys(layer.role for layer in self.layers)), span


@dataclass
class CompressionReport:
    """What `compress` did. ``str()`` gives a table, ``to_dict()`` what fits into JSON.

    Attributes:
        settings: the arguments.
        tokens: calibration tokens that counted.
        groups: what became of each group of linears.
        parameters_before, parameters_after, bytes_before, bytes_after: of the compressed linears' weights.
        operations_before, operations_after: multiply-adds of these linears for one token.
        model_parameters_before, model_parameters_after, model_bytes_before, model_bytes_after: of the whole model.
        block_ratio: fraction of the linears' parameters that is gone; never less than ``settings["ratio"]``.
        model_ratio: fraction of the model's parameters that is gone.
        notes: what a reader should know: dense linears, groups whose factors take more operations than their dense
            weights did, damped or singular Gram matrices, too few tokens.
        seconds: how long it took.
    """

    settings: dict[str, Any]
    architecture: str
    tokens: int
    groups: list[GroupReport] = field(default_factory=list)
    parameters_before: int = 0
    parameters_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    operations_before: int = 0
    operations_after: int = 0
    model_parameters_before: int = 0
    model_parameters_after: int = 0
    model_bytes_before: int = 0
    model_bytes_after: int = 0
    block_ratio: float = 0.0
    model_ratio: float = 0.0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def layers(self) -> list[LayerReport]:
        """Every linear's entry, block by block."""
        return sorted((layer for group in self.groups for layer in group.layers), key=lambda layer: layer.layer)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists of JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        s = self.settings
        deep = "" if s["depth_weight"] is None else f", depth weight {s['depth_weight']}"
        deep += "" if s["output_weight"] is None else f", output weight {s['output_weight']}"
        deep += "" if s["statistics"] == "original" else f", {s['statistics']} statistics"
        deep += "" if s["grouping"] == "adjacent" else f", {s['grouping']} layers"
        stored = "" if s["storage"] is None else f", stored as {s['storage']}"
        lines = [
            f"{s['method']} (group size {s['group_size']}, scale {s['scale']}, exponent {s['exponent']}, block weight "
            f"{s['block_weight']}{deep}, refit {s['refit']}, share {s['share']}, allocation {s['allocation']}"
            f"{stored}), {self.tokens:,} calibration tokens, {self.seconds:.1f} s",
            f"compressed linears: {self.parameters_before:,} -> {self.parameters_after:,} parameters, "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes, {self.block_ratio:.2%} removed "
            f"({s['ratio']:.2%} asked for)",
            f"multiply-adds a token in them: {self.operations_before:,} -> {self.operations_after:,} "
            f"({self.operations_after / self.operations_before - 1:+.2%})",
            f"whole model: {self.model_parameters_before:,} -> {self.model_parameters_after:,} parameters, "
            f"{self.model_bytes_before:,} -> {self.model_bytes_after:,} bytes, {self.model_ratio:.2%} removed",
        ]
        head = (
            "linear",
            "blocks",
            "rank",
            "predicted",
            "measured",
            "error in each block",
            "operations",
            "scale",
            "weight",
            "damping",
        )
        rows = [head]
        for group in self.groups:
            roles, blocks = group.roles_and_blocks
            rows.append(
                (
                    roles,
                    blocks,
                    "dense" if group.rank is None else f"{group.rank}/{group.full_rank}",
                    f"{group.predicted_error:.4f}",
                    f"{group.measured_error:.4f}",
                    " ".join(f"{layer.error:.4f}" for layer in group.layers),
                    f"{group.operations_after / group.operations_before:.2f}",
                    " ".join(f"{layer.input_scale:.3g}" for layer in group.layers),
                    " ".join(f"{layer.output_share:.2f}" for layer in group.layers),
                    group.whitening if group.whitening == "eigh" else f"{group.damping:.0e}" if group.damping else "-",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
