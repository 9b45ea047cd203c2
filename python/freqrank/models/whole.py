"""What takes the whole model at once: its next-token loss on calibration tokens, and the gradients of that.

Where several ranks of torch.distributed are given, each has the same batches, runs its share of them, and gets what one
process would get of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freqrank._distributed import Ranks
from freqrank.lowrank.modules import linear_weight
from freqrank.lowrank.outputs import output_blocks
from freqrank.lowrank.statistics import Batch
from freqrank.ops import gram_

# Logits of sequences that run together stay below this many elements (256 MiB in fp32), or one runs alone.
_LOGITS = 1 << 26
# The same where a graph is kept, so that activations of all layers are held besides.
_GRADIENT_LOGITS = 1 << 21

_ALONE = Ranks()


def next_token_loss(model: nn.Module, batches: Sequence[Batch], among: Ranks = _ALONE) -> float:
    """Mean next-token loss in nats over all tokens that count and come after one that does.

    Args:
        model: a causal language model of `transformers`, in evaluation mode.
        among: the ranks that share the batches.

    Raises:
        ValueError: the model has no language-model head, or no token comes after another one.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16,
        ...                                      num_hidden_layers=1, num_attention_heads=1))
        >>> _ = model.lm_head.weight.data.zero_()  # every token equally likely
        >>> round(next_token_loss(model, [Batch(torch.tensor([[1, 2, 3]]))]) - torch.tensor(8.0).log().item(), 6)
        0.0
    """
    total = count = 0.0
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 1 << 15)
    with among.together(), torch.no_grad():
        for batch in among.share(batches):
            rows = max(1, _LOGITS // (batch.input_ids.shape[1] * vocabulary))
            for start in range(0, batch.input_ids.shape[0], rows):
                losses = _losses(model, batch.rows(start, start + rows))
                total += float(losses.sum(dtype=torch.float64))
                count += losses.numel()
    total, count = among.totals(total, count)
    if count == 0:
        raise ValueError("calibration must hold sequences of two tokens or more, of which the second is predicted")
    return total / count


def squared_gradients(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    advance: Callable[[str], None] = lambda what: None,
    among: Ranks = _ALONE,
) -> dict[str, Tensor]:
    """sum_n sum_o (d L_n / d W[o, j])^2 for each input channel j of each linear: the empirical Fisher, row-summed.

    L_n is the negative log-likelihood of sequence n, the sum of its next-token losses: a sequence is one sample, as a
    text is in FWSVD (Hsu et al., ICLR 2022, arXiv 2207.00112). A token as a sample has the same expectation under the
    model's own distribution, but would take a backward pass a token. Squares are summed in float64.

    One backward pass a sequence, through the whole model at once. Beside the weights it takes what
    :func:`backward_bytes` says. Gradients are squared as they come, one weight's at a time. The model's own parameters
    take no part: neither their gradients nor ``requires_grad`` nor hooks on them. Padding before and after a sequence
    is cut off.

    Args:
        model: a causal language model of `transformers`, in evaluation mode, of any floating dtype.
        linears: by a name for messages.
        advance: called after each batch.
        among: the ranks that share the batches.

    Returns:
        [in_features] of each linear, float64, on its device; zeros where no gradient arrives.

    Raises:
        ValueError: no language-model head, no sequence of two tokens, NaN or Inf in a gradient (its linear is named).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16,
        ...                                      num_hidden_layers=1, num_attention_heads=1))
        >>> up = model.model.layers[0].mlp.up_proj
        >>> squared_gradients(model, {"up": up}, [Batch(torch.tensor([[1, 2, 3]]))])["up"].shape, up.weight.grad
        (torch.Size([16]), None)
    """
    parameters = {name: linear.get_parameter("weight") for name, linear in linears.items()}
    sums: dict[nn.Parameter, Tensor] = {}
    outputs: dict[nn.Parameter, int] = {}  # the dimension of a stored weight that runs over outputs
    for name, linear in linears.items():
        weight = linear_weight(linear)
        sums[parameters[name]] = weight.new_zeros(weight.shape[1], dtype=torch.float64)
        outputs[parameters[name]] = 0 if weight is parameters[name] else 1
    # Leaves of our own in the parameters' place, so that nothing is left behind in the model.
    leaves = {name: parameter.detach() for name, parameter in model.named_parameters()}
    followed = []
    for name, parameter in model.named_parameters():
        if parameter in sums:
            leaves[name].requires_grad_().register_post_accumulate_grad_hook(_take(sums[parameter], outputs[parameter]))
            followed.append(leaves[name])
    seen = 0
    with among.together():
        for batch in among.share(batches):
            for sequence in _sequences(batch):
                with torch.enable_grad():
                    losses = _losses(model, sequence, leaves)
                    if losses.numel() and losses.requires_grad:
                        losses.sum().backward(inputs=followed)
                seen += losses.numel()
            advance("gradients")
    if among.totals(seen) == [0]:
        raise ValueError("calibration must hold sequences of two tokens or more, of which the second is predicted")
    for name, parameter in parameters.items():
        among.sum_(sums[parameter])
        if not bool(sums[parameter].isfinite().all()):
            raise ValueError(f"the gradient of {name} has NaN or Inf on the calibration tokens")
    return {name: sums[parameter] for name, parameter in parameters.items()}


def output_fisher(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    first_block: nn.Module,
    batches: Sequence[Batch],
    seed: int = 0,
    advance: Callable[[str], None] = lambda what: None,
    among: Ranks = _ALONE,
) -> dict[str, list[Tensor]]:
    """E[g g^T] of each linear, g [out] the gradient of a sequence's negative log-likelihood by its outputs at a token.

    The output side of the Kronecker-factored Fisher information (K-FAC, Martens & Grosse, arXiv 1503.05671): the next
    token is drawn from the model's own prediction, once a token. Sequences of a batch run together as long as their
    logits stay small. The model's parameters take no part, and padding does not count.

    Args:
        model: a causal language model of `transformers`, in evaluation mode, of any floating dtype.
        linears: by a name for messages.
        first_block: the decoder's: gradients go back to its input.
        seed: of the draws.
        advance: called after each batch.
        among: the ranks that share the batches. All draw the same tokens as one process would.

    Returns:
        The diagonal blocks of each linear's matrix that `freqrank.lowrank.outputs.output_blocks` cuts it into, float64,
        on its device.

    Raises:
        ValueError: no language-model head, NaN or Inf in the logits or in a gradient (its linear is named).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16,
        ...                                      num_hidden_layers=1, num_attention_heads=1))
        >>> up = model.model.layers[0].mlp.up_proj
        >>> found = output_fisher(model, {"up": up}, model.model.layers[0], [Batch(torch.tensor([[1, 2, 3]]))])
        >>> [block.shape for block in found["up"]]
        [torch.Size([16, 16])]
    """
    sums: dict[str, list[Tensor]] = {}
    for name, linear in linears.items():
        weight = linear_weight(linear)
        sums[name] = [weight.new_zeros(size, size, dtype=torch.float64) for size in output_blocks(weight.shape[0])]
    counts: list[Tensor] = []  # which tokens of the running sequences count; none: all
    first: list[Tensor] = []

    def into_graph(module: nn.Module, args: tuple[Any, ...]) -> None:
        first[:] = [args[0].requires_grad_()]

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def on_output(module: nn.Module, args: Any, output: Tensor) -> None:
            def on_gradient(gradient: Tensor) -> None:
                g = gradient.reshape(-1, gradient.shape[-1])
                g = g if not counts else g[counts[0].to(g.device).flatten()]
                for block, part in zip(sums[name], g.split([len(b) for b in sums[name]], dim=1), strict=True):
                    gram_(block, part)

            output.register_hook(on_gradient)

        return on_output

    generator = torch.Generator().manual_seed(seed)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 1 << 15)
    leaves = {name: parameter.detach() for name, parameter in model.named_parameters()}
    handles = [first_block.register_forward_pre_hook(into_graph)]
    handles += [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    passed: list[int] = []  # tokens that other ranks draw for before this one draws again
    try:
        with among.together():
            for i, batch in enumerate(batches):
                mine = among.has(i)
                rows = max(1, _GRADIENT_LOGITS // (batch.input_ids.shape[1] * vocabulary))
                for start in range(0, batch.input_ids.shape[0], rows):
                    part = batch.rows(start, start + rows)
                    if part.tokens == 0:
                        continue
                    if not mine:
                        passed.append(part.tokens)
                        continue
                    counts[:] = [] if part.mask is None else [part.mask]
                    with torch.enable_grad():
                        _drawn_losses(model, part, leaves, generator, passed).backward(inputs=first)
                    passed.clear()
                if mine:
                    advance("Fisher information")
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(batch.tokens for batch in batches)
    for name, found in sums.items():
        for block in found:
            among.sum_(block)
            if not bool(block.diagonal().isfinite().all()):
                raise ValueError(f"the gradient by the output of {name} has NaN or Inf on the calibration tokens")
            block.div_(tokens)
    return sums


def _drawn_losses(
    model: nn.Module,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    generator: torch.Generator,
    passed: Sequence[int] = (),
) -> Tensor:
    """Negative log-likelihood of a next token drawn after each token that counts, summed.

    Before that the generator makes draws for ``passed`` tokens, of so many runs, as it does for runs of the model.
    """
    scores = _logits(model, batch, parameters)
    scores = scores.flatten(0, 1) if batch.mask is None else scores[batch.mask.to(scores.device)]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if not bool(scores.isfinite().all()):
        raise ValueError("the model's logits have NaN or Inf on the calibration tokens")
    # drawn on the CPU: the same tokens on every device
    for tokens in passed:
        torch.multinomial(scores.new_ones((tokens, scores.shape[1]), device="cpu"), 1, generator=generator)
    drawn = torch.multinomial(scores.detach().softmax(-1).cpu(), 1, generator=generator).flatten()
    return nn.functional.cross_entropy(scores, drawn.to(scores.device), reduction="sum")


def _take(sums: Tensor, outputs: int) -> Callable[[Tensor], None]:
    def add(leaf: Tensor) -> None:
        assert leaf.grad is not None
        sums.add_(leaf.grad.double().square_().sum(outputs))
        leaf.grad = None

    return add


def backward_bytes(linears: Sequence[nn.Module], tokens: int, vocabulary: int) -> int:
    """An estimate of what a backward pass holds beside the weights, for a sequence of so many tokens.

    The inputs and outputs of the linears, the logits in the model's dtype and twice in float32, and one gradient with
    its square in float64. Where attention makes scores [heads, T, T], these come on top.

    >>> backward_bytes([nn.Linear(16, 32)], tokens=10, vocabulary=8)
    9024
    """
    weights = [linear_weight(linear) for linear in linears]
    size = weights[0].element_size()
    features = sum(sum(weight.shape) for weight in weights)
    largest = max(weight.numel() for weight in weights)
    return tokens * (size * features + (size + 8) * vocabulary) + (size + 8) * largest


def _losses(model: nn.Module, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """Next-token losses of all tokens that count and whose predecessor does, one after the other."""
    logits = _logits(model, batch, parameters)
    ids = batch.input_ids.to(logits.device)
    mask = torch.ones_like(ids, dtype=torch.bool) if batch.mask is None else batch.mask.to(logits.device)
    counts = mask[:, 1:] & mask[:, :-1]
    scores = logits[:, :-1][counts]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return nn.functional.cross_entropy(scores, ids[:, 1:][counts], reduction="none")


def _logits(model: nn.Module, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """[N, T, vocabulary], of the model or of it with other parameters."""
    device = next(model.parameters()).device
    mask = None if batch.mask is None else batch.mask.long().to(device)
    options = {"input_ids": batch.input_ids.to(device), "attention_mask": mask, "use_cache": False}
    out = model(**options) if parameters is None else torch.func.functional_call(model, dict(parameters), (), options)
    logits = getattr(out, "logits", None)
    if logits is None:
        raise ValueError(f"{type(model).__name__} has no language-model head, so it has no next-token loss")
    return logits


def _sequences(batch: Batch) -> Iterator[Batch]:
    """One row after the other, without the padding at its ends."""
    for row in range(batch.input_ids.shape[0]):
        if batch.mask is None:
            yield batch.rows(row, row + 1)
            continue
        at = batch.mask[row].nonzero().flatten()
        if at.numel():
            part = slice(int(at[0]), int(at[-1]) + 1)
            mask = batch.mask[row : row + 1, part]
            yield Batch(batch.input_ids[row : row + 1, part], None if bool(mask.all()) else mask)
