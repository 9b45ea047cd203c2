"""A sequence over several ranks: against one process, and every pair of tokens in float64; errors on all ranks."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import freqrank
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from freqrank import LinearAttentionState
from freqrank.attention import (
    feature_map_attention_parallel,
    linear_attention_parallel,
    sequence_parallel,
)
from freqrank.attention.parallel import current_group, next_token_labels, piece_of, positions_of, scan_piece
from ranks import run_on_ranks

BATCH, K, V = 2, 5, 7


@dataclass(frozen=True)
class Case:
    """``decay``: None, or the heads of log_decay, "H" or "Hk", for each of the tokens with a "T" before."""

    lengths: tuple[int, ...]
    decay: str | None = None
    heads: int = 2
    key_heads: int = 2
    normalize: bool = False
    masked: bool = False
    initial: str | None = None  # "kv" or "kv z"
    feature: str | None = None
    weighted: bool = False
    dtype: torch.dtype = torch.float64
    forgets: bool = False  # one log decay is -inf

    @property
    def features(self) -> int:
        return K if self.feature is None else {"softmax": 6, "exp": 6, "softmax_pm": 12}[self.feature]

    @property
    def state_heads(self) -> int:
        return self.heads if self.decay in ("H", "TH") else self.key_heads


CASES = [
    Case((37, 64)),
    Case((0, 5), "Hk"),
    Case((65, 0), "TH", masked=True, initial="kv"),
    Case((70, 61), "H", heads=4, normalize=True, initial="kv z"),
    Case((70, 61), "THk", heads=4, masked=True, initial="kv z"),
    Case((3, 130), "Hk", heads=6, normalize=True, masked=True),
    Case((20, 20), "TH", normalize=True, forgets=True),
    Case((20, 20), "H", masked=True, forgets=True),
    Case((33, 40), "Hk", heads=4, feature="softmax", weighted=True, masked=True),
    Case((33, 40), "H", heads=4, feature="softmax_pm", normalize=True, initial="kv z"),
    Case((9, 70), None, feature="exp", weighted=True, initial="kv"),
    Case((0, 0), "Hk", initial="kv"),
    Case((300, 211), "THk", heads=4, normalize=True, dtype=torch.float32),
    Case((300, 211), "Hk", heads=4, initial="kv", feature="softmax", dtype=torch.float32),
    Case((100, 120), "Hk", heads=4, dtype=torch.bfloat16),
    Case((40, 0, 71), "Hk", masked=True, initial="kv"),
    Case((1, 64, 65), "TH", heads=4, normalize=True, initial="kv z"),
    Case((0, 0, 9), "H", normalize=True),
    Case((50, 51, 52), "THk", feature="softmax", weighted=True, masked=True),
    Case((200, 100, 150), None, heads=4, normalize=True, dtype=torch.float32),
]
OF_RANKS = {size: [case for case in CASES if len(case.lengths) == size] for size in (2, 3)}


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """Of the whole sequence: the arguments, the directions of the outputs, and the mask."""
    time = sum(case.lengths)
    generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = {
        "q": normal(BATCH, time, case.heads, K),
        "k": normal(BATCH, time, case.key_heads, K),
        "v": normal(BATCH, time, case.key_heads, V),
    }
    if case.normalize and case.feature is None:  # else denominators come close to 0
        found["q"], found["k"] = found["q"].abs(), found["k"].abs()
    if case.decay is not None:
        shape = (BATCH, time) if case.decay.startswith("T") else ()
        found["log_decay"] = normal(*shape, case.state_heads).abs() * -0.1
        if case.forgets:
            found["log_decay"].view(-1)[found["log_decay"].numel() // 2] = -torch.inf
    if case.feature is not None:
        found["projection"] = normal(case.key_heads, K, 6) * 0.5
        if case.weighted:
            found["weights"] = normal(case.features).abs() + 0.5
    if case.initial is not None:
        found["kv"] = normal(BATCH, case.state_heads, case.features, V)
        if case.initial == "kv z":
            found["z"] = normal(BATCH, case.state_heads, case.features).abs()
    found["grad o"] = normal(BATCH, time, case.heads, V)
    found["grad kv"] = normal(BATCH, case.state_heads, case.features, V)
    found["grad z"] = normal(BATCH, case.state_heads, case.features)
    for name in ("q", "k", "v"):
        found[name] = found[name].to(case.dtype)
    real = torch.float64 if case.dtype == torch.float64 else torch.float32
    found = {name: x if name in ("q", "k", "v") else x.to(real) for name, x in found.items()}
    if case.masked:
        found["mask"] = torch.rand(BATCH, time, generator=generator) < 0.7
        found["mask"][0, : case.lengths[0]] = False  # a piece of one sequence in which no token counts
    return found


OF_TOKENS = ("q", "k", "v", "mask", "grad o")


def piece(case: Case, name: str, x: torch.Tensor, rank: int) -> torch.Tensor:
    if name in OF_TOKENS or (name == "log_decay" and case.decay.startswith("T")):
        start = sum(case.lengths[:rank])
        return x[:, start : start + case.lengths[rank]]
    return x


def run(case: Case, given: dict[str, torch.Tensor], op, times: float, **more) -> dict[str, torch.Tensor]:
    """Outputs and gradients of sum(grad o * o) + times * sum(grad kv * kv + grad z * z) of the final state."""
    leaves = {
        name: x.detach().clone().requires_grad_()
        for name, x in given.items()
        if name != "mask" and not name.startswith("grad")
    }
    options = {name: leaves.get(name) for name in ("log_decay",)}
    options |= {"mask": given.get("mask"), "normalize": case.normalize, "output_final_state": True}
    if "kv" in leaves:
        options["initial_state"] = LinearAttentionState(leaves["kv"], leaves.get("z"))
    arguments = [leaves[name] for name in ("q", "k", "v", "projection") if name in leaves]
    if case.feature is not None:
        options |= {"feature": case.feature, "weights": leaves.get("weights")}
    o, state = op(*arguments, **options, **more)
    loss = (o * given["grad o"]).sum() + times * (state.kv * given["grad kv"]).sum()
    if state.z is not None:
        loss = loss + times * (state.z * given["grad z"]).sum()
    loss.backward()
    found = {"o": o, "final kv": state.kv} | ({} if state.z is None else {"final z": state.z})
    found |= {f"d{name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
    return {name: x.detach() for name, x in found.items()}


def on_rank(case: Case, rank: int) -> dict[str, torch.Tensor]:
    given = {name: piece(case, name, x, rank) for name, x in inputs(case).items()}
    op = linear_attention_parallel if case.feature is None else feature_map_attention_parallel
    return run(case, given, op, times=rank + 1.0)


def every_pair(q, k, v, projection=None, *, log_decay, mask, normalize, output_final_state, initial_state=None,
               feature=None, weights=None):  # fmt: skip
    """The definition in float64: a score for each pair of tokens."""
    time, heads, key_heads = q.shape[1], q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5
    if feature is not None:
        scale = 1.0

        def phi(x: torch.Tensor) -> torch.Tensor:
            p = torch.einsum("bthrk,hkm->bthrm", x.unflatten(2, (key_heads, -1)), projection).flatten(2, 3)
            if feature == "softmax_pm":
                p = torch.cat([p, -p], -1)
            p = p.exp() if feature == "exp" else p.softmax(-1)
            return p if weights is None else p * weights

        q, k = phi(q), phi(k)
    g = torch.zeros(key_heads, dtype=torch.float64) if log_decay is None else log_decay
    state_heads = g.shape[-1]
    g = g.expand(q.shape[0], time, state_heads).clamp(min=-800)
    counts = torch.ones(q.shape[:2], dtype=torch.bool) if mask is None else mask
    total = torch.where(counts[..., None], g, 0).cumsum(1).repeat_interleave(heads // state_heads, 2)  # [B, T, H]
    end = total[:, -1] if time else torch.zeros(q.shape[0], heads, dtype=torch.float64)
    k, v = (torch.where(counts[..., None, None], x, 0).repeat_interleave(heads // key_heads, 2) for x in (k, v))
    later = torch.ones(time, time, dtype=torch.bool).triu(1)
    between = (total[:, :, None] - total[:, None]).masked_fill(later[:, :, None], -torch.inf).exp()
    scores = torch.einsum("bihk,bjhk->bijh", q, k) * between * scale
    start_kv = torch.zeros(q.shape[0], heads, q.shape[3], v.shape[3], dtype=torch.float64)
    start_z = start_kv[..., 0]
    with_z = normalize
    if initial_state is not None:
        start_kv = initial_state.kv.repeat_interleave(heads // state_heads, 1)
        if initial_state.z is not None:
            start_z, with_z = initial_state.z.repeat_interleave(heads // state_heads, 1), True
    faded = q * total.exp()[..., None] * scale
    o = torch.einsum("bijh,bjhv->bihv", scores, v) + torch.einsum("bihk,bhkv->bihv", faded, start_kv)
    if normalize:
        o = o / (scores.sum(2) + torch.einsum("bihk,bhk->bih", faded, start_z) + 1e-6)[..., None]
    o = torch.where(counts[..., None, None], o, 0)
    weighted = k * (end[:, None] - total).exp()[..., None]
    kv = torch.einsum("bthk,bthv->bhkv", weighted, v) + start_kv * end.exp()[..., None, None]
    z = weighted.sum(1) + start_z * end.exp()[..., None]
    first = slice(None, None, heads // state_heads)  # query heads of one state have the same
    return o, LinearAttentionState(kv[:, first], z[:, first] if with_z else None)


# --- what runs on every rank ------------------------------------------------------------------------------------------


def failure(call) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failures(rank: int) -> dict[str, str]:
    q = torch.zeros(1, 3, 2, 4)
    ones, wide = torch.ones(4, 4), torch.zeros(1, 3, 2, 5)
    state = LinearAttentionState(torch.zeros(1, 2, 4, 4))

    def attend(*tensors: torch.Tensor, **options) -> str:
        return failure(lambda: linear_attention_parallel(*tensors, **options))

    second = rank == 1
    found = {
        "shape": attend(q, wide if second else q, q),
        "type": attend(q, q, None if second else q),
        "decay": attend(q, q, q, log_decay=torch.tensor([0.0, -0.1 if second else 0.1])),
        "both": attend(q, wide, q),
        "heads": attend(*([q[:, :, :1] if second else q] * 3)),
        "batch": attend(*([q.expand(2, -1, -1, -1) if second else q] * 3)),
        "dtype": attend(*([q.double() if second else q] * 3)),
        "decay of tokens": attend(q, q, q, log_decay=-torch.ones(1, 3, 2) if second else -torch.ones(2)),
        "eps": attend(q, q, q, normalize=True, eps=1e-6 if second else 1e-5),
        "state": attend(q, q, q, initial_state=state if second else LinearAttentionState(state.kv[..., :3])),
        "feature": failure(
            lambda: feature_map_attention_parallel(q, q, q, ones, feature="exp" if second else "softmax")
        ),
        "op": attend(q, q, q) if second else failure(lambda: feature_map_attention_parallel(q, q, q, ones)),
    }
    with torch.set_grad_enabled(not second):
        found["gradients"] = attend(q, q, q)
    found["none"] = attend(q, q, q)
    group = dist.new_group([0])
    found["outside"] = attend(q, q, q, group=group)
    return found


FIRST = CASES[0]
SECOND = Case((9, 8), "Hk")


def alone_needs_gradient(rank: int) -> dict[str, torch.Tensor]:
    """Only what one rank holds requires a gradient: all take part in it all the same."""
    q, k, v = (piece(FIRST, name, inputs(FIRST)[name], rank).clone() for name in ("q", "k", "v"))
    q.requires_grad_(rank == 1)
    k.requires_grad_(rank == 0)
    o, _ = linear_attention_parallel(q, k, v)
    o.square().sum().backward()
    return {name: x.grad for name, x in (("q", q), ("k", k)) if x.requires_grad}


def second_order(given: dict[str, torch.Tensor], op) -> list[torch.Tensor]:
    leaves = [given[name].clone().requires_grad_() for name in ("q", "k", "v", "log_decay")]
    o, _ = op(*leaves[:3], log_decay=leaves[3])
    grads = torch.autograd.grad(o.pow(3).sum(), leaves[:3], create_graph=True)
    sum(g.square().sum() for g in grads).backward()
    return [x.grad for x in leaves]


def with_nan() -> dict[str, torch.Tensor]:
    given = inputs(FIRST)
    given["k"][0, 3, 1] = torch.nan
    return given


def linear_model(layers=None):
    """All of its layers are linear; new tensors are away from their neutral first values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    freqrank.linearize(model, layers=layers, decay="token", position_table=32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def text() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 31, (2, 45), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 20:24] = False  # across the cut
    mask[1, 40:] = False
    return ids, mask


