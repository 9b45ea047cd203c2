"""Every known architecture: small random models of it are compressed, saved, loaded, run and trained."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import freqrank
import pytest
import torch
from freqrank.lowrank.modules import LowRankLinear, shared_groups
from freqrank.lowrank.statistics import Grams, read_calibration
from torch import nn

transformers = pytest.importorskip("transformers")

from freqrank.models.architectures import find_architecture  # noqa: E402
from freqrank.models.registration import QUANT_METHOD  # noqa: E402
from freqrank.models.streaming import BlockStream, evaluating  # noqa: E402
from freqrank.models.whole import squared_gradients  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

LAYERS, VOCAB, RATIO = 3, 96, 0.4
COMMON = {"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 64}
COMMON |= {"hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GATED = COMMON | {"intermediate_size": 56}
GQA = GATED | {"num_key_value_heads": 2}
CASES = {
    "llama": ("Llama", GATED),
    "llama-gqa-biases": ("Llama", GQA | {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", GATED | {"tie_word_embeddings": True}),
    "mistral": ("Mistral", GQA | {"sliding_window": 8}),
    "qwen2": ("Qwen2", GQA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", GQA | {"head_dim": 16}),
    "gemma": ("Gemma", GATED | {"num_key_value_heads": 1, "head_dim": 16}),
    "phi3": ("Phi3", GATED | {"num_key_value_heads": 4}),
    "phi3-gqa": ("Phi3", GQA),
    "gpt-neox": ("GPTNeoX", GATED | {"use_parallel_residual": True}),
    "gpt-neox-sequential": ("GPTNeoX", GATED | {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "opt": ("OPT", COMMON | {"ffn_dim": 56, "word_embed_proj_dim": 32}),
    "opt-350m": ("OPT", COMMON | {"ffn_dim": 56, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "gpt2": ("GPT2", COMMON | {"n_inner": 56}),
}
# of a known structure, with blocks that return a list or a tuple
WRAPPED = {
    "openai-gpt": ("OpenAIGPT", COMMON),
    "gpt-neox-japanese": ("GPTNeoXJapanese", GATED | {"intermediate_multiple_size": 2}),
}
# Basis Sharing's table, by the ends of module names: what neighbouring layers share, and what each has alone
LLAMA = ("q_proj k_proj v_proj gate_proj up_proj", "o_proj down_proj")
NARROW = ("q_proj gate_proj up_proj", "k_proj v_proj o_proj down_proj")
POLICY = {
    "llama": LLAMA, "llama-gqa-biases": NARROW, "llama-tied": LLAMA, "mistral": NARROW, "qwen2": NARROW,
    "qwen3": NARROW, "gemma": NARROW,
    "phi3": ("qkv_proj gate_up_proj", "o_proj down_proj"), "phi3-gqa": ("qkv_proj gate_up_proj", "o_proj down_proj"),
    "gpt-neox": ("query_key_value dense_h_to_4h", "attention.dense dense_4h_to_h"),
    "gpt-neox-sequential": ("query_key_value dense_h_to_4h", "attention.dense dense_4h_to_h"),
    "opt": ("q_proj k_proj v_proj fc1", "out_proj fc2"), "opt-350m": ("q_proj k_proj v_proj fc1", "out_proj fc2"),
    "gpt2": ("c_attn attn.c_proj c_fc", "mlp.c_proj"),
}  # fmt: skip
# linears that PEFT is usually pointed at, one of them shared by two layers
TARGETS = {"llama": ["q_proj", "v_proj", "gate_proj"], "phi3": ["qkv_proj", "gate_up_proj"], "gpt2": ["c_attn", "c_fc"]}
TARGETS |= {"gpt-neox": ["query_key_value", "dense_h_to_4h"], "opt": ["q_proj", "v_proj", "fc1"]}
every = pytest.mark.parametrize("case", CASES)
structures = pytest.mark.parametrize("case", ["llama", "phi3", "gpt-neox", "opt", "gpt2"])


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()


def build(case):
    """A small random model with biases and norm gains of its own, and far from linear."""
    family, options = (CASES | WRAPPED)[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(5)
    return model


def tokens(rows=12, length=24, seed=1):
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def compressed(model, ids=None, **options):
    model = copy.deepcopy(model)
    options = {"ratio": RATIO, "group_size": 2, "progress": False, **options}
    return model, freqrank.compress(model, tokens() if ids is None else ids, **options)


@pytest.fixture(scope="module")
def pair():
    """``pair(case)``: the dense model, the compressed one and its report, made once; not to be changed."""
    made = {}

    def get(case):
        if case not in made:
            model = build(case)
            made[case] = (model, *compressed(model))
        return made[case]

    return get


@torch.no_grad()
def logits(model, **inputs):
    return model(**(inputs or {"input_ids": tokens(4, seed=2)})).logits


def block_linears(model):
    """Every linear inside a block by name, in the order of the model, each kind found on its own."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return {name: module for name, module in found.items() if any(part.isdigit() for part in name.split("."))}


