"""Linear attention on a GPU, against its quadratic and recurrent forms in float64."""

from __future__ import annotations

import itertools
import math
import threading

import freqrank
import pytest
import torch
from freqrank import LinearAttentionState
from freqrank.ops import reference
from on_device import CUDA, DEVICE, assert_waits_for_nothing, needs_cuda, room, skip_module_without_device

skip_module_without_device()
pytestmark = pytest.mark.gpu

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32, torch.float64)
TOLERANCE = {torch.bfloat16: 3.3e-3, torch.float16: 3.3e-3, torch.float32: 1e-5, torch.float64: 1e-12}
DECAY_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float32: 3e-5, torch.float64: 1e-11}
FEATURE_TOLERANCE = TOLERANCE | {torch.bfloat16: 5e-3, torch.float16: 5e-3}
DECAYS = (None, "H", "Hk", "BTH", "BTHk")


def real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def error(got: torch.Tensor, want: torch.Tensor, least: float = 0.0) -> float:
    """Relative RMS error; `least` is a norm to take where that of what is wanted is smaller."""
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach().double().to(got.device)
    norm = max(float(want.norm()), least)
    return float((got - want).norm()) / (norm if norm > 0 else 1.0)


class Case:
    """The tensors of one call, random, the same on each device."""

    def __init__(
        self, dtype, batch=1, time=200, heads=2, key_heads=None, key_dim=64, value_dim=None, *, decay=None,
        strength=0.3, normalize=False, mask=False, lengths=None, state=False, seed=0,
    ):  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.normalize = dtype, normalize
        key_heads, value_dim = key_heads or heads, value_dim or key_dim
        self.q = self.normal(batch, time, heads, key_dim)
        self.k = self.normal(batch, time, key_heads, key_dim)
        self.v = self.normal(batch, time, key_heads, value_dim)
        if normalize:
            self.q, self.k = self.q.abs(), self.k.abs()
        self.log_decay = None
        state_heads = key_heads
        if decay is not None:
            state_heads = heads if decay.endswith("H") else key_heads
            shape = (batch, time, state_heads) if decay.startswith("BT") else (state_heads,)
            self.log_decay = -strength * self.uniform(*shape)
        self.mask = (self.uniform(batch, time) > 0.3) if mask else None
        self.cu_seqlens = None
        sequences = batch
        if lengths is not None:
            sequences = len(lengths)
            self.cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)
        self.kv = self.z = None
        if state:
            self.kv = self.normal(sequences, state_heads, key_dim, value_dim, dtype=real(dtype))
            self.z = self.uniform(sequences, state_heads, key_dim) if normalize or state == "z" else None

    def normal(self, *shape, dtype=None):
        x = torch.randn(*shape, dtype=torch.float64, generator=self.generator)
        return x.to(dtype or self.dtype).to(DEVICE)

    def uniform(self, *shape):
        return torch.rand(*shape, dtype=torch.float64, generator=self.generator).to(real(self.dtype)).to(DEVICE)

    def leaves(self):
        named = {"q": self.q, "k": self.k, "v": self.v, "log_decay": self.log_decay, "kv": self.kv, "z": self.z}
        return {name: x for name, x in named.items() if x is not None}

    def options(self):
        return {"normalize": self.normalize, "mask": self.mask, "cu_seqlens": self.cu_seqlens}

    def run(self, leaves=None):
        """{"o", "kv", "z"}, of freqrank."""
        x = leaves or self.leaves()
        before = LinearAttentionState(x["kv"], x.get("z")) if "kv" in x else None
        o, after = freqrank.linear_attention(
            x["q"], x["k"], x["v"], log_decay=x.get("log_decay"), initial_state=before, output_final_state=True,
            **self.options(),
        )  # fmt: skip
        outputs = {"o": o, "kv": after.kv, "z": after.z}
        return {name: x for name, x in outputs.items() if x is not None}

    def exact(self, leaves=None, form=reference.linear_attention):
        """The same in float64, on the device."""
        x = {name: leaf.double() for name, leaf in (leaves or self.leaves()).items()}
        before = (x["kv"], x.get("z")) if "kv" in x else None
        with torch.device(DEVICE):
            outputs = form(x["q"], x["k"], x["v"], log_decay=x.get("log_decay"), initial_state=before, **self.options())
        return dict(zip(("o", "kv", "z"), outputs, strict=True))


