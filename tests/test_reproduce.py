"""Published rows measured again: the pinned data, the protocols, the run on local stand-ins."""

import gzip
import json
import math
import random
import socket
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
tokenizers = pytest.importorskip("tokenizers")

import freqrank  # noqa: E402
from freqrank import reproduce as reproducing  # noqa: E402
from freqrank.lowrank.methods import METHODS  # noqa: E402
from freqrank.published import DATA, MODELS, PAPERS, PROTOCOLS, ROWS  # noqa: E402
from freqrank.reproduce import encoder, lines_of, plan, reproduce, sample_chunks, sample_offsets  # noqa: E402

WORDS = ["the", "model", "of", "a", "language", "is", "small", "and", "learns", "from", "text", "that", "it", "reads"]


def prose(lines, seed):
    """Rows as WikiText's: a heading, paragraphs that end in a line feed, empty rows."""
    draw = random.Random(seed)
    rows = []
    for i in range(lines):
        words = " ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 30)))
        rows.append("" if i % 3 == 0 else f" = {words} = \n" if i % 7 == 1 else f" {words} . \n")
    return rows


TRAIN, TEST = prose(700, 1), prose(60, 2)


def make_tokenizer(bos):
    """A byte-level BPE trained here, with or without a beginning-of-text token that it puts before every text."""
    from tokenizers import models, pre_tokenizers, processors, trainers

    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator(
        TRAIN,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip
    if not bos:
        return transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


@pytest.fixture(scope="module")
def with_bos():
    return make_tokenizer(True)


@pytest.fixture(scope="module")
def without_bos():
    return make_tokenizer(False)


def make_model(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).eval()


@pytest.fixture
def no_network(monkeypatch):
    """Every socket fails, whoever opens it."""

    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- the published rows -----------------------------------------------------------------------------------------------


def test_rows_name_what_there_is():
    assert len(ROWS) > 150
    for name, row in ROWS.items():
        assert name == row.name
        paper, table, last = name.split("/")
        assert (paper, table) == (row.paper, row.table)
        assert last.startswith(row.model)
        assert row.paper in PAPERS
        assert row.protocol in PROTOCOLS
        assert row.model in MODELS
        assert row.calibration in DATA
        assert row.values
        assert set(row.values) <= {*DATA, "zero-shot"}
        assert set(row.dense) <= set(row.values)
        for where, value in row.values.items():
            assert 0 < value < 1 if where == "zero-shot" else value > 5
            if where in row.dense:  # compression never helped
                assert value <= row.dense[where] if where == "zero-shot" else value >= row.dense[where]
        if row.method == "dense":
            assert not row.options
            assert row.ratio == 0
        else:
            assert row.options["method"] in METHODS
            assert row.options["ratio"] == row.ratio
            assert f"-{round(100 * row.ratio)}-" in last


def test_values_of_the_tables():
    """Some of each table, typed a second time."""
    expected = {
        "svd-llm/table1/llama-7b-80-svd-llm": {"wikitext2": 1349, "c4": 6224},
        "svd-llm/ablation/llama-7b-60-svd-llm": {"wikitext2": 42.30},
        "svd-llm/ablation/llama-7b-40-svd-update": {"wikitext2": 19.28},
        "svd-llm/table2/llama-2-7b-20-svd-llm": {"wikitext2": 8.50},
        "basis-sharing/table1/llama-7b-30-basis-sharing-n2": {
            "wikitext2": 9.25, "ptb": 29.12, "c4": 22.46, "zero-shot": 0.45,
        },
        "basis-sharing/table1/llama-7b-50-asvd": {"wikitext2": 15358, "ptb": 47690, "c4": 27925, "zero-shot": 0.30},
        "basis-sharing/table3/mistral-7b-20-basis-sharing-n2": {"wikitext2": 7.57},
        "basis-sharing/table3/opt-6.7b-20-svd-llm": {"wikitext2": 16.04},
        "basis-sharing/sizes/llama-30b-20-svd-llm": {"wikitext2": 5.63},
        "basis-sharing/gpt-2/gpt-2-20-basis-sharing-n2": {"wikitext2": 43.15},
        "basis-sharing/table6/llama-7b-40-basis-sharing-n16": {"wikitext2": 19.72},
        "basis-sharing/llama-2/llama-2-7b-30-basis-sharing-n2": {"wikitext2": 9.69},
        "d-rank/llama-3/llama-3-8b-20-basis-sharing-n5": {"wikitext2": 17.09, "c4": 60.08},
        "d-rank/c4-calibrated/llama-7b-20-basis-sharing-n4": {"c4": 11.42, "wikitext2": 11.08},
        "adasvd/llama-2/llama-2-7b-60-svd-llm": {"wikitext2": 89.90, "ptb": 2053, "c4": 561},
        "arena/matched/qwen3-8b-base-40-basis-sharing-n2": {"wikitext2": 18.59, "c4": 95.39},
    }  # fmt: skip
    for name, values in expected.items():
        assert ROWS[name].values == values
    assert ROWS["basis-sharing/table1/llama-7b-20-svd"].dense == {
        "wikitext2": 5.68, "ptb": 8.35, "c4": 7.34, "zero-shot": 0.52,
    }  # fmt: skip


def test_papers_that_disagree_are_said_to():
    """Two tables with the same model, method, ratio and text print one value, or a note says that they do not."""
    seen = {}
    for row in ROWS.values():
        method = "svd-llm" if row.method == "basis-sharing-n1" else row.method
        if row.method == "dense" or row.paper == "arena":
            continue
        for where, value in row.values.items():
            seen.setdefault((row.model, method, row.ratio, row.calibration, where), []).append((value, row))
    pairs = [found for found in seen.values() if len({value for value, _ in found}) > 1]
    assert pairs
    for found in pairs:
        for _, row in found:
            assert any(word in note for note in row.notes for word in ("conflict", "1721")), row.name


@pytest.mark.parametrize(
    ("name", "whole", "linears"),
    [("llama-2-7b", 6.738, 6.476), ("llama-3-8b", 8.030, 6.979), ("qwen3-8b-base", 8.191, 6.946),
     ("opt-6.7b", 6.658, 6.442), ("gpt-2", 0.124, 0.085)],
)  # fmt: skip
def test_pinned_shapes_are_the_models(name, whole, linears):
    row = next(row for row in ROWS.values() if row.model == name and row.options)
    found = reproducing.estimate(row)
    assert found.parameters / 1e9 == pytest.approx(whole, abs=6e-4)
    assert found.linear_parameters / 1e9 == pytest.approx(linears, abs=6e-4)


def test_ranks_and_sharing_are_the_papers():
    """LLaMA-7B in groups of 2 at 20 %: k of 4096 -> 4096 is 2184, of 4096 -> 11008 2762, 1638 and 2388 alone."""
    row = ROWS["basis-sharing/table1/llama-7b-20-basis-sharing-n2"]
    after = 16 * (3 * 2184 * (4096 + 2 * 4096) + 2 * 2762 * (4096 + 2 * 11008))
    after += 32 * (1638 * (4096 + 4096) + 2388 * (11008 + 4096))
    found = reproducing.estimate(row)
    assert found.parameters_after == found.parameters - found.linear_parameters + after


@pytest.mark.parametrize("name", ["svd-llm/table2/llama-2-7b-20-svd-llm", "d-rank/llama-3/llama-3-8b-20-fwsvd"])
def test_what_compress_does_is_what_was_counted(name, monkeypatch):
    """The estimate's parameters on a small model are those of `compress`."""
    row = ROWS[name]
    small = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    pin = MODELS[row.model]
    monkeypatch.setitem(MODELS, row.model, type(pin)(**{**pin.__dict__, "config": {**pin.config, **small}}))
    reproducing._shapes.cache_clear()
    try:
        for options in (row.options, {"method": "basis-sharing", "group_size": 2, "ratio": 0.2}):
            changed = type(row)(**{**row.__dict__, "options": options})
            found = reproducing.estimate(changed)
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(**MODELS[row.model].config)
            )
            report = freqrank.compress(model, torch.randint(64, (4, 32)), progress=False, **options)
            assert report.model_parameters_before == found.parameters
            assert report.parameters_before == found.linear_parameters
            assert report.model_parameters_after == found.parameters_after
    finally:
        reproducing._shapes.cache_clear()