def train(checkpointing: bool) -> dict[str, torch.Tensor | float]:
    """Of one rank: logits of its piece, its loss, gradients."""
    model, (ids, mask) = linear_model(), text()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with sequence_parallel():
        ids, mask = piece_of(ids), piece_of(mask)
        logits = model(ids, attention_mask=mask.long(), position_ids=positions_of(ids, mask), use_cache=False).logits
        labels, count = next_token_labels(ids, mask)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "loss": loss.item(), "count": count, **grads}


def uneven(rank: int) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Pieces of 4, 0 and 3 tokens."""
    ids, mask = (x[:, 18:25].tensor_split([4, 4], 1)[rank] for x in text())
    return positions_of(ids, mask), *next_token_labels(ids, mask), next_token_labels(ids)[0]


def of_helpers(rank: int) -> dict[str, str]:
    q = torch.zeros(1, 3, 2, 4)
    ids = torch.zeros(1 + rank, 3, dtype=torch.long)
    offsets = torch.tensor([0, 3])
    with sequence_parallel():
        packed = failure(lambda: scan_piece(q, q, q, torch.ones(4, 4), cu_seqlens=offsets))
        model, places = linear_model(), torch.arange(3)[None]
        one = torch.ones(1, 3, dtype=torch.long)
        positions = failure(lambda: model(one, use_cache=False))
        from transformers import DynamicCache

        cache = failure(lambda: model(one, position_ids=places, past_key_values=DynamicCache()))
        partial = linear_model(layers=[0])
        softmax = failure(lambda: partial(one, position_ids=places, use_cache=False))
    return {
        "packed": packed,
        "positions": positions,
        "cache": cache,
        "softmax": softmax,
        "ids": failure(lambda: next_token_labels(ids.int() if rank else ids)),
        "rows": failure(lambda: next_token_labels(ids)),
        "mask": failure(lambda: next_token_labels(ids[:1], torch.ones(1, 3 - rank, dtype=torch.bool))),
    }


def work(rank: int, size: int) -> dict[str, object]:
    found: dict[str, object] = {"cases": [on_rank(case, rank) for case in OF_RANKS[size]]}
    if size == 3:
        found["uneven"] = uneven(rank)
    if size == 2:
        found |= {"failures": failures(rank) | of_helpers(rank), "alone": alone_needs_gradient(rank)}
        found |= {"model": train(checkpointing=False), "again": train(checkpointing=True)}
        mine = {name: piece(SECOND, name, x, rank) for name, x in inputs(SECOND).items()}
        found["second"] = second_order(mine, linear_attention_parallel)
        mine = [piece(FIRST, name, with_nan()[name], rank) for name in ("q", "k", "v")]
        found["nan"] = linear_attention_parallel(*mine)[0]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict]]:
    """What every rank of so many found."""
    return functools.cache(lambda size: run_on_ranks(work, size, tmp_path_factory.mktemp("ranks")))


# --- tests ------------------------------------------------------------------------------------------------------------


def joined(case: Case, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """A tensor of the whole sequence, or the sum of what pieces contribute to a parameter's gradient."""
    name = name.removeprefix("d")
    if name in ("o", *OF_TOKENS) or (name == "log_decay" and case.decay.startswith("T")):
        return torch.cat(parts, 1)
    if name.startswith("final") or name in ("kv", "z"):
        return parts[0]
    return sum(parts)


