"""The scan on FMA units and the decoding step under the host executor, against the quadratic formulas in float64."""

import itertools

import freqrank_simt as simt
import numpy as np
import pytest

TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "float16": 1e-3, "bfloat16": 3.3e-3}
CHUNK = 64
ROLES = ["forward", "states", "query_gradient", "key_gradient", "value_gradient", "state_gradients"]


def to_bfloat16(x):
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def stored(x, dtype):
    return to_bfloat16(x) if dtype == "bfloat16" else np.asarray(x).astype(dtype)


def value(x):
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def empty(shape, dtype):
    return stored(np.full(shape, np.nan), dtype)


def assert_close(x, expected, dtype, what="", terms=None):
    """`terms`: the expected sums are of these, and what is left of them may be small."""
    x = value(x)
    assert np.isfinite(x).all(), f"{what}: not finite"
    whole = expected if terms is None else np.abs(terms).sum(-1)
    error, size = np.sqrt(np.mean((x - expected) ** 2)), np.sqrt(np.mean(whole**2))
    assert error <= TOLERANCE[dtype] * size + 1e-300, f"{what}: relative error {error / size:.2e}"


def spread(x, how):
    """The same values at other places in memory."""
    if how == "transposed":  # [B,heads,T,width] in memory
        return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
    if how == "backwards":
        return np.ascontiguousarray(x[:, ::-1, :, ::-1])[:, ::-1, :, ::-1]
    if how == "gaps":
        wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1] + 1), x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x


