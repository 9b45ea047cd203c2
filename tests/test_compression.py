"""Compression: methods against originals written out here, the report against the model, what must not happen."""

import copy
import json
import math
import warnings

import freqrank
import pytest
import torch
from freqrank.lowrank import allocation as al
from freqrank.lowrank import factorize as fz
from freqrank.lowrank.methods import METHODS, Method, register
from freqrank.lowrank.modules import LowRankLinear, shared_groups
from freqrank.lowrank.scales import block_weights, channel_weights, input_scale, pooling
from freqrank.lowrank.statistics import Grams, Magnitudes, observe, read_calibration
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from freqrank.models.architectures import find_architecture  # noqa: E402
from freqrank.models.compression import install  # noqa: E402
from freqrank.models.streaming import BlockStream, evaluating  # noqa: E402
from freqrank.models.whole import backward_bytes, squared_gradients  # noqa: E402

LAYERS, VOCAB = 5, 96


def build(family="Llama", seed=0, dtype=torch.float64, **options):
    """A small random model whose norms have gains of their own."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
        "attn_implementation": "eager",
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**{**sizes, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 2:
                parameter.mul_(5)  # random models start out nearly linear
    return model


def tokens(rows=12, length=24, seed=1):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def compressed(model, ids=None, **options):
    model = copy.deepcopy(model)
    report = freqrank.compress(model, tokens() if ids is None else ids, **{"ratio": 0.4, "progress": False, **options})
    return model, report


@torch.no_grad()
def loss(model, ids=None):
    ids = tokens(seed=2) if ids is None else ids
    return model(ids, labels=ids).loss.item()


def snapshot(model):
    return (
        {name: (type(module), module.training) for name, module in model.named_modules()},
        {name: (id(p), p.clone()) for name, p in model.named_parameters()},
        json.dumps(model.config.to_dict(), default=str),
        {name: sorted(module.__dict__) for name, module in model.named_modules()},
        [len(module._forward_pre_hooks) for module in model.modules()],
    )


def assert_untouched(model, before):
    after = snapshot(model)
    assert after[0] == before[0]
    assert after[2:] == before[2:]
    assert after[1].keys() == before[1].keys()
    for name, (identity, value) in after[1].items():
        assert identity == before[1][name][0]
        assert torch.equal(value.nan_to_num(), before[1][name][1].nan_to_num())


# --- the originals, in a dozen lines each -----------------------------------------------------------------------------


@torch.no_grad()
def all_grams(model, ids):
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n}
    grams = dict.fromkeys(linears, 0)

    def add(name, x):
        grams[name] = grams[name] + x.double().T @ x.double()

    with observe(linears, add):
        model(ids)
    return linears, grams


@torch.no_grad()
def original_basis_sharing(model, ids, keep, n, shared=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
    linears, grams = all_grams(model, ids)
    for role in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        names = [name for name in linears if name.endswith(role)]
        size = n if role in shared else 1
        for group in (names[i : i + size] for i in range(0, len(names), size)):
            s = torch.linalg.cholesky(sum(grams[name] for name in group)).T
            w = torch.cat([linears[name].weight.T for name in group], 1)
            d1, d2 = w.shape[0], w.shape[1] // len(group)
            k = math.floor(keep * d1 * d2 * len(group) / (d1 + d2 * len(group)) + 1e-9)
            u, sigma, vt = torch.linalg.svd(s @ w, full_matrices=False)
            basis = torch.linalg.inv(s) @ u[:, :k] * sigma[:k]
            for name, c in zip(group, vt[:k].split(d2, 1), strict=True):
                linears[name].weight.copy_((basis @ c).T)


@torch.no_grad()
def original_svd_llm(model, ids, keep):
    linears, grams = all_grams(model, ids)
    for name, linear in linears.items():
        w = linear.weight  # [out, in], so their S is lower triangular
        k = math.floor(w.shape[0] * w.shape[1] * keep / sum(w.shape) + 1e-9)
        s = torch.linalg.cholesky(grams[name])
        u, sigma, vt = torch.linalg.svd(w @ s, full_matrices=False)
        root = sigma[:k].sqrt()
        wu, wv = u[:, :k] * root, root[:, None] * vt[:k] @ torch.linalg.inv(s)
        linear.weight.copy_(wu @ wv)


@pytest.mark.parametrize("ratio", [0.2, 0.6])
def test_svd_llm_is_the_original(ratio):
    model = build()
    ours, _ = compressed(model, method="svd-llm", ratio=ratio)
    original_svd_llm(model, tokens(), 1 - ratio)
    assert loss(ours) == pytest.approx(loss(model), abs=1e-9)


@pytest.mark.parametrize(("ratio", "n"), [(0.4, 2), (0.6, 3), (0.2, 5)])
def test_basis_sharing_is_the_original(ratio, n):
    model = build()
    ours, _ = compressed(model, method="basis-sharing", ratio=ratio, group_size=n)
    original_basis_sharing(model, tokens(), 1 - ratio, n)
    assert loss(ours) == pytest.approx(loss(model), abs=1e-9)


def test_svd_is_the_truncated_svd():
    model = build()
    ours, report = compressed(model, method="svd", group_size=3)
    for layer in report.layers:
        u, s, vt = torch.linalg.svd(model.get_submodule(layer.module).weight.detach(), full_matrices=False)
        k = layer.rank
        product = ours.get_submodule(layer.module).dense_weight(torch.float64)
        torch.testing.assert_close(product, u[:, :k] * s[:k] @ vt[:k])
        assert layer.predicted_error == pytest.approx((s[k:].square().sum() / s.square().sum()).sqrt().item(), rel=1e-6)


@torch.no_grad()
def all_magnitudes(model, ids):
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n}
    sums = dict.fromkeys(linears, 0)

    def add(module, args, name):
        sums[name] = sums[name] + args[0].abs().flatten(0, -2).sum(0)

    handles = [m.register_forward_pre_hook(lambda m, x, n=name: add(m, x, n)) for name, m in linears.items()]
    model(ids)
    for handle in handles:
        handle.remove()
    return {name: value / ids.numel() for name, value in sums.items()}


def scaled_svd(weight, s, keep):
    """The truncated SVD of W diag(s) with s divided out, as ASVD and FWSVD do it; ``weight`` is [out, in]."""
    k = math.floor(weight.numel() * keep / sum(weight.shape) + 1e-9)
    u, sigma, vt = torch.linalg.svd(weight.detach() * s, full_matrices=False)
    return u[:, :k] * sigma[:k] @ (vt[:k] / s)


def assert_close(actual, expected, relative=1e-8):
    assert (actual - expected).norm() <= relative * expected.norm()


@pytest.mark.parametrize(("ratio", "exponent"), [(0.2, 1.0), (0.4, 0.5), (0.6, 2.0), (0.8, 1.0)])
def test_asvd_is_the_original(ratio, exponent):
    model = build()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[::7] = 0  # down reads channels that are always zero
            block.post_attention_layernorm.weight[3] = 1e-4
    ours, report = compressed(model, method="asvd", ratio=ratio, exponent=exponent, group_size=3)
    assert report.settings["exponent"] == exponent
    assert report.block_ratio >= ratio
    magnitudes = all_magnitudes(model, tokens())
    assert any(bool((value == 0).any()) for value in magnitudes.values())
    for layer in report.layers:
        s = magnitudes[layer.module] ** (exponent / 2)
        expected = scaled_svd(model.get_submodule(layer.module).weight, s + 1e-6 * s.mean(), 1 - ratio)
        assert_close(ours.get_submodule(layer.module).dense_weight(torch.float64), expected)


def test_asvd_without_exponent_is_svd():
    model = build()
    assert_same(compressed(model, method="asvd", exponent=0.0)[0], compressed(model, method="svd")[0])


def test_asvd_of_an_input_that_is_zero_is_svd_and_says_so():
    model = build()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    ours, report = compressed(model, method="asvd")
    plain, _ = compressed(model, method="svd")
    name = "model.layers.1.self_attn.o_proj"
    assert_close(weights_of(ours)[name], weights_of(plain)[name])
    assert [note for note in report.notes if note.startswith("no magnitude is above zero")] == [
        f"no magnitude is above zero, so that channels weigh the same, for: {name}"
    ]


def test_asvd_does_not_see_a_common_factor_on_an_input():
    values = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values[4] = 0
    torch.testing.assert_close(
        channel_weights(values, 0.5), channel_weights(1e-9 * values, 0.5), rtol=1e-12, atol=1e-18
    )
    with pytest.raises(ValueError, match="asvd factors one linear alone and needs `channels`, its magnitudes"):
        METHODS["asvd"]().pool([torch.eye(4)], 1)


def test_magnitudes():
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    magnitudes = Magnitudes()
    for part in x.split(7):
        magnitudes.add("x", part)
    torch.testing.assert_close(magnitudes.of["x"], x.double().abs().sum(0), rtol=1e-14, atol=0)


def fisher(model, sequences):
    """sum over samples and outputs of the squared gradient of each weight, a sample at a time by plain autograd."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n}
    sums = {name: torch.zeros(linear.in_features, dtype=torch.float64) for name, linear in linears.items()}
    for ids in sequences:
        logits = model(ids[None]).logits[0, :-1]
        loss = -torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), ids[1:]].sum()
        gradients = torch.autograd.grad(loss, [linear.weight for linear in linears.values()], allow_unused=True)
        for name, gradient in zip(linears, gradients, strict=True):
            sums[name] += 0 if gradient is None else gradient.double().square().sum(0)
    return sums


