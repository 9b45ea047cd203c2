"""The DiJiang attention layer: the released algorithm in its linear form (arXiv 2403.19928 and its code).

Queries and keys, rotated as the pretrained model rotates them, pass through phi(x) = softmax(x C T); a causal scan
with one decay a head replaces the softmax over positions; GroupNorm takes the place of the denominator, and a SiLU gate
from a new matrix multiplies the result before the pretrained output projection.

The released tensors D1[i] and D2[j], learned from gamma^i and gamma^-j, overflow beyond a few thousand positions.
Here they are a[i] gamma^i and b[j] gamma^-j: only gamma^(i - j) ever enters, through the scan, and a and b are
learned factors.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqrank import ops
from freqrank.attention.feature_maps import CosineFeatureMap, Float32Module, feature_map_kind

NORM_GROUPS = ("head_dim", "heads")
GATES = ("released", "open")


@dataclass(frozen=True)
class DiJiangOptions:
    """How a layer is built; the defaults are the released combination. JSON-serialisable through :meth:`to_dict`.

    Args:
        feature_map: a name in :data:`freqrank.attention.feature_maps.FEATURE_MAPS`.
        norm_groups: "head_dim" (as released: as many groups as a head has channels) or "heads" (recommended: one a
            head).
        gate: "released" (a random matrix, no bias: the layer starts at about a tenth of its output) or "open" (the same
            matrix with a bias at which SiLU is 1: the layer starts with the pretrained output's scale).
        temperature: factor on queries and keys before the map; see :class:`CosineFeatureMap`.
        position_table: entries of the learned factors a and b; 0 leaves them out. Beyond the table they are 1.
        shortest_span, longest_span: 1 / (1 - gamma) of the first and the last head, in tokens.
        learned_decay: train each head's gamma, instead of leaving it fixed as released.

    Raises:
        ValueError: an unknown name, a temperature that is not positive, a negative table length.
    """

    feature_map: str = "dijiang"
    norm_groups: str = "head_dim"
    gate: str = "released"
    temperature: float = 1.0
    position_table: int = 2048
    shortest_span: float = 32.0
    longest_span: float = 512.0
    learned_decay: bool = False

    def __post_init__(self) -> None:
        feature_map_kind(self.feature_map)
        for name, allowed in (("norm_groups", NORM_GROUPS), ("gate", GATES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {getattr(self, name)!r}")
        if not (isinstance(self.temperature, (int, float)) and 0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be a positive number; got {self.temperature!r}")
        if not isinstance(self.position_table, int) or self.position_table < 0:
            raise ValueError(f"position_table must be an integer >= 0; got {self.position_table!r}")
        if not 1 < self.shortest_span <= self.longest_span < math.inf:
            raise ValueError(
                "shortest_span and longest_span must be numbers with 1 < shortest_span <= longest_span; "
                f"got {self.shortest_span!r} and {self.longest_span!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def multiscale_log_decay(heads: int, shortest_span: float = 32.0, longest_span: float = 512.0) -> Tensor:
    """log gamma of every head, fp32 [heads]: 1 - gamma from 1/32 to 1/512, equally spaced in its logarithm.

    >>> multiscale_log_decay(2).exp()
    tensor([0.9688, 0.9980])
    """
    ends = (-math.log(shortest_span), -math.log(longest_span))
    rate = torch.linspace(*ends, heads, dtype=torch.float64, device="cpu").exp()
    return torch.log1p(-rate).float()


class Decay(Float32Module):
    """The per-head log decay [heads], float32 whatever the model's dtype (0.998 is 1 in bfloat16).

    Fixed, it is a buffer ``log_decay``. Learned, the parameter ``log_rate`` is log(-log gamma), which keeps gamma in
    (0, 1).
    """

    log_rate: nn.Parameter
    log_decay: Tensor | None

    def __init__(self, heads: int, options: DiJiangOptions, device: torch.device | None = None) -> None:
        super().__init__()
        self.heads, self.options = heads, options
        empty = torch.empty(heads, dtype=torch.float32, device=device)
        self.register_parameter("log_rate", nn.Parameter(empty) if options.learned_decay else None)
        self.register_buffer("log_decay", None if options.learned_decay else empty)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        start = multiscale_log_decay(self.heads, self.options.shortest_span, self.options.longest_span)
        if self.log_decay is not None:
            self.log_decay.copy_(start)
        else:
            self.log_rate.copy_(start.neg().log())

    def forward(self) -> Tensor:
        return self.log_decay if self.log_decay is not None else -self.log_rate.exp()


class PositionFactors(nn.Module):
    """A learned factor for each head and absolute position: 1 at first, and 1 beyond the table."""

    def __init__(
        self, heads: int, length: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, length, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(1.0)

    def forward(self, positions: Tensor) -> Tensor:
        """Factors at integer ``positions`` [B, T]: [B, T, heads]."""
        table = F.pad(self.weight, (0, 1), value=1.0).T
        return F.embedding(positions.clamp(max=self.weight.shape[1]), table)


class DiJiangAttention(nn.Module):
    """Linear attention in place of a pretrained softmax layer, around its own four projections.

    Args:
        q_proj, k_proj, v_proj, o_proj: the pretrained linears (or whatever stands for them), kept as children of
            these names.
        hidden_size: size of the layer's input.
        num_heads, num_key_value_heads, head_dim: the pretrained geometry. Decay and the factor b are one a key head,
            so that a group of query heads shares one state; a is one a query head.
        options: see :class:`DiJiangOptions`.
        device, dtype: of the new parameters. ``log_decay`` and the map's frequencies are float32 whatever ``dtype``.

    New tensors are empty until :meth:`reset_parameters` or a checkpoint fills them.
    """

    def __init__(
        self,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        o_proj: nn.Module,
        *,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        options: DiJiangOptions | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = options or DiJiangOptions()
        self.options = options
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, num_key_value_heads, head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = q_proj, k_proj, v_proj, o_proj
        channels = num_heads * head_dim
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.feature_map = CosineFeatureMap(
            head_dim, options.feature_map, temperature=options.temperature, device=device
        )
        self.decay = Decay(num_key_value_heads, options, device)
        if options.position_table:
            self.query_factors = PositionFactors(num_heads, options.position_table, **placed)
            self.key_factors = PositionFactors(num_key_value_heads, options.position_table, **placed)
        groups = head_dim if options.norm_groups == "head_dim" else num_heads
        self.norm = nn.GroupNorm(groups, channels, eps=1e-5, **placed)
        self.gate_proj = nn.Linear(hidden_size, channels, bias=options.gate == "open", **placed)

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Draw what conversion adds, the frequencies and the gate, from a generator of its own."""
        generator = torch.Generator("cpu").manual_seed(seed)
        self.feature_map.reset_parameters(generator)
        self.decay.reset_parameters()
        self.norm.reset_parameters()
        if self.options.position_table:
            self.query_factors.reset_parameters()
            self.key_factors.reset_parameters()
        fan_out, fan_in = self.gate_proj.weight.shape
        bound = 2**-2.5 * math.sqrt(6 / (fan_in + fan_out))
        draw = torch.empty(fan_out, fan_in, device="cpu").uniform_(-bound, bound, generator=generator)
        self.gate_proj.weight.copy_(draw)
        if self.gate_proj.bias is not None:
            self.gate_proj.bias.fill_(1.2784645)  # SiLU(1.2784645) = 1

    def mix(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        *,
        mask: Tensor | None = None,
        state: ops.LinearAttentionState | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, ops.LinearAttentionState | None]:
        """From projected (and rotated) heads to the layer's output.

        Args:
            x: the layer's input [B, T, hidden_size], for the gate.
            q, k, v: [B, T, H, K], [B, T, Hk, K], [B, T, Hk, K].
            positions: absolute position of every token among its sequence's own, integer [B, T] or [1, T].
            mask: bool [B, T]; a token that is False leaves no trace.
            state: what earlier tokens left. A single token is decoded into it in place, where no gradient is asked for.
            output_state: return the state after the last token.
            cu_seqlens: int [N + 1], for several sequences in one row (B == 1).

        Returns:
            the output [B, T, hidden_size], and the state or None.
        """
        phi = self.feature_map
        log_decay = self.decay()
        if self.options.position_table:
            v = self.key_factors(positions)[..., None] * v
        if state is not None and q.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
            o = ops.feature_map_attention_step(
                q[:, 0],
                k[:, 0],
                v[:, 0],
                state,
                phi.projection(),
                feature=phi.kind.feature,
                weights=phi.weights,
                log_decay=log_decay,
                mask=None if mask is None else mask[:, 0],
            )[:, None]
        else:
            o, state = ops.dijiang_attention(
                q,
                k,
                v,
                phi.scales,
                transform=phi.kind.transform,
                signs=phi.signs,
                feature=phi.kind.feature,
                weights=phi.weights,
                log_decay=log_decay,
                mask=mask,
                initial_state=state,
                output_final_state=output_state,
                cu_seqlens=cu_seqlens,
            )
        if self.options.position_table:
            o = self.query_factors(positions)[..., None] * o
        o = self.norm(o.flatten(2).flatten(0, 1)).view(*x.shape[:-1], -1)
        return self.o_proj(F.silu(self.gate_proj(x)) * o), state

    def extra_repr(self) -> str:
        heads = f"heads={self.num_heads}, key_value_heads={self.num_key_value_heads}, head_dim={self.head_dim}"
        return f"{heads}, norm_groups={self.options.norm_groups!r}, gate={self.options.gate!r}"
