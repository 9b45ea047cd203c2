"""Recovery training: stages and their losses, what is trained, batches and documents, resuming, several processes."""

from __future__ import annotations

import copy
import json
import math
import sys

import freqrank
import pytest
import torch
import torch.nn.functional as F
from freqrank import distill, linearize
from freqrank.attention.distillation import pack_documents, validation_loss
from freqrank.attention.training.settings import Settings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 61


def small_model(layers: int = 2, seed: int = 0, **more) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=None, bos_token_id=None,
        **more,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # random weights give near-uniform logits; sharper ones make a wrong token visible
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4.0)
    return model


def pair(layers: int = 2, convert: list[int] | None = None, **more) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A converted model and its original."""
    teacher = small_model(layers, **more)
    student = copy.deepcopy(teacher)
    linearize(student, layers=convert, norm_groups="heads", position_table=16)
    return student, teacher


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded() -> dict[str, torch.Tensor]:
    """Two rows of 12 and 7 tokens, padded on the left."""
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    ids[1, :5] = mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def packed() -> dict[str, torch.Tensor]:
    """Documents of 9, 5 and 6 tokens in one row."""
    return pack_documents([tokens(1, n, seed=n)[0] for n in (9, 5, 6)], 20, boundaries=True)[0]


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Keep(torch.optim.Optimizer):
    """Changes nothing and keeps the gradients that it was given, by position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], {"lr": 1.0})
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.gradients: list[dict[str, torch.Tensor]] = []

    def step(self, closure=None) -> None:
        params = self.param_groups[0]["params"]
        self.gradients.append({self.names[id(p)]: p.grad.clone() for p in params})


def gradients(student, teacher, data, **options) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The gradient that the first step gives the optimiser, and the losses. Nothing is changed."""
    kept: list[Keep] = []

    def optimizer(model):
        kept.append(Keep(model))
        return kept

    options = {"steps": 1, "clip": 1e9, "progress": False, **options}
    report = distill(student, teacher, data, optimizer=optimizer, **options)
    return kept[0].gradients[0], report.losses


# --- stages ----------------------------------------------------------------------------------------------------------


def attention_reference(student, teacher, batch) -> torch.Tensor:
    """The attention loss in float64, layer by layer: the student's blocks one after the other, by hand."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    ids = batch["input_ids"]
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    positions = batch.get("position_ids", (real.long().cumsum(-1) - 1).clamp(min=0))
    time = torch.arange(ids.shape[1])
    seen = (time[:, None] >= time) & real[:, None, :]
    if "position_ids" in batch:
        document = (batch["position_ids"] == 0).cumsum(-1)
        seen &= document[:, :, None] == document[:, None, :]
        boundaries = torch.cat([(positions[0] == 0).nonzero()[:, 0], torch.tensor([ids.shape[1]])]).int()
    x = student.model.embed_tokens(ids)
    total = torch.zeros((), dtype=torch.float64)
    own_places = student.model.rotary_emb(x, positions)
    # transformers gives a padded row of a softmax model plain positions
    other_places = own_places if "position_ids" in batch else teacher.model.rotary_emb(x, time[None])
    for own, other in zip(student.model.layers, teacher.model.layers, strict=True):
        inputs = own.input_layernorm(x)
        packed = {"cu_seq_lens_q": boundaries} if "position_ids" in batch else {"attention_mask": real}
        a, _ = own.self_attn(inputs, own_places, position_ids=positions, **packed)
        q, k, v = (
            getattr(other.self_attn, f"{name}_proj")(inputs).unflatten(-1, (-1, 8)).transpose(1, 2) for name in "qkv"
        )
        cos, sin = (p[:, None] for p in other_places)
        q, k = (h * cos + torch.cat([-h[..., 4:], h[..., :4]], -1) * sin for h in (q, k))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (q @ k.mT / math.sqrt(8)).masked_fill(~seen[:, None], -1e30).softmax(-1)
        t = other.self_attn.o_proj((scores @ v).transpose(1, 2).flatten(2))
        total = total + ((a - t)[real]).square().sum() / t[real].square().sum()
        x = x + a
        x = x + own.mlp(own.post_attention_layernorm(x))
    return total


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("data", ["plain", "padded", "packed"])
@torch.no_grad()
def test_attention_stage_matches_the_teachers_attention_on_the_students_inputs(data, implementation):
    student, teacher = pair(attn_implementation=implementation)
    batch = {"plain": {"input_ids": tokens(3, 20)}, "padded": padded(), "packed": packed()}[data]
    expected = attention_reference(student, teacher, batch).item()
    with torch.enable_grad():
        report = distill(
            student, teacher, [batch], recipe="align", stages=[("attention", 1.0)], steps=1, progress=False
        )
    assert report.losses[0] == pytest.approx(expected, rel=1e-4)
    assert report.stages == ["attention"]


