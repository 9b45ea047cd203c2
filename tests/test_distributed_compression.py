"""`compress` on two ranks, each with its share of the calibration, against one process: statistics, models, errors."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import re
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import freqrank
import pytest
import torch
from freqrank import _progress
from freqrank._distributed import Ranks, world
from freqrank.lowrank.modules import LowRankLinear
from freqrank.lowrank.statistics import Batch, Grams, Magnitudes, read_calibration
from ranks import run_on_ranks

transformers = pytest.importorskip("transformers")

from freqrank.models.checkpoint import Checkpoint  # noqa: E402
from freqrank.models.whole import next_token_loss, output_fisher, squared_gradients  # noqa: E402

VOCAB = 40

CASES: dict[str, dict[str, Any]] = {
    "lisc own": {"method": "lisc", "refit": "own"},
    "lisc cross": {"method": "lisc", "refit": "cross", "layers": 3},
    "lisc sequential": {"method": "lisc", "refit": "sequential", "block_weight": "norm"},
    "svd": {"method": "svd"},
    "svd-llm": {"method": "svd-llm", "refit": "sequential"},
    "asvd": {"method": "asvd"},
    "fwsvd": {"method": "fwsvd"},
    "basis-sharing": {"method": "basis-sharing", "allocation": "auto"},
    "best": {"method": "best"},
    "error-aware": {"method": "lisc", "statistics": "error-aware", "group_size": 3, "layers": 3},
    "similar": {"method": "lisc", "grouping": "similar", "layers": 3},
    "sensitivity": {"method": "svd-llm", "allocation": "sensitivity", "layers": 1},
    "int8": {"method": "lisc", "refit": "own", "storage": "int8"},
}


def build(layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)  # random models start out nearly linear
    return model


def calibration() -> list[Any]:
    """Five batches of different sizes, so that shares are unlike; one padded."""
    generator = torch.Generator().manual_seed(1)

    def ids(rows: int, length: int) -> torch.Tensor:
        return torch.randint(VOCAB, (rows, length), generator=generator)

    mask = torch.ones(5, 10, dtype=torch.long)
    mask[:, 7:] = torch.rand(5, 3, generator=generator) < 0.5
    return [ids(4, 12), ids(3, 16), {"input_ids": ids(5, 10), "attention_mask": mask}, ids(1, 20), ids(6, 9)]


def compressed(layers: int = 2, **options: Any) -> dict[str, Any]:
    """Every sum over the tokens, the products of the factors, the last block's outputs, and the report."""
    sums: list[dict[str, torch.Tensor]] = []
    model = build(layers)

    def recording(kind: type) -> Any:
        sum_over = kind.sum_over

        def record(self: Any, ranks: Ranks) -> None:
            sum_over(self, ranks)
            sums.append({name: x.clone() for name, x in self.of.items()})

        return mock.patch.object(kind, "sum_over", record)

    with recording(Grams), recording(Magnitudes), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = freqrank.compress(model, calibration(), **{"ratio": 0.4, "progress": False, **options})
    lowrank = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    last: list[torch.Tensor] = []  # before the norm, which rounds to float32
    with torch.no_grad(), model.model.norm.register_forward_pre_hook(lambda module, args: last.extend(args)):
        model(calibration()[1])
    return {
        "last": last[0],
        "sums": sums,
        "products": {name: module.dense_weight(torch.float64) for name, module in lowrank.items()},
        "state": {name: x.clone() for name, x in model.state_dict().items()},
        "report": {**report.to_dict(), "seconds": 0},
    }


def of_whole_model(among: Ranks) -> dict[str, torch.Tensor]:
    """What takes the whole model at once, as each rank has it in the end."""
    model, batches = build(), read_calibration(calibration())
    linears = {"first": model.model.layers[0].self_attn.q_proj, "last": model.model.layers[1].mlp.down_proj}
    with torch.no_grad():
        found = squared_gradients(model, linears, batches, among=among)
        fisher = output_fisher(model, linears, model.model.layers[0], batches, seed=3, among=among)
    found |= {f"{name} outputs": torch.block_diag(*blocks) for name, blocks in fisher.items()}
    return {**found, "loss": torch.tensor(next_token_loss(model, batches, among), dtype=torch.float64)}


