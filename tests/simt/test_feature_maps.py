"""Feature maps in the CUDA kernels of linear attention, on the host executor, against a quadratic form in float64."""

import freqrank_simt as simt
import numpy as np
import pytest
import torch
from test_linear_attention import HALF, MANY_SMS, ONE_SM, Case, array, error

TOLERANCE = 5e-3
FEATURES = ("softmax", "exp", "softmax_pm")


class MapCase(Case):
    """A case whose q and k are channels of which a map makes the features."""

    without_gradient = ("log_decay",)

    def __init__(
        self, dtype="bfloat16", batch=1, time=70, heads=1, key_heads=None, channels=64, products=64, value_dim=64, *,
        feature="softmax", weighted=False, by_head=False, strength=1.0, normalize=False, state=False, seed=0, **options,
    ):  # fmt: skip
        super().__init__(
            dtype, batch, time, heads, key_heads, channels, value_dim, normalize=normalize, seed=seed, **options
        )
        self.feature, self.scale, self.eps = feature, 1.0, 1e-3
        key_heads = key_heads or heads
        self.features = products * (2 if feature == "softmax_pm" else 1)
        head = (key_heads,) if by_head else ()
        self.projection = strength * torch.randn(*head, channels, products) / channels**0.5
        self.weights = torch.rand(*head, self.features) + 0.5 if weighted else None
        if state:
            shape = (self.sequences, self.state_heads, self.features)
            z = torch.rand(shape) if normalize else None
            self.initial = (torch.randn(*shape, value_dim), z)
        if normalize:  # channels of both signs again
            self.q, self.k = (torch.randn(x.shape).to(self.dtype) for x in (self.q, self.k))

    def leaves(self):
        return super().leaves() | {"projection": self.projection, "weights": self.weights}

    def options(self, limits):
        return super().options(limits) | {"feature": 1 + FEATURES.index(self.feature)}

    def state_shape(self):
        return (self.sequences, self.state_heads, self.features)

    def scanned(self, leaves):
        key_heads, projection, weights = self.k.shape[2], leaves["projection"], leaves["weights"]

        def phi(x):
            if self.mask is not None:
                x = torch.where(self.mask[:, :, None, None], x, 0)
            x = x.unflatten(2, (key_heads, -1))
            y = torch.einsum("bthrc,hcm->bthrm", x, projection.expand(key_heads, -1, -1))
            if self.feature == "softmax_pm":
                y = torch.cat([y, -y], -1)
            y = y.exp() if self.feature == "exp" else y.softmax(-1)
            return (y if weights is None else y * weights.expand(key_heads, -1).unsqueeze(1)).flatten(2, 3)

        return phi(leaves["q"]), phi(leaves["k"])


def check(case, limits=ONE_SM, *, backward=True, seed=0, tolerance=TOLERANCE):
    outputs, plan, executor = case.forward(limits, seed)
    errors = {}
    for name, e in zip(("o", "final_kv", "final_z"), case.expected(), strict=True):
        if outputs[name] is not None:
            errors[name] = error(outputs[name], e)
    results = {}
    if backward:
        grads = {
            "grad_o": torch.randn(outputs["o"].shape).to(case.dtype),
            "grad_kv": torch.randn(outputs["final_kv"].shape),
        }
        if case.with_z:
            grads["grad_z"] = torch.randn(outputs["final_z"].shape)
        results, plan, executor = case.backward(grads, outputs, limits, seed)
        for name, e in case.expected(grads)[1].items():
            errors[name] = error(results[name], e)
    print({n: f"{e:.1e}" for n, e in errors.items()})
    assert all(e <= tolerance for e in errors.values()), errors
    return outputs | results, plan, executor


# features of exp may not fit into float16: such calls are not made
MAPS = [(dtype, feature) for dtype in HALF for feature in FEATURES if (dtype, feature) != ("float16", "exp")]


@pytest.mark.parametrize(("dtype", "feature"), MAPS)
@pytest.mark.parametrize("normalize", [False, True])
def test_every_feature(dtype, feature, normalize):
    products = 32 if feature == "softmax_pm" else 64
    check(MapCase(dtype, 2, 70, 2, products=products, feature=feature, normalize=normalize, decay="H", state=True))


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("decay", [None, "H", "Hk", "BTHk", "BTH"])
def test_weights_heads_and_decays(by_head, decay):
    options = {"weighted": True, "by_head": by_head, "decay": decay, "state": True}
    check(MapCase("bfloat16", 2, 70, 4, 2, 40, 24, 20, feature="softmax_pm", **options))
    check(MapCase("float16", 1, 40, 4, 1, 17, 33, 5, **(options | {"weighted": False}), normalize=True))