def gradients(run, leaves, directions):
    """Outputs, and the gradients of their products with the directions."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    outputs = run(leaves)
    pairs = [(x, directions[name].to(x.dtype)) for name, x in outputs.items() if name in directions and x.requires_grad]
    found = torch.autograd.grad([x for x, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True)
    return outputs, {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), found, strict=True)
    }


def limit_of(case, name):
    """Of a gradient."""
    if name == "log_decay":
        return DECAY_TOLERANCE[case.dtype]
    return TOLERANCE[case.dtype]


def check(case, *, backward=True):
    """Outputs and gradients against the quadratic form."""
    got, want = case.run(), case.exact()
    assert got["o"].dtype == case.dtype
    assert got["o"].is_contiguous()
    for name, x in got.items():
        assert error(x, want[name]) <= TOLERANCE[case.dtype], (name, error(x, want[name]))
    if not backward:
        return
    directions = {name: case.normal(*x.shape, dtype=x.dtype) for name, x in got.items()}
    _, found = gradients(case.run, case.leaves(), directions)
    leaves = case.leaves()
    if case.log_decay is not None:
        leaves["log_decay"] = case.log_decay.expand(*case.q.shape[:2], -1)
    _, wanted = gradients(case.exact, leaves, directions)
    for name, x in found.items():
        want, least = wanted[name], 0.0
        if name == "log_decay" and x.dim() == 1:  # a sum over all tokens, which may come close to 0: beside its terms
            want, least = want.sum((0, 1)), float(want.norm())
        assert x.dtype == case.leaves()[name].dtype
        assert error(x, want, least) <= limit_of(case, name), ("d" + name, error(x, want, least))


# --- sizes, decays, options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "dims", [(20, 20), (36, 20), (64, 64), (100, 72), (128, 128), (96, 256), (200, 130), (256, 256), (16, 3)]
)
def test_head_sizes(dims, dtype):
    check(Case(dtype, 2, 300, 2, key_dim=dims[0], value_dim=dims[1], decay="H", state=True))
    check(Case(dtype, 1, 150, 2, key_dim=dims[0], value_dim=dims[1], normalize=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("normalize", [False, True])
def test_decays_and_grouped_heads(normalize, decay, dtype):
    for dims in ((36, 20), (128, 128)):
        check(Case(dtype, 2, 170, 4, 2, *dims, decay=decay, normalize=normalize, state=True, seed=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", [None, "H", "BTHk"])
def test_masks_and_sequences(decay, normalize, dtype):
    options = {"decay": decay, "normalize": normalize}
    check(Case(dtype, 2, 190, 2, 1, 64, 32, mask=True, state=True, **options))
    lengths = [0, 70, 1, 0, 264, 5, 0]
    check(Case(dtype, 1, 340, 2, 1, 64, 32, lengths=lengths, state=True, **options))
    check(Case(dtype, 1, 340, 2, 1, 64, 32, lengths=lengths, mask=True, **options))
    case = Case(dtype, 1, 340, 2, lengths=lengths, **options)
    want = case.run()["o"]
    case.cu_seqlens = case.cu_seqlens.int()
    assert torch.equal(case.run()["o"], want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 500, 1000, 2049])
def test_lengths(time, dtype):
    check(Case(dtype, 1, time, 2, decay="H", normalize=time % 2 == 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_enough_heads_to_fill_the_gpu(dtype):
    """So that no sequence is split; few heads everywhere else are."""
    for case in (
        Case(dtype, 16, 200, 48, key_dim=64, decay="H"),
        Case(dtype, 8, 150, 96, 12, key_dim=128, decay="Hk", normalize=True),
    ):
        directions = {"o": case.normal(*case.q.shape)}
        got, found = gradients(case.run, case.leaves(), directions)
        group = case.q.shape[2] // case.k.shape[2]
        for b, h in ((0, 0), (3, 7), (7, 11)):  # each alone
            queries, keys = slice(group * h, group * (h + 1)), slice(h, h + 1)
            heads = {"q": queries, "k": keys, "v": keys}
            leaves = {name: case.leaves()[name][b : b + 1, :, heads[name]] for name in "qkv"}
            leaves["log_decay"] = case.log_decay[keys]
            direction = {"o": directions["o"][b : b + 1, :, queries]}
            want, wanted = gradients(case.exact, leaves, direction)
            assert error(got["o"][b : b + 1, :, queries], want["o"]) <= TOLERANCE[dtype]
            for name in "qkv":
                assert error(found[name][b : b + 1, :, heads[name]], wanted[name]) <= limit_of(case, name), name


def test_a_sequence_without_tokens_or_no_sequence():
    for options in ({"batch": 0}, {"time": 0}, {"time": 0, "lengths": []}, {"time": 0, "lengths": [0, 0]}):
        for dtype, normalize in itertools.product((torch.bfloat16, torch.float32), (False, True)):
            case = Case(dtype, **({"time": 5} | options), decay="H", normalize=normalize, state=True)
            check(case)
            assert torch.equal(case.run()["kv"], case.kv)


def test_scale_and_eps_and_z_without_a_normalizer():
    check(Case(torch.bfloat16, state="z", decay="H"))
    case = Case(torch.float32, normalize=True)
    o = freqrank.linear_attention(case.q, case.k, case.v, scale=0.3, normalize=True, eps=0.5)[0]
    with torch.device(DEVICE):
        want = reference.linear_attention(case.q, case.k, case.v, scale=0.3, normalize=True, eps=0.5)[0]
    assert error(o, want) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strong_decay_and_a_reset(dtype):
    case = Case(dtype, 1, 330, 2, 1, 36, 20, decay="BTH", strength=20.0, state=True)
    check(case)
    case.log_decay[:, 40:42] = -torch.inf
    case.log_decay[:, 100, 0] = -1e30
    check(case)


def test_autocast_casts_as_a_matrix_product_does():
    case = Case(torch.float32, decay="H")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        o = case.run()["o"]
    assert o.dtype == torch.bfloat16
    half = Case(torch.bfloat16, decay="H")
    assert torch.equal(o, half.run()["o"])


# --- long sequences -----------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_8192_tokens(normalize, dtype):
    room(16)  # the pairs of tokens in float64, several times
    for dim, decay in ((64, "H"), (128, None), (256, "H")):
        check(Case(dtype, 1, 8192, 1, key_dim=dim, decay=decay, strength=0.05, normalize=normalize, state=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_recurrence(normalize, dtype):
    time = 10000 if CUDA else 2000
    case = Case(dtype, 1, time, 2, 1, 64, 64, decay="H", strength=0.01, normalize=normalize, state=True)
    got = case.run()
    before = (case.kv.cpu(), None if case.z is None else case.z.cpu())
    want = reference.linear_attention_recurrent(  # token by token: on the CPU, which needs no launches
        case.q.cpu(), case.k.cpu(), case.v.cpu(), log_decay=case.log_decay.cpu(), normalize=normalize,
        initial_state=before,
    )  # fmt: skip
    for x, y in zip(got.values(), want, strict=False):
        assert error(x, y) <= TOLERANCE[dtype]


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gamma", [31 / 32, 1.0])
def test_a_million_tokens(gamma, dtype):
    case = Case(dtype, heads=1)
    shape = (1, 1_000_000, 1, 64)
    generator = torch.Generator(DEVICE).manual_seed(0)  # there: the host would take longer than the kernels
    case.q, case.k, case.v, direction = (
        torch.randn(shape, device=DEVICE, generator=generator).to(dtype) for _ in range(4)
    )
    case.log_decay = torch.tensor([math.log(gamma)], device=DEVICE)
    outputs, found = gradients(case.run, case.leaves(), {"o": direction})
    leaves = {name: x.cpu().double() for name, x in case.leaves().items()}
    exact, wanted = gradients(case.run, leaves, {"o": direction.cpu()})
    for name, x in outputs.items():
        assert x.isfinite().all()
        assert error(x, exact[name]) <= TOLERANCE[dtype], (name, error(x, exact[name]))
    for name in "qkv":
        assert found[name].isfinite().all()
        assert error(found[name], wanted[name]) <= TOLERANCE[dtype], (name, error(found[name], wanted[name]))
    assert found["log_decay"].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", [1, 64, 300, 1999])
def test_a_state_that_is_handed_on(cut, dtype):
    case = Case(dtype, 2, 2000, 2, 1, 64, 36, decay="BTH", strength=0.01, normalize=True, state=True)
    whole = case.run()
    state, parts = LinearAttentionState(case.kv, case.z), []
    for begin, end in ((0, cut), (cut, 2000)):
        q, k, v, g = (x[:, begin:end] for x in (case.q, case.k, case.v, case.log_decay))
        o, state = freqrank.linear_attention(
            q, k, v, log_decay=g, normalize=True, initial_state=state, output_final_state=True
        )
        parts.append(o)
    assert error(torch.cat(parts, 1), whole["o"]) <= 2 * TOLERANCE[dtype]
    assert error(state.kv, whole["kv"]) <= 2 * TOLERANCE[dtype]
    assert error(state.z, whole["z"]) <= 2 * TOLERANCE[dtype]


# --- strides ------------------------------------------------------------------------------------------------------


def strided(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The same numbers in other places."""
    if kind == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "channels first":
        return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    if kind == "every third":
        wide = x.new_full((*x.shape[:3], 3 * x.shape[3]), math.nan)
        wide[..., ::3] = x
        return wide[..., ::3]
    wide = x.new_full((*x.shape[:3], x.shape[3] + 1), math.nan)  # rows that do not begin at multiples of 16 bytes
    wide[..., 1:] = x
    return wide[..., 1:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["heads first", "channels first", "every third", "misaligned"])