def test_attention_stage_trains_each_attention_alone():
    student, teacher = pair(layers=3, convert=[0, 2])
    data = tokens(4, 16)
    options = {"recipe": "align", "stages": [("attention", 1.0)], "batch_size": 4}
    found, _ = gradients(student, teacher, data, **options)
    new = {n for n, _ in student.named_parameters() if any(f"layers.{i}.self_attn." in n for i in (0, 2))}
    assert set(found) == new
    # Layer 2's gradient is that of its own term: what it is asked for does not depend on layer 0's parameters.
    with torch.no_grad():
        states = student(data, output_hidden_states=True).hidden_states
        inputs = student.model.layers[2].input_layernorm(states[2])
        places = student.model.rotary_emb(inputs, torch.arange(16)[None])
        wanted = teacher.model.layers[2].self_attn(inputs, places, None)[0]
    ours, _ = student.model.layers[2].self_attn(inputs, places)
    ((ours - wanted).square().sum() / wanted.square().sum()).backward()
    for name, p in student.model.layers[2].self_attn.named_parameters():
        torch.testing.assert_close(found[f"model.layers.2.self_attn.{name}"], p.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_stages_follow_each_other_under_one_schedule():
    student, teacher = pair()
    data = tokens(8, 16)
    report = distill(
        student, teacher, data, recipe="align", steps=20, batch_size=4, lr=3e-3, validation=data, progress=False
    )
    assert report.stages == ["attention"] * 4 + ["hidden"] * 4 + ["logits"] * 10 + ["next-token"] * 2
    assert report.losses[3] < report.losses[0]
    assert report.losses[7] < report.losses[4]
    assert all(loss > ce for loss, ce in zip(report.losses[8:18], report.next_token[8:18], strict=True))
    assert report.losses[18:] == report.next_token[18:]
    assert report.validation[-1][1] < report.validation[0][1]
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (s - 1) / 19)) for s in range(1, 20)]
    assert report.learning_rates == pytest.approx([3e-3] + [3e-3 * c for c in cosine])
    assert all(norm > 0 for norm in report.gradient_norms)
    assert report.settings["stages"] == [["attention", 4], ["hidden", 4], ["logits", 10], ["next-token", 2]]


def test_align_does_better_than_the_same_steps_of_next_token_loss():
    """Not a benchmark: a sign that the stages do what they are for."""
    student, teacher = pair()
    with torch.no_grad():
        data = teacher.generate(tokens(32, 2), max_new_tokens=22, do_sample=True, pad_token_id=0)
    plain = copy.deepcopy(student)
    options = {"steps": 40, "lr": 3e-3, "validation": data, "progress": False}
    aligned = distill(student, teacher, data, recipe="align", **options)
    released = distill(plain, teacher, data, recipe="released", **options)
    with torch.no_grad():
        target = teacher(data).logits.log_softmax(-1)
        kl = [
            F.kl_div(model(data).logits.log_softmax(-1), target, log_target=True, reduction="batchmean").item()
            for model in (student, plain)
        ]
    assert kl[0] < kl[1]
    assert aligned.validation[-1][1] < aligned.validation[0][1]
    assert released.steps == aligned.steps == 40


def test_the_teacher_runs_only_where_something_reads_it():
    student, teacher = pair()
    calls = []
    teacher.register_forward_hook(lambda *a: calls.append("whole"))
    teacher.model.register_forward_hook(lambda *a: calls.append("decoder"))
    data = tokens(4, 12)
    for stage, expected in [("attention", ["decoder"]), ("hidden", ["decoder"]), ("next-token", [])]:
        calls.clear()
        distill(student, teacher, data, recipe="align", stages=[(stage, 1)], steps=1, progress=False)
        assert calls == expected, stage
    distill(student, teacher, data, recipe="distill", kl_weight=0, steps=1, progress=False)
    distill(student, teacher, data, recipe="released", steps=1, progress=False)
    assert calls == []
    assert not teacher.training
    assert not any(m._forward_pre_hooks for m in teacher.modules())
    assert not any(m._forward_pre_hooks for m in student.modules() if m is not student.model)


@pytest.mark.parametrize(("steps", "expected"), [(1, ["logits"]), (3, ["attention", "logits", "logits"])])
def test_short_runs_leave_stages_out(steps, expected):
    settings = Settings("align", steps)
    assert [settings.stage(step) for step in range(steps)] == expected