@pytest.mark.parametrize("dims", [(128, 128, 128), (128, 64, 128), (100, 50, 30), (30, 128, 7), (64, 16, 100)])
@pytest.mark.parametrize("feature", FEATURES)
def test_128_channels_and_features(dims, feature):
    channels, features, value_dim = dims
    products = features // 2 if feature == "softmax_pm" else features
    check(MapCase("bfloat16", 1, 70, 1, None, channels, products, value_dim, feature=feature, weighted=True, decay="H"))


@pytest.mark.parametrize("dims", [(1, 1, 1), (1, 3, 2), (16, 1, 9), (3, 5, 64)])
def test_few_channels_and_features(dims):
    # of one number, rounding is not averaged over others; one softmax feature is 1, and nothing depends on q and k
    channels, products, value_dim = dims
    check(MapCase("bfloat16", 1, 70, 2, None, channels, products, value_dim, feature="exp"), tolerance=1e-2)
    check(MapCase("bfloat16", 1, 70, 2, None, channels, products, value_dim, feature="softmax_pm"), tolerance=1e-2)
    outputs, _, _ = check(MapCase("float16", 1, 70, 2, None, channels, products, value_dim), backward=products > 1)
    assert outputs["o"].isfinite().all()


@pytest.mark.parametrize("normalize", [False, True])
def test_mask_and_several_sequences(normalize):
    options = {"normalize": normalize, "state": True}
    check(MapCase("bfloat16", 2, 90, 2, 1, 36, 28, 20, decay="BTHk", mask=True, **options))
    lengths = [0, 70, 1, 0, 64, 5, 0]
    check(MapCase("bfloat16", 1, 140, 2, None, 36, 28, 20, lengths=lengths, feature="exp", **options))
    check(MapCase("bfloat16", 1, 140, 2, None, 36, 28, 20, decay="H", lengths=lengths, mask=True, normalize=normalize))


@pytest.mark.parametrize("time", [1, 31, 63, 64, 65, 129])
def test_lengths_around_a_chunk(time):
    check(MapCase("bfloat16", 1, time, 1, None, 36, 28, 20, decay="H"))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", [None, "Hk"])
def test_split_over_blocks(normalize, decay):
    for options in ({}, {"state": True, "mask": True}, {"lengths": [300, 0, 400, 68]}):
        case = MapCase("bfloat16", 1, 768, 2, 1, 36, 28, 20, decay=decay, normalize=normalize, **options)
        check(case, MANY_SMS)
        assert case.forward(MANY_SMS)[1]["split"] == ("lengths" not in options)


def test_strides():
    check(MapCase("bfloat16", 2, 70, 2, None, 36, 28, 20, decay="BTH", strided=True))
    case = MapCase("bfloat16", 1, 70, 2, None, 64, 64, 64, weighted=True)
    case.projection = case.projection.T.contiguous().T
    case.weights = torch.stack([case.weights, case.weights], 1)[:, 0]
    check(case)


def test_nearly_even_features():
    # the gradient is a small difference beside what all features have in common
    check(MapCase("bfloat16", 1, 130, 1, strength=0.1), tolerance=2e-2)
    check(MapCase("float16", 1, 130, 1, strength=0.1))


def test_large_products():
    for strength in (30.0, 1000.0):
        outputs, _, _ = check(MapCase("bfloat16", 1, 70, 1, strength=strength), backward=False)
        assert outputs["o"].isfinite().all()
    case = MapCase("bfloat16", 1, 70, 2, feature="exp")
    case.q[0, 5, 1] = 1e4
    outputs, _, _ = case.forward()
    assert not outputs["o"][0, 5, 1].isfinite().all()
    assert outputs["o"][0, :, 0].isfinite().all()
    assert outputs["o"][0, 6:, 1].isfinite().all()


def test_three_seeds_give_the_same_bits():
    case = MapCase("bfloat16", 2, 140, 4, 2, 36, 28, 20, decay="BTHk", weighted=True, normalize=True, state=True)
    grads = {"grad_o": torch.randn(2, 140, 4, 20).bfloat16()}
    results = []
    for seed in (1, 2, 3):
        outputs, _, _ = case.forward(MANY_SMS, seed)
        gradients, _, _ = case.backward(grads, outputs, MANY_SMS, seed)
        results.append([x.clone() for x in (outputs | gradients).values() if x is not None])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_token_changes_nothing_before_it():
    before = MapCase("bfloat16", 1, 140, 2, normalize=True).forward()[0]["o"]
    for t in (0, 63, 64, 100):
        other = MapCase("bfloat16", 1, 140, 2, normalize=True)
        for x in (other.q, other.k, other.v):
            x[:, t] = x[:, t] * 3 + 1
        after = other.forward()[0]["o"]
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


