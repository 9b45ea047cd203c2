"""Tasks of lm-evaluation-harness on local data: what it scores, against log-likelihoods put together by hand."""

import json
import random
import socket
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

import freqrank  # noqa: E402
from freqrank import tasks as task_runs  # noqa: E402
from freqrank.cli import app  # noqa: E402
from freqrank.tasks import byte_tokenizer, run_tasks  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

needs_harness = pytest.mark.skipif(
    not all(__import__("importlib").util.find_spec(name) for name in ("lm_eval", "datasets")),
    reason="lm-eval is not installed: pip install 'freqrank[eval]'",
)

WORDS = ["red", "green", "blue", "violet", "grey", "ochre"]


def questions(count):
    draw = random.Random(5)
    made = []
    for _ in range(count):
        choices = [" ".join(draw.choices(WORDS, k=draw.randint(1, 3))) for _ in range(3)]
        made.append({"question": f"a {draw.choice(WORDS)} house:", "choices": choices, "answer": draw.randrange(3)})
    return made


QUESTIONS = questions(30)

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
{more}
metric_list:
  - metric: {metric}
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Local tasks: colours, one that fixes its shots at none, one with a metric that there is not."""
    root = tmp_path_factory.mktemp("tasks")
    (root / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    kinds = {"colours": ("", "acc"), "colours_alone": ("num_fewshot: 0", "acc"), "colours_odd": ("", "loudness")}
    for name, (more, metric) in kinds.items():
        text = TASK.format(name=name, data=root / "data.jsonl", more=more, metric=metric)
        (root / f"{name}.yaml").write_text(text)
    return root


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every socket fails, whoever opens it."""

    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


def make_model(kind="dense"):
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=512, initializer_range=0.2, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    if kind == "compressed":
        ids = torch.randint(256, (8, 64))
        freqrank.compress(model, ids, method="basis-sharing", group_size=2, ratio=0.4, progress=False)
    if kind == "linearised":
        freqrank.linearize(model)
    return model.eval()


@torch.no_grad()
def by_hand(model):
    """acc and acc_norm of QUESTIONS: the choice whose bytes are likeliest, as they are or by character."""
    right = {"acc": 0, "acc_norm": 0}
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:
            before = question["question"].encode()
            ids = torch.tensor([list(before + b" " + choice.encode())])
            logp = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
            told = range(len(before), ids.shape[1])
            scores.append(sum(float(logp[t - 1, ids[0, t]]) for t in told))
        norm = [score / len(choice) for score, choice in zip(scores, question["choices"], strict=True)]
        for name, values in (("acc", scores), ("acc_norm", norm)):
            right[name] += values.index(max(values)) == question["answer"]
    return {name: count / len(QUESTIONS) for name, count in right.items()}


@needs_harness
@pytest.mark.parametrize("kind", ["dense", "compressed", "linearised"])
def test_accuracies_are_those_by_hand(kind, folder):
    model = make_model(kind).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    [found] = run_tasks(model, None, ["colours"], include_path=folder, batch_size=4)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    expected = by_hand(model.eval())
    assert 0 < expected["acc"] < 1
    assert found.metrics == pytest.approx(expected)
    assert set(found.errors) == {"acc", "acc_norm"}
    assert (found.task, found.examples, found.shots) == ("colours", len(QUESTIONS), 0)


@needs_harness
def test_limit_shots_and_several_tasks(folder):
    model = make_model()
    found = run_tasks(model, None, ["colours", "colours_alone"], include_path=folder, limit=10, num_fewshot=2)
    assert [(one.task, one.examples, one.shots) for one in found] == [("colours", 10, 2), ("colours_alone", 10, 0)]
    again = run_tasks(model, None, ["colours", "colours_alone"], include_path=folder, limit=10, num_fewshot=2)
    assert found == again
    json.dumps([one.to_dict() for one in found])


