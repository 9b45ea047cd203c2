"""Methods beside one another: what is measured, what is chosen, and what a stopped run leaves."""

import csv
import json

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")

import freqrank  # noqa: E402
from freqrank import compare as comparing  # noqa: E402
from freqrank import evaluate  # noqa: E402
from freqrank.compare import Comparison, Row, compare, model_bytes, ramp, round_to_bits, spread_scales  # noqa: E402


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(64, (count, 32), generator=generator) for count in (6, 2, 3)]


OPTIONS = {"methods": ["svd", "lisc"], "ratios": [0.3, 0.6], "group_sizes": [2, 4], "window": 32, "progress": False}


def test_rows_are_what_compress_and_evaluate_give(model, texts):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = compare(model, *texts, refits=[None, "own"], **OPTIONS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    keys = [row.key for row in done.rows]
    assert len(set(keys)) == len(keys) == 3 + 2 * (2 + 4)
    for name, ratio, group_size, refit in (("svd", 0.6, 1, None), ("lisc", 0.3, 4, "own")):
        [row] = [row for row in done.rows if row.key == (name, "none", ratio, group_size, refit)]
        copied = transformers.LlamaForCausalLM(model.config).eval()
        copied.load_state_dict(model.state_dict())
        report = freqrank.compress(
            copied, texts[0], method=name, ratio=ratio, group_size=group_size, refit=refit, progress=False
        )
        assert row.parameters_removed == report.block_ratio >= ratio
        assert row.bytes == 2 * report.model_parameters_after
        assert row.validation == evaluate.loss(copied, texts[1], window=32)
        assert row.test == evaluate.loss(copied, texts[2], window=32)
    dense, eight, four = done.references
    assert (dense.name, dense.test) == ("dense", evaluate.loss(model, texts[2], window=32))
    assert dense.bytes > eight.bytes > four.bytes


def test_a_folder_holds_what_was_measured_for_some_ratios_and_spreads(model, texts, tmp_path):
    options = {"folder": tmp_path / "one", **OPTIONS, "group_sizes": [2]}
    compare(model, *texts, **{**options, "methods": ["svd"]})
    done = compare(model, *texts, **{**options, "methods": ["lisc"], "ratios": [0.3], "spreads": ["rising"]})
    assert [row.name for row in done.rows if row.ratio] == ["lisc"]
    stored = json.loads((tmp_path / "one" / "rows.json").read_text())
    held = Comparison(stored["settings"], [Row(**row) for row in stored["rows"]])
    assert [[line[0] for line in table.rows] for table in held.tables()[:2]] == [["lisc"], ["svd"]]
    assert held.tables()[0].rows[0][2] == "-"
    assert len(list((tmp_path / "one").glob("*.png"))) == 2


def test_switches_stand_behind_a_methods_name(model, texts):
    methods = ["best", "lisc block_weight=norm depth_weight=2", "basis-sharing share=modules"]
    done = compare(model, *texts, **{**OPTIONS, "methods": methods, "ratios": [0.5]})
    both = comparing._wanted(methods, [0.5], [2], [None, "own"], ["none"])
    assert [key[0] for key in both].count("best") == 1  # which has a refit of its own
    assert [key[0] for key in both].count(methods[1]) == 2
    rows = [row for row in done.rows if row.ratio]
    assert [(row.name, row.group_size) for row in rows] == [
        ("best", 1), (methods[1], 2), (methods[1], 4), (methods[2], 1),
    ]  # fmt: skip
    copied = transformers.LlamaForCausalLM(model.config).eval()
    copied.load_state_dict(model.state_dict())
    options = {"method": "lisc", "ratio": 0.5, "group_size": 4, "block_weight": "norm", "depth_weight": 2.0}
    freqrank.compress(copied, texts[0], progress=False, **options)
    assert rows[2].test == evaluate.loss(copied, texts[2], window=32)


def test_the_best_is_chosen_on_validation_and_shown_on_test():
    def row(group_size, validation, test):
        return Row("lisc", "none", 0.4, group_size, None, 100, 0.4, validation, test, 1.0)

    dense = Row("dense", "none", 0.0, 1, None, 200, 0.0, 1.0, 1.1, 0.0)
    done = Comparison({}, [dense, row(2, 1.5, 1.3), row(3, 1.4, 1.6), row(6, 1.6, 1.2)])
    assert done.best("lisc", 0.4).group_size == 3
    [line] = done.tables()[0].rows
    assert line == ["lisc", "1.6000 (3)"]
    assert "1.6000 (3)" in str(done)
    with pytest.raises(ValueError, match=r"no row of 'svd' at ratio 0\.4"):
        done.best("svd", 0.4)


def test_a_spread_leaves_the_function_and_changes_the_scales(model, texts):
    for spread in ("rising", "falling"):
        copied = spread_scales(model, ramp(4, spread))
        with torch.no_grad():
            torch.testing.assert_close(copied(texts[1]).logits, model(texts[1]).logits)
        gains = [block.input_layernorm.weight.mean().item() for block in copied.model.layers]
        assert sorted(gains, reverse=spread == "falling") == gains
        assert max(gains) == 8 * min(gains)
    spread = compare(model, *texts, spreads=["rising", "none"], **{**OPTIONS, "methods": ["svd", "basis-sharing"]})
    plain, other = spread.best("svd", 0.3), spread.best("svd", 0.3, "rising")
    assert plain.test == pytest.approx(other.test, abs=1e-5)  # svd sees the weights alone, and their factor is common
    pairs = [(spread.best("basis-sharing", r), spread.best("basis-sharing", r, "rising")) for r in (0.3, 0.6)]
    assert any(abs(a.test - b.test) > 1e-5 for a, b in pairs)


def test_rounding_counts_its_bytes_and_keeps_what_fits(model):
    copied = spread_scales(model, [0] * 4)
    linear = copied.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        linear.copy_(torch.randint(-7, 8, linear.shape).float())
        linear[:, 0] = 7  # so that the scale is 1
    want = linear.clone()
    numbers = sum(p.numel() for name, p in copied.named_parameters() if "proj" in name)
    channels = sum(p.shape[0] for name, p in copied.named_parameters() if "proj" in name)
    assert round_to_bits(copied, 4) == model_bytes(copied) - 2 * numbers + numbers // 2 + 2 * channels
    assert torch.equal(linear, want)
    other = copied.model.layers[1].mlp.up_proj.weight
    assert all(len(row.unique()) <= 15 for row in other)


def test_a_stopped_run_goes_on(model, texts, tmp_path, monkeypatch):
    whole = compare(model, *texts, folder=tmp_path / "whole", **OPTIONS)
    real, calls = comparing.compress, []

    def stops(*arguments, **options):
        calls.append(options["ratio"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(comparing, "compress", stops)
    with pytest.raises(KeyboardInterrupt):
        compare(model, *texts, folder=tmp_path / "parts", **OPTIONS)
    kept = json.loads((tmp_path / "parts" / "rows.json").read_text())["rows"]
    assert len(kept) == 3 + 3
    done = compare(model, *texts, folder=tmp_path / "parts", **OPTIONS)
    assert len(calls) == 3 + 1 + (len(whole.rows) - 6)  # what was measured is not measured again
    without_time = [{k: v for k, v in vars(row).items() if k != "seconds"} for row in done.rows]
    assert without_time == [{k: v for k, v in vars(row).items() if k != "seconds"} for row in whole.rows]
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    assert names == {"report.html", "results.json", "rows.csv", "rows.json", "loss-against-bytes-none.png"}
    rows = list(csv.DictReader((tmp_path / "parts" / "rows.csv").open()))
    assert [float(row["test"]) for row in rows] == [row.test for row in done.rows]
    page = (tmp_path / "parts" / "report.html").read_text()
    assert f"{done.best('lisc', 0.6).test:.4f}" in page

    monkeypatch.setattr(comparing, "compress", real)
    more = compare(model, *texts, folder=tmp_path / "parts", **{**OPTIONS, "methods": ["svd-llm"]})
    assert [row.name for row in more.rows[3:]] == ["svd-llm", "svd-llm"]
    assert len(json.loads((tmp_path / "parts" / "rows.json").read_text())["rows"]) == len(whole.rows) + 2


def test_a_folder_of_something_else_is_refused(model, texts, tmp_path):
    compare(model, *texts, folder=tmp_path / "one", **{**OPTIONS, "methods": ["svd"]})
    before = sorted(path.read_bytes() for path in (tmp_path / "one").iterdir())
    with pytest.raises(ValueError, match="another model or other texts"):
        compare(model, texts[0], texts[1], texts[2] + 1 - texts[2].clamp(max=1), folder=tmp_path / "one", **OPTIONS)
    with pytest.raises(ValueError, match="seed 0"):
        compare(model, *texts, folder=tmp_path / "one", seed=1, **OPTIONS)
    assert sorted(path.read_bytes() for path in (tmp_path / "one").iterdir()) == before
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "precious.txt").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        compare(model, *texts, folder=tmp_path / "two", **OPTIONS)
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "rows.json").write_text("{")
    with pytest.raises(ValueError, match=r"rows\.json is damaged"):
        compare(model, *texts, folder=tmp_path / "three", **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["magic"]}, "methods must begin with one of 'svd'.*got 'magic'"),
        ({"methods": ["lisc norm"]}, "behind a method stand switches NAME=VALUE of allocation, .*; got 'norm'"),
        ({"methods": ["lisc refit=own"]}, "behind a method stand switches NAME=VALUE of .*; got 'refit=own'"),
        ({"methods": ["lisc exponent=x"]}, "exponent must be a number; got 'x'"),
        ({"methods": ["svd", "lisc allocation=magic"]}, "allocation must be one of 'uniform'.*got 'magic'"),
        ({"methods": ["svd", "best share=both"]}, "'best' sets share='modules' itself; got 'both'"),
        ({"methods": ["svd", "lisc statistics=error-aware"], "refits": [None, "own"]}, "use refit='cross', or None"),
        ({"refits": ["again"]}, "refits must be of None, 'own'.*got 'again'"),
        ({"spreads": ["wide"]}, "spreads must be of 'none', 'rising', 'falling'; got 'wide'"),
        ({"ratios": []}, "ratios must not be empty"),
        ({"ratios": [1.5]}, "ratio must be between 0 and 1"),
    ],
)
def test_bad_input(model, texts, options, message, monkeypatch):
    monkeypatch.setattr(comparing, "_measure", None)  # nothing is measured before
    with pytest.raises(ValueError, match=message):
        compare(model, *texts, **{**OPTIONS, **options})
