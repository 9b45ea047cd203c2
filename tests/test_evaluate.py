"""Held-out loss and perplexity against loops written out by hand."""

import math

import pytest
import torch
from freqrank.evaluate import loss, perplexity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

VOCABULARY = 11


class Causal(nn.Module):
    """Logits from a running mean of embeddings: depends on every token before, so windows and strides matter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids):
        x = self.embedding(ids).cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
        return self.head(self.dropout(3 * x))


@pytest.fixture(scope="module")
def model():
    return Causal()


def ids_of(count, seed=0):
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def by_hand(model, ids, window, stride, reduction, remainder):
    """Every token in the first window that holds it, one forward pass a token."""
    model.eval()
    sums, counts, done, start = [], [], 0, 0
    while True:
        stop = min(start + window, len(ids))
        if stop - start < window and remainder == "drop":
            break
        nats = []
        for t in range(max(done, start + 1), stop):
            with torch.no_grad():
                logits = model(ids[None, start:t])[0, -1].double()
            nats.append(-torch.log_softmax(logits, 0)[ids[t]].item())
        if nats:
            sums.append(sum(nats))
            counts.append(len(nats))
        done = stop
        if stop == len(ids):
            break
        start += stride
    if reduction == "token":
        return sum(sums) / sum(counts)
    return sum(s / c for s, c in zip(sums, counts, strict=True)) / len(sums)


@pytest.mark.parametrize("reduction", ["token", "window"])
@pytest.mark.parametrize("remainder", ["keep", "drop"])
@pytest.mark.parametrize("tokens", [16, 37, 41])
@pytest.mark.parametrize(("window", "stride"), [(8, None), (8, 8), (8, 3), (8, 1), (16, 5), (2, 1)])
def test_against_a_loop(model, tokens, window, stride, reduction, remainder):
    ids = ids_of(tokens)
    options = {"window": window, "stride": stride, "reduction": reduction, "remainder": remainder}
    expected = by_hand(model, ids, window, stride or window, reduction, remainder)
    assert loss(model, ids, **options) == pytest.approx(expected, abs=2e-6)
    assert perplexity(model, ids, **options) == pytest.approx(math.exp(expected), rel=3e-6)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_property_against_a_loop(data):
    model = Causal()
    window = data.draw(st.integers(2, 12))
    stride = data.draw(st.integers(1, window))
    tokens = data.draw(st.integers(2, 40))
    reduction = data.draw(st.sampled_from(["token", "window"]))
    ids = ids_of(tokens, seed=tokens)
    expected = by_hand(model, ids, window, stride, reduction, "keep")
    assert loss(model, ids, window=window, stride=stride, reduction=reduction) == pytest.approx(expected, abs=2e-6)


def test_conventions_change_the_number(model):
    ids = ids_of(37)
    numbers = {
        round(loss(model, ids, window=8, reduction=reduction, remainder=remainder), 9)
        for reduction in ("token", "window")
        for remainder in ("keep", "drop")
    }
    assert len(numbers) == 3  # without a remainder the two means agree
    assert loss(model, ids, window=8, stride=1) != loss(model, ids, window=8)


def test_several_texts_do_not_see_each_other(model):
    texts = torch.stack([ids_of(20, 1), ids_of(20, 2)])
    alone = [loss(model, text, window=8) for text in texts]
    assert loss(model, texts, window=8) == pytest.approx(sum(alone) / 2, abs=1e-7)
    assert loss(model, texts[:1], window=8) == loss(model, texts[0], window=8)


def test_a_window_longer_than_the_text(model):
    ids = ids_of(9)
    assert loss(model, ids) == pytest.approx(by_hand(model, ids, 2048, 2048, "token", "keep"), abs=2e-6)


def test_training_mode_is_restored_and_dropout_is_off(model):
    ids = ids_of(20)
    model.eval()
    expected = perplexity(model, ids, window=8)
    model.train()
    assert perplexity(model, ids, window=8) == expected
    assert model.training
    model.eval()


def test_batching_does_not_change_the_number(model, monkeypatch):
    ids = ids_of(400)
    whole = loss(model, ids, window=16)
    monkeypatch.setattr("freqrank.evaluate._LOGITS", 1)
    assert loss(model, ids, window=16) == pytest.approx(whole, abs=1e-7)


def test_infinite_and_nan_are_said():
    def table(value):
        return nn.Embedding.from_pretrained(torch.tensor([[0.0, value], [0.0, value]]))

    zeros = torch.zeros(4, dtype=torch.long)
    assert perplexity(table(1e6), zeros) == math.inf
    assert math.isnan(perplexity(table(math.nan), zeros))


def test_a_transformers_model_agrees_with_its_own_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 256, (3, 24))
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert loss(model, ids, window=24) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"input_ids": [1, 2]}, TypeError, "input_ids must be a torch.Tensor"),
        ({"input_ids": torch.zeros(5)}, TypeError, "integer"),
        ({"input_ids": torch.zeros(1, 2, 3, dtype=torch.long)}, ValueError, "shape"),
        ({"input_ids": torch.zeros(1, dtype=torch.long)}, ValueError, "too short: 1 tokens"),
        ({"input_ids": torch.zeros(0, dtype=torch.long)}, ValueError, "too short"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, ValueError, "too short"),
        ({"input_ids": torch.full((5,), -1)}, ValueError, "-1"),
        ({"window": 1}, ValueError, "window must be at least 2"),
        ({"window": 8.5}, TypeError, "window must be an integer; got 8.5"),
        ({"stride": "2"}, TypeError, "stride must be an integer; got '2'"),
        ({"stride": 0}, ValueError, "stride must be between 1 and window = 8; got 0"),
        ({"stride": 9}, ValueError, "stride must be between 1 and window = 8; got 9"),
        ({"reduction": "mean"}, ValueError, "'token', 'window'; got 'mean'"),
        ({"remainder": "pad"}, ValueError, "'keep', 'drop'; got 'pad'"),
        ({"window": 64, "remainder": "drop"}, ValueError, "at least 64"),
    ],
)
def test_bad_input(model, change, error, words):
    options = {"input_ids": ids_of(20), "window": 8, **change}
    with pytest.raises(error, match=words):
        perplexity(model, options.pop("input_ids"), **options)


def test_ids_outside_the_vocabulary():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(ValueError, match="from 0 to 15; got values from 3 to 16"):
        perplexity(transformers.LlamaForCausalLM(config), torch.tensor([3, 16]))