@pytest.mark.parametrize("ratio", [0.2, 0.6, 0.8])
def test_fwsvd_is_the_original(ratio):
    model = build()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[::7] = 0  # the columns of down behind them get no gradient
    ours, report = compressed(model, method="fwsvd", ratio=ratio, group_size=3)
    assert report.block_ratio >= ratio
    sums = fisher(model, tokens())
    assert bool((sums["model.layers.2.mlp.down_proj"] == 0).any())
    for layer in report.layers:
        w = sums[layer.module].sqrt()
        expected = scaled_svd(model.get_submodule(layer.module).weight, w + 1e-6 * w.mean(), 1 - ratio)
        assert_close(ours.get_submodule(layer.module).dense_weight(torch.float64), expected)


def test_fisher_information_of_tokens():
    """With one next token that counts in each sequence, a sequence is a token."""
    model = build()
    ids = tokens(20, 2)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n}
    expected = fisher(model, ids)
    # each pair amid padding, on either side, must give the same
    padded, mask = torch.zeros(20, 7, dtype=torch.long), torch.zeros(20, 7, dtype=torch.long)
    for row, pair in enumerate(ids):
        padded[row, row % 6 : row % 6 + 2], mask[row, row % 6 : row % 6 + 2] = pair, 1
    for calibration in (ids, {"input_ids": padded, "attention_mask": mask}):
        ours = squared_gradients(model, linears, read_calibration(calibration))
        for name, value in ours.items():
            assert_close(value, expected[name], 1e-12)
    # a gap inside a text: what comes after it is not predicted, but reads what is before
    text, gap = tokens(1, 9)[0], torch.ones(1, 9, dtype=torch.long)
    gap[0, 4] = 0
    ours = squared_gradients(model, linears, read_calibration({"input_ids": text[None], "attention_mask": gap}))
    logits = model(text[None], attention_mask=gap).logits[0]
    loss = sum(-torch.log_softmax(logits[t - 1], -1)[text[t]] for t in (1, 2, 3, 6, 7, 8))
    name = "model.layers.1.mlp.gate_proj"
    (gradient,) = torch.autograd.grad(loss, [linears[name].weight])
    assert_close(ours[name], gradient.square().sum(0), 1e-12)


def test_fwsvd_leaves_the_model_alone():
    model = build()
    model.train()
    model(tokens(seed=7), labels=tokens(seed=7)).loss.backward()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.grad = None
    fired = []
    for parameter in (model.model.norm.weight, model.model.layers[0].mlp.up_proj.weight):
        parameter.register_hook(fired.append)
        parameter.register_post_accumulate_grad_hook(fired.append)
    before = snapshot(model)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    architecture = find_architecture(model)
    linears = {"up": architecture.linear(1, "up"), "q": architecture.linear(3, "q")}
    with evaluating(model):
        found = squared_gradients(model, linears, read_calibration(tokens()))
    assert all(bool((value > 0).all()) for value in found.values())
    assert_untouched(model, before)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])
    assert fired == []


def test_fwsvd_of_a_linear_without_gradient_is_svd_and_says_so():
    model = build()
    name = "model.layers.1.mlp.up_proj"
    model.get_submodule(name).register_forward_hook(lambda module, args, output: output.detach())
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight.zero_()  # nothing comes back to q, k and v
    ours, report = compressed(model, method="fwsvd")
    plain, _ = compressed(model, method="svd")
    blank = [name, *(f"model.layers.3.self_attn.{role}_proj" for role in ("q", "k", "v"))]
    for module in blank:
        assert_close(weights_of(ours)[module], weights_of(plain)[module])
    assert [note for note in report.notes if note.startswith("no gradient is above zero")] == [
        f"no gradient is above zero, so that channels weigh the same, for: {', '.join(blank)}"
    ]
    assert any("12 backward passes through the whole model, of up to 24 tokens" in note for note in report.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fwsvd_in_few_bits(dtype):
    model = build(dtype=dtype)
    with torch.no_grad():
        for block in model.model.layers:  # gradients within reach of float16
            block.input_layernorm.weight.mul_(0.25)
    small, report = compressed(model, method="fwsvd", ratio=0.3)
    assert {p.dtype for p in small.parameters()} == {dtype}
    sums = fisher(copy.deepcopy(model).double(), tokens())
    for layer in report.layers:
        module = small.get_submodule(layer.module)
        w = sums[layer.module].sqrt()
        expected = scaled_svd(model.get_submodule(layer.module).weight.double(), w, 0.7)
        assert_close(module.dense_weight(torch.float64), expected, 1e-3 if dtype == torch.float32 else 0.1)


def test_the_estimate_of_a_backward_pass():
    model = build(hidden_size=64, intermediate_size=160, attn_implementation="sdpa")
    saved = {}

    def pack(x):
        if not any(x.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in model.parameters()):
            saved[x.untyped_storage().data_ptr()] = x  # alive, so no other tensor takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(tokens(1, 100), labels=tokens(1, 100))
    held = sum(x.untyped_storage().nbytes() for x in saved.values())
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    activations = backward_bytes(linears, 100, VOCAB) - backward_bytes(linears, 0, VOCAB)
    assert 0.5 * held < activations < 2 * held


def test_a_loss_needs_a_head_and_a_second_token():
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        freqrank.compress(model.model, tokens(), method="fwsvd", progress=False)
    for ids in (tokens(60, 1), {"input_ids": tokens(30, 4), "attention_mask": torch.tensor([[1, 0, 1, 0]] * 30)}):
        with pytest.raises(ValueError, match="sequences of two tokens or more"):
            freqrank.compress(model, [ids], method="fwsvd", progress=False)
    assert_untouched(model, before)
    with torch.no_grad():
        model.lm_head.weight[3] = math.inf
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"gradient of model.layers.0.self_attn.q_proj has NaN or Inf"):
        freqrank.compress(model, tokens(), method="fwsvd", progress=False)
    assert_untouched(model, before)


@torch.no_grad()
def original_svd_llm_update(model, ids, keep):
    """Its U factor solved again, layer by layer: min_U ||Y - X V^T Sigma U^T||, X from the compressed layers before."""
    linears, grams = all_grams(model, ids)
    for name, linear in linears.items():
        w = linear.weight.clone()
        k = math.floor(w.numel() * keep / sum(w.shape) + 1e-9)
        s = torch.linalg.cholesky(grams[name])
        _, sigma, vt = torch.linalg.svd(w @ s, full_matrices=False)
        v = sigma[:k, None] * vt[:k] @ torch.linalg.inv(s)
        seen = {}
        with observe({"x": linear}, seen.__setitem__):
            model(ids)
        linear.weight.copy_(torch.linalg.lstsq(seen["x"] @ v.T, seen["x"] @ w.T).solution.T @ v)