def test_bad_stages_are_refused():
    student, teacher = pair(layers=1)
    data = tokens(2, 8)
    for stages, match in [
        ([("attention", 0.5), ("logits", 0.4)], "sum to 1"),
        ([], "sum to 1"),
        ("attention", "sum to 1"),
        ([("attentions", 1.0)], "pairs of one of 'attention', 'hidden', 'logits', 'next-token'"),
        ([("attention", 1.0, 2)], "pairs of one of"),
        ([("attention", -1.0), ("logits", 2.0)], "fractions above 0"),
        ([("attention", float("nan"))], "fractions above 0"),
    ]:
        with pytest.raises(ValueError, match=match):
            distill(student, teacher, data, recipe="align", stages=stages, steps=2)
    with pytest.raises(ValueError, match='stages needs recipe="align"'):
        distill(student, teacher, data, recipe="distill", stages=[("logits", 1.0)], steps=2)
    with pytest.raises(ValueError, match='align_steps needs recipe="distill"'):
        distill(student, teacher, data, recipe="align", align_steps=1, steps=2)
    with pytest.raises(ValueError, match="needs a teacher"):
        distill(student, None, data, recipe="align", steps=2)


class Bigram(nn.Module):
    """No transformers model: an embedding and a head, with the outputs that training reads."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids, use_cache=False):
        return type("Output", (), {"logits": self.table(input_ids)})()


def test_attention_stage_needs_models_whose_attention_is_found_and_differs():
    student, teacher = pair(layers=1)
    data = tokens(2, 8)
    options = {"recipe": "align", "stages": [("attention", 1.0)], "steps": 1, "progress": False}
    with pytest.raises(ValueError, match=r"attention.*must be found in student and teacher.*Bigram"):
        distill(Bigram(), teacher, data, **options)
    with pytest.raises(ValueError, match=r"must have converted attention.*LlamaAttention.*linearize"):
        distill(copy.deepcopy(teacher), teacher, data, **options)
    with pytest.raises(ValueError, match=r"teacher must have the student's 1 layers.*got 2"):
        distill(student, small_model(2), data, **options)
    report = distill(Bigram(), None, data, recipe="released", steps=3, lr=0.1, progress=False)
    assert report.losses[-1] < report.losses[0]


# --- micro-batches, memory, precision --------------------------------------------------------------------------------

STAGE_OPTIONS = [
    {"recipe": "released"},
    {"recipe": "distill", "hidden_weight": 0.5, "temperature": 2.0},
    {"recipe": "align", "stages": [("hidden", 1.0)]},
    {"recipe": "align", "stages": [("attention", 1.0)]},
]


def uneven_batches() -> list[dict[str, torch.Tensor]]:
    """Four batches whose numbers of rows, real tokens and targets differ, of one length."""
    found = []
    for i, rows in enumerate((1, 3, 2, 2)):
        ids, mask = tokens(rows, 14, seed=i), torch.ones(rows, 14, dtype=torch.long)
        for row in range(rows):
            mask[row, : (3 * i + 2 * row) % 11] = 0
        found.append({"input_ids": ids * mask, "attention_mask": mask})
    return found


@pytest.mark.parametrize("options", STAGE_OPTIONS)
def test_accumulated_batches_equal_one_large_batch(options):
    student, teacher = (model.double() for model in pair())
    parts = uneven_batches()
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    expected, losses = gradients(student, teacher, [whole], **options)
    found, accumulated = gradients(student, teacher, parts, accumulate=4, **options)
    assert accumulated == pytest.approx(losses, rel=1e-12)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], atol=1e-10 * scale + 1e-15, rtol=1e-8, msg=name)


def test_accumulation_takes_the_rows_of_a_tensor_as_a_larger_batch_does():
    data = tokens(12, 10)
    runs = []
    for options in ({"batch_size": 6}, {"batch_size": 2, "accumulate": 3}):
        student, _ = (model.double() for model in pair(layers=1))
        runs.append(distill(student, None, data, steps=4, progress=False, **options))
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-10)
    assert runs[0].tokens == runs[1].tokens == 4 * 6 * 10


@pytest.mark.parametrize("train", ["all", "attention"])
@pytest.mark.parametrize("options", STAGE_OPTIONS)
def test_checkpointing_gives_the_same_gradients_and_is_off_again_after(options, train):
    student, teacher = (model.double() for model in pair())
    batch = padded()
    expected, _ = gradients(student, teacher, [batch], train=train, **options)
    found, _ = gradients(student, teacher, [batch], train=train, checkpointing=True, **options)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-9, msg=name)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in student.modules())
    assert not student.model.embed_tokens._forward_hooks


def test_checkpointing_recomputes_blocks_and_leaves_the_users_own_on():
    student, teacher = pair()
    calls = []
    student.model.layers[0].mlp.act_fn.register_forward_hook(lambda *a: calls.append(0))
    distill(student, teacher, tokens(2, 8), steps=1, checkpointing=True, progress=False)
    assert len(calls) == 2
    student.gradient_checkpointing_enable()
    distill(student, teacher, tokens(2, 8), steps=1, checkpointing=True, progress=False)
    assert len(calls) == 4
    assert student.model.layers[0].gradient_checkpointing
    options = {"recipe": "align", "stages": [("attention", 1.0)]}
    found, _ = gradients(student, teacher, tokens(2, 8), **options)
    student.gradient_checkpointing_disable()
    expected, _ = gradients(student, teacher, tokens(2, 8), **options)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    with pytest.raises(ValueError, match="checkpointing=True needs a student with gradient_checkpointing_enable"):
        distill(Bigram(), None, tokens(2, 8), steps=1, checkpointing=True, progress=False)
    with pytest.raises(TypeError, match="checkpointing must be True or False"):
        distill(student, teacher, tokens(2, 8), steps=1, checkpointing="yes")


@pytest.mark.parametrize("options", STAGE_OPTIONS)
def test_bfloat16_computes_in_bfloat16_on_float32_weights(options):
    student, teacher = pair()
    batch = {"input_ids": tokens(4, 24)}
    seen = []
    student.model.layers[1].self_attn.o_proj.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    exact, losses = gradients(student, teacher, [batch], **options)
    rounded, near = gradients(student, teacher, [batch], precision="bfloat16", **options)
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert near == pytest.approx(losses, rel=0.05)
    assert near != losses
    assert all(p.dtype == torch.float32 for p in student.parameters())
    assert all(g.dtype == torch.float32 for g in rounded.values())
    inner = sum((exact[n] * rounded[n]).sum() for n in exact)
    norms = math.prod(sum(g.square().sum() for g in found.values()).sqrt() for found in (exact, rounded))
    assert inner / norms > 0.95


def test_bfloat16_needs_float32_weights():
    student, teacher = pair(layers=1)
    with pytest.raises(ValueError, match=r'precision="bfloat16" .*keeps float32 weights; .* is torch.bfloat16'):
        distill(student.to(torch.bfloat16), teacher, tokens(2, 8), steps=1, precision="bfloat16")


# --- what is trained -------------------------------------------------------------------------------------------------


def test_train_attention_leaves_the_rest_as_it_was():
    student, teacher = pair(layers=3, convert=[1])
    student.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)  # a flag that comes back as it was
    before = parameters(student)
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    report = distill(
        student, teacher, tokens(8, 12), recipe="distill", steps=3, batch_size=4, train="attention", progress=False
    )
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "layers.1.self_attn." in name}
    assert flags == {name: p.requires_grad for name, p in student.named_parameters()}
    assert report.settings["train"] == "attention"


def test_train_lora_changes_old_linears_by_low_rank_and_new_parameters_freely():
    student, teacher = pair()
    before = parameters(student)
    types = {name: type(m) for name, m in student.named_modules()}
    state = torch.get_rng_state()
    report = distill(
        student, teacher, tokens(8, 12), recipe="distill", steps=5, batch_size=4, lr=1e-2, train="lora", lora_rank=2,
        progress=False,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: type(m) for name, m in student.named_modules()} == types
    assert parameters(student).keys() == before.keys()
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    old = set(parameters(teacher))
    for name, p in student.named_parameters():
        difference = (p.detach() - before[name]).double()
        if name not in old:
            assert difference.abs().max() > 0, name
        elif ".layers." in name and p.dim() == 2:
            values = torch.linalg.svdvals(difference)
            assert values[1] > 0, name
            assert values[2] <= 1e-4 * values[0], name
        else:  # norms, embeddings, the head
            assert not difference.any(), name
    assert report.settings["lora_rank"] == 2
    # what was trained is what was left: the loss of the merged model goes on where that of the adapters ended
    again = distill(student, teacher, tokens(8, 12), recipe="distill", steps=1, batch_size=8, progress=False)
    assert again.losses[0] < report.losses[0]


def test_lora_and_attention_alone_go_through_all_stages():
    data = tokens(8, 12)
    for train in ("lora", "attention"):
        student, teacher = pair()
        report = distill(
            student, teacher, data, recipe="align", steps=10, lr=5e-3, train=train, accumulate=2, batch_size=4,
            checkpointing=True, validation=data, progress=False,
        )  # fmt: skip
        assert len(set(report.stages)) == 4
        assert report.validation[-1][1] < report.validation[0][1]


def test_what_is_trained_needs_a_teacher_that_says_what_is_new():
    student, teacher = pair(layers=1)
    data = tokens(2, 8)
    for train in ("attention", "lora"):
        with pytest.raises(ValueError, match=f"train='{train}' needs the teacher"):
            distill(student, None, data, steps=1, train=train)
    with pytest.raises(ValueError, match="train must be one of 'all', 'attention', 'lora'; got 'head'"):
        distill(student, teacher, data, steps=1, train="head")
    with pytest.raises(ValueError, match="lora_rank must be an integer of at least 1"):
        distill(student, teacher, data, steps=1, train="lora", lora_rank=0)
    freqrank.compress(student, tokens(8, 8), method="svd", ratio=0.5)
    types = {name: type(m) for name, m in student.named_modules()}
    with pytest.raises(ValueError, match="cannot merge into low-rank linears such as"):
        distill(student, teacher, data, steps=1, train="lora", progress=False)
    assert {name: type(m) for name, m in student.named_modules()} == types
    assert all(p.requires_grad for p in student.parameters())


def test_lora_without_peft_says_so(monkeypatch):
    student, teacher = pair(layers=1)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match='train="lora" needs peft: pip install peft'):
        distill(student, teacher, tokens(2, 8), steps=1, train="lora", progress=False)


# --- documents -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=8), st.integers(2, 9), st.sampled_from([None, 60]), st.randoms())
def test_packing_keeps_every_token_in_order_and_knows_where_documents_start(lengths, length, separator, random):
    documents = [[random.randrange(1, 60) for _ in range(n)] for n in lengths]
    expected: list[tuple[int, int]] = []  # token, position in its document
    for document in documents:
        ids = document + [separator] * (separator is not None) if document else []
        expected += [(token, position) for position, token in enumerate(ids)]
    count = len(expected) // length
    given = [torch.tensor(d, dtype=torch.int32) if i % 2 else d for i, d in enumerate(documents)]
    if count == 0:
        with pytest.raises(ValueError, match=f"at least one row of {length} tokens; got {len(expected)} in all"):
            pack_documents(given, length, separator=separator)
        return
    rows = pack_documents(given, length, separator=separator)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[t for t, _ in expected[i * length : (i + 1) * length]] for i in range(count)]
    batches = pack_documents(given, length, separator=separator, boundaries=True)
    for i, (batch, row) in enumerate(zip(batches, rows, strict=True)):
        assert torch.equal(batch["input_ids"], row[None])
        at = None
        for column in range(length):
            at = 0 if column == 0 or expected[i * length + column][1] == 0 else at + 1
            assert batch["position_ids"][0, column] == at


def test_packing_refuses_what_is_no_token():
    for documents, error, match in [
        ("text", TypeError, "documents must be an iterable"),
        (tokens(2, 8), TypeError, "documents must be an iterable"),
        (["text"], TypeError, "tokenize it first"),
        ([[1.5, 2.0]], TypeError, "integer token ids"),
        ([[[1], [2]]], TypeError, "integer token ids"),
        ([[None]], TypeError, "integer token ids"),
    ]:
        with pytest.raises(error, match=match):
            pack_documents(documents, 4)
    with pytest.raises(ValueError, match="length must be an integer of at least 2; got 1"):
        pack_documents([[1, 2, 3]], 1)
    with pytest.raises(TypeError, match="separator must be a token id or None"):
        pack_documents([[1, 2, 3]], 2, separator="</s>")


@pytest.mark.parametrize("options", STAGE_OPTIONS)
def test_documents_in_one_row_train_as_documents_apart(options):
    """Losses and gradients of a packed row are those of its documents, each in a batch of its own."""
    student, teacher = (model.double() for model in pair())
    row = packed()
    apart = [{"input_ids": ids} for ids in row["input_ids"].split([9, 5, 6], 1)]
    expected, losses = gradients(student, teacher, apart, accumulate=3, **options)
    found, together = gradients(student, teacher, [row], **options)
    assert together == pytest.approx(losses, rel=1e-9)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-8, rtol=1e-6, msg=name)


def test_no_token_sees_or_predicts_across_a_boundary():
    student, teacher = pair()
    row = packed()
    with torch.no_grad():
        for model in (student, teacher):
            logits = model(**row, use_cache=False).logits
            other = {**row, "input_ids": torch.cat([tokens(1, 9, seed=50), row["input_ids"][:, 9:]], 1)}
            torch.testing.assert_close(model(**other, use_cache=False).logits[:, 9:], logits[:, 9:])
        logits = student(**row, use_cache=False).logits[0].log_softmax(-1)
        wanted = [i for i in range(1, 20) if i not in (9, 14)]
        expected = -sum(logits[i - 1, row["input_ids"][0, i]] for i in wanted) / len(wanted)
    assert validation_loss(student, [row]) == pytest.approx(expected.item(), rel=1e-5)
    report = distill(student, teacher, [row], steps=1, progress=False)
    assert report.losses[0] == pytest.approx(expected.item(), rel=1e-5)
    wrong = {**row, "position_ids": row["position_ids"][:, 1:]}
    with pytest.raises(ValueError, match="position_ids must have the shape of input_ids"):
        distill(student, teacher, [wrong], steps=1, progress=False)


def test_validation_counts_every_target_once():
    student, _ = pair(layers=1)
    parts = uneven_batches()
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert validation_loss(student, parts) == pytest.approx(validation_loss(student, [whole]), rel=1e-6)
    nothing = {"input_ids": tokens(1, 4), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match="validation must hold at least one token to predict"):
        validation_loss(student, [nothing])
    assert not student.training


# --- interrupted runs ------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def stop_after(steps: int):
    def on_step(done, report):
        if done == steps:
            raise Killed

    return on_step


class Plain(torch.optim.Optimizer):
    """Momentum in bfloat16 beside a float32 parameter, a count in the group: what load_state_dict would not keep."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 1e-2, "count": 0, "pair": (0.5, 0.25)})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p, dtype=torch.bfloat16))
                momentum.mul_(group["pair"][0]).add_(p.grad, alpha=group["pair"][1])
                state["seen"] = state.get("seen", 0) + 1
                p.add_(momentum.float(), alpha=-group["lr"] * (1 + 1 / group["count"]) / state["seen"] ** 0.1)