class Case:
    """Random tensors as the kernels get them, NaN where tokens are masked, and what they ought to make of them."""

    def __init__(
        self, *, dtype="float32", dtypes=(), batch=2, time=100, heads=(2, 2, 2), depth=24, width=40, decay=None,
        masked=False, normalize=False, states=True, layout=None, seed=11,
    ):  # fmt: skip
        rng = np.random.default_rng(seed)
        self.arithmetic = "float64" if dtype == "float64" else "float32"
        self.dtype, self.normalize, self.decay = dtype, normalize, decay
        self.batch, self.time, self.depth, self.width = batch, time, depth, width
        self.heads, self.key_heads, self.state_heads = heads
        self.scale, self.eps = 0.3, 1e-3
        self.group = self.heads // self.state_heads
        dtypes = dict(zip("qkvg", dtypes or [dtype] * 4, strict=True))
        shape = {"q": (self.heads, depth), "k": (self.key_heads, depth), "v": (self.key_heads, width)}
        shape["g"] = (self.heads, width)  # of o
        self.live = rng.random((batch, time)) > 0.3 if masked else np.ones((batch, time), bool)
        self.mask = self.live.astype(np.uint8) if masked else None
        self.inputs, self.exact = {}, {}
        for name, (n, size) in shape.items():
            x = rng.standard_normal((batch, time, n, size))
            if normalize and name in "qk":
                x = np.abs(x) + 0.1
            x = stored(x, dtypes[name])
            self.exact[name] = np.where(self.live[..., None, None], value(x), 0)
            x = stored(np.where(self.live[..., None, None], value(x), np.nan), dtypes[name])
            self.inputs[name] = spread(x, layout)
        self.log_decay = None
        log_decay = np.zeros((batch, time, self.state_heads))
        if decay == "per head":
            self.log_decay = -rng.random(self.state_heads).astype(self.arithmetic)
            log_decay[:] = self.log_decay
        elif decay is not None:
            x = -0.3 * rng.random(log_decay.shape)
            if decay == "resets":
                x[:, rng.random(time) < 0.2] = -np.inf
            x = x.astype(self.arithmetic)
            log_decay[:] = np.maximum(x, -800)
            self.log_decay = np.where(self.live[..., None], x, np.nan).astype(self.arithmetic)
        log_decay[~self.live] = 0
        self.total = log_decay.sum(1)
        # [B,Hs,T,T] and [B,Hs,T]: the decay from token j to i, from the start and to the end
        reach = np.cumsum(log_decay, 1).transpose(0, 2, 1)
        causal = np.tril(np.ones((time, time), bool)) & self.live[:, None, None, :]
        with np.errstate(invalid="ignore"):
            between = np.minimum(reach[..., :, None] - reach[..., None, :], 0)
        self.between = np.where(causal, np.exp(between), 0)
        self.from_start, self.to_end = np.exp(reach), np.exp(reach[..., -1:] - reach)

        def state(*shape):
            x = rng.standard_normal((batch, self.state_heads, *shape)).astype(self.arithmetic)
            return np.abs(x) if normalize else x

        given = states
        self.kv, self.z = (state(depth, width), state(depth)) if given else (None, None)
        self.grad_kv, self.grad_z = (state(depth, width), state(depth)) if given else (None, None)
        self.compute()

    def compute(self):
        """Everything by sums over all pairs of tokens, head by head."""
        b, t, s = self.batch, self.time, self.state_heads
        zero = {"kv": np.zeros((b, s, self.depth, self.width)), "z": np.zeros((b, s, self.depth))}
        kv, z = (x if x is not None else zero[n] for n, x in (("kv", self.kv), ("z", self.z)))
        grad_kv, grad_z = (x if x is not None else zero[n] for n, x in (("kv", self.grad_kv), ("z", self.grad_z)))
        kv, z, grad_kv, grad_z = (x.astype(np.float64) for x in (kv, z, grad_kv, grad_z))
        q, k, v, g = (self.exact[n] for n in "qkvg")
        self.o, self.dq = np.zeros((b, t, self.heads, self.width)), np.zeros(q.shape)
        self.dk, self.dv = np.zeros((b, t, s, self.depth)), np.zeros((b, t, s, self.width))
        self.dq_of_state, self.dk_of_state = np.zeros(self.dq.shape), np.zeros(self.dk.shape)
        same_chunk = np.equal.outer(np.arange(t) // CHUNK, np.arange(t) // CHUNK)
        self.final_kv, self.final_z = np.zeros(kv.shape), np.zeros(z.shape)
        self.dkv, self.dz = np.zeros(kv.shape), np.zeros(z.shape)
        self.denominator = np.ones((b, t, self.heads))
        self.query_scale, self.query_add = np.ones((b, t, self.heads)), np.zeros((b, t, self.heads))
        for n in range(b):
            live = self.live[n]
            for j in range(s):
                key = j * self.key_heads // s
                D, start, end = self.between[n, j], self.from_start[n, j], self.to_end[n, j]
                K, U = k[n, :, key], v[n, :, key]
                whole = np.exp(self.total[n, j])
                self.final_kv[n, j] = whole * kv[n, j] + np.einsum("t,td,te->de", end * live, K, U)
                self.final_z[n, j] = whole * z[n, j] + (end * live) @ K
                self.dk[n, :, j] = end[:, None] * (U @ grad_kv[n, j].T + grad_z[n, j])
                self.dk_of_state[n, :, j] = self.dk[n, :, j]
                self.dv[n, :, j] = end[:, None] * (K @ grad_kv[n, j])
                self.dkv[n, j], self.dz[n, j] = whole * grad_kv[n, j], whole * grad_z[n, j]
                for h in range(j * self.group, (j + 1) * self.group):
                    Q, G = q[n, :, h], g[n, :, h]
                    P = self.scale * (Q @ K.T) * D
                    o = P @ U + self.scale * start[:, None] * (Q @ kv[n, j])
                    ones, zeros = np.ones(t), np.zeros(t)
                    if self.normalize:
                        den = P.sum(1) + self.scale * start * (Q @ z[n, j]) + self.eps
                        den = np.where(live, den, 1)
                        o /= den[:, None]
                        ones, zeros = 1 / den, -(G * o).sum(1) / den
                        self.denominator[n, :, h] = den
                        self.query_scale[n, :, h] = np.where(live, ones, np.nan)
                        self.query_add[n, :, h] = np.where(live, zeros, np.nan)
                    self.o[n, :, h] = o
                    dP = self.scale * D * (ones[:, None] * (G @ U.T) + zeros[:, None])
                    self.dq[n, :, h] = dP @ K + self.scale * start[:, None] * (
                        ones[:, None] * (G @ kv[n, j].T) + zeros[:, None] * z[n, j]
                    )
                    self.dq_of_state[n, :, h] = self.dq[n, :, h] - (dP * same_chunk) @ K
                    self.dk_of_state[n, :, j] += (dP * ~same_chunk).T @ Q
                    self.dk[n, :, j] += dP.T @ Q
                    self.dv[n, :, j] += (P * ones[:, None]).T @ G
                    self.dkv[n, j] += self.scale * np.einsum("t,td,te->de", start * ones, Q, G)
                    self.dz[n, j] += self.scale * (start * zeros) @ Q
        for x in (self.o, self.dq, self.dk, self.dv, self.dq_of_state, self.dk_of_state):
            x[~self.live] = 0

    def common(self, role):
        reverse = role in ("key_gradient", "value_gradient", "state_gradients")
        out = {
            "reverse": reverse, "state_heads": self.state_heads, "query_heads": self.heads,
            "mask": self.mask, "log_decay": self.log_decay,
            "column_heads" if reverse else "row_heads": self.group, "column_factor": self.scale if reverse else 1.0,
        }  # fmt: skip
        if self.normalize and role not in ("forward", "states"):
            by_head = lambda x: np.ascontiguousarray(x.swapaxes(1, 2), self.arithmetic)  # noqa: E731
            out["query_scale"] = by_head(self.query_scale)
            if role != "value_gradient":
                out["query_add"] = by_head(self.query_add)
        return out

    def scan(self, role, seed=0, out_dtype=None, **options):
        """One launch: its arrays by name, all of which must have been written, and what the layout was."""
        q, k, v, g = (self.inputs[n] for n in "qkvg")
        out_dtype = out_dtype or self.dtype
        swap = lambda x: None if x is None else x.swapaxes(2, 3)  # noqa: E731
        p = self.common(role)
        tile = simt.linear_attention_fma_tile
        made = {}

        def make(name, shape, dtype=self.arithmetic):
            if name not in options:
                made[name] = p[name] = empty(shape, dtype)

        b, t, s = self.batch, self.time, self.state_heads
        kv, z = (b, s, self.depth, self.width), (b, s, self.depth)
        if role in ("forward", "states"):
            p |= {"rows": q, "columns": k, "values": v, "key_sum": True, "initial_state": self.kv, "initial_z": self.z}
            if role == "states":
                p |= {"states_only": True, "initial_state": None, "initial_z": None, "row_heads": 1}
                make("segment_decay", (b, s), "float64")
            else:
                p |= {"normalize": self.normalize, "eps": self.eps, "out_factor": self.scale}
                make("out", self.o.shape, out_dtype)
                if self.normalize:
                    make("denominator", (b, self.heads, t))
            make("final_state", kv)
            make("final_z", z)
        elif role == "query_gradient":
            p |= {"rows": g, "columns": v, "values": k, "out_factor": self.scale, "value_sum": self.normalize}
            p |= {"initial_state": swap(self.kv), "initial_z": self.z, "with": q}
            make("out", self.dq.shape, out_dtype)
            tiles = -(-self.depth // tile(self.width, self.depth, self.arithmetic == "float64"))
            make("dots", (tiles, b, self.heads, t))
        elif role == "key_gradient":
            p |= {"rows": v, "columns": g, "values": q, "value_sum": True}
            p |= {"initial_state": swap(self.grad_kv), "initial_z": self.grad_z}
            make("out", self.dk.shape, out_dtype)
            make("final_z", z)
            if self.state_heads == self.key_heads:
                tiles = -(-self.depth // tile(self.width, self.depth, self.arithmetic == "float64"))
                make("dots", (tiles, b, s, t))
                p["with"] = k
        elif role == "value_gradient":
            p |= {"rows": k, "columns": q, "values": g, "initial_state": self.grad_kv}
            make("out", self.dv.shape, out_dtype)
            make("final_state", kv)
        else:
            p |= {"columns": g, "values": q, "states_only": True, "value_sum": True}
            make("final_state", kv)
            p["final_state"] = made["final_state"].swapaxes(2, 3)
            make("final_z", z)
        p |= options
        executor = simt.Executor(seed)
        for x in made.values():
            executor.expect_written(x)
        layout = simt.linear_attention_scan_fma(executor, self.arithmetic == "float64", p)
        executor.check_written()
        self.executor = executor
        return made, layout

    def check(self, role, out_dtype=None, **options):
        made, layout = self.scan(role, out_dtype=out_dtype, **options)
        a, out_dtype = self.arithmetic, out_dtype or self.dtype
        if role == "forward":
            assert_close(made["out"], self.o, out_dtype, "o")
            assert_close(made["final_state"], self.final_kv, a, "final kv")
            assert_close(made["final_z"], self.final_z, a, "final z")
            if self.normalize:
                assert_close(made["denominator"].swapaxes(1, 2), self.denominator, a, "denominator")
        elif role == "states":
            whole = np.exp(self.total)
            kv, z = 0, 0
            if self.kv is not None:
                kv, z = whole[..., None, None] * self.kv, whole[..., None] * self.z
            assert_close(made["final_state"], self.final_kv - kv, a, "states")
            assert_close(made["final_z"], self.final_z - z, a, "states' z")
            if self.decay != "resets":  # -inf counts as the lowest number that makes a difference
                assert_close(made["segment_decay"], self.total, "float64", "the segments' decay")
        elif role == "query_gradient":
            assert_close(made["out"], self.dq, out_dtype, "dq")
            terms = self.dq_of_state * self.exact["q"]
            assert_close(made["dots"].sum(0).swapaxes(1, 2), terms.sum(-1), a, "q . dq", terms)
        elif role == "key_gradient":
            assert_close(made["out"], self.dk, out_dtype, "dk")
            assert_close(made["final_z"], self.dz, a, "dz")
            if "dots" in made:
                terms = self.dk_of_state * self.exact["k"]
                assert_close(made["dots"].sum(0).swapaxes(1, 2), terms.sum(-1), a, "k . dk", terms)
        elif role == "value_gradient":
            assert_close(made["out"], self.dv, out_dtype, "dv")
            assert_close(made["final_state"], self.dkv, a, "dkv")
        else:
            whole = np.exp(self.total)
            kv, z = 0, 0
            if self.grad_kv is not None:
                kv, z = whole[..., None, None] * self.grad_kv, whole[..., None] * self.grad_z
            assert_close(made["final_state"], self.dkv - kv, a, "the states' gradients")
            if self.normalize:
                assert_close(made["final_z"], self.dz - z, a, "z's gradients")
            else:
                assert not made["final_z"].any()
        if "out" in made:
            assert not value(made["out"])[~self.live].any(), "o of masked tokens"
        if "dots" in made:
            assert not made["dots"].swapaxes(2, 3)[:, ~self.live].any(), "dots of masked tokens"
        return layout


OPTIONS = {
    "plain": {},
    "one token": {"time": 1, "depth": 1, "width": 1},
    "whole chunks": {"time": 128, "depth": 32, "width": 64},
    "per head": {"decay": "per head"},
    "per token": {"decay": "per token", "states": False},
    "resets": {"decay": "resets"},
    "masked": {"decay": "per token", "masked": True, "layout": "transposed"},
    "normalised": {"normalize": True},
    "everything": {"normalize": True, "masked": True, "decay": "per token", "time": 140, "layout": "gaps"},
    "groups": {"heads": (4, 2, 2), "normalize": True, "decay": "per token", "masked": True},
    "groups with decays": {"heads": (4, 2, 4), "normalize": True, "decay": "per token", "layout": "backwards"},
    "slices": {"time": 70, "depth": 150, "width": 72, "batch": 1, "heads": (2, 1, 1), "normalize": True},
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("options", OPTIONS)
def test_roles(options, role):
    Case(**OPTIONS[options]).check(role)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("options", ["plain", "everything", "groups", "slices"])
def test_double(options, role):
    Case(dtype="float64", **OPTIONS[options]).check(role)


MIXED = [
    (("bfloat16", "float32", "float16", "bfloat16"), "bfloat16", {"depth": 32, "width": 48}),
    (("float16", "float16", "float32", "float32"), "float16", {"depth": 20, "width": 12, "masked": True}),
    (("float16", "float16", "float16", "float16"), "float32", {"depth": 32, "width": 48, "layout": "gaps"}),
]


@pytest.mark.parametrize("role", ["forward", "query_gradient", "key_gradient", "value_gradient"])
@pytest.mark.parametrize(("dtypes", "out_dtype", "options"), MIXED)
def test_mixed_dtypes(dtypes, out_dtype, options, role):
    Case(dtypes=dtypes, decay="per head", normalize=True, **options).check(role, out_dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_rest_is_what_rounding_took(dtype):
    case = Case(dtype=dtype, normalize=True, heads=(4, 2, 2), depth=16)
    rest = empty(case.o.shape, dtype)
    made, _ = case.scan("forward", rest=rest)
    both = value(made["out"]) + value(rest)
    assert np.sqrt(np.mean((both - case.o) ** 2)) < 1e-5 * np.sqrt(np.mean(case.o**2))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_largest_sizes(dtype):
    case = Case(dtype=dtype, batch=1, time=70, heads=(1, 1, 1), depth=512, width=40, decay="per token", normalize=True)
    for limit in (232448, 166912):  # H100, A100
        layout = case.check("forward", shared_bytes=limit)
        assert layout["slices"] > 1
    wide = Case(dtype=dtype, batch=1, time=65, heads=(1, 1, 1), depth=16, width=512)
    assert wide.check("forward")["tile"] == (64 if dtype == "float32" else 32)


def test_rows_of_a_group_in_blocks():
    case = Case(heads=(6, 1, 1), depth=16, width=16, normalize=True, decay="per token")
    for rows in (1, 2, 4):
        case.check("forward", rows_per_block=rows)
        case.check("query_gradient", rows_per_block=rows)


@pytest.mark.parametrize("role", ROLES)
def test_the_order_of_blocks_and_threads_changes_no_bit(role):
    case = Case(**OPTIONS["groups"])
    first, _ = case.scan(role)
    for seed in (1, 2):
        again, _ = case.scan(role, seed)
        for name, x in first.items():
            assert np.array_equal(x, again[name], equal_nan=False), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_bank_conflicts(dtype):
    case = Case(dtype=dtype, time=128, depth=64, width=64, batch=1, heads=(2, 1, 1), decay="per token", normalize=True)
    for role in ("forward", "value_gradient"):
        case.check(role)
        case.executor.require_no_bank_conflicts()


@pytest.mark.parametrize("role", ["forward", "query_gradient", "key_gradient", "value_gradient"])
def test_ragged_sequences(role):
    offsets = [0, 70, 70, 73, 150]
    whole = Case(batch=1, time=150, normalize=True, decay="per token", masked=True, states=False, depth=16, width=24)
    table = [(n, begin, end - begin) for n, (begin, end) in enumerate(itertools.pairwise(offsets))]
    table = np.array([*table, (-1, 0, 0)], np.int64)  # and a slot that is not needed
    n, s = len(offsets) - 1, whole.state_heads
    states = {
        "final_state": np.full((n, s, 16, 24), np.nan, np.float32), "final_z": np.full((n, s, 16), np.nan, np.float32)
    }  # fmt: skip
    initial = np.random.default_rng(0).random((n, s, 16, 24)).astype(np.float32)
    initial_z = np.random.default_rng(1).random((n, s, 16)).astype(np.float32)
    # each sequence alone
    parts = []
    for i, (begin, end) in enumerate(itertools.pairwise(offsets)):
        part = Case(batch=1, time=150, normalize=True, decay="per token", masked=True, states=False, depth=16, width=24)
        part.time, part.live = end - begin, part.live[:, begin:end]
        part.exact = {x: y[:, begin:end] for x, y in part.exact.items()}
        part.between = part.between[..., begin:end, begin:end]
        decay = np.where(part.live[..., None], part.log_decay[:, begin:end], 0).astype(np.float64)
        reach = np.cumsum(decay, 1).transpose(0, 2, 1)
        part.total = decay.sum(1)
        part.from_start, part.to_end = np.exp(reach), np.exp(part.total[..., None] - reach)
        part.kv, part.z = initial[i : i + 1], initial_z[i : i + 1]
        part.grad_kv, part.grad_z = part.kv, part.z
        part.compute()
        parts.append(part)
    join = lambda name, axis: np.concatenate([getattr(part, name) for part in parts], axis)  # noqa: E731
    whole.query_scale, whole.query_add = join("query_scale", 1), join("query_add", 1)
    options = {"table": table, "sequences": n, "initial_z": initial_z if role != "value_gradient" else None}
    options["initial_state"] = initial.swapaxes(2, 3) if role in ("query_gradient", "key_gradient") else initial
    if role in ("forward", "value_gradient"):
        options["final_state"] = states["final_state"]
    if role in ("forward", "key_gradient"):
        options["final_z"] = states["final_z"]
    made, _ = whole.scan(role, **options)
    name = {"forward": "o", "query_gradient": "dq", "key_gradient": "dk", "value_gradient": "dv"}[role]
    assert_close(made["out"], join(name, 1), "float32", name)
    gradients = role != "forward"
    if "final_state" in options:
        assert_close(states["final_state"], join("dkv" if gradients else "final_kv", 0), "float32", "states")
        assert gradients or np.array_equal(states["final_state"][1], initial[1])  # no token
    if "final_z" in options:
        assert_close(states["final_z"], join("dz" if gradients else "final_z", 0), "float32", "z")


def test_split_sequences():
    """The sums of segments, carried from one to the next, start each segment."""
    case = Case(time=150, decay="per token", masked=True, normalize=True, depth=16, width=24)
    length, per_sequence, s = 64, 3, case.state_heads
    slots = case.batch * per_sequence
    split = {"segment_length": length, "segments_per_sequence": per_sequence, "by_slot": True}
    sums = {
        "final_state": np.full((slots, s, 16, 24), np.nan, np.float32),
        "final_z": np.full((slots, s, 16), np.nan, np.float32),
        "segment_decay": np.full((slots, s), np.nan),
    }
    case.scan("states", **split, **sums)
    before, before_z = np.zeros_like(sums["final_state"]), np.zeros_like(sums["final_z"])
    for n in range(case.batch):
        kv, z = case.kv[n], case.z[n]
        for i in range(n * per_sequence, (n + 1) * per_sequence):
            before[i], before_z[i] = kv, z
            whole = np.exp(sums["segment_decay"][i])
            kv = whole[:, None, None] * kv + sums["final_state"][i]
            z = whole[:, None] * z + sums["final_z"][i]
        assert_close(kv, case.final_kv[n], "float32")
    options = split | {"initial_state": before, "initial_z": before_z, "final_state": None, "final_z": None}
    made, _ = case.scan("forward", **options)
    assert_close(made["out"], case.o, "float32")


def test_wrong_offsets_become_nan():
    case = Case(batch=1, time=20, depth=16, width=40, normalize=True)
    table = np.array([[0, 0, -1 - 20]], np.int64)
    made, _ = case.scan("forward", table=table)
    for name, x in made.items():
        assert np.isnan(x).all(), name


def test_a_positive_decay_is_nan_and_stays_in_its_head():
    case = Case(decay="per token", heads=(4, 2, 2), time=90)
    case.log_decay[0, 71, 1] = 0.5
    made, _ = case.scan("forward")
    assert np.isnan(made["out"][0, 71:, 2:]).all()
    made["out"][0, 71:, 2:] = case.o[0, 71:, 2:]
    assert_close(made["out"], case.o, "float32")


def test_nan_reaches_its_own_row_and_what_follows():
    case = Case(heads=(4, 2, 2), time=90, batch=1)
    clean, _ = case.scan("forward")
    case.inputs["q"][0, 40, 1] = np.nan
    case.inputs["k"][0, 50, 1] = np.nan
    made, _ = case.scan("forward")
    expected = clean["out"].copy()
    expected[0, 40, 1] = np.nan
    expected[0, 50:, 2:] = np.nan
    assert np.array_equal(made["out"], expected, equal_nan=True)


def test_no_trace_of_nan_in_the_state_at_masked_tokens():
    case = Case(masked=True, normalize=True)
    case.kv[:] = np.nan
    made, _ = case.scan("forward", eps=0.0)
    assert not made["out"][~case.live].any()
    assert (made["denominator"].swapaxes(1, 2)[~case.live] == 1).all()
    assert np.isnan(made["out"][case.live]).all()


# --- the decoding step ---


def run_step(
    q, k, v, kv, z=None, log_decay=None, mask=None, normalize=False, o=None, out_dtype=None, seed=0, **options
):
    if o is None:
        o = empty((q.shape[0], q.shape[1], v.shape[2]), out_dtype or q.dtype.name)
    executor = simt.Executor(seed)
    executor.expect_written(o)
    values = {"q": q, "k": k, "v": v, "o": o, "kv": kv, "z": z, "log_decay": log_decay, "mask": mask}
    simt.linear_attention_step(executor, values | {"normalize": normalize, "scale": 0.3, "eps": 1e-3} | options)
    executor.check_written()
    return o, executor


def expected_step(q, k, v, kv, z, decay, live, normalize):
    heads, states = q.shape[1], kv.shape[1]
    q, k, v = (np.repeat(value(x), n // x.shape[1], 1) for x, n in ((q, heads), (k, states), (v, states)))
    new = decay[..., None, None] * kv + k[..., :, None] * v[..., None, :]
    new = np.where(live[:, None, None, None], new, kv)
    o = 0.3 * np.einsum("bhd,bhde->bhe", q, np.repeat(new, heads // states, 1))
    new_z = None
    if z is not None:
        new_z = np.where(live[:, None, None], decay[..., None] * z + k, z)
        if normalize:
            o /= 0.3 * np.einsum("bhd,bhd->bh", q, np.repeat(new_z, heads // states, 1))[..., None] + 1e-3
    return np.where(live[:, None, None], o, 0), new, new_z


STEPS = [
    {"heads": (2, 2, 2), "depth": 64, "width": 64},
    {"heads": (2, 2, 2), "depth": 33, "width": 37, "decay": "per head", "z": True},
    {"heads": (4, 2, 2), "depth": 64, "width": 80, "decay": "per token", "z": True, "normalize": True},
    {"heads": (4, 2, 4), "depth": 20, "width": 12, "decay": "per token", "z": True, "normalize": True, "masked": True},
    {"heads": (20, 1, 1), "depth": 16, "width": 40, "decay": "per head", "z": True, "normalize": True, "masked": True},
    {"heads": (1, 1, 1), "depth": 512, "width": 512, "z": True, "normalize": True},
    {"heads": (2, 1, 1), "depth": 300, "width": 24, "masked": True, "state": "transposed"},
    {"heads": (2, 1, 1), "depth": 1, "width": 1, "z": True, "normalize": True, "state": "backwards"},
]


@pytest.mark.parametrize("dtypes", [("float32",) * 4, ("float64",) * 4, ("bfloat16", "float16", "float32", "float16")])
@pytest.mark.parametrize("options", STEPS)
def test_step(options, dtypes):
    rng = np.random.default_rng(5)
    heads, key_heads, states = options["heads"]
    depth, width, batch = options["depth"], options["width"], 3
    arithmetic = "float64" if dtypes[0] == "float64" else "float32"
    live = np.array([True, False, True]) if options.get("masked") else np.ones(batch, bool)
    shapes = [(batch, heads, depth), (batch, key_heads, depth), (batch, key_heads, width)]
    exact = [stored(rng.random(shape) + 0.1, dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    dead = [stored(np.where(live[:, None, None], value(x), np.nan), d) for x, d in zip(exact, dtypes, strict=False)]
    kv = rng.standard_normal((batch, states, depth, width)).astype(arithmetic)
    z = rng.random((batch, states, depth)).astype(arithmetic) if options.get("z") else None
    log_decay, decay = None, np.ones((batch, states))
    if "decay" in options:
        shape = (states,) if options["decay"] == "per head" else (batch, states)
        log_decay = -rng.random(shape).astype(arithmetic)
        decay = np.exp(np.broadcast_to(log_decay, (batch, states)).astype(np.float64))
    normalize = options.get("normalize", False)
    o, new, new_z = expected_step(*exact, kv.astype(np.float64), z, decay, live, normalize)
    mask = live.astype(np.uint8) if options.get("masked") else None
    results = []
    for seed in (0, 1):
        state = kv.copy()
        if options.get("state") == "transposed":
            state = kv.swapaxes(2, 3).copy().swapaxes(2, 3)
        elif options.get("state") == "backwards":
            state = kv[:, ::-1, :, ::-1].copy()[:, ::-1, :, ::-1]
        out_z = None if z is None else z.copy()
        out, _ = run_step(*dead, state, out_z, log_decay, mask, normalize, None, dtypes[3], seed)
        assert_close(out, o, dtypes[3], "o")
        assert_close(state, new, arithmetic, "kv")
        assert np.array_equal(state[~live], kv[~live])
        if z is not None:
            assert_close(out_z, new_z, arithmetic, "z")
        results.append((out, np.ascontiguousarray(state)))
    assert all(np.array_equal(x, y) for x, y in zip(*results, strict=True))


def aligned(*shape):
    """Ones, aligned as a GPU's allocations are."""
    x = simt.memory(4 * int(np.prod(shape))).view(np.float32).reshape(shape)
    x[:] = 1
    return x


def test_step_moves_the_state_once_in_full_sectors():
    q, k, v, o = (aligned(2, heads, 128) for heads in (8, 2, 2, 8))
    for normalize in (False, True):
        kv, z = aligned(2, 2, 128, 128), aligned(2, 2, 128)
        _, executor = run_step(q, k, v, kv, z, normalize=normalize, o=o)
        executor.require_full_sectors("linear_attention_step")
        executor.require_no_bank_conflicts("linear_attention_step")
        counts = executor.counters["linear_attention_step"]
        assert counts["global_written_bytes"] == kv.nbytes + z.nbytes + o.nbytes
        assert counts["global_read_unique_bytes"] == kv.nbytes + z.nbytes + q.nbytes + k.nbytes + v.nbytes
        assert counts["global_read_bytes"] < 1.5 * counts["global_read_unique_bytes"]


def test_step_with_a_positive_decay_is_nan():
    q, k, v = (np.ones((1, 1, 8), np.float32) for _ in range(3))
    kv = np.ones((1, 1, 8, 8), np.float32)
    o, _ = run_step(q, k, v, kv, log_decay=np.array([0.1], np.float32))
    assert np.isnan(o).all()
    assert np.isnan(kv).all()


def feature_map(x, projection, feature, weights):
    """phi(x) of x [B,heads,C]; projection [C,M] or [Hk,C,M], weights [F] or [Hk,F] or None."""
    lead = x.shape[1] // (projection.shape[0] if projection.ndim == 3 else 1)
    matrices = np.repeat(projection.reshape(-1, *projection.shape[-2:]), lead, 0).astype(np.float64)
    p = np.einsum("bhc,hcm->bhm", value(x), matrices)
    if feature == "softmax_pm":
        p = np.concatenate([p, -p], -1)
    if feature == "exp":
        phi = np.exp(p)
    else:
        phi = np.exp(p - p.max(-1, keepdims=True))
        phi /= phi.sum(-1, keepdims=True)
    if weights is not None:
        phi *= np.repeat(weights.reshape(-1, weights.shape[-1]), x.shape[1] // (weights.size // weights.shape[-1]), 0)
    return phi


MAPPED_STEPS = [
    {"heads": (2, 2, 2), "channels": 64, "columns": 64, "width": 64},
    {"heads": (2, 2, 2), "channels": 33, "columns": 37, "width": 37, "decay": "per head", "z": True, "shared": False},
    {"heads": (4, 2, 2), "channels": 20, "columns": 48, "width": 80, "decay": "per token", "z": True,
     "normalize": True, "weights": "shared"},
    {"heads": (4, 2, 4), "channels": 7, "columns": 12, "width": 12, "decay": "per token", "z": True,
     "normalize": True, "masked": True, "shared": False, "weights": "own"},
    {"heads": (9, 1, 1), "channels": 16, "columns": 33, "width": 40, "decay": "per head", "z": True,
     "normalize": True, "masked": True, "layout": "transposed"},
    {"heads": (1, 1, 1), "channels": 256, "columns": 256, "width": 512, "weights": "shared"},
    {"heads": (2, 1, 1), "channels": 5, "columns": 1, "width": 1, "shared": False, "layout": "backwards"},
]  # fmt: skip


def mapped_step(options, feature, dtypes, batch=3):
    """Tensors of a step behind a map, as `run_step` takes them, without the dtypes' rounding of the state."""
    rng = np.random.default_rng(7)
    heads, key_heads, states = options["heads"]
    channels, columns, width = options["channels"], options["columns"], options["width"]
    depth = 2 * columns if feature == "softmax_pm" else columns
    arithmetic = "float64" if dtypes[0] == "float64" else "float32"
    shapes = [(batch, heads, channels), (batch, key_heads, channels), (batch, key_heads, width)]
    tensors = [stored(rng.standard_normal(shape), dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    shape = (channels, columns) if options.get("shared", True) else (key_heads, channels, columns)
    projection = (rng.standard_normal(shape) * channels**-0.5).astype(arithmetic)
    if options.get("layout") == "transposed":
        projection = projection.swapaxes(-1, -2).copy().swapaxes(-1, -2)
    elif options.get("layout") == "backwards":
        projection = projection[..., ::-1, ::-1].copy()[..., ::-1, ::-1]
    weights = None
    if "weights" in options:
        weights = (rng.random((depth,) if options["weights"] == "shared" else (key_heads, depth)) + 0.5).astype(
            arithmetic
        )
    kv = rng.standard_normal((batch, states, depth, width)).astype(arithmetic)
    z = rng.random((batch, states, depth)).astype(arithmetic) if options.get("z") else None
    return tensors, kv, z, {"projection": projection, "weights": weights, "feature": feature}


@pytest.mark.parametrize("dtypes", [("float32",) * 4, ("float64",) * 4, ("bfloat16", "float16", "float32", "float16")])
@pytest.mark.parametrize("feature", ["softmax", "exp", "softmax_pm"])
@pytest.mark.parametrize("options", MAPPED_STEPS)
def test_step_behind_a_map(options, feature, dtypes):
    exact, kv, z, given = mapped_step(options, feature, dtypes)
    batch, (_, _, states) = 3, options["heads"]
    live = np.array([True, False, True]) if options.get("masked") else np.ones(batch, bool)
    dead = [stored(np.where(live[:, None, None], value(x), np.nan), d) for x, d in zip(exact, dtypes, strict=False)]
    log_decay, decay = None, np.ones((batch, states))
    if "decay" in options:
        shape = (states,) if options["decay"] == "per head" else (batch, states)
        log_decay = -np.random.default_rng(3).random(shape).astype(kv.dtype)
        decay = np.exp(np.broadcast_to(log_decay, (batch, states)).astype(np.float64))
    normalize = options.get("normalize", False)
    phi = [feature_map(x, given["projection"], feature, given["weights"]) for x in exact[:2]]
    o, new, new_z = expected_step(*phi, exact[2], kv.astype(np.float64), z, decay, live, normalize)
    mask = live.astype(np.uint8) if options.get("masked") else None
    results = []
    for seed in (0, 1, 2):
        state, out_z = kv.copy(), None if z is None else z.copy()
        out, executor = run_step(*dead, state, out_z, log_decay, mask, normalize, None, dtypes[3], seed, **given)
        assert_close(out, o, dtypes[3], "o")
        assert_close(state, new, kv.dtype.name, "kv")
        assert np.array_equal(state[~live], kv[~live])
        if z is not None:
            assert_close(out_z, new_z, kv.dtype.name, "z")
            assert np.array_equal(out_z[~live], z[~live])
        assert len(executor.counters) == 1  # one launch does it all
        results.append((out, state))
    assert all(np.array_equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("feature", ["softmax", "exp", "softmax_pm"])
def test_step_behind_a_map_keeps_nan_to_its_row_and_head(feature):
    options = {"heads": (6, 2, 2), "channels": 20, "columns": 36, "width": 24, "z": True, "shared": False}
    (q, k, v), kv, z, given = mapped_step(options, feature, ("float32",) * 4)

    def run(q, k, given):
        state, out_z = kv.copy(), z.copy()
        o, _ = run_step(q, k, v, state, out_z, normalize=True, **given)
        return o, state, out_z

    o, state, out_z = run(q, k, given)
    bad_q, bad_k = q.copy(), k.copy()
    bad_q[0, 1, 3] = np.nan
    bad_k[2, 1, 5] = np.inf
    expected, expected_state, expected_z = o.copy(), state.copy(), out_z.copy()
    expected[0, 1], expected[2, 3:], expected_state[2, 1], expected_z[2, 1] = np.nan, np.nan, np.nan, np.nan
    got, got_state, got_z = run(bad_q, bad_k, given)
    if feature == "exp":  # exp(-inf) is 0: only some features of that key are not finite
        assert not np.isfinite(got[2, 3:]).any()
        got[2, 3:], got_state[2, 1], got_z[2, 1] = np.nan, np.nan, np.nan
    for x, y in ((got, expected), (got_state, expected_state), (got_z, expected_z)):
        assert np.array_equal(x, y, equal_nan=True)
    bad = given | {"projection": given["projection"].copy()}
    bad["projection"][1, 4, 35] = np.nan  # of the second key head
    got, got_state, _ = run(q, k, bad)
    assert np.isnan(got[:, 3:]).all()
    assert np.isnan(got_state[:, 1, 35]).all()
    assert np.array_equal(got[:, :3], o[:, :3])
    assert np.array_equal(got_state[:, 0], state[:, 0])


def test_step_behind_a_map_moves_the_state_once_and_reads_the_map_in_full_sectors():
    q, k, v, o = (aligned(2, heads, 128) for heads in (8, 2, 2, 8))
    projection = aligned(128, 128)
    for normalize, blocks in ((False, 16), (True, 4)):  # blocks of 32 columns of the state, or of all
        kv, z = aligned(2, 2, 128, 128), aligned(2, 2, 128)
        _, executor = run_step(q, k, v, kv, z, normalize=normalize, o=o, projection=projection)
        executor.require_full_sectors("feature_map_attention_step")
        executor.require_no_bank_conflicts("feature_map_attention_step")
        counts = executor.counters["feature_map_attention_step"]
        assert counts["blocks"] == blocks
        assert counts["global_written_bytes"] == kv.nbytes + z.nbytes + o.nbytes
        others = q.nbytes + k.nbytes + v.nbytes + projection.nbytes
        assert counts["global_read_unique_bytes"] == kv.nbytes + z.nbytes + others
        assert counts["global_read_bytes"] <= kv.nbytes + z.nbytes + 4 * v.nbytes + blocks * (others - v.nbytes)


def test_step_behind_a_map_has_fewer_blocks_where_there_are_many_states():
    for batch, blocks_per_state in ((128, 4), (255, 2), (256, 2), (512, 1)):
        options = {"heads": (1, 1, 1), "channels": 4, "columns": 4, "width": 128}
        (q, k, v), kv, _, given = mapped_step(options, "softmax", ("float32",) * 4, batch)
        phi = [feature_map(x, given["projection"], "softmax", None) for x in (q, k)]
        want, new, _ = expected_step(
            *phi, v, kv.astype(np.float64), None, np.ones((batch, 1)), np.ones(batch, bool), False
        )
        o, executor = run_step(q, k, v, kv, **given)
        assert executor.counters["feature_map_attention_step"]["blocks"] == batch * blocks_per_state
        assert_close(o, want, "float32")
        assert_close(kv, new, "float32")
