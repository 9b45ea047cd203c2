"""Language models to measure: the bundled one, and one of Qwen2.5-0.5B's shape with random weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import freqrank
import torch
from freqrank.lowrank.allocation import uniform_rank
from freqrank.lowrank.modules import Int8LowRankLinear, LowRankLinear, install_lowrank, share, share_products
from freqrank.models.architectures import find_architecture
from freqrank.models.compression import group_linears

BUNDLED = "bundled"
HALF_BILLION = "0.5B"
VOCABULARY = 4096  # of the second; Qwen2.5's has 151,936, but embedding and head are not what is compressed
# hidden size, inputs of the MLP's last linear, outputs of k and v, blocks
SIZES = {BUNDLED: (160, 416, 160, 6), HALF_BILLION: (896, 4864, 128, 24)}


def linears(model: str, layers: int | None = None) -> int:
    """Parameters of the linears of a model's blocks."""
    hidden, mlp, narrow, depth = SIZES[model]
    return (layers or depth) * hidden * (2 * hidden + 2 * narrow + 3 * mlp)


@lru_cache(maxsize=1)
def dense(model: str, dtype: torch.dtype, device: torch.device, layers: int | None = None) -> Any:
    """The model in eval mode, with so many blocks; nothing is fetched."""
    import transformers

    if model == BUNDLED:
        transformers.utils.logging.disable_progress_bar()
        folder = Path(freqrank.__file__).parent / "bundled" / "base"
        made: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return made.to(device).eval()
    hidden, mlp, narrow, depth = SIZES[model]
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers or depth,
        num_attention_heads=hidden // 64, num_key_value_heads=narrow // 64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = transformers.Qwen2ForCausalLM(config)
    return made.to(device, dtype).eval()


@lru_cache(maxsize=3)
def factored(
    model: str, ratio: float, share_by: str, storage: str | None, dtype: torch.dtype, device: torch.device,
    layers: int | None = None,
) -> Any:  # fmt: skip
    """The same with low-rank linears as `compress` leaves them in groups of 2, but random: they are as fast."""
    made = copy.deepcopy(dense(model, dtype, device, layers))
    architecture = find_architecture(made)
    names: list[Sequence[str]] = []
    spec = []
    for group in group_linears(architecture, True, 2, share_by):
        names.append([architecture.full_name(site.layer, architecture.roles[site.role]) for site in group.sites])
        spec.append({"modules": names[-1], "rank": uniform_rank(group.shape, ratio)})
    new = install_lowrank(made, spec)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for of in new.values():
            for factor in (of.basis, of.weight):
                factor.normal_(0, factor.shape[1] ** -0.5, generator=generator)
        for group_names in names if storage == "int8" else ():
            integers: list[LowRankLinear] = []
            for name in group_names:
                of = new[name]
                integers.append(Int8LowRankLinear.from_factors(of.basis, of.weight, of.bias))
                made.set_submodule(name, integers[-1])
            share(integers)
    share_products(made)
    return made.eval()
