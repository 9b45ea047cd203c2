"""Factors as 8-bit integers: their rounding, the layer beside float64, and compressed models that hold them."""

import copy
import json

import freqrank
import numpy as np
import pytest
import torch
from freqrank.lowrank.modules import Int8LowRankLinear, LowRankLinear, install_lowrank, share, shared_groups
from freqrank.lowrank.rounding import balanced, from_int8, rounded, to_int8
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(inputs=7, outputs=5, rank=3, bias=True, dtype=torch.float64, seed=0):
    parts = draw(rank, inputs, seed=seed), draw(outputs, rank, seed=seed + 1), draw(outputs, seed=seed + 2).to(dtype)
    return Int8LowRankLinear.from_factors(*parts[:2], parts[2] if bias else None, dtype=dtype)


# --- rounding ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 33), st.sampled_from(FLOATS), st.integers(-12, 3), st.integers(0, 99))
def test_rounding_is_to_the_nearest_and_repeats(rows, columns, dtype, exponent, seed):
    given = (draw(rows, columns, seed=seed) * 10.0 ** (exponent if dtype != torch.float16 else exponent / 4)).numpy()
    given[seed % rows] *= seed % 3  # at times a row of zeros
    integers, scale = to_int8(torch.from_numpy(given), dtype)
    assert integers.dtype == torch.int8
    assert scale.dtype == dtype
    step = scale.double().numpy()[:, None] / 128
    exact = np.divide(given, step, out=np.zeros_like(given), where=step > 0)
    assert np.abs(integers.numpy() - exact).max() <= 0.5 + 128 * torch.finfo(dtype).eps  # the largest may not fit
    assert integers.numpy().min() >= -127
    np.testing.assert_allclose(step[:, 0] * 127, np.abs(given).max(1), rtol=torch.finfo(dtype).eps)
    again = to_int8(from_int8(integers, scale, torch.float64), dtype)
    assert torch.equal(again[0], integers)
    torch.testing.assert_close(again[1], scale, rtol=1e-15 if dtype == torch.float64 else 0, atol=0)
    assert torch.equal(rounded(torch.from_numpy(given), dtype), torch.from_numpy(integers.numpy() * step))


def test_balancing_keeps_the_product():
    basis, parts = draw(6, 4), [draw(4, 3, seed=1) * 100, draw(4, 5, seed=2)]
    parts[0][2], parts[1][2] = 0, 0
    even, coefficients = balanced(basis, parts)
    for before, after in zip(parts, coefficients, strict=True):
        torch.testing.assert_close(even @ after, basis @ before, rtol=1e-14, atol=1e-13)
    largest = torch.cat(coefficients, 1).abs().amax(1)
    assert largest.tolist() == [1, 1, 0, 1]


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_layer_computes_what_its_numbers_stand_for(dtype, bias):
    for sizes in ((7, 5, 3), (1, 1, 1), (64, 33, 17)):
        of = layer(*sizes, bias=bias, dtype=dtype)
        x = draw(2, 3, sizes[0], seed=9, dtype=dtype)
        basis = of.basis.double() * of.basis_scale.double()[:, None] / 128
        weight = of.weight.double() * of.weight_scale.double()[:, None] / 128
        want = x.double() @ basis.T @ weight.T + (of.bias.double() if bias else 0)
        torch.testing.assert_close(of.dense_weight(torch.float64), weight @ basis, rtol=1e-14, atol=1e-15)
        got = of(x)
        assert got.dtype == dtype
        size = (x.double().abs() @ basis.abs().T @ weight.abs().T).max()
        assert (got.double() - want).abs().max() < 6 * torch.finfo(dtype).eps * (size + 1)


