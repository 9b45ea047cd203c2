"""Argument checks shared by the ops: what came, what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_value_checks = False


def set_checks(enabled: bool) -> None:
    """Check *values* in CUDA tensors too (positive ``log_decay``, bad ``cu_seqlens``): each check synchronises.

    CPU tensors are always checked in eager mode. Without the checks CUDA kernels stay memory-safe and write NaN to the
    sequence or head concerned.

    >>> set_checks(True); checks_enabled()
    True
    >>> set_checks(False)
    """
    global _value_checks
    _value_checks = bool(enabled)


def checks_enabled() -> bool:
    """Whether :func:`set_checks` is on."""
    return _value_checks


def check_values(tensor: Tensor) -> bool:
    """Whether to look at the values of ``tensor``: a CPU tensor in eager mode, or any under ``set_checks(True)``.

    Never inside :func:`torch.func.vmap`, which lets nobody see them.
    """
    if torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor) or tensor.is_meta:
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.device.type == "cpu" or _value_checks


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...] = FLOATS) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must have dtype {names}; got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}; got {tensor.device}")


def check_option(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
