"""Models whose weights stay on disk compress to the same bytes, in memory that does not grow with them."""

import copy
import gc
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref
from contextlib import contextmanager
from pathlib import Path

import freqrank
import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from freqrank.lowrank.modules import shared_groups  # noqa: E402
from freqrank.models import compression, offload  # noqa: E402
from freqrank.models.checkpoint import fingerprint  # noqa: E402
from freqrank.models.offload import load_offloaded  # noqa: E402

OPTIONS = {"ratio": 0.4, "group_size": 2, "progress": False}
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4,
         "max_position_embeddings": 64}  # fmt: skip
GATED = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {
    "llama": ("Llama", GATED),
    "llama-tied": ("Llama", GATED | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", GATED),
    "gemma": ("Gemma", GATED | {"head_dim": 8}),
    "phi3": ("Phi3", GATED | {"pad_token_id": 0}),
    "gpt-neox": ("GPTNeoX", SIZES | {"intermediate_size": 48}),
    "opt": ("OPT", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "gpt2": ("GPT2", {"vocab_size": 64, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64}),
}


def saved(family, folder, dtype=torch.float32, shard="16KB"):
    """A folder of random weights, in several files."""
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which are 0 and 1 at first
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def in_memory(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def tokens():
    return torch.randint(64, (6, 24), generator=torch.Generator().manual_seed(1))


def padded():
    mask = torch.ones(6, 24, dtype=torch.long)
    mask[0, :5] = mask[3, 20:] = 0
    return [{"input_ids": tokens(), "attention_mask": mask}]


def figures(report):
    """What a report says but for time, and for where the weights were."""
    found = report.to_dict()
    del found["seconds"]
    return found | {"notes": [note for note in found["notes"] if "read from disk" not in note]}


def contents(folder):
    """All files of a model, byte by byte."""
    names = {path.name for path in Path(folder).iterdir()} - {"README.md", "freqrank_report.json"}
    return {name: (Path(folder) / name).read_bytes() for name in names}


def tensors(folder):
    """All tensors of a model: transformers cuts one that is offloaded elsewhere into files."""
    held = {}
    for file in Path(folder).glob("*.safetensors"):
        held |= {name: (x.dtype, x.shape, x.view(torch.uint8).numpy().tobytes()) for name, x in load_file(file).items()}
    return held


def same(tmp_path, source, data, **options):
    """Compress a model in memory and one on disk, and compare all that comes of it."""
    want, model = in_memory(source), load_offloaded(source, tmp_path / "offload")
    expected = freqrank.compress(want, data, **OPTIONS | options)
    report = freqrank.compress(model, data, **OPTIONS | options)
    assert figures(report) == figures(expected)
    assert all(parameter.is_meta for parameter in model.parameters())
    ids = tokens()[:2]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want(ids).logits)
    freqrank.save_model(want, tmp_path / "want", max_shard_size="20KB")
    freqrank.save_model(model, tmp_path / "got", max_shard_size="20KB")
    assert not (tmp_path / "got" / "model.safetensors").exists()  # several files
    assert tensors(tmp_path / "got") == tensors(tmp_path / "want")
    assert (tmp_path / "got" / "config.json").read_bytes() == (tmp_path / "want" / "config.json").read_bytes()
    with torch.no_grad():
        assert torch.equal(in_memory(tmp_path / "got")(ids).logits, want(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_architectures(family, tmp_path):
    same(tmp_path, saved(family, tmp_path / "model"), tokens(), refit="sequential")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in ("opt", "gpt2") else pytest.mark.long) for name in FAMILIES]
)
def test_architectures_in_bfloat16(family, tmp_path):
    same(tmp_path, saved(family, tmp_path / "model", torch.bfloat16), tokens(), refit="cross")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "svd", "refit": "own"},
        {"method": "asvd", "allocation": "effective-rank"},
        {"refit": "cross", "allocation": "auto", "ratio": 0.3},
        {"share": "modules", "block_weight": "norm"},
        {"share": "both", "refit": "cross", "depth_weight": 1.5},
        {"group_size": 3, "statistics": "error-aware", "grouping": "similar"},
        {"share": "both", "refit": "own", "storage": "int8"},
    ],
    ids=str,
)
def test_options(options, tmp_path):
    same(tmp_path, saved("llama-tied", tmp_path / "model"), padded(), **options)