RESUMED = {
    "released": {"recipe": "released", "batch_size": 3},
    "align": {"recipe": "align", "accumulate": 2, "batch_size": 2, "precision": "bfloat16"},
    "attention": {"recipe": "distill", "train": "attention", "hidden_weight": 0.3},
    "lora": {"recipe": "align", "train": "lora", "lora_rank": 3, "checkpointing": True},
    "own optimiser": {"optimizer": lambda model: [Plain(model.parameters())], "schedule": lambda step: 1 - step / 20},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(name, tmp_path):
    data = tokens(7, 12)
    options = {"steps": 11, "validation": tokens(3, 12, seed=9), "validate_every": 4, "progress": False} | RESUMED[name]
    whole, teacher = pair()
    expected = distill(whole, teacher, data, **options)
    for stop in (7, 9):  # killed twice, each time past a checkpoint
        student, _ = pair()
        with pytest.raises(Killed):
            distill(
                student, teacher, data, checkpoint=tmp_path / "run", checkpoint_every=3, on_step=stop_after(stop),
                **options,
            )  # fmt: skip
        assert all(p.requires_grad and p.grad is None for p in student.parameters())
    seen: list[int] = []
    student, _ = pair()
    report = distill(
        student, teacher, data, checkpoint=tmp_path / "run", checkpoint_every=3,
        on_step=lambda done, report: seen.append(done), **options,
    )  # fmt: skip
    assert seen == [10, 11]
    for (key, p), (other, q) in zip(student.named_parameters(), whole.named_parameters(), strict=True):
        assert key == other
        assert torch.equal(p, q), key
    told, wanted = report.to_dict(), expected.to_dict()
    assert told.pop("seconds") > 0
    assert wanted.pop("seconds") > 0
    assert told == wanted
    # The finished run is there too, and takes no step.
    again, _ = pair()
    last = distill(again, teacher, data, checkpoint=tmp_path / "run", on_step=stop_after(1), **options)
    assert last.losses == expected.losses
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), whole.parameters(), strict=True))
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == ["checkpoint.json", "training.safetensors"]


