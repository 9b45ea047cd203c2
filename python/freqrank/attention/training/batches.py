"""What models are trained on: batches of token ids, with padding or several documents in a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

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


@overload
def pack_documents(
    documents: Iterable[Tensor | Sequence[int]],
    length: int,
    *,
    separator: int | None = None,
    boundaries: Literal[False] = False,
) -> Tensor: ...
@overload
def pack_documents(
    documents: Iterable[Tensor | Sequence[int]],
    length: int,
    *,
    separator: int | None = None,
    boundaries: Literal[True],
) -> list[Batch]: ...
def pack_documents(
    documents: Iterable[Tensor | Sequence[int]],
    length: int,
    *,
    separator: int | None = None,
    boundaries: bool = False,
) -> Tensor | list[Batch]:
    """Put tokenised documents one behind the other and cut that into rows of ``length`` tokens.

    What is left at the end, less than a row, is dropped, as the released script of DiJiang does.

    Args:
        documents: token ids of each, integer [n] or a sequence of ints; empty ones are skipped.
        length: tokens in a row, at least 2.
        separator: a token put behind every document, the end of text, say.
        boundaries: keep documents apart. The result is then a list of batches of one row with ``position_ids`` that
            start at 0 with each document and each row. A model that knows packed rows (a linearised one does, and
            transformers' models) lets no token see another document, and no loss asks for a document's first token.

    Returns:
        LongTensor [N, length], or N dicts with ``input_ids`` and ``position_ids`` [1, length].

    Raises:
        TypeError, ValueError: ids or ``separator`` that are not integers, ``length`` below 2, too few tokens for a row.

    >>> pack_documents([[1, 2, 3], [4, 5]], 3, separator=9)
    tensor([[1, 2, 3],
            [9, 4, 5]])
    >>> [row["position_ids"].tolist() for row in pack_documents([[1, 2, 3], [4, 5]], 3, separator=9, boundaries=True)]
    [[[0, 1, 2]], [[0, 0, 1]]]
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ValueError(f"length must be an integer of at least 2; got {length!r}")
    if separator is not None and (isinstance(separator, bool) or not isinstance(separator, int)):
        raise TypeError(f"separator must be a token id or None; got {separator!r}")
    if isinstance(documents, (str, bytes, Tensor)) or not isinstance(documents, Iterable):
        raise TypeError(f"documents must be an iterable of token ids of each; got {type(documents).__name__}")
    end = torch.tensor([] if separator is None else [separator], dtype=torch.long)
    pieces = [torch.cat([ids, end]) for document in documents if len(ids := _token_ids(document))]
    total = sum(len(piece) for piece in pieces)
    if total < length:
        raise ValueError(f"documents must hold at least one row of {length} tokens; got {total} in all")
    kept = total // length * length
    rows = torch.cat(pieces)[:kept].view(-1, length)
    if not boundaries:
        return rows
    positions = torch.cat([torch.arange(len(piece)) for piece in pieces])[:kept].view(-1, length)
    positions = positions.minimum(torch.arange(length))  # what goes on from the row before starts anew as well
    return [
        {"input_ids": ids[None], "position_ids": position[None]} for ids, position in zip(rows, positions, strict=True)
    ]


def _token_ids(document: Any) -> Tensor:
    if isinstance(document, str):
        raise TypeError("documents must hold token ids; got a string: tokenize it first")
    try:
        ids = torch.as_tensor(document)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"documents must hold integer token ids [n]; got {type(document).__name__}") from None
    if ids.numel() and (ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype == torch.bool):
        raise TypeError(f"documents must hold integer token ids [n]; got a tensor {ids.dtype} {tuple(ids.shape)}")
    return ids.long().reshape(-1)
