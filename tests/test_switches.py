"""Switches beyond the published methods: each against a derivation of its own, and what `best` makes of them."""

import copy
import math

import freqrank
import pytest
import torch
from freqrank.lowrank import allocation as al
from freqrank.lowrank import factorize as fz
from freqrank.lowrank import outputs
from freqrank.lowrank.grouping import similar_groups, similarity, sketch
from freqrank.lowrank.modules import LowRankLinear, shared_groups
from freqrank.lowrank.statistics import Batch, observe

transformers = pytest.importorskip("transformers")

from freqrank.models import compression  # noqa: E402
from freqrank.models.architectures import find_architecture  # noqa: E402
from freqrank.models.whole import output_fisher  # noqa: E402
from test_compression import (  # noqa: E402
    LAYERS,
    VOCAB,
    assert_untouched,
    build,
    compressed,
    loss,
    snapshot,
    tokens,
    weights_of,
)

ROLES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
SHARED = ("q", "k", "v", "gate", "up")


def weight_of(model, layer, role):
    return model.model.layers[layer].get_submodule(ROLES[role]).weight.detach()


@torch.no_grad()
def inputs_of(model, ids, layer, role):
    seen = []
    with observe({"x": model.model.layers[layer].get_submodule(ROLES[role])}, lambda _, x: seen.append(x.double())):
        model(ids)
    return torch.cat(seen)


@torch.no_grad()
def error_aware(model, ids, keep, n):
    """argmin ||X W - X' B C|| linear by linear, X' from what is compressed so far: least squares, then whitened SVD."""
    new = copy.deepcopy(model)
    done = {}
    for layer in range(LAYERS):
        prefix = copy.deepcopy(new)  # this block and what follows are dense
        for role in ROLES:
            size = n if role in SHARED else 1
            first = layer // size * size
            if (first, role) not in done:
                group = range(first, min(first + size, LAYERS))
                targets, inputs = [], []
                for a in group:
                    x = inputs_of(new if a == layer else prefix, ids, a, role)
                    w = weight_of(model, a, role).T
                    targets.append(torch.linalg.lstsq(x, inputs_of(model, ids, a, role) @ w).solution)
                    inputs.append(x)
                d1, d2 = w.shape
                k = math.floor(keep * d1 * d2 * len(group) / (d1 + d2 * len(group)) + 1e-9)
                s = torch.linalg.qr(torch.cat(inputs)).R
                u, sigma, vt = torch.linalg.svd(s @ torch.cat(targets, 1), full_matrices=False)
                basis = torch.linalg.inv(s) @ u[:, :k] * sigma[:k]
                done[first, role] = [basis @ c for c in vt[:k].split(d2, 1)]
            weight_of(new, layer, role).copy_(done[first, role][layer - first].T)
    return new


@pytest.mark.parametrize(("method", "n"), [("svd-llm", 1), ("basis-sharing", 2), ("basis-sharing", 3)])
def test_error_aware_statistics_are_those_of_the_compressed_prefix(method, n, monkeypatch):
    model = build()
    monkeypatch.setattr(fz, "_REFIT_DAMPING", 0.0)
    ours, report = compressed(model, method=method, group_size=n, statistics="error-aware", ratio=0.5)
    expected = error_aware(model, tokens(), 0.5, n)
    for name, weight in weights_of(ours).items():
        theirs = expected.get_submodule(name).weight
        assert (weight - theirs).norm() < 1e-4 * theirs.norm(), name
    for group in report.groups:
        assert group.measured_error == pytest.approx(group.predicted_error, rel=1e-4)
    plain, _ = compressed(model, method=method, group_size=n, ratio=0.5)

    @torch.no_grad()
    def distance(m):
        return float((m(tokens()).logits - model(tokens()).logits).norm())

    assert distance(ours) < distance(plain)