def test_sequential_refit_is_the_update_of_svd_llm(monkeypatch):
    model = build()
    damped, _ = compressed(model, method="svd-llm", refit="sequential", ratio=0.5)
    monkeypatch.setattr(fz, "_REFIT_DAMPING", 0.0)
    ours, _ = compressed(model, method="svd-llm", refit="sequential", ratio=0.5)
    plain, _ = compressed(model, method="svd-llm", ratio=0.5)
    expected = copy.deepcopy(model)
    original_svd_llm_update(expected, tokens(), 0.5)
    for name, weight in weights_of(ours).items():
        assert_close(weight, expected.get_submodule(name).weight, 1e-7)
        assert_close(weights_of(damped)[name], weight, 1e-3)
    last = "model.layers.4.mlp.down_proj"
    assert (weights_of(plain)[last] - weights_of(ours)[last]).norm() > 0.01 * weights_of(ours)[last].norm()


# --- how the methods relate -------------------------------------------------------------------------------------------


def weights_of(model):
    return {n: m.dense_weight(torch.float64) for n, m in model.named_modules() if isinstance(m, LowRankLinear)}


def assert_same(one, other, tolerance=1e-7):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance / 100)


def test_group_size_one_makes_the_methods_one():
    model = build()
    first, _ = compressed(model, method="svd-llm", group_size=1)
    for options in ({"method": "basis-sharing"}, {"method": "lisc"}, {"method": "lisc", "block_weight": "norm"}):
        other, _ = compressed(model, group_size=1, **options)
        assert_same(first, other)


@pytest.mark.parametrize("group_size", [2, 3, 5])
def test_lisc_without_scale_is_basis_sharing(group_size):
    model = build()
    one, _ = compressed(model, method="lisc", scale="none", group_size=group_size)
    other, _ = compressed(model, method="basis-sharing", group_size=group_size)
    assert_same(one, other)
    third, _ = compressed(model, method="lisc", exponent=0.0, group_size=group_size)
    assert_same(one, third)


