"""The command line: what it prints, what it writes, and how it fails."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")

from freqrank.cli import app  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

TEXT = "def f(x):\n    return x + 1\n\n" * 60


@pytest.fixture
def run():
    """Runs a command in this process: exit code, stdout, stderr."""

    def call(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny byte-level model, and a text file, in a folder."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(root / "tiny")
    (root / "text.txt").write_text(TEXT)
    return root


def failed(result, *words):
    """Exit code 2, nothing on stdout, one line on stderr that says these words, no traceback."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("freqrank: ")
    for word in words:
        assert word in lines[0]


def test_info(run):
    shown = run("info")
    assert shown.exit_code == 0
    assert torch.__version__ in shown.stdout
    assert "loaded" in shown.stdout
    facts = json.loads(run("info", "--json").stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["libraries"]["cpu"].startswith("loaded")
    assert facts["cpu"]["isa"] in facts["libraries"]["cpu"]
    assert facts["cpu"]["threads"] == torch.get_num_threads()


def test_eval_agrees_with_the_library(run, folder):
    from freqrank.evaluate import loss

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "tiny")
    ids = torch.tensor(list(TEXT.encode()))[:500]
    arguments = ["eval", folder / "tiny", "--text", folder / "text.txt", "--window", 64, "--stride", 32, "--limit", 500]
    result = json.loads(run(*arguments, "--json").stdout)
    assert result["loss"] == pytest.approx(loss(model, ids, window=64, stride=32), abs=1e-6)
    assert result["perplexity"] == pytest.approx(torch.tensor(result["loss"]).exp().item(), rel=1e-5)
    assert (result["tokens"], result["stride"], result["reduction"]) == (500, 32, "token")
    windowed = json.loads(run(*arguments, "--reduction", "window", "--remainder", "drop", "--json").stdout)
    assert windowed["loss"] != result["loss"]
    assert "nats" in run(*arguments).stdout


def test_the_default_window_is_the_models_context(run, folder):
    result = json.loads(run("eval", folder / "tiny", "--text", folder / "text.txt", "--limit", 300, "--json").stdout)
    assert result["window"] == 256


def test_eval_reads_the_standard_library(run, folder):
    result = run("eval", folder / "tiny", "--text", "stdlib:test", "--limit", 100, "--window", 50, "--json")
    assert json.loads(result.stdout)["tokens"] == 100


def test_eval_with_a_tokenizer(run, folder, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", *dict.fromkeys(TEXT.split())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "words")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "words")
    result = run("eval", tmp_path / "words", "--text", folder / "text.txt", "--window", 16, "--json")
    assert json.loads(result.stdout)["tokens"] == len(TEXT.split())
    made = run("generate", tmp_path / "words", "--prompt", "return x", "--max-new-tokens", 3, "--json")
    assert json.loads(made.stdout)["tokens"] == 3


def test_generate(run, folder):
    arguments = ["generate", folder / "tiny", "--prompt", "def ", "--max-new-tokens", 8]
    shown = run(*arguments)
    assert shown.exit_code == 0
    assert shown.stdout.startswith("def ")
    first, second, other = (
        json.loads(run(*arguments, "--temperature", 1, "--seed", seed, "--json").stdout)["text"] for seed in (1, 1, 2)
    )
    assert first == second != other


@pytest.mark.parametrize("method", ["svd", "fwsvd", "asvd", "svd-llm", "basis-sharing", "lisc"])
def test_compress(run, folder, tmp_path, method):
    result = run(
        "compress", folder / "tiny", "-o", tmp_path / "small", "--calibration", folder / "text.txt", "--samples", 8,
        "--length", 64, "--method", method, "--ratio", 0.5, "--text", folder / "text.txt", "--limit", 200, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["after"]["parameters"] < report["before"]["parameters"]
    scored = json.loads(run("eval", tmp_path / "small", "--text", folder / "text.txt", "--limit", 200, "--json").stdout)
    assert scored["loss"] == pytest.approx(report["loss"]["after"], abs=1e-5)
    assert scored["parameters"] == report["after"]["parameters"]
    again = run("compress", folder / "tiny", "--output", tmp_path / "small", "--calibration", folder / "text.txt")
    failed(again, "not empty")


def test_a_stopped_compression_goes_on(run, folder, tmp_path, monkeypatch):
    from freqrank.models import compression

    def compress(name):
        arguments = ["compress", folder / "tiny", "-o", tmp_path / name, "--calibration", folder / "text.txt"]
        return run(*arguments, "--checkpoint", tmp_path / "pieces", "--samples", "4", "--length", "32")

    real = compression._convert
    monkeypatch.setattr(compression, "_convert", lambda *_: (_ for _ in ()).throw(ValueError("stopped")))
    failed(compress("out"), "stopped")
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "pieces").glob("group-*"))) > 0
    monkeypatch.setattr(compression, "_convert", real)
    monkeypatch.setattr(compression._Work, "_factor", None)  # all of it is there
    assert compress("out").exit_code == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "pieces").exists()


