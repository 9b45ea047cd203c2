"""Convert the softmax attention of a transformers model into DiJiang linear attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import PreTrainedModel

from freqrank.attention.dijiang import DiJiangAttention, DiJiangOptions, preset_options
from freqrank.lowrank.modules import share_products
from freqrank.models.architectures import Architecture, find_architecture
from freqrank.models.linear_attention_layers import ATTENTION_CLASSES, LinearizedAttention
from freqrank.models.masks import attach_masks
from freqrank.models.offload import is_offloaded

#: Tensors that are loaded in float32 whatever dtype is asked for.
FLOAT32_TENSORS = {
    "decay.log_decay",
    "decay.log_rate",
    "decay.weight",
    "feature_map.frequencies",
    "feature_map.matrix",
    "feature_map.scales",
    "feature_map.signs",
    "feature_map.weights",
}


@dataclass
class LinearizationReport:
    """What :func:`linearize` changed. Sizes count elements; ``to_dict`` is JSON-serialisable.

    Attributes:
        options: the layer's options (:class:`freqrank.attention.dijiang.DiJiangOptions`).
        layers: indices of the converted layers.
        kept: indices of the layers that are still softmax.
        seed: what the frequencies and gates were drawn from.
        parameters_before, parameters_after: of the whole model; the conversion adds gates, norms and position factors.
        state_elements: one sequence's state over all converted layers, whatever its length.
        cache_elements_per_token: what their key-value cache took for each token of a sequence.
    """

    options: dict[str, Any]
    layers: list[int]
    kept: list[int]
    seed: int
    parameters_before: int
    parameters_after: int
    state_elements: int
    cache_elements_per_token: int

    @property
    def break_even_tokens(self) -> float:
        """Length beyond which the state is smaller than the key-value cache, both counted in elements."""
        return self.state_elements / self.cache_elements_per_token

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "break_even_tokens": self.break_even_tokens}


def _chosen_layers(layers: Iterable[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be None or an iterable of layer indices; got {layers!r}")
    chosen = list(layers)
    for index in chosen:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"layers must hold integers; got {index!r}")
        if not -count <= index < count:
            raise ValueError(
                f"layers must hold indices from {-count} to {count - 1}, the model has {count}; got {index}"
            )
    if not chosen:
        raise ValueError("layers must name at least one layer; got none")
    unique = sorted({index % count for index in chosen})
    if len(unique) != len(chosen):
        raise ValueError(f"layers must not name a layer twice; got {chosen}")
    return unique


def _check_layers(architecture: Architecture, layers: list[int], options: DiJiangOptions) -> None:
    for index in range(len(architecture.blocks)):
        attention = architecture.attention(index)
        if isinstance(attention, DiJiangAttention) and attention.options != options and index not in layers:
            raise ValueError(
                f"layer {index} was converted with {attention.options}; convert further layers with the same options"
            )
    for index in layers:
        attention = architecture.attention(index)
        if isinstance(attention, DiJiangAttention):
            raise ValueError(f"layer {index} is linear already; name the layers to convert, or load the original model")
        name = type(attention).__name__
        if name not in ATTENTION_CLASSES:
            raise ValueError(
                f"layer {index} has attention {name}, which linearize does not know; known: "
                f"{', '.join(ATTENTION_CLASSES)}. If its forward only projects by q_proj, k_proj and v_proj, rotates "
                "by apply_rotary_pos_emb, attends and projects by o_proj, enter it as LinearizedAttention into "
                "freqrank.models.linear_attention_layers.ATTENTION_CLASSES, else as a subclass of that"
            )
        if (reason := ATTENTION_CLASSES[name].refusal(attention, options)) is not None:
            raise ValueError(f"layer {index}: {reason}")


def _swap(model: PreTrainedModel, architecture: Architecture, layers: list[int], options: DiJiangOptions) -> None:
    rotary = getattr(architecture.decoder, "rotary_emb", None)
    old = [architecture.attention(index) for index in layers]
    new = [ATTENTION_CLASSES[type(attention).__name__](attention, options, rotary) for attention in old]
    for index, attention in zip(layers, new, strict=True):  # only now, since to make one may fail
        architecture.blocks[index].set_submodule(architecture.attention_path, attention)
    all_linear = all(isinstance(architecture.attention(i), DiJiangAttention) for i in range(len(architecture.blocks)))
    share_products(model)
    attach_masks(model, architecture.decoder, all_linear)
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), *FLOAT32_TENSORS}
    # What transformers calls a model whose cache cannot go back: assisted decoding then refuses it by name.
    model._is_stateful = True


def install(model: PreTrainedModel, spec: dict[str, Any]) -> None:
    """Swap in empty linear layers as ``spec`` says, on the model's device (meta too), for a checkpoint to fill.

    Args:
        model: a model as its configuration builds it.
        spec: what ``linearize`` recorded: "layers" and "options".

    Raises:
        ValueError: a spec of another shape, or one that does not fit the model.
    """
    if not isinstance(spec, dict) or not {"layers", "options"} <= spec.keys():
        raise ValueError(f"spec must be a dict with 'layers' and 'options'; got {spec!r}")
    known = {f.name for f in fields(DiJiangOptions)}
    if unknown := spec["options"].keys() - known:
        raise ValueError(f"spec['options'] must hold only {', '.join(sorted(known))}; got {', '.join(sorted(unknown))}")
    architecture = find_architecture(model)
    layers = _chosen_layers(spec["layers"], len(architecture.blocks))
    options = DiJiangOptions(**spec["options"])
    _check_layers(architecture, layers, options)
    _swap(model, architecture, layers, options)


def linearize(
    model: PreTrainedModel,
    *,
    feature_map: str = "dijiang",
    layers: Iterable[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> LinearizationReport:
    """Replace softmax attention by DiJiang linear attention, in place: time and memory linear in the text's length.

    The projections, norms and MLPs keep their pretrained weights; frequencies, gates, norms of the heads and position
    factors are new. The converted model needs training before it is of use: see :func:`freqrank.distill`. A sliding
    window of the pretrained model (Mistral, Phi-3) goes with its softmax: linear layers read the whole text.

    Args:
        model: a transformers model with attention of a class in
            :data:`freqrank.models.linear_attention_layers.ATTENTION_CLASSES` (Llama, GPT-NeoX, OPT, GPT-2, ...).
        feature_map: a whole combination, "dijiang" (as released), "recommended" (what recovered best, see
            docs/linearization.md) or "hybrid" (the same beside a softmax window and sinks); or a name in
            ``freqrank.attention.feature_maps.FEATURE_MAPS``, with the released options around it.
        layers: which layers to convert; None means all. Negative indices count from the end.
        seed: the frequencies and gates of layer l are drawn from a generator seeded by (seed, l).
        **options: further fields of :class:`freqrank.attention.dijiang.DiJiangOptions`, such as ``norm_groups``.

    Returns:
        a :class:`LinearizationReport`, also kept as ``model.freqrank_report``.

    Raises:
        TypeError: ``model`` is no transformers model, ``layers`` or ``seed`` no integers, an unknown option.
        ValueError: an unknown feature map or architecture, heads or features beyond what the kernels take, a layer out
            of range or linear already, an offloaded model. The model is then as it was.

    Source: DiJiang (Chen et al., ICML 2024, arXiv 2403.19928) and its released code.
    """
    from freqrank.models.quantizer import FreqrankConfig, attach

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel; got {type(model).__name__}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer; got {seed!r}")
    known = {f.name for f in fields(DiJiangOptions)} - {"feature_map"}
    if unknown := options.keys() - known:
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; linearize knows {', '.join(sorted(known))}")
    chosen_options = preset_options(feature_map, **options)
    architecture = find_architecture(model)
    chosen = _chosen_layers(layers, len(architecture.blocks))
    _check_layers(architecture, chosen, chosen_options)
    if not isinstance(quantization := getattr(model.config, "quantization_config", None), FreqrankConfig | None):
        raise ValueError(f"model is quantized by another method and cannot be converted: {quantization}")
    if is_offloaded(model):
        raise ValueError("the model's weights are offloaded, and what is added needs them in memory: load it there")

    before = sum(p.numel() for p in model.parameters())
    _swap(model, architecture, chosen, chosen_options)
    state = cache = 0
    for index in chosen:
        attention = architecture.attention(index)
        assert isinstance(attention, LinearizedAttention)
        attention.reset_parameters((seed * 1_000_003 + index) % 2**63)  # a generator takes no larger seed
        heads, head_dim = attention.num_key_value_heads, attention.head_dim
        state += attention.state_elements
        cache += 2 * heads * head_dim
    linear = [i for i in range(len(architecture.blocks)) if isinstance(architecture.attention(i), DiJiangAttention)]
    report = LinearizationReport(
        options=chosen_options.to_dict(),
        layers=chosen,
        kept=[i for i in range(len(architecture.blocks)) if i not in linear],
        seed=seed,
        parameters_before=before,
        parameters_after=sum(p.numel() for p in model.parameters()),
        state_elements=state,
        cache_elements_per_token=cache,
    )
    attach(model, linear_attention={"layers": linear, "options": chosen_options.to_dict(), "seed": seed})
    model.freqrank_report = report  # type: ignore[assignment]
    return report