# --- how calibration text is sampled ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("length", [16, 48])
def test_offsets_against_the_released_loop(bos, length, with_bos, without_bos):
    """SVD-LLM's loop as it is written there: a sample is kept when the next one has been made."""
    tokenizer = with_bos if bos else without_bos
    rows = TRAIN[:40]
    random.seed(3)
    text = "\n\n".join(rows)
    expected, before = [], None
    for _ in range(6 + 1):
        start = random.randint(0, len(text) - length - 1)
        ids = tokenizer(text[start : start + length * 10])["input_ids"]  # puts the token itself
        if len(ids) < length:
            continue
        if before is not None:
            expected.append(before)
        before = ids[:length]
    found = sample_offsets(rows, encoder(tokenizer, 0 if bos else None), samples=6, length=length, seed=3)
    assert found.tolist() == expected
    assert found.shape == (len(expected), length)
    assert bool((found[:, 0] == 0).all()) == bos


def test_offsets_tokenise_ten_characters_a_token():
    """Whatever more of the text would be needed is not looked at."""
    row = "".join(chr(0x4E00 + i) for i in range(2000))

    def encode(text):
        return [ord(text[i]) - 0x4E00 for i in range(0, len(text), 10)]

    found = sample_offsets([row], encode, samples=5, length=8, seed=3)
    draw = random.Random(3)
    starts = [draw.randint(0, 2000 - 8 - 1) for _ in range(6)]
    assert max(starts) <= 2000 - 80  # none is left out
    assert found.tolist() == [[start + 10 * i for i in range(8)] for start in starts[:5]]
    with pytest.raises(ValueError, match="only 0 have 8 tokens in the 80 characters"):
        sample_offsets([row], lambda text: encode(text)[1:], samples=5, length=8, seed=3)


