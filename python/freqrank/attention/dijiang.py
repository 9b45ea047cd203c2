"""The DiJiang attention layer: the released algorithm in its linear form (arXiv 2403.19928 and its code), and options.

As released, queries and keys, rotated as the pretrained model rotates them, pass through phi(x) = softmax(x C T); a
causal scan with one decay a head replaces the softmax over positions; GroupNorm takes the place of the denominator, and
a SiLU gate from a new matrix multiplies the result before the pretrained output projection.

The released tensors D1[i] and D2[j], learned from gamma^i and gamma^-j, overflow beyond a few thousand positions.
Here they are a[i] gamma^i and b[j] gamma^-j: only gamma^(i - j) ever enters, through the scan, and a and b are
learned factors.

With a window, softmax attention over the newest tokens and the first few carries the layer at the start, and the
share that the scan has in the output, one a head and token, is for training to raise.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqrank import ops
from freqrank.attention.feature_maps import FEATURE_MAPS, FeatureMap, Float32Module, feature_map_kind
from freqrank.attention.parallel import current_group, scan_piece
from freqrank.attention.window import WindowState, window_attention

NORMS = ("group", "rms", "denominator", "none")
NORM_GROUPS = ("head_dim", "heads")
GATES = ("released", "open", "none")
DECAYS = ("multi-scale", "learned", "token", "none")
#: Where the share of the scan beside a window starts, before the sigmoid: 2 %.
MIX_BIAS = -4.0
#: What ``feature_map`` is called where a layer has no linear part, only a window.
WINDOW_ONLY = "none"


@dataclass(frozen=True)
class DiJiangOptions:
    """How a layer is built; the defaults are the released combination. JSON-serialisable through :meth:`to_dict`.

    Args:
        feature_map: a name in :data:`freqrank.attention.feature_maps.FEATURE_MAPS`; "none" leaves the linear part out
            and keeps the window alone, for comparison.
        num_frequencies: columns of the map's projection; None: as many as a head has channels. See
            :class:`freqrank.attention.feature_maps.FeatureMap`.
        temperature: factor on queries and keys before the map; "pretrained": the one that restores the scale of the
            pretrained logits (:func:`freqrank.attention.feature_maps.pretrained_temperature`); None: 1 for softmax
            features, as released, and "pretrained" for exponentials, which a trained model's vectors would overflow.
        decay: of the state. "multi-scale": one fixed rate a head, as released; "learned": the same, trained; "token": a
            rate that also depends on the token, -log gamma = exp(w . x + log rate), w trained from 0; "none".
        norm: what stands for softmax's denominator: "group" (GroupNorm, as released), "rms" (of each head),
            "denominator" (the kernel's own, the sum of phi(q) . phi(k)) or "none".
        norm_groups: of "group": "head_dim" (as released: as many groups as a head has channels) or "heads"
            (recommended: one a head).
        gate: "released" (a random matrix, no bias: the layer starts at about a tenth of its output), "open" (the same
            matrix with a bias at which SiLU is 1: the layer starts with the pretrained output's scale) or "none".
        position_table: entries of the learned factors a and b; 0 leaves them out. Beyond the table they are 1.
        shortest_span, longest_span: 1 / (1 - gamma) of the first and the last head, in tokens.
        window: newest tokens, the query's own among them, that softmax attention sees; 0: none.
        sinks: first tokens that it sees besides.

    Raises:
        ValueError: an unknown name, a temperature that is not positive, a negative length, sinks or no feature map
            without a window.
    """

    feature_map: str = "dijiang"
    num_frequencies: int | None = None
    temperature: float | str | None = None
    decay: str = "multi-scale"
    norm: str = "group"
    norm_groups: str = "head_dim"
    gate: str = "released"
    position_table: int = 2048
    shortest_span: float = 32.0
    longest_span: float = 512.0
    window: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.feature_map != WINDOW_ONLY:
            feature_map_kind(self.feature_map)
        allowed = {"decay": DECAYS, "norm": NORMS, "norm_groups": NORM_GROUPS, "gate": GATES}
        for name, names in allowed.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}; got {getattr(self, name)!r}")
        number = isinstance(self.temperature, (int, float)) and not isinstance(self.temperature, bool)
        if not (self.temperature in (None, "pretrained") or (number and 0 < float(self.temperature) < math.inf)):
            raise ValueError(f'temperature must be a positive number, "pretrained" or None; got {self.temperature!r}')
        for name in ("position_table", "window", "sinks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer >= 0; got {value!r}")
        count = self.num_frequencies
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"num_frequencies must be None or an integer >= 1; got {count!r}")
        if not 1 < self.shortest_span <= self.longest_span < math.inf:
            raise ValueError(
                "shortest_span and longest_span must be numbers with 1 < shortest_span <= longest_span; "
                f"got {self.shortest_span!r} and {self.longest_span!r}"
            )
        if not self.window and (self.sinks or self.feature_map == WINDOW_ONLY):
            what = f"sinks={self.sinks}" if self.sinks else f"feature_map={WINDOW_ONLY!r}"
            raise ValueError(f"{what} needs a window: give window=64, say")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


#: Whole combinations that have a name; `linearize` takes it in place of a feature map's.
PRESETS: dict[str, DiJiangOptions] = {
    "dijiang": DiJiangOptions(),
    "recommended": DiJiangOptions(
        feature_map="hedgehog",
        temperature="pretrained",
        decay="token",
        norm="rms",
        gate="open",
        position_table=0,
        shortest_span=2.0,
    ),
}
PRESETS["hybrid"] = replace(PRESETS["recommended"], window=64, sinks=4)


def preset_options(name: str, **options: Any) -> DiJiangOptions:
    """The options of a preset, or the released ones with another feature map, and ``options`` in place of theirs.

    Raises:
        ValueError: a name that is neither; what :class:`DiJiangOptions` raises.

    >>> preset_options("hybrid", window=16).window, preset_options("wdcf").gate
    (16, 'released')
    """
    if isinstance(name, str) and name in PRESETS:
        return replace(PRESETS[name], **options)
    if not isinstance(name, str) or name not in (*FEATURE_MAPS, WINDOW_ONLY):
        allowed = ", ".join(map(repr, dict.fromkeys([*PRESETS, *FEATURE_MAPS, WINDOW_ONLY])))
        raise ValueError(f"feature_map must be one of {allowed}; got {name!r}")
    return DiJiangOptions(feature_map=name, **options)


def multiscale_log_decay(heads: int, shortest_span: float = 32.0, longest_span: float = 512.0) -> Tensor:
    """log gamma of every head, fp32 [heads]: 1 - gamma from 1/32 to 1/512, equally spaced in its logarithm.

    >>> multiscale_log_decay(2).exp()
    tensor([0.9688, 0.9980])
    """
    ends = (-math.log(shortest_span), -math.log(longest_span))
    rate = torch.linspace(*ends, heads, dtype=torch.float64, device="cpu").exp()
    return torch.log1p(-rate).float()


class Decay(Float32Module):
    """The log decay, [heads] or, if it depends on the token, [B, T, heads]; float32 (0.998 is 1 in bfloat16).

    Fixed, it is a buffer ``log_decay``. Learned, the parameter ``log_rate`` is log(-log gamma), which keeps gamma in
    (0, 1), and ``weight`` [heads, hidden_size], for a decay that depends on the token, is what adds to it.
    """

    log_rate: nn.Parameter | None
    weight: nn.Parameter | None
    log_decay: Tensor | None

    def __init__(
        self, heads: int, hidden_size: int, options: DiJiangOptions, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.heads, self.options = heads, options

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        fixed, learned = options.decay == "multi-scale", options.decay in ("learned", "token")
        self.register_parameter("log_rate", nn.Parameter(empty(heads)) if learned else None)
        self.register_parameter("weight", nn.Parameter(empty(heads, hidden_size)) if options.decay == "token" else None)
        self.register_buffer("log_decay", empty(heads) if fixed else None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        start = multiscale_log_decay(self.heads, self.options.shortest_span, self.options.longest_span)
        if self.log_decay is not None:
            self.log_decay.copy_(start)
        if self.log_rate is not None:
            self.log_rate.copy_(start.neg().log())
        if self.weight is not None:
            self.weight.zero_()

    def forward(self, x: Tensor) -> Tensor | None:
        """From the layer's input [B, T, hidden_size]."""
        if self.log_rate is None:
            return self.log_decay
        if self.weight is None:
            return -self.log_rate.exp()
        with torch.autocast(x.device.type, enabled=False):
            # e^3 times the usual rate is as good as forgetting, e^-8 as never; beyond, gradients only do harm
            x = x if x.dtype == torch.float64 else x.float()
            change = F.linear(x, self.weight.to(x.dtype)).clamp(-8.0, 3.0)
            return -(self.log_rate + change).exp()


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


class WideGroupNorm(nn.GroupNorm):
    """GroupNorm in the dtype of its input, where that has more digits than the weights."""

    def forward(self, o: Tensor) -> Tensor:
        return F.group_norm(o, self.num_groups, self.weight.to(o.dtype), self.bias.to(o.dtype), self.eps)


class HeadRMSNorm(nn.Module):
    """RMS norm of each head's channels, with a learned gain for each."""

    def __init__(
        self, heads: int, head_dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(1.0)

    def forward(self, o: Tensor) -> Tensor:
        """[..., heads, head_dim], the same shape."""
        return F.rms_norm(o, o.shape[-1:], eps=1e-6) * self.weight


class AttentionState(NamedTuple):
    """What a layer keeps of earlier tokens: the scan's state, the window's, or both. Its size does not depend on T."""

    linear: ops.LinearAttentionState | None
    window: WindowState | None


class DiJiangAttention(nn.Module):
    """Linear attention between a pretrained layer's projections: what becomes of q, k and v before the output.

    Args:
        hidden_size: size of the layer's input.
        num_heads, num_key_value_heads, head_dim: the pretrained geometry. Decay and the factor b are one a key head,
            so that a group of query heads shares one state; a is one a query head.
        options: see :class:`DiJiangOptions`.
        device, dtype: of the new parameters. Decay and feature map are float32 whatever ``dtype``.

    New tensors are empty until :meth:`reset_parameters` or a checkpoint fills them.

    >>> layer = DiJiangAttention(hidden_size=8, num_heads=2, num_key_value_heads=1, head_dim=4)
    >>> layer.reset_parameters(seed=0)
    >>> x = torch.randn(1, 5, 8); q = torch.randn(1, 5, 2, 4); k = torch.randn(1, 5, 1, 4)
    >>> o, _ = layer.mix(x, q, k, k, torch.arange(5)[None])
    >>> o.shape
    torch.Size([1, 5, 8])
    """

    def __init__(
        self,
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
        if options.feature_map == WINDOW_ONLY:
            return
        channels = num_heads * head_dim
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.feature_map = FeatureMap(
            head_dim,
            options.feature_map,
            num_frequencies=options.num_frequencies,
            num_heads=num_key_value_heads,
            temperature=options.temperature,
            device=device,
        )
        if self.feature_map.num_features > ops.attention.MAX_FEATURES:
            raise ValueError(
                f"feature map {options.feature_map!r} with num_frequencies={self.feature_map.num_frequencies} has "
                f"{self.feature_map.num_features} features; the kernels take up to {ops.attention.MAX_FEATURES}"
            )
        self.decay = Decay(num_key_value_heads, hidden_size, options, device)
        if options.position_table:
            self.query_factors = PositionFactors(num_heads, options.position_table, **placed)
            self.key_factors = PositionFactors(num_key_value_heads, options.position_table, **placed)
        if options.norm == "group":
            groups = head_dim if options.norm_groups == "head_dim" else num_heads
            self.norm: nn.Module = WideGroupNorm(groups, channels, eps=1e-5, **placed)
        elif options.norm == "rms":
            self.norm = HeadRMSNorm(num_heads, head_dim, **placed)
        if options.gate != "none":
            self.gate_proj = nn.Linear(hidden_size, channels, bias=options.gate == "open", **placed)
        if options.window:
            self.mix_proj = nn.Linear(hidden_size, num_heads, **placed)

    @property
    def state_elements(self) -> int:
        """Numbers that the state of one sequence has, however long it is."""
        count = 0
        if self.options.feature_map != WINDOW_ONLY:
            kept = self.head_dim + (1 if self.options.norm == "denominator" else 0)
            count += self.num_key_value_heads * self.feature_map.num_features * kept
        return count + 2 * (self.options.window + self.options.sinks) * self.num_key_value_heads * self.head_dim

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Draw what conversion adds, the frequencies and the gate, from a generator of its own."""
        if self.options.feature_map == WINDOW_ONLY:
            return
        generator = torch.Generator("cpu").manual_seed(seed)
        self.feature_map.reset_parameters(generator)
        self.decay.reset_parameters()
        if self.options.norm in ("group", "rms"):
            self.norm.reset_parameters()  # type: ignore[operator]  # both have one
        if self.options.position_table:
            self.query_factors.reset_parameters()
            self.key_factors.reset_parameters()
        if self.options.gate != "none":
            fan_out, fan_in = self.gate_proj.weight.shape
            bound = 2**-2.5 * math.sqrt(6 / (fan_in + fan_out))
            draw = torch.empty(fan_out, fan_in, device="cpu").uniform_(-bound, bound, generator=generator)
            self.gate_proj.weight.copy_(draw)
            if self.gate_proj.bias is not None:
                self.gate_proj.bias.fill_(1.2784645)  # SiLU(1.2784645) = 1
        if self.options.window:
            self.mix_proj.weight.zero_()
            self.mix_proj.bias.fill_(MIX_BIAS)

    def mix(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        *,
        mask: Tensor | None = None,
        sink_q: Tensor | None = None,
        state: AttentionState | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState | None]:
        """From projected (and rotated) heads to what the output projection takes.

        Args:
            x: the layer's input [B, T, hidden_size], for the gate and the decay.
            q, k, v: [B, T, H, K], [B, T, Hk, K], [B, T, Hk, K]; q is not scaled.
            positions: absolute position of every token among its sequence's own, integer [B, T] or [1, T].
            mask: bool [B, T]; a token that is False leaves no trace.
            sink_q: queries rotated for the sinks, see :func:`freqrank.attention.window.window_attention`.
            state: what earlier tokens left. A single token is decoded into it in place, where no gradient is asked for.
            output_state: return the state after the last token.
            cu_seqlens: int [N + 1], for several sequences in one row (B == 1).

        Returns:
            [B, T, H K], and the :class:`AttentionState` or None.
        """
        linear, window = (None, None) if state is None else state
        o = None
        if self.options.window:
            if current_group() is not None:
                raise ValueError(
                    "a layer with a window cannot run inside of sequence_parallel: its first tokens would miss the "
                    "last ones of the rank before; use layers without a window"
                )
            o, window = window_attention(
                q,
                k,
                v,
                window=self.options.window,
                sinks=self.options.sinks,
                mask=mask,
                sink_q=sink_q,
                state=window,
                output_state=output_state,
                cu_seqlens=cu_seqlens,
            )
        if self.options.feature_map != WINDOW_ONLY:
            far, linear = self._linear(x, q, k, v, positions, mask, linear, output_state, cu_seqlens)
            o = far if o is None else torch.lerp(o, far, torch.sigmoid(self.mix_proj(x))[..., None].to(o.dtype))
        assert o is not None
        kept = AttentionState(linear, window) if output_state or state is not None else None
        return o.flatten(2), kept

    def _linear(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        state: ops.LinearAttentionState | None,
        output_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, ops.LinearAttentionState | None]:
        phi, options, dim = self.feature_map, self.options, self.head_dim
        dtype = v.dtype
        normalize = options.norm == "denominator"
        if options.position_table:
            factors = self.key_factors(positions)[..., None]
            v = factors * v
            if normalize:  # b belongs to phi(k), so to the denominator as well: as one more channel of the values
                v, normalize = torch.cat([v, factors.to(v.dtype).expand(*v.shape[:-1], 1)], -1), False
        projection, weights = phi(torch.float64 if q.dtype == torch.float64 else torch.float32)
        q = phi.augment(q, bounded_by=projection if options.norm != "none" else None)
        k, log_decay = phi.augment(k), self.decay(x)
        v = v.to(q.dtype)
        shared: dict[str, Any] = {
            "feature": phi.kind.feature,
            "weights": weights,
            "normalize": normalize,
        }
        one_token = q.shape[1] == 1 and cu_seqlens is None and current_group() is None
        if state is not None and one_token and not torch.is_grad_enabled():
            o = ops.feature_map_attention_step(
                q[:, 0],
                k[:, 0],
                v[:, 0],
                state,
                projection,
                log_decay=log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, 0],
                mask=None if mask is None else mask[:, 0],
                **shared,
            )[:, None]
        else:
            o, state = scan_piece(
                q,
                k,
                v,
                projection,
                log_decay=log_decay,
                mask=mask,
                initial_state=state,
                output_final_state=output_state,
                cu_seqlens=cu_seqlens,
                **shared,
            )
        if o.shape[-1] > dim:
            o = o[..., :dim] / (o[..., dim:] + 1e-6)
        if options.position_table:
            o = self.query_factors(positions)[..., None] * o
        if options.norm == "group":
            o = self.norm(o.flatten(2).flatten(0, 1)).view(o.shape)
        elif options.norm == "rms":
            o = self.norm(o)
        o = o.to(dtype)
        if options.gate != "none":
            o = F.silu(self.gate_proj(x)).view(o.shape) * o
        return o.to(dtype), state

    def extra_repr(self) -> str:
        heads = f"heads={self.num_heads}, key_value_heads={self.num_key_value_heads}, head_dim={self.head_dim}"
        defaults = DiJiangOptions()
        changed = {n: v for n, v in self.options.to_dict().items() if v != getattr(defaults, n)}
        return ", ".join([heads, *(f"{name}={value!r}" for name, value in changed.items())])
