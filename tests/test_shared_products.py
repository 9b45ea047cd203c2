"""Linears that share a basis and read one tensor multiply by it once, and nobody can tell but by the time it takes."""

import contextlib
import copy
import gc
import threading
import weakref

import freqrank
import pytest
import torch
from freqrank.lowrank import modules
from freqrank.lowrank.modules import LowRankLinear, install_lowrank, share, share_products
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

RANK = 3  # no other matrix has so many rows


class Products(TorchDispatchMode):
    """Counts the products of a matrix with a basis: those that have RANK columns."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and result.shape[-1] == RANK:
            self.count += 1
        return result


def products(run) -> int:
    with Products() as mode:
        run()
    return mode.count


class Attention(nn.Module):
    """Three siblings, and something between their calls."""

    def __init__(self, between=lambda x: x, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (LowRankLinear(8, size, RANK, dtype=dtype) for size in (8, 4, 4))
        self.o = nn.Linear(16, 8, dtype=dtype)
        self.between = between
        share([self.q, self.k, self.v])

    def forward(self, x):
        q = self.q(x)
        x = self.between(x)
        return self.o(torch.cat([q, self.k(x), self.v(x)], -1).tanh())


def attention(between=lambda x: x, **options):
    model = Attention(between, **options)
    share_products(model)
    return model


def apart(model):
    """A copy in which every linear multiplies by the basis for itself."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        module._forward_hooks_always_called.clear()
        if isinstance(module, LowRankLinear):
            module.siblings = 1
    return twin


def x(*shape, dtype=torch.float64, **options):
    return torch.randn(*(shape or (5, 8)), generator=torch.Generator().manual_seed(1), dtype=dtype, **options)


def test_there_is_one_product_and_the_output_has_the_same_bits():
    model = attention()
    with torch.no_grad():
        assert products(lambda: model(x())) == 1
        assert products(lambda: apart(model)(x())) == 3
        assert torch.equal(model(x()), apart(model)(x()))
    outside = model.q
    assert products(lambda: (outside(x()), model.k(x()))) == 2  # not while their module runs