@pytest.mark.parametrize("feature_map", ["dijiang", "wdcf", "hybrid"])
def test_a_linearised_model(feature_map, tmp_path):
    model = in_memory(saved("llama", tmp_path / "dense"))
    freqrank.linearize(model, feature_map=feature_map, layers=[1, 3])
    freqrank.save_model(model, tmp_path / "model", max_shard_size="16KB")
    same(tmp_path, tmp_path / "model", tokens(), refit="cross")


def test_a_compressed_model_runs_and_is_saved_again(tmp_path):
    model = in_memory(saved("llama-tied", tmp_path / "dense"))
    freqrank.compress(model, tokens(), **OPTIONS)
    freqrank.save_model(model, tmp_path / "model")
    again = load_offloaded(tmp_path / "model", tmp_path / "offload")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    with pytest.raises(ValueError, match="compressed already"):
        freqrank.compress(again, tokens(), **OPTIONS)
    freqrank.save_model(again, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "model")


def test_one_file_and_another_dtype(tmp_path, monkeypatch):
    source = saved("llama", tmp_path / "model", torch.bfloat16, "1GB")
    monkeypatch.chdir(tmp_path)
    model = load_offloaded("model", "offload", dtype=torch.float32)
    monkeypatch.chdir("/")
    want = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert figures(freqrank.compress(model, tokens(), **OPTIONS)) == figures(
        freqrank.compress(want, tokens(), **OPTIONS)
    )
    freqrank.save_model(model, tmp_path / "got")
    freqrank.save_model(want, tmp_path / "want")
    assert contents(tmp_path / "got") == contents(tmp_path / "want")


def test_a_model_that_transformers_offloaded(tmp_path):
    source = saved("llama-tied", tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, device_map={"": "disk"}, offload_folder=str(tmp_path / "offload")
    )
    want = in_memory(source)
    model(tokens())  # accelerate unties the head here
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    expected = freqrank.compress(want, tokens(), **OPTIONS)
    assert figures(freqrank.compress(model, tokens(), **OPTIONS)) == figures(expected)
    model(tokens())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert shared_groups(model) == shared_groups(want)
    freqrank.save_model(model, tmp_path / "got")
    freqrank.save_model(want, tmp_path / "want")
    assert contents(tmp_path / "got") == contents(tmp_path / "want")


def test_part_on_disk(tmp_path):
    """Groups that reach from memory to disk are kept in memory, biases too."""
    source = saved("opt", tmp_path / "model")
    outside = ("embed_tokens", "embed_positions", "project_in", "project_out", "final_layer_norm")
    parts = dict.fromkeys(["lm_head", *(f"model.decoder.{name}" for name in outside)], "cpu")
    parts |= {f"model.decoder.layers.{i}": "disk" if i in (1, 4) else "cpu" for i in range(5)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, device_map=parts, offload_folder=str(tmp_path / "offload")
    )
    want = in_memory(source)
    expected = freqrank.compress(want, tokens(), refit="cross", **OPTIONS)
    assert figures(freqrank.compress(model, tokens(), refit="cross", **OPTIONS)) == figures(expected)
    blocks = model.model.decoder.layers
    assert not blocks[1].fc1.weight.is_meta
    assert blocks[4].fc1.weight.is_meta
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, want(tokens()).logits)
    freqrank.save_model(model, tmp_path / "got")
    freqrank.save_model(want, tmp_path / "want")
    assert contents(tmp_path / "got") == contents(tmp_path / "want")


def test_fingerprints_are_those_of_the_model_in_memory(tmp_path):
    source = saved("llama-tied", tmp_path / "model")
    assert fingerprint(load_offloaded(source, tmp_path / "offload")) == fingerprint(in_memory(source))


class Stopped(Exception):
    pass