class Noisy(nn.Module):
    """Draws from the global generator, as dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)
        self.noise = nn.Dropout(0.5)

    def forward(self, input_ids, use_cache=False):
        return type("Output", (), {"logits": self.noise(self.table(input_ids))})()


def test_a_resumed_run_draws_the_same_random_numbers_and_skips_seen_batches(tmp_path):
    def batches():
        generator = torch.Generator().manual_seed(3)
        for _ in range(50):
            yield torch.randint(VOCABULARY, (2, 9), generator=generator)

    def noisy():
        torch.manual_seed(0)
        return Noisy()

    options = {"steps": 10, "lr": 0.1, "accumulate": 2, "progress": False}
    whole = noisy()
    expected = distill(whole, None, batches(), **options)
    after = torch.rand(3)
    with pytest.raises(Killed):
        distill(noisy(), None, batches(), checkpoint=tmp_path, checkpoint_every=4, on_step=stop_after(6), **options)
    student = noisy()
    torch.rand(100)
    report = distill(student, None, batches(), checkpoint=tmp_path, checkpoint_every=4, **options)
    assert report.losses == expected.losses
    assert torch.equal(student.table.weight, whole.table.weight)
    assert torch.equal(torch.rand(3), after)


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path):
    student, teacher = pair(layers=1)
    data = tokens(4, 8)
    options = {"recipe": "distill", "steps": 2, "progress": False, "checkpoint": tmp_path}
    first = copy.deepcopy(student)
    distill(first, teacher, data, **options)
    for change, named in [
        ({"steps": 3}, "steps"),
        ({"lr": 1e-2}, "lr, optimizers"),
        ({"kl_weight": 2.0, "seed": 1}, "kl_weight, seed"),
        ({"recipe": "released"}, "hidden_weight, kl_weight"),
        ({"train": "lora"}, "lora_rank, train"),
        ({"schedule": lambda step: 1.0}, "schedule"),
        ({"data": tokens(4, 8, seed=1)}, "data"),
        ({"data": list(data.split(2))}, "data"),
        ({"student": pair(layers=1, seed=1)[0]}, "student"),
        ({"teacher": small_model(1, seed=1)}, "teacher"),
    ]:
        arguments = {"student": copy.deepcopy(student), "teacher": teacher, "data": data, **options, **change}
        with pytest.raises(ValueError, match=f"holds a run that differs in .*{named}"):
            distill(**arguments)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no checkpoint"):
        distill(copy.deepcopy(student), teacher, data, **{**options, "checkpoint": other})
    for name in ("checkpoint_every", "validate_every"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1; got 0"):
            distill(student, teacher, data, **options, **{name: 0})


def test_a_checkpoint_refuses_what_it_cannot_hold(tmp_path):
    class Odd(Plain):
        def step(self, closure=None) -> None:
            super().step()
            for p in self.param_groups[0]["params"]:
                self.state[p]["friend"] = object()

    student, _ = pair(layers=1)
    with pytest.raises(TypeError, match="Odd keeps friend as object, and a checkpoint holds tensors"):
        distill(
            student, None, tokens(4, 8), steps=2, checkpoint=tmp_path, checkpoint_every=1, progress=False,
            optimizer=lambda model: [Odd(model.parameters())],
        )  # fmt: skip
    assert not (tmp_path / "training.safetensors").exists()


# --- numbers that are not finite -------------------------------------------------------------------------------------


def poison(module: nn.Module, after: int):
    def on_step(done, report):
        if done == after:
            with torch.no_grad():
                module.weight.view(-1)[0] = float("nan")

    return on_step


@pytest.mark.parametrize("recipe", ["released", "align"])
def test_a_loss_that_is_not_finite_names_the_first_module(recipe, tmp_path):
    student, teacher = pair(layers=3)
    start = parameters(student)
    options = {"recipe": recipe, "steps": 20, "checkpoint": tmp_path, "checkpoint_every": 2, "progress": False}
    where = (
        r"not finite at step 4; the first such number is in the output of model\.layers\.1\.self_attn\.k_proj; .*step 0"
    )
    with pytest.raises(FloatingPointError, match=where):
        distill(student, teacher, tokens(4, 8), on_step=poison(student.model.layers[1].self_attn.k_proj, 3), **options)
    assert all(torch.equal(p, start[name]) for name, p in student.named_parameters())
    assert not any(m._forward_hooks for m in student.modules())
    # the checkpoint is that of step 2, and the run goes on there
    seen: list[int] = []
    report = distill(student, teacher, tokens(4, 8), on_step=lambda done, r: seen.append(done), **options)
    assert seen[0] == 3
    assert report.steps == 20


def test_a_teacher_that_is_not_finite_is_named_as_such():
    student, teacher = pair()
    with torch.no_grad():
        teacher.model.norm.weight[3] = float("inf")
    with pytest.raises(FloatingPointError, match=r"at step 1; .* in the output of the teacher's model\.norm; "):
        distill(student, teacher, tokens(2, 8), recipe="distill", steps=1, progress=False)
    assert not any(m._forward_hooks for m in teacher.modules())


class Root(nn.Module):
    """Its gradient is infinite where its input is 0."""

    def forward(self, x):
        return (x - x.detach()).abs().sqrt()


class Rooted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 8)
        self.root = Root()
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, use_cache=False):
        return type("Output", (), {"logits": self.head(self.root(self.table(input_ids)))})()


def test_a_gradient_that_is_not_finite_names_the_first_module():
    student = Rooted()
    before = parameters(student)
    with pytest.raises(
        FloatingPointError, match=r"the gradient is not finite at step 1; .* in the gradient of the output of table; "
    ):
        distill(student, None, tokens(2, 8), steps=1, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())


def test_a_parameter_that_is_not_finite_does_not_reach_the_checkpoint(tmp_path):
    class Wild(Plain):
        def step(self, closure=None) -> None:
            super().step()
            if self.param_groups[0]["count"] == 3:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].fill_(float("inf"))

    student, _ = pair(layers=1)
    before = parameters(student)
    with pytest.raises(
        FloatingPointError, match=r"parameter model.embed_tokens.weight is not finite at step 3; the model"
    ):
        distill(
            student, None, tokens(4, 8), steps=5, checkpoint=tmp_path, checkpoint_every=3, progress=False,
            optimizer=lambda model: [Wild(model.parameters())],
        )  # fmt: skip
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert not (tmp_path / "training.safetensors").exists()


# --- tokenizers, curves, arguments -----------------------------------------------------------------------------------


class Tokenizer:
    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


def test_tokenizers_must_give_the_same_ids():
    student, teacher = pair(layers=1)
    data = tokens(2, 8)
    options = {"steps": 1, "progress": False}
    ours = Tokenizer("a", "b", "c", "d")
    distill(student, teacher, data, tokenizer=ours, teacher_tokenizer=Tokenizer("a", "b", "c", "d"), **options)
    for other, match in [
        (Tokenizer("a", "c", "b", "d"), r"differs is 1: 'b' in tokenizer, 'c' in teacher_tokenizer \(of 4 and 4"),
        (Tokenizer("a", "b", "c"), r"differs is 3: 'd' in tokenizer, none in teacher_tokenizer \(of 4 and 3"),
    ]:
        with pytest.raises(ValueError, match=match):
            distill(student, teacher, data, tokenizer=ours, teacher_tokenizer=other, **options)
    with pytest.raises(ValueError, match="give both; teacher_tokenizer is None"):
        distill(student, teacher, data, tokenizer=ours, **options)
    with pytest.raises(TypeError, match="tokenizer must have get_vocab"):
        distill(student, teacher, data, tokenizer="a b", teacher_tokenizer=ours, **options)


def test_curves_and_their_picture(tmp_path):
    student, teacher = pair(layers=1)
    data = tokens(4, 8)
    report = distill(
        student, teacher, data, recipe="align", steps=10, validation=data, validate_every=5, progress=False
    )
    curves = report.curves
    assert curves["loss"] == list(zip(range(1, 11), report.losses, strict=True))
    assert curves["gradient norm"][-1] == (10, report.gradient_norms[-1])
    assert [step for step, _ in curves["validation"]] == [0, 5, 10]
    assert report.stage_starts == [("attention", 0), ("hidden", 2), ("logits", 4), ("next-token", 9)]
    assert json.loads(json.dumps(report.to_dict()))["stages"] == report.stages
    report.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        freqrank.TrainingReport("released", {}).plot(tmp_path / "none.png")


def test_bad_arguments_are_refused_before_anything_changes():
    student, teacher = pair(layers=1)
    before = parameters(student)
    data = tokens(2, 8)
    for change, error, match in [
        ({"accumulate": 0}, ValueError, "accumulate must be an integer of at least 1; got 0"),
        ({"accumulate": 1.5}, ValueError, "accumulate must be an integer"),
        ({"precision": "float16"}, ValueError, "precision must be one of 'float32', 'bfloat16'; got 'float16'"),
        ({"recipe": "aligned"}, ValueError, "recipe must be .*'align'"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be a function; got str"),
        ({"schedule": 0.1}, TypeError, "schedule must be a function; got float"),
        ({"on_step": 3}, TypeError, "on_step must be a function; got int"),
        ({"validation": data.float()}, ValueError, "integer token ids"),
        ({"validation": data + 60}, ValueError, "validation must hold token ids from 0 to 60"),
        ({"validation": 3}, TypeError, "validation must be a LongTensor"),
        ({"teacher": "gpt"}, TypeError, "teacher must be a torch.nn.Module or None; got str"),
    ]:
        arguments = {"student": student, "teacher": teacher, "data": data, "steps": 1, "progress": False, **change}
        with pytest.raises(error, match=match):
            distill(**arguments)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())


def test_sharded_models_are_refused():
    FullyShardedDataParallel = type("FullyShardedDataParallel", (Bigram,), {})
    with pytest.raises(ValueError, match="FullyShardedDataParallel is spread over processes"):
        distill(FullyShardedDataParallel(), None, tokens(2, 8), steps=1)


def test_what_is_new_has_a_rate_of_its_own():
    from freqrank.attention.distillation import default_optimizer

    student, teacher = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3))
    groups = default_optimizer(student, lr=0.1, new_lr=0.5, teacher=teacher).param_groups
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert [rates[id(p)] for p in student.parameters()] == [(0.1, 0.1), (0.1, 0.0), (0.5, 0.1), (0.5, 0.0)]
    assert {group["lr"] for group in default_optimizer(student, lr=0.1, teacher=teacher).param_groups} == {0.1}
    with pytest.raises(ValueError, match="new_lr needs the teacher"):
        distill(student, None, torch.zeros(2, 4, dtype=torch.long), steps=1, new_lr=0.1)
    with pytest.raises(ValueError, match="new_lr must be a positive number; got 0"):
        distill(student, teacher, torch.zeros(2, 4, dtype=torch.long), steps=1, new_lr=0)
