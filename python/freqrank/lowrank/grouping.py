"""Which layers share a basis: neighbours, or those whose linears do alike with alike inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GROUPINGS = ("adjacent", "similar")

# Columns that are kept of a moment X^T Y with more: random combinations, which keep its inner products with others.
_SKETCH = 256


def sketch(moment: Tensor, seed: int = 0) -> Tensor:
    """``moment`` [d1, d2] with at most 256 columns, M R for more, R random with E[R R^T] = 1; float32.

    >>> sketch(torch.ones(2, 3)).shape, sketch(torch.ones(2, 1000)).shape
    (torch.Size([2, 3]), torch.Size([2, 256]))
    """
    columns = moment.shape[1]
    if columns > _SKETCH:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (columns, _SKETCH), generator=generator, dtype=torch.int8)
        moment = moment @ ((2 * signs - 1).to(moment) / _SKETCH**0.5)
    return moment.float()


def similarity(moments: Sequence[Tensor]) -> Tensor:
    """[L, L]: <K_l, K_m> / (||K_l|| ||K_m||) of K_l = M_l M_l^T, M_l = X_l^T Y_l [d1, d2] of layer l.

    1 where two layers read the same directions of their inputs with the same weight, 0 where they have none in common.
    M_l holds both what the input excites and what the weight makes of it, so that the measure is a functional and a
    structural one in one (SharVeT, KDD 2026, clusters layers by two of them).

    >>> x, y = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [2.0]])
    >>> similarity([x, y, 3 * x])
    tensor([[1., 0., 1.],
            [0., 1., 0.],
            [1., 0., 1.]], dtype=torch.float64)
    """
    unit = [moment.double().to(moments[0].device) for moment in moments]
    inner = torch.tensor([[float((a.mT @ b).square().sum()) for b in unit] for a in unit], dtype=torch.float64)
    norms = inner.diagonal().sqrt()
    return inner / (norms[:, None] * norms).clamp_min(torch.finfo(torch.float64).tiny)


def similar_groups(similarity: Tensor, size: int) -> list[list[int]]:
    """Layers in groups of ``size``, the last may be smaller: the first one left over takes those most like its group.

    >>> similar_groups(torch.tensor([[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]]), 2)
    [[0, 2], [1]]
    """
    left = list(range(len(similarity)))
    groups = []
    while left:
        group = [left.pop(0)]
        while left and len(group) < size:
            nearest = max(left, key=lambda layer: (float(similarity[layer, group].sum()), -layer))
            left.remove(nearest)
            group.append(nearest)
        groups.append(sorted(group))
    return groups
