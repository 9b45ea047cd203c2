"""Converted models are saved and loaded like any other: in fresh processes, by trainers, adapters and device maps."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import freqrank
import pytest
import torch
from freqrank import LowRankLinear
from freqrank.lowrank.modules import install_lowrank, linear_weight, share, shared_groups
from torch import nn

pytest.importorskip("transformers")
import transformers
from freqrank.models.quantizer import FreqrankConfig, attach
from freqrank.models.saving import check_output_folder, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

IDS = torch.arange(24).view(2, 12)
LAYERS = 4
RANKS = {"self_attn.q_proj": 9, "mlp.gate_proj": 12}
GROUPS = [
    {"modules": [f"model.layers.{layer}.{name}" for layer in pair], "rank": rank}
    for pair in ((0, 1), (2, 3))
    for name, rank in RANKS.items()
] + [{"modules": ["model.layers.0.mlp.down_proj"], "rank": 7}]


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()


def dense(tie: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config).eval()


def compressed(tie: bool = False) -> LlamaForCausalLM:
    return _compress(dense(tie))


def _compress(model: LlamaForCausalLM) -> LlamaForCausalLM:
    torch.manual_seed(1)
    for layer in install_lowrank(model, GROUPS).values():
        nn.init.normal_(layer.basis, std=0.1)
        nn.init.normal_(layer.weight, std=0.1)
    attach(model, lowrank={"groups": GROUPS, "method": "lisc", "ratio": 0.5})
    return model


def by_compress() -> LlamaForCausalLM:
    return _by_compress(dense())


def _by_compress(model: LlamaForCausalLM) -> LlamaForCausalLM:
    calibration = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(3))
    freqrank.compress(model, calibration, method="lisc", ratio=0.4, progress=False)
    return model


def by_int8() -> LlamaForCausalLM:
    model = dense()
    calibration = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(3))
    freqrank.compress(model, calibration, method="lisc", ratio=0.4, storage="int8", share="both", progress=False)
    return model


def by_linearize(layers: list[int] | None = None) -> LlamaForCausalLM:
    return _by_linearize(dense(), layers)


def _by_linearize(model: LlamaForCausalLM, layers: list[int] | None = None) -> LlamaForCausalLM:
    freqrank.linearize(model, layers=layers, position_table=32)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


KINDS = {
    "compressed": compressed,
    "compressed-tied-embeddings": lambda: compressed(tie=True),
    "by-compress": by_compress,
    "int8-compressed": by_int8,
    "linear": by_linearize,
    "half-linear": lambda: by_linearize([0, 2]),
    "linear-then-compressed": lambda: _by_compress(by_linearize()),
    "compressed-then-linear": lambda: _by_linearize(by_compress()),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """One folder for each kind of model, with its logits beside it, in its own dtype and with bf16 parameters."""
    root = tmp_path_factory.mktemp("models")
    for kind, make in KINDS.items():
        model = make()
        model.save_pretrained(root / kind)
        model.save_pretrained(root / f"{kind}-sharded", max_shard_size="8KB")
        half = copy.deepcopy(model)
        for name, parameter in half.named_parameters():
            if not _stays_fp32(name) and parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()
        for name, buffer in half.named_buffers():
            if name.endswith("_scale"):
                buffer.data = buffer.data.bfloat16()
        save_file({"fp32": logits(model), "bf16": logits(half)}, root / f"{kind}.safetensors")
    return root


def _stays_fp32(name: str) -> bool:
    return ".feature_map." in name or ".decay." in name


def run(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run `code` in a new process that finds freqrank where this one found it."""
    source = str(Path(freqrank.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


# --- in fresh processes ---------------------------------------------------------------------------------------------

RELOAD = """
import json, sys
from pathlib import Path
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # before freqrank: either order works
import freqrank
from safetensors.torch import load_file

transformers.logging.disable_progress_bar()
root = Path(sys.argv[1])
ids = torch.arange(24).view(2, 12)
results = {}
for kind in sys.argv[2:]:
    want = load_file(root / f"{kind}.safetensors")
    def check(name, key="fp32", cls=AutoModelForCausalLM, folder=kind, **options):
        with torch.no_grad():
            model = cls.from_pretrained(root / folder, **options)
            results[f"{kind} {name}"] = torch.equal(model(ids).logits, want[key])
        return model
    check("auto class")
    check("own class", cls=LlamaForCausalLM)
    check("sharded", folder=f"{kind}-sharded")
    check("bf16", "bf16", dtype=torch.bfloat16)
    check("device_map", device_map="auto")
    size = sum(t.numel() * t.element_size() for t in load_file(root / kind / "model.safetensors").values())
    for name, memory in (("disk", size // 10), ("part on disk", size * 8 // 10)):
        model = check(name, device_map="auto", max_memory={"cpu": memory}, offload_folder=root / f"offload-{kind}")
        results[f"{kind} {name} used"] = "disk" in model.hf_device_map.values()
print("RESULTS" + json.dumps(results))
"""
CHECKS = ["auto class", "own class", "sharded", "bf16", "device_map", "disk", "disk used", "part on disk"]
CHECKS += ["part on disk used"]


@pytest.fixture(scope="module")
def reloaded(folders) -> dict[str, bool]:
    done = run(RELOAD, folders, *KINDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULTS")[1])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_process_computes_identical_logits(reloaded, kind, check):
    assert reloaded[f"{kind} {check}"]


WITHOUT = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
assert "freqrank" not in sys.modules
for folder in sys.argv[1:]:
    for cls in (AutoConfig, AutoModelForCausalLM, LlamaForCausalLM):
        for options in ({}, {"attn_implementation": "eager"}, {"ignore_mismatched_sizes": True}):
            try:
                cls.from_pretrained(folder, **options)
            except Exception as error:
                assert "run `import freqrank`" in str(error), error
            else:
                print("QUIET", folder, cls.__name__, options)
"""


def test_without_the_import_loading_stops_and_says_why(folders):
    done = run(WITHOUT, *(folders / kind for kind in KINDS))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "QUIET" not in done.stdout


def test_import_is_quick_and_needs_no_transformers():
    done = run(
        "import sys, time, torch\n"
        "sys.modules['transformers'] = None\n"  # importing it fails, as if it were not installed
        "start = time.perf_counter(); import freqrank; seconds = time.perf_counter() - start\n"
        "assert freqrank.LowRankLinear(4, 4, 2)(torch.zeros(3, 4)).shape == (3, 4)\n"
        "print(seconds, [name for name in sys.modules if name.startswith('transformers.')])"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seconds, imported = done.stdout.split(maxsplit=1)
    assert float(seconds) < 3
    assert imported.strip() == "[]"


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_shared_basis_is_stored_once(folders, kind):
    stored = load_file(folders / kind / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folders / kind)
    bases = {name for name in stored if name.endswith(".basis")}
    assert bases == {f"{names[0]}.basis" for names in shared_groups(model)}
    persistent = sum(buffer.numel() for name, buffer in model.named_buffers() if name in stored)
    assert sum(tensor.numel() for tensor in stored.values()) == model.num_parameters() + persistent


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_in_the_config_and_nothing_is_pickled(folders, kind):
    config = json.loads((folders / kind / "config.json").read_text())
    settings = config["quantization_config"]
    assert settings["quant_method"] == "freqrank"
    assert ("lowrank" in settings) == ("compress" in kind)
    assert ("linear_attention" in settings) == ("linear" in kind)
    if "lowrank" in settings:
        assert settings["lowrank"]["method"] == "lisc"
        assert settings["lowrank"]["groups"]
    assert {path.suffix for path in (folders / kind).iterdir()} == {".json", ".safetensors"}
    assert "auto_map" not in config


@pytest.mark.parametrize("kind", KINDS)
def test_saving_a_loaded_model_writes_the_same_files(folders, kind, tmp_path):
    AutoModelForCausalLM.from_pretrained(folders / kind).save_pretrained(tmp_path)
    names = sorted(path.name for path in (folders / kind).iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (folders / kind / name).read_bytes(), name


# --- a loaded model is an ordinary one ------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def model(request, folders):
    return AutoModelForCausalLM.from_pretrained(folders / request.param)


def test_bases_are_shared_after_loading(model):
    lowrank = model.config.quantization_config.lowrank
    groups = lowrank["groups"] if lowrank else []
    assert sorted(shared_groups(model)) == sorted(group["modules"] for group in groups)
    assert not lowrank or max(map(len, shared_groups(model))) >= 2


def test_deepcopy_is_equal_and_apart(model):
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert shared_groups(twin) == shared_groups(model)
    assert twin.num_parameters() == model.num_parameters()
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_dtype_casts_and_memory_footprint(model):
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert model.get_memory_footprint() == buffers + sum(p.numel() * p.element_size() for p in model.parameters())
    assert model.half().lm_head.weight.dtype == torch.float16
    assert model.float().lm_head.weight.dtype == torch.float32
    assert model.to(torch.float64).lm_head.weight.dtype == torch.float64


@pytest.mark.parametrize("kind", ["linear", "linear-then-compressed"])
def test_what_must_stay_fp32_does_in_bf16(folders, kind):
    own = AutoModelForCausalLM.from_pretrained(folders / kind)
    half = AutoModelForCausalLM.from_pretrained(folders / kind, dtype=torch.bfloat16)
    for name, tensor in half.state_dict().items():
        assert tensor.dtype == (torch.float32 if _stays_fp32(name) else torch.bfloat16), name
        assert torch.equal(tensor, own.state_dict()[name].to(tensor.dtype)), name


def test_a_new_head_on_a_converted_model(folders):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folders / "linear-then-compressed", num_labels=3, pad_token_id=0
    )
    assert model(IDS).logits.shape == (2, 3)


def test_torch_compile(model):
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled), logits(model))


def test_generate_gives_what_the_original_gives(model):
    original = KINDS[Path(model.config._name_or_path).name]()
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0  # left padding
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    for beams in (1, 2):
        want = original.generate(IDS[:, :6], num_beams=beams, **options)
        assert torch.equal(model.generate(IDS[:, :6], num_beams=beams, **options), want)


def _examples(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(0, 64, (12,), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "labels": i} for i in ids]


def _train(model, folder: Path, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(model, arguments, train_dataset=_examples(4)).train(**options)
    return model.eval()


def test_trainer_steps_checkpoints_and_resumes(model, folders, tmp_path):
    folder, before = model.config._name_or_path, {n: p.detach().clone() for n, p in model.named_parameters()}
    want = logits(_train(model, tmp_path))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == moved
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")), want)
    resumed = AutoModelForCausalLM.from_pretrained(folder)
    _train(resumed, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(logits(resumed), want)
    assert shared_groups(resumed) == shared_groups(model)


def test_lora_trains_saves_and_reloads(model, tmp_path):
    peft = pytest.importorskip("peft")
    folder = model.config._name_or_path
    before = logits(model)
    targets = ["q_proj", "v_proj", "gate_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    wrapped = [name for name, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    for target, block in zip(targets, ("self_attn", "self_attn", "mlp"), strict=True):
        assert sum(name.endswith(f"{block}.{target}") for name in wrapped) == LAYERS
    after = logits(_train(adapted, tmp_path / "training"))
    assert not torch.equal(before, after)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), after)


def test_lora_cannot_be_merged_into_factors(folders):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folders / "compressed")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="size"):
        adapted.merge_and_unload()


@pytest.mark.parametrize("kind", ["linear-then-compressed", "compressed-then-linear"])
def test_merging_leaves_linear_attention(kind, tmp_path):
    model = KINDS[kind]()
    before = logits(model)
    freqrank.merge(model)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    save_model(model, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    assert "lowrank" not in config
    assert "linear_attention" in config
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model))


def test_a_merged_model_says_that_it_is_plain(tmp_path):
    model = by_compress()
    freqrank.merge(model)
    save_model(model, tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert "freqrank_report.json" not in names
    assert "Plain transformers loads it" in (tmp_path / "merged" / "README.md").read_text()


def test_adapters_are_to_be_merged_first():
    peft = pytest.importorskip("peft")
    model = by_compress()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    with pytest.raises(ValueError, match=r"q_proj\.base_layer is a low-rank layer .*merge or unload adapters first"):
        freqrank.merge(model)
    assert any(isinstance(module, freqrank.LowRankLinear) for module in model.modules())


@pytest.mark.parametrize("kind", ["compressed", "half-linear", "linear-then-compressed"])
def test_the_base_model_loads_and_saves_alone(folders, tmp_path, kind):
    base = transformers.AutoModel.from_pretrained(folders / kind)
    want = KINDS[kind]().model(IDS).last_hidden_state
    assert torch.equal(base(IDS).last_hidden_state, want)
    base.save_pretrained(tmp_path)
    assert torch.equal(transformers.AutoModel.from_pretrained(tmp_path)(IDS).last_hidden_state, want)


# --- damaged and partial folders ------------------------------------------------------------------------------------


def _drop(name):
    def change(folder: Path):
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def _config(edit):
    def change(folder: Path):
        config = json.loads((folder / "config.json").read_text())
        edit(config, config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return change


def _lost_shard(folder: Path):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("sharded"), folder)
    sorted(folder.glob("*.safetensors"))[2].unlink()


DAMAGE = {
    "basis lost": (_drop("model.layers.0.self_attn.q_proj.basis"), "lack model.layers.0.self_attn.q_proj.basis"),
    "coefficient lost": (_drop("model.layers.1.mlp.gate_proj.weight"), "lack model.layers.1.mlp.gate_proj.weight"),
    "dense weight lost": (_drop("model.layers.2.mlp.up_proj.weight"), "lack model.layers.2.mlp.up_proj.weight"),
    "norm lost": (_drop("model.norm.weight"), "lack model.norm.weight"),
    "weights cut": (lambda f: os.truncate(f / "model.safetensors", 5000), "damaged or incomplete"),
    "weights empty": (lambda f: os.truncate(f / "model.safetensors", 0), "damaged or incomplete"),
    "shard lost": (_lost_shard, "damaged or incomplete"),
    "rank": (_config(lambda c, q: q["lowrank"]["groups"][0].update(rank=8)), r"q_proj.basis is \[9, 32\] in the file"),
    "no rank": (_config(lambda c, q: q["lowrank"]["groups"][0].pop("rank")), "'groups', a list of"),
    "no such module": (_config(lambda c, q: q["lowrank"]["groups"][0].update(modules=["a.b"])), "no module 'a.b'"),
    "group lost": (_config(lambda c, q: q["lowrank"]["groups"].pop(0)), "says nothing of model.layers.0"),
    "settings lost": (_config(lambda c, q: q.pop("lowrank")), "says nothing of model.layers.0"),
    "all settings lost": (_config(lambda c, q: c.pop("quantization_config")), "config.json is damaged"),
    "lock lost": (_config(lambda c, q: q.pop("locked")), "config.json is damaged"),
    "newer format": (_config(lambda c, q: q.update(format=99)), "format 99"),
    "unknown setting": (_config(lambda c, q: q.update(pruned=True)), "pruned"),
    "more layers": (_config(lambda c, q: c.update(num_hidden_layers=5)), "lack model.layers.4"),
}


LINEAR_DAMAGE = {
    "decay lost": (_drop("model.layers.1.self_attn.decay.log_decay"), "lack model.layers.1.self_attn.decay"),
    "frequencies lost": (_drop("model.layers.0.self_attn.feature_map.scales"), "lack model.layers.0.self_attn.feat"),
    "linear settings lost": (_config(lambda c, q: q.pop("linear_attention")), "says nothing of model.layers.0"),
    "other layers": (
        _config(lambda c, q: q["linear_attention"].update(layers=[0, 1])),
        "says nothing of model.layers.2",
    ),
    "shorter table": (
        _config(lambda c, q: q["linear_attention"]["options"].update(position_table=8)),
        r"factors.weight is \[\d, 32\] in the file",
    ),
    "unknown option": (_config(lambda c, q: q["linear_attention"]["options"].update(heat=1)), "heat"),
}


@pytest.mark.parametrize("damage", DAMAGE | LINEAR_DAMAGE)
def test_a_damaged_folder_is_a_clear_error(folders, tmp_path, damage):
    kind = "linear" if damage in LINEAR_DAMAGE else "compressed"
    change, message = (DAMAGE | LINEAR_DAMAGE)[damage]
    shutil.copytree(folders / f"{kind}-sharded", tmp_path / "sharded")
    folder = Path(shutil.copytree(folders / kind, tmp_path / "model"))
    change(folder)
    with pytest.raises((ValueError, OSError), match=message):
        AutoModelForCausalLM.from_pretrained(folder)


# --- attach ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lowrank": {"groups": GROUPS[:-1]}}, ValueError, "down_proj"),
        ({"lowrank": {"groups": [*GROUPS[:-1], GROUPS[-1] | {"rank": 8}]}}, ValueError, "down_proj"),
        ({"lowrank": {}}, ValueError, "groups"),
        ({"lowrank": 3}, TypeError, "must be a dictionary"),
        ({"linear_attention": {"layers": {1, 2}}}, TypeError, "linear_attention must hold JSON"),
    ],
)
def test_attach_refuses_what_does_not_describe_the_model(settings, error, message):
    model = compressed()
    before = model.config.quantization_config.to_dict()
    with pytest.raises(error, match=message):
        attach(model, **settings)
    assert model.config.quantization_config.to_dict() == before


def test_weights_must_be_safetensors(folders, tmp_path):
    folder = Path(shutil.copytree(folders / "compressed", tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="must be in safetensors files"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_attach_merges_and_copies():
    model = compressed()
    spec = {"layers": [0]}
    attach(model, linear_attention=spec)
    spec["layers"].append(1)
    settings = model.config.quantization_config
    assert settings.lowrank["groups"] == GROUPS
    assert settings.linear_attention == {"layers": [0]}


def test_attach_refuses_a_model_quantized_otherwise():
    model = dense()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="gptq"):
        attach(model, lowrank={"groups": []})


def test_a_dense_model_is_not_converted_while_it_loads(tmp_path):
    dense().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FreqrankConfig(lowrank={"groups": GROUPS}))


def test_other_models_are_saved_as_ever(tmp_path):
    dense().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 64
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(dense()))


# --- save_model -----------------------------------------------------------------------------------------------------


class _Report:
    def to_dict(self):
        return {"ratio": 0.5}


def test_save_model_writes_card_and_report(tmp_path):
    model = compressed()
    model.freqrank_report = _Report()
    path = save_model(model, tmp_path / "new" / "model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), logits(model))
    assert "import freqrank" in (path / "README.md").read_text()
    assert json.loads((path / "freqrank_report.json").read_text()) == {"ratio": 0.5}
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]


def test_save_model_copies_the_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1})))
    path = save_model(compressed(), tmp_path / "model", tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(path).encode("b") == [1]
    generator = transformers.pipeline("text-generation", model=str(path))
    assert generator("b", max_new_tokens=2)[0]["generated_text"].startswith("b")


def test_save_model_refuses_what_is_there(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("precious")
    model = compressed()
    with pytest.raises(ValueError, match="not empty"):
        save_model(model, tmp_path / "full")
    with pytest.raises(ValueError, match="other than a model"):
        save_model(model, tmp_path / "full", overwrite=True)
    with pytest.raises(ValueError, match="not a folder"):
        save_model(model, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert check_output_folder(tmp_path / "empty") == tmp_path / "empty"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_save_model_overwrites_an_older_model_whole(tmp_path):
    path = save_model(compressed(), tmp_path / "model")
    (path / "old").write_text("")
    save_model(compressed(tie=True), path, overwrite=True)
    assert not (path / "old").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), logits(compressed(tie=True)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_save_model_leaves_nothing_half_written(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_model(compressed(), tmp_path / "model", Broken())
    assert list(tmp_path.iterdir()) == []
    path = save_model(compressed(), tmp_path / "model")
    before = {entry.name: entry.read_bytes() for entry in path.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        save_model(compressed(tie=True), path, Broken(), overwrite=True)
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


# --- LowRankLinear and its helpers ----------------------------------------------------------------------------------


def test_low_rank_linear_computes_the_product():
    torch.manual_seed(0)
    layer = LowRankLinear(7, 5, 3, dtype=torch.float64)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    want = torch.einsum("bti,ri,or->bto", x, layer.basis, layer.weight) + layer.bias
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(nn.functional.linear(x, layer.dense_weight(torch.float64), layer.bias), want)
    inputs = (x.requires_grad_(), layer.basis, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(
        lambda x, *p: torch.func.functional_call(layer, dict(zip(("basis", "weight", "bias"), p, strict=True)), x),
        inputs,
    )


def test_a_shared_basis_gets_both_gradients_and_counts_once():
    a, b = LowRankLinear(6, 4, 2), LowRankLinear(6, 5, 2)
    basis = share([a, b])
    assert sum(p.numel() for p in nn.ModuleList([a, b]).parameters()) == 12 + 8 + 4 + 10 + 5
    x = torch.randn(3, 6)
    (a(x).sum() + b(x).sum()).backward()
    both = basis.grad.clone()
    basis.grad = None
    a(x).sum().backward()
    alone = basis.grad.clone()
    basis.grad = None
    b(x).sum().backward()
    torch.testing.assert_close(alone + basis.grad, both)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_features": 0, "out_features": 4, "rank": 1}, ValueError, "in_features"),
        ({"in_features": 4, "out_features": 4, "rank": 0}, ValueError, "rank"),
        ({"in_features": 4, "out_features": 4, "rank": 2, "basis": torch.zeros(2, 4)}, TypeError, "nn.Parameter"),
        (
            {"in_features": 4, "out_features": 4, "rank": 2, "basis": nn.Parameter(torch.zeros(4, 2))},
            ValueError,
            "basis",
        ),
    ],
)
def test_low_rank_linear_checks_its_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LowRankLinear(**arguments)


def test_from_factors_and_share_check_shapes():
    with pytest.raises(ValueError, match="weight"):
        LowRankLinear.from_factors(torch.zeros(2, 4), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="bias"):
        LowRankLinear.from_factors(torch.zeros(2, 4), torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="rank"):
        share([LowRankLinear(4, 4, 2), LowRankLinear(4, 4, 3)])
    with pytest.raises(ValueError, match="none"):
        share([])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"modules": ["0", "3"], "rank": 2}, "no module '3'"),
        ({"modules": ["0", "0"], "rank": 2}, "twice"),
        ({"modules": ["0", "2"], "rank": 2}, "one input size"),
        ({"modules": ["1"], "rank": 2}, "must be a dense nn.Linear or Conv1D, got ReLU"),
        ({"modules": ["0"], "rank": 7}, "from 1 to 6"),
        ({"modules": ["0"], "rank": True}, "from 1 to 6"),
        ({"modules": "0", "rank": 2}, "non-empty list"),
    ],
)
def test_install_lowrank_checks_before_it_changes_anything(group, message):
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=message):
        install_lowrank(model, [{"modules": ["2"], "rank": 2}, group] if group["modules"] != ["0", "2"] else [group])
    assert type(model[0]) is type(model[2]) is nn.Linear


def test_install_lowrank_keeps_bias_device_dtype_and_mode():
    model = nn.Sequential(nn.Linear(6, 4, dtype=torch.bfloat16), nn.Linear(6, 4, bias=False, device="meta")).eval()
    bias = model[0].bias
    install_lowrank(model, [{"modules": ["0"], "rank": 2}, {"modules": ["1"], "rank": 3}])
    assert model[0].bias is bias
    assert model[0].basis.dtype == model[0].weight.dtype == torch.bfloat16
    assert model[1].basis.is_meta
    assert model[1].bias is None
    assert not model[0].training


def test_a_conv1d_is_replaced_like_a_linear():
    torch.manual_seed(0)
    conv, linear = Conv1D(4, 6), nn.Linear(6, 4)
    assert linear_weight(conv).shape == (4, 6)
    assert linear_weight(conv).data_ptr() == conv.weight.data_ptr()
    model = nn.Sequential(conv, Conv1D(6, 4), nn.Linear(6, 3)).to(torch.bfloat16)
    bias = model[0].bias
    install_lowrank(model, [{"modules": ["0", "2"], "rank": 2}])
    assert model[0].bias is bias
    assert model[0].basis is model[2].basis
    assert (model[0].in_features, model[0].out_features) == (6, 4)
    assert model[0].weight.dtype == torch.bfloat16
    for wrong in (nn.ReLU(), nn.Embedding(3, 4), LowRankLinear(6, 4, 2)):
        with pytest.raises(TypeError, match=f"dense nn.Linear or Conv1D, got {type(wrong).__name__}"):
            linear_weight(wrong)
    assert linear_weight(linear) is linear.weight