def test_nan_stays_in_its_head_and_sequence():
    options = {"normalize": True, "lengths": [70, 60], "by_head": True}
    grads = {"grad_o": torch.randn(1, 130, 2, 64).bfloat16()}
    clean = MapCase("bfloat16", 1, 130, 2, **options)
    expected = clean.forward()[0]
    expected |= clean.backward(grads, expected)[0]
    for name in ("q", "k", "v", "projection"):
        case = MapCase("bfloat16", 1, 130, 2, **options)
        if name == "projection":
            case.projection[1, 3, 5] = torch.nan
        else:
            getattr(case, name)[:, 5, 1] = torch.nan
        outputs, _, _ = case.forward()
        outputs |= case.backward(grads, outputs)[0]
        for output in ("o", "dq", "dk", "dv"):
            assert torch.equal(outputs[output][:, :, 0], expected[output][:, :, 0])
            if name != "projection":
                assert torch.equal(outputs[output][:, 70:], expected[output][:, 70:])
        assert torch.equal(outputs["dprojection"][0], expected["dprojection"][0])
        assert outputs["o"][:, 5:70, 1].isnan().any()


def test_masked_tokens_leave_no_trace():
    case = MapCase("bfloat16", 1, 130, 2, decay="BTH", weighted=True, normalize=True, mask=True, state=True)
    grads = {"grad_o": torch.randn(1, 130, 2, 64).bfloat16()}
    outputs, _, _ = case.forward()
    gradients, _, _ = case.backward(grads, outputs)
    for x in (case.q, case.k, case.v, case.log_decay, grads["grad_o"]):
        x[~case.mask] = torch.nan
    others, _, _ = case.forward()
    other_gradients, _, _ = case.backward(grads, others)
    for a, b in ((outputs, others), (gradients, other_gradients)):
        for name, x in a.items():
            assert x is None or name == "denominator" or torch.equal(x, b[name]), name
    assert others["o"][~case.mask].count_nonzero() == 0
    assert other_gradients["dq"][~case.mask].count_nonzero() == 0


def test_nothing_to_do():
    for options in ({"batch": 0}, {"time": 0}, {"time": 0, "lengths": []}, {"time": 0, "lengths": [0, 0]}):
        case = MapCase(**({"batch": 1, "time": 5, "heads": 2} | options), weighted=True, state=True)
        outputs, _, _ = case.forward()
        grads = {"grad_o": torch.zeros(outputs["o"].shape).bfloat16()}
        gradients, _, _ = case.backward(grads, outputs)
        assert torch.equal(outputs["final_kv"], case.initial[0].expand_as(outputs["final_kv"]))
        assert gradients["dprojection"].count_nonzero() == 0
        assert gradients["dweights"].count_nonzero() == 0


@pytest.mark.parametrize("dim", [64, 128])
def test_channels_cross_memory_once(dim):
    case = MapCase("bfloat16", 1, 128, 2, None, dim, dim, dim)
    _, plan, executor = case.forward()
    counts = executor.counters[f"linear_attention_bfloat16_{dim}"]
    tokens, fragments, chunks = 2 * 128 * dim * 2, 4 * dim * dim, 2 * 128 // 64
    scan = plan["scans"][0]
    assert (scan["read_bytes"], scan["write_bytes"], scan["mapped"]) == (3 * tokens, tokens, 2)
    # beside q, k and v: the fragments, from the caches, for every tile
    assert counts["global_read_bytes"] == 3 * tokens + chunks * 2 * fragments
    assert counts["global_read_unique_bytes"] == 3 * tokens + fragments
    assert counts["global_written_bytes"] == tokens + 2 * dim * dim * 4
    executor.require_no_bank_conflicts(f"linear_attention_bfloat16_{dim}")


def test_what_no_kernel_takes():
    for options, words in (
        ({"products": 256}, "no kernel of this GPU makes 256 features"),
        ({"channels": 200}, "of 200 channels"),
        ({"value_dim": 129}, "V = 129"),
        ({"dtype": "float32"}, "up to 128 of 16 bits"),
    ):
        case = MapCase(**({"time": 5} | options))
        with pytest.raises(ValueError, match=words):
            simt.linear_attention_plan(case.arrays(), case.options(ONE_SM))
    case = MapCase(time=5, decay="H")
    grads = {"grad_o": array(torch.zeros(1, 5, 1, 64).bfloat16()), "dlog_decay": np.zeros(1, "float32")}
    with pytest.raises(ValueError, match="gradient of a decay"):
        simt.linear_attention_plan(case.arrays() | grads, case.options(ONE_SM))
