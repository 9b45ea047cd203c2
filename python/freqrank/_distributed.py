"""What the ranks of a torch.distributed process group do together: agree, fail alike, add up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """A process group and this process's place in it; without one, a world of one rank.

    Methods but :meth:`has` and :meth:`share` are collective: all ranks call them, in the same order, or those that do
    wait. Tensors are on a device that the group serves.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def has(self, number: int) -> bool:
        """Whether an item of this number is in this rank's share."""
        return number % self.size == self.rank

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of what every rank has: every ``size``-th one.

        >>> Ranks(rank=1, size=3).share(range(8))
        [1, 4, 7]
        """
        return [item for number, item in enumerate(items) if self.has(number)]

    def agree(
        self, same: Mapping[str, Any], told: Sequence[int] = (), error: TypeError | ValueError | None = None
    ) -> list[list[int]]:
        """Raise on all ranks alike if one has an error, or what should be the same everywhere is not.

        Args:
            same: by names for the message; values whose ``repr`` is compared.
            told: integers that may differ, as many on each rank.
            error: what is wrong on this rank, if anything.

        Returns:
            ``told`` of every rank.

        Raises:
            TypeError, ValueError: the error of the first rank that has one; ranks that differ.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return [list(told)]
        # One gather of a few numbers; only if it shows something wrong do ranks tell one another what.
        digest = hashlib.sha256(repr(sorted(same.items())).encode()).digest()
        mine = [int(error is not None), int.from_bytes(digest[:7], "big"), *map(int, told)]
        rows = self.gather(torch.tensor(mine, dtype=torch.int64, device=self._device)).tolist()
        if any(row[0] for row in rows) or len({row[1] for row in rows}) > 1:
            self._raise_together(same, error)
        return [row[2:] for row in rows]

    def _raise_together(self, same: Mapping[str, Any], error: TypeError | ValueError | None) -> NoReturn:
        said: list[Any] = [None] * self.size
        kind = TypeError if isinstance(error, TypeError) else ValueError
        values = {name: repr(value) for name, value in same.items()}
        dist.all_gather_object(said, (None if error is None else (kind, str(error)), values), group=self.group)
        for rank, (failure, _) in enumerate(said):
            if failure is not None:
                raise failure[0](f"{failure[1]} (on rank {rank} of {self.size})") from error
        for name in dict.fromkeys(name for _, values in said for name in values):
            found = [values.get(name, "nothing") for _, values in said]
            other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
            if other is not None:
                raise ValueError(
                    f"{name} must be the same on all ranks of the group; got {found[0]} on rank 0 and {found[other]} "
                    f"on rank {other}"
                )
        raise AssertionError("ranks differ in nothing that they said")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A TypeError or ValueError that leaves this block on one rank is raised at its end on all ranks."""
        if self.size == 1:
            yield
            return
        error: TypeError | ValueError | None = None
        try:
            yield
        except (TypeError, ValueError) as wrong:
            error = wrong
        self.agree({}, error=error)

    def gather(self, x: Tensor) -> Tensor:
        """``x`` of every rank, of one shape and dtype: [size, \\*x.shape]. Not differentiable: see `gathered`."""
        found = x.new_empty((self.size, *x.shape))
        if self.size == 1:
            found[0] = x
        elif x.numel():
            dist.all_gather(list(found.unbind(0)), x.contiguous(), group=self.group)
        return found

    def sum_(self, x: Tensor) -> Tensor:
        """Add up ``x`` over all ranks, in place; every rank gets the same bits.

        >>> Ranks().sum_(torch.ones(2))
        tensor([1., 1.])
        """
        if self.size > 1 and x.numel():
            whole = x.contiguous()
            dist.all_reduce(whole, group=self.group)
            if whole is not x:
                x.copy_(whole)
        return x

    def totals(self, *numbers: float) -> list[float]:
        """Sums of numbers over all ranks, in float64.

        >>> Ranks().totals(1, 2.5)
        [1.0, 2.5]
        """
        return self.sum_(torch.tensor(numbers, dtype=torch.float64, device=self._device)).tolist()

    def take_first_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by what the first rank has in them."""
        if self.size > 1:
            source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
            for x in tensors:
                whole = x.detach().contiguous()
                dist.broadcast(whole, source, group=self.group)
                x.detach().copy_(whole)

    @property
    def _device(self) -> torch.device:
        """Where a few numbers are exchanged: on the CPU if the group serves it, so that no GPU waits."""
        if self.size == 1 or "cpu:" in dist.get_backend_config(self.group):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())


def initialized() -> bool:
    """Whether torch.distributed has a process group."""
    return dist.is_available() and dist.is_initialized()


def world() -> Ranks:
    """This process among all; a world of one where torch.distributed has no process group.

    >>> world().size
    1
    """
    return ranks() if initialized() else Ranks()


def ranks(group: dist.ProcessGroup | None = None) -> Ranks:
    """This process among those of ``group``, None: of all.

    Raises:
        ValueError: there is no process group, or this process is not in ``group``.

    >>> ranks()
    Traceback (most recent call last):
        ...
    ValueError: group must be a process group, or None for that of all ranks, which needs
    torch.distributed.init_process_group first; got None without one
    """
    if not initialized():
        raise ValueError(
            "group must be a process group, or None for that of all ranks, which needs "
            f"torch.distributed.init_process_group first; got {group!r} without one"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"group must hold this process; got one without global rank {dist.get_rank()}")
    return Ranks(group, rank, dist.get_world_size(group))


class _Gather(torch.autograd.Function):
    """x of every rank, in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, among: Ranks) -> Tensor:
        ctx.among = among
        return among.gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grads[0], ctx.among), None


class _Scatter(torch.autograd.Function):
    """Of the sum over ranks of xs [size, ..], the part of this one: what `_Gather` is the transpose of."""

    @staticmethod
    def forward(ctx: Any, xs: Tensor, among: Ranks) -> Tensor:
        ctx.among = among
        return among.sum_(xs.clone(memory_format=torch.contiguous_format))[among.rank]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grads[0], ctx.among), None


def gathered(x: Tensor, among: Ranks, differentiable: bool) -> Tensor:
    """:meth:`Ranks.gather`, whose backward pass, on every rank if ``differentiable``, sums gradients over the ranks.

    The gradient is that of the sum of what all ranks differentiate, so all must run backward.
    """
    if not differentiable:
        return among.gather(x.detach())
    # a rank where nothing asks for a gradient takes part in the others' backward passes
    return _Gather.apply(x if x.requires_grad else x.detach().requires_grad_(), among)