def test_offsets_with_too_little_behind_them_are_left_out(with_bos):
    """A text of blanks but for its end: few offsets have enough tokens, and none is drawn again."""
    encode = encoder(with_bos, 0)
    rows = ["x" * 60]
    found = sample_offsets(rows, lambda text: encode(text)[: max(0, len(text) - 30)], samples=20, length=8, seed=3)
    draw = random.Random(3)
    starts = [draw.randint(0, 60 - 8 - 1) for _ in range(21)]
    assert 1 < len(found) == sum(len("x" * 60) - start - 30 >= 8 for start in starts) - 1 < 20


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(("lines", "batch"), [(700, 1024), (700, 50), (131, 16), (3, 1024)])
def test_chunks_against_a_plain_derivation(bos, lines, batch, with_bos, without_bos):
    tokenizer = with_bos if bos else without_bos
    rows, length = TRAIN[:lines], 16
    tokens = [tokenizer(row)["input_ids"] for row in rows]
    # four contiguous parts, the first of them longer by one row where four does not divide
    count = min(4, lines)
    sizes = [lines // count + (i < lines % count) for i in range(count)]
    chunks, at = [], 0
    for size in sizes:
        part, at = tokens[at : at + size], at + size
        while part:
            together = [token for row in part[:batch] for token in row]
            part = part[batch:]
            while len(together) >= length:
                chunks.append(together[:length])
                together = together[length:]
    torch.manual_seed(2023)
    expected = [chunks[i] for i in torch.randperm(len(chunks))[:12]]
    found = sample_chunks(
        rows, encoder(tokenizer, 0 if bos else None), samples=12, length=length, seed=2023, batch=batch
    )
    assert found.tolist() == expected
    if bos and lines == 700:  # one a row, wherever it falls in a chunk
        assert len(set((found == 0).nonzero()[:, 1].tolist())) > 4


def test_chunks_are_those_of_datasets_map(with_bos):
    """The library whose behaviour the protocol is: four processes, batches of 1024 rows of each one's part."""
    datasets = pytest.importorskip("datasets")
    rows = [TRAIN[i % 700] for i in range(4500)]  # more than a batch in each part

    def group(examples):
        together = [token for row in examples["input_ids"] for token in row]
        end = len(together) // 64 * 64
        return {"input_ids": [together[i : i + 64] for i in range(0, end, 64)]}

    encode = encoder(with_bos, 0)
    data = datasets.Dataset.from_dict({"input_ids": [encode(row) for row in rows]})
    grouped = data.map(group, num_proc=4, batch_size=1024, batched=True)
    torch.manual_seed(2023)
    expected = [grouped[int(i)]["input_ids"] for i in torch.randperm(len(grouped))[:40]]
    assert sample_chunks(rows, encode, samples=40, length=64, seed=2023).tolist() == expected


def test_texts_that_are_too_short(with_bos):
    encode = encoder(with_bos, 0)
    with pytest.raises(ValueError, match="has 5 characters; more than 8"):
        sample_offsets(["short"], encode, samples=2, length=8, seed=3)
    with pytest.raises(ValueError, match="of 3 places in the calibration text only 0 have 60 tokens"):
        sample_offsets(["x" * 90], lambda text: encode(text)[:50], samples=2, length=60, seed=3)
    with pytest.raises(ValueError, match="no chunk of 1000 tokens: its 2 rows"):
        sample_chunks(["a", "b"], encode, samples=2, length=1000, seed=0)
    with pytest.raises(ValueError, match="no chunk of 4 tokens: its 0 rows"):
        sample_chunks([], encode, samples=2, length=4, seed=0)


def test_the_first_token_is_the_protocols_not_the_tokenizers(with_bos, without_bos):
    plain = without_bos("the text")["input_ids"]
    assert encoder(with_bos, 0)("the text") == [0, *plain] == with_bos("the text")["input_ids"]
    assert encoder(with_bos, None)("the text") == plain
    assert encoder(with_bos, 0)("") == [0]
    assert encoder(None, None)("é") == [195, 169]
    assert encoder(without_bos, 7)("the text") == [7, *plain]
    assert encoder(None, 7)("a") == [7, 97]


def test_lines_of_a_file_are_the_hubs_rows(tmp_path):
    (tmp_path / "text.txt").write_bytes(b" = Title = \n \n\n A page\x0cbreak . \nlast")
    assert lines_of(tmp_path / "text.txt") == [" = Title = \n", "", "", " A page\x0cbreak . \n", "last\n"]
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match="empty"):
        lines_of(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="UTF-8"):
        lines_of(tmp_path / "latin.txt")
    with pytest.raises(FileNotFoundError, match="no text file"):
        lines_of(tmp_path / "none.txt")