def spread(model, scales):
    """The same function with norm gains of layer l times s_l and the weights that follow divided by it."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for s, block in zip(scales, model.model.layers, strict=True):
            for norm, linears in (
                (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
                (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
            ):
                norm.weight.mul_(s)
                for linear in linears:
                    linear.weight.div_(s)
    return model


@pytest.mark.parametrize("scale", ["trace", "frobenius", "spectral"])
@pytest.mark.parametrize("block_weight", ["norm", "sqrt-scale"])
def test_block_weighted_lisc_does_not_see_a_spread_of_scales(scale, block_weight):
    model = build()
    wide = spread(model, [0.1, 0.4, 1.0, 3.0, 0.2])
    assert loss(wide) == pytest.approx(loss(model), abs=1e-10)
    options = {"group_size": 3, "ratio": 0.6, "scale": scale}
    one, plain = compressed(model, block_weight=block_weight, **options)
    other, report = compressed(wide, block_weight=block_weight, **options)
    assert loss(other) == pytest.approx(loss(one), abs=1e-8)
    # the report shows scales, and that the layers' weight did not follow them
    q = [layer for layer in report.layers if layer.role == "q"][:3]
    assert max(x.input_scale for x in q) > 50 * min(x.input_scale for x in q)
    same = [layer.output_share for layer in plain.layers if layer.role == "q"][:3]
    assert [layer.output_share for layer in q] == pytest.approx(same, rel=1e-6)


def test_lisc_without_block_weight_reweights_the_layers_and_says_so():
    model = build()
    options = {"group_size": 3, "ratio": 0.6}
    one, _ = compressed(model, **options)
    other, report = compressed(spread(model, [0.1, 0.4, 1.0, 3.0, 0.2]), **options)
    assert abs(loss(other) - loss(one)) > 1e-4
    q = [layer for layer in report.layers if layer.role == "q"][:3]
    assert q[0].output_share > 0.9  # small inputs, large weights
    assert sum(layer.output_share for layer in q) == pytest.approx(1)
    assert [layer.input_share for layer in q] == pytest.approx([1 / 3] * 3)
    assert q[0].alpha > q[1].alpha > q[2].alpha


@pytest.mark.parametrize("group_size", [2, 3, 4, 6])
def test_alpha_flattens_the_errors_where_only_inputs_are_scaled(group_size):
    generator = torch.Generator().manual_seed(0)
    n, d2, t, scales = 48, 64, 512, (0.05, 1.0, 0.3, 3.0, 0.1, 0.6)
    grams, weights = [], []
    decay = torch.logspace(0, -1.5, n, dtype=torch.float64)
    for s in scales:
        rotation = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        x = s * torch.randn(t, n, generator=generator, dtype=torch.float64) * decay @ rotation
        grams.append(x.T @ x)
        weights.append(torch.randn(n, d2, generator=generator, dtype=torch.float64))

    def errors(layers, method, **options):
        """Relative output error of each layer of a group."""
        ours, theirs = [grams[i] for i in layers], [weights[i] for i in layers]
        rule = METHODS[method](**options)
        pool = rule.pool(ours, t)
        f = fz.factorize(theirs, pool.root, 30, rule.block_weights(theirs, pool.scales))
        pairs = (fz.squared_error(w, f.basis @ c, g) for w, c, g in zip(theirs, f.coefficients, ours, strict=True))
        return [math.sqrt(lost / total) for lost, total in pairs]

    for first in range(0, len(scales), group_size):
        layers = range(first, min(first + group_size, len(scales)))
        plain, calibrated = errors(layers, "basis-sharing"), errors(layers, "lisc")
        smallest, largest = (pick(range(len(layers)), key=lambda i: scales[layers[i]]) for pick in (min, max))
        assert max(plain) / min(plain) > 1.8
        assert max(calibrated) / min(calibrated) < 1.35
        assert calibrated[smallest] < 0.7 * plain[smallest]
        assert calibrated[largest] > plain[largest]  # what it costs
        half = errors(layers, "lisc", exponent=0.5)
        assert max(calibrated) < max(half) < max(plain)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"method": "basis-sharing"}, {"method": "lisc", "block_weight": "norm"}], ids=str)
def test_depth_weight_is_a_power_of_its_base(options):
    model = build()
    ours, report = compressed(model, group_size=3, depth_weight=2.0, ratio=0.6, **options)
    _, before = compressed(model, group_size=3, ratio=0.6, **options)
    assert report.settings["depth_weight"] == 2.0
    assert "depth weight 2.0" in str(report)
    assert "depth weight" not in str(before)
    for group, other in zip(report.groups, before.groups, strict=True):
        b, undeep = ([layer.block_weight for layer in g.layers] for g in (group, other))
        assert sum(b) == pytest.approx(len(b))
        ratios = [(x / y) / (b[0] / undeep[0]) for x, y in zip(b, undeep, strict=True)]
        assert ratios == pytest.approx([0.5**i for i in range(len(b))])
    # early layers of a group are nearer to the original than without, the last one is further from it
    q = [[layer.error for layer in r.layers if layer.role == "q"][:3] for r in (report, before)]
    assert q[0][0] < q[1][0]
    assert q[0][2] > q[1][2]
    # written out for one group: alpha pools the Grams, b weights the columns
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    _, grams = all_grams(model, tokens())
    up = [layer for layer in before.layers if layer.module in names]
    s = torch.linalg.cholesky(sum(layer.alpha * grams[layer.module] for layer in up)).T
    w = torch.cat([model.get_submodule(x.module).weight.T * x.block_weight * 0.5**i for i, x in enumerate(up)], 1)
    u, sigma, vt = torch.linalg.svd(s @ w, full_matrices=False)
    k = up[0].rank
    basis = torch.linalg.inv(s) @ u[:, :k] * sigma[:k]
    for i, (x, rows) in enumerate(zip(up, vt[:k].split(56, 1), strict=True)):
        expected = (basis @ rows).T / (x.block_weight * 0.5**i)
        assert_close(ours.get_submodule(x.module).dense_weight(torch.float64), expected, 1e-7)


def test_depth_weight_changes_nothing_where_nothing_is_shared():
    model = build()
    plain, _ = compressed(model, group_size=1)
    assert_same(compressed(model, group_size=1, depth_weight=3.0)[0], plain)
    assert_same(compressed(model, share="modules", depth_weight=3.0)[0], compressed(model, share="modules")[0])
    assert_same(compressed(model, group_size=2, depth_weight=1.0)[0], compressed(model, group_size=2)[0])
    with pytest.warns(UserWarning, match="no layers share a basis here, so depth_weight changes nothing"):
        compressed(model, method="svd", depth_weight=2.0)


# --- the decomposition ------------------------------------------------------------------------------------------------


def random_problem(n, d2, layers, t, seed=0, steep=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(t, n, generator=generator, dtype=torch.float64)
    x *= 10 ** torch.linspace(0, -steep, n, dtype=torch.float64)
    weights = [torch.randn(n, d2, generator=generator, dtype=torch.float64) for _ in range(layers)]
    return x, weights


@pytest.mark.parametrize(
    ("n", "d2", "layers"), [(24, 20, 1), (24, 20, 3), (24, 24, 1), (24, 5, 3), (40, 7, 5), (6, 40, 1)]
)
def test_basis_needs_no_inverse(n, d2, layers):
    x, weights = random_problem(n, d2, layers, 100, steep=2)
    gram, k = x.T @ x, 4
    b = [0.5 + i for i in range(layers)]
    f = fz.factorize(weights, gram, k, b)
    s = torch.linalg.cholesky(gram).T
    w = torch.cat([weight * scale for weight, scale in zip(weights, b, strict=True)], 1)
    u, sigma, vt = torch.linalg.svd(s @ w, full_matrices=False)
    basis = torch.linalg.inv(s) @ u[:, :k] * sigma[:k]
    for c, rows, scale in zip(f.coefficients, vt[:k].split(d2, 1), b, strict=True):
        torch.testing.assert_close(f.basis @ c, basis @ rows / scale, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(f.spectrum[: len(sigma)], sigma.square(), rtol=1e-9, atol=1e-9 * float(sigma[0] ** 2))
    lost = [
        b_ * b_ * fz.squared_error(w_, f.basis @ c, gram)[0]
        for w_, c, b_ in zip(weights, f.coefficients, b, strict=True)
    ]
    assert sum(f.lost) == pytest.approx(float(sigma[k:].square().sum()), rel=1e-9)
    assert f.lost == pytest.approx(lost, rel=1e-6)
    torch.testing.assert_close(fz.squared_singular_values(weights, gram, b), f.spectrum)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("case", ["few tokens", "zero channels", "massive token", "zero input"])
def test_hard_grams(case, layers):
    x, weights = random_problem(32, 24, layers, 16 if case == "few tokens" else 400)
    if case == "zero channels":
        x[:, [0, 7, 31]] = 0
    elif case == "massive token":
        x[3] *= 1e6
    elif case == "zero input":
        x.zero_()
    k = 10
    f = fz.factorize(weights, x.T @ x, k)
    w = torch.cat(weights, 1)
    # no square root of a Gram matrix here: the optimum from the data itself
    y = x @ w
    optimum = torch.linalg.svdvals(y)[k:].square().sum()
    lost = (y - x @ f.basis @ torch.cat(f.coefficients, 1)).square().sum()
    assert f.basis.isfinite().all()
    assert lost <= optimum * (1 + 1e-4) + 1e-18 * y.square().sum()
    if layers == 3:
        assert f.whitening == ("eigh" if case == "zero input" else "cholesky")
        assert (f.damping > 0) == (case in ("few tokens", "zero channels"))


def test_full_rank_is_exact_and_loss_falls_with_rank():
    x, weights = random_problem(16, 12, 2, 100)
    losses = [sum(fz.factorize(weights, x.T @ x, k).lost) for k in range(1, 17)]
    assert losses == sorted(losses, reverse=True)
    f = fz.factorize(weights, x.T @ x, 16)
    for weight, c in zip(weights, f.coefficients, strict=True):
        torch.testing.assert_close(f.basis @ c, weight)


def test_a_planted_basis_is_found():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(32, 6, generator=generator, dtype=torch.float64)
    weights = [basis @ torch.randn(6, 20, generator=generator, dtype=torch.float64) for _ in range(3)]
    x = torch.randn(100, 32, generator=generator, dtype=torch.float64)
    f = fz.factorize(weights, x.T @ x, 6)
    assert sum(f.lost) <= 1e-12 * sum(f.energy)
    for weight, c in zip(weights, f.coefficients, strict=True):
        torch.testing.assert_close(f.basis @ c, weight)


def test_order_of_layers_permutes_coefficients_and_common_factors_do_nothing():
    x, weights = random_problem(24, 20, 3, 100)
    f, g = fz.factorize(weights, x.T @ x, 7), fz.factorize(weights[::-1], 9.0 * (x.T @ x), 7)
    for c, d in zip(f.coefficients, g.coefficients[::-1], strict=True):
        torch.testing.assert_close(f.basis @ c, g.basis @ d)


def test_refit_is_least_squares_and_keeps_what_the_data_does_not_touch():
    x, (weight,) = random_problem(24, 20, 1, 200)
    generator = torch.Generator().manual_seed(3)
    basis = torch.randn(24, 6, generator=generator, dtype=torch.float64)
    start = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    gram = x.T @ x
    solution = torch.linalg.lstsq(x @ basis, x @ weight).solution
    torch.testing.assert_close(fz.refit(basis, start, gram, gram @ weight), solution, rtol=1e-4, atol=1e-4)
    # inputs in a plane: coefficients move in two directions only, however large the others started
    thin = x[:, :2] @ torch.randn(2, 24, generator=generator, dtype=torch.float64)
    gram = thin.T @ thin
    fitted = fz.refit(basis, 1e3 * start, gram, gram @ weight)
    assert torch.linalg.matrix_rank(fitted - 1e3 * start, rtol=1e-5) == 2
    before, after = (fz.squared_error(weight, basis @ c, gram)[0] for c in (1e3 * start, fitted))
    assert after < 1e-9 * before
    assert torch.equal(fz.refit(basis, start, 0 * gram, 0 * gram @ weight), start)


@pytest.mark.parametrize("seed", range(8))
def test_refit_bears_a_text_of_few_words(seed):
    # Four tokens excite four directions; along the basis' others B^T G B is rounding, and not positive definite.
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(4, 32, generator=generator, dtype=torch.float64)
    x = words.repeat(200, 1)
    weights = [0.1 * torch.randn(32, 32, generator=generator, dtype=torch.float64) for _ in range(2)]
    gram = x.mT @ x
    f = fz.factorize(weights, 2 * gram, 17)
    for weight, coefficient in zip(weights, f.coefficients, strict=True):
        fitted = fz.refit(f.basis, coefficient, gram, gram @ weight)
        torch.testing.assert_close(x @ f.basis @ fitted, x @ weight, rtol=1e-4, atol=1e-4)
        assert fitted.abs().max() < 10 * coefficient.abs().max()


def test_scales():
    x, weights = random_problem(12, 9, 2, 50)
    gram = x.T @ x
    assert input_scale(gram, 50, "trace") == pytest.approx(float(x.square().mean()))
    assert input_scale(gram, 50, "frobenius") == pytest.approx(float(gram.norm()) / 50)
    assert input_scale(gram, 50, "spectral") == pytest.approx(float(torch.linalg.matrix_norm(x, 2) ** 2) / 50)
    assert pooling([2.0, 0.0, 4.0]) == [1.0, 1.0, 0.5]
    assert block_weights([0 * weights[0], weights[1]], [1, 1], "norm") == [1.0, 1.0]
    assert block_weights(weights, [4.0, 16.0], "sqrt-scale") == pytest.approx([2 / 3, 4 / 3])


# --- ranks ------------------------------------------------------------------------------------------------------------

RANKS = {  # (inputs, outputs) -> layers in a group -> rank when .8, .6, .4, .2 of the parameters are kept
    (4096, 4096): {1: (1638, 1228, 819, 409), 2: (2184, 1638, 1092, 546), 4: (2621, 1966, 1310, 655),
                   8: (2912, 2184, 1456, 728), 16: (3084, 2313, 1542, 771), 32: (3177, 2383, 1588, 794)},
    (4096, 11008): {1: (2388, 1791, 1194, 597), 2: (2762, 2072, 1381, 690), 4: (2997, 2248, 1498, 749),
                    8: (3131, 2348, 1565, 782), 16: (3202, 2401, 1601, 800), 32: (3239, 2429, 1619, 809)},
    (11008, 4096): {1: (2388, 1791, 1194, 597), 2: (3757, 2818, 1878, 939), 4: (5267, 3950, 2633, 1316),
                    8: (6591, 4943, 3295, 1647)},
    (4096, 1024): {1: (655, 491, 327, 163), 2: (1092, 819, 546, 273), 4: (1638, 1228, 819, 409),
                   8: (2184, 1638, 1092, 546), 16: (2621, 1966, 1310, 655), 32: (2912, 2184, 1456, 728)},
    (4096, 14336): {1: (2548, 1911, 1274, 637), 2: (2867, 2150, 1433, 716), 4: (3058, 2293, 1529, 764),
                    8: (3163, 2372, 1581, 790), 16: (3219, 2414, 1609, 804), 32: (3247, 2435, 1623, 811)},
    (14336, 4096): {1: (2548, 1911, 1274, 637), 2: (4170, 3127, 2085, 1042)},
    (3584, 512): {1: (358, 268, 179, 89), 2: (637, 477, 318, 159), 4: (1042, 781, 521, 260)},
    (3584, 18944): {1: (2411, 1808, 1205, 602), 2: (2619, 1964, 1309, 654), 4: (2737, 2053, 1368, 684)},
}  # fmt: skip


@pytest.mark.parametrize("shape", RANKS)
def test_ranks_of_real_shapes(shape):
    d1, d2 = shape
    for n, expected in RANKS[shape].items():
        for ratio, k in zip((0.2, 0.4, 0.6, 0.8), expected, strict=True):
            group = al.Shape(d1, n * d2)
            assert al.uniform_rank(group, ratio) == k
            assert k * (d1 + n * d2) <= (1 - ratio) * group.dense
            assert k <= min(d1, n * d2)
            assert al.allocate("uniform", [group], ratio) == [k]


def test_ratio_is_decimal():
    # 1 - 0.8 is a little less than a fifth in binary, which would cost a direction here
    assert al.uniform_rank(al.Shape(10, 10), 0.8) == 1
    with pytest.raises(ValueError, match=r"ratio 0.99 leaves no direction .* at most 0.8"):
        al.allocate("uniform", [al.Shape(10, 10)], 0.99)


@given(data=st.data(), ratio=st.floats(0.05, 0.8))
@settings(max_examples=60, deadline=None)
def test_no_allocation_exceeds_the_target(data, ratio):
    sizes = data.draw(st.lists(st.tuples(st.integers(24, 90), st.integers(24, 200)), min_size=1, max_size=6))
    shapes = [al.Shape(*size) for size in sizes]
    decays = data.draw(st.lists(st.floats(0, 3), min_size=len(shapes), max_size=len(shapes)))
    spectra = [
        torch.exp(-decay * torch.arange(min(s.inputs, s.outputs), dtype=torch.float64))
        for s, decay in zip(shapes, decays, strict=True)
    ]
    numbers = st.one_of(st.floats(0, 9), st.sampled_from([1.0, math.nan, math.inf]))
    losses = [{rank: data.draw(numbers) for rank in al.trial_ranks(shape, ratio)} for shape in shapes]
    for kind in al.ALLOCATIONS:
        ranks = al.allocate(kind, shapes, ratio, spectra, losses)
        cost = [s.dense if k is None else k * s.per_rank for s, k in zip(shapes, ranks, strict=True)]
        assert sum(cost) <= (1 - ratio) * sum(s.dense for s in shapes) + 1e-6
        for s, k, c in zip(shapes, ranks, cost, strict=True):
            assert k is None or (1 <= k <= min(s.inputs, s.outputs) and c < s.dense)


def test_auto_leaves_a_flat_matrix_dense():
    flat, steep = torch.ones(40), 100.0 ** -torch.arange(40)
    ranks = al.allocate("auto", [al.Shape(40, 40), al.Shape(40, 40)], 0.2, [1000 * flat, steep])
    assert ranks[0] is None
    assert ranks[1] is not None


@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_sensitivity_is_the_search_of_asvd(ratio):
    model, ids = build(num_hidden_layers=2), tokens()
    ours, report = compressed(model, method="asvd", ratio=ratio, allocation="sensitivity")
    magnitudes = all_magnitudes(model, ids)
    trials, size = [], {}
    for name, a in magnitudes.items():
        copied = copy.deepcopy(model)
        linear = copied.get_submodule(name)
        weight, s = linear.weight.detach().clone(), a.sqrt() + 1e-6 * a.sqrt().mean()
        size[name] = weight.shape
        for keep in sorted({1 - ratio, *(i / 10 for i in range(1, 10))}):
            if math.floor(weight.numel() * keep / sum(weight.shape) + 1e-9) > 0:
                with torch.no_grad():
                    linear.weight.copy_(scaled_svd(weight, s, keep))
                trials.append((loss(copied, ids), name, math.floor(weight.numel() * keep / sum(weight.shape) + 1e-9)))
    budget = (1 - ratio) * sum(d1 * d2 for d1, d2 in size.values())
    for threshold in sorted(value for value, _, _ in trials):  # one threshold after the other, lowest first
        ranks = dict.fromkeys(size)
        for value, name, rank in trials:
            if value <= threshold:
                ranks[name] = rank if ranks[name] is None else min(ranks[name], rank)
        cost = {n: math.prod(size[n]) if k is None else k * sum(size[n]) for n, k in ranks.items()}
        if sum(cost.values()) <= budget:
            break
    assert {layer.module: layer.rank for layer in report.layers} == ranks
    assert len(set(ranks.values())) > 2
    assert report.parameters_after == sum(cost.values()) <= budget
    for name, rank in ranks.items():
        if rank is None:
            assert torch.equal(ours.get_submodule(name).weight, model.get_submodule(name).weight)
    (note,) = [note for note in report.notes if note.startswith("sensitivity:")]
    assert f"{len({(name, rank) for _, name, rank in trials})} runs of the whole model over 288 tokens" in note
    assert f"{loss(model, ids):.4f} nats a token" in note


def test_sensitivity_takes_a_sample_and_needs_a_head(monkeypatch):
    from freqrank.models import compression

    model = build(num_hidden_layers=1)
    monkeypatch.setattr(compression, "_TRIAL_TOKENS", 100)
    _, report = compressed(model, allocation="sensitivity")
    assert any("runs of the whole model over 96 tokens" in note for note in report.notes)
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        freqrank.compress(model.model, tokens(), allocation="sensitivity", progress=False)


# --- the report -------------------------------------------------------------------------------------------------------


def count(model):
    return sum(p.numel() for p in model.parameters()), sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 2},
        {"group_size": 1, "method": "svd"},
        {"group_size": 3, "method": "asvd"},
        {"group_size": 3, "method": "fwsvd"},
        {"group_size": 7},
        {"share": "modules"},
        {"share": "both", "refit": "own"},
        {"allocation": "auto"},
        {"allocation": "effective-rank"},
        {"allocation": "sensitivity", "method": "asvd", "ratio": 0.3},
        {"allocation": "sensitivity", "share": "both", "refit": "cross"},
        {"allocation": "sensitivity", "method": "fwsvd", "ratio": 0.75},
        {"ratio": 0.03, "allocation": "auto"},
    ],
    ids=str,
)
def test_the_report_counts_what_is_there(options):
    model = build(tie_word_embeddings=True)
    small, report = compressed(model, **options)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n}
    assert {layer.module for layer in report.layers} == linears
    dense_weights = sum(model.get_submodule(name).weight.numel() for name in linears)
    assert report.parameters_before == dense_weights
    assert (report.model_parameters_before, report.model_bytes_before) == count(model)
    assert (report.model_parameters_after, report.model_bytes_after) == count(small)
    assert report.parameters_before - report.parameters_after == count(model)[0] - count(small)[0]
    assert report.bytes_before - report.bytes_after == count(model)[1] - count(small)[1]
    ratio = options.get("ratio", 0.4)
    assert ratio <= report.block_ratio < ratio + (0.1 if options.get("allocation") == "sensitivity" else 0.05)
    assert report.model_ratio == pytest.approx(1 - count(small)[0] / count(model)[0])
    for layer in report.layers:
        module = small.get_submodule(layer.module)
        assert layer.rank == (module.rank if isinstance(module, LowRankLinear) else None)
        assert layer.parameters_after == module.weight.numel()
        if layer.rank is None:
            assert torch.equal(module.weight, model.get_submodule(layer.module).weight)
            assert any("dense" in note and layer.module in note for note in report.notes)
    assert {frozenset(names) for names in shared_groups(small)} == {
        frozenset(layer.module for layer in group.layers) for group in report.groups if group.rank is not None
    }
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert torch.equal(small.lm_head.weight, model.lm_head.weight)
    assert small.freqrank_report is report
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["block_ratio"] == report.block_ratio
    text = str(report)
    assert f"{report.block_ratio:.2%}" in text
    assert f"{report.model_ratio:.2%}" in text
    assert all(len(line) < 220 for line in text.splitlines()[:3])


@pytest.mark.parametrize("options", [{}, {"share": "modules"}, {"share": "both"}, {"group_size": 5, "ratio": 0.2},
                                     {"allocation": "auto", "ratio": 0.03}], ids=str)  # fmt: skip
def test_operations_are_those_of_a_forward_pass(options):
    from torch.utils.flop_counter import FlopCounterMode

    model = build()
    small, report = compressed(model, method="basis-sharing", **options)
    for each, counted in ((model, report.operations_before), (small, report.operations_after)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            each(torch.arange(10)[None])
        products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
        assert products == 2 * 10 * (counted + each.lm_head.weight.numel())
    for when in ("before", "after"):
        total = sum(getattr(group, f"operations_{when}") for group in report.groups)
        assert total == getattr(report, f"operations_{when}") == report.to_dict()[f"operations_{when}"]
    assert f"{report.operations_before:,} -> {report.operations_after:,}" in str(report)


def test_the_report_says_where_factors_are_no_faster():
    """A basis of five layers is there once and multiplied by five times: fewer parameters, more operations."""
    report = compressed(build(), method="basis-sharing", group_size=5, ratio=0.2)[1]
    [q] = [group for group in report.groups if group.layers[0].role == "q"]
    assert q.rank == math.floor(0.8 * 32 * 160 / 192)
    assert (q.operations_before, q.operations_after) == (5 * 32 * 32, 5 * q.rank * 64)
    assert q.parameters_after < q.parameters_before < q.operations_after
    [note] = [note for note in report.notes if "not faster" in note]
    assert f"q of blocks 0-4 (rank {q.rank} of 32: {q.operations_after / q.operations_before:.2f} times)" in note
    assert " o of block" not in note
    report = compressed(build(), method="basis-sharing", group_size=1, ratio=0.2)[1]
    assert report.operations_after == report.parameters_after
    assert not [note for note in report.notes if "not faster" in note]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_predicted_errors_are_measured(method):
    model = build()
    small, report = compressed(model, method=method, group_size=2, block_weight="norm" if method == "lisc" else None)
    _, grams = all_grams(model, tokens())
    for group in report.groups:
        # "best" fits coefficients again, to what they were found for
        assert group.measured_error == pytest.approx(group.predicted_error, rel=1e-3 if method == "best" else 1e-6)
        for layer in group.layers:
            weight = model.get_submodule(layer.module).weight.detach()
            if layer.rank is None:
                assert layer.error == layer.predicted_error == 0
                continue
            product = small.get_submodule(layer.module).dense_weight(torch.float64)
            own = [(w @ grams[layer.module] * w).sum() for w in (weight - product, weight)]
            assert layer.error == pytest.approx((own[0] / own[1]).sqrt().item(), rel=1e-6)
            if method in ("svd-llm", "basis-sharing", "lisc") and len(group.layers) == 1:
                assert layer.error == pytest.approx(layer.predicted_error, rel=1e-6)


def test_dense_groups_report_the_shares_of_factored_ones(monkeypatch):
    from freqrank.models import compression

    model = build()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(3)
    options = {"group_size": 2, "block_weight": "norm", "ratio": 0.1}
    _, factored = compressed(model, **options)
    sites = []
    group = compression.group_linears

    def grouped(*args):
        found = group(*args)
        sites.append([{site.role for site in one.sites} for one in found])
        return found

    monkeypatch.setattr(compression, "group_linears", grouped)
    monkeypatch.setattr(compression, "allocate", lambda *_: [None if roles == {"q"} else 1 for roles in sites[-1]])
    _, dense = compressed(model, **options)
    for one, other in zip(factored.layers, dense.layers, strict=True):
        assert (other.rank is None) == (other.role == "q")
        assert other.output_share == pytest.approx(one.output_share, rel=1e-9)


def test_damping_is_reported():
    model = build()
    with torch.no_grad():
        for block in model.model.layers[:2]:
            block.input_layernorm.weight[3] = 0
    _, report = compressed(model, group_size=2)
    first = next(group for group in report.groups if [layer.role for layer in group.layers] == ["q", "q"])
    assert first.damping > 0
    assert first.whitening == "cholesky"
    assert f"{first.damping:.0e}" in str(report)


def test_odd_last_group_uses_its_own_size():
    _, report = compressed(build(), group_size=2)
    q = [group for group in report.groups if group.layers[0].role == "q"]
    assert [[layer.layer for layer in group.layers] for group in q] == [[0, 1], [2, 3], [4]]
    assert [group.rank for group in q] == [al.uniform_rank(al.Shape(32, n * 32), 0.4) for n in (2, 2, 1)]
    private = [group for group in report.groups if group.layers[0].role in ("o", "down")]
    assert all(len(group.layers) == 1 for group in private)


# --- refit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lisc", "asvd", "fwsvd"])
def test_own_refit_lowers_every_layer_error(method):
    model = build()
    options = {"method": method, "group_size": 5, "ratio": 0.6}
    _, plain = compressed(model, **options)
    _, refitted = compressed(model, refit="own", **options)
    for a, b in zip(plain.layers, refitted.layers, strict=True):
        assert a.module == b.module
        assert b.error <= a.error * (1 + 1e-9)
    shared = [(a, b) for a, b in zip(plain.layers, refitted.layers, strict=True) if a.role in ("q", "up")]
    assert sum(b.error for _, b in shared) < 0.999 * sum(a.error for a, _ in shared)


def test_prefix_refits():
    model = build()
    options = {"group_size": 3, "ratio": 0.6}
    models = {how: compressed(model, refit=how, **options)[0] for how in (None, "own", "sequential", "cross")}
    # what block 0 reads is the same in both models
    for how in ("sequential", "cross"):
        for role in ("q", "k", "v"):
            name = f"model.layers.0.self_attn.{role}_proj"
            torch.testing.assert_close(weights_of(models[how])[name], weights_of(models["own"])[name])
    # each later linear is the best for its inputs in the compressed model: written out for one of them
    name = "model.layers.3.mlp.gate_proj"
    seen = {}
    for which, m in (("original", model), ("sequential", models["sequential"]), ("cross", models["cross"])):
        with torch.no_grad(), observe({which: m.get_submodule(name)}, seen.__setitem__):
            m(tokens())
    for how, target in (("sequential", seen["sequential"]), ("cross", seen["original"])):
        layer = models[how].get_submodule(name)
        reduced = seen[how] @ layer.basis.mT
        y = target @ model.get_submodule(name).weight.mT
        best = torch.linalg.lstsq(reduced, y).solution
        torch.testing.assert_close(layer.weight.mT.detach(), best, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    def distance(m):
        return float((m(tokens()).logits - model(tokens()).logits).norm())

    assert distance(models["cross"]) < min(distance(models[how]) for how in (None, "own", "sequential"))


# --- streaming and calibration data -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [("Llama", {}), ("Mistral", {"sliding_window": 8, "num_key_value_heads": 2}),
     ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "num_key_value_heads": 1}),
     ("Qwen3", {"head_dim": 16, "num_key_value_heads": 2})],
)  # fmt: skip
def test_blocks_see_what_they_see_in_the_model(family, options):
    model = build(family, **options)
    architecture = find_architecture(model)
    _, expected = all_grams(model, tokens())
    stream = BlockStream(architecture, read_calibration([tokens()[:5], tokens()[5:]]))
    with evaluating(model):
        for layer in range(LAYERS):
            grams = Grams()
            stream.advance(grams.add)
            for roles in architecture.inputs:
                for role in roles:
                    name = architecture.full_name(layer, architecture.roles[role])
                    torch.testing.assert_close(grams.of[roles[0]], expected[name])
    small, report = compressed(model)
    assert report.block_ratio >= 0.4
    assert small(tokens()).logits.isfinite().all()
    sharing = {layer.role for group in report.groups if len(group.layers) > 1 for layer in group.layers}
    assert sharing == ({"q", "k", "v", "gate", "up"} if family == "Llama" else {"q", "gate", "up"})


def test_biases_stay():
    model = build("Qwen2", num_key_value_heads=2)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.bias.normal_()
    small, _ = compressed(model, refit="cross")
    for a, b in zip(model.model.layers, small.model.layers, strict=True):
        assert torch.equal(a.self_attn.q_proj.bias, b.self_attn.q_proj.bias)


# (transformers' own eager attention gives NaN in float64 where padding is on the left)
@pytest.mark.parametrize(("side", "attention"), [("left", "sdpa"), ("right", "sdpa"), ("right", "eager")])
def test_padding_does_not_count(side, attention):
    model = build(attn_implementation=attention)
    short, long = tokens(6, 20), tokens(6, 24, seed=5)
    padded = torch.cat([torch.zeros(6, 4, dtype=torch.long), short][:: 1 if side == "left" else -1], 1)
    mask = torch.cat([torch.zeros(6, 4), torch.ones(6, 20)][:: 1 if side == "left" else -1], 1).long()
    both = {"input_ids": torch.cat([padded, long]), "attention_mask": torch.cat([mask, torch.ones(6, 24).long()])}
    one, a = compressed(model, [both], refit="cross")
    other, b = compressed(model, [short, long], refit="cross")
    assert a.tokens == b.tokens == 6 * 44
    # rotary positions are relative, so left padding shifts nothing; but its angles are float32
    assert_same(one, other, 1e-4 if side == "left" else 1e-7)


def test_iterables_are_consumed_once():
    model, taken = build(), []

    def stream():
        for part in tokens().split(5):
            taken.append(part)
            yield {"input_ids": part} if len(taken) == 2 else part

    one, _ = compressed(model, stream(), allocation="auto", refit="cross")
    assert len(taken) == 3
    other, _ = compressed(model, tokens(), allocation="auto", refit="cross")
    assert_same(one, other)


def test_repeats_bitwise():
    model = build(dtype=torch.float32)
    one, other = (compressed(model)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = build(dtype=dtype)
    small, report = compressed(model, refit="own")
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert report.bytes_after == report.parameters_after * (4 if dtype == torch.float32 else 2)
    double, _ = compressed(build(dtype=dtype).double(), refit="own")
    difference = small(tokens()).logits.double() - double(tokens()).logits
    assert difference.norm() < (1e-3 if dtype == torch.float32 else 0.3) * double(tokens()).logits.norm()


def test_few_tokens_warn_with_both_numbers():
    with pytest.warns(UserWarning, match=r"40 tokens, fewer than the 56 rows"):
        _, report = compressed(build(), tokens(2, 20))
    assert any("40 tokens" in note for note in report.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compressed(build())


def test_switches_of_other_methods_warn():
    with pytest.warns(UserWarning, match="block_weight is a switch of 'lisc'; 'basis-sharing' ignores it"):
        compressed(build(), method="basis-sharing", block_weight="norm")
    with pytest.warns(UserWarning, match="exponent is a switch of 'asvd', 'lisc'; 'svd' ignores it"):
        compressed(build(), method="svd", exponent=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("svd", "asvd", "lisc"):
            _, report = compressed(build(), method=method, exponent=1.0)
            assert report.settings["exponent"] == 1.0


def test_training_state_and_grad_flags_are_kept():
    model = build()
    model.train()
    model.model.layers[1].mlp.eval()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    small, _ = compressed(model)
    assert small.model.layers[0].self_attn.q_proj.training
    assert not small.model.layers[1].mlp.up_proj.training
    assert not small.model.layers[0].self_attn.q_proj.weight.requires_grad
    assert small.model.layers[0].self_attn.q_proj.basis.requires_grad  # block 1 has it too, and trains it
    assert small.model.layers[1].self_attn.q_proj.weight.requires_grad
    small(tokens(), labels=tokens()).loss.backward()
    assert small.model.layers[2].mlp.up_proj.basis.grad.norm() > 0


def test_progress_goes_to_standard_error(capsys):
    compressed(build(), progress=True)
    assert capsys.readouterr().out == ""


# --- saving's side ----------------------------------------------------------------------------------------------------


def test_install_takes_the_settings_that_compress_leaves():
    model = build()
    small, report = compressed(model, group_size=3, share="both")
    spec = json.loads(json.dumps(small.config.quantization_config.lowrank))
    assert spec["method"] == "lisc"
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(model.config).double()
    new = install(empty, spec)
    assert len(new) == len(report.layers)
    assert next(iter(new.values())).basis.is_meta
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}
    assert shared_groups(empty) == shared_groups(small)
    with pytest.raises(ValueError, match="spec must be"):
        install(empty, {})


# --- what must not happen ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio must be between 0 and 1"),
        ({"ratio": 1.0}, "ratio must be between 0 and 1"),
        ({"ratio": -0.1}, "ratio must be between 0 and 1"),
        ({"ratio": float("nan")}, "ratio must be between 0 and 1"),
        ({"ratio": 0.97}, "ratio 0.97 leaves no direction"),
        ({"group_size": 0}, "group_size must be at least 1; got 0"),
        ({"method": "magic"}, "method must be one of .*'svd-llm'.*'lisc'.*; got 'magic'"),
        ({"scale": "size"}, "scale must be one of 'trace'"),
        ({"scale": None}, "scale must be one of 'trace'"),
        ({"block_weight": "one"}, "block_weight must be one of None"),
        ({"refit": "all"}, "refit must be one of None, 'own'"),
        ({"share": "heads"}, "share must be one of 'layers'"),
        ({"allocation": "equal"}, "allocation must be one of 'uniform'"),
        ({"exponent": -1.0}, "exponent must be finite and not negative"),
        ({"exponent": float("inf")}, "exponent must be finite and not negative"),
        ({"depth_weight": 0.0}, "depth_weight must be finite and above 0; got 0.0"),
        ({"depth_weight": float("nan")}, "depth_weight must be finite and above 0; got nan"),
        ({"ids": torch.zeros(0, 4, dtype=torch.long)}, "calibration is empty"),
        ({"ids": []}, "calibration is empty"),
        ({"ids": torch.zeros(4, dtype=torch.long)}, r"calibration must have shape \[N, T\]; got \(4,\)"),
        ({"ids": torch.full((2, 4), VOCAB)}, "token ids from 0 to 95; got values from 96 to 96"),
        ({"ids": [torch.full((2, 4), -1)]}, "item 0 must hold token ids from 0 to 95"),
        ({"ids": [{"labels": tokens()}]}, "item 0 must have input_ids; got a dict with labels"),
        ({"ids": [{"input_ids": tokens(), "attention_mask": torch.ones(2, 2)}]}, "must have the shape of input_ids"),
        ({"ids": [{"input_ids": tokens(), "attention_mask": 2 * torch.ones(12, 24)}]}, "zeros and ones only"),
        ({"ids": [{"input_ids": tokens(), "attention_mask": torch.zeros(12, 24)}]}, "calibration is empty"),
    ],
    ids=str,
)
def test_wrong_values(options, message):
    model = build()
    before = snapshot(model)
    options = {"ratio": 0.4, "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        freqrank.compress(model, options.pop("ids", tokens()), **options)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": "half"}, "ratio must be a number; got str"),
        ({"ratio": True}, "ratio must be a number; got bool"),
        ({"group_size": 2.0}, "group_size must be an integer; got float"),
        ({"seed": "1"}, "seed must be an integer; got str"),
        ({"exponent": "1"}, "exponent must be a number; got str"),
        ({"depth_weight": "2"}, "depth_weight must be a number or None; got str"),
        ({"ids": "some text"}, "calibration must be a LongTensor.*; got str"),
        ({"ids": 7}, "calibration must be a LongTensor.*; got int"),
        ({"ids": [[1, 2, 3]]}, "item 0 must be a LongTensor.*; got list"),
        ({"ids": tokens().float()}, "must have dtype int64; got torch.float32"),
        ({"ids": [{"input_ids": tokens(), "attention_mask": [1]}]}, "attention_mask of .* must be a tensor; got list"),
    ],
    ids=str,
)
def test_wrong_types(options, message):
    model = build()
    before = snapshot(model)
    options = {"ratio": 0.4, "progress": False, **options}
    with pytest.raises(TypeError, match=message):
        freqrank.compress(model, options.pop("ids", tokens()), **options)
    assert_untouched(model, before)


def test_unknown_architectures_say_how_to_add_one():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got str"):
        freqrank.compress("llama", tokens())
    with pytest.raises(ValueError, match=r"Linear has no decoder of a known architecture.*subclass"):
        freqrank.compress(torch.nn.Linear(2, 2), tokens())


@pytest.mark.parametrize("other", ["model.layers.3.mlp.up_proj", "lm_head"])
def test_tied_linears_are_refused_by_name(other):
    model = build(intermediate_size=VOCAB)
    model.get_submodule(other).weight = model.model.layers[1].mlp.up_proj.weight
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"layers.1.mlp.up_proj.weight and {other}.weight are one parameter"):
        freqrank.compress(model, tokens(), ratio=0.4, progress=False)
    assert_untouched(model, before)


def test_tied_embeddings_stay_tied():
    model = build(tie_word_embeddings=True)
    small, _ = compressed(model)
    assert small.lm_head.weight is small.model.embed_tokens.weight


def test_a_compressed_model_is_not_compressed_again():
    model, _ = compressed(build())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"compressed already: model.layers.0.self_attn.q_proj"):
        freqrank.compress(model, tokens())
    assert_untouched(model, before)


def poison(model, where):
    with torch.no_grad():
        if where == "weight":
            model.model.layers[2].mlp.up_proj.weight[3, 4] = math.inf
        elif where == "embedding":
            model.model.embed_tokens.weight[tokens()[0, 0]] = math.nan
        else:
            model.model.layers[3].post_attention_layernorm.weight[5] = math.nan


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("weight", r"model.layers.2.mlp.up_proj has NaN or Inf in its weight"),
        ("embedding", r"input of model.layers.0.self_attn.q_proj has NaN or Inf"),
        ("norm", r"input of model.layers.3.mlp.gate_proj has NaN or Inf"),
    ],
)
def test_not_finite(where, message):
    model = build()
    model.train()
    poison(model, where)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        freqrank.compress(model, tokens(), progress=False)
    assert_untouched(model, before)


def test_nan_in_padding_is_no_nan():
    model = build()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = math.nan
    ids = tokens().clamp(min=1)
    padded = torch.cat([ids, torch.zeros(12, 2, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(12, 2, dtype=torch.long)], 1)
    try:
        compressed(model, [{"input_ids": padded, "attention_mask": mask}])
    except ValueError as error:  # softmax weights of zero times NaN values: then the message names where it came up
        assert "has NaN or Inf" in str(error)  # noqa: PT017


def test_next_token_loss_is_the_models_own(monkeypatch):
    from freqrank.models import whole

    model = build()
    ids, mask = tokens(6, 10), torch.ones(6, 10, dtype=torch.long)
    mask[2, 7:] = 0
    mask[4, 3] = 0
    batches = read_calibration({"input_ids": ids, "attention_mask": mask})
    logits = torch.log_softmax(model(ids, attention_mask=mask).logits, -1)
    pairs = [(row, t) for row in range(6) for t in range(1, 10) if mask[row, t] and mask[row, t - 1]]
    expected = sum(-logits[row, t - 1, ids[row, t]].item() for row, t in pairs) / len(pairs)
    for elements in (1, 3 * 10 * VOCAB, 1 << 26):
        monkeypatch.setattr(whole, "_LOGITS", elements)
        assert whole.next_token_loss(model, batches) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="sequences of two tokens or more"):
        whole.next_token_loss(model, read_calibration(tokens(3, 1)))


@pytest.mark.parametrize("stage", ["attach", "factors", "interrupt", "trial"])
def test_a_failure_leaves_the_model_as_it_was(stage, monkeypatch):
    model = build()
    before = snapshot(model)
    if stage == "attach":
        from freqrank.models import quantizer

        def fail(*args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr(quantizer, "attach", fail)
    else:
        from freqrank.models import compression

        where = "next_token_loss" if stage == "trial" else "factorize"
        original, calls = getattr(compression, where), []

        def fail(*args):
            calls.append(args)
            if len(calls) == 6:
                raise (KeyboardInterrupt if stage == "interrupt" else RuntimeError)("no")
            return original(*args)

        monkeypatch.setattr(compression, where, fail)
    errors = {"attach": OSError, "factors": RuntimeError, "interrupt": KeyboardInterrupt, "trial": RuntimeError}
    with pytest.raises(errors[stage]):
        freqrank.compress(
            model, tokens(), refit="cross", allocation="sensitivity" if stage == "trial" else "uniform", progress=False
        )
    assert_untouched(model, before)
    assert not hasattr(model, "freqrank_report")


def test_factors_that_do_not_fit_the_dtype_are_refused():
    model = build(dtype=torch.float16)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight.copy_(6e4 * torch.ones_like(block.mlp.down_proj.weight))
            block.mlp.up_proj.weight.mul_(1e-4)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"down_proj do not fit into torch.float16|has NaN or Inf"):
        freqrank.compress(model, tokens(), progress=False)
    assert_untouched(model, before)


@pytest.mark.parametrize("refit", [None, "cross"])
def test_what_roles_share_is_computed_once(refit, monkeypatch):
    from freqrank.lowrank import methods, scales

    count = dict.fromkeys(("pool", "whiten", "eigenvalues"), 0)

    def counting(name, original):
        def call(*args, **options):
            count[name] += 1
            return original(*args, **options)

        return call

    monkeypatch.setattr(methods, "pooled", counting("pool", methods.pooled))
    monkeypatch.setattr(fz, "whiten", counting("whiten", fz.whiten))
    monkeypatch.setitem(scales._MEASURES, "spectral", counting("eigenvalues", scales._MEASURES["spectral"]))
    model = build(num_hidden_layers=4)
    compressed(model, scale="spectral", group_size=2, refit=refit)
    # by layer: q, k and v read the same, gate and up do, o and down alone; the latter have more inputs than outputs
    assert count["pool"] == 2 * 2 + 4 * 2
    assert count["eigenvalues"] == 2 * 2 * 2 + 4 * 2
    assert count["whiten"] == 2 * 2


def test_a_further_method_is_one_class():
    class Last(Method):
        name, shares = "last", True

        def combine(self, grams, scales):
            return fz.Root(grams[-1]), [0.0] * (len(grams) - 1) + [1.0]

    try:
        register(Last)
        _, report = compressed(build(), method="last")
        assert report.settings["method"] == "last"
        assert [layer.input_share for layer in report.layers if layer.role == "q"][:2] == [0, 1]
    finally:
        METHODS.pop("last", None)


def test_linearised_models_compress():
    model = build(dtype=torch.float32)
    freqrank.linearize(model, seed=0)
    _, expected = all_grams(model, tokens())
    small, report = compressed(model, refit="cross")
    assert report.block_ratio >= 0.4
    assert {layer.module for layer in report.layers} <= expected.keys()
    for layer in report.layers:
        assert isinstance(small.get_submodule(layer.module), LowRankLinear)
        scale = expected[layer.module].diagonal().mean() / tokens().numel()
        assert layer.input_scale == pytest.approx(float(scale), rel=1e-4)
    settings = small.config.quantization_config
    assert settings.linear_attention is not None
    assert settings.lowrank is not None
    assert small(tokens()).logits.isfinite().all()
    plain, _ = compressed(model, method="svd")
    _, weighted = compressed(model, method="fwsvd", allocation="sensitivity")
    assert not any("no gradient" in note for note in weighted.notes)
    logits = model(tokens()).logits
    assert (small(tokens()).logits - logits).norm() < 0.8 * (plain(tokens()).logits - logits).norm()