def test_float16_does_not_overflow():
    """Sums of integers times inputs would: 127 x 896 is beyond 65504."""
    of = Int8LowRankLinear.from_factors(torch.full((2, 896), 0.01), torch.full((3, 2), 0.5), dtype=torch.float16)
    x = torch.full((1, 896), 30.0, dtype=torch.float16)
    want = 896 * 30 * 0.01 * 0.5 * 2
    assert torch.allclose(of(x).double(), torch.tensor(want, dtype=torch.float64), rtol=1e-2)
    wide = copy.deepcopy(of).float()
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(wide(x.float()), of(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    of, x = layer(dtype=torch.float32), draw(4, 7, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype):
        output = of(x)
    assert output.dtype == dtype
    output.sum().backward()
    [want] = torch.autograd.grad(of(x).sum(), x)
    torch.testing.assert_close(x.grad, want, rtol=0.03, atol=0.03)
    assert (x.grad.dtype, of.bias.grad.dtype) == (torch.float32, torch.float32)


def test_gradients():
    of, x = layer(), draw(4, 7, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(of, (x,), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: of(x).square(), (x,))
    of(x).sum().backward()
    assert of.bias.grad is not None
    assert of.weight.grad is None
    assert of.basis.grad is None


def test_backward_keeps_integers_and_no_numbers():
    of = layer(64, 48, 32, dtype=torch.float32)
    x, kept = draw(2, 64, dtype=torch.float32).requires_grad_(), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        output = of(x)
    assert max(t.numel() * t.element_size() for t in kept.values()) <= 64 * 32  # int8; 4 times that in float32
    output.sum().backward()
    assert x.grad is not None


def test_integers_do_not_train():
    of = layer()
    for parameter in (of.weight, of.basis):
        with pytest.raises(RuntimeError, match="floating point"):
            parameter.requires_grad_(True)
    with pytest.raises(RuntimeError, match="floating point"):
        nn.Sequential(of).requires_grad_(True)


def test_dtypes_change_scales_alone():
    of = layer(dtype=torch.float32)
    integers = of.basis.clone(), of.weight.clone()
    for change, dtype in ((nn.Module.half, torch.float16), (nn.Module.bfloat16, torch.bfloat16),
                          (nn.Module.double, torch.float64), (nn.Module.float, torch.float32)):  # fmt: skip
        changed = change(copy.deepcopy(of))
        assert torch.equal(changed.basis, integers[0])
        assert torch.equal(changed.weight, integers[1])
        assert {changed.dtype, changed.basis_scale.dtype, changed.weight_scale.dtype, changed.bias.dtype} == {dtype}
        difference = changed.dense_weight(torch.float64) - of.dense_weight(torch.float64)
        assert difference.abs().max() < 4 * torch.finfo(dtype).eps * of.dense_weight().abs().max() + 1e-7
        assert changed(draw(2, 7, dtype=dtype)).dtype == dtype


def test_compiled_without_a_graph_break():
    of, x = layer(dtype=torch.float32), draw(4, 7, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(of, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), of(x))
    x.requires_grad_()
    compiled(x).sum().backward()
    [want] = torch.autograd.grad(of(x).sum(), x)
    torch.testing.assert_close(x.grad, want)


def test_fresh_layers_and_replacements():
    torch.manual_seed(0)
    of = Int8LowRankLinear(6, 4, 2)
    assert of.basis.abs().amax() == 127
    assert 0 < float(of(torch.ones(6)).detach().abs().max()) < 10
    assert "storage=int8" in repr(of)
    for device in ("cpu", "meta"):
        dense = nn.Linear(6, 4, dtype=torch.bfloat16, device=device).eval()
        new = Int8LowRankLinear.replacing(dense, 3)
        assert (new.basis.dtype, new.weight.dtype, new.dtype) == (torch.int8, torch.int8, torch.bfloat16)
        assert new.bias is dense.bias
        assert new.weight.is_meta == (device == "meta")
        assert not new.training
    with pytest.raises(TypeError, match=r"basis must be int8, got torch\.float32"):
        Int8LowRankLinear(6, 4, 2, basis=nn.Parameter(torch.zeros(2, 6)))
    with pytest.raises(ValueError, match="one kind of storage"):
        share([Int8LowRankLinear(6, 4, 2), LowRankLinear(6, 4, 2)])
    with pytest.raises(ValueError, match="must be one of None, 'int8', got 'int4'"):
        install_lowrank(nn.Sequential(nn.Linear(6, 4)), [{"modules": ["0"], "rank": 2, "storage": "int4"}])


def test_a_shared_basis_brings_its_scale():
    a, b = layer(), layer(seed=5)
    basis = share([a, b])
    assert b.basis is basis
    assert torch.equal(a.basis_scale, b.basis_scale)
    assert a.basis_scale.data_ptr() != b.basis_scale.data_ptr()  # buffers are cast one by one
    assert torch.equal(b.factors(torch.float64)[0], a.factors(torch.float64)[0])


# --- compressed models ------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
from freqrank.models.quantizer import FreqrankConfig, attach  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

IDS = torch.arange(24).view(2, 12)


def dense(dtype=torch.float32, layers=4, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, **options,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model.to(dtype)


def calibration():
    return torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(3))


def compressed(model=None, storage="int8", **options):
    model = dense() if model is None else copy.deepcopy(model)
    options = {"method": "basis-sharing", "ratio": 0.4, "progress": False, "storage": storage, **options}
    return model, freqrank.compress(model, calibration(), **options)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"share": "both"}, {"share": "modules", "refit": "own"}, {"group_size": 3}])