def test_strides(kind, dtype):
    case = Case(dtype, 2, 170, 2, key_dim=64, value_dim=32, decay="BTH", normalize=True)
    directions = {"o": case.normal(2, 170, 2, 32)}
    want, wanted = gradients(case.run, case.leaves(), directions)
    case.q, case.k, case.v = (strided(x, kind) for x in (case.q, case.k, case.v))
    case.log_decay = case.log_decay.transpose(1, 2).contiguous().transpose(1, 2)
    got, found = gradients(case.run, case.leaves(), {"o": strided(directions["o"], kind)})
    for name, x in (got | found).items():
        assert error(x, (want | wanted)[name]) <= TOLERANCE[dtype], name


def test_expanded_tensors():
    case = Case(torch.bfloat16, 2, 170, 4, key_dim=64, decay="BTH")
    case.k, case.v = (x[:, :, :1].expand(-1, -1, 4, -1) for x in (case.k, case.v))
    case.log_decay = case.log_decay[:, :1].expand(-1, 170, -1)
    check(case)


def apart(x: torch.Tensor, dim: int, storage: torch.Tensor) -> torch.Tensor:
    """The same numbers, the indices of one dimension 2^30 elements apart."""
    strides, step = [0] * x.dim(), 1
    for d in reversed(range(x.dim())):
        strides[d] = 2**30 if d == dim else step
        step *= 1 if d == dim else x.shape[d]
    view = storage.as_strided(x.shape, strides)
    view.copy_(x)
    return view


