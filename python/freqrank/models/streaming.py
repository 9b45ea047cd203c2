"""Runs a decoder one block at a time over the calibration tokens, so that one block's activations are in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from freqrank.lowrank.statistics import Batch, observe
from freqrank.models.architectures import Architecture
from freqrank.models.offload import HiddenStates, resident, run_device


class _Enough(Exception):
    """Ends a forward pass of which no more is needed."""


class BlockStream:
    """The hidden states of every batch before one decoder block, and the step to the next.

    The model's own decoder is called for each step with every other block patched to hand its input on: so a block gets
    the masks, positions and whatever else its architecture gives it, and none of that is kept.
    """

    def __init__(self, architecture: Architecture, batches: Sequence[Batch]) -> None:
        self.architecture = architecture
        self.batches = batches
        self.layer = 0  # the block that comes next
        self._hidden = HiddenStates(len(batches), architecture.scratch)
        self._wraps = False  # whether blocks return a tuple or a list; known once the first has run

    def __len__(self) -> int:
        return len(self.batches)

    @contextmanager
    def runner(self, block: nn.Module | None = None) -> Iterator[Callable[..., Tensor]]:
        """``run(i, callback=None)``: batch i through the next block (or ``block`` in its place), giving its output.

        ``callback(role, x)`` gets the input x [tokens, features], padding left out, of each of the architecture's
        inputs, under the name of the first role that reads it.
        """
        real = self.architecture.blocks[self.layer]
        block = real if block is None else block
        roles = {group[0]: self.architecture.roles[group[0]] for group in self.architecture.inputs}
        observed = {role: block.get_submodule(path) for role, path in roles.items()}
        # accelerate puts a forward of its own on the instance: what was there comes back afterwards
        before = {module: module.__dict__.get("forward") for module in self.architecture.blocks}
        forward = block.forward
        place = run_device(self.architecture.decoder)

        def run(i: int, callback: Callable[[str, Tensor], object] | None = None) -> Tensor:
            batch, result = self.batches[i], []

            def step(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                stored = self._hidden[i]
                output = forward(hidden if stored is None else stored, *args, **kwargs)
                self._wraps = isinstance(output, (tuple, list))
                result.append(output[0] if self._wraps else output)
                return output

            real.forward = step
            mask = None if batch.mask is None else batch.mask.long().to(place)
            with observe(observed if callback is not None else {}, callback or (lambda *_: None), batch.mask):
                self.architecture.decoder(input_ids=batch.input_ids.to(place), attention_mask=mask, use_cache=False)
            return result[0]

        try:
            for module in self.architecture.blocks:
                module.forward = self._hand_on
            with resident(self.architecture.running(block)):
                yield run
        finally:
            for module, original in before.items():
                module.__dict__.pop("forward", None)
                if original is not None:
                    module.forward = original

    def advance(self, callback: Callable[[str, Tensor], object] | None = None, block: nn.Module | None = None) -> None:
        """Move every batch through the next block, or ``block`` in its place."""
        with self.runner(block) as run:
            for i in range(len(self)):
                self._hidden[i] = run(i, callback)
        self.layer += 1

    def step(self, i: int) -> dict[str, Tensor]:
        """Move batch i through the next block: the inputs of its linears, as ``callback`` of :meth:`runner` gets them.

        After the last batch the stream is at the block after that, as after :meth:`advance`.
        """
        seen: dict[str, Tensor] = {}
        with self.runner() as run:
            self._hidden[i] = run(i, seen.__setitem__)
        self.layer += i == len(self) - 1
        return seen

    def input(self, i: int, role: str, block: nn.Module | None = None) -> Tensor:
        """What batch i gives to one linear of the next block, or of ``block``, as :meth:`runner` hands it out.

        The stream does not move, and nothing is computed beyond that linear's input.
        """
        seen: list[Tensor] = []

        def stop(name: str, x: Tensor) -> None:
            if name == role:
                seen.append(x)
                raise _Enough

        with self.runner(block) as run, suppress(_Enough):
            run(i, stop)
        return seen[0]

    def fork(self) -> BlockStream:
        """Another stream at the same place: what runs on from here moves this one no further."""
        other = BlockStream(self.architecture, self.batches)
        other.layer, other._wraps = self.layer, self._wraps
        if self.layer:
            for i in range(len(self)):
                stored = self._hidden[i]
                assert stored is not None
                other._hidden[i] = stored
        return other

    def _hand_on(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden,) if self._wraps else hidden


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; each module's own mode comes back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
