"""Compressing and linearising in one run: every figure of the report against counts of its own, every check early."""

from __future__ import annotations

import copy
import itertools
import json
import math

import freqrank
import pytest
import torch
import torch.nn.functional as F
from torch import nn

transformers = pytest.importorskip("transformers")

from freqrank import ConversionReport, compress, conversion, convert, distill, linearize  # noqa: E402
from freqrank.conversion import check_options, remove_checkpoint  # noqa: E402
from freqrank.models import compression, costs  # noqa: E402
from freqrank.models.costs import Cost, cache_bytes, decoded_tokens, growth, measure, model_size  # noqa: E402
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM  # noqa: E402

VOCABULARY, LAYERS, HEADS, KEY_HEADS, HEAD_DIM, CONTEXT = 61, 4, 4, 2, 8, 48
#: What keeps a run short.
QUICK = {"contexts": (12, 24), "repeats": 1, "progress": False}
#: The released layer has a state of D x D numbers a key head, which is easily counted.
DIJIANG = {"feature_map": "dijiang"}


def small_model(seed: int = 0, kind=(LlamaConfig, LlamaForCausalLM), **more):
    torch.manual_seed(seed)
    config = kind[0](
        vocab_size=VOCABULARY, hidden_size=HEADS * HEAD_DIM, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=CONTEXT, pad_token_id=0,
        eos_token_id=None, bos_token_id=None, **more,
    )  # fmt: skip
    return kind[1](config).eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


CALIBRATION, TRAINING, HELD_OUT = tokens(8, 24, 1), tokens(8, 16, 2), tokens(3, 40, 3)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def counted(model: nn.Module) -> tuple[int, int]:
    """Parameters and bytes by where the memory lies: what two modules share lies in one place."""
    parameters, buffers = {}, {}
    for module in model.modules():
        for found, tensors in ((parameters, module._parameters), (buffers, module._buffers)):
            for tensor in tensors.values():
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor
    size = sum(t.untyped_storage().nbytes() for t in (*parameters.values(), *buffers.values()))
    return sum(p.numel() for p in parameters.values()), size


def loss_of(model: nn.Module, ids: torch.Tensor, window: int) -> float:
    """Mean next-token loss over windows that do not overlap, in float64."""
    model = copy.deepcopy(model).double().eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in ids:
            for piece in row.split(window):
                if len(piece) > 1:
                    logits = model(piece[None], use_cache=False).logits[0, :-1].double()
                    total += F.cross_entropy(logits, piece[1:], reduction="sum").item()
                    count += len(piece) - 1
    return total / count


@pytest.fixture(scope="module")
def converted():
    """The original, the converted model, and the report of a run with all of its parts."""
    original = small_model()
    model = copy.deepcopy(original)
    report = convert(
        model, CALIBRATION, TRAINING, ratio=0.4, steps=5, held_out=HELD_OUT, window=20, **DIJIANG,
        compress_options={"group_size": 2, "refit": "own"}, linearize_options={"norm": "rms"},
        distill_options={"lr": 1e-2, "batch_size": 4}, **QUICK,
    )  # fmt: skip
    return original, model, report


# ---------------------------------------------------------------- what the report says


def test_sizes_are_those_of_the_memory_that_the_models_lie_in(converted):
    original, model, report = converted
    assert tuple(report.original) == counted(original)
    assert tuple(report.converted) == counted(model)
    shared = sum(p.numel() for name, p in model.named_parameters(remove_duplicate=False))
    assert report.converted.parameters < shared  # bases that layers share are there more than once by name
    assert report.ratio == pytest.approx(1 - counted(model)[1] / counted(original)[1])
    report_of_stage = report.compression
    assert report_of_stage.model_parameters_before == report.original.parameters
    new = report.converted.parameters - report_of_stage.model_parameters_after
    assert new == report.linearization.parameters_after - report.linearization.parameters_before > 0


