"""Training in several processes, each with its own rows of a batch; one process is the simplest case of it.

accelerate sets the processes up and carries what goes between them, by its ``PartialState`` and its operations: another
``Accelerator`` would change the caller's own, with which it shares a count of accumulated batches. Models are not
wrapped, and gradients are summed once an optimiser step. So losses are divided by what all rows of all processes
hold, which a mean of means is not, gradients travel once however many batches are accumulated, and a stage may leave
parameters without any.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from freqrank.attention.training.batches import Batch

T = TypeVar("T")

_BUCKET = 1 << 24  # elements that are summed at once


@dataclass(frozen=True)
class Processes:
    """How many processes train together, which of them this is, and its device, if there are several.

    >>> Processes().sum({"loss": torch.ones(1)})
    {'loss': tensor([1.])}
    """

    count: int = 1
    index: int = 0
    device: torch.device | None = None

    @classmethod
    def find(cls) -> Processes:
        """Those of ``torchrun``, ``accelerate launch`` or a process group that is there already.

        Raises:
            ImportError: there are several, and accelerate is not installed.
            ValueError: accelerate is set up for something else than data-parallel training.
        """
        group = distributed.is_available() and distributed.is_initialized()
        count = distributed.get_world_size() if group else int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        from accelerate.state import PartialState

        if group:  # accelerate reads the environment alone
            rank = str(distributed.get_rank())
            places = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "RANK": rank, "LOCAL_RANK": rank}
            for name, value in places.items():
                os.environ.setdefault(name, value)
        # without effect where the caller has set accelerate up
        cpu = not torch.accelerator.is_available() or (group and distributed.get_backend() == "gloo")
        state = PartialState(cpu=cpu)
        kind = state.distributed_type.value
        if state.num_processes != count or kind not in _DATA_PARALLEL:
            raise ValueError(
                f"distill trains data-parallel, a whole model in each process; accelerate is set up as {kind} with "
                f"{state.num_processes} of {count} processes. Launch with torchrun, or configure accelerate for "
                "several GPUs or CPUs without sharding"
            )
        return cls(count, state.process_index, state.device)

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def place(self, *models: nn.Module | None) -> None:
        """Move models to this process's device, and give the first one the main process's values."""
        if self.device is None:
            return
        from accelerate.utils import broadcast

        for model in models:
            if model is not None:
                model.to(self.device)
        if models[0] is not None:
            with torch.no_grad():
                for tensor in (*models[0].parameters(), *models[0].buffers()):
                    broadcast(tensor)

    def share(self, micro_batches: list[Batch]) -> list[tuple[Batch, float]]:
        """What this process takes of a step's micro-batches, and what each counts.

        Whole micro-batches where they can be dealt out evenly, else rows of each. Where there are fewer rows than
        processes, one of them counts nothing in some: all have to take part in what follows.
        """
        if self.count == 1 or len(micro_batches) % self.count == 0:
            return [(batch, 1.0) for batch in micro_batches[self.index :: self.count]]
        found = []
        for batch in micro_batches:
            rows = torch.arange(len(batch["input_ids"])).tensor_split(self.count)[self.index]
            chosen = rows if len(rows) else torch.zeros(1, dtype=torch.long)
            found.append(({name: value[chosen] for name, value in batch.items()}, float(len(rows) > 0)))
        return found

    def turns(self, items: Iterable[T]) -> Iterator[T]:
        """This process's share of items that all processes go through."""
        for i, item in enumerate(items):
            if i % self.count == self.index:
                yield item

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums of vectors over all processes, the same on each."""
        if self.device is None:
            return dict(values)
        from accelerate.utils import reduce

        flat = reduce(torch.cat([value.double() for value in values.values()]), "sum")
        return dict(zip(values, flat.split([len(value) for value in values.values()]), strict=True))

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over all processes; the same parameters have one on each."""
        if self.device is None:
            return
        from accelerate.utils import reduce

        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            total = reduce(torch.cat([g.reshape(-1) for g in bucket]), "sum")
            for gradient, part in zip(bucket, total.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def stack(self, value: Tensor) -> Tensor:
        """The vector [n] of each process, [count, n], on the CPU."""
        if self.device is None:
            return value[None]
        from accelerate.utils import gather

        return gather(value[None].to(self.device)).cpu()

    def gather(self, value: T) -> list[T]:
        """A small object of each process, in their order."""
        if self.device is None:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def main_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives, called in the main process before the others; its errors are raised in all of them."""
        made: list[T] = []
        error: Exception | None = None
        if self.is_main:
            try:
                made.append(make())
            except Exception as caught:
                error = caught
        message = self.gather(None if error is None else str(error))[0]
        if error is not None:
            raise error
        if message is not None:
            raise ValueError(message)
        return made[0] if made else make()


#: Kinds of training, in accelerate's words, in which each process holds the whole model.
_DATA_PARALLEL = ("MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU")


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of gradients of one dtype, of some 2^24 elements each."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size >= _BUCKET or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket


def unwrapped(model: nn.Module | None) -> Any:
    """The model inside of what accelerate or DDP made of it.

    Raises:
        ValueError: one whose parameters are spread over processes.
    """
    while isinstance(model, DistributedDataParallel):
        model = model.module
    if isinstance(model, nn.Module):
        sharded = type(model).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine")
        if sharded or any(hasattr(p, "device_mesh") for p in model.parameters()):
            raise ValueError(
                f"{type(model).__name__} is spread over processes, and distill trains whole models; give it the model "
                "itself in each process"
            )
    return model
