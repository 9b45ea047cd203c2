"""Where a number that is not finite comes from: one more pass with hooks, on the way to an error message alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _finite(value: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in _tensors(value) if t.is_floating_point())


def first_output(models: dict[str, nn.Module], run: Callable[[], Any]) -> str | None:
    """Which module was the first to put out a number that is not finite while ``run`` ran, in words; None if none did.

    ``models`` go by what is put before their modules' names.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> _ = nn.init.constant_(net[2].bias, float("inf"))
    >>> first_output({"": net}, lambda: net(torch.ones(1, 2)))
    'the output of 2'
    """
    found: list[str] = []

    def look(name: str, args: Any, kwargs: Any, output: Any) -> None:
        if found or _finite(output):
            return
        # what a module was given may come from code of its parent's, between modules
        given = _finite(args) and _finite(kwargs)
        found.append(f"the output of {name}" if given else f"the input of {name}")

    with _hooked(models, look), torch.no_grad():
        run()
    return found[0] if found else None


def first_gradient(models: dict[str, nn.Module], run: Callable[[], Any]) -> str | None:
    """Which module was the first whose output got a gradient that is not finite; ``run`` goes forward and backward.

    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    >>> _ = nn.init.constant_(net[0].weight, 0.0)
    >>> first_gradient({"": net}, lambda: net(torch.ones(1, 1)).sqrt().backward())
    'the gradient of the output of 1'
    """
    found: list[str] = []

    def look(name: str, args: Any, kwargs: Any, output: Any) -> None:
        def arrived(gradient: Tensor) -> None:
            if not found and not _finite(gradient):
                found.append(f"the gradient of the output of {name}")

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(arrived)

    with _hooked(models, look):
        run()
    return found[0] if found else None


@contextmanager
def _hooked(models: dict[str, nn.Module], look: Callable[[str, Any, Any, Any], None]) -> Iterator[None]:
    with ExitStack() as stack:
        for prefix, model in models.items():
            for name, module in model.named_modules():
                if name:

                    def after(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = prefix + name) -> None:
                        look(name, args, kwargs, output)

                    stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield
