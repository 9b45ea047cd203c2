"""Where a decoder's blocks, linears and attention are: one small class an architecture, found by structure.

To add an architecture, subclass :class:`Architecture`, fill in its class attributes (and override
:meth:`Architecture.shared_roles` if its sharing policy differs), and append the class to :data:`ARCHITECTURES`.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn


class Architecture:
    """A view of one model: its decoder, the decoder's blocks, and each block's linears by role.

    Attributes:
        name: what the architecture is called in messages and reports.
        blocks_path: the decoder's attribute that holds the ``ModuleList`` of blocks.
        attention_path: the attention module inside a block.
        roles: role -> path of that linear inside a block.
        inputs: roles that read one and the same tensor, in the order in which the forward pass comes to them.
        decoder: the module that owns the blocks; calling it runs the model without its language-model head.
        prefix: the decoder's name inside the model ("" when the model is the decoder).
        blocks: the decoder blocks, first to last.
    """

    name: ClassVar[str]
    blocks_path: ClassVar[str]
    attention_path: ClassVar[str]
    roles: ClassVar[dict[str, str]]
    inputs: ClassVar[tuple[tuple[str, ...], ...]]

    def __init__(self, prefix: str, decoder: nn.Module) -> None:
        self.prefix = prefix
        self.decoder = decoder
        self.blocks: nn.ModuleList = getattr(decoder, self.blocks_path)

    @classmethod
    def find(cls, model: nn.Module) -> Architecture | None:
        """The one decoder of this structure inside ``model``, or None if there is none or several."""
        found = [cls(name, module) for name, module in model.named_modules() if cls._matches(module)]
        return found[0] if len(found) == 1 else None

    @classmethod
    def _matches(cls, decoder: nn.Module) -> bool:
        blocks = getattr(decoder, cls.blocks_path, None)
        return isinstance(blocks, nn.ModuleList) and len(blocks) > 0 and all(cls._matches_block(b) for b in blocks)

    @classmethod
    def _matches_block(cls, block: nn.Module) -> bool:
        try:
            return all(isinstance(block.get_submodule(path), nn.Linear) for path in cls.roles.values())
        except AttributeError:
            return False

    def linear(self, layer: int, role: str) -> nn.Linear:
        """The linear of one role in one block."""
        linear = self.blocks[layer].get_submodule(self.roles[role])
        assert isinstance(linear, nn.Linear)
        return linear

    def attention(self, layer: int) -> nn.Module:
        """The attention module of one block."""
        return self.blocks[layer].get_submodule(self.attention_path)

    def full_name(self, layer: int, path: str) -> str:
        """A module's name inside the model, from its path inside a block."""
        return ".".join(part for part in (self.prefix, self.blocks_path, str(layer), path) if part)

    def shared_roles(self) -> frozenset[str]:
        """Roles whose weights several layers may share a basis for; the others are factored alone."""
        raise NotImplementedError


class Llama(Architecture):
    """Llama and whatever has its blocks: Mistral, Qwen2, Qwen3, Gemma and others with separate q, k, v, gate and up.

    Shares as Basis Sharing (Wang et al., ICLR 2025) does: q, k, v, gate and up. The attention output and the MLP's down
    projection stay private, and so do k and v where fewer key than query heads make them narrow (Mistral's table): a
    narrow matrix has few directions to begin with, and measured losses rose when these were shared.
    """

    name = "llama"
    blocks_path = "layers"
    attention_path = "self_attn"
    roles: ClassVar[dict[str, str]] = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    inputs = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))

    def shared_roles(self) -> frozenset[str]:
        narrow = self.linear(0, "k").out_features < self.linear(0, "q").out_features
        return frozenset({"q", "gate", "up"} if narrow else {"q", "k", "v", "gate", "up"})


#: Tried in this order.
ARCHITECTURES: list[type[Architecture]] = [Llama]


def find_architecture(model: nn.Module) -> Architecture:
    """The architecture of ``model``, by its structure and not by its name.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no known architecture fits; the message says how to add one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    for candidate in ARCHITECTURES:
        found = candidate.find(model)
        if found is not None:
            return found
    known = "; ".join(
        f"{a.name} ({a.blocks_path}.N.{{{', '.join(a.roles.values())}}} as torch.nn.Linear)" for a in ARCHITECTURES
    )
    raise ValueError(
        f"{type(model).__name__} has no decoder of a known architecture. Known: {known}. To add one, subclass "
        "freqrank.models.architectures.Architecture, give the paths of its blocks and linears, and append the class to "
        "freqrank.models.architectures.ARCHITECTURES."
    )
