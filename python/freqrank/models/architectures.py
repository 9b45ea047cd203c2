"""Where a decoder's blocks, linears and attention are: one small class an architecture, found by structure.

To add an architecture, subclass :class:`Architecture`, fill in its class attributes, and append the class to
:data:`ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from freqrank.lowrank.modules import is_linear, linear_weight
from freqrank.models import offload


class Architecture:
    """A view of one model: its decoder, the decoder's blocks, and each block's linears by role.

    Attributes:
        name: what the architecture is called in messages and reports.
        blocks_path: the decoder's attribute that holds the ``ModuleList`` of blocks.
        attention_path: the attention module inside a block.
        roles: role -> path of that linear inside a block. What one linear computes at once is one role ("qkv").
        inputs: roles that read one and the same tensor, in the order in which the forward pass comes to them.
        shared: roles whose weights neighbouring layers share a basis for, see :meth:`shared_roles`.
        decoder: the module that owns the blocks; calling it runs the model without its language-model head.
        prefix: the decoder's name inside the model ("" when the model is the decoder).
        blocks: the decoder blocks, first to last.
        scratch: where what is found goes if the model is offloaded, set while it is compressed; None: into memory.
    """

    name: ClassVar[str]
    blocks_path: ClassVar[str]
    attention_path: ClassVar[str]
    roles: ClassVar[dict[str, str]]
    inputs: ClassVar[tuple[tuple[str, ...], ...]]
    shared: ClassVar[frozenset[str]]

    def __init__(self, prefix: str, decoder: nn.Module) -> None:
        self.prefix = prefix
        self.decoder = decoder
        self.blocks: nn.ModuleList = getattr(decoder, self.blocks_path)
        self.scratch: Path | None = None

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
            return all(is_linear(block.get_submodule(path)) for path in cls.roles.values())
        except AttributeError:
            return False

    def linear(self, layer: int, role: str) -> nn.Module:
        """The linear of one role in one block: an ``nn.Linear``, or a ``Conv1D`` of transformers."""
        return self.blocks[layer].get_submodule(self.roles[role])

    def weight(self, layer: int, role: str) -> Tensor:
        """The dense weight [out, in] of one role in one block, in the model's own memory; read, if offloaded."""
        linear = self.linear(layer, role)
        held = linear_weight(linear)
        if not held.is_meta:
            return held
        read = offload.value(linear, "weight")
        return read if held is linear.weight else read.mT

    def shape(self, layer: int, role: str) -> torch.Size:
        """Sizes [out, in] of a weight, for which nothing is read."""
        return linear_weight(self.linear(layer, role)).shape

    def placement(self, layer: int, role: str) -> tuple[torch.device, torch.dtype]:
        """Where a weight is computed with, and its dtype; nothing is read."""
        linear = self.linear(layer, role)
        return offload.device(linear), linear_weight(linear).dtype

    def running(self, block: nn.Module) -> Iterator[nn.Module]:
        """The modules that a run of the decoder takes whose other blocks hand on their input: ``block``, embeddings."""
        others = set(self.blocks.modules())
        yield from (module for module in self.decoder.modules() if module not in others)
        yield from block.modules()

    def attention(self, layer: int) -> nn.Module:
        """The attention module of one block."""
        return self.blocks[layer].get_submodule(self.attention_path)

    def full_name(self, layer: int, path: str) -> str:
        """A module's name inside the model, from its path inside a block."""
        return ".".join(part for part in (self.prefix, self.blocks_path, str(layer), path) if part)

    def shared_roles(self) -> frozenset[str]:
        """Roles whose weights several layers share a basis for; the others are factored alone.

        Those of ``shared``, without k and v where fewer key than query heads make them narrow (Basis Sharing's table
        for Mistral): a narrow matrix has few directions to begin with, and measured losses rose when these were shared.
        """
        narrow = {"k", "v"} <= self.roles.keys() and self.shape(0, "k")[0] < self.shape(0, "q")[0]
        return self.shared - ({"k", "v"} if narrow else set())


class Llama(Architecture):
    """Llama and whatever has its blocks: Mistral, Qwen2, Qwen3, Gemma and others with separate q, k, v, gate and up.

    Shares as Basis Sharing (Wang et al., ICLR 2025) does: the attention output and the MLP's down projection, which
    lost more together than apart, stay private.
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
    shared = frozenset({"q", "k", "v", "gate", "up"})


class Phi3(Architecture):
    """Phi-3 and Phi-4: Llama's blocks with q, k, v in one linear and gate, up in another.

    Shares what Llama shares. Fewer key than query heads do not make the fused matrix narrow, so it is shared whole.
    """

    name = "phi3"
    blocks_path = "layers"
    attention_path = "self_attn"
    roles: ClassVar[dict[str, str]] = {
        "qkv": "self_attn.qkv_proj",
        "o": "self_attn.o_proj",
        "gate_up": "mlp.gate_up_proj",
        "down": "mlp.down_proj",
    }
    inputs = (("qkv",), ("o",), ("gate_up",), ("down",))
    shared = frozenset({"qkv", "gate_up"})


class GPTNeoX(Architecture):
    """GPT-NeoX and Pythia: q, k, v in one linear; attention and MLP one after the other or side by side.

    Basis Sharing has no table for it. By analogy with its Llama and OPT: qkv and up are shared, o and down private.
    """

    name = "gpt-neox"
    blocks_path = "layers"
    attention_path = "attention"
    roles: ClassVar[dict[str, str]] = {
        "qkv": "attention.query_key_value",
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    }
    # side by side, attention and MLP read two norms of one tensor: still two inputs
    inputs = (("qkv",), ("o",), ("up",), ("down",))
    shared = frozenset({"qkv", "up"})


class OPT(Architecture):
    """OPT and other decoders with its blocks; shares as Basis Sharing does: q, k, v, up (fc1), not o and down (fc2)."""

    name = "opt"
    blocks_path = "layers"
    attention_path = "self_attn"
    roles: ClassVar[dict[str, str]] = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
    }
    inputs = (("q", "k", "v"), ("o",), ("up",), ("down",))
    shared = frozenset({"q", "k", "v", "up"})


class GPT2(Architecture):
    """GPT-2: q, k, v in one ``Conv1D``; shares as Basis Sharing does: qkv, o and up (c_fc), not down."""

    name = "gpt2"
    blocks_path = "h"
    attention_path = "attn"
    roles: ClassVar[dict[str, str]] = {
        "qkv": "attn.c_attn",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }
    inputs = (("qkv",), ("o",), ("up",), ("down",))
    shared = frozenset({"qkv", "o", "up"})


#: Tried in this order; no structure contains another's.
ARCHITECTURES: list[type[Architecture]] = [Llama, Phi3, GPTNeoX, OPT, GPT2]


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
    known = "; ".join(f"{a.name} ({a.blocks_path}.N.{{{', '.join(a.roles.values())}}})" for a in ARCHITECTURES)
    raise ValueError(
        f"{type(model).__name__} has no decoder of a known architecture. Known: {known}. To add one, subclass "
        "freqrank.models.architectures.Architecture, give the paths of its blocks and linears (torch.nn.Linear or "
        "transformers' Conv1D), and append the class to freqrank.models.architectures.ARCHITECTURES."
    )
