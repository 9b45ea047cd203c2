"""A linear layer whose weight is a product of two factors, the first of which several layers may share."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from freqrank.lowrank.rounding import from_int8, to_int8

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "STORAGES",
    "Int8LowRankLinear",
    "LowRankLinear",
    "install_lowrank",
    "is_linear",
    "linear_weight",
    "share",
    "share_products",
    "shared_groups",
]


@dataclass
class _Product:
    """``x basis^T`` of one layer, and all that has to be the same for another layer to take it."""

    input: Tensor
    basis: Tensor
    made: tuple[Any, ...]
    value: Tensor
    readers: int  # siblings that have not taken it


class _Running(threading.local):
    """Whether this thread is inside a module that has siblings among its linears, and the product they may share."""

    inside = False
    product: _Product | None = None


_running = _Running()


def _enter(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        _running.inside, _running.product = True, None


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        _running.inside, _running.product = False, None


def _state(input: Tensor, basis: Tensor) -> tuple[Any, ...]:
    """What decides about a product beside the two tensors: their values and what autograd and autocast do with them."""
    device = input.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    recorded = torch.is_grad_enabled() and (input.requires_grad, basis.requires_grad)
    # Activation checkpointing counts what is saved for backward between its beginning and its end.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True) if recorded else None
    return input._version, basis._version, recorded, autocast, hooks


class LowRankLinear(nn.Linear):
    """Linear layer ``y = (x basis^T) weight^T + bias`` of rank `rank`, with a basis that other layers may share.

    Parameters: ``basis`` [rank, in_features], the coefficient ``weight`` [out_features, rank] and ``bias``
    [out_features] or None. It is an `nn.Linear` with the usual attributes, so adapters, hooks and device maps treat it
    as one; only ``weight`` has `rank` columns (`dense_weight` gives the product). Layers that share a basis hold the
    same Parameter object (see `share`), so ``model.parameters()`` counts it once. Siblings, which share a basis inside
    one module, compute ``x basis^T`` once for the input that they have in common (see `share_products`).

    Raises ValueError if a size is not positive, or a given basis is not [rank, in_features]; TypeError if a given basis
    is not an `nn.Parameter`.

    The factorisation into a shared basis and coefficients: Basis Sharing (Wang et al., ICLR 2025, arXiv 2410.03765).

    >>> layer = LowRankLinear(6, 4, rank=2)
    >>> layer(torch.zeros(3, 6)).shape
    torch.Size([3, 4])
    >>> sum(p.numel() for p in layer.parameters())  # 2 * 6 + 4 * 2 + 4
    24
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        basis: nn.Parameter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        for name, size in (("in_features", in_features), ("out_features", out_features), ("rank", rank)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.siblings = 1
        if basis is not None and not isinstance(basis, nn.Parameter):
            raise TypeError(f"basis must be an nn.Parameter so that it can be shared, got {type(basis).__name__}")
        if basis is not None and tuple(basis.shape) != (rank, in_features):
            raise ValueError(f"basis must be [rank, in_features] = {[rank, in_features]}, got {list(basis.shape)}")
        self._allocate(basis, device, dtype)
        if basis is None:
            self._reset_basis()
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def _allocate(
        self, basis: nn.Parameter | None, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Factors without values, but for a basis that is given."""
        if basis is None:
            basis = nn.Parameter(torch.empty(self.rank, self.in_features, device=device, dtype=dtype))
        self.basis = basis
        self.weight = nn.Parameter(torch.empty(self.out_features, self.rank, device=device, dtype=dtype))

    def _reset_basis(self) -> None:
        nn.init.kaiming_uniform_(self.basis, a=5**0.5)

    def _reset_weight(self) -> None:
        nn.init.uniform_(self.weight, -(self.rank**-0.5), self.rank**-0.5)

    def reset_parameters(self) -> None:
        """Draw the coefficient and the bias as `nn.Linear` does; the basis, which may be shared, is left as it is."""
        self._reset_weight()
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.rank**-0.5), self.rank**-0.5)

    @property
    def dtype(self) -> torch.dtype:
        """What the factors stand for: the dtype of the dense weight that they replace."""
        return self.weight.dtype

    @classmethod
    def replacing(cls, linear: nn.Module, rank: int, basis: nn.Parameter | None = None) -> Self:
        """Layer of the sizes, device, dtype and mode of `linear`, with its bias and with uninitialised factors.

        `linear` is dense (see `linear_weight`); `basis` [rank, in_features] is shared if given.

        >>> layer = LowRankLinear.replacing(nn.Linear(6, 4), rank=2)
        >>> layer.basis.shape, layer.weight.shape, layer.bias.shape
        (torch.Size([2, 6]), torch.Size([4, 2]), torch.Size([4]))
        """
        dense = linear_weight(linear)
        out_features, in_features = dense.shape
        with torch.device("meta"):  # no memory and no random numbers for what is filled in later
            layer = cls(in_features, out_features, rank, bias=False, basis=basis)
        layer._allocate(basis, dense.device, dense.dtype)
        layer.bias = linear.bias  # type: ignore[assignment]
        return layer.train(linear.training)

    @classmethod
    def from_factors(cls, basis: Tensor, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Layer that holds `basis` [rank, in_features], `weight` [out_features, rank] and `bias` [out_features].

        An `nn.Parameter` is held as it is, which is how a basis is shared; a plain tensor becomes a Parameter over the
        same memory. Raises ValueError if the shapes do not fit.

        >>> layer = LowRankLinear.from_factors(torch.ones(1, 3), torch.ones(2, 1))
        >>> layer(torch.ones(3)).tolist()
        [3.0, 3.0]
        """
        if basis.ndim != 2 or weight.ndim != 2 or basis.shape[0] != weight.shape[1]:
            raise ValueError(
                "basis must be [rank, in_features] and weight [out_features, rank], "
                f"got {list(basis.shape)} and {list(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [out_features] = [{weight.shape[0]}], got {list(bias.shape)}")
        basis, weight = _as_parameter(basis), _as_parameter(weight)
        with torch.device("meta"):
            layer = cls(basis.shape[1], weight.shape[0], basis.shape[0], bias=False, basis=basis)
        layer.weight = weight
        if bias is not None:
            layer.bias = _as_parameter(bias)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self._product(input), self.weight, self.bias)

    def _product(self, input: Tensor) -> Tensor:
        """``x basis^T``, made once for siblings that read the same tensor."""
        # Inference tensors do not count the writes to them; a compiler finds what is common by itself, or not at all.
        if self.siblings == 1 or torch.compiler.is_compiling() or not _running.inside or input.is_inference():
            return self._multiply(input)
        state, known = _state(input, self.basis), _running.product
        if known is not None and known.input is input and known.basis is self.basis and known.made == state:
            known.readers -= 1
            if not known.readers:
                _running.product = None
            return known.value
        value = self._multiply(input)
        _running.product = _Product(input, self.basis, state, value, self.siblings - 1)
        return value

    def _multiply(self, input: Tensor) -> Tensor:
        return F.linear(input, self.basis)

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Basis [rank, in_features] and coefficient [out_features, rank] in `dtype`, as numbers."""
        return self.basis.to(dtype), self.weight.to(dtype)

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The product ``weight @ basis`` [out_features, in_features], computed in `dtype`; what `nn.Linear` would hold.

        >>> layer = LowRankLinear(6, 4, rank=2, bias=False).double()
        >>> x = torch.randn(5, 6, dtype=torch.float64)
        >>> torch.allclose(layer(x), x @ layer.dense_weight(torch.float64).T)
        True
        """
        basis, weight = self.factors(dtype)
        return weight @ basis

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class Int8LowRankLinear(LowRankLinear):
    """Low-rank linear whose factors are stored as 8-bit integers, a scale for each row: half or a quarter of the bytes.

    Frozen parameters: ``basis`` int8 [rank, in_features], which other layers may share, and ``weight`` int8
    [out_features, rank]. Buffers of the model's dtype: ``basis_scale`` [rank] and ``weight_scale`` [out_features], what
    128 stands for in each row (see `freqrank.lowrank.rounding`). The input is multiplied by integers and the product by
    scales, ``y = ((x basis^T) basis_scale / 128) weight^T weight_scale / 128 + bias``, in the input's dtype, or
    autocast's. Factors become numbers of that dtype for the time of one product and are not kept, for a backward pass
    neither. ``to``, ``half`` and the like change scales and bias alone.

    The input and the bias get gradients, integers do not: train adapters on top.

    Raises what `LowRankLinear` does; TypeError if a given basis is not int8.

    >>> layer = Int8LowRankLinear.from_factors(torch.tensor([[1.0, -0.5]]), torch.tensor([[2.0], [4.0]]))
    >>> layer.basis.tolist(), layer.weight.tolist(), layer(torch.tensor([1.0, 0.0])).tolist()
    ([[127, -64]], [[127], [127]], [2.0, 4.0])
    """

    basis_scale: Tensor
    weight_scale: Tensor

    def _allocate(
        self, basis: nn.Parameter | None, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        if basis is None:
            basis = _integers(torch.empty(self.rank, self.in_features, device=device, dtype=torch.int8))
        elif basis.dtype != torch.int8:
            raise TypeError(f"basis must be int8, got {basis.dtype}")
        self.basis = basis
        self.weight = _integers(torch.empty(self.out_features, self.rank, device=device, dtype=torch.int8))
        self.register_buffer("basis_scale", torch.ones(self.rank, device=device, dtype=dtype))
        self.register_buffer("weight_scale", torch.ones(self.out_features, device=device, dtype=dtype))

    @torch.no_grad()
    def _reset_basis(self) -> None:
        bound = self.in_features**-0.5
        draw = torch.empty_like(self.basis, dtype=torch.float32).uniform_(-bound, bound)
        _round_into(draw, self.basis, self.basis_scale)

    @torch.no_grad()
    def _reset_weight(self) -> None:
        draw = torch.empty_like(self.weight, dtype=torch.float32).uniform_(-(self.rank**-0.5), self.rank**-0.5)
        _round_into(draw, self.weight, self.weight_scale)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_scale.dtype

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls, basis: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Self:
        """Layer that holds `basis` [rank, in_features] and `weight` [out_features, rank] rounded to 8 bits.

        Both are floating-point tensors; scales get `dtype`, that of `basis` if None. Layers made from one basis hold
        the same integers, which `share` makes one tensor. Raises ValueError if the shapes do not fit.
        """
        exact = LowRankLinear.from_factors(basis, weight, bias)
        with torch.device("meta"):
            layer = cls(exact.in_features, exact.out_features, exact.rank, bias=False)
        layer._allocate(None, basis.device, dtype or basis.dtype)
        _round_into(basis, layer.basis, layer.basis_scale)
        _round_into(weight, layer.weight, layer.weight_scale)
        layer.bias = exact.bias
        return layer

    def _multiply(self, input: Tensor) -> Tensor:
        return _multiply_int8(input, self.basis)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self._product(input)
        output = _multiply_int8(hidden * self.basis_scale.to(hidden.dtype), self.weight)
        scale = self.weight_scale.to(output.dtype)
        # 128 twice, which in float16 both products have been divided by
        unit = 1.0 if output.dtype == torch.float16 else 128.0**-2
        if self.bias is None:
            return output * (scale * unit)
        return torch.addcmul(self.bias.to(output.dtype), output, scale, value=unit)

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        return from_int8(self.basis, self.basis_scale, dtype), from_int8(self.weight, self.weight_scale, dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, storage=int8"


def _integers(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _round_into(rows: Tensor, integers: Tensor, scale: Tensor) -> None:
    rounded, what_128_is = to_int8(rows, scale.dtype)
    integers.copy_(rounded)
    scale.copy_(what_128_is)


def _multiply_int8(input: Tensor, integers: Tensor) -> Tensor:
    """``input integers^T`` in the dtype of `input` or autocast; a 128th in float16, whose numbers end at 65504."""
    if torch.is_grad_enabled() and input.requires_grad:
        return _Int8Product.apply(input, integers)  # type: ignore[no-any-return]
    return _Int8Product.forward(input, integers)


def _widened(integers: Tensor, dtype: torch.dtype) -> Tensor:
    wide = integers.to(dtype)
    return wide.mul_(1 / 128) if dtype == torch.float16 else wide


class _Int8Product(torch.autograd.Function):
    """A product whose backward pass keeps the integers: left to itself, autograd would keep them as numbers."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, integers: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        return F.linear(input, _widened(integers, dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        [integers] = ctx.saved_tensors
        return (grad @ _widened(integers, grad.dtype)).to(ctx.dtype), None


#: What a group of factors may be stored as: the model's dtype, or 8-bit integers with scales.
STORAGES: dict[str | None, type[LowRankLinear]] = {None: LowRankLinear, "int8": Int8LowRankLinear}


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is what GPT-2 has for a linear in transformers, known by its attributes: nothing is imported."""
    size, weight = getattr(module, "nf", None), getattr(module, "weight", None)
    return isinstance(size, int) and isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == size


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer: an `nn.Linear`, low-rank or not, or transformers' `Conv1D`.

    >>> is_linear(nn.Linear(6, 4)), is_linear(LowRankLinear(6, 4, 2)), is_linear(nn.Embedding(6, 4))
    (True, True, False)
    """
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def linear_weight(linear: nn.Module) -> Tensor:
    """The weight [out_features, in_features] of a dense linear layer, in its own memory.

    transformers' `Conv1D` stores [in_features, out_features]: here alone it is transposed. Raises TypeError for a
    module that is no linear layer, or a low-rank one.

    >>> linear_weight(nn.Linear(6, 4)).shape
    torch.Size([4, 6])
    """
    if isinstance(linear, LowRankLinear) or not is_linear(linear):
        raise TypeError(f"linear must be a dense nn.Linear or Conv1D, got {type(linear).__name__}")
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.mT if _is_conv1d(linear) else weight


def share(modules: Iterable[LowRankLinear]) -> nn.Parameter:
    """Give every layer of `modules` the basis of the first one, and return that Parameter [rank, in_features].

    Raises ValueError if there is no layer, or ranks, input sizes or kinds of storage differ.

    >>> q, k = LowRankLinear(6, 4, 2), LowRankLinear(6, 3, 2)
    >>> share([q, k]) is k.basis
    True
    """
    layers = list(modules)
    if not layers:
        raise ValueError("modules must hold at least one LowRankLinear, got none")
    shapes = {(layer.rank, layer.in_features) for layer in layers}
    if len(shapes) > 1:
        raise ValueError(f"modules that share a basis need one (rank, in_features), got {sorted(shapes)}")
    kinds = {type(layer).__name__ for layer in layers}
    if len(kinds) > 1:
        raise ValueError(f"modules that share a basis need one kind of storage, got {sorted(kinds)}")
    for layer in layers[1:]:
        layer.basis = layers[0].basis
        if isinstance(layer, Int8LowRankLinear) and isinstance(layers[0], Int8LowRankLinear):
            layer.basis_scale = layers[0].basis_scale.clone()
    return layers[0].basis


def share_products(model: nn.Module) -> None:
    """Let low-rank linears that share a basis inside one module of `model` multiply an input by it once.

    q, k and v of an attention, gate and up of an MLP read one tensor. The first to run keeps the product for the
    others, at most while the module that holds them runs: forward hooks on that module open and close this. It is made
    again where the input is another tensor or was written to, where the basis was, where autograd or autocast do
    another thing, in another thread, and for tensors of `torch.inference_mode`, whose writes are not counted.
    `torch.compile` finds the one product by itself in a training step, for inference only with
    ``options={"freezing": True}``. `install_lowrank`, `compress`, `linearize` and `merge` call this; call it again
    after moving low-rank linears between modules.

    >>> model = nn.ModuleDict({"q": LowRankLinear(6, 4, 2), "k": LowRankLinear(6, 3, 2), "o": LowRankLinear(4, 6, 2)})
    >>> _ = share([model["q"], model["k"]])
    >>> share_products(model)
    >>> [layer.siblings for layer in model.values()]
    [2, 2, 1]
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    inside = {name: (name.rpartition(".")[0], id(layer.basis)) for name, layer in layers.items()}
    count = Counter(inside.values())
    for name, layer in layers.items():
        layer.siblings = count[inside[name]]
    parents = {parent for (parent, _), siblings in count.items() if siblings > 1}
    for name, module in model.named_modules():
        for hooks, hook in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
            for key in [key for key, present in hooks.items() if present is hook]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
        if name in parents:
            module.register_forward_pre_hook(_enter)
            module.register_forward_hook(_leave, always_call=True)


def shared_groups(model: nn.Module) -> list[list[str]]:
    """Names of the low-rank layers of `model`, one list for each basis, in the order of the model.

    >>> model = nn.Sequential(LowRankLinear(4, 4, 2), LowRankLinear(4, 4, 2), LowRankLinear(4, 4, 2))
    >>> _ = share([model[0], model[2]])
    >>> shared_groups(model)
    [['0', '2'], ['1']]
    """
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            groups.setdefault(id(module.basis), []).append(name)
    return list(groups.values())


def install_lowrank(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> dict[str, LowRankLinear]:
    """Replace linear layers of `model`, in place, by empty low-rank ones that share a basis within a group.

    `groups`: ``[{"modules": [name, ...], "rank": k}, ...]`` with names as `named_modules` gives them, and
    ``"storage": "int8"`` in those whose factors are stored so. Factors are uninitialised, on the device and of the
    dtype of the layer they replace (meta included); biases stay. Returns the new layers by name. The model is changed
    only after everything was checked: ValueError for a name that is missing, repeated or not a dense `nn.Linear` or
    `Conv1D`, for a rank out of range, an unknown storage, or input sizes that differ within a group.

    >>> model = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4))
    >>> new = install_lowrank(model, [{"modules": ["0", "1"], "rank": 2}])
    >>> model[0].basis is model[1].basis, sorted(new)
    (True, ['0', '1'])
    """
    known = dict(model.named_modules())
    seen: set[str] = set()
    for number, group in enumerate(groups):
        names, rank = group.get("modules"), group.get("rank")
        if not isinstance(names, Sequence) or isinstance(names, str) or not names:
            raise ValueError(f"group {number} must name its modules in a non-empty list, got {names!r}")
        for name in names:
            if name in seen:
                raise ValueError(f"group {number}: module {name!r} is named twice")
            seen.add(name)
            module = known.get(name)
            if module is None:
                raise ValueError(f"group {number}: the model has no module {name!r}")
            if not is_linear(module) or isinstance(module, LowRankLinear):
                expected = "a dense nn.Linear or Conv1D"
                raise ValueError(f"group {number}: {name!r} must be {expected}, got {type(module).__name__}")
        sizes = sorted({linear_weight(known[name]).shape[1] for name in names})
        if len(sizes) > 1:
            raise ValueError(f"group {number}: modules that share a basis need one input size, got {sizes}")
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= sizes[0]:
            raise ValueError(f"group {number}: rank must be an integer from 1 to {sizes[0]}, got {rank!r}")
        if group.get("storage") not in list(STORAGES):
            allowed = ", ".join(map(repr, STORAGES))
            raise ValueError(f"group {number}: storage must be one of {allowed}, got {group['storage']!r}")
    new: dict[str, LowRankLinear] = {}
    for group in groups:
        basis: nn.Parameter | None = None
        for name in group["modules"]:
            layer = STORAGES[group.get("storage")].replacing(known[name], group["rank"], basis)
            basis = layer.basis
            model.set_submodule(name, layer)
            new[name] = layer
    share_products(model)
    return new