def test_a_stopped_run_goes_on_wherever_the_weights_are(tmp_path, monkeypatch):
    source, checkpoint = saved("llama", tmp_path / "model"), tmp_path / "checkpoint"
    want = in_memory(source)
    freqrank.compress(want, tokens(), refit="cross", **OPTIONS)
    real, calls = compression._Work._factor, []

    def counted(self, group, *args, **more):
        if len(calls) == 5:
            raise Stopped
        calls.append(group)
        return real(self, group, *args, **more)

    monkeypatch.setattr(compression._Work, "_factor", counted)
    model = load_offloaded(source, tmp_path / "offload")
    before = dict(model.named_parameters())
    with pytest.raises(Stopped):
        freqrank.compress(model, tokens(), refit="cross", checkpoint=checkpoint, **OPTIONS)
    assert list((tmp_path / "offload").iterdir()) == []
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, in_memory(source)(tokens()).logits)
    freqrank.save_model(want, tmp_path / "want")
    for again in (in_memory(source), load_offloaded(source, tmp_path / "offload")):
        shutil.copytree(checkpoint, tmp_path / "copy")
        calls.clear()
        calls += [None] * -len(want.freqrank_report.groups)
        monkeypatch.setattr(compression._Work, "_factor", real)
        freqrank.compress(again, tokens(), refit="cross", checkpoint=tmp_path / "copy", **OPTIONS)
        assert figures(again.freqrank_report) == figures(want.freqrank_report)
        freqrank.save_model(again, tmp_path / "got")
        assert contents(tmp_path / "got") == contents(tmp_path / "want")
        shutil.rmtree(tmp_path / "got")
        shutil.rmtree(tmp_path / "copy")


# --- what goes wrong --------------------------------------------------------------------------------------------------


@contextmanager
def unchanged(tmp_path, source="model"):
    """A model on disk, which must come through as it was, with nothing left in its folder."""
    model = load_offloaded(tmp_path / source, tmp_path / "offload")
    before = dict(model.named_parameters())
    yield model
    assert list((tmp_path / "offload").iterdir()) == []
    assert not any(isinstance(module, freqrank.LowRankLinear) for module in model.modules())
    assert all(parameter is before[name] and parameter.is_meta for name, parameter in model.named_parameters())
    assert not hasattr(model, "freqrank_report")
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, in_memory(tmp_path / source)(tokens()).logits)