# --- the run ----------------------------------------------------------------------------------------------------------


def by_hand(model, ids, window, reduction, remainder):
    """Perplexity from softmaxes in float64, one window after the other."""
    windows = [ids[i : i + window] for i in range(0, len(ids), window)]
    if remainder == "drop" and len(windows[-1]) < window:
        windows.pop()
    means, losses = [], []
    for piece in windows:
        with torch.no_grad():
            scores = model(torch.tensor([piece])).logits[0].double()
        probabilities = scores.exp() / scores.exp().sum(-1, keepdim=True)
        found = [-math.log(probabilities[t, piece[t + 1]]) for t in range(len(piece) - 1)]
        losses += found
        means += [sum(found) / len(found)] * bool(found)
    values = losses if reduction == "token" else means
    return math.exp(sum(values) / len(values))


PROTOCOL_ROWS = {
    "svd-llm": "svd-llm/table1/llama-7b-20-svd-llm",
    "basis-sharing": "basis-sharing/table1/llama-7b-40-basis-sharing-n2",
    "arena": "arena/matched/llama-7b-20-svd-llm",
}


@pytest.mark.parametrize("protocol", PROTOCOL_ROWS)
@pytest.mark.parametrize("bos", [True, False])
def test_a_run_on_stand_ins(protocol, bos, with_bos, without_bos, no_network):
    """Dense and compressed perplexities against the protocol put together by hand."""
    tokenizer, name = (with_bos if bos else without_bos), PROTOCOL_ROWS[protocol]
    done = reproduce(
        name, data=["wikitext2"], model=make_model(), tokenizer=tokenizer, calibration=TRAIN, text=TEST, samples=8,
        window=32, progress=False,
    )  # fmt: skip
    first = [0] if bos and protocol != "arena" else []

    def ids_of(text):
        return first + without_bos(text)["input_ids"]

    if protocol == "basis-sharing":
        sequences = sample_chunks(TRAIN, ids_of, samples=8, length=32, seed=2023)
        options, rule = {"method": "basis-sharing", "group_size": 2, "ratio": 0.4}, ("window", "keep")
    else:
        sequences = sample_offsets(TRAIN, ids_of, samples=8, length=32, seed=3)
        options, rule = {"method": "svd-llm", "ratio": 0.2}, ("token", "drop")
    ids = ids_of("\n\n".join(TEST))
    assert len(ids) % 32 > 1  # so that the remainder counts
    model = make_model()
    dense = by_hand(model, ids, 32, *rule)
    freqrank.compress(model, sequences, progress=False, **options)
    [found] = done.measurements
    assert found.tokens == len(ids)
    assert done.tokens == 8 * 32
    assert found.dense == pytest.approx(dense, rel=1e-5)
    assert found.measured == pytest.approx(by_hand(model, ids, 32, *rule), rel=1e-5)
    assert found.measured != pytest.approx(found.dense, rel=1e-3)
    assert done.report["settings"]["method"] == options["method"]
    assert found.published == ROWS[name].values["wikitext2"]
    missing = [note for note in done.notes if "no beginning-of-text token" in note]
    assert len(missing) == (not bos and protocol != "arena")


