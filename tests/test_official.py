"""Checkpoints of the released DiJiang code: made here of random numbers, with a quadratic forward pass of their own."""

from __future__ import annotations

import json

import freqrank
import numpy as np
import pytest
import torch
import transformers
from freqrank.models.official import load_official
from safetensors.torch import save_file
from scipy.fft import dct
from scipy.special import erf
from transformers import AutoModelForCausalLM, GPTNeoXConfig

VOCAB, HIDDEN, HEADS, LAYERS, MIDDLE = 61, 48, 3, 2, 56
DIM, ROTATED = HIDDEN // HEADS, 4
CONFIG = {
    "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": MIDDLE, "rotary_pct": 0.25,
    "rotary_emb_base": 10000, "max_position_embeddings": 2048, "hidden_act": "gelu", "use_parallel_residual": True,
    "layer_norm_eps": 1e-5, "torch_dtype": "float16", "tie_word_embeddings": False, "bos_token_id": 0,
    "eos_token_id": 0, "gamma": 0.5, "auto_map": {"AutoModelForCausalLM": "modeling.Other"},
}  # fmt: skip
PREFIX = "gpt_neox.layers.{}.attention."


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()


def gammas() -> np.ndarray:
    return 1 - np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), HEADS))


def checkpoint(length: int = 2048, dtype: torch.dtype = torch.float32, trained: float = 0.2) -> dict[str, torch.Tensor]:
    """Random tensors by the names of the released code; D1 and D2 are off their first values by ``trained``."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, std: float = 1.0) -> np.ndarray:
        return rng.normal(size=shape) * std

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}.weight": 1 + normal(HIDDEN, std=0.2), f"{name}.bias": normal(HIDDEN, std=0.2)}

    def linear(name: str, out: int, into: int, std: float = 1.0) -> dict[str, np.ndarray]:
        return {f"{name}.weight": normal(out, into, std=std / into**0.5), f"{name}.bias": normal(out, std=0.2)}

    position, gamma = np.arange(length), gammas()[:, None]
    tensors = {"gpt_neox.embed_in.weight": normal(VOCAB, HIDDEN), "embed_out.weight": normal(VOCAB, HIDDEN, std=0.2)}
    tensors |= norm("gpt_neox.final_layer_norm")
    for index in range(LAYERS):
        block = f"gpt_neox.layers.{index}."
        tensors |= norm(block + "input_layernorm") | norm(block + "post_attention_layernorm")
        tensors |= linear(block + "mlp.dense_h_to_4h", MIDDLE, HIDDEN) | linear(
            block + "mlp.dense_4h_to_h", HIDDEN, MIDDLE
        )
        block += "attention."
        tensors |= linear(block + "query_key_value", 3 * HIDDEN, HIDDEN, 2.0) | linear(block + "dense", HIDDEN, HIDDEN)
        tensors |= norm(block + "group_norm")
        tensors[block + "W_G"] = normal(HIDDEN, HIDDEN, std=HIDDEN**-0.5)
        tensors[block + "proj_matrix"] = dct(np.eye(DIM), axis=0, norm="ortho") * normal(DIM)
        for name, sign in (("D1", 1), ("D2", -1)):
            with np.errstate(over="ignore"):
                table = gamma ** (sign * position) * (1 + trained * normal(HEADS, length))
            tensors[block + name] = table[None, :, :, None]
        tensors[block + "rotary_emb.inv_freq"] = 10000.0 ** -(np.arange(0, ROTATED, 2) / ROTATED)
    return {name: torch.from_numpy(np.ascontiguousarray(x)).to(dtype) for name, x in tensors.items()}


def forward(tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> np.ndarray:
    """The released forward pass in float64: T x T scores of D1 phi(q) and D2 phi(k) under a 0/1 mask, no decay."""
    at = {name: x.double().numpy() for name, x in tensors.items()}
    time = ids.shape[1]
    causal = np.tril(np.ones((time, time)))
    angle = np.outer(np.arange(time), 10000.0 ** -(np.arange(0, ROTATED, 2) / ROTATED))
    cos, sin = np.cos(np.hstack([angle, angle])), np.sin(np.hstack([angle, angle]))

    def normalised(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return normalised(x) * at[f"{name}.weight"] + at[f"{name}.bias"]

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ at[f"{name}.weight"].T + at[f"{name}.bias"]

    def rotated(h: np.ndarray) -> np.ndarray:
        first, rest = h[..., :ROTATED], h[..., ROTATED:]
        turned = np.concatenate([-first[..., ROTATED // 2 :], first[..., : ROTATED // 2]], -1)
        return np.concatenate([first * cos + turned * sin, rest], -1)

    def attention(block: str, x: np.ndarray) -> np.ndarray:
        def phi(h: np.ndarray) -> np.ndarray:
            e = np.exp(rotated(h) @ at[block + "proj_matrix"])
            return e / e.sum(-1, keepdims=True)

        o = np.zeros((len(x), time, HIDDEN))
        qkv = linear(block + "query_key_value", x)
        for h in range(HEADS):
            start = 3 * DIM * h
            q, k, v = (qkv[..., start + i * DIM : start + (i + 1) * DIM] for i in range(3))
            d1, d2 = (at[block + name][0, h, :time] for name in ("D1", "D2"))
            scores = (d1 * phi(q)) @ np.swapaxes(d2 * phi(k), 1, 2) * causal
            o[..., DIM * h : DIM * (h + 1)] = scores @ v
        o = normalised(o.reshape(*o.shape[:2], DIM, HEADS)).reshape(o.shape)  # DIM groups, as many as a head is wide
        o = o * at[block + "group_norm.weight"] + at[block + "group_norm.bias"]
        gate = x @ at[block + "W_G"]
        return linear(block + "dense", gate / (1 + np.exp(-gate)) * o)

    x = at["gpt_neox.embed_in.weight"][ids.numpy()]
    for index in range(LAYERS):
        block = f"gpt_neox.layers.{index}."
        middle = linear(block + "mlp.dense_h_to_4h", norm(block + "post_attention_layernorm", x))
        mlp = linear(block + "mlp.dense_4h_to_h", middle * (1 + erf(middle / 2**0.5)) / 2)
        x = x + mlp + attention(block + "attention.", norm(block + "input_layernorm", x))
    return norm("gpt_neox.final_layer_norm", x) @ at["embed_out.weight"].T


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def config(**more) -> GPTNeoXConfig:
    return GPTNeoXConfig.from_dict(CONFIG | more)


def folder(path, tensors: dict[str, torch.Tensor], **more):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | more))
    save_file(tensors, path / "model.safetensors")
    return path


def distance(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected))


# --- what is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "dtype", "bound"), [(2048, torch.float64, 1e-6), (40, torch.float32, 1e-5)])
@torch.no_grad()
def test_logits_are_those_of_the_released_forward_pass(length, dtype, bound):
    tensors = checkpoint(length)
    model = load_official(tensors, config=config(), dtype=dtype)
    assert type(model).__name__ == "GPTNeoXForCausalLM"
    assert not model.training
    assert model.dtype == dtype
    ids = tokens(2, 37)
    assert distance(model(ids).logits, forward(tensors, ids)) <= bound


@torch.no_grad()
def test_tables_reach_as_far_as_they_go():
    """Where D1 is 6e-29 and D2 1e28 the factors are still what training made of them, and 1 at the start."""
    tensors = checkpoint(2048)
    model = load_official(tensors, config=config(), dtype=torch.float64)
    ids = tokens(1, 2048)
    expected = forward(tensors, ids)
    assert distance(model(ids).logits, expected) <= 1e-6
    cache = model(ids[:, :2000], use_cache=True).past_key_values
    assert distance(model(ids[:, 2000:], past_key_values=cache).logits, expected[:, 2000:]) <= 1e-6
    fresh = load_official(checkpoint(2048, trained=0.0), config=config())
    for layer in fresh.gpt_neox.layers:
        for factors in (layer.attention.query_factors, layer.attention.key_factors):
            torch.testing.assert_close(factors.weight, torch.ones(HEADS, 2048), atol=1e-3, rtol=0)
    assert fresh(tokens(1, 3000)).logits.isfinite().all()  # further than the tables


@torch.no_grad()
def test_a_folder_is_converted_saved_and_loaded(tmp_path):
    tensors = checkpoint(64)
    theirs = folder(tmp_path / "theirs", tensors)
    (theirs / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    model = load_official(theirs)
    assert model.dtype == torch.float32  # the file's, whatever its config says
    assert model.generation_config.max_new_tokens == 7
    ids = tokens(2, 21)
    expected = model(ids).logits
    assert distance(expected, forward(tensors, ids)) <= 1e-5
    freqrank.save_model(model, tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded(ids).logits, expected)
    assert loaded.gpt_neox.layers[0].attention.options.position_table == 64
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **greedy), model.generate(ids, **greedy, use_cache=False))
    with pytest.raises(ValueError, match="was converted already: load it with AutoModelForCausalLM"):
        load_official(tmp_path / "ours")


@torch.no_grad()
def test_several_files_and_16_bits(tmp_path):
    exact = checkpoint(300)
    tensors = checkpoint(300, torch.bfloat16)
    path = folder(tmp_path / "theirs", {})
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, path / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "model.safetensors").unlink()
    model = load_official(path)
    ids = tokens(2, 30)
    assert model.dtype == torch.bfloat16
    assert model.gpt_neox.layers[0].attention.feature_map.scales.dtype == torch.float32
    assert distance(model(ids).logits, forward(exact, ids)) <= 0.1
    model = load_official(path, dtype=torch.float64)  # a file in 16 bits, computed with exactly
    assert distance(model(ids).logits, forward(tensors, ids)) <= 2e-3  # C itself is rounded there


@torch.no_grad()
def test_a_tied_head_is_in_no_file():
    tensors = checkpoint(50)
    del tensors["embed_out.weight"]
    model = load_official(tensors, config=config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.gpt_neox.embed_in.weight
    ids = tokens(1, 8)
    expected = forward(tensors | {"embed_out.weight": tensors["gpt_neox.embed_in.weight"]}, ids)
    assert distance(model(ids).logits, expected) <= 1e-5


def test_the_model_has_tensors_of_its_own():
    tensors = checkpoint(32)
    before = {name: x.clone() for name, x in tensors.items()}
    model = load_official(tensors, config=config())
    report = freqrank.distill(model, None, [tokens(2, 12)], steps=3, lr=1e-2, progress=False)
    assert report.losses[-1] < report.losses[0]
    assert all(torch.equal(x, before[name]) for name, x in tensors.items())


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "dtype", "what"),
    [
        (4096, torch.bfloat16, r"D1: the file's torch.bfloat16 has lost \d+ entries.*\(head 0: \d+ from position 27"),
        (
            2048,
            torch.float16,
            r"D1: the file's torch.float16 has lost .*head 0: \d+ from position 3\d\d to 2047; head 1:",
        ),
    ],
)
def test_entries_that_the_file_has_lost(length, dtype, what):
    with pytest.raises(ValueError, match=rf"^gpt_neox.layers.0.attention.{what}.*float32"):
        load_official(checkpoint(length, dtype, trained=0.0), config=config())


@pytest.mark.parametrize(("name", "value"), [("D1", 0.0), ("D2", float("inf")), ("D2", float("nan")), ("D1", 1e-40)])
def test_a_single_lost_entry_is_found(name, value):
    tensors = checkpoint(50)
    tensors[PREFIX.format(1) + name][0, 2, 31] = value
    with pytest.raises(ValueError, match=rf"layers.1.attention.{name}: .*lost 1 .*head 2: 1 from position 31 to 31"):
        load_official(tensors, config=config())


def test_factors_that_the_model_would_lose():
    tensors = checkpoint(50)
    tensors[PREFIX.format(0) + "D1"][0, 1, 20] = 1e6
    with pytest.raises(ValueError, match=r"factor of .*layers.0.attention.D1: the model's torch.float16 .*position 20"):
        load_official(tensors, config=config(), dtype=torch.float16)
    load_official(tensors, config=config())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"proj_matrix": torch.eye(DIM)}, "proj_matrix must be C diag.t., C the orthonormal DCT-II: column"),
        ({"proj_matrix": torch.ones(DIM, DIM + 1)}, "proj_matrix must be a finite square matrix"),
        ({"proj_matrix": torch.full((DIM, DIM), float("nan"))}, "proj_matrix must be a finite square matrix"),
        ({"D1": torch.ones(1, HEADS, 9)}, r"D1 must be \[1, 3, positions, 1\]; got shape \(1, 3, 9\)"),
        ({"D2": torch.ones(1, HEADS + 1, 9, 1)}, r"D2 must be \[1, 3, positions, 1\]"),
        ({"D2": torch.ones(1, HEADS, 9, 1)}, "as many positions in all layers; got .*D2 of layer 1: 9"),
        ({"D1": None}, r"missing or left over: 1, such as layers.1.attention.D1"),
        ({"W_G": torch.ones(HIDDEN)}, "W_G must be a matrix"),
        (
            {"W_G": torch.ones(HIDDEN, HIDDEN + 1)},
            r"layers.1.attention.gate_proj.weight must be \[48, 48\] by the config; got \[49, 48\]",
        ),
        ({"dense.bias": None}, "checkpoint lacks 1 tensors: .*layers.1.attention.dense.bias"),
        ({"other": torch.ones(2)}, "checkpoint has 1 tensors that the model does not: .*layers.1.attention.other"),
    ],
)
def test_tensors_that_are_not_the_released_ones(change, match):
    tensors = checkpoint(50)
    for name, value in change.items():
        tensors[PREFIX.format(1) + name] = value
    with pytest.raises(ValueError, match=match):
        load_official({name: x for name, x in tensors.items() if x is not None}, config=config())


def test_a_plain_model_is_none_of_the_released_ones():
    plain = transformers.GPTNeoXForCausalLM(config())
    with pytest.raises(ValueError, match="as the released DiJiang code writes them; missing or left over: 12"):
        load_official(plain.state_dict(), config=config())
    with pytest.raises(ValueError, match="3 layers"):
        load_official(checkpoint(50), config=config(num_hidden_layers=3))


def test_arguments_and_folders(tmp_path):
    tensors = checkpoint(50)
    with pytest.raises(ValueError, match="config must be given with tensors"):
        load_official(tensors)
    with pytest.raises(TypeError, match="config must be a GPTNeoXConfig; got dict"):
        load_official(tensors, config=CONFIG)
    with pytest.raises(TypeError, match="dtype must be None or a floating-point"):
        load_official(tensors, config=config(), dtype=torch.int8)
    with pytest.raises(TypeError, match="source must be a folder or a mapping"):
        load_official(3)
    with pytest.raises(TypeError, match="source must map names to tensors; got int for 'x'"):
        load_official({"x": 3}, config=config())
    with pytest.raises(ValueError, match=r"no local folder with a config.json; nothing is downloaded"):
        load_official("YuchuanTian/DiJiang")
    path = folder(tmp_path / "llama", tensors, model_type="llama")
    with pytest.raises(ValueError, match="model_type 'llama'; the released code made 'gpt_neox' models only"):
        load_official(path)
    path = folder(tmp_path / "broken", tensors)
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        load_official(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks weights: expected model.safetensors"):
        load_official(path)
    (path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ValueError, match=r"pytorch_model.bin, a pickle, .* is not read.*convert it once.*save_file"):
        load_official(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is no JSON"):
        load_official(path)
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="names files outside of its folder"):
        load_official(path)