@contextmanager
def small_files(size):
    """Files end with an error after so many bytes, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("options", [{}, {"refit": "cross"}], ids=str)
def test_no_room_for_hidden_states(options, tmp_path):
    saved("llama", tmp_path / "model")
    with unchanged(tmp_path) as model, small_files(10_000), pytest.raises(OSError, match=r"hidden-.*0\.safetensors"):
        freqrank.compress(model, tokens(), **OPTIONS | options)


def test_no_room_for_factors(tmp_path):
    saved("llama", tmp_path / "model")
    with unchanged(tmp_path) as model, small_files(6000), pytest.raises(OSError, match=r"factors-.*\.safetensors"):
        freqrank.compress(model, tokens()[:1], **OPTIONS)


def test_no_room_for_the_model(tmp_path):
    model = load_offloaded(saved("llama", tmp_path / "model"), tmp_path / "offload")
    freqrank.compress(model, tokens(), **OPTIONS)
    with small_files(6000), pytest.raises(OSError, match="too large"):
        freqrank.save_model(model, tmp_path / "got")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "offload"]
    freqrank.save_model(model, tmp_path / "got")  # with room it can be done again
    with torch.no_grad():
        assert torch.equal(in_memory(tmp_path / "got")(tokens()).logits, model(tokens()).logits)


def test_folders_that_cannot_be_written(tmp_path):
    source = saved("llama", tmp_path / "model")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"):
        load_offloaded(source, tmp_path / "file")
    with unchanged(tmp_path) as model:
        (tmp_path / "offload").rmdir()
        (tmp_path / "offload").touch()
        with pytest.raises(FileExistsError, match="offload"):
            freqrank.compress(model, tokens(), **OPTIONS)
        (tmp_path / "offload").unlink()
        (tmp_path / "offload").mkdir()


def test_a_model_without_an_offload_folder(tmp_path):
    source = saved("llama", tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, device_map={"": "disk"})
    with pytest.raises(ValueError, match="load it with offload_folder"):
        freqrank.compress(model, tokens(), **OPTIONS)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has no data .*no hook"):
        freqrank.compress(empty, tokens(), **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            (options, r"backward pass .*offloaded: an estimated [\d,]+ bytes .*6 sequences of up to 24 tokens")
            for options in (
                {"method": "fwsvd"},
                {"method": "best"},
                {"output_weight": "fisher"},
                {"allocation": "loss"},
            )
        ),
        ({"allocation": "sensitivity"}, r"'sensitivity' .*estimated 1\d\d,\d{3} bytes .*read \d+ times .*operations"),
    ],
)
def test_what_needs_the_whole_model_says_what_it_would_take(options, message, tmp_path):
    saved("llama", tmp_path / "model")
    with unchanged(tmp_path) as model, pytest.raises(ValueError, match=message):
        freqrank.compress(model, tokens(), **OPTIONS | options)


def test_what_else_needs_weights_in_memory(tmp_path):
    saved("llama", tmp_path / "model")
    with unchanged(tmp_path) as model, pytest.raises(ValueError, match="offloaded"):
        freqrank.linearize(model)
    model = load_offloaded(tmp_path / "model", tmp_path / "offload")
    freqrank.compress(model, tokens(), **OPTIONS)
    with pytest.raises(ValueError, match="offloaded"):
        freqrank.merge(model)


def test_weights_that_are_damaged(tmp_path):
    source = saved("llama", tmp_path / "model", shard="1GB")
    held = load_file(source / "model.safetensors")
    held["model.layers.3.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    model = load_offloaded(source, tmp_path / "offload")
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.up_proj has NaN or Inf"):
        freqrank.compress(model, tokens(), **OPTIONS)
    assert list((tmp_path / "offload").iterdir()) == []
    (source / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        freqrank.compress(model, tokens(), **OPTIONS)


# --- its parts --------------------------------------------------------------------------------------------------------


def test_weights_stay_for_a_context(tmp_path):
    model = load_offloaded(saved("llama-tied", tmp_path / "model"), tmp_path / "offload")
    layer, want = model.model.layers[0].mlp.up_proj, in_memory(tmp_path / "model").model.layers[0].mlp.up_proj.weight
    empty = layer.weight
    with offload.resident([layer, model]):
        held = layer.weight
        assert torch.equal(held, want)
        with offload.resident([layer]):  # is there already
            assert layer.weight is held
        layer(torch.ones(1, 32))
        assert layer.weight is held
        assert model.lm_head.weight.is_meta
    assert layer.weight is empty
    with pytest.raises(ZeroDivisionError), offload.resident([layer]):
        raise ZeroDivisionError
    assert layer.weight is empty
    with pytest.raises(RuntimeError, match="shape"):
        layer(torch.ones(1, 31))  # fails before the hook takes the weight away
    layer(torch.ones(1, 32))
    assert layer.weight is empty


def test_what_accelerate_wrote_into_files_of_its_own(tmp_path):
    norm = torch.nn.BatchNorm1d(3)
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), norm).eval()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, before = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
        accelerate.disk_offload(model, tmp_path, torch.device("cpu"), offload_buffers=True)
        offload.adopt(model)
        assert norm.running_mean.is_meta
        assert torch.equal(model(x), want)
        with offload.resident(model.modules()):
            assert torch.equal(norm.running_mean, before["1.running_mean"])
            assert torch.equal(model(x), want)
        assert norm.running_mean.is_meta
        found = dict(offload.named_tensors(model))
        assert found.keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())


def test_a_shard_of_an_offloaded_model_is_small(tmp_path, monkeypatch):
    source, sizes = saved("llama", tmp_path / "model"), []
    for model in (in_memory(source), load_offloaded(source, tmp_path / "offload")):
        real = type(model).save_pretrained

        def save(self, folder, max_shard_size, real=real):
            sizes.append(max_shard_size)
            return real(self, folder, max_shard_size=max_shard_size)

        monkeypatch.setattr(type(model), "save_pretrained", save)
        freqrank.save_model(model, tmp_path / f"got-{len(sizes)}")
        monkeypatch.undo()
    assert sizes == ["5GB", "500MB"]


def test_command(tmp_path, monkeypatch):
    from freqrank.cli import app
    from typer.testing import CliRunner

    monkeypatch.setitem(SIZES, "vocab_size", 256)
    monkeypatch.setitem(FAMILIES, "bytes", ("OPT", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16}))
    source = saved("bytes", tmp_path / "model")
    common = ["compress", source, "--calibration", "stdlib:train", "--samples", 2, "--length", 64, "--text",
              "stdlib:test", "--limit", 600, "--json"]  # fmt: skip
    found = []
    for more in ((), ("--offload", tmp_path / "offload")):
        folder = tmp_path / f"got-{len(found)}"
        done = CliRunner().invoke(app, [str(part) for part in (*common, "--output", folder, *more)])
        assert done.exit_code == 0, done.output
        found.append(json.loads(done.stdout))
    assert contents(tmp_path / "got-0") == contents(tmp_path / "got-1")
    for name in ("before", "after", "loss"):
        assert found[0][name] == found[1][name]
    assert "read from disk" in found[1]["report"]["notes"][-1]
    assert list((tmp_path / "offload").iterdir()) == []
    refused = CliRunner().invoke(
        app, [str(part) for part in (*common, "--output", tmp_path / "x", *more, "--method", "fwsvd")]
    )
    assert isinstance(refused.exception, ValueError) or refused.exit_code == 2
    assert list((tmp_path / "offload").iterdir()) == []
    assert not (tmp_path / "x").exists()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_copies_of_blocks_go_at_once(tmp_path, monkeypatch):
    """Hooks hold a copied block in cycles, which Python finds late: its weights must not wait for that."""
    model = load_offloaded(saved("llama", tmp_path / "model"), tmp_path / "offload")
    weights, alive = [], []

    def deepcopy(block):
        alive.append(sum(weight() is not None for weight in weights))
        copied = copy.deepcopy(block)
        weights.extend(weakref.ref(parameter) for parameter in copied.parameters())
        return copied

    monkeypatch.setattr(compression, "copy", types.SimpleNamespace(deepcopy=deepcopy))
    gc.disable()
    try:
        freqrank.compress(model, tokens(), refit="cross", **OPTIONS)
    finally:
        gc.enable()
    assert alive == [0] * 5
    assert len(weights) == 5 * 9


LIMITED = """
import os, resource, signal, sys, traceback
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a thread that finds no memory for itself is waited for forever
from pathlib import Path
import torch, torch._dynamo, transformers, freqrank
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from freqrank.models import compression, saving
from freqrank.models.offload import load_offloaded, named_tensors

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
root, ids = Path(sys.argv[1]), torch.arange(64).view(2, 32)

