"""How much a linear's outputs matter: the Kronecker-factored Fisher information, as a metric of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from freqrank.ops import whiten, whiten_eigh

#: How the outputs of a linear are weighted when it is decomposed.
OUTPUT_WEIGHTS = (None, "fisher")

# Outputs beyond so many are cut into blocks that are taken as independent, or 11,008 of them took 970 MB a linear.
_BLOCK = 1024
# Added to the diagonal, in units of its mean. Between 0.001 and 0.1 the bundled model's loss moved by 0.002 nats.
_DAMPING = 1e-2


def output_blocks(outputs: int) -> list[int]:
    """Sizes of the blocks that so many outputs are cut into, as equal as can be.

    >>> output_blocks(416), output_blocks(2050)
    ([416], [684, 683, 683])
    """
    count = -(-outputs // _BLOCK)
    return [outputs // count + (i < outputs % count) for i in range(count)]


class OutputRoot:
    """T with T T^T = F and a little more, block-diagonal, so that ||X D T||_F^2 / 2 estimates what an error D costs.

    F = E[g g^T], g the gradient of a text's loss by the linear's outputs at a token. With the inputs' G per token it
    makes up the Kronecker-factored Fisher information (K-FAC, Martens & Grosse, arXiv 1503.05671), and the loss rises
    by about tr(D^T G D F) / 2 for a small change D of the weight. A truncated SVD in both metrics is GFW-SVD's (arXiv
    2505.17974).

    Args:
        blocks: diagonal blocks of F, [b, b] each, float64.

    >>> root = OutputRoot([torch.tensor([[4.0]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)])
    >>> weight = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    >>> root.weighted(weight).square(), root.restored(root.weighted(weight))
    (tensor([[4.0200, 0.0200]], dtype=torch.float64), tensor([[1., 1.]], dtype=torch.float64))
    """

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        mean = sum(float(block.trace()) for block in blocks) / sum(len(block) for block in blocks)
        self.known = mean > 0  # else no gradient came: outputs weigh the same
        self._roots: list[Tensor] = []
        for block in blocks:
            damped = block.clone()
            damped.diagonal().add_(_DAMPING * mean if self.known else 1.0)
            factor, _, info = whiten(damped)
            self._roots.append(whiten_eigh(damped)[0] if int(info) else factor)

    @property
    def sizes(self) -> list[int]:
        """Of the blocks."""
        return [len(root) for root in self._roots]

    def weighted(self, weight: Tensor) -> Tensor:
        """W T of W [d1, d2]."""
        return self._each(weight, lambda part, root: part @ root.mT)

    def restored(self, weight: Tensor) -> Tensor:
        """C T^-1 of C [k, d2]."""
        return self._each(
            weight, lambda part, root: torch.linalg.solve_triangular(root.mT, part, upper=False, left=False)
        )

    def _each(self, weight: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        parts = weight.split(self.sizes, dim=1)
        roots = (root.to(weight.device) for root in self._roots)
        return torch.cat([change(part, root) for part, root in zip(parts, roots, strict=True)], 1)