def assert_close(case: Case, name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    limits = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 3e-5), torch.bfloat16: (3.3e-3, 2e-2)}
    limit = limits[case.dtype][name == "dlog_decay"]
    assert got.shape == expected.shape, name
    error, size = (got.double() - expected.double()).norm(), expected.double().norm()
    assert error <= limit * size, f"{name}: {error / size:.2e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pieces_are_those_of_the_whole(case, found):
    parts = [rank["cases"][OF_RANKS[len(case.lengths)].index(case)] for rank in found(len(case.lengths))]
    given = inputs(case)
    times = sum(rank + 1.0 for rank in range(len(parts)))
    op = freqrank.linear_attention if case.feature is None else freqrank.feature_map_attention
    one = run(case, given, op, times)
    exact = run(case, {name: x if name == "mask" else x.double() for name, x in given.items()}, every_pair, times)
    assert parts[0].keys() == one.keys() == exact.keys()
    for name in one:
        got = joined(case, name, [part[name] for part in parts])
        assert got.dtype == one[name].dtype, name
        assert_close(case, name, got, exact[name])
        if case.dtype == torch.float64:
            assert_close(case, name, got, one[name])
        for part in parts[1:]:
            if name.startswith("final"):
                assert torch.equal(part[name], parts[0][name]), name
            if name in ("dkv", "dz"):
                assert not part[name].any(), name