def test_losses_are_those_of_the_models_after_each_stage(converted):
    original, model, report = converted
    assert list(report.losses) == ["original", "compressed", "linearised", "trained"]
    assert report.held_out == {"tokens": HELD_OUT.numel(), "window": 20}
    again = copy.deepcopy(original)
    expected = {"original": loss_of(again, HELD_OUT, 20)}
    compress(again, CALIBRATION, ratio=0.4, group_size=2, refit="own", progress=False)
    expected["compressed"] = loss_of(again, HELD_OUT, 20)
    linearize(again, feature_map="dijiang", norm="rms")
    expected["linearised"] = loss_of(again, HELD_OUT, 20)
    distill(again, original, TRAINING, recipe="align", steps=5, lr=1e-2, batch_size=4, progress=False)
    expected["trained"] = loss_of(again, HELD_OUT, 20)
    assert report.losses == pytest.approx(expected, abs=2e-5)
    assert len(set(expected.values())) == 4
    assert same(weights(model), weights(again))  # one run is the three functions one after the other


def test_memory_is_counted_and_carried_on_exactly(converted):
    original, model, report = converted
    assert [m.context for m in report.memory] == [12, 24, 4 * 24, 16 * 24]
    assert [m.measured for m in report.memory] == [True, True, False, False]
    a_token = 2 * LAYERS * KEY_HEADS * HEAD_DIM * 4  # keys and values in float32
    state = LAYERS * (KEY_HEADS * HEAD_DIM * HEAD_DIM * 4 + 8)  # and how many tokens it has seen
    for memory in report.memory:
        assert (memory.original, memory.converted) == (a_token * memory.context, state)
    assert report.memory_per_token == {"original": a_token, "converted": 0}
    longest = report.memory[-1]  # what was carried on is what a cache of that length has
    for network, expected in ((original, longest.original), (model, longest.converted)):
        cache = DynamicCache(config=network.config)
        with torch.no_grad():
            network(tokens(1, longest.context), past_key_values=cache, use_cache=True)
        assert sum(cache_bytes(cache)) == expected


def test_layers_that_stay_softmax_keep_their_part_of_the_cache():
    model = small_model()
    report = convert(model, CALIBRATION, None, linearize_options={"layers": [0, 2, 3]}, **DIJIANG, **QUICK)
    a_layer = 2 * KEY_HEADS * HEAD_DIM * 4
    assert report.memory_per_token == {"original": 4 * a_layer, "converted": a_layer}
    state = 3 * (KEY_HEADS * HEAD_DIM * HEAD_DIM * 4 + 8)
    assert [m.converted for m in report.memory] == [state + a_layer * m.context for m in report.memory]
    assert report.linearization.kept == [1]


def test_a_softmax_window_is_part_of_a_state_of_one_size():
    model = small_model()
    report = convert(model, CALIBRATION, None, feature_map="hybrid", linearize_options={"window": 16}, **QUICK)
    assert report.memory_per_token["converted"] == 0
    assert len({m.converted for m in report.memory}) == 1
    assert report.linearization.options["window"] == 16
    assert report.linearization.options["sinks"] == freqrank.attention.dijiang.PRESETS["hybrid"].sinks


def test_memory_that_does_not_follow_from_the_measured_lengths_is_left_out():
    model = small_model(kind=(MistralConfig, MistralForCausalLM), sliding_window=16)
    report = convert(model, CALIBRATION, None, **DIJIANG, **QUICK)
    assert [(m.original is None, m.converted is None) for m in report.memory] == [(False, False)] * 2 + [
        (True, False)
    ] * 2
    assert report.memory_per_token["original"] is None
    assert any("original" in note and "depends on the length" in note for note in report.notes)
    a_layer = 2 * KEY_HEADS * HEAD_DIM * 4
    seen = LAYERS * a_layer * 15  # the newest tokens that the next one still sees; a number beside them in each layer
    assert report.memory[1].original is not None
    assert 0 <= report.memory[1].original - seen <= LAYERS * 8
    assert "-" in str(report)


def test_without_training_the_report_says_so():
    report = convert(small_model(), CALIBRATION, None, held_out=HELD_OUT[0], window=20, **QUICK)
    assert report.training is None
    assert list(report.losses) == ["original", "compressed", "linearised"]
    assert report.settings["recipe"] is None
    assert any("not trained" in note for note in report.notes)
    assert "Not trained." in str(report)


