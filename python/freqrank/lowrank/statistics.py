"""Calibration: the tokens a model is run on, and what is accumulated from the inputs of its linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from freqrank._distributed import Ranks
from freqrank.ops import gram_

# Sequences are run together as long as they hold at most this many tokens.
_TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class Batch:
    """Token ids [N, T] that run together, and which of them count: bool [N, T], or None for all."""

    input_ids: Tensor
    mask: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return self.input_ids.numel() if self.mask is None else int(self.mask.sum())

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the sequences."""
        return Batch(self.input_ids[start:stop], None if self.mask is None else self.mask[start:stop])


def read_calibration(calibration: object, vocab_size: int | None = None) -> list[Batch]:
    """The batches of a LongTensor [N, T], or of an iterable of such tensors or of dicts, which is consumed once.

    Args:
        calibration: the tokens; a dict has ``input_ids`` [N, T] and may have ``attention_mask`` [N, T], whose zeros
            mark padding, which enters no statistic.
        vocab_size: ids must be below it, if given.

    Raises:
        TypeError: anything else, or ids that are not int64.
        ValueError: wrong shapes, ids outside the vocabulary, no tokens at all.

    >>> [tuple(batch.input_ids.shape) for batch in read_calibration(torch.zeros(3, 5, dtype=torch.long))]
    [(3, 5)]
    """
    allowed = "a LongTensor [N, T], or an iterable of such tensors or of dicts with input_ids"
    if isinstance(calibration, (Tensor, Mapping)):
        items: Iterable[object] = [calibration]
    elif isinstance(calibration, (str, bytes)) or not isinstance(calibration, Iterable):
        raise TypeError(f"calibration must be {allowed}; got {type(calibration).__name__}")
    else:
        items = calibration
    batches: list[Batch] = []
    for number, item in enumerate(items):
        name = "calibration" if isinstance(calibration, Tensor) else f"calibration item {number}"
        batches.extend(_split(*_ids_and_mask(name, item, vocab_size, allowed)))
    if sum(batch.tokens for batch in batches) == 0:
        raise ValueError("calibration is empty: it must hold at least one token that is not padding")
    return batches


def _ids_and_mask(name: str, item: object, vocab_size: int | None, allowed: str) -> tuple[Tensor, Tensor | None]:
    mask: Any = None
    ids: Any = item
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise ValueError(f"{name} must have input_ids; got a dict with {', '.join(map(str, item)) or 'nothing'}")
        ids, mask = item["input_ids"], item.get("attention_mask")
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be {allowed}; got {type(ids).__name__}")
    if ids.dtype != torch.long:
        raise TypeError(f"{name} must have dtype int64; got {ids.dtype}")
    if ids.dim() != 2:
        raise ValueError(f"{name} must have shape [N, T]; got {tuple(ids.shape)}")
    ids = ids.detach().cpu()
    if ids.numel() and (int(ids.min()) < 0 or (vocab_size is not None and int(ids.max()) >= vocab_size)):
        raise ValueError(
            f"{name} must hold token ids from 0 to {'the vocabulary' if vocab_size is None else vocab_size - 1}; "
            f"got values from {int(ids.min())} to {int(ids.max())}"
        )
    if mask is None:
        return ids, None
    if not isinstance(mask, Tensor):
        raise TypeError(f"the attention_mask of {name} must be a tensor; got {type(mask).__name__}")
    if mask.shape != ids.shape:
        raise ValueError(
            f"the attention_mask of {name} must have the shape of input_ids, {tuple(ids.shape)}; "
            f"got {tuple(mask.shape)}"
        )
    mask = mask.detach().cpu()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"the attention_mask of {name} must hold zeros and ones only")
    mask = mask.bool()
    return ids, None if bool(mask.all()) else mask


def _split(ids: Tensor, mask: Tensor | None) -> Iterator[Batch]:
    if ids.numel() == 0:
        return
    rows = max(1, _TOKENS_PER_BATCH // ids.shape[1])
    for start in range(0, ids.shape[0], rows):
        yield Batch(ids, mask).rows(start, start + rows)


def first_tokens(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first sequences: as many as hold at most so many tokens, padding among them, but at least one.

    >>> batches = read_calibration([torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)])
    >>> [tuple(batch.input_ids.shape) for batch in first_tokens(batches, 23)]
    [(3, 5), (1, 7)]
    """
    taken: list[Batch] = []
    for batch in batches:
        rows = tokens // batch.input_ids.shape[1]
        if rows == 0 and taken:
            break
        taken.append(batch.rows(0, max(1, rows)))
        tokens -= taken[-1].input_ids.numel()
    return taken


@contextmanager
def observe(
    modules: Mapping[str, nn.Module], callback: Callable[[str, Tensor], object], mask: Tensor | None = None
) -> Iterator[None]:
    """Call ``callback(name, x)`` with the input x [tokens, features] of each named module whenever it runs.

    Args:
        mask: bool, one entry for each token: only where it is True are they passed on.

    >>> layer, seen = nn.Linear(2, 1), []
    >>> with observe({"layer": layer}, lambda name, x: seen.append((name, x.shape))):
    ...     _ = layer(torch.zeros(3, 4, 2))
    >>> seen
    [('layer', torch.Size([12, 2]))]
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def on_input(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])  # OPT's MLP reads tokens of all rows in one line
            # selecting, not weighting by zero: what padding computes may be NaN
            callback(name, x if mask is None else x[mask.to(x.device).flatten()])

        return on_input

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Sums:
    """Sums over tokens by name; each rank adds its own tokens."""

    def __init__(self) -> None:
        self.of: dict[str, Tensor] = {}

    def sum_over(self, ranks: Ranks) -> None:
        """Add up what the ranks have, which must be sums of the same names and shapes: now all have all."""
        for name in sorted(self.of):
            ranks.sum_(self.of[name])


class Grams(_Sums):
    """Gram matrices X^T X of several inputs, summed in float64 as the pieces come.

    >>> grams = Grams()
    >>> grams.add("q", torch.ones(3, 2))
    >>> grams.of["q"]
    tensor([[3., 3.],
            [3., 3.]], dtype=torch.float64)
    """

    def add(self, name: str, x: Tensor, y: Tensor | None = None) -> None:
        """Add X^T Y (Y = X if None) of ``x`` [tokens, n] and ``y`` [tokens, m] to the matrix of that name."""
        if name not in self.of:
            columns = x.shape[-1] if y is None else y.shape[-1]
            self.of[name] = torch.zeros(x.shape[-1], columns, dtype=torch.float64, device=x.device)
        gram_(self.of[name], x, y)

    def is_finite(self, name: str) -> bool:
        """Whether every input that was added was: a NaN or Inf in column j reaches entry (j, j)."""
        return bool(self.of[name].diagonal().isfinite().all())


class Magnitudes(_Sums):
    """sum_t |x_tj| of each channel j of several inputs, summed in float64 as the pieces come.

    >>> magnitudes = Magnitudes()
    >>> magnitudes.add("q", torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    >>> magnitudes.of["q"]
    tensor([4., 2.], dtype=torch.float64)
    """

    def add(self, name: str, x: Tensor) -> None:
        """Add the column sums of |``x``| [tokens, n] to the vector of that name."""
        sums = x.abs().sum(0, dtype=torch.float64)
        self.of[name] = self.of[name] + sums if name in self.of else sums