def inputs_of(model, **inputs):
    """What every linear inside a block reads, [tokens, in]."""
    linears, seen = block_linears(model), {}

    def keep(name):
        return lambda _, args: seen.__setitem__(name, args[0].detach().flatten(0, -2))

    hooks = [linear.register_forward_pre_hook(keep(name)) for name, linear in linears.items()]
    logits(model, **inputs)
    for hook in hooks:
        hook.remove()
    return seen


def put(linear, weight):
    """Write a weight [in, out]."""
    with torch.no_grad():
        linear.weight.copy_(weight if isinstance(linear, Conv1D) else weight.T)


def reference(model, case, ids, keep, size):
    """Basis Sharing in float64, from its description: S of the pooled Gram matrix, an SVD of S [W_1 ... W_n]."""
    model = copy.deepcopy(model)
    linears = block_linears(model)
    grams = {name: x.T @ x for name, x in inputs_of(model, input_ids=ids).items()}
    groups = []
    for ends, n in zip(POLICY[case], (size, 1), strict=True):
        for end in ends.split():
            names = [name for name in linears if name.endswith(end)]
            assert len(names) == LAYERS
            groups += [names[i : i + n] for i in range(0, LAYERS, n)]
    assert sorted(name for names in groups for name in names) == sorted(linears)
    for names in groups:
        values, vectors = torch.linalg.eigh(sum(grams[name] for name in names))
        root = values.clamp(min=0).sqrt()[:, None] * vectors.T
        stored = [linears[name].weight.detach().double() for name in names]
        weights = [w if isinstance(linears[n], Conv1D) else w.T for n, w in zip(names, stored, strict=True)]
        joined = torch.cat(weights, 1)
        k = math.floor(keep * joined.numel() / sum(joined.shape) + 1e-9)
        right = torch.linalg.svd(root @ joined, full_matrices=False).Vh[:k].T
        basis = joined @ right  # S^-1 U_k Sigma_k without an inverse
        for name, rows in zip(names, right.split([w.shape[1] for w in weights]), strict=True):
            put(linears[name], basis @ rows.T)
    return model, {frozenset(names) for names in groups}


# --- compression ------------------------------------------------------------------------------------------------------


@every
def test_basis_sharing_is_the_original(case):
    model = build(case)
    small, report = compressed(model, method="basis-sharing")
    expected, groups = reference(model, case, tokens(), 1 - RATIO, 2)
    torch.testing.assert_close(logits(small), logits(expected), rtol=1e-6, atol=1e-6)
    assert (logits(small) - logits(model)).abs().max() > 1e-2
    assert {frozenset(names) for names in shared_groups(small)} == groups
    assert {frozenset(layer.module for layer in group.layers) for group in report.groups} == groups


@every
def test_the_model_is_the_dense_one_with_products_for_weights(case, pair):
    model, small, report = pair(case)
    rebuilt = copy.deepcopy(model)
    linears = block_linears(rebuilt)
    assert linears.keys() == {layer.module for layer in report.layers}
    for name, linear in linears.items():
        factors = small.get_submodule(name)
        assert type(factors) is LowRankLinear
        put(linear, factors.basis.double().T @ factors.weight.double().T)
    torch.testing.assert_close(logits(small), logits(rebuilt), rtol=1e-9, atol=1e-9)