def test_there_is_one_product_in_the_graph_and_gradients_are_equal():
    model, found = attention(), []
    for each in (model, apart(model)):
        given = x(requires_grad=True)
        output = each(given)
        nodes, seen = [output.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [parent for parent, _ in node.next_functions]
        output.square().sum().backward()
        uses = sum("Accumulate" in type(node).__name__ and node.variable is each.q.basis for node in seen)
        matrix_products = sum(type(node).__name__ in ("MmBackward0", "AddmmBackward0") for node in seen)
        found.append((uses, matrix_products, given.grad, {name: p.grad for name, p in each.named_parameters()}))
    assert found[0][:2] == (1, 5)
    assert found[1][:2] == (1, 7)
    torch.testing.assert_close(found[0][2:], found[1][2:], rtol=1e-12, atol=1e-12)


def test_gradients_are_numerically_right():
    model = attention()
    assert torch.autograd.gradcheck(model, (x(2, 8, requires_grad=True),), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(model, (x(2, 8, requires_grad=True),))


def write(x):
    x.mul_(2)
    return x


def through_a_view(x):
    x[0].zero_()
    return x


BETWEEN = {
    "write": write,
    "write through a view": through_a_view,
    "another tensor": lambda x: x + 1,
    "an equal tensor": lambda x: x.clone(),
    "a view": lambda x: x[:],
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_another_input_is_multiplied_anew(between, mode):
    model = attention(BETWEEN[between])
    with mode():
        want = apart(model)(x())
        assert torch.equal(model(x()), want)


def test_a_basis_that_changes_is_multiplied_anew():
    def scale(x):
        with torch.no_grad():
            model.q.basis.mul_(2)
        return x

    def replace(x):
        model.k.basis = nn.Parameter(model.k.basis.detach() * 3)
        return x

    for change in (scale, replace):
        model = attention(change)
        twin = apart(model)
        with torch.no_grad():
            got = model(x())
            model, mine = twin, model
            assert torch.equal(got, twin(x()))
        del mine


def test_modes_that_change_between_the_calls():
    model = attention(lambda x: x.requires_grad_())
    given = x()
    model(given).sum().backward()
    want = x()
    apart(model)(want).sum().backward()
    torch.testing.assert_close(given.grad, want.grad, rtol=1e-12, atol=1e-12)

    for first, then in ((torch.no_grad, torch.enable_grad), (torch.enable_grad, torch.no_grad)):
        model = attention()
        model.forward = lambda x, m=model, a=first, b=then: _in(a, m.q, x).sum() + _in(b, m.k, x).sum()
        model(x()).backward()
        assert (model.q.weight.grad is None) == (first is torch.no_grad)
        assert (model.k.weight.grad is None) == (then is torch.no_grad)
        assert model.q.basis.grad is not None

    narrow = attention(dtype=torch.float32)
    given = x(dtype=torch.float32)
    q, k = narrow.q, narrow.k

    def half(x):
        with torch.autocast("cpu", torch.bfloat16):
            inside = q(x)
        return inside, k(x)

    narrow.forward = half
    with torch.no_grad():
        inside, outside = narrow(given)
        assert (inside.dtype, outside.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(outside, apart(narrow).k(given))


def _in(mode, layer, x):
    with mode():
        return layer(x)


def test_autocast_shares_too():
    model = attention(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        given = x(dtype=torch.float32)
        assert products(lambda: model(given)) == 1
        assert torch.equal(model(given), apart(model)(given))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_a_layer_or_of_one_linear(reentrant):
    def linear(model, name):
        layer = getattr(model, name)
        setattr(model, name, _Checkpointed(layer, reentrant))
        return model

    class _Checkpointed(nn.Module):
        def __init__(self, inner, reentrant):
            super().__init__()
            self.inner, self.reentrant = inner, reentrant

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)

    whole = _Checkpointed(attention(), reentrant)
    for model in (whole, linear(attention(), "q"), linear(attention(), "k")):
        given, want = x(requires_grad=True), x(requires_grad=True)
        assert products(lambda model=model, given=given: model(given).sum().backward()) >= 2
        twin = apart(model)
        twin.zero_grad()
        twin(want).sum().backward()
        torch.testing.assert_close(given.grad, want.grad, rtol=1e-12, atol=1e-12)
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_hooks_on_the_linears():
    model, seen = attention(), []
    model.k.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.v.register_forward_hook(lambda module, args, output: output + 1)
    model.q.register_full_backward_hook(lambda module, given, got: seen.append(given[0].shape))
    twin = copy.deepcopy(model)
    for layer in (twin.q, twin.k, twin.v):
        layer.siblings = 1
    got, want = (each(x().requires_grad_().clone()) for each in (model, twin))
    assert torch.equal(got, want)
    got.sum().backward()
    assert len(seen) == 1


def test_function_transforms():
    model = attention()
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x())
    twin = apart(model)
    for i in range(5):
        twin.zero_grad()
        twin(x()[i : i + 1]).square().sum().backward()
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(each[name][i], parameter.grad, rtol=1e-10, atol=1e-12)


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_nothing_outlives_the_forward(mode):
    made = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (RANK,) and func is torch.ops.aten.mm.default:
                made.append(weakref.ref(result))
            return result

    model = attention()
    with mode(), Watched():
        output = model(x())
    assert len(made) == 1
    del output
    assert made[0]() is None


def test_a_failed_forward_lets_go_of_its_graph():
    def fail(x):
        raise MemoryError

    model = attention(fail)
    before = tensors()
    given = x(requires_grad=True) * 2
    known = weakref.ref(given)
    with contextlib.suppress(MemoryError):
        model(given)
    del given
    assert tensors() == before
    assert known() is None


def test_a_sibling_that_does_not_run_keeps_nothing():
    model = attention()
    model.forward = lambda x: model.q(x).sum()
    before = tensors()
    model(x(requires_grad=True))
    assert tensors() == before


def test_memory_is_that_of_one_product_until_the_last_has_it():
    """The product is given back when the last sibling has taken it, not when the module ends."""
    held = []
    model = attention()

    def run(x):
        q, k = model.q(x), model.k(x)
        before = tensors()
        v = model.v(x)
        held.append(tensors() - before)
        return model.o(torch.cat([q, k, v], -1))

    model.forward = run
    with torch.no_grad():
        model(x())
    assert held == [0]  # one more for v, one fewer for the product


def test_threads_have_products_of_their_own():
    model, inputs = attention(), [x(64, 8) * i for i in range(1, 5)]
    with torch.no_grad():
        want = [apart(model)(each) for each in inputs]
    wrong = []

    def run(index):
        with torch.no_grad():
            for _ in range(200):
                if not torch.equal(model(inputs[index]), want[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_share_among_themselves_and_moves_end_it():
    model = copy.deepcopy(attention())
    with torch.no_grad():
        assert products(lambda: model(x())) == 1
        del model.k
        model.k = model.v
        share_products(model)
        assert model.q.siblings == 2
        for name in ("k", "v"):
            setattr(model, name, LowRankLinear(8, 4, RANK, dtype=torch.float64))
        share_products(model)
    assert [model.q.siblings, model.k.siblings, len(model._forward_hooks), len(model._forward_pre_hooks)] == [
        1,
        1,
        0,
        0,
    ]


# --- torch.compile ----------------------------------------------------------------------------------------------------


def _graphs(model, given):
    """Products with the basis in each graph that a compiler gets: forward and, if there is one, backward."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    counts = []

    def compiler(graph, inputs):
        counts.append(
            sum(
                node.target is torch.ops.aten.mm.default and node.meta["val"].shape[-1] == RANK
                for node in graph.graph.nodes
            )
        )
        return make_boxed_func(graph.forward)

    from torch._functorch.partitioners import min_cut_rematerialization_partition as partition

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, partition_fn=partition)
    return torch.compile(model, backend=backend, fullgraph=True)(given), counts


def test_compiled_for_training_there_is_one_product_and_no_graph_break():
    model = attention()
    output, counts = _graphs(model, x(requires_grad=True))
    assert torch.allclose(output, apart(model)(x()))
    assert counts[0] == 1


def test_compiled_for_inference_there_is_one_product_with_frozen_weights():
    """Without `freezing` torch's compiler looks for what is common in training graphs only."""
    from torch._inductor.utils import run_and_get_code

    model, given = attention(dtype=torch.float32), x(dtype=torch.float32)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, options={"freezing": True})
        output, [code] = run_and_get_code(compiled, given)
        torch.testing.assert_close(output, model(given))
        assert code.count("extern_kernels.mm(") == 1
        output, _ = _graphs(attention(write), x())
        torch.testing.assert_close(output, apart(attention(write))(x()))


# --- whole models -----------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")


def llama(share="modules", **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **options,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    if share is not None:
        ids = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(3))
        freqrank.compress(model, ids, method="lisc", ratio=0.4, share=share, progress=False)
    return model


IDS = torch.arange(24).view(2, 12)


class Bases(TorchDispatchMode):
    """Counts matrix products that have one of the bases as an operand."""

    def __init__(self, model):
        super().__init__()
        bases = {m.basis.data_ptr() for m in model.modules() if isinstance(m, LowRankLinear)}
        self.bases, self.count = bases, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.count += any(each.data_ptr() in self.bases for each in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("share", "count"), [("layers", 14), ("modules", 8), ("both", 8)])
def test_products_of_a_forward_pass(share, count):
    """7 linears in 2 layers; q, k, v make one product and gate, up another where modules share."""
    model = llama(share)
    with torch.no_grad(), Bases(model) as seen:
        got = model(IDS).logits
    assert seen.count == count
    with torch.no_grad():
        assert torch.equal(got, apart(model)(IDS).logits)


def test_generate_save_and_reload(tmp_path):
    model = llama()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = apart(model).generate(IDS[:, :6], **options)
    with Bases(model) as seen:
        assert torch.equal(model.generate(IDS[:, :6], **options), want)
    assert seen.count == 8 * 6
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with Bases(again) as seen:
        assert torch.equal(again.generate(IDS[:, :6], **options), want)
    assert seen.count == 8 * 6


def test_training_with_and_without_checkpointing():
    for how in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = llama().train()
        twin = apart(model)
        if how is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        for each in (model, twin):
            each(IDS, labels=IDS).loss.backward()
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_leave_no_product_behind(checkpointing):
    model = llama().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(IDS, labels=IDS).loss.backward()
    assert modules._running.product is None
    assert not modules._running.inside


def test_lora_shares_under_its_wrappers():
    peft = pytest.importorskip("peft")
    model = llama()
    twin = apart(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    other = peft.get_peft_model(twin, config)
    with torch.no_grad(), Bases(model) as seen:
        got = adapted(IDS).logits
    assert seen.count == 8
    with torch.no_grad():
        assert torch.equal(got, other(IDS).logits)
    for each in (adapted, other):
        each(IDS, labels=IDS).loss.backward()
    for mine, its in zip(adapted.parameters(), other.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-6)


def test_linearised_and_merged_models():
    model = llama()
    freqrank.linearize(model, position_table=32)
    with torch.no_grad(), Bases(model) as seen:
        got = model(IDS).logits
    assert seen.count == 8
    with torch.no_grad():
        assert torch.equal(got, apart(model)(IDS).logits)
    freqrank.merge(model)
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert not {hook.__module__ for hook in hooks} & {LowRankLinear.__module__}


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_bases(where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    with torch.no_grad():
        want = model(IDS).logits
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(IDS).logits, want)


def test_installed_models_share():
    model = llama(None)
    names = [f"model.layers.0.self_attn.{role}_proj" for role in "qkv"]
    new = install_lowrank(
        model, [{"modules": names, "rank": 5}, {"modules": ["model.layers.1.mlp.up_proj"], "rank": 4}]
    )
    assert [layer.siblings for layer in new.values()] == [3, 3, 3, 1]
