"""Linear attention's CUDA kernels under the host executor, against the quadratic form in float64: every branch."""

import freqrank_simt as simt
import numpy as np
import pytest
import torch
from freqrank.ops import reference

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = HALF | {"float32": torch.float32, "float64": torch.float64}
TOLERANCE = {"bfloat16": 3.3e-3, "float16": 3.3e-3, "float32": 1e-5, "float64": 1e-12}
DECAY_TOLERANCE = {"bfloat16": 2e-2, "float16": 2e-2, "float32": 3e-5, "float64": 1e-11}
MANY_SMS = {"sms": 132}  # a split wherever it helps
ONE_SM = {"sms": 1, "shared_bytes_per_sm": 0}  # a block at a time: never split


def array(x):
    """A tensor as the numpy array that shares its memory; bfloat16 as its bits."""
    if x is None:
        return None
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def real(dtype):
    return torch.float64 if dtype == "float64" else torch.float32


def error(actual, expected):
    """Relative RMS error."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference, size = (actual.double() - expected.double()).norm().item(), expected.double().norm().item()
    return difference / size if size > 0 else difference


class Case:
    """The tensors of one call, filled at random."""

    without_gradient = ()

    def __init__(
        self, dtype="bfloat16", batch=1, time=70, heads=1, key_heads=None, key_dim=64, value_dim=64, *, decay=None,
        strength=0.3, normalize=False, mask=False, lengths=None, state=False, scale=None, strided=False, seed=0,
    ):  # fmt: skip
        torch.manual_seed(seed)
        self.name, self.dtype, self.normalize = dtype, DTYPES[dtype], normalize
        key_heads = key_heads or heads
        self.scale = key_dim**-0.5 if scale is None else scale
        self.eps = 1e-6

        def make(*shape):
            x = torch.randn(*shape)
            if strided:  # heads before time, and rows that do not begin at multiples of 16 bytes
                wide = torch.randn(shape[0], shape[2], shape[1], shape[3] + 1).to(self.dtype)
                return wide[..., 1:].transpose(1, 2)
            return x.to(self.dtype)

        self.q, self.k, self.v = (
            make(batch, time, heads, key_dim), make(batch, time, key_heads, key_dim),
            make(batch, time, key_heads, value_dim),
        )  # fmt: skip
        if normalize:
            self.q, self.k = self.q.abs(), self.k.abs()
        shape = {
            None: None, "H": (heads,), "Hk": (key_heads,), "BTH": (batch, time, heads), "BTHk": (batch, time, key_heads)
        }[decay]  # fmt: skip
        self.log_decay = None if shape is None else -strength * torch.rand(shape, dtype=real(dtype))
        self.mask = torch.rand(batch, time) > 0.3 if mask else None
        self.cu_seqlens = None if lengths is None else torch.tensor([0, *np.cumsum(lengths)])
        self.sequences = batch if lengths is None else len(lengths)
        self.state_heads = key_heads if shape is None else shape[-1]
        self.initial = None
        if state:
            shape = (self.sequences, self.state_heads, key_dim)
            z = torch.rand(shape, dtype=real(dtype)) if normalize or state == "z" else None
            self.initial = (torch.randn(*shape, value_dim, dtype=real(dtype)), z)

    @property
    def with_z(self):
        return self.normalize or (self.initial is not None and self.initial[1] is not None)

    def leaves(self):
        kv, z = self.initial or (None, None)
        return {"q": self.q, "k": self.k, "v": self.v, "log_decay": self.log_decay, "initial_kv": kv, "initial_z": z}

    def arrays(self):
        out = {name: array(x) for name, x in self.leaves().items()}
        out |= {"mask": array(self.mask), "cu_seqlens": array(self.cu_seqlens)}
        return out

    def options(self, limits):
        return limits | {"half": self.name, "normalize": self.normalize, "scale": self.scale, "eps": self.eps}

    def forward(self, limits=ONE_SM, seed=0, *, for_backward=True):
        shape = (*self.q.shape[:3], self.v.shape[3])
        state = self.state_shape()
        with_rest = for_backward and self.normalize and self.name in HALF
        outputs = {
            "o": torch.empty(shape, dtype=self.dtype), "final_kv": torch.empty(*state, shape[3], dtype=real(self.name)),
            "final_z": torch.empty(state, dtype=real(self.name)) if self.with_z else None,
            "denominator": torch.empty(shape[0], shape[2], shape[1], dtype=real(self.name)) if self.normalize else None,
            "rest": torch.empty(shape, dtype=self.dtype) if with_rest else None,
        }  # fmt: skip
        return outputs, *self.run(self.arrays(), outputs, limits, seed)

    def state_shape(self):
        return (self.sequences, self.state_heads, self.q.shape[3])

    def run(self, arrays, outputs, limits, seed):
        executor = simt.Executor(seed, limits.get("shared_bytes", 227 * 1024))
        given = {name: array(x) for name, x in outputs.items()}
        for x in given.values():
            if x is not None:
                executor.expect_written(x)
        plan = simt.linear_attention(executor, arrays | given, self.options(limits))
        executor.check_written()
        return plan, executor

    def backward(self, grads, outputs, limits=ONE_SM, seed=0):
        arrays = self.arrays() | {name: array(x) for name, x in grads.items()}
        if self.normalize:
            arrays |= {name: array(outputs[name]) for name in ("o", "denominator", "rest")}
        results = {
            "d" + name: None if x is None or name in self.without_gradient else torch.empty(x.shape, dtype=x.dtype)
            for name, x in self.leaves().items()
        }
        return results, *self.run(arrays, results, limits, seed)

    def scanned(self, leaves):
        """What the scan sees as q and k."""
        return leaves["q"], leaves["k"]

    def expected(self, grads=None):
        """(o, kv, z) and with grads the gradients, by the quadratic form in float64."""
        leaves = {n: None if x is None else x.detach().double().requires_grad_() for n, x in self.leaves().items()}
        state = None if self.initial is None else (leaves["initial_kv"], leaves["initial_z"])
        q, k = self.scanned(leaves)
        results = reference.linear_attention(
            q, k, leaves["v"], log_decay=leaves["log_decay"], scale=self.scale,
            normalize=self.normalize, eps=self.eps, mask=self.mask, initial_state=state, cu_seqlens=self.cu_seqlens,
        )  # fmt: skip
        if grads is None:
            return results
        pairs = [
            (x, grads[n].double())
            for n, x in zip(("grad_o", "grad_kv", "grad_z"), results, strict=True)
            if n in grads and x.requires_grad
        ]
        wanted = {n: x for n, x in leaves.items() if x is not None and n not in self.without_gradient}
        if not pairs:
            return results, {"d" + n: torch.zeros_like(x) for n, x in wanted.items()}
        found = torch.autograd.grad(
            [x for x, _ in pairs], list(wanted.values()), [g for _, g in pairs], allow_unused=True
        )
        return results, {
            "d" + n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(wanted.items(), found, strict=True)
        }


def check(case, limits=ONE_SM, *, backward=True, final=True, seed=0, tolerance=1.0):
    """One forward and backward pass against the quadratic form; what came out, and the plans."""
    outputs, plan, executor = case.forward(limits, seed)
    expected = case.expected()
    for name, e in zip(("o", "final_kv", "final_z"), expected, strict=True):
        if outputs[name] is not None:
            assert error(outputs[name], e) <= tolerance * TOLERANCE[case.name], (name, error(outputs[name], e))
    if not backward:
        return outputs, plan, executor
    grads = {"grad_o": torch.randn(outputs["o"].shape).to(case.dtype)}
    if final:
        grads["grad_kv"] = torch.randn(outputs["final_kv"].shape, dtype=real(case.name))
        if case.with_z:
            grads["grad_z"] = torch.randn(outputs["final_z"].shape, dtype=real(case.name))
    results, plan, executor = case.backward(grads, outputs, limits, seed)
    _, wanted = case.expected(grads)
    for name, e in wanted.items():
        allowed = tolerance * (DECAY_TOLERANCE if name == "dlog_decay" else TOLERANCE)[case.name]
        assert error(results[name], e) <= allowed, (name, error(results[name], e))
    return outputs | results, plan, executor


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_shape(dtype, dim):
    check(Case(dtype, 1, 150, 2, key_dim=dim, value_dim=dim, decay="H"))


ODD = {"key_dim": 36, "value_dim": 20}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [None, "H", "Hk", "BTH", "BTHk"])
@pytest.mark.parametrize("normalize", [False, True])
def test_decay_normalizer_and_grouped_heads(dtype, decay, normalize):
    check(Case(dtype, 2, 70, 4, 2, **ODD, decay=decay, normalize=normalize, state=True, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_mask_and_several_sequences(dtype, normalize):
    check(Case(dtype, 2, 90, 2, **ODD, decay="BTH", normalize=normalize, mask=True, state=True))
    lengths = [0, 70, 1, 0, 64, 5, 0]
    check(Case(dtype, 1, 140, 2, 1, **ODD, decay="BTHk", normalize=normalize, lengths=lengths, state=True))
    check(Case(dtype, 1, 140, 2, **ODD, decay="H", normalize=normalize, lengths=lengths, mask=True))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("time", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_lengths_around_a_chunk(dtype, time):
    check(Case(dtype, 1, time, 1, **ODD, decay="H"))


@pytest.mark.parametrize("dims", [(1, 1), (3, 5), (16, 100), (100, 16), (7, 200), (200, 130), (256, 9)])
def test_head_sizes_that_are_padded(dims):
    # of one number, a state's rounding is not averaged over others, and a normalized output does not depend on q
    one = dims == (1, 1)
    sizes = {"key_dim": dims[0], "value_dim": dims[1]}
    check(Case("bfloat16", 1, 70, 2, **sizes, decay="H", state=True), tolerance=3.0 if one else 1.0)
    check(Case("float16", 1, 40, 2, **sizes, normalize=not one))


@pytest.mark.parametrize("normalize", [False, True])
def test_strides_and_broadcast_gradients(normalize):
    case = Case("bfloat16", 2, 70, 2, key_dim=64, value_dim=32, normalize=normalize, decay="BTH", strided=True)
    check(case)
    case.log_decay = case.log_decay[:, :1].expand(-1, 70, -1)
    check(case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", [None, "H", "BTHk"])
def test_split_over_blocks(dtype, normalize, decay):
    for options in ({}, {"state": True, "mask": True}, {"lengths": [300, 0, 400, 68]}):
        case = Case(dtype, 1, 768, 2, 1, **ODD, decay=decay, strength=0.05, normalize=normalize, **options)
        check(case, MANY_SMS)
        assert case.forward(MANY_SMS)[1]["split"] == ("lengths" not in options)
        assert not case.forward(ONE_SM)[1]["split"]


def test_query_heads_are_spread_over_blocks():
    case = Case("bfloat16", 1, 70, 4, 1, **ODD, decay="Hk", normalize=True, state=True)
    for limits, rows in ((ONE_SM, 4), (MANY_SMS, 1)):
        _, plan, _ = case.forward(limits)
        assert plan["scans"][-1]["rows_per_block"] == rows
        check(case, limits)


def test_z_is_carried_without_a_normalizer():
    check(Case("bfloat16", 1, 70, 2, **ODD, decay="H", state="z"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strong_decay_and_a_reset(dtype):
    case = Case(dtype, 1, 130, 2, **ODD, decay="BTH", strength=20.0, state=True)
    check(case)
    case.log_decay[:, 40] = -torch.inf
    case.log_decay[:, 41] = -torch.inf
    case.log_decay[:, 100, 0] = -1e30
    check(case)


def test_float16_beyond_its_range():
    # scores, states and weights all leave it; outputs do not
    case = Case("float16", 1, 130, 1, key_dim=64, value_dim=64, decay="H", scale=1e-6)
    case.q, case.k = 100 * case.q, 100 * case.k
    check(case)
    case = Case("float16", 1, 130, 1, key_dim=64, value_dim=64, scale=1.0)
    case.q, case.k, case.v = 1e-2 * case.q, 1e-2 * case.k, 1e-1 * case.v
    check(case, backward=False)


def test_three_seeds_give_the_same_bits():
    for options in ({"normalize": True, "decay": "BTHk", "state": True}, {"decay": "H", "lengths": [100, 0, 40]}):
        case = Case("bfloat16", 1, 140, 4, 2, **ODD, **options)
        grads = {"grad_o": torch.randn(1, 140, 4, 20).bfloat16()}
        results = []
        for seed in (1, 2, 3):
            outputs, _, _ = case.forward(MANY_SMS, seed)
            gradients, _, _ = case.backward(grads, outputs, MANY_SMS, seed)
            results.append([x.clone() for x in (outputs | gradients).values() if x is not None])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_token_changes_nothing_before_it():
    case = Case("bfloat16", 1, 140, 2, **ODD, decay="BTH", normalize=True)
    before = case.forward()[0]["o"]
    for t in (0, 63, 64, 100):
        other = Case("bfloat16", 1, 140, 2, **ODD, decay="BTH", normalize=True)
        for x in (other.q, other.k, other.v):
            x[:, t] = x[:, t] * 3 + 1
        other.log_decay[:, t] = -7
        after = other.forward()[0]["o"]
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


def test_nan_stays_in_its_head_and_sequence():
    options = {"decay": "BTH", "normalize": True, "lengths": [70, 60]}
    clean = Case("bfloat16", 1, 130, 2, **ODD, **options)
    expected = clean.forward()[0]
    for name in ("q", "k", "v", "log_decay"):
        case = Case("bfloat16", 1, 130, 2, **ODD, **options)
        getattr(case, name)[:, 5, 1] = torch.nan
        outputs, _, _ = case.forward()
        assert torch.equal(outputs["o"][:, :, 0], expected["o"][:, :, 0])
        assert torch.equal(outputs["o"][:, 70:], expected["o"][:, 70:])
        assert torch.equal(outputs["final_kv"][1], expected["final_kv"][1])
        assert outputs["o"][:, 5:70, 1].isnan().any()


def test_masked_tokens_leave_no_trace():
    case = Case("bfloat16", 1, 130, 2, **ODD, decay="BTH", normalize=True, mask=True, state=True)
    grads = {"grad_o": torch.randn(1, 130, 2, 20).bfloat16()}
    outputs, _, _ = case.forward()
    gradients, _, _ = case.backward(grads, outputs)
    for x in (case.q, case.k, case.v, case.log_decay, grads["grad_o"]):
        x[~case.mask] = torch.nan
    others, _, _ = case.forward()
    other_gradients, _, _ = case.backward(grads, others)
    for a, b in ((outputs, others), (gradients, other_gradients)):
        for name, x in a.items():
            assert name == "denominator" or torch.equal(x, b[name]), name
    assert others["o"][~case.mask].count_nonzero() == 0
    assert other_gradients["dq"][~case.mask].count_nonzero() == 0
    # a state of NaN: masked tokens still output 0
    case.initial[0].fill_(torch.nan)
    assert case.forward()[0]["o"][~case.mask].count_nonzero() == 0


def test_wrong_values_become_nan():
    case = Case("bfloat16", 1, 130, 2, **ODD, decay="BTH")
    case.log_decay[0, 80, 1] = 0.5
    outputs, _, _ = case.forward()
    assert outputs["o"][:, 80:, 1].isnan().all()
    assert not outputs["o"][:, :, 0].isnan().any()
    for offsets in ([0, 50, 40, 130], [0, 50, 129], [1, 50, 130], [0, 500, 130], [0, -4, 130], [0]):
        for limits in (ONE_SM, MANY_SMS):
            case = Case("bfloat16", 1, 130, 2, **ODD, decay="BTH", lengths=[1] * (len(offsets) - 1), normalize=True)
            case.cu_seqlens = torch.tensor(offsets)
            outputs, _, _ = case.forward(limits)
            assert outputs["o"].isnan().all()
            assert outputs["final_kv"].isnan().all()
            grads = {"grad_o": torch.randn(1, 130, 2, 20).bfloat16()}
            gradients, _, _ = case.backward(grads, outputs, limits)
            assert all(gradients["d" + name].isnan().all() for name in "qkv")


@pytest.mark.parametrize("limits", [ONE_SM, MANY_SMS])
def test_nothing_to_do(limits):
    for options in ({"batch": 0}, {"time": 0}, {"time": 0, "lengths": []}, {"time": 0, "lengths": [0, 0]}):
        for more in ({}, {"normalize": True, "decay": "H"}):
            case = Case(**({"dtype": "bfloat16", "batch": 1, "time": 5, "heads": 2} | options | more), state=True)
            outputs, _, _ = check(case, limits)
            assert torch.equal(outputs["final_kv"], case.initial[0].expand_as(outputs["final_kv"]))


def test_an_a100_has_room():
    # 163 KB a block, 164 KB an SM
    limits = {"sms": 108, "shared_bytes": 163 * 1024, "shared_bytes_per_sm": 164 * 1024}
    for dim in (64, 128, 256):
        check(Case("bfloat16", 1, 70, 2, 1, key_dim=dim, value_dim=dim, decay="Hk"), limits)


def test_a_small_gpu_takes_other_shapes():
    # 99 KB a block: heads of 128 go in shorter chunks, and groups' gradients without tensor cores
    limits = {"sms": 20, "shared_bytes": 99 * 1024, "shared_bytes_per_sm": 100 * 1024}
    check(Case("bfloat16", 1, 70, 2, key_dim=128, value_dim=128, decay="Hk"), limits)
    case = Case("bfloat16", 1, 70, 2, 1, key_dim=128, value_dim=128, normalize=True)
    _, plan, _ = check(case, limits)
    assert not plan["tensor_cores"]
    assert case.forward(limits)[1]["tensor_cores"]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("normalize", [False, True])
def test_each_element_crosses_memory_once(dim, normalize):
    case = Case("bfloat16", 1, 128, 2, key_dim=dim, value_dim=dim, normalize=normalize, state=True)
    _, plan, executor = case.forward(for_backward=False)
    counts = executor.counters[f"linear_attention_bfloat16_{dim}"]
    assert (plan["scans"][0]["read_bytes"], plan["scans"][0]["write_bytes"]) == (
        3 * 2 * 128 * dim * 2,
        2 * 128 * dim * 2,
    )
    tokens, states, zs = 2 * 128 * dim * 2, 2 * dim * dim * 4, 2 * dim * 4 if normalize else 0
    assert counts["global_read_bytes"] == counts["global_read_unique_bytes"] == 3 * tokens + states + zs
    assert counts["global_written_bytes"] == tokens + states + zs + (2 * 128 * 4 if normalize else 0)
    executor.require_full_sectors(f"linear_attention_bfloat16_{dim}")


def test_scans_move_the_bytes_that_the_plan_states():
    case = Case("bfloat16", 2, 128, 4, 2, key_dim=64, value_dim=200)
    outputs, plan, executor = case.forward(MANY_SMS)
    kernel = "linear_attention_bfloat16_256"
    states = 2 * 2 * 64 * 200 * 4
    assert executor.counters[kernel]["global_read_bytes"] == sum(s["read_bytes"] for s in plan["scans"])
    assert executor.counters[kernel]["global_written_bytes"] == sum(s["write_bytes"] for s in plan["scans"]) + states
    _, plan, executor = case.backward({"grad_o": torch.randn(2, 128, 4, 200).to(case.dtype)}, outputs, MANY_SMS)
    assert executor.counters[kernel]["global_read_bytes"] == sum(s["read_bytes"] for s in plan["scans"])
    assert executor.counters[kernel]["global_written_bytes"] == sum(s["write_bytes"] for s in plan["scans"])


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_no_bank_conflicts(dim):
    case = Case("bfloat16", 1, 128, 1, key_dim=dim, value_dim=dim, decay="H")
    _, _, executor = case.forward()
    executor.require_no_bank_conflicts(f"linear_attention_bfloat16_{dim}")