def test_the_report_counts_what_is_stored(options, dtype, tmp_path):
    model, report = compressed(dense(dtype), **options)
    float_report = compressed(dense(dtype), None, **options)[1]
    assert report.parameters_after == float_report.parameters_after
    assert report.model_parameters_after == float_report.model_parameters_after == model.num_parameters()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    factors = {n: t for n, t in stored.items() if ".self_attn." in n or ".mlp." in n}
    assert sum(t.numel() * t.element_size() for t in factors.values()) == report.bytes_after
    assert sum(t.numel() * t.element_size() for t in stored.values()) == report.model_bytes_after
    assert {t.dtype for t in factors.values()} == {torch.int8, dtype}
    assert sum(n.endswith(".basis") for n in stored) == len(report.groups)
    assert "stored as int8" in str(report)


def relative_errors(original, layers):
    """||X (W - W')|| / ||X W|| for each linear of `original` and the layer in its place, on its own inputs."""
    inputs, errors = {}, []
    for name in layers:
        original.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.__setitem__(name, args[0].double().flatten(0, 1))
        )
    with torch.no_grad():
        original(calibration())
    for name, layer in layers.items():
        weight = original.get_submodule(name).weight.detach().double()
        wrong = weight - layer.dense_weight(torch.float64)
        errors.append(float((inputs[name] @ wrong.T).norm() / (inputs[name] @ weight.T).norm()))
    return errors


@pytest.mark.parametrize("refit", [None, "own", "sequential", "cross"])
def test_errors_are_those_of_the_integers(refit):
    original = dense(layers=2)
    model, report = compressed(original, refit=refit)
    layers = {each.module: model.get_submodule(each.module) for each in report.layers}
    assert [each.error for each in report.layers] == pytest.approx(relative_errors(original, layers), rel=1e-4)


def test_a_refit_makes_up_for_the_rounded_basis():
    """Coefficients fitted to the rounded basis beat those fitted to the exact one, both rounded afterwards."""
    original = dense(layers=2)
    fitted = compressed(original, refit="own", ratio=0.2)[1]
    model, exact = compressed(original, None, refit="own", ratio=0.2)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    later = relative_errors(
        original, {name: Int8LowRankLinear.from_factors(each.basis, each.weight) for name, each in layers.items()}
    )
    squares = [sum(each.error**2 for each in report.layers) for report in (exact, fitted)]
    assert squares[0] < squares[1] < sum(error**2 for error in later)