def test_without_held_out_text_and_lengths_only_sizes_are_reported():
    report = convert(small_model(), CALIBRATION, TRAINING, steps=1, contexts=(), progress=False)
    assert report.losses == report.held_out == report.memory_per_token == {}
    assert report.memory == []
    assert [table.title for table in report.tables()] == ["Original and converted model"]
    json.dumps(report.to_dict())


def test_the_report_is_json_and_text_and_a_page(converted, tmp_path):
    from freqrank.report import write_folder

    _, model, report = converted
    assert isinstance(report, ConversionReport)
    assert model.freqrank_report is report
    found = json.loads(json.dumps(report.to_dict()))
    assert found["compression"]["groups"]
    assert found["linearization"]["layers"] == [0, 1, 2, 3]
    assert found["training"]["steps"] == 5
    assert found["original"] == {"parameters": report.original.parameters, "bytes": report.original.bytes}
    for name in ("original", "converted"):
        for cost, kept in zip(found["costs"][name], report.costs[name], strict=True):
            assert cost["token_seconds"] == sorted(kept.token_times)[1]
            assert cost["prefill_seconds"] == kept.prefill_times[0] > 0
    shown = str(report)
    assert f"{report.converted.parameters:,}" in shown
    assert f"{report.losses['trained']:.4f}" in shown
    assert f"{report.machine['cpu']['threads']} of {report.machine['cpu']['cores']} cores" in shown
    assert report.machine["cpu"]["model"] in shown
    assert report.side_by_side
    assert report.machine["cpu"]["threads"] == torch.get_num_threads()
    assert set(report.seconds) == {"checks", "copy", "compress", "linearise", "train", "measuring"}
    write_folder(report.page(), tmp_path / "page")
    page = (tmp_path / "page" / "report.html").read_text()
    assert "Held-out loss" in page
    assert page.count("data:image/png;base64,") == 1
    results = json.loads((tmp_path / "page" / "results.json").read_text())
    assert results["conversion"]["memory"][0]["converted"] == report.memory[0].converted


# ---------------------------------------------------------------- time and bytes of a sequence


def test_models_take_turns_and_medians_count(monkeypatch):
    models = {"a": small_model(), "b": small_model(1)}
    calls: list[tuple[str, int]] = []
    clock = itertools.count(1)

    def timed(model, ids, cache):
        calls.append((next(name for name, other in models.items() if other is model), ids.shape[1]))
        for layer in cache.layers:
            layer.keys = torch.zeros(3)
        return float(next(clock))

    monkeypatch.setattr(costs, "_timed", timed)
    found = measure(models, [20], repeats=2)
    single = decoded_tokens(2)
    expected = [(name, 20) for _ in range(3) for name in "ab"] + [("a", 20 - single), ("b", 20 - single)]
    assert calls == expected + [(name, 1) for _ in range(single) for name in "ab"]
    (first,) = found["a"]
    assert first.prefill_times == [3.0, 5.0]  # the first reading warms up
    assert first.prefill_seconds == 4.0
    assert first.token_times == [float(9 + 2 * i) for i in range(2, single)]
    assert first.layer_bytes == [12] * LAYERS


def test_timing_reads_every_token_once_and_leaves_models_as_they_were():
    model = small_model().train()
    seen: list[int] = []
    model.model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    (cost,) = measure({"m": model}, [15], repeats=1)["m"]
    assert seen == [15, 15, 15 - decoded_tokens(1)] + [1] * decoded_tokens(1)
    assert model.training
    assert cost.layer_bytes == [2 * KEY_HEADS * HEAD_DIM * 15 * 4] * LAYERS
    assert min(cost.token_times) > 0


@pytest.mark.parametrize(
    ("first", "last", "slides", "expected"),
    [
        ([80], [160], [False], [(0, 8)]),
        ([80], [80], [False], [(80, 0)]),
        ([80, 7], [160, 7], [False, False], [(0, 8), (7, 0)]),
        ([80], [161], [False], None),  # neither the one nor the other
        ([85], [165], [False], None),  # a fixed part beside a growing one: two lengths do not show how much
        ([80], [160], [True], None),
        ([0], [0], [False], [(0, 0)]),
        ([5], [10], [False], None),  # not a whole number of bytes
    ],
)
def test_growth_is_known_only_where_it_is_exact(first, last, slides, expected):
    assert growth([Cost(10, [1.0], [1.0], first, slides), Cost(20, [1.0], [1.0], last, slides)]) == expected