@pytest.mark.parametrize(
    "name",
    ["svd-llm/table1/llama-7b-40-svd", "svd-llm/table1/llama-7b-40-fwsvd", "svd-llm/table1/llama-7b-40-asvd",
     "svd-llm/ablation/llama-7b-40-svd-update", "basis-sharing/table6/llama-7b-40-basis-sharing-n3"],
)  # fmt: skip
def test_every_method_of_the_tables_runs(name, with_bos):
    """As `compress` with the row's options, from the same sequences."""
    row = ROWS[name]
    done = reproduce(
        name, data=["wikitext2"], model=make_model(), tokenizer=with_bos, calibration=TRAIN, text=TEST, samples=6,
        window=32, progress=False,
    )  # fmt: skip
    protocol = PROTOCOLS[row.protocol]
    sequences = reproducing._sample(protocol, TRAIN, encoder(with_bos, 0), 6, 32)
    model = make_model()
    freqrank.compress(model, sequences, progress=False, **row.options)
    ids = torch.tensor(with_bos("\n\n".join(TEST))["input_ids"])
    expected = freqrank.evaluate.perplexity(
        model, ids, window=32, reduction=protocol.reduction, remainder=protocol.remainder
    )
    assert done.measurements[0].measured == pytest.approx(expected, rel=1e-4)
    assert done.measurements[0].measured != pytest.approx(done.measurements[0].dense, rel=1e-3)