def test_gradients_that_one_rank_alone_asks_for(found):
    q, k, v = (inputs(FIRST)[name] for name in ("q", "k", "v"))
    q.requires_grad_()
    k.requires_grad_()
    o, _ = freqrank.linear_attention(q, k, v)
    o.square().sum().backward()
    first, second = (rank["alone"] for rank in found(2))
    length = FIRST.lengths[0]
    assert first.keys() == {"k"}
    assert second.keys() == {"q"}
    torch.testing.assert_close(first["k"], k.grad[:, :length], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second["q"], q.grad[:, length:], rtol=1e-12, atol=1e-12)


def test_second_derivatives(found):
    expected = second_order(inputs(SECOND), freqrank.linear_attention)
    parts = [rank["second"] for rank in found(2)]
    for i, name in enumerate(("q", "k", "v", "log_decay")):
        got = joined(SECOND, name, [part[i] for part in parts])
        torch.testing.assert_close(got, expected[i], rtol=1e-11, atol=1e-11)


def test_nan_stays_in_its_sequence_and_head(found):
    got = torch.cat([rank["nan"] for rank in found(2)], 1)
    given = inputs(FIRST)
    expected, _ = freqrank.linear_attention(given["q"], given["k"], given["v"])
    bad = torch.zeros(BATCH, FIRST.heads, dtype=torch.bool)
    bad[0, 1] = True
    assert got[0, 3:, 1].isnan().all()
    got, expected = got.transpose(1, 2)[~bad], expected.transpose(1, 2)[~bad]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