def failure(*arguments: Any, **options: Any) -> str:
    try:
        freqrank.compress(*arguments, **{"progress": False, **options})
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failures(second: bool, folder: Path) -> dict[str, str]:
    model, data = build(), calibration()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 2] += 1e-9
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[0] = torch.nan
    only_second = [torch.ones(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)]
    offloaded = freqrank.load_offloaded(folder / "model", folder / f"offload-{second:d}")
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "file").touch()
    found = {
        "option": failure(model, data, method="lsic" if second else "lisc"),
        "setting": failure(model, data, ratio=0.3 if second else 0.2),
        "calibration": failure(model, data[:-1] if second else data),
        "ids": failure(model, [data[0].int()] if second else data),
        "model": failure(other if second else model, data),
        "few": failure(model, data[0]),
        "offloaded": failure(offloaded, data),
        "nan": failure(broken, only_second),  # token 0 is in the second rank's share alone
        "nan in logits": failure(broken, only_second, method="best"),
        "checkpoint": failure(model, data, checkpoint=folder / "taken"),
    }
    return found | {"untouched": str(any(isinstance(module, LowRankLinear) for module in model.modules()))}


def work(folder: Path, rank: int, size: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: compressed(**options) for name, options in CASES.items()}
    found["whole"] = of_whole_model(world())
    found["failures"] = failures(rank == 1, folder)

    saved: list[str] = []
    save, err = Checkpoint.save, io.StringIO()

    def recorded(self: Checkpoint, name: str, *args: Any) -> None:
        saved.append(name)
        save(self, name, *args)

    with mock.patch.object(Checkpoint, "save", recorded):
        kept = {**CASES["best"], "checkpoint": folder / "checkpoint"}
        found["first run"] = compressed(**kept)
        if rank == 0:  # as if the run had ended early
            for path in sorted((folder / "checkpoint").glob("group-*"))[3:]:
                path.unlink()
        torch.distributed.barrier()
        found["saved"] = list(saved)
        found["second run"] = compressed(**kept)
    with (
        mock.patch.object(_progress, "_SECONDS_BETWEEN_LINES", 0.0), contextlib.redirect_stderr(err),
        warnings.catch_warnings(record=True) as warned,
    ):  # fmt: skip
        warnings.simplefilter("always")
        freqrank.compress(build(), [data[:1, :5] for data in calibration()[:2]], method="svd", block_weight="norm")
    found["shown"] = err.getvalue(), [str(warning.message) for warning in warned]

    half = build().bfloat16()
    freqrank.compress(half, calibration(), storage="int8", progress=False)
    found["bfloat16"] = half.state_dict()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    build().save_pretrained(folder / "model")
    return run_on_ranks(functools.partial(work, folder), 2, folder)


# --- tests ------------------------------------------------------------------------------------------------------------