def test_stand_ins_are_said_loudly(with_bos, tmp_path):
    def run(**changes):
        options = {"model": make_model(), "tokenizer": with_bos, "calibration": TRAIN, "text": TEST, "window": 32}
        options |= {"samples": 4, "progress": False, **changes}
        return reproduce("basis-sharing/table1/llama-7b-20-svd-llm", **options)

    done = run()
    assert not done.applies
    assert set(done.stand_ins) == {"model", "calibration", "text", "samples", "window"}
    assert str(done).startswith("STAND-IN, the published values do not apply")
    assert "jeffwan/llama-7b-hf" in done.warning
    assert [m.data for m in done.measurements] == ["wikitext2", "ptb", "c4"]
    [table] = done.tables()
    assert [row[4] for row in table.rows] == ["(7.94)", "(18.05)", "(15.93)"]
    assert all(row[-1] == "-" for row in table.rows)
    stored = json.loads(json.dumps(done.to_dict()))
    assert stored["applies"] is False
    assert stored["measurements"][0]["published"] == 7.94
    pytest.importorskip("matplotlib")
    done.write(tmp_path / "out")
    assert "STAND-IN" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["reproduction"]["applies"] is False


def test_a_run_of_the_pinned_things_has_no_brackets(with_bos, monkeypatch):
    """Model and data as pinned, with what is fetched replaced: values apply and a ratio stands beside them."""
    asked = []

    def rows(name, purpose, download):
        asked.append((name, purpose, download))
        return TRAIN if purpose == "train" else TEST

    def load(pin, download, device):
        asked.append((pin.hub, download, device))
        return make_model(), with_bos

    first = []

    def sampled(rows, encode, **options):
        first.append(encode("")[0])
        return sample_offsets(rows, encode, **options)

    pin = MODELS["llama-2-7b"]
    monkeypatch.setitem(MODELS, "llama-2-7b", type(pin)(**{**pin.__dict__, "window": 32}))
    monkeypatch.setattr(reproducing, "sample_offsets", sampled)
    monkeypatch.setattr(reproducing, "_rows", rows)
    monkeypatch.setattr(reproducing, "_load", load)
    done = reproduce("svd-llm/table2/llama-2-7b-20-svd-llm", download=True, progress=False)
    assert asked == [("wikitext2", "train", True), ("wikitext2", "test", True), (pin.hub, True, "cpu")]
    assert first == [1]  # LLaMA's id as it is pinned, not this tokenizer's 0
    assert any("texts begin with token 1, as pinned" in note for note in done.notes)
    assert done.applies
    assert done.warning == ""
    [line] = done.tables()[0].rows
    assert line[4] == "8.5"
    assert float(line[-1]) == pytest.approx(done.measurements[0].measured / 8.5, abs=1e-3)