@needs_harness
def test_a_saved_model_with_a_tokenizer(folder, tmp_path):
    """A compressed model from its folder, with a tokenizer of its own: that of bytes, saved beside it."""
    freqrank.save_model(make_model("compressed"), tmp_path / "small", byte_tokenizer())
    arguments = ["eval", str(tmp_path / "small"), "--tasks", "colours", "--include-path", str(folder), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    stored = json.loads(result.stdout)
    assert stored["tasks"][0]["metrics"] == pytest.approx(by_hand(make_model("compressed")))
    assert "loss" not in stored
    (tmp_path / "text.txt").write_text("a red house: blue\n" * 20)
    both = [*arguments[:-1], "--text", str(tmp_path / "text.txt"), "--num-fewshot", "1", "--batch-size", "2"]
    shown = CliRunner().invoke(app, both)
    assert shown.exit_code == 0, shown.output
    for word in ("perplexity", "colours", "acc_norm", "standard error"):
        assert word in shown.stdout
    assert "loss" in json.loads(CliRunner().invoke(app, [*both, "--json"]).stdout)


@needs_harness
def test_zero_shot_accuracy_of_a_published_row(folder, monkeypatch):
    """The mean over tasks before and after, beside the table's."""
    import functools

    from freqrank import reproduce as reproducing

    monkeypatch.setattr(reproducing, "ZERO_SHOT", ("colours", "colours_alone"))
    monkeypatch.setattr(reproducing, "run_tasks", functools.partial(run_tasks, include_path=folder))
    rows = ["a red house: blue\n", ""] * 300
    done = reproducing.reproduce(
        "basis-sharing/table1/llama-7b-40-basis-sharing-n2", data=["ptb"], zero_shot=True, model=make_model(),
        calibration=rows, text=rows, samples=8, window=64, progress=False,
    )  # fmt: skip
    text, accuracy = done.measurements
    assert (text.data, accuracy.data) == ("ptb", "zero-shot")
    assert accuracy.dense == pytest.approx(by_hand(make_model())["acc"])
    assert (accuracy.published, accuracy.dense_published, accuracy.tokens) == (0.40, 0.52, 60)
    [here] = {one.metrics["acc"] for one in done.tasks["here"]}
    assert accuracy.measured == pytest.approx(here)
    assert "accuracy, zero-shot" in str(done)
    assert json.loads(json.dumps(done.to_dict()))["tasks"]["dense"][0]["task"] == "colours"


def test_zero_shot_is_planned_where_the_table_has_it():
    from freqrank.reproduce import plan

    planned = plan("basis-sharing/table1/llama-7b-20-svd", zero_shot=True)
    assert planned.to_dict()["tasks"][:2] == ["openbookqa", "arc_easy"]
    assert "0.31" in str(planned)
    assert "0.31" not in str(plan("basis-sharing/table1/llama-7b-20-svd"))
    with pytest.raises(ValueError, match="no value for the accuracy"):
        plan("svd-llm/table2/llama-2-7b-20-svd-llm", zero_shot=True)


@needs_harness
def test_bad_tasks(folder):
    model = make_model()
    with pytest.raises(ValueError, match="no task is called 'colour'; near: colours"):
        task_runs._check_names(["colour"], ["colours", "numbers"])
    with pytest.raises(ValueError, match="no metric called 'loudness', and no script"):
        run_tasks(model, None, ["colours_odd"], include_path=folder)
    with pytest.raises(ValueError, match="at least one; got"):
        run_tasks(model, None, [])
    with pytest.raises(ValueError, match="at least one; got 'colours'"):
        run_tasks(model, None, "colours")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        run_tasks(model, None, ["colours"], limit=0)
    with pytest.raises(TypeError, match="batch_size must be an integer"):
        run_tasks(model, None, ["colours"], batch_size="auto")
    with pytest.raises(ValueError, match="must be a folder"):
        run_tasks(model, None, ["colours"], include_path=folder / "none")


@needs_harness
@pytest.mark.parametrize("index", ["HellaSwag alone", pytest.param("all", marks=pytest.mark.long)])
def test_data_is_not_fetched_unasked(index, monkeypatch):
    """HellaSwag's data is on the hub; without `download` its name is found and nothing else."""
    if index != "all":  # all of lm-eval's tasks take nine seconds to list
        from lm_eval import tasks

        alone = tasks.TaskManager(include_path=f"{tasks.__path__[0]}/hellaswag", include_defaults=False)
        monkeypatch.setattr(task_runs, "_own_tasks", lambda: alone)
    with pytest.raises(ValueError, match=r"data of a task cannot be read .*hellaswag.*only with --download"):
        run_tasks(make_model(), None, ["hellaswag"])
    with pytest.raises(ValueError, match=r"no task is called 'hellaswg'; near: .*hellaswag"):
        run_tasks(make_model(), None, ["hellaswg"])


def test_lm_eval_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"lm-evaluation-harness.*pip install 'freqrank\[eval\]'"):
        run_tasks(make_model(), None, ["piqa"])
    result = CliRunner().invoke(app, ["eval", "bundled:base", "--tasks", "piqa"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith("pip install 'freqrank[eval]'")


def test_the_command_wants_one_of_the_two(tmp_path):
    def failed(*arguments):
        result = CliRunner().invoke(app, ["eval", "bundled:base", *arguments])
        assert result.exit_code == 2
        assert result.stdout == ""
        [line] = result.stderr.splitlines()
        return line

    assert "--text FILE, --tasks NAME,NAME" in failed()
    assert "--num-fewshot and --include-path are for --tasks" in failed("--text", "stdlib:test", "--num-fewshot", "1")
    assert "one of the two at a time" in failed("--text", "stdlib:test", "--tasks", "piqa", "--limit", "9")


def test_a_byte_tokenizer_reads_bytes():
    draw = random.Random(1)
    tokenizer = byte_tokenizer()
    texts = ["", " a\n\tb  ", *("".join(chr(draw.randrange(1, 0xD800)) for _ in range(40)) for _ in range(20))]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode())
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer("<|endoftext|>")["input_ids"] == [0] == [tokenizer.eos_token_id]
    assert len(tokenizer) == 256
