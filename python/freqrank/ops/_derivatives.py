"""Derivatives of the native ops, for every way that torch has of asking for them.

:func:`torch.library.register_autograd` knows reverse mode alone: :mod:`torch.func` refuses its ops, and a tangent of
:mod:`torch.autograd.forward_ad` is lost without a word. What is registered here has both modes, in any nesting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction
from torch.library import Library

below_autograd = torch._C._AutoDispatchBelowAutograd
functorch_level = torch._C._functorch.maybe_current_level

_AFTER_AUTOGRAD = torch._C._after_autograd_keyset
_PLAIN = (Tensor, torch.nn.Parameter)
_unpack_dual = torch._VF._unpack_dual
_LIBRARY = Library("freqrank", "IMPL")


def register_derivatives(
    name: str,
    backward: Callable[..., tuple[Tensor | None, ...]],
    *,
    setup_context: Callable[..., None],
    jvp: Callable[..., Any] | None = None,
) -> None:
    """Gives ``torch.ops.freqrank.<name>`` its derivatives, with the methods of a :class:`torch.autograd.Function`.

    ``setup_context(ctx, inputs, output)``, ``backward(ctx, *grads)``, ``jvp(ctx, *tangents)``. All of them may use
    whatever is differentiable itself. Without ``jvp``, forward mode is an error.
    """
    op = getattr(torch.ops.freqrank, name).default

    def forward(*arguments_and_keyset: Any) -> Any:
        *arguments, keyset = arguments_and_keyset
        with torch.enable_grad(), _set_fwd_grad_enabled(True), below_autograd():  # enabled for outer transforms
            return op.redispatch(keyset & _AFTER_AUTOGRAD, *arguments)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, inputs[:-1], output)

    def reverse(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        ctx.needs_input_grad = needs[:-1]
        try:
            return *backward(ctx, *grads), None
        finally:
            ctx.needs_input_grad = needs

    def tangents(ctx: Any, *tangents: Tensor | None) -> Any:
        return refuse() if jvp is None else jvp(ctx, *tangents[:-1])

    def refuse() -> NoReturn:
        raise NotImplementedError(
            f"freqrank.{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
            "torch.autograd.forward_ad); use reverse mode: torch.func.vjp, jacrev, torch.autograd.grad"
        )

    # One level of torch.func's transforms; those outside it find the op again when forward() redispatches.
    function = type(
        name,
        (_SingleLevelFunction,),
        {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(setup),
            "backward": staticmethod(reverse),
            "jvp": staticmethod(tangents),
        },
    )

    def autograd(keyset: Any, *arguments: Any) -> Any:
        if _may_be_differentiated(arguments, forward_mode=jvp is not None):
            with enable_single_level_autograd_function():
                return function.apply(*arguments, keyset)  # type: ignore[attr-defined]
        with below_autograd():
            return op.redispatch(keyset & _AFTER_AUTOGRAD, *arguments)

    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


def carries_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of ``tensors`` has a tangent, which an op that writes in place would lose."""
    return forward_ad._current_level >= 0 and any(
        x is not None and x.is_floating_point() and _unpack_dual(x, level=0)[1] is not None for x in tensors
    )


def _may_be_differentiated(arguments: tuple[Any, ...], *, forward_mode: bool) -> bool:
    """Whether to go through autograd, which takes several times as long."""
    if forward_ad._current_level >= 0 or functorch_level() is not None:
        return True
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    # Where somebody is tracing, levels of forward mode may be in the graph, unknown to Python.
    if torch._C._len_torch_dispatch_stack() > 0 or any(x.__class__ not in _PLAIN for x in tensors):
        return True
    if torch.is_grad_enabled():
        if torch._C._any_requires_grad(*tensors):
            return True
    elif not forward_mode:
        return False  # what is looked for below could only be refused, and looking costs 2 us a tensor
    # So they may in a graph that torch.compile runs as it is (backend="eager"): look for the tangents themselves.
    with below_autograd():
        return any(_unpack_dual(x, level=0)[1] is not None for x in tensors if x.is_floating_point())