def assert_close(got: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    error, size = float((got - expected).norm()), float(expected.norm())
    assert got.shape == expected.shape
    assert error <= limit * size, f"{error / size:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(case, found):
    one = compressed(**CASES[case])
    first, second = (rank[case] for rank in found)
    for rank in (first, second):
        assert len(rank["sums"]) == len(one["sums"]) > 0
        for got, expected in zip(rank["sums"], one["sums"], strict=True):
            assert got.keys() == expected.keys()
            for name in expected:
                assert_close(got[name], expected[name], 1e-12)
        assert rank["products"].keys() == one["products"].keys()
        assert rank["products"]
        # What compressed blocks hand to the output projection spans fewer directions than it has: its Gram matrices are
        # singular, and rounding them in one process moves its product by 3e-10, but what it puts out by 1e-13.
        singular = CASES[case].get("statistics") == "error-aware" or case == "best"
        for name, expected in one["products"].items():
            assert_close(rank["products"][name], expected, 1e-8 if singular else 1e-12)
        assert_close(rank["last"], one["last"], 1e-12)
    assert first["state"].keys() == second["state"].keys()
    assert all(torch.equal(x, second["state"][name]) for name, x in first["state"].items())
    assert first["report"]["tokens"] == second["report"]["tokens"] == one["report"]["tokens"]
    for key in ("parameters_after", "bytes_after", "block_ratio"):
        assert first["report"][key] == second["report"][key] == one["report"][key]
    assert [group["rank"] for group in first["report"]["groups"]] == [
        group["rank"] for group in one["report"]["groups"]
    ]


def test_what_takes_the_whole_model(found):
    one = of_whole_model(Ranks())
    for rank in found:
        assert rank["whole"].keys() == one.keys()
        for name, expected in one.items():
            assert_close(rank["whole"][name], expected, 1e-12)


def test_both_ranks_have_the_same_bits(found):
    first, second = (rank["bfloat16"] for rank in found)
    assert any(x.dtype == torch.int8 for x in first.values())
    for name, x in first.items():
        assert x.dtype == second[name].dtype
        assert torch.equal(x, second[name])


def test_only_the_first_rank_shows_and_writes(found):
    first, second = (rank["shown"] for rank in found)
    assert "svd" in first[0]
    assert any("fewer than the 24 rows" in text for text in first[1])
    assert any("block_weight is a switch of" in text for text in first[1])
    assert second == ("", [])
    assert any(name.startswith("group") for name in found[0]["saved"])
    assert found[1]["saved"] == []


def test_a_run_goes_on_from_its_checkpoint(found):
    for rank in found:
        for run in ("first run", "second run"):
            assert rank[run]["state"].keys() == rank["best"]["state"].keys()
            assert all(torch.equal(x, rank["best"]["state"][name]) for name, x in rank[run]["state"].items())


FAILURES = {
    "option": r"ValueError: method must be one of .*; got 'lsic' \(on rank 1 of 2\)",
    "setting": r"ValueError: ratio must be the same on all ranks of the group; got 0.2 on rank 0 and 0.3 on rank 1",
    "calibration": r"ValueError: the model, or calibration, must be the same on all ranks of the group; got ",
    "ids": r"TypeError: calibration item 0 must have dtype int64; got torch.int32 \(on rank 1 of 2\)",
    "model": r"ValueError: the model, or calibration, must be the same on all ranks of the group; got ",
    "few": r"ValueError: calibration must have a batch for each of the 2 ranks; got 1 of .* 48 tokens\. .*split\(1\)",
    "offloaded": r"ValueError: an offloaded model is compressed by one process",
    "nan": r"ValueError: the input of model.layers.0.self_attn.q_proj has NaN or Inf on the calibration tokens$",
    "nan in logits": r"ValueError: the model's logits have NaN or Inf on the calibration tokens \(on rank 1 of 2\)",
    "checkpoint": r"ValueError: .*taken is not empty and holds no checkpoint.* \(on rank 0 of 2\)",
}


@pytest.mark.parametrize("what", FAILURES)
def test_all_ranks_fail_alike(what, found):
    first, second = (rank["failures"][what] for rank in found)
    assert first == second
    assert re.match(FAILURES[what], first), first
    assert found[0]["failures"]["untouched"] == found[1]["failures"]["untouched"] == "False"


def test_shares_are_all_there_is():
    batches = [Batch(torch.full((1, 2), number)) for number in range(7)]
    for size in (1, 2, 3, 7):
        shares = [Ranks(rank=rank, size=size).share(batches) for rank in range(size)]
        assert sorted(int(batch.input_ids[0, 0]) for share in shares for batch in share) == list(range(7))
        assert all(shares)