def test_merge(run, folder, tmp_path):
    text = folder / "text.txt"
    run("compress", folder / "tiny", "-o", tmp_path / "small", "--calibration", text, "--ratio", "0.4")
    result = run("merge", tmp_path / "small", "-o", tmp_path / "dense", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["after"]["parameters"] > facts["before"]["parameters"]
    losses = [
        json.loads(run("eval", tmp_path / name, "--text", text, "--json").stdout)["loss"] for name in ("small", "dense")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    failed(run("merge", tmp_path / "dense", "-o", tmp_path / "again"), "nothing to merge")
    assert not (tmp_path / "again").exists()


def test_compare(run, folder, tmp_path):
    text = folder / "text.txt"
    arguments = ["compare", folder / "tiny", "-o", tmp_path / "out", "--calibration", text, "--validation", text]
    arguments += ["--test", text, "--methods", "svd,lisc", "--ratios", "0.4", "--group-sizes", "2,4", "--samples", "4"]
    arguments += ["--length", "64", "--window", "64", "--refits", "none,own", "--limit", "256"]
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(r["name"], r["group_size"], r["refit"]) for r in rows[3:]] == [
        ("svd", 1, None), ("svd", 1, "own"),
        ("lisc", 2, None), ("lisc", 4, None), ("lisc", 2, "own"), ("lisc", 4, "own"),
    ]  # fmt: skip
    assert (tmp_path / "out" / "report.html").is_file()
    again = run(*arguments)
    assert "lisc + own refit" in again.stdout
    assert "40% removed" in again.stdout


def test_linearize(run, folder, tmp_path):
    result = run(
        "linearize", folder / "tiny", "-o", tmp_path / "linear", "--layers", "0,2", "--train", folder / "text.txt",
        "--steps", 2, "--batch", 2, "--length", 32, "--text", folder / "text.txt", "--limit", 200, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["report"]["layers"] == [0, 2]
    assert set(report["loss"]) == {"before", "converted", "trained"}
    scored = run("eval", tmp_path / "linear", "--text", folder / "text.txt", "--limit", 200, "--json")
    assert json.loads(scored.stdout)["loss"] == pytest.approx(report["loss"]["trained"], abs=1e-5)
    made = run("generate", tmp_path / "linear", "--prompt", "def ", "--max-new-tokens", 4, "--json")
    assert json.loads(made.stdout)["tokens"] == 4


def test_linearize_passes_the_options_of_the_layer_and_of_training(run, folder, tmp_path):
    result = run(
        "linearize", folder / "tiny", "-o", tmp_path / "linear", "--feature-map", "hybrid", "--keep-layers", "1,-1",
        "--temperature", "0.5", "--decay", "learned", "--norm", "rms", "--gate", "none", "--num-frequencies", 12,
        "--attention-window", 8, "--sinks", 2, "--position-table", 16, "--train", folder / "text.txt", "--steps", 4,
        "--batch", 2, "--length", 16, "--recipe", "align", "--lr", "1e-2", "--accumulate", 2, "--trained", "attention",
        "--precision", "bfloat16", "--recompute", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["report"]["layers"], found["report"]["kept"]) == ([0, 2], [1, 3])
    expected = {
        "feature_map": "hedgehog", "temperature": 0.5, "decay": "learned", "norm": "rms", "gate": "none", "window": 8,
        "sinks": 2, "num_frequencies": 12, "position_table": 16,
    }  # fmt: skip
    assert expected.items() <= found["report"]["options"].items()
    training = found["training"]
    expected = {
        "batch_size": 2, "lr": 1e-2, "accumulate": 2, "train": "attention", "precision": "bfloat16",
        "checkpointing": True,
    }  # fmt: skip
    assert (training["recipe"], training["steps"], training["tokens"]) == ("align", 4, 4 * 2 * 2 * 16)
    assert {name: training["settings"].get(name) for name in expected} == expected
    assert (tmp_path / "linear" / "training.png").read_bytes()[:4] == b"\x89PNG"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "linear")
    original = transformers.AutoModelForCausalLM.from_pretrained(folder / "tiny")
    assert torch.equal(loaded.model.embed_tokens.weight, original.model.embed_tokens.weight)  # only attention trained
    attention = [m.model.layers[0].self_attn.q_proj.weight for m in (loaded, original)]
    assert not torch.equal(*attention)


def test_a_stopped_fine_tuning_goes_on(run, folder, tmp_path, monkeypatch):
    from freqrank.models import saving

    def linearize(name, *more):
        arguments = ["linearize", folder / "tiny", "-o", tmp_path / name, "--train", folder / "text.txt", "--steps", 2]
        return run(*arguments, "--batch", 2, "--length", 16, "--json", *more)

    whole = json.loads(linearize("whole").stdout)["training"]
    real = saving.save_model
    monkeypatch.setattr(saving, "save_model", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    stopped = linearize("out", "--checkpoint", tmp_path / "kept")
    assert stopped.exit_code == 2
    assert stopped.stderr.splitlines()[-1] == "freqrank: disk full"
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "kept").is_dir()
    monkeypatch.setattr(saving, "save_model", real)
    again = linearize("out", "--checkpoint", tmp_path / "kept")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["training"]["losses"] == whole["losses"]
    assert not (tmp_path / "kept").exists()
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_convert(run, folder, tmp_path):
    text = folder / "text.txt"
    arguments = [
        "convert", folder / "tiny", "-o", tmp_path / "both", "--calibration", text, "--train", text, "--ratio", 0.5,
        "--samples", 4, "--calibration-length", 64, "--group-size", 4, "--refit", "own", "--keep-layers", "0",
        "--norm", "rms", "--steps", 3, "--batch", 2, "--length", 32, "--lr", "1e-2", "--text", text, "--limit", 200,
        "--contexts", "24,48", "--page", tmp_path / "page",
    ]  # fmt: skip
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    report = found["report"]
    assert set(report["losses"]) == {"original", "compressed", "linearised", "trained"}
    assert report["compression"]["settings"]["group_size"] == 4
    assert report["compression"]["settings"]["refit"] == "own"
    assert report["compression"]["tokens"] == 4 * 64
    assert report["linearization"]["layers"] == [1, 2, 3]
    assert report["linearization"]["options"]["norm"] == "rms"
    assert report["training"]["recipe"] == "align"
    assert report["training"]["tokens"] == 3 * 2 * 32
    assert [m["context"] for m in report["memory"]] == [24, 48, 192, 768]
    assert found["saved"]["parameters"] == report["converted"]["parameters"] < report["original"]["parameters"]
    assert found["saved"]["loss"] is None  # saved as it was computed
    scored = json.loads(run("eval", tmp_path / "both", "--text", text, "--limit", 200, "--json").stdout)
    assert scored["loss"] == pytest.approx(report["losses"]["trained"], abs=1e-5)
    assert scored["parameters"] == report["converted"]["parameters"]
    made = run("generate", tmp_path / "both", "--prompt", "def ", "--max-new-tokens", 4, "--json")
    assert json.loads(made.stdout)["tokens"] == 4
    assert (tmp_path / "both" / "training.png").is_file()
    assert "Held-out loss" in (tmp_path / "page" / "report.html").read_text()
    before = sorted((tmp_path / "both").iterdir())
    failed(run(*arguments), "not empty")
    assert sorted((tmp_path / "both").iterdir()) == before


def test_convert_shows_tables_and_saves_in_the_models_own_format(run, folder, tmp_path):
    result = run(
        "convert", "bundled:base", "-o", tmp_path / "both", "--calibration", "stdlib:train", "--samples", 8,
        "--calibration-length", 64, "--train", "stdlib:train", "--steps", 2, "--batch", 2, "--length", 32,
        "--text", "stdlib:test", "--limit", 1000, "--contexts", "32,64",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in ("Held-out loss", "Memory of one sequence", "in turns", "bfloat16", "loss as saved"):
        assert words in result.stdout
    weights = load_file(tmp_path / "both" / "model.safetensors")
    dtypes = {w.dtype for name, w in weights.items() if "decay" not in name and "feature_map" not in name}
    assert dtypes == {torch.bfloat16}
    shown = next(line for line in result.stdout.splitlines() if "loss as saved" in line)
    scored = json.loads(run("eval", tmp_path / "both", "--text", "stdlib:test", "--limit", 1000, "--json").stdout)
    # eval computes in float32 with these weights, the line above was computed in bfloat16
    assert float(shown.split()[3]) == pytest.approx(scored["loss"], abs=0.02)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    ids = torch.tensor([list(b"def ")])
    assert loaded.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 8)


def test_convert_without_training_says_so(run, folder, tmp_path):
    arguments = ["convert", folder / "tiny", "-o", tmp_path / "both", "--calibration", folder / "text.txt"]
    result = run(*arguments, "--samples", 4, "--contexts", "none", "--no-teacher")
    assert result.exit_code == 0, result.output
    assert "note: not trained" in result.stdout
    assert "Memory of one sequence" not in result.stdout
    assert not (tmp_path / "both" / "training.png").exists()
    assert (tmp_path / "both" / "config.json").is_file()


def test_training_that_fails_writes_no_folder_and_a_second_try_goes_on(run, folder, tmp_path, monkeypatch):
    from freqrank.models import compression

    text = folder / "text.txt"

    def convert(lr):
        return run(
            "convert", folder / "tiny", "-o", tmp_path / "both", "--calibration", text, "--samples", 4, "--train", text,
            "--steps", 20, "--batch", 2, "--length", 16, "--contexts", "none", "--checkpoint", tmp_path / "kept",
            "--recipe", "released", "--lr", lr,
        )  # fmt: skip

    result = convert("1e30")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "not finite" in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("freqrank: ")
    assert not (tmp_path / "both").exists()
    assert (tmp_path / "kept" / "compression").is_dir()
    failed(convert("1e-3"), "training", "differs in lr")
    for path in (tmp_path / "kept" / "training").iterdir():
        path.unlink()
    monkeypatch.setattr(compression._Work, "_factor", None)  # the compression is not done again
    assert convert("1e-3").exit_code == 0
    assert (tmp_path / "both" / "config.json").is_file()
    assert not (tmp_path / "kept").exists()


def test_demo(run, folder, tmp_path):
    twin = tmp_path / "twin"
    assert run("linearize", folder / "tiny", "-o", twin).exit_code == 0
    arguments = ["demo", "--quick", "--base", folder / "tiny", "--twin", twin, "--output", tmp_path / "out"]
    shown = run(*arguments)
    assert shown.exit_code == 0, shown.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    page = (tmp_path / "out" / "report.html").read_text()
    for section in ("compression", "input_scales", "planted", "linearization", "decoding", "kernels"):
        assert results[section], section
        assert f'id="{section}"' in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("data:image/png;base64,") == len(list((tmp_path / "out").glob("*.png"))) >= 5
    assert "Computed in" in shown.stdout
    scales = results["input_scales"]
    assert scales["largest_logit_change"] == 0.0
    for row in scales["rows"]:
        if "block weight" in row["variant"]:
            losses = list(row["loss"].values())
            assert max(losses) - min(losses) < 1e-5
    calibrated = {row["variant"]: max(row["errors"]) / min(row["errors"]) for row in results["planted"]["rows"]}
    assert calibrated["calibrated"] < 1.2 < 2 < calibrated["as they come"]
    (tmp_path / "out" / "notes.txt").write_text("mine")
    failed(run(*arguments), "not empty")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.filterwarnings("default")
def test_a_short_calibration_text_is_read_once_and_warns_with_both_numbers(run, folder, tmp_path):
    (tmp_path / "short.txt").write_text("def f():" * 5)
    result = run(
        "compress", folder / "tiny", "-o", tmp_path / "small", "--calibration", tmp_path / "short.txt", "--length", 16,
        "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["report"]["tokens"] == 40
    assert "warning: calibration has 40 tokens, fewer than the 64 rows" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "TINY"], ["--text"]),
        (["eval", "TINY", "--text", "nowhere.txt"], ["--text", "nowhere.txt"]),
        (["eval", "TINY", "--text", "stdlib:half"], ["train", "half"]),
        (["eval", "TINY", "--text", "EMPTY"], ["empty"]),
        (["eval", "TINY", "--text", "TEXT", "--window", "1"], ["--window"]),
        (["eval", "TINY", "--text", "TEXT", "--window", "8", "--stride", "9"], ["stride", "9"]),
        (["eval", "TINY", "--text", "TEXT", "--reduction", "mean"], ["reduction", "'token', 'window'", "'mean'"]),
        (["eval", "TINY", "--text", "TEXT", "--dtype", "int8"], ["--dtype", "int8"]),
        (["eval", "some/name", "--text", "TEXT"], ["some/name", "--download"]),
        (["eval", "bundled:nothing", "--text", "TEXT"], ["bundled:base", "nothing"]),
        (["eval", "ROOT", "--text", "TEXT"], ["config.json"]),
        (["eval", "TEXT", "--text", "TEXT"], ["is a file"]),
        (["generate", "TINY", "--prompt", ""], ["--prompt"]),
        (["frobnicate"], ["frobnicate"]),
        (["compress", "TINY", "-o", "OUT", "--calibration", "TEXT", "--ratio", "1.5"], ["ratio", "1.5"]),
        (["compress", "TINY", "-o", "OUT", "--calibration", "TEXT", "--ratio", "0"], ["ratio"]),
        (["compress", "TINY", "-o", "OUT", "--calibration", "TEXT", "--group-size", "0"], ["group_size", "0"]),
        (["compress", "TINY", "-o", "OUT", "--calibration", "TEXT", "--method", "magic"], ["method", "magic"]),
        (["compress", "TINY", "-o", "OUT", "--calibration", "EMPTY"], ["empty"]),
        (["compress", "TINY", "-o", "ROOT", "--calibration", "TEXT"], ["not empty"]),
        (["compress", "TINY", "-o", "EMPTY/out", "--calibration", "TEXT"], ["out", "not a folder"]),
        (["compress", "TINY", "-o", "OUT", "--calibration", "TEXT", "--ratio", "abc"], ["--ratio", "number"]),
        (["linearize", "TINY", "-o", "OUT", "--layers", "0,x"], ["--layers"]),
        (["linearize", "TINY", "-o", "OUT", "--layers", "9"], ["layers", "9"]),
        (["linearize", "TINY", "-o", "OUT", "--feature-map", "magic"], ["feature_map", "magic"]),
        (["linearize", "TINY", "-o", "OUT", "--layers", "0", "--keep-layers", "1"], ["--layers", "--keep-layers"]),
        (["linearize", "TINY", "-o", "OUT", "--keep-layers", "4"], ["--keep-layers", "from -4 to 3", "4"]),
        (["linearize", "TINY", "-o", "OUT", "--keep-layers", "0,1,2,3"], ["at least one layer"]),
        (["linearize", "TINY", "-o", "OUT", "--temperature", "warm"], ["--temperature", "pretrained", "warm"]),
        (["linearize", "TINY", "-o", "OUT", "--sinks", "2"], ["sinks=2", "window"]),
        (["linearize", "TINY", "-o", "OUT", "--norm", "layer"], ["norm", "'layer'"]),
        (["linearize", "TINY", "-o", "OUT", "--lr", "0.1"], ["--lr", "--train"]),
        (["linearize", "TINY", "-o", "OUT", "--steps", "300"], ["--steps", "--train"]),
        (["linearize", "TINY", "-o", "OUT", "--checkpoint", "OUT"], ["--checkpoint", "--train"]),
        (["linearize", "TINY", "-o", "OUT", "--train", "TEXT", "--recipe", "magic"], ["recipe", "magic"]),
        (["linearize", "TINY", "-o", "OUT", "--train", "TEXT", "--lr", "-1"], ["lr", "-1"]),
        (["linearize", "TINY", "-o", "OUT", "--train", "nowhere.txt"], ["--train", "nowhere.txt"]),
        (["linearize", "TINY", "-o", "OUT", "--train", "TEXT", "--length", "9999"], ["--train", "9999"]),
        (["linearize", "TINY", "-o", "OUT", "--device", "tpu9"], ["--device", "tpu9"]),
        (["eval", "TINY", "--text", "TEXT", "--device", "cuda:77"], ["--device", "cuda:77"]),
        (["convert", "TINY", "-o", "OUT"], ["--calibration"]),
        (["convert", "TINY", "-o", "OUT", "--calibration", "nowhere.txt"], ["--calibration", "nowhere.txt"]),
        (["convert", "TINY", "-o", "ROOT", "--calibration", "TEXT"], ["not empty"]),
        (["convert", "TINY", "-o", "OUT", "--calibration", "TEXT", "--page", "OUT"], ["--page", "--output"]),
        (["convert", "TINY", "-o", "OUT", "--calibration", "TEXT", "--page", "ROOT"], ["not empty"]),
        (["convert", "TINY", "-o", "OUT", "--calibration", "TEXT", "--contexts", "64"], ["contexts", "[64]"]),
        (["convert", "TINY", "-o", "OUT", "--calibration", "TEXT", "--contexts", "a,b"], ["--contexts", "a,b"]),
        (["convert", "TINY", "-o", "OUT", "--calibration", "TEXT", "--save-dtype", "int8"], ["--save-dtype", "int8"]),
        (["convert", "TINY", "-o", "OUT", "--calibration", "TEXT", "--steps", "5"], ["--steps", "--train"]),
        (["demo", "--output", "ROOT"], ["not empty"]),
        (
            [
                "compare",
                "TINY",
                "-o",
                "OUT",
                "--calibration",
                "TEXT",
                "--validation",
                "TEXT",
                "--test",
                "TEXT",
                "--ratios",
                "0.2,x",
            ],
            ["--ratios", "0.2,x"],
        ),
    ],
)
def test_bad_input(run, folder, tmp_path, arguments, words):
    (tmp_path / "empty.txt").touch()
    names = {
        "TINY": folder / "tiny", "TEXT": folder / "text.txt", "ROOT": folder, "OUT": tmp_path / "out",
        "EMPTY": tmp_path / "empty.txt",
    }  # fmt: skip
    resolved = [names.get(a, a) for a in arguments]
    if "EMPTY/out" in arguments:
        resolved[resolved.index("EMPTY/out")] = names["EMPTY"] / "out"
    failed(run(*resolved), *words)
    assert not (tmp_path / "out").exists()