def test_model_size_counts_a_shared_tensor_once():
    layer = nn.Linear(3, 5)
    model = nn.Sequential(layer, nn.Linear(3, 5), layer)
    model[1].weight = layer.weight
    model.register_buffer("positions", torch.zeros(7, dtype=torch.float64))
    assert model_size(model) == (15 + 5 + 5, 25 * 4 + 56)


# ---------------------------------------------------------------- the saved model


def test_the_saved_model_loads_with_plain_transformers_and_generates_the_same(converted, tmp_path):
    _, model, report = converted
    freqrank.save_model(model, tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert same(weights(model), weights(loaded))
    assert model_size(loaded) == report.converted
    prompt = tokens(2, 9, 5)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.eval().generate(prompt, **options), loaded.generate(prompt, **options))
    kept = json.loads((tmp_path / "model" / "freqrank_report.json").read_text())
    assert kept["losses"] == report.losses
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert config["lowrank"]["groups"]
    assert config["linear_attention"]["layers"] == [0, 1, 2, 3]


# ---------------------------------------------------------------- teacher, memory, resuming


def test_no_copy_is_kept_where_there_is_no_room_for_one(monkeypatch):
    monkeypatch.setattr(conversion, "_free_bytes", lambda device: model_size(small_model()).bytes - 1)
    model = small_model()
    before = weights(model)
    with pytest.raises(ValueError, match=r"copy of the original.*keep_original=False"):
        convert(model, CALIBRATION, TRAINING, steps=1, **QUICK)
    assert same(before, weights(model))
    report = convert(model, CALIBRATION, TRAINING, steps=2, keep_original=False, held_out=HELD_OUT, **QUICK)
    assert report.training is not None
    assert report.training.recipe == report.settings["recipe"] == "released"
    assert not report.side_by_side
    assert "one before and one after" in str(report)
    a_token = 2 * LAYERS * KEY_HEADS * HEAD_DIM * 4
    assert report.memory_per_token == {"original": a_token, "converted": 0}
    assert report.original == model_size(small_model())


def test_free_memory_is_known_here():
    free = conversion._free_bytes(torch.device("cpu"))
    assert free is None or 1 << 20 < free < 1 << 50
    assert conversion._free_bytes(torch.device("meta")) is None


def test_a_run_that_was_killed_in_training_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    def run(checkpoint=None, on_step=None, seed=0):
        model = small_model()
        convert(
            model, CALIBRATION, TRAINING, steps=4, ratio=0.4, checkpoint=checkpoint, contexts=(), progress=False,
            seed=seed, distill_options={"checkpoint_every": 1, "batch_size": 4, "on_step": on_step},
        )  # fmt: skip
        return weights(model)

    def stop(step, report):
        if step == 2:
            raise KeyboardInterrupt

    whole = run()
    folder = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        run(folder, stop)
    assert {path.name for path in folder.iterdir()} == {"compression", "training"}
    monkeypatch.setattr(compression._Work, "_factor", None)  # all groups are there
    steps: list[int] = []
    assert same(whole, run(folder, lambda step, report: steps.append(step)))
    assert steps == [3, 4]
    with pytest.raises(ValueError, match="seed"):
        run(folder, seed=1)
    remove_checkpoint(folder)
    assert not folder.exists()
    remove_checkpoint(folder)  # nothing to remove is no error


