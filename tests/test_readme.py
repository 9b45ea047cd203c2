"""What the README tells people to type works: its Python, its commands' options, its table of ops."""

import re
from pathlib import Path

import freqrank
import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with a small model, its tokenizer and a text under the README's names."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a b c d " * 200)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate("?abcd")}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = transformers.LlamaConfig(
        vocab_size=5, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained("path/to/model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained("path/to/model")
    return tmp_path


def test_python_blocks_run_one_after_the_other(folder):
    from transformers import AutoModelForCausalLM

    compress, linearize = blocks("python")
    exec(compress.replace("2048", "64"), {})
    exec(linearize.replace("256", "32").replace("steps=1000", "steps=2"), {})
    ids = torch.tensor([[1, 2, 3]])
    for name in ("smaller/", "linear/"):
        assert AutoModelForCausalLM.from_pretrained(name)(ids).logits.isfinite().all()


def test_commands_run(folder):
    testing = pytest.importorskip("typer.testing")
    from freqrank.cli import app

    (folder / "held-out.txt").write_text("a b c d " * 20)
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    commands = [line.removeprefix("freqrank ") for line in lines if line.startswith("freqrank ")]
    assert [command.split()[0] for command in commands] == [
        "compress", "eval", "linearize", "generate", "convert", "compress", "eval", "compare", "reproduce", "reproduce"
    ]  # fmt: skip
    for command in commands:
        short = command.replace("--steps 1000", "--steps 1 --length 8 --batch 2").replace("20000", "2000")
        short = short.replace("--samples 32", "--samples 4")
        if short.startswith("convert"):
            short += " --samples 2 --calibration-length 16 --contexts none"
        if short.startswith("compare"):
            short += " --methods svd --ratios 0.4 --samples 2 --length 64"
        result = testing.CliRunner().invoke(app, short)
        assert result.exit_code == 0, (command, result.output)


def test_examples_of_ops_run():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    sequence = {"q": draw(1, 5, 4, 8), "k": draw(1, 5, 2, 8), "v": draw(1, 5, 2, 8)}
    step = {name: x[:, 0] for name, x in sequence.items()}
    names = {
        "freqrank": freqrank, "x": draw(6, 8), "image": draw(8, 8), "g": -torch.rand(2, generator=generator),
        "w": torch.rand(6, generator=generator), "projection": draw(8, 8), "scales": draw(8), "b": draw(8, 3).double(),
        "A": freqrank.gram(draw(20, 8)),
    }  # fmt: skip
    examples = re.findall(r"^\| `.*\| `(.*?)` \|$", README, re.MULTILINE)
    assert len(examples) >= 10
    for example in examples:
        with torch.no_grad():
            names |= step if "_step(" in example else sequence
            exec(example, names)  # later examples use what earlier ones made: `state`, `L`
