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