def test_damaged_and_partial_models(run, folder, tmp_path):
    weights = load_file(folder / "tiny" / "model.safetensors")
    config = (folder / "tiny" / "config.json").read_text()

    def made(name, save):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        save(tmp_path / name / "model.safetensors")
        return run("eval", tmp_path / name, "--text", folder / "text.txt")

    lacking = {name: w for name, w in weights.items() if "layers.2.mlp.up_proj" not in name}
    failed(made("partial", lambda path: save_file(lacking, path, {"format": "pt"})), "layers.2.mlp.up_proj")
    whole = (folder / "tiny" / "model.safetensors").read_bytes()
    failed(made("cut", lambda path: path.write_bytes(whole[: len(whole) // 2])), "weights", "cut")
    failed(made("none", lambda path: None), "")
    for damaged in ("{", "", "[]"):
        (tmp_path / "none" / "config.json").write_text(damaged)
        failed(run("eval", tmp_path / "none", "--text", folder / "text.txt"), "config.json", "damaged")
    made("shapes", lambda path: path.write_bytes(whole))
    (tmp_path / "shapes" / "config.json").write_text(
        config.replace('"intermediate_size": 64', '"intermediate_size": 48')
    )
    failed(run("eval", tmp_path / "shapes", "--text", folder / "text.txt"), "misshapen", "layers.0.mlp.down_proj")
    made("tokenizer", lambda path: path.write_bytes(whole))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{")
    failed(run("eval", tmp_path / "tokenizer", "--text", folder / "text.txt"), "tokenizer files")


def test_the_origin_of_an_error_can_be_asked_for(run, monkeypatch):
    monkeypatch.setenv("FREQRANK_TRACEBACK", "1")
    result = run("eval", "nowhere", "--text", "nowhere.txt")
    assert isinstance(result.exception, ValueError)


def process(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_a_process_says_one_line_and_leaves_with_2(folder):
    done = process("-m", "freqrank", "eval", folder / "tiny", "--text", "nowhere.txt")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_json_is_all_there_is_on_stdout(folder):
    done = process("-m", "freqrank", "eval", folder / "tiny", "--text", folder / "text.txt", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == len(TEXT)


def test_without_the_extra_the_library_imports_and_the_command_says_what_to_install():
    block = "import sys; sys.modules['typer'] = sys.modules['rich'] = None; "
    assert process("-c", block + "import freqrank, freqrank.evaluate").returncode == 0
    done = process("-c", block + "from freqrank.cli import main; main()")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'freqrank[cli]'" in done.stderr


def test_options_that_contradict_one_another_are_refused_before_a_model_is_loaded(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("freqrank.cli._load", None)
    arguments = ("compress", folder / "tiny", "--calibration", folder / "text.txt", "--output", tmp_path / "out")
    failed(run(*arguments, "--method", "best", "--refit", "own"), "'best' sets refit='cross' itself; got 'own'")
    failed(run(*arguments, "--storage", "int4"), "storage must be one of None, 'int8'; got 'int4'")


def test_options_of_the_last_stage_are_refused_before_a_model_is_loaded(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("freqrank.cli._load", None)
    text = folder / "text.txt"
    arguments = ("convert", folder / "tiny", "--calibration", text, "--train", text, "--output", tmp_path / "out")
    for options, words in (
        (["--lr", "0"], "lr must be a positive number"),
        (["--recipe", "magic"], "recipe must be one of"),
        (["--trained", "lora"], "adapters cannot be merged"),
        (["--no-teacher", "--recipe", "align"], "leaves no teacher"),
        (["--feature-map", "magic"], "feature_map must be one of"),
        (["--decay", "magic"], "decay must be one of"),
        (["--method", "magic"], "method must be one of"),
        (["--train", "nowhere.txt"], "--train must name a text file"),
        (["--text", "nowhere.txt"], "--text must name a text file"),
        (["--keep-layers", "x"], "--keep-layers must be values with commas between"),
    ):
        failed(run(*arguments, *options), words)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 2
    assert "one of 2 (WORLD_SIZE)" in result.output
