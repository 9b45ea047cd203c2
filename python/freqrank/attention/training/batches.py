"""What models are trained on: batches of token ids, with padding or several documents in a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
Data = Tensor | Iterable[Tensor | Mapping[str, Tensor]]


def as_batch(item: Any) -> Batch:
    """Token ids [B, T], or a mapping with ``input_ids``, as a dict of what a model is called with.

    Raises:
        ValueError: no integer ids [B, T] with T >= 2; an ``attention_mask`` of another shape; ``position_ids`` of
            another shape than [B, T] or [1, T].

    >>> sorted(as_batch({"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": None}))
    ['input_ids']
    """
    batch = dict(item) if isinstance(item, Mapping) else {"input_ids": item}
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2 or ids.shape[1] < 2:
        what = f"a tensor {ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"data must give integer token ids [B, T] with T >= 2 (or dicts with them as input_ids); got {what}"
        )
    found = {"input_ids": ids}
    mask = batch.get("attention_mask")
    if mask is not None:
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}; got {tuple(mask.shape)}"
            )
        found["attention_mask"] = mask
    positions = batch.get("position_ids")
    if positions is not None:
        if positions.shape not in (ids.shape, (1, ids.shape[1])):
            raise ValueError(
                f"position_ids must have the shape of input_ids, {tuple(ids.shape)}, or one row; "
                f"got {tuple(positions.shape)}"
            )
        found["position_ids"] = positions.expand(ids.shape)
    return found


def batches(data: Data, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Endless batches: rows of a tensor in a new random order each epoch, or an iterable's items over and over."""
    if isinstance(data, Tensor):
        as_batch(data)
        while True:
            for rows in torch.randperm(len(data), generator=generator).split(batch_size):
                yield {"input_ids": data[rows]}
    seen = 0
    while True:
        start = seen
        for item in data:
            seen += 1
            yield as_batch(item)
        if seen == start:
            raise ValueError(
                f"data ran out after {seen} batches; give more, or an iterable that can be gone through again"
            )


def on(batch: Batch, device: torch.device) -> Batch:
    """The batch on another device."""
    return {name: value.to(device) for name, value in batch.items()}


def real_tokens(batch: Batch) -> Tensor | None:
    """Which tokens are not padding, bool [B, T]; None where all are."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()


def targets(batch: Batch) -> Tensor:
    """Which of the tokens 1 .. T - 1 are to be predicted from those before, bool [B, T - 1].

    Padding is not, nor is the first token of a document where ``position_ids`` start anew.

    >>> ids = torch.ones(1, 5, dtype=torch.long)
    >>> targets({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])})
    tensor([[ True,  True, False,  True]])
    """
    ids, real, positions = batch["input_ids"], real_tokens(batch), batch.get("position_ids")
    found = torch.ones_like(ids[:, 1:], dtype=torch.bool) if real is None else real[:, 1:]
    return found if positions is None else found & (positions.diff(dim=-1) == 1)
