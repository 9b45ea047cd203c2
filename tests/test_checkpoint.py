"""Runs that are stopped, killed ones among them, go on where they were and end with the same bytes."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import freqrank
import pytest
import torch
from safetensors import SafetensorError

transformers = pytest.importorskip("transformers")

from freqrank.models import compression  # noqa: E402
from freqrank.models.checkpoint import Checkpoint, fingerprint  # noqa: E402

OPTIONS = {"ratio": 0.4, "group_size": 2, "progress": False}


def build(layers=5):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tokens(seed=1):
    return torch.randint(64, (8, 24), generator=torch.Generator().manual_seed(seed))


def report(model):
    found = model.freqrank_report.to_dict()
    return {key: value for key, value in found.items() if key not in ("seconds", "notes")}


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "svd-llm", "refit": "own"},
        {"refit": "cross"},
        {"refit": "sequential", "allocation": "auto"},
        {"method": "fwsvd", "allocation": "effective-rank"},
        {"method": "asvd", "allocation": "sensitivity", "ratio": 0.6},
        {"method": "best"},
        {"statistics": "error-aware", "refit": "cross", "grouping": "similar", "storage": "int8"},
    ],
    ids=str,
)
def test_a_stopped_run_goes_on(options, tmp_path, monkeypatch):
    options = OPTIONS | options
    whole = build()
    freqrank.compress(whole, tokens(), **options)
    model, folder = build(), tmp_path / "checkpoint"
    real, calls = compression._Work._factor, [0]

    def counted(*arguments, **more):
        calls[0] += 1
        if calls[0] == stop:
            raise Stopped
        return real(*arguments, **more)

    monkeypatch.setattr(compression._Work, "_factor", counted)
    stop = 4
    with pytest.raises(Stopped):
        freqrank.compress(model, tokens(), checkpoint=folder, **options)
    assert len(list(folder.glob("group-*.safetensors"))) == 3
    monkeypatch.setattr(compression, "squared_singular_values", None)  # nothing of the first pass is done again
    monkeypatch.setattr(compression, "decompose", None)
    stop = 0
    freqrank.compress(model, tokens(), checkpoint=folder, **options)
    assert calls[0] == 4 + len(whole.freqrank_report.groups) - 3
    assert report(model) == report(whole)
    other = dict(model.named_parameters())
    assert all(torch.equal(parameter, other[name]) for name, parameter in whole.named_parameters())
    calls[0] = 0
    again = build()
    freqrank.compress(again, tokens(), checkpoint=folder, **options)  # everything is there
    assert calls[0] == 0
    assert report(again) == report(whole)


@pytest.mark.parametrize("storage", [None, "int8"])
def test_a_run_that_goes_on_has_the_same_bits_in_float64(storage, tmp_path):
    """Where nothing is rounded away: refits to what was kept must not see that it was kept."""
    options = OPTIONS | {"refit": "cross", "storage": storage, "checkpoint": tmp_path}
    whole, again = build(3).double(), build(3).double()
    freqrank.compress(whole, tokens(), **options)
    freqrank.compress(again, tokens(), **options)
    other = again.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in whole.state_dict().items())


KILLED = """
import sys
import torch
import freqrank
sys.path.insert(0, sys.argv[1])
from test_checkpoint import OPTIONS, build, tokens
torch.set_num_threads(1)
model = build(12)
freqrank.compress(model, tokens(), checkpoint=sys.argv[2], refit="cross", **OPTIONS)
model.save_pretrained(sys.argv[3])
"""


def kills(times, tmp_path, seed):
    """A run is killed so many times, at random, and then finished; the folder of what it wrote."""
    here, generator = str(Path(__file__).parent), random.Random(seed)
    checkpoint = tmp_path / f"checkpoint-{seed}"
    command = [sys.executable, "-c", KILLED, here, str(checkpoint), str(tmp_path / f"model-{seed}")]
    for _ in range(times):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        before = len(list(checkpoint.glob("group-*")))
        wanted = before + generator.randint(1, 12)
        while process.poll() is None and len(list(checkpoint.glob("group-*"))) < wanted:
            time.sleep(0.005)
        time.sleep(generator.random() * 0.05)
        process.kill()
        process.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=300)
    return tmp_path / f"model-{seed}"


def same_bytes(tmp_path, times, seed):
    model = build(12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        freqrank.compress(model, tokens(), refit="cross", **OPTIONS)
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(tmp_path / "whole")
    folder = kills(times, tmp_path, seed)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in folder.iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes cannot be killed here")
def test_a_run_that_is_killed_three_times_ends_with_the_same_bytes(tmp_path):
    same_bytes(tmp_path, 3, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 5))
def test_runs_that_are_killed_twenty_times_end_with_the_same_bytes(tmp_path, seed):
    same_bytes(tmp_path, 5, seed)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    freqrank.compress(build(), tokens(), checkpoint=folder, **OPTIONS)
    before = sorted(path.read_bytes() for path in folder.iterdir())
    for options, ids, what in (({"ratio": 0.5}, tokens(), "ratio"), ({"method": "svd"}, tokens(), "method"),
                               ({}, tokens(2), "data")):  # fmt: skip
        model = build()
        with pytest.raises(ValueError, match=f"holds a run that differs in .*{what}"):
            freqrank.compress(model, ids, checkpoint=folder, **OPTIONS | options)
        assert not any(isinstance(module, freqrank.LowRankLinear) for module in model.modules())
    assert sorted(path.read_bytes() for path in folder.iterdir()) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty and holds no checkpoint"):
        freqrank.compress(build(), tokens(), checkpoint=tmp_path / "other", **OPTIONS)


def test_a_damaged_piece_is_named(tmp_path):
    folder = tmp_path / "checkpoint"
    freqrank.compress(build(), tokens(), checkpoint=folder, **OPTIONS)
    piece = folder / "group-00003.safetensors"
    piece.write_bytes(piece.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"group-00003\.safetensors is damaged .*delete it"):
        freqrank.compress(build(), tokens(), checkpoint=folder, **OPTIONS)
    piece.unlink()
    freqrank.compress(build(), tokens(), checkpoint=folder, **OPTIONS)
    (folder / "checkpoint.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint\.json is damaged"):
        freqrank.compress(build(), tokens(), checkpoint=folder, **OPTIONS)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    store = Checkpoint(tmp_path / "c", {"run": 1})
    store.save("first", {"x": torch.ones(2)}, {"n": 1})

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("freqrank.models.files.save_file", full)
    for name in ("first", "second"):
        with pytest.raises(OSError, match="No space left"):
            store.save(name, {"x": torch.zeros(2)}, {})
    monkeypatch.undo()
    tensors, about = Checkpoint(tmp_path / "c", {"run": 1}).load("first")
    assert tensors["x"].tolist() == [1, 1]
    assert about == {"n": 1}
    assert store.load("second") is None
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["checkpoint.json", "first.safetensors"]
    Checkpoint.remove(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_fingerprints_see_names_values_and_types():
    layer = torch.nn.Linear(2, 2)
    found = {fingerprint(layer), fingerprint(layer, torch.ones(2)), fingerprint(layer, torch.ones(1, 2))}
    found |= {
        fingerprint(layer, torch.ones(2).half()),
        fingerprint(torch.nn.Sequential(layer)),
        fingerprint(layer.half()),
    }
    assert len(found) == 6
