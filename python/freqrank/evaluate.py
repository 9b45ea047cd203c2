"""Held-out loss of a causal language model, with every convention that changes the number as an explicit option."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from freqrank._progress import bar
from freqrank.ops._checks import check_option, check_tensor

REDUCTIONS = ("token", "window")
REMAINDERS = ("keep", "drop")

# Logits of one batch of windows stay below this many elements (256 MiB in fp32), or a batch is one window.
_LOGITS = 1 << 26


def _windows(tokens: int, window: int, stride: int, remainder: str) -> Iterator[tuple[int, int, int]]:
    """(start, stop, scored): ``scored`` last tokens of [start, stop) are predicted from what is before them."""
    scored_to = 1  # nothing is before the first token
    for start in range(0, tokens, stride):
        stop = min(start + window, tokens)
        if remainder == "drop" and stop - start < window:
            return
        first = max(scored_to, start + 1)
        if stop > first:
            yield start, stop, stop - first
        scored_to = stop
        if stop == tokens:
            return


def _vocabulary(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return getattr(config, "vocab_size", None)


def _check(
    model: nn.Module, input_ids: Tensor, window: int, stride: int | None, reduction: str, remainder: str
) -> tuple[Tensor, int]:
    check_tensor("input_ids", input_ids)
    if input_ids.dtype.is_floating_point or input_ids.dtype.is_complex or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must have an integer dtype; got {input_ids.dtype}")
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must be one text [T] or several [N, T]; got shape {tuple(input_ids.shape)}")
    for name, value in (("window", window), ("stride", window if stride is None else stride)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer; got {value!r}")
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens; got {window}")
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be between 1 and window = {window}; got {stride}")
    check_option("reduction", reduction, REDUCTIONS)
    check_option("remainder", remainder, REMAINDERS)
    tokens = input_ids.shape[-1]
    least = window if remainder == "drop" else 2
    if tokens < least or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids is too short: {tokens} tokens in a text, at least {least} are needed"
            + (f" with remainder='drop' and window={window}" if remainder == "drop" else "")
        )
    vocabulary = _vocabulary(model)
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ValueError(
            f"input_ids must be token ids from 0 to {'the vocabulary' if vocabulary is None else vocabulary - 1}; "
            f"got values from {low} to {high}"
        )
    return input_ids.reshape(-1, tokens).long(), stride


@torch.no_grad()
def loss(
    model: nn.Module,
    input_ids: Tensor,
    *,
    window: int = 2048,
    stride: int | None = None,
    reduction: str = "token",
    remainder: str = "keep",
    progress: bool = False,
) -> float:
    """Mean next-token loss in nats a token; :func:`perplexity` is its exponential, and says what the options mean.

    For a byte-level model nats a token are nats a byte.

    Args:
        progress: show a bar on standard error.

    Example:
        >>> uniform = torch.nn.Embedding.from_pretrained(torch.zeros(4, 4))  # every token equally likely
        >>> round(loss(uniform, torch.tensor([0, 1, 2, 3])), 4) == round(math.log(4), 4)
        True
    """
    ids, stride = _check(model, input_ids, window, stride, reduction, remainder)
    parameter = next(model.parameters(), None)
    # hooks of an offloaded model, whose parameters have no data, move what they are given
    device = ids.device if parameter is None or parameter.is_meta else parameter.device
    pieces = [(row, *piece) for row in ids for piece in _windows(row.numel(), window, stride, remainder)]
    batch = max(1, _LOGITS // (min(window, ids.shape[1]) * (_vocabulary(model) or 1 << 15)))

    was_training = model.training
    model.eval()
    total, count, means = 0.0, 0, 0.0
    groups = list(_batches(pieces, batch))
    try:
        with bar("evaluate", len(groups), progress) as advance:
            for group in groups:
                inputs = torch.stack([row[start:stop] for row, start, stop, _ in group]).to(device)
                for losses in _token_losses(model, inputs, group[0][3]):
                    total += losses.sum().item()
                    means += losses.mean().item()
                    count += losses.numel()
                advance("")
    finally:
        model.train(was_training)
    return total / count if reduction == "token" else means / len(pieces)


def perplexity(
    model: nn.Module,
    input_ids: Tensor,
    *,
    window: int = 2048,
    stride: int | None = None,
    reduction: str = "token",
    remainder: str = "keep",
    progress: bool = False,
) -> float:
    """Perplexity of a causal language model on a text: exp of the mean next-token loss, in fp32 from the logits.

    The text is read through windows of ``window`` tokens that start every ``stride`` tokens. A token is scored once, in
    the first window that holds it, from what stands before it in that window; the first token of a text is never
    scored. With ``stride=None`` windows do not overlap, and the first token of each window is not scored either, since
    nothing stands before it. With ``stride < window`` a window scores only the tokens that are new in it.

    Published numbers differ by these conventions: SVD-LLM reports ``reduction="token", remainder="drop"``, Basis
    Sharing ``reduction="window", remainder="keep"``, both with window 2048 and no overlap. A beginning-of-text token
    is context like any other: put it into ``input_ids`` where the model expects one.

    Args:
        model: called as ``model(input_ids)``; its result is the logits [N, T, vocabulary] or has them as ``.logits``.
        input_ids: integer ids, one text [T] or several [N, T] that do not see each other.
        window: tokens that the model sees at once, at least 2.
        stride: distance of two windows, from 1 to ``window``; None: ``window``.
        reduction: "token": mean over all scored tokens; "window": mean over windows of each window's mean, in which a
            shorter last window weighs as much as a full one.
        remainder: "keep" the last window, shorter than the others, or "drop" it.
        progress: show a bar on standard error.

    Returns:
        The perplexity; infinite where it passes the largest float, NaN where the model's logits are.

    Raises:
        TypeError: ``input_ids`` is not an integer tensor, or ``window`` or ``stride`` is no integer.
        ValueError: an option outside the above, a text shorter than 2 tokens (than a window, for "drop"), ids outside
            the vocabulary.

    Example:
        >>> uniform = torch.nn.Embedding.from_pretrained(torch.zeros(4, 4))  # every token equally likely
        >>> round(perplexity(uniform, torch.tensor([0, 1, 2, 3])), 4)
        4.0
    """
    nats = loss(
        model, input_ids, window=window, stride=stride, reduction=reduction, remainder=remainder, progress=progress
    )
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _batches(pieces: list[Any], size: int) -> Iterator[list[Any]]:
    """Runs of neighbours that have the same length and score the same number of tokens, at most ``size`` long."""
    run: list[Any] = []
    for piece in pieces:
        _, start, stop, scored = piece
        if run and (len(run) == size or (stop - start, scored) != (run[0][2] - run[0][1], run[0][3])):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _token_losses(model: nn.Module, inputs: Tensor, scored: int) -> Tensor:
    """Losses [N, scored] of the last ``scored`` tokens of each window."""
    transformers_model = hasattr(model, "generation_config")
    out = model(inputs, use_cache=False) if transformers_model else model(inputs)
    logits = getattr(out, "logits", out)[:, -scored - 1 : -1].float()
    targets = inputs[:, -scored:]
    # token by token: a mean here would round before the sum over windows
    return nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").double()