def test_error_aware_statistics_of_a_whole_model_in_one_group_begin_as_the_original_ones():
    model = build()
    aware, _ = compressed(model, method="basis-sharing", group_size=LAYERS, statistics="error-aware", ratio=0.5)
    plain, _ = compressed(model, method="basis-sharing", group_size=LAYERS, ratio=0.5)
    # the first input is the same in both models, and blocks ahead are dense: q, k and v of all layers come out alike
    for role in ("q", "k", "v"):
        name = f"model.layers.3.{ROLES[role]}"
        torch.testing.assert_close(weights_of(aware)[name], weights_of(plain)[name], rtol=1e-6, atol=1e-8)
    name = "model.layers.3.mlp.down_proj"
    assert (weights_of(aware)[name] - weights_of(plain)[name]).norm() > 0.01 * weights_of(plain)[name].norm()


@pytest.mark.parametrize("grouping", ["adjacent", "similar"])
def test_a_group_of_several_blocks_that_stays_dense_among_error_aware_ones(grouping, monkeypatch):
    model = build()
    ranks = {}

    def dense_gates(kind, shapes, ratio, spectra, losses):
        return [ranks.get(shape, 3) for shape in shapes]

    monkeypatch.setattr(compression, "allocate", dense_gates)
    options = {"method": "basis-sharing", "statistics": "error-aware", "refit": "cross", "grouping": grouping}
    ranks[al.Shape(32, 2 * 56)] = None  # two blocks' gates, two blocks' ups
    ours, report = compressed(model, ratio=0.01, allocation="auto", **options)
    stayed = [group for group in report.groups if group.rank is None]
    assert len(stayed) == 4
    for group in stayed:
        assert group.measured_error == 0
        for layer in group.layers:
            assert torch.equal(ours.get_submodule(layer.module).weight, model.get_submodule(layer.module).weight)


def test_padding_enters_no_error_aware_statistic():
    model, ids = build(), tokens()
    padded = torch.cat([ids, torch.zeros(12, 5, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(12, 24), torch.zeros(12, 5)], 1)
    options = {"method": "best", "ratio": 0.5}
    one, _ = compressed(model, [{"input_ids": ids, "attention_mask": torch.ones(12, 24)}], **options)
    other, _ = compressed(model, [{"input_ids": padded, "attention_mask": mask}], **options)
    for name, weight in weights_of(one).items():
        torch.testing.assert_close(weights_of(other)[name], weight, rtol=1e-5, atol=1e-7)


# --- the Fisher information of outputs --------------------------------------------------------------------------------


def output_gradients(model, batch_ids, drawn):
    """Of all losses together by the outputs of each linear at each token: [tokens, out]."""
    new = copy.deepcopy(model)
    linears = {(i, role): new.model.layers[i].get_submodule(p) for i in range(2) for role, p in ROLES.items()}
    kept = {}
    for key, linear in linears.items():
        linear.register_forward_hook(lambda module, args, y, key=key: (y.retain_grad(), kept.__setitem__(key, y))[0])
    logits = new(batch_ids).logits.double()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="none")
    nll.sum().backward()
    return {key: y.grad.flatten(0, 1) for key, y in kept.items()}


def test_output_fisher_is_the_mean_outer_product_of_gradients():
    model, ids = build(num_hidden_layers=2), tokens(rows=4, length=10)
    linears = {f"{i}.{role}": model.model.layers[i].get_submodule(p) for i in range(2) for role, p in ROLES.items()}
    before = snapshot(model)
    found = output_fisher(model, linears, model.model.layers[0], [Batch(ids)], seed=3)
    assert_untouched(model, before)
    with torch.no_grad():
        p = model(ids).logits.float().softmax(-1).flatten(0, 1)
    drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(3))
    for (layer, role), g in output_gradients(model, ids, drawn).items():
        [block] = found[f"{layer}.{role}"]
        torch.testing.assert_close(block, g.T @ g / ids.numel(), rtol=1e-6, atol=1e-12)