def test_the_dense_row_compresses_nothing(with_bos):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = reproduce(
        "basis-sharing/llama-2/llama-2-7b-dense", model=model, tokenizer=with_bos, text=TEST, window=32, progress=False
    )
    [found] = done.measurements
    assert found.dense == found.measured
    assert found.published == found.dense_published == 5.47
    assert done.report is None
    assert set(done.stand_ins) == {"model", "text", "window"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_c4_is_its_first_rows(with_bos):
    """Of a local text too: the conventions are the pinned data's."""
    rows = ["a text\n"] * 2500
    done = reproduce(
        "arena/matched/llama-7b-dense", data=["c4"], model=make_model(), tokenizer=with_bos, text=rows, window=64,
        progress=False,
    )  # fmt: skip
    assert done.measurements[0].tokens == len(with_bos("\n\n".join(rows[:2000]))["input_ids"]) - 1


def test_few_calibration_sequences_are_said(with_bos):
    done = reproduce(
        "basis-sharing/gpt-2/gpt-2-20-basis-sharing-n2", model=make_model(), tokenizer=with_bos,
        calibration=TRAIN[:12], text=TEST, window=32, progress=False,
    )  # fmt: skip
    assert any(note.endswith("of 256 sequences") for note in done.notes)


def test_bad_arguments(with_bos):
    name = "svd-llm/table2/llama-2-7b-20-svd-llm"
    local = {"model": make_model(), "tokenizer": with_bos, "calibration": TRAIN, "text": TEST, "progress": False}
    with pytest.raises(ValueError, match="near: svd-llm/table2/llama-2-7b-20-svd-llm"):
        reproduce("svd-llm/table2/llama-2-7b-20-svdllm")
    with pytest.raises(ValueError, match="PAPER/TABLE/MODEL"):
        plan("zzz")
    with pytest.raises(ValueError, match="near: basis-sharing/llama-2/"):
        plan("llama-2-7b-40-basis-sharing-n2")
    with pytest.raises(ValueError, match="has values for wikitext2; got data 'ptb'"):
        plan(name, ["ptb"])
    with pytest.raises(ValueError, match="data must not be empty"):
        plan(name, [])
    with pytest.raises(ValueError, match="context of 64 tokens and windows have 2048"):
        reproduce(name, **local)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        reproduce(name, **local, samples=0)
    with pytest.raises(TypeError, match="window must be an integer"):
        reproduce(name, **local, window=3.5)
    with pytest.raises(ValueError, match="tokenizer is given without its model"):
        reproduce(name, tokenizer=with_bos)


def test_nothing_is_fetched_unasked(with_bos, no_network, monkeypatch, tmp_path):
    """Without `download` neither model nor data reach for the network, and both say what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"jeffwan/llama-7b-hf cannot be loaded .*--download.*--model FOLDER"):
        reproduce("svd-llm/ablation/llama-7b-20-svd-llm", calibration=TRAIN, text=TEST, progress=False)
    pytest.importorskip("datasets")
    local = {"model": make_model(), "tokenizer": with_bos, "window": 32, "progress": False}
    with pytest.raises(ValueError, match=r"Salesforce/wikitext cannot be read .*--download.*--calibration FILE"):
        reproduce("svd-llm/ablation/llama-7b-20-svd-llm", text=TEST, **local)
    for name in ("wikitext2", "ptb", "c4"):
        with pytest.raises(ValueError, match=r"cannot be read .*--download.*--text FILE"):
            reproducing._rows(name, "test", False)


def test_datasets_that_is_missing(with_bos, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs `datasets`.*pip install 'freqrank\[eval\]'"):
        reproduce("svd-llm/ablation/llama-7b-20-svd-llm", model=make_model(), tokenizer=with_bos, text=TEST)


def test_pinned_data_is_read_as_it_lies_on_the_hub(tmp_path, monkeypatch, no_network):
    """The layout of each data set in a local folder, read by the same call."""
    pytest.importorskip("datasets")
    import datasets

    root = tmp_path / "wikitext2"
    (root / "wikitext-2-raw-v1").mkdir(parents=True)
    for split in ("train", "test"):
        rows = {"text": ["", f" = {split} = \n"]}
        datasets.Dataset.from_dict(rows).to_parquet(str(root / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet"))
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n  - split: test\n    path: wikitext-2-raw-v1/"
        "test-*\n  - split: train\n    path: wikitext-2-raw-v1/train-*\n---\n"
    )
    root = tmp_path / "ptb" / "penn_treebank"
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        datasets.Dataset.from_dict({"sentence": [f"a {split}"]}).to_parquet(str(root / split / "0000.parquet"))
    root = tmp_path / "c4" / "en"
    root.mkdir(parents=True)
    for file, text in (("c4-train.00000-of-01024", "t"), ("c4-validation.00000-of-00008", "v")):
        line = json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "u"})
        (root / f"{file}.json.gz").write_bytes(gzip.compress(line.encode() + b"\n"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    expected = {
        "wikitext2": (["", " = train = \n"], ["", " = test = \n"]),
        "ptb": (["a train"], ["a test"]),
        "c4": (["t"], ["v"]),
    }
    for name, (train, test) in expected.items():
        pinned = DATA[name]
        monkeypatch.setitem(DATA, name, type(pinned)(**{**pinned.__dict__, "hub": str(tmp_path / name)}))
        assert reproducing._rows(name, "train", False) == train
        assert reproducing._rows(name, "test", False) == test


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run():
    testing = pytest.importorskip("typer.testing")
    from freqrank.cli import app

    def call(*arguments):
        return testing.CliRunner().invoke(app, ["reproduce", *map(str, arguments)])

    return call


def test_every_row_has_a_dry_run(run, no_network):
    for name, row in ROWS.items():
        planned = plan(name)
        assert sum(planned.estimate.memory.values()) > 1e8
        text = str(planned)
        assert MODELS[row.model].hub in text
        assert all(f"{value:,}" in text for where, value in row.values.items() if where in DATA)
        assert json.loads(json.dumps(planned.to_dict()))["row"]["name"] == name
    shown = run("svd-llm/table2/llama-2-7b-20-svd-llm", "--dry-run")
    assert shown.exit_code == 0, shown.output
    for word in ("meta-llama/Llama-2-7b-hf", "8.5", "256 sequences of 2048", "svd-llm", "memory", "issue 33"):
        assert word in shown.stdout
    stored = json.loads(run("basis-sharing/table1/llama-7b-20-svd-llm", "--dry-run", "--data", "c4", "--json").stdout)
    assert list(stored["data"]) == ["c4"]
    assert stored["estimate"]["parameters"] == 6738415616


def test_list(run):
    lines = run("--list").stdout.splitlines()
    assert len(lines) == len(ROWS)
    lines = run("--list", "mistral").stdout.splitlines()
    assert len(lines) == 5
    assert all("mistral-7b" in line for line in lines)
    assert json.loads(run("--list", "table2", "--json").stdout) == {
        "svd-llm/table2/llama-2-7b-20-svd-llm": {"wikitext2": 8.5}
    }


def test_the_command_on_a_stand_in(run, with_bos, tmp_path, no_network):
    make_model().save_pretrained(tmp_path / "tiny")
    with_bos.save_pretrained(tmp_path / "tiny")
    (tmp_path / "train.txt").write_text("".join(row or "\n" for row in TRAIN))
    (tmp_path / "test.txt").write_text("".join(row or "\n" for row in TEST))
    assert lines_of(tmp_path / "train.txt") == TRAIN
    name = "basis-sharing/table1/llama-7b-40-basis-sharing-n2"
    arguments = [name, "--model", tmp_path / "tiny", "--calibration", tmp_path / "train.txt", "--samples", 8]
    arguments += ["--text", tmp_path / "test.txt", "--window", 32, "--data", "wikitext2"]
    result = run(*arguments, "--json", "--output", tmp_path / "out", "--checkpoint", tmp_path / "pieces")
    assert result.exit_code == 0, result.output
    assert "STAND-IN" in result.stderr
    assert not (tmp_path / "pieces").exists()
    stored = json.loads(result.stdout)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    expected = reproduce(
        name, data=["wikitext2"], model=model, tokenizer=with_bos, calibration=TRAIN, text=TEST, samples=8, window=32,
        progress=False,
    )  # fmt: skip
    assert stored["measurements"] == json.loads(json.dumps(expected.to_dict()))["measurements"]
    assert (tmp_path / "out" / "report.html").is_file()
    shown = run(*arguments)
    assert "STAND-IN" in shown.stdout
    assert "(12.39)" in shown.stdout


def test_the_command_fails_in_one_line(run, tmp_path):
    def failed(result, *words):
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        [line] = result.stderr.splitlines()
        assert all(word in line for word in words), line

    name = "svd-llm/table2/llama-2-7b-20-svd-llm"
    failed(run(), "PAPER/TABLE/ROW", "--list")
    failed(run("svd-llm/table1/llama-7b-20-svdllm"), "near: svd-llm/table1/llama-7b-20-svd-llm")
    failed(run("--list", "gpt-5"), "'gpt-5'")
    failed(run(name, "--dry-run", "--model", "x"), "leave out --model")
    failed(run(name, "--data", "ptb"), "got data 'ptb'")
    failed(run(name, "--text", tmp_path / "none.txt"), "no text file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    failed(run(name, "--output", tmp_path / "full"), "not empty")