def test_removing_a_checkpoint_leaves_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    remove_checkpoint(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_int8_factors_are_said_to_stay_as_they_are():
    report = convert(
        small_model(), CALIBRATION, TRAINING, steps=1, contexts=(), progress=False, compress_options={"storage": "int8"}
    )
    assert any("int8 were not trained" in note for note in report.notes)


def test_a_busy_machine_is_named(monkeypatch):
    clock = itertools.cycle([1.0, 1.0, 5.0])
    monkeypatch.setattr(costs, "_timed", lambda model, ids, cache: next(clock))
    report = convert(small_model(), CALIBRATION, None, **QUICK)
    assert any("busy" in note for note in report.notes)
    monkeypatch.setattr(costs, "_timed", lambda model, ids, cache: 1.0)
    report = convert(small_model(), CALIBRATION, None, **QUICK)
    assert not any("busy" in note for note in report.notes)


# ---------------------------------------------------------------- checks come first


def refused(monkeypatch, error, match, model=None, training=TRAINING, **options):
    """The error comes before any stage, and the model has every bit, module and setting that it had."""
    model = small_model() if model is None else model
    monkeypatch.setattr(compression, "read_calibration", lambda *args: pytest.fail("a stage has begun"))
    before, modules = weights(model), {name: type(module) for name, module in model.named_modules()}
    settings = model.config.to_dict()
    with pytest.raises(error, match=match):
        convert(model, CALIBRATION, training, **{**QUICK, **options})
    assert same(before, weights(model))
    assert modules == {name: type(module) for name, module in model.named_modules()}
    assert model.config.to_dict() == settings
    assert not hasattr(model, "freqrank_report")


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "ratio must be between 0 and 1", {"ratio": 1.5}),
        (ValueError, "method must be one of", {"method": "magic"}),
        (ValueError, "refit='cross' itself", {"method": "best", "compress_options": {"refit": "own"}}),
        (
            TypeError,
            "unknown option groups in compress_options; it may hold group_size",
            {"compress_options": {"groups": 2}},
        ),
        (ValueError, "compress_options must not hold ratio", {"compress_options": {"ratio": 0.2}}),
        (TypeError, "compress_options must be a dict", {"compress_options": [2]}),
        (ValueError, "feature_map must be one of", {"feature_map": "magic"}),
        (ValueError, "norm must be one of", {"linearize_options": {"norm": "layer"}}),
        (
            TypeError,
            "unknown option gamma in linearize_options; it may hold layers",
            {"linearize_options": {"gamma": 1}},
        ),
        (ValueError, "linearize_options must not hold feature_map", {"linearize_options": {"feature_map": "prf"}}),
        (ValueError, "layers must hold indices from -4 to 3", {"linearize_options": {"layers": [4]}}),
        (ValueError, "features; the kernels take up to", {"linearize_options": {"num_frequencies": 4096}}),
        (ValueError, "recipe must be one of", {"recipe": "magic"}),
        (ValueError, "lr must be a positive number", {"distill_options": {"lr": 0.0}}),
        (
            TypeError,
            "unknown option rate in distill_options; it may hold batch_size",
            {"distill_options": {"rate": 1.0}},
        ),
        (ValueError, "distill_options must not hold steps", {"distill_options": {"steps": 3}}),
        (ValueError, "fractions that sum to 1", {"distill_options": {"stages": [("logits", 0.5)]}}),
        (ValueError, "adapters cannot be merged", {"distill_options": {"train": "lora"}}),
        (ValueError, "keep_original=False leaves no teacher", {"keep_original": False, "recipe": "distill"}),
        (
            ValueError,
            "keep_original=False.*train='attention'",
            {"keep_original": False, "distill_options": {"train": "attention"}},
        ),
        (ValueError, "steps must be at least 1", {"steps": 0}),
        (TypeError, "seed must be an integer", {"seed": 0.5}),
        (ValueError, "repeats must be", {"repeats": 0}),
        (ValueError, "two or more lengths in rising order", {"contexts": (24,)}),
        (ValueError, "two or more lengths in rising order", {"contexts": (24, 12)}),
        (ValueError, "from 6 tokens on", {"contexts": (5, 24)}),
        (TypeError, "contexts must hold integers", {"contexts": (12, 24.0)}),
        (
            ValueError,
            "validation must hold token ids from 0 to 60",
            {"distill_options": {"validation": tokens(2, 8) + 50}},
        ),
    ],
)
def test_wrong_options_of_any_stage_are_refused_before_the_first(monkeypatch, error, match, options):
    refused(monkeypatch, error, match, **options)