@needs_cuda
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strides_beyond_two_to_the_31(dtype, dim):
    size = dtype.itemsize
    room(4 * size * 2.1 + 1)
    sizes = {"batch": 2, "time": 90, "heads": 2, "key_dim": 20} | {("batch", "time", "heads", "key_dim")[dim]: 3}
    case = Case(dtype, **sizes)
    directions = {"o": case.normal(*case.v.shape)}
    want, wanted = gradients(case.run, case.leaves(), directions)
    storages = [torch.empty(2**31 + 2**20, dtype=dtype, device=DEVICE) for _ in range(4)]
    case.q, case.k, case.v, directions["o"] = (
        apart(x, dim, s) for x, s in zip((case.q, case.k, case.v, directions["o"]), storages, strict=True)
    )
    got, found = gradients(case.run, case.leaves(), directions)
    for name, x in (got | found).items():
        assert error(x, (want | wanted)[name]) <= TOLERANCE[dtype], name


@needs_cuda
def test_more_than_two_to_the_31_elements():
    room(48)
    heads, dim = 16, 128
    time = 2**31 // (heads * dim) + 3000
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v, do = (
        torch.randn(1, time, heads, dim, dtype=torch.bfloat16, device=DEVICE, generator=generator) for _ in range(4)
    )
    log_decay = torch.full((heads,), math.log(31 / 32), device=DEVICE)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = freqrank.linear_attention(*leaves, log_decay=log_decay)[0]
    found = torch.autograd.grad(o, leaves, do)
    # 2000 tokens later nothing is left of a token
    ends = (slice(0, 3000), slice(time // 2 - 3000, time // 2 + 3000), slice(time - 4000, time))
    for part in ends:
        some = [x.detach()[:, part].clone().requires_grad_() for x in leaves]
        p = freqrank.linear_attention(*some, log_decay=log_decay)[0]
        own = torch.autograd.grad(p, some, do[:, part])
        inner = slice(0 if part.start == 0 else 2000, None if part.stop == time else -2000)
        for x, y in zip((o, *found), (p, *own), strict=True):
            assert error(x[:, part][:, inner], y[:, inner]) <= 2 * TOLERANCE[torch.bfloat16]


# --- containment, repeatability -----------------------------------------------------------------------------------

SHAPES = (
    {"time": 3000, "heads": 1, "decay": "H"},
    {"batch": 8, "time": 130, "heads": 64, "normalize": True},
    {"time": 1500, "heads": 4, "key_heads": 2, "key_dim": 128, "decay": "BTH", "normalize": True, "state": True},
    {"time": 700, "heads": 2, "key_dim": 200, "decay": "BTHk", "lengths": [300, 0, 399, 1], "mask": True},
)


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_repeats_bit_for_bit(dtype, shape):
    case = Case(dtype, **shape)
    directions = {name: case.normal(*x.shape, dtype=x.dtype) for name, x in case.run().items()}
    want, wanted = gradients(case.run, case.leaves(), directions)
    for _ in range(3):
        got, found = gradients(case.run, case.leaves(), directions)
        assert all(torch.equal(got[name], x) for name, x in want.items())
        assert all(torch.equal(found[name], x) for name, x in wanted.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_stay_in_their_sequence_and_head(bad, dtype):
    options = {"decay": "BTH", "normalize": True, "lengths": [700, 600]}
    clean = Case(dtype, 1, 1300, 2, key_dim=36, **options)
    directions = {"o": clean.normal(1, 1300, 2, 36)}
    want, wanted = gradients(clean.run, clean.leaves(), directions)
    for name in "qkv":
        case = Case(dtype, 1, 1300, 2, key_dim=36, **options)
        case.leaves()[name][:, 5, 1] = bad
        got, found = gradients(case.run, case.leaves(), directions)
        for mine, other in ((got["o"], want["o"]), *((found[x], wanted[x]) for x in "qkv")):
            assert torch.equal(mine[:, :, 0], other[:, :, 0])
            assert torch.equal(mine[:, 700:], other[:, 700:])
        assert torch.equal(got["kv"][1], want["kv"][1])
        assert torch.equal(got["kv"][0, 0], want["kv"][0, 0])
        assert not got["o"][:, 5:700, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masked_tokens_leave_no_trace(dtype):
    case = Case(dtype, 2, 900, 2, key_dim=36, decay="BTH", normalize=True, mask=True, state=True)
    directions = {"o": case.normal(2, 900, 2, 36)}
    want, wanted = gradients(case.run, case.leaves(), directions)
    for x in (case.q, case.k, case.v, case.log_decay, directions["o"]):
        x[~case.mask] = math.nan
    got, found = gradients(case.run, case.leaves(), directions)
    for name, x in (got | found).items():
        assert torch.equal(x, (want | wanted)[name]), name
    for x in (got["o"], *(found[name] for name in "qkv")):
        assert x[~case.mask].count_nonzero() == 0


# --- wrong values -------------------------------------------------------------------------------------------------

WRONG_OFFSETS = ([0, 50, 40, 130], [0, 50, 129], [1, 50, 130], [0, 500, 130], [0, -4, 130], [0])


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_wrong_values_become_nan(dtype):
    case = Case(dtype, 1, 130, 2, decay="BTH")
    case.log_decay[0, 80, 1] = 0.5
    o = case.run()["o"]
    assert o[:, 80:, 1].isnan().all()
    assert o[:, :, 0].isfinite().all()
    for offsets in WRONG_OFFSETS:
        case = Case(dtype, 1, 130, 2, decay="BTH", normalize=True)
        case.cu_seqlens = torch.tensor(offsets, device=DEVICE)
        outputs, found = gradients(case.run, case.leaves(), {"o": case.normal(1, 130, 2, 64)})
        for x in (outputs["o"], outputs["kv"], *(found[name] for name in "qkv")):
            assert x.isnan().all()
    q = torch.ones(2, 2, 64, dtype=dtype, device=DEVICE)
    state = LinearAttentionState(torch.zeros(2, 2, 64, 64, device=DEVICE))
    o = freqrank.linear_attention_step(q, q, q, state, log_decay=torch.tensor([-0.1, 0.1], device=DEVICE))
    assert o[:, 0].isfinite().all()
    assert o[:, 1].isnan().all()


@needs_cuda
def test_checks_raise_on_wrong_values():
    freqrank.set_checks(True)
    try:
        case = Case(torch.bfloat16, 1, 130, 2, decay="H")
        case.run()
        case.log_decay[1] = 0.5
        with pytest.raises(ValueError, match=r"log_decay must not be positive; its largest value is 0\.5"):
            case.run()
        q = torch.ones(2, 2, 64, device=DEVICE)
        with pytest.raises(ValueError, match="log_decay must not be positive"):
            freqrank.linear_attention_step(
                q, q, q, LinearAttentionState(torch.zeros(2, 2, 64, 64, device=DEVICE)), log_decay=case.log_decay
            )
        for offsets in WRONG_OFFSETS:
            case = Case(torch.bfloat16, 1, 130, 2)
            case.cu_seqlens = torch.tensor(offsets, device=DEVICE)
            with pytest.raises(ValueError, match="cu_seqlens must start at 0, not decrease and end at T = 130"):
                case.run()
    finally:
        freqrank.set_checks(False)


def test_bad_input():
    case = Case(torch.bfloat16)
    with pytest.raises(TypeError, match="k must have the dtype of q"):
        freqrank.linear_attention(case.q, case.k.float(), case.v)
    with pytest.raises(ValueError, match="between 1 and 256"):
        freqrank.linear_attention(*(torch.ones(1, 2, 1, 257, device=DEVICE) for _ in range(3)))
    if CUDA:
        with pytest.raises(ValueError, match="k must be on the device of q"):
            freqrank.linear_attention(case.q, case.k.cpu(), case.v)


# --- the decoding step --------------------------------------------------------------------------------------------


def decode(case, state, tokens, *more, step=freqrank.linear_attention_step, **options):
    outputs = []
    for t in tokens:
        g = case.log_decay
        outputs.append(
            step(
                case.q[:, t], case.k[:, t], case.v[:, t], state, *more, normalize=case.normalize,
                log_decay=g if g is None or g.dim() == 1 else g[:, t],
                mask=None if case.mask is None else case.mask[:, t], **options,
            )
        )  # fmt: skip
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("normalize", [False, True])
def test_steps_equal_the_scan(normalize, decay, dtype):
    for heads, dims in (((4, 2), (64, 64)), ((2, 2), (36, 20)), ((10, 2), (128, 96)), ((1, 1), (256, 200))):
        case = Case(dtype, 3, 20, *heads, *dims, decay=decay, normalize=normalize, mask=True, state=True)
        want = case.exact()
        state = LinearAttentionState(case.kv.clone(), None if case.z is None else case.z.clone())
        assert error(decode(case, state, range(20)), want["o"]) <= TOLERANCE[dtype]
        assert error(state.kv, want["kv"]) <= TOLERANCE[real(dtype)]
        if normalize:
            assert error(state.z, want["z"]) <= TOLERANCE[real(dtype)]


def test_steps_of_many_sequences_and_of_large_states():
    for batch, heads, dims in ((257, 8, (64, 64)), (1, 1, (512, 512)), (2, 3, (512, 64)), (0, 2, (64, 64))):
        case = Case(torch.float32, batch, 1, heads, key_dim=dims[0], value_dim=dims[1], decay="H", state=True)
        want = case.exact()
        kv = case.kv.transpose(2, 3).contiguous().transpose(2, 3)  # strides are free
        for state in (LinearAttentionState(case.kv), LinearAttentionState(kv)):
            assert error(decode(case, state, [0]), want["o"]) <= 1e-5
            assert error(state.kv, want["kv"]) <= 1e-5


def test_steps_repeat_bit_for_bit_and_leave_masked_rows_alone():
    case = Case(torch.bfloat16, 5, 1, 4, 2, decay="H", normalize=True, state=True)
    case.mask = torch.tensor([[True], [False], [True], [False], [True]], device=DEVICE)
    case.q[1], case.k[3] = math.nan, math.inf
    results = []
    for _ in range(3):
        state = LinearAttentionState(case.kv.clone(), case.z.clone())
        results.append((decode(case, state, [0]), *state))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    o, kv, z = results[0]
    assert torch.equal(kv[1::2], case.kv[1::2])
    assert torch.equal(z[1::2], case.z[1::2])
    assert o[1::2].count_nonzero() == 0


def map_of(case, columns, feature, *, shared=True, weighted=True):
    """The step behind a random map, for :func:`decode`, and a state of its features."""
    batch, _, key_heads, key_dim = case.k.shape
    lead, count = () if shared else (key_heads,), 2 * columns if feature == "softmax_pm" else columns
    projection = case.normal(*lead, key_dim, columns, dtype=real(case.dtype)) * key_dim**-0.5
    options = {"feature": feature, "weights": case.uniform(*lead, count) + 0.5 if weighted else None}
    states = key_heads if case.log_decay is None else case.log_decay.shape[-1]
    kv = case.normal(batch, states, count, case.v.shape[-1], dtype=real(case.dtype))
    return projection, options, kv, case.uniform(batch, states, count)


def exact_behind_a_map(case, projection, options, kv, z):
    tensors = (case.q, case.k, case.v, projection)
    with torch.device(DEVICE):
        return reference.feature_map_attention(
            *(x.double() for x in tensors), log_decay=case.log_decay, initial_state=(kv, z), **options, **case.options()
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", ["softmax", "exp", "softmax_pm"])
@pytest.mark.parametrize("normalize", [False, True])
def test_steps_behind_a_map_equal_the_scan(normalize, feature, dtype):
    variants = (
        ((4, 2), (64, 64), 64, "H", True), ((2, 2), (36, 20), 17, "BTHk", False), ((10, 2), (128, 96), 128, None, True),
        ((1, 1), (256, 200), 256, "BTH", False),
    )  # fmt: skip
    for heads, dims, columns, decay, shared in variants:
        case = Case(dtype, 3, 20, *heads, *dims, decay=decay, mask=True)
        case.normalize = normalize
        projection, options, kv, z = map_of(case, columns, feature, shared=shared, weighted=decay is not None)
        want = exact_behind_a_map(case, projection, options, kv, z)
        for p in (projection, projection.mT.contiguous().mT):
            state = LinearAttentionState(kv.clone(), z.clone())
            o = decode(case, state, range(20), p, step=freqrank.feature_map_attention_step, **options)
            assert error(o, want[0]) <= TOLERANCE[dtype]
            assert error(state.kv, want[1]) <= TOLERANCE[real(dtype)]
            assert error(state.z, want[2]) <= TOLERANCE[real(dtype)]


def test_steps_behind_a_map_of_many_sequences_and_of_large_states():
    for batch, heads, dims, columns in (
        (257, 8, (64, 64), 64),
        (1, 1, (256, 512), 512),
        (140, 3, (32, 512), 48),
        (0, 2, (64, 64), 64),
    ):
        case = Case(torch.float32, batch, 1, heads, key_dim=dims[0], value_dim=dims[1], decay="H")
        projection, options, kv, z = map_of(case, columns, "softmax")
        want = exact_behind_a_map(case, projection, options, kv, z)
        state = LinearAttentionState(kv, z)
        o = decode(case, state, [0], projection, step=freqrank.feature_map_attention_step, **options)
        assert error(o, want[0]) <= 1e-5
        assert error(kv, want[1]) <= 1e-5
        assert error(z, want[2]) <= 1e-5


def test_steps_behind_a_map_repeat_bit_for_bit_and_leave_masked_rows_alone():
    case = Case(torch.bfloat16, 5, 1, 4, 2, decay="H", normalize=True)
    case.mask = torch.tensor([[True], [False], [True], [False], [True]], device=DEVICE)
    case.q[1], case.k[3] = math.nan, math.inf
    projection, options, kv, z = map_of(case, 40, "softmax_pm")
    results = []
    for _ in range(3):
        state = LinearAttentionState(kv.clone(), z.clone())
        o = decode(case, state, [0], projection, step=freqrank.feature_map_attention_step, **options)
        results.append((o, *state))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    o, after, after_z = results[0]
    assert torch.equal(after[1::2], kv[1::2])
    assert torch.equal(after_z[1::2], z[1::2])
    assert o[1::2].count_nonzero() == 0
    assert o.isfinite().all()


# --- feature maps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", ["softmax", "exp", "softmax_pm"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay_gradient", [False, True])
def test_feature_maps(decay_gradient, normalize, feature, dtype):
    """With a gradient of the decay features are tensors, without one 16-bit ones are made inside the kernels."""
    count = 96 if feature == "softmax_pm" else 48
    variants = ({"decay": "BTH"}, {"decay": "BTHk", "mask": True}, {"lengths": [90, 0, 110]})
    for shared, options in zip((True, False, True), variants, strict=True):
        batch = 1 if "lengths" in options else 2
        case = Case(dtype, batch, 200, 4, 2, 36, 20, normalize=normalize, **options)
        lead = () if shared else (2,)
        projection = 0.1 * case.normal(*lead, 36, 48, dtype=real(dtype))
        weights = case.uniform(*lead, count) + 0.5
        directions = {"o": case.normal(batch, 200, 4, 20)}

        def run(x, function=freqrank.feature_map_attention, case=case):
            log_decay = x.get("log_decay", case.log_decay)
            more = {"feature": feature, "weights": x["weights"], "log_decay": log_decay, "eps": 0.1}
            return {"o": function(x["q"], x["k"], x["v"], x["projection"], **more, **case.options())[0]}

        def exact(x, run=run):
            with torch.device(DEVICE):
                return run({name: leaf.double() for name, leaf in x.items()}, reference.feature_map_attention)

        leaves = case.leaves() | {"projection": projection, "weights": weights}
        if not decay_gradient:
            leaves.pop("log_decay", None)
        got, found = gradients(run, leaves, directions)
        want, wanted = gradients(exact, leaves, directions)
        assert error(got["o"], want["o"]) <= FEATURE_TOLERANCE[dtype]
        for name, x in found.items():
            allowed = DECAY_TOLERANCE if name == "log_decay" else FEATURE_TOLERANCE
            assert error(x, wanted[name]) <= allowed[dtype], ("d" + name, error(x, wanted[name]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", ["idct", "dct"])
@pytest.mark.parametrize("dim", [64, 128, 100])
def test_dijiang(dim, transform, dtype):
    case = Case(dtype, 1, 500, 4, 2, dim, 64, decay="H")
    signs = torch.where(case.uniform(dim) > 0.5, 1.0, -1.0)
    for scales in (case.uniform(dim) + 0.5, case.uniform(2, dim) + 0.5):
        options = {"transform": transform, "signs": signs, "log_decay": case.log_decay, "normalize": True}
        o, state = freqrank.dijiang_attention(case.q, case.k, case.v, scales, output_final_state=True, **options)
        with torch.device(DEVICE):
            want, kv, z = reference.dijiang_attention(case.q, case.k, case.v, scales, **options)
        assert error(o, want) <= FEATURE_TOLERANCE[dtype]
        assert error(state.kv, kv) <= FEATURE_TOLERANCE[dtype]
        assert error(state.z, z) <= FEATURE_TOLERANCE[dtype]


def test_features_are_not_tensors():
    case = Case(torch.bfloat16, 1, 32768, 8, 8, 64, 64, decay="H")
    size = case.q.numel() * case.q.element_size()
    scales = case.uniform(64)

    def peak(run):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result

    options = {"log_decay": case.log_decay}
    used, _ = peak(lambda: freqrank.dijiang_attention(case.q, case.k, case.v, scales, **options))
    assert used < 1.5 * size  # o, and the states of a split sequence
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    used, o = peak(lambda: freqrank.dijiang_attention(*leaves, scales, **options)[0])
    used, _ = peak(lambda: torch.autograd.grad(o.sum(), leaves))
    assert used < 8.5 * size  # dq, dk, dv, and the gradients of features in float32


# --- streams, graphs, threads -------------------------------------------------------------------------------------


def everything(case, directions, scales):
    """Forward, backward, a feature map, a step and one behind a map; all of what they give."""
    outputs, found = gradients(case.run, case.leaves(), directions)
    more = []
    if case.cu_seqlens is None:
        more.append(freqrank.dijiang_attention(case.q, case.k, case.v, scales, mask=case.mask)[0])
        state = LinearAttentionState(*(outputs[name].detach().clone() for name in ("kv", "z") if name in outputs))
        with torch.no_grad():
            more.append(decode(case, state, [0]))
            more += [decode(case, state, [0], scales, step=freqrank.dijiang_attention_step), state.kv]
    return [x.detach() for x in (*outputs.values(), *found.values(), *more)]


def arguments_of(case):
    directions = {name: case.normal(*x.shape, dtype=x.dtype) for name, x in case.run().items()}
    return directions, case.uniform(case.q.shape[-1]) + 0.5


@needs_cuda
@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_graphs(dtype, shape):
    case = Case(dtype, **shape)
    directions, scales = arguments_of(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything(case, directions, scales)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(case, directions, scales)
    for seed in (1, 2):
        other = Case(dtype, **shape, seed=seed)
        for name, x in case.leaves().items():
            x.copy_(other.leaves()[name])
        if case.mask is not None:
            case.mask.copy_(other.mask)
        graph.replay()
        want = everything(case, directions, scales)
        assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


@needs_cuda
@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_side_streams(shape):
    case = Case(torch.bfloat16, **shape)
    directions, scales = arguments_of(case)
    want = everything(case, directions, scales)
    late = Case(torch.bfloat16, **shape)
    for x in (late.q, late.k, late.v):
        x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # so that work put on another stream would run before the copies
        for x, data in ((late.q, case.q), (late.k, case.k), (late.v, case.v)):
            x.copy_(data)
        got = everything(late, directions, scales)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_cuda
def test_threads_with_a_stream_each():
    cases = [Case(torch.bfloat16, **shape) for shape in SHAPES]
    arguments = [arguments_of(case) for case in cases]
    want = [everything(case, *more) for case, more in zip(cases, arguments, strict=True)]
    torch.cuda.synchronize()
    wrong = []

    def work(first: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for n in range(3 * len(cases)):
                    i = (first + n) % len(cases)
                    got = everything(cases[i], *arguments[i])
                    if not all(torch.equal(a, b) for a, b in zip(got, want[i], strict=True)):
                        wrong.append(i)
        except Exception as error:  # a thread's own end is not seen
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_cuda
@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_never_synchronises(dtype, shape):
    case = Case(dtype, **shape)
    directions, scales = arguments_of(case)

    assert_waits_for_nothing(lambda: everything(case, directions, scales))


@needs_cuda
@pytest.mark.skipif(CUDA and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensor():
    case = Case(torch.bfloat16, decay="H")
    want = case.run()["o"]
    x = {name: leaf.to("cuda:1") for name, leaf in case.leaves().items()}
    with torch.cuda.device(0):
        o = case.run(x)["o"]
    assert o.device == x["q"].device
    assert torch.equal(o.cpu(), want.cpu())
    assert torch.cuda.current_device() == 0


# --- autograd, the compiler and its kin ---------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck_and_gradgradcheck(normalize):
    case = Case(torch.float64, 1, 5, 2, 1, 3, 2, decay="BTH", normalize=normalize, state=True)
    leaves = {name: x.requires_grad_() for name, x in case.leaves().items()}

    def run(*tensors):
        return tuple(case.run(dict(zip(leaves, tensors, strict=True))).values())

    # decays near 0 must not become positive when they are moved
    leaves["log_decay"] = (leaves["log_decay"].detach() - 0.1).requires_grad_()
    tensors = tuple(leaves.values())
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def test_opcheck():
    case = Case(torch.float32, 1, 9, 2, 1, 3, 4, decay="BTH", normalize=True, state=True, lengths=[4, 5], mask=True)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v, case.log_decay)]
    op = torch.ops.freqrank.linear_attention.default
    torch.library.opcheck(op, (*leaves, case.mask, case.cu_seqlens, case.kv, case.z, 0.5, True, 1e-6, True))
    torch.library.opcheck(op, (*leaves[:3], None, None, None, None, None, 0.5, False, 1e-6, False))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    if backend == "inductor":
        pytest.importorskip("triton")
    torch._dynamo.reset()

    def f(q, k, v, g):
        o, state = freqrank.linear_attention(q, k, v, log_decay=g, normalize=True, output_final_state=True)
        return o.float().sum() + state.kv.square().sum()

    compiled = torch.compile(f, fullgraph=True, backend=backend, dynamic=True)
    for time in (70, 150):
        case = Case(torch.bfloat16, 1, time, 2, 1, decay="H", normalize=True)
        results = []
        for function in (f, compiled):
            leaves = [x.detach().clone().requires_grad_() for x in case.leaves().values()]
            value = function(*leaves)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
