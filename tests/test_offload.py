"""Models whose weights stay on disk compress to the same bytes, in memory that does not grow with them."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import freqrank
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_architectures(family, dtype, tmp_path):
    same(tmp_path, saved(family, tmp_path / "model", dtype), tokens(), refit="sequential")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "svd"},
        {"method": "asvd", "allocation": "effective-rank"},
        {"method": "svd-llm", "refit": "own"},
        {"refit": "cross", "allocation": "auto", "ratio": 0.3},
        {"share": "modules", "block_weight": "norm"},
        {"share": "both", "refit": "cross", "depth_weight": 1.5},
    ],
    ids=str,
)
def test_options(options, tmp_path):
    same(tmp_path, saved("llama-tied", tmp_path / "model"), padded(), **options)


def test_one_file_and_another_dtype(tmp_path):
    source = saved("llama", tmp_path / "model", torch.bfloat16, "1GB")
    model = load_offloaded(source, tmp_path / "offload", dtype=torch.float32)
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

    def counted(self, group, **more):
        if len(calls) == 5:
            raise Stopped
        calls.append(group)
        return real(self, group, **more)

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


# --- memory -----------------------------------------------------------------------------------------------------------


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