@pytest.mark.parametrize(
    ("error", "match", "training"),
    [
        (
            ValueError,
            "training must hold token ids from 0 to 60; got values from 51",
            TRAINING * 0 + 51 + torch.arange(16),
        ),
        (ValueError, "integer token ids", TRAINING.float()),
        (ValueError, "training must hold at least one row", TRAINING[:0]),
        (ValueError, "training must hold token ids", [TRAINING, TRAINING - 9]),
        (TypeError, "training must be a LongTensor", 3),
        (TypeError, "training must be a LongTensor", "text.txt"),
    ],
)
def test_wrong_training_data_is_refused_before_the_first_stage(monkeypatch, error, match, training):
    refused(monkeypatch, error, match, training=training)


def test_options_of_training_without_data_are_refused(monkeypatch):
    refused(monkeypatch, ValueError, "training is None", training=None, recipe="align")
    refused(monkeypatch, ValueError, "training is None", training=None, distill_options={"lr": 1e-3})


def test_models_that_a_later_stage_would_refuse_are_refused_before_the_first(monkeypatch):
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel; got Linear"):
        convert(nn.Linear(2, 2), CALIBRATION, None)  # type: ignore[arg-type]
    linear = small_model()
    linearize(linear)
    del linear.freqrank_report
    refused(monkeypatch, ValueError, "linear already", model=linear)
    half = small_model().bfloat16()
    refused(monkeypatch, ValueError, "keeps float32 weights", model=half, distill_options={"precision": "bfloat16"})


def test_lengths_that_the_model_cannot_read_are_refused_before_the_first_stage(monkeypatch):
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, word_embed_proj_dim=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=24, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    refused(monkeypatch, ValueError, "table of 24 positions; got 25", model=model, contexts=(12, 25))
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "read_once", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("too much")))
        refused(patched, ValueError, "24 tokens fail: too much", model=model)
    monkeypatch.undo()
    report = convert(model, CALIBRATION, TRAINING, steps=1, **QUICK)  # positions from a table, up to its end
    assert report.memory_per_token == {"original": 2 * 2 * 32 * 4, "converted": 0}


def test_an_offloaded_model_is_refused(tmp_path):
    pytest.importorskip("accelerate")
    small_model().save_pretrained(tmp_path / "model")
    model = freqrank.load_offloaded(tmp_path / "model", tmp_path / "scratch")
    with pytest.raises(ValueError, match="offloaded"):
        convert(model, CALIBRATION, None)


def test_checking_alone_returns_what_each_stage_gets():
    options = check_options(ratio=0.3, linearize_options={"layers": [1], "gate": "none"}, distill_options={"lr": 0.1})
    assert options == {
        "compress": {"ratio": 0.3, "method": "lisc"},
        "linearize": {"feature_map": "recommended", "layers": [1], "gate": "none"},
        "distill": {"lr": 0.1, "recipe": "align", "steps": 300},
    }
    assert check_options(training=False)["distill"] == {}
    assert check_options(keep_original=False)["distill"]["recipe"] == "released"


def test_the_rehearsal_changes_nothing_and_needs_no_memory_for_weights():
    model = small_model()
    before = weights(model)
    pointers = {p.data_ptr() for p in model.parameters()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    seen: list[set[int]] = []
    real = linearize

    def spy(student, **options):
        seen.append({p.data_ptr() for p in student.parameters()})
        return real(student, **options)

    original = conversion.linearization.linearize
    try:
        conversion.linearization.linearize = spy
        conversion._rehearse(model, TRAINING, check_options(), keep_original=True)
    finally:
        conversion.linearization.linearize = original
    assert seen == [pointers]
    assert same(before, weights(model))
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert not hasattr(model, "freqrank_report")
    assert getattr(model.config, "quantization_config", None) is None


def test_training_that_fails_leaves_a_whole_model(monkeypatch):
    model = small_model()
    with pytest.raises(FloatingPointError, match="step"):
        convert(model, CALIBRATION, TRAINING, steps=20, contexts=(), progress=False, distill_options={"lr": 1e30})
    with torch.no_grad():
        assert model(TRAINING, use_cache=False).logits.isfinite().all()
    assert math.isfinite(loss_of(model, HELD_OUT, 20))