def megabytes(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(what))

def limit(headroom):  # brk and private writable mappings: what torch allocates, and files that are mapped
    size = int((megabytes("VmData") + headroom) * 2**20)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))

def load(layers):
    limit(HEADROOM)
    AutoModelForCausalLM.from_pretrained(root / f"model-{layers}")

def hold(layers):
    limit(HEADROOM)
    return list(named_tensors(load_offloaded(root / f"model-{layers}", root / "offload")))

def stream(layers, **options):
    limit(HEADROOM)
    before = megabytes("VmRSS")
    model = load_offloaded(root / f"model-{layers}", root / "offload")
    freqrank.compress(model, ids, ratio=0.4, progress=False, **options)
    freqrank.save_model(model, root / f"small-{layers}", max_shard_size="10MB")
    print("RESULT peak", megabytes("VmHWM") - before)
    with torch.no_grad():
        torch.save(model(ids).logits, root / f"logits-{layers}")

HEADROOM = float(sys.argv[2])
for name, run in eval(sys.argv[3]).items():  # each in a process of its own, which has imported everything
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        try:
            run()
            print("RESULT end", name, "done", flush=True)
        except BaseException as error:
            traceback.print_exc()
            print("RESULT end", name, type(error).__name__, " ".join(str(error).split()), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def wide(folder, layers):
    """A model of random weights, a file a block, whose blocks are large beside the time they take; its bytes."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, architectures=["LlamaForCausalLM"], dtype="float32",
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    noise = torch.randn(1 << 19, generator=torch.Generator().manual_seed(0)) * 0.05
    files, size = {}, 0
    for number, (name, empty) in enumerate(model.state_dict().items()):
        shift = 997 * number % (noise.numel() - empty.numel())
        data = torch.ones(empty.shape) if empty.ndim == 1 else noise[shift:][: empty.numel()].view(empty.shape)
        file = f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors"
        files.setdefault(file, {})[name] = data.clone()
        size += data.nbytes
    for file, held in files.items():
        save_file(held, folder / file, metadata={"format": "pt"})
    places = {name: file for file, held in files.items() for name in held}
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def limited(folder, headroom, runs):
    """Output of runs with so many MiB above what a process takes that has imported everything."""
    command = [sys.executable, "-c", LIMITED, str(folder), str(headroom), runs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = [line.removeprefix("RESULT ").split(maxsplit=2) for line in done.stdout.splitlines() if "RESULT" in line]
    ends = {name: end for kind, name, end in (line for line in found if line[0] == "end")}
    assert ends, done.stderr[-3000:]
    return ends, [float(line[1]) for line in found if line[0] == "peak"], done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits and counts of memory are those of Linux")
def test_a_model_larger_than_memory(tmp_path):
    few, many, headroom = 6, 30, 80
    wide(tmp_path / f"model-{few}", few)
    size = wide(tmp_path / f"model-{many}", many) / 2**20
    assert size > 1.5 * headroom
    ends, peaks, errors = limited(
        tmp_path,
        headroom,
        f"""{{"load": lambda: load({many}), "hold": lambda: hold({many}),
              "few": lambda: stream({few}), "many": lambda: stream({many})}}""",
    )
    for kind in ("load", "hold"):
        assert ends[kind].startswith(("RuntimeError", "MemoryError")), ends[kind]
        assert re.search("allocate|memory", ends[kind], re.IGNORECASE), ends[kind]
    assert ends["few"] == ends["many"] == "done", errors[-3000:]
    # 24 more blocks of 4 MiB: what grows is modules, hooks and the report, not weights
    assert peaks[1] - peaks[0] < 16, peaks
    model = in_memory(tmp_path / f"small-{many}")
    with torch.no_grad():
        assert torch.equal(model(torch.arange(64).view(2, 32)).logits, torch.load(tmp_path / f"logits-{many}"))


KILLED = """
import sys
import time
import torch
import freqrank
sys.path.insert(0, sys.argv[1])
from test_offload import OPTIONS, load_offloaded, tokens
torch.set_num_threads(1)
model = load_offloaded(sys.argv[2], sys.argv[2] + "-offload")
freqrank.compress(model, tokens(), checkpoint=sys.argv[2] + "-checkpoint", refit="cross", **OPTIONS)
freqrank.save_model(model, sys.argv[3])
"""


@pytest.mark.long
def test_a_run_that_is_killed_three_times_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "deep", ("Llama", GATED | {"num_hidden_layers": 12}))
    source, checkpoint = saved("deep", tmp_path / "model"), tmp_path / "model-checkpoint"
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(source), str(tmp_path / "got")]
    for kill in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(checkpoint.glob("group-*"))) < 12 * (kill + 1):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 36 <= len(list(checkpoint.glob("group-*"))) < 66
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=300)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        want = in_memory(source)
        freqrank.compress(want, tokens(), refit="cross", **OPTIONS)
    finally:
        torch.set_num_threads(threads)
    freqrank.save_model(want, tmp_path / "want")
    assert contents(tmp_path / "got") == contents(tmp_path / "want")