def test_output_fisher_of_many_draws_is_that_of_all_next_tokens():
    """Of the last linear before the head no other token's loss depends: E[g g^T] = sum_y p(y) g_y g_y^T."""
    model, ids = build(num_hidden_layers=1, vocab_size=7), tokens(rows=4, length=6) % 7
    down = model.model.layers[0].mlp.down_proj
    [found] = output_fisher(model, {"down": down}, model.model.layers[0], [Batch(ids.repeat(400, 1))])["down"]
    expected = 0
    kept = []
    handle = down.register_forward_hook(lambda module, args, y: (y.retain_grad(), kept.append(y))[0])
    logits = model(ids).logits.flatten(0, 1)
    handle.remove()
    weights = logits.softmax(-1).detach()
    for y in range(7):
        nll = -logits.log_softmax(-1)[:, y].sum()
        [g] = torch.autograd.grad(nll, kept, retain_graph=True)
        g = g.flatten(0, 1)
        expected = expected + (g * weights[:, y : y + 1]).T @ g
    expected = expected / ids.numel()
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert float(found.trace()) == pytest.approx(float(expected.trace()), rel=0.05)


def test_output_fisher_counts_no_padding_and_blocks_are_the_diagonal_ones(monkeypatch):
    model, ids = build(num_hidden_layers=2), tokens(rows=3, length=8)
    up = {"up": model.model.layers[1].mlp.up_proj}
    [plain] = output_fisher(model, up, model.model.layers[0], [Batch(ids)])["up"]
    padded = torch.cat([ids, torch.full((3, 2), 5)], 1)
    mask = torch.cat([torch.ones(3, 8), torch.zeros(3, 2)], 1).bool()
    [masked] = output_fisher(model, up, model.model.layers[0], [Batch(padded, mask)])["up"]
    torch.testing.assert_close(masked, plain, rtol=1e-5, atol=1e-12)
    monkeypatch.setattr(outputs, "_BLOCK", 20)
    blocks = output_fisher(model, up, model.model.layers[0], [Batch(ids)])["up"]
    assert [len(block) for block in blocks] == [19, 19, 18]
    torch.testing.assert_close(torch.block_diag(*blocks)[:19, :19], plain[:19, :19])
    torch.testing.assert_close(blocks[2], plain[38:, 38:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_fisher_in_few_bits(dtype):
    model, ids = build(num_hidden_layers=2), tokens(rows=4, length=10)
    exact = copy.deepcopy(model).to(dtype).double()
    down = {"down": exact.model.layers[0].mlp.down_proj}
    [expected] = output_fisher(exact, down, exact.model.layers[0], [Batch(ids)])["down"]
    low = model.to(dtype)
    [found] = output_fisher(low, {"down": low.model.layers[0].mlp.down_proj}, low.model.layers[0], [Batch(ids)])["down"]
    assert found.dtype == torch.float64
    assert (found - expected).norm() < (0.5 if dtype == torch.bfloat16 else 1e-3) * expected.norm()


def test_output_fisher_needs_a_head_and_finite_gradients():
    model = build(num_hidden_layers=2)
    with pytest.raises(ValueError, match="has no language-model head"):
        freqrank.compress(model.model, tokens(), output_weight="fisher", ratio=0.4, progress=False)
    with torch.no_grad():
        model.lm_head.weight[3] = math.inf
    with pytest.raises(ValueError, match="logits have NaN or Inf on the calibration tokens"):
        freqrank.compress(model, tokens(), output_weight="fisher", ratio=0.4, progress=False)


def test_both_metrics_make_the_truncated_svd_of_both_roots():
    generator = torch.Generator().manual_seed(0)
    d1, d2, k = 20, 14, 5
    x = torch.randn(200, d1, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, d1, dtype=torch.float64)
    w = torch.randn(d1, d2, generator=generator, dtype=torch.float64)
    g = torch.randn(90, d2, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, d2, dtype=torch.float64)
    fisher = g.T @ g / 90
    root = outputs.OutputRoot([fisher])
    f = fz.factorize([root.weighted(w)], x.T @ x, k)
    ours = f.basis @ root.restored(f.coefficients[0])
    damped = fisher + outputs._DAMPING * fisher.diagonal().mean() * torch.eye(d2, dtype=torch.float64)
    s, t = torch.linalg.cholesky(x.T @ x).T, torch.linalg.cholesky(damped)
    u, sigma, vt = torch.linalg.svd(s @ w @ t)
    expected = torch.linalg.inv(s) @ (u[:, :k] * sigma[:k] @ vt[:k]) @ torch.linalg.inv(t)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)

    def cost(approximation):
        d = w - approximation
        return float((d.T @ x.T @ x @ d @ damped).trace())

    assert cost(ours) == pytest.approx(float(sigma[k:].square().sum()), rel=1e-8)
    plain = fz.factorize([w], x.T @ x, k)
    assert cost(ours) < cost(plain.basis @ plain.coefficients[0])


def test_the_estimate_of_the_loss_is_one():
    """For small changes the loss rises by tr(D^T G D F) / 2, K-FAC's approximation, within its rough truth."""
    model, ids = build(num_hidden_layers=2, vocab_size=24), tokens(rows=24, length=16) % 24
    up = model.model.layers[1].mlp.up_proj
    draws = [output_fisher(model, {"up": up}, model.model.layers[0], [Batch(ids)], seed=seed) for seed in range(20)]
    fisher = sum(draw["up"][0] for draw in draws) / 20
    x = inputs_of(model, ids, 1, "up")
    change = 0.05 * torch.randn(up.weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        p = model(ids).logits.softmax(-1)
        before = model(ids).logits.log_softmax(-1)
        up.weight.add_(change)
        after = model(ids).logits.log_softmax(-1)
    divergence = float((p * (before - after)).sum(-1).mean())
    estimate = float((change @ (x.T @ x / ids.numel()) @ change.T @ fisher).trace()) / 2
    assert divergence == pytest.approx(estimate, rel=0.5)


def test_output_weight_alone_lowers_the_divergence():
    model, ids = build(vocab_size=40), tokens(rows=16) % 40

    @torch.no_grad()
    def divergence(m):
        p, q = (x(ids).logits.log_softmax(-1) for x in (model, m))
        return float((p.exp() * (p - q)).sum(-1).mean())

    options = {"method": "svd-llm", "ratio": 0.3}
    plain, before = compressed(model, ids, **options)
    fisher, after = compressed(model, ids, output_weight="fisher", **options)
    both, report = compressed(model, ids, output_weight="fisher", allocation="loss", **options)
    assert divergence(fisher) < divergence(plain)
    assert divergence(both) < divergence(plain)
    assert before.parameters_after == after.parameters_after
    assert report.block_ratio >= 0.3
    assert "output weight fisher" in str(after)
    for group in after.groups:
        assert group.measured_error == pytest.approx(group.predicted_error, rel=1e-6)
    # what the plain method keeps best is the output as it is
    assert sum(a.error for a in before.layers) < sum(a.error for a in after.layers)
    assert any("Fisher information of outputs from backward passes" in note for note in report.notes)


def test_outputs_without_gradient_weigh_the_same_and_the_report_says_so():
    model = build(num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()  # nothing before it, in its block's MLP, matters
    plain, _ = compressed(model, method="svd-llm")
    ours, report = compressed(model, method="svd-llm", output_weight="fisher")
    name = "model.layers.1.mlp.up_proj"
    torch.testing.assert_close(weights_of(ours)[name], weights_of(plain)[name], rtol=1e-8, atol=1e-10)
    [note] = [note for note in report.notes if "no gradient arrived" in note]
    assert "layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj" in note


# --- ranks where they lower the loss most -----------------------------------------------------------------------------


def test_ranks_by_loss_are_the_best_ones():
    """Of all ranks within the budget and above the floor none has a lower predicted loss, but for one direction's."""
    shapes = [al.Shape(8, 8), al.Shape(8, 24), al.Shape(16, 8)]
    generator = torch.Generator().manual_seed(0)
    for ratio in (0.3, 0.5):
        spectra = [
            torch.rand(min(s.inputs, s.outputs), generator=generator, dtype=torch.float64).sort(descending=True)[0]
            * 10.0 ** float(torch.rand((), generator=generator) * 2)
            for s in shapes
        ]
        budget = math.floor((1 - ratio) * sum(s.dense for s in shapes))
        least = [max(1, al.uniform_rank(s, ratio) // 4) for s in shapes]

        def cost(ranks, spectra=spectra):
            return sum(float(sp[k:].sum()) for sp, k in zip(spectra, ranks, strict=True) if k is not None)

        choices = [[*range(low, s.break_even), None] for s, low in zip(shapes, least, strict=True)]
        best = min(
            cost((a, b, c))
            for a in choices[0] for b in choices[1] for c in choices[2]
            if sum(s.dense if k is None else k * s.per_rank for s, k in zip(shapes, (a, b, c), strict=True)) <= budget
        )  # fmt: skip
        ranks = al.allocate("loss", shapes, ratio, spectra)
        assert best - 1e-12 <= cost(ranks) <= best + max(float(sp.max()) for sp in spectra)


def test_the_ranks_by_loss_do_not_ask_how_a_method_decomposes():
    model = build(num_hidden_layers=3)
    options = {"allocation": "loss", "ratio": 0.5}
    reports = [compressed(model, method=method, **options)[1] for method in ("svd", "svd-llm", "asvd")]
    ranks = [[group.rank for group in report.groups] for report in reports]
    assert ranks[0] == ranks[1] == ranks[2]
    assert len(set(ranks[0])) > 2
    assert all(report.block_ratio >= 0.5 for report in reports)


# --- groups of similar layers -----------------------------------------------------------------------------------------


def test_similarity_is_that_of_the_products():
    generator = torch.Generator().manual_seed(0)
    moments = [torch.randn(12, 9, generator=generator, dtype=torch.float64) for _ in range(3)]
    moments.append(moments[1] @ torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64)).Q * 5)
    k = [m @ m.T for m in moments]
    expected = torch.tensor([[float((a * b).sum() / (a.norm() * b.norm())) for b in k] for a in k])
    found = similarity(moments)
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-6)
    assert float(found[1, 3]) == pytest.approx(1)
    wide = [torch.randn(6, 4000, generator=generator, dtype=torch.float64) * (i + 1) for i in range(2)]
    assert sketch(wide[0]).shape == (6, 256)
    assert float(similarity([sketch(w) for w in wide])[0, 1]) == pytest.approx(float(similarity(wide)[0, 1]), abs=0.1)
    assert float(similarity([torch.zeros(2, 2), torch.ones(2, 2)])[0, 1]) == 0


def test_groups_are_of_the_size_that_was_asked_for():
    like = torch.eye(7, dtype=torch.float64)
    for a, b in ((0, 5), (1, 6), (2, 3)):
        like[a, b] = like[b, a] = 0.9
    assert similar_groups(like, 2) == [[0, 5], [1, 6], [2, 3], [4]]
    assert similar_groups(like, 7) == [[0, 1, 2, 3, 4, 5, 6]]
    assert [len(group) for group in similar_groups(like, 3)] == [3, 3, 1]


@pytest.mark.parametrize("options", [{}, {"share": "both"}, {"refit": "cross"}, {"statistics": "error-aware"}], ids=str)
def test_layers_that_do_alike_are_grouped(options):
    model = build(num_hidden_layers=4)
    with torch.no_grad():  # blocks 0 and 2 are one, 1 and 3 another, up to some noise
        for layer, other in ((2, 0), (3, 1)):
            for role in ROLES:
                weight_of(model, layer, role).copy_(weight_of(model, other, role))
                weight_of(model, layer, role).add_(0.01 * torch.randn(weight_of(model, layer, role).shape).double())
            for norm in ("input_layernorm", "post_attention_layernorm"):
                model.model.layers[layer].get_submodule(norm).weight.copy_(
                    model.model.layers[other].get_submodule(norm).weight
                )
    common = {"method": "basis-sharing", "ratio": 0.5, **options}
    similar, report = compressed(model, grouping="similar", **common)
    adjacent, _ = compressed(model, **common)
    layers = {tuple(sorted({x.layer for x in group.layers})) for group in report.groups if len(group.layers) > 1}
    assert layers == {(0, 2), (1, 3)}
    assert loss(similar, tokens()) != loss(adjacent, tokens())
    up = [f"model.layers.{layer}.mlp.up_proj" for layer in range(4)]

    def error(m):
        return sum((weights_of(m)[n] - model.get_submodule(n).weight).norm().item() for n in up)

    assert error(similar) < error(adjacent)
    basis = {tuple(sorted(group)) for group in shared_groups(similar)}
    assert any({up[0], up[2]} <= set(group) for group in basis)


def test_similar_layers_of_a_method_that_shares_nothing_are_a_warning():
    with pytest.warns(UserWarning, match="no layers share a basis here"):
        compressed(build(), method="svd-llm", grouping="similar")


# --- best -------------------------------------------------------------------------------------------------------------


def test_best_is_its_switches():
    model = build()
    ours, report = compressed(model, method="best", ratio=0.5)
    switches = {
        "share": "modules", "statistics": "error-aware", "output_weight": "fisher", "allocation": "loss",
        "refit": "cross",
    }  # fmt: skip
    assert switches.items() <= report.settings.items()
    other, _ = compressed(model, method="basis-sharing", ratio=0.5, **switches)
    for name, weight in weights_of(ours).items():
        assert torch.equal(weight, weights_of(other)[name])
    assert report.block_ratio >= 0.5
    plain, _ = compressed(model, method="basis-sharing", ratio=0.5)

    @torch.no_grad()
    def divergence(m):
        p, q = (x(tokens()).logits.log_softmax(-1) for x in (model, m))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence(ours) < 0.8 * divergence(plain)
    again, _ = compressed(model, method="best", ratio=0.5)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best", "refit": "own"}, "method 'best' sets refit='cross' itself; got 'own'"),
        ({"method": "best", "allocation": "auto"}, "method 'best' sets allocation='loss' itself"),
        ({"method": "best", "share": "both"}, "method 'best' sets share='modules' itself"),
        ({"refit": "own", "statistics": "error-aware"}, "use refit='cross', or None"),
        ({"statistics": "new"}, "statistics must be one of 'original', 'error-aware'"),
        ({"output_weight": "norm"}, "output_weight must be one of None, 'fisher'"),
        ({"grouping": "random"}, "grouping must be one of 'adjacent', 'similar'"),
    ],
    ids=str,
)
def test_wrong_switches(options, message):
    model = build(num_hidden_layers=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        freqrank.compress(model, tokens(), **{"ratio": 0.4, "progress": False, **options})
    assert_untouched(model, before)


@pytest.mark.parametrize("family", ["Qwen2", "GPTNeoX", "GPT2", "OPT", "Phi3"])
def test_best_of_every_kind_of_block(family):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    if family == "GPT2":
        config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    elif family == "OPT":
        config = transformers.OPTConfig(hidden_size=32, ffn_dim=56, word_embed_proj_dim=32, **sizes)
    else:
        more = {} if family == "GPTNeoX" else {"num_key_value_heads": 2}
        more |= {"pad_token_id": 0} if family == "Phi3" else {}
        config = getattr(transformers, f"{family}Config")(hidden_size=32, intermediate_size=56, **sizes, **more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert find_architecture(model)
    small, report = compressed(model, method="best", ratio=0.3)
    assert report.block_ratio >= 0.3
    assert small(tokens()).logits.isfinite().all()
    assert any(isinstance(module, LowRankLinear) for module in small.modules())