def test_save_load_and_convert(tmp_path):
    model = compressed(share="both")[0]
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == 2
    assert {group["storage"] for group in config["lowrank"]["groups"]} == {"int8"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert shared_groups(loaded) == shared_groups(model)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for name, tensor in half.state_dict().items():
        integers = name.endswith((".basis", "proj.weight"))
        assert tensor.dtype == (torch.int8 if integers else torch.bfloat16), name
    for convert in (nn.Module.bfloat16, lambda model: model.to(torch.bfloat16)):
        twin = copy.deepcopy(model)
        rotary = copy.deepcopy(twin.model.rotary_emb)  # its frequencies stay float32 when a model is loaded
        convert(twin).model.rotary_emb = rotary
        assert torch.equal(logits(half), logits(twin))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(IDS, **options), model.generate(IDS, **options))


def test_formats(tmp_path):
    """A folder without integers can be read by versions that know none."""
    compressed(storage=None)[0].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format"] == 1
    for version in (1, 2):
        assert FreqrankConfig(format=version).format == 1
    groups = [{"modules": ["q"], "rank": 2, "storage": ["int8"]}]
    with pytest.raises(ValueError, match="storage of a group must be one of None, 'int8'"):
        FreqrankConfig(lowrank={"groups": groups})


def test_settings_and_integers_must_agree(tmp_path):
    model = compressed()[0]
    lowrank = copy.deepcopy(model.config.quantization_config.lowrank)
    lowrank["groups"][0].pop("storage")
    with pytest.raises(ValueError, match="does not describe the low-rank layers"):
        attach(model, lowrank=lowrank)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for group in config["quantization_config"]["lowrank"]["groups"]:
        group.pop("storage")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"says nothing of .*basis_scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    compressed(storage=None)[0].save_pretrained(tmp_path / "float")
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    for group in config["quantization_config"]["lowrank"]["groups"]:
        group["storage"] = "int8"
    (tmp_path / "float" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lack .*basis_scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "float")


def test_merged_weights_have_the_models_dtype_and_train():
    model = compressed(dense(torch.bfloat16))[0]
    before = logits(model)
    freqrank.merge(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        assert parameter.requires_grad, name
    assert (logits(model) - before).abs().max() < 0.05 * before.abs().max()
    assert not hasattr(model.config, "quantization_config")


def test_adapters_train_on_integers(tmp_path):
    peft = pytest.importorskip("peft")
    model = compressed(share="both")[0]
    model.save_pretrained(tmp_path / "base")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    base = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in adapted.named_parameters()}
    assert all(torch.equal(base[name], value) for name, value in before.items())
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(logits(again), logits(adapted))


def test_a_linearised_model_of_integers(tmp_path):
    model = compressed(share="modules")[0]
    freqrank.linearize(model, position_table=32)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_stopped_run_ends_with_the_same_bytes(tmp_path, monkeypatch):
    from freqrank.models import compression

    options = {"refit": "own", "share": "both"}
    whole = compressed(**options)[0].state_dict()
    real = compression._Work._keep
    monkeypatch.setattr(compression._Work, "_keep", lambda self, group: real(self, group) or _stop(group))

    def _stop(group):
        if group.layers[-1] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressed(checkpoint=tmp_path, **options)
    monkeypatch.setattr(compression._Work, "_keep", real)
    again = compressed(checkpoint=tmp_path, **options)[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    with pytest.raises(ValueError, match="storage"):
        compressed(storage=None, checkpoint=tmp_path, **options)


def test_unknown_storage_is_refused():
    with pytest.raises(ValueError, match="storage must be one of None, 'int8'; got 'int4'"):
        compressed(storage="int4")


def test_the_command_line_takes_it(tmp_path):
    cli = pytest.importorskip("freqrank.cli")
    testing = pytest.importorskip("typer.testing")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    model.save_pretrained(tmp_path / "bytes")
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 40)
    arguments = ["compress", str(tmp_path / "bytes"), "-o", str(tmp_path / "small"), "--calibration",
                 str(tmp_path / "text.txt"), "--ratio", "0.4", "--storage", "int8", "--json"]  # fmt: skip
    result = testing.CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.mlp.up_proj.basis").dtype == torch.int8