@every
def test_parameters_are_within_the_target_and_the_rest_is_untouched(case, pair):
    model, small, report = pair(case)
    weights = {f"{name}.weight" for name in block_linears(model)}
    before = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in weights}
    after = dict(small.named_parameters(remove_duplicate=False))
    for name, parameter in before.items():
        assert torch.equal(after.pop(name), parameter), name
    assert any("bias" in name for name in before) == (case not in ("llama", "llama-tied", "mistral", "qwen3", "gemma")
                                                      and "phi3" not in case)  # fmt: skip
    dense = sum(model.get_parameter(name).numel() for name in weights)
    left = sum({id(p): p.numel() for p in after.values()}.values())
    assert (1 - RATIO - 0.08) * dense < left <= (1 - RATIO) * dense
    assert (report.parameters_before, report.parameters_after) == (dense, left)
    tied = bool(model.config.tie_word_embeddings)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert (small.get_output_embeddings().weight is small.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("case", [*CASES, *WRAPPED])
def test_blocks_see_what_they_see_in_the_model(case, pair):
    model, _, _ = pair(case)
    architecture = find_architecture(model)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[:4, :5] = 0
    inputs = inputs_of(model, input_ids=ids, attention_mask=mask)
    real = {name: x[mask.flatten() == 1] for name, x in inputs.items()}
    stream = BlockStream(architecture, read_calibration({"input_ids": ids, "attention_mask": mask}))
    seen = set()
    with evaluating(model):
        for layer in range(LAYERS):
            order, grams = [], Grams()

            def add(role, x, grams=grams, order=order):
                order.append(role)
                grams.add(role, x)

            stream.advance(add)
            assert order == [roles[0] for roles in architecture.inputs]
            for roles in architecture.inputs:
                for role in roles:
                    name = architecture.full_name(layer, architecture.roles[role])
                    torch.testing.assert_close(grams.of[roles[0]], real[name].T @ real[name])
                    seen.add(name)
    assert seen == real.keys()


@every
def test_errors_are_those_of_the_outputs(case, pair):
    model, small, report = pair(case)
    inputs = inputs_of(model, input_ids=tokens())
    for layer in report.layers:
        x, factors = inputs[layer.module], small.get_submodule(layer.module)
        weight = model.get_submodule(layer.module).weight.detach()
        y = x @ (weight if case == "gpt2" else weight.T)
        error = (x @ factors.basis.T @ factors.weight.T - y).norm() / y.norm()
        assert layer.error == pytest.approx(error.item(), rel=1e-6)


@every
def test_cross_refit_lowers_the_error(case, pair):
    model, small, _ = pair(case)
    refitted, report = compressed(model, refit="cross")
    assert report.parameters_after <= (1 - RATIO) * report.parameters_before

    def distance(m):
        return float((logits(m, input_ids=tokens()) - logits(model, input_ids=tokens())).norm())

    assert distance(refitted) < distance(small)


@structures
def test_what_modules_share(case):
    model = build(case)
    fused = case in ("phi3", "gpt-neox", "gpt2")
    _, modules = compressed(model, share="modules")
    together = {frozenset(layer.role for layer in group.layers) for group in modules.groups if len(group.layers) > 1}
    siblings = {"llama": {frozenset("qkv"), frozenset({"gate", "up"})}, "opt": {frozenset("qkv")}}
    assert together == siblings.get(case, set())
    assert all(len({layer.layer for layer in group.layers}) == 1 for group in modules.groups)
    _, layers = compressed(model)
    _, both = compressed(model, share="both")
    sizes = {frozenset(layer.module for layer in group.layers) for group in both.groups}
    if fused:  # q, k and v are one weight: what neighbours share is all there is to share
        assert sizes == {frozenset(layer.module for layer in group.layers) for group in layers.groups}
    else:
        assert max(len(names) for names in sizes) == 6
        up = next(group for group in both.groups if group.layers[0].role in ("gate", "up"))
        assert {layer.layer for layer in up.layers} == {0, 1}


# --- the compressed model is an ordinary one --------------------------------------------------------------------------


@every
def test_a_saved_model_is_loaded_with_equal_logits(case, pair, tmp_path):
    _, small, _ = pair(case)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(small)
    assert torch.equal(logits(loaded), logits(small))
    assert shared_groups(loaded) == shared_groups(small)
    assert loaded.num_parameters() == small.num_parameters()
    assert loaded.config.quantization_config.quant_method == QUANT_METHOD
    tied = bool(small.config.tie_word_embeddings)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


FRESH = """
import sys
from pathlib import Path
import torch
import freqrank
import transformers
from safetensors.torch import load_file

transformers.logging.disable_progress_bar()
for folder in map(Path, sys.argv[1:]):
    example = load_file(folder / "example.safetensors")
    with torch.no_grad():
        found = transformers.AutoModelForCausalLM.from_pretrained(folder)(example["input_ids"]).logits
    print(folder.name, torch.equal(found, example["logits"]))
"""


def test_a_fresh_process_computes_equal_logits(pair, tmp_path):
    for case in CASES:
        _, small, _ = pair(case)
        small.save_pretrained(tmp_path / case)
        example = {"input_ids": tokens(4, seed=2), "logits": logits(small)}
        save_file(example, tmp_path / case / "example.safetensors")
    environment = os.environ | {"PYTHONPATH": str(Path(freqrank.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FRESH, *(str(tmp_path / case) for case in CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{case} True" for case in CASES]


@pytest.mark.parametrize("case", ["gpt2", "opt", "phi3", "gpt-neox", "gemma"])
def test_methods_that_need_more_than_grams(case):
    """Magnitudes, gradients and trials find the linears wherever they are, and leave the model's own weights alone."""
    model = build(case)
    for options in ({"method": "fwsvd"}, {"method": "asvd", "allocation": "sensitivity", "ratio": 0.6}):
        small, report = compressed(model, tokens(6, 12), **options)
        assert report.block_ratio >= report.settings["ratio"]
        assert logits(small).isfinite().all()
        untouched = dict(small.named_parameters())
        assert all(torch.equal(p, untouched[n]) for n, p in model.named_parameters() if n in untouched and "norm" in n)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    architecture = find_architecture(model)
    ids = tokens(3, 12)
    linears = {role: architecture.linear(1, role) for role in architecture.roles}
    found = squared_gradients(model, linears, read_calibration(ids))
    for role, linear in linears.items():
        want = 0
        for row in ids:
            loss = nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum")
            (grad,) = torch.autograd.grad(loss, linear.weight)
            want = want + (grad if isinstance(linear, Conv1D) else grad.mT).square().sum(1)
        torch.testing.assert_close(found[role], want)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@every
def test_merged_models_are_plain(case, pair, tmp_path):
    model, small, report = pair(case)
    merged = copy.deepcopy(small)
    names = freqrank.merge(merged)
    assert sorted(names) == sorted(layer.module for layer in report.layers if layer.rank is not None)
    before = dict(model.named_modules())
    assert [type(module) for module in merged.modules()] == [type(module) for module in before.values()]
    assert [(n, p.shape) for n, p in merged.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    torch.testing.assert_close(logits(merged), logits(small), atol=1e-9, rtol=1e-9)
    merged.save_pretrained(tmp_path)
    assert QUANT_METHOD not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(merged))
    with pytest.raises(ValueError, match="no low-rank layer: there is nothing to merge"):
        freqrank.merge(merged)
    assert freqrank.compress(merged, tokens(), ratio=RATIO, progress=False).block_ratio >= RATIO


@every
def test_generate_pads_and_decodes_greedily(case, pair):
    _, small, _ = pair(case)
    ids = tokens(2, 9, seed=4)
    ids[0, :4] = 0
    mask = (ids != 0).long()
    options = {"do_sample": False, "max_new_tokens": 5}
    found = small.generate(ids, attention_mask=mask, **options)
    for row, start in ((0, 4), (1, 0)):
        expected = ids[row : row + 1, start:]
        for _ in range(5):  # without padding and without a cache
            last = logits(small, input_ids=expected)[:, -1].argmax(-1)
            expected = torch.cat([expected, last[:, None]], 1)
        assert torch.equal(found[row, start:], expected[0])


@every
def test_a_training_step_moves_the_factors(case, pair):
    _, small, _ = pair(case)
    model = copy.deepcopy(small).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = tokens(4, seed=5)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimiser.step()
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            for factor in ("basis", "weight"):
                assert module.get_parameter(factor).grad.norm() > 0, name
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith(".basis"):
            assert not torch.equal(parameter, before[name])
    with torch.no_grad():
        assert model.eval()(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("case", TARGETS)
def test_lora_takes_the_usual_targets(case, pair):
    peft = pytest.importorskip("peft")
    _, small, _ = pair(case)
    before = logits(small)
    config = peft.LoraConfig(r=2, target_modules=TARGETS[case], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(small), config)
    wrapped = [name for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(wrapped) == len(TARGETS[case]) * LAYERS
    after = logits(adapted)
    assert (after - before).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    ids = tokens(2, seed=6)
    adapted(ids, labels=ids).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert len(trained) == 2 * len(wrapped)
    assert all("lora_" in name for name in trained)


# --- what is not known ------------------------------------------------------------------------------------------------


def unknown(name, **options):
    return AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(vocab_size=VOCAB, **options))


@pytest.mark.parametrize(
    ("name", "options"),
    [("Bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2}),
     ("Mamba", {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4})],
)  # fmt: skip
def test_an_unknown_architecture_says_how_to_add_it(name, options):
    model = unknown(name, **options)
    with pytest.raises(ValueError, match=f"{name}ForCausalLM has no decoder of a known architecture") as caught:
        freqrank.compress(model, tokens(), progress=False)
    message = str(caught.value)
    for known in ("llama", "phi3", "gpt-neox", "opt", "gpt2", "h.N.{attn.c_attn, ", "self_attn.qkv_proj"):
        assert known in message
    assert "subclass freqrank.models.architectures.Architecture" in message
    assert "append the class to freqrank.models.architectures.ARCHITECTURES" in message