FAILURES = {
    "shape": r"ValueError: k must be \[B,T,Hk,K\] .* \(on rank 1 of 2\)",
    "type": r"TypeError: v must be a torch.Tensor; got NoneType \(on rank 1 of 2\)",
    "decay": r"ValueError: log_decay must not be positive; .* 0.1 \(on rank 0 of 2\)",
    "both": r"ValueError: k must be .* \(on rank 0 of 2\)",
    "heads": r"ValueError: H, the heads of q, must be the same .*; got 2 on rank 0 and 1 on rank 1",
    "batch": r"ValueError: B must be the same .*; got 1 on rank 0 and 2 on rank 1",
    "dtype": r"ValueError: the dtype of q must be .*; got torch.float32 on rank 0 and torch.float64 on rank 1",
    "decay of tokens": r"ValueError: the shape of log_decay must .*; got '\[2\]' on rank 0 and '\[B,T,2\]' on rank 1",
    "eps": r"ValueError: eps must be the same .*; got 1e-05 on rank 0 and 1e-06 on rank 1",
    "state": r"ValueError: initial_state.kv must be .* \(on rank 0 of 2\)",
    "feature": r"ValueError: feature must be the same .*; got 'softmax' on rank 0 and 'exp' on rank 1",
    "op": r"ValueError: the op must be the same .*; got 'feature_map_attention_parallel' on rank 0 and 'linear_",
    "gradients": r"ValueError: whether gradients are recorded must be the same .*; got True on rank 0 and False on",
    "none": r"nothing",
    "packed": r"ValueError: cu_seqlens must be None inside of sequence_parallel",
    "positions": r"ValueError: .*give position_ids, from positions_of",
    "cache": r"ValueError: .*call it without one",
    "softmax": r"ValueError: .*convert all layers",
    "ids": r"TypeError: input_ids must have dtype int64; got torch.int32 \(on rank 1 of 2\)",
    "rows": r"ValueError: B must be the same on all ranks of the group; got 1 on rank 0 and 2 on rank 1",
    "mask": r"ValueError: mask must be \[B, T\] = \[1, 3\]; got shape \(1, 2\) \(on rank 1 of 2\)",
}


