"""`merge`: a compressed model as a dense one again, for programs that know nothing of shared factors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from freqrank.lowrank.modules import LowRankLinear, linear_weight, share_products
from freqrank.models.offload import is_offloaded

__all__ = ["merge"]


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """Replace low-rank linears by dense ones that hold the product of their factors, in place.

    The model then computes what it did but for rounding: products are made in float64 and rounded to the factors'
    dtype, that of the scales where factors are integers. It has as many parameters as before it was compressed. Saved,
    it is a plain transformers model that needs no freqrank to load, unless its attention is linearised, which stays.

    Args:
        model: a model of `transformers`, compressed, or another module with `LowRankLinear` layers.

    Returns:
        Names of the linears that were replaced.

    Raises:
        ValueError: no layer is low-rank, weights are offloaded, or adapters (peft) hold low-rank layers: merge or
            unload those first.

    >>> model = nn.Sequential(LowRankLinear(6, 4, rank=2))
    >>> x = torch.randn(3, 6)
    >>> before = model(x)
    >>> merge(model), type(model[0]).__name__, torch.allclose(model(x), before, atol=1e-6)
    (['0'], 'Linear', True)
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no low-rank layer: there is nothing to merge")
    if is_offloaded(model):
        raise ValueError("the model's weights are offloaded, and merging needs them in memory: load it there")
    kinds = _dense_kinds(model)
    missing = sorted(layers.keys() - kinds.keys()) if kinds is not None else []
    if missing:
        raise ValueError(
            f"{missing[0]} is a low-rank layer where {type(model).__name__} has no linear of its own: merge or unload "
            "adapters first"
        )
    for name, layer in layers.items():
        model.set_submodule(name, _dense(layer, None if kinds is None else kinds[name]))
    share_products(model)
    config: Any = getattr(model, "config", None)
    if config is not None and kinds is not None:
        _forget(model, config)
    return list(layers)


def _dense_kinds(model: Any) -> dict[str, nn.Module] | None:
    """The dense modules of a model of this class by name, without memory; None where no config makes one."""
    if not hasattr(model, "config") or not hasattr(type(model), "_from_config"):
        return None
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        return dict(type(model)._from_config(config).named_modules())


def _dense(layer: LowRankLinear, kind: nn.Module | None) -> nn.Module:
    product = layer.dense_weight(torch.float64).to(layer.dtype)
    if kind is None:
        with torch.device("meta"):
            kind = nn.Linear(layer.in_features, layer.out_features, bias=False)
    if linear_weight(kind) is not kind.weight:  # a Conv1D
        product = product.mT.contiguous()
    trained = layer.weight.requires_grad or not layer.weight.is_floating_point()
    kind.weight = nn.Parameter(product, requires_grad=trained)
    kind.bias = layer.bias
    return kind.train(layer.training)


def _forget(model: Any, config: Any) -> None:
    """Nothing says any more that the model is compressed."""
    from freqrank.models.quantizer import FreqrankConfig, declare_ties

    settings = getattr(config, "quantization_config", None)
    if settings is not None and settings.linear_attention is not None:
        config.quantization_config = FreqrankConfig(linear_attention=settings.linear_attention)
    elif settings is not None:
        del config.quantization_config
    model.__dict__.pop("freqrank_report", None)
    declare_ties(model)