@pytest.mark.parametrize("what", FAILURES)
def test_all_ranks_fail_alike(what, found):
    first, second = (rank["failures"][what] for rank in found(2))
    assert first == second
    assert re.match(FAILURES[what], first), first


def test_a_rank_outside_of_the_group(found):
    first, second = (rank["failures"]["outside"] for rank in found(2))
    assert first == "nothing"
    assert second == "ValueError: group must hold this process; got one without global rank 1"


@pytest.mark.parametrize("run", ["model", "again"])
def test_a_model_over_two_ranks(run, found):
    model, (ids, mask) = linear_model(), text()
    logits = model(ids, attention_mask=mask.long(), use_cache=False).logits
    targets = ids.masked_fill(~mask, -100)[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    loss.backward()
    parts = [rank[run] for rank in found(2)]
    assert [part["logits"].shape[1] for part in parts] == [23, 22]
    # norms of the model are float32 whatever its dtype
    torch.testing.assert_close(torch.cat([part["logits"] for part in parts], 1)[mask], logits[mask], rtol=0, atol=1e-6)
    assert [part["count"] for part in parts] == [int((targets != -100).sum())] * 2
    assert sum(part["loss"] for part in parts) == pytest.approx(loss.item(), rel=1e-7)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("decay.weight" in name for name in grads)
    for name, grad in grads.items():
        got = sum(part[name] for part in parts)
        assert (got - grad).norm() <= 1e-6 * grad.norm(), name
        assert not any(torch.allclose(part[name], grad, rtol=1e-3) for part in parts), name  # both have a part in it


def test_labels_over_uneven_pieces(found):
    positions, labels, counts, unmasked = zip(*(rank["uneven"] for rank in found(3)), strict=True)
    ids, mask = (x[:, 18:25] for x in text())
    nothing = torch.full((2, 1), -100)
    assert torch.equal(torch.cat(positions, 1), (mask.long().cumsum(1) - 1).clamp(min=0))
    assert torch.equal(torch.cat(labels, 1), torch.cat([ids.masked_fill(~mask, -100)[:, 1:], nothing], 1))
    assert torch.equal(torch.cat(unmasked, 1), torch.cat([ids[:, 1:], nothing], 1))
    assert counts == (int(mask[:, 1:].sum()),) * 3


def test_a_piece_outside_of_sequence_parallel():
    q = torch.randn(1, 6, 2, 4)
    offsets = torch.tensor([0, 2, 6])
    assert current_group() is None
    got, _ = scan_piece(q, q, q, torch.eye(4), cu_seqlens=offsets)
    expected, _ = freqrank.feature_map_attention(q, q, q, torch.eye(4), cu_seqlens=offsets)
    assert torch.equal(got, expected)


def test_without_a_process_group():
    q = torch.zeros(1, 3, 2, 4)
    with pytest.raises(ValueError, match="init_process_group first; got None without one"):
        linear_attention_parallel(q, q, q)
    with pytest.raises(ValueError, match="init_process_group first; got None without one"):
        feature_map_attention_parallel(q, q, q, torch.ones(4, 4))
    with pytest.raises(ValueError, match="init_process_group first; got None without one"), sequence_parallel():
        pass
    assert current_group() is None


def test_import_stays_light():
    code = "import sys, freqrank.attention as a; a.linear_attention_parallel; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
