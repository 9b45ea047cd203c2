"""Recovery training in two processes, against one. This file is also what `torchrun` runs in each of the two:

    torchrun --nproc-per-node 2 tests/test_distillation_processes.py FOLDER

Every process writes its reports and parameters to FOLDER.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from freqrank import distill
from freqrank.attention.distillation import pack_documents
from safetensors.torch import load_file, save_file
from test_distillation import Killed, pair, poison, tokens

#: Two processes share 3 and 1 rows of a batch, batches dealt out, packed rows that only one of them can have, and more.
RUNS: dict[str, dict[str, Any]] = {
    "rows": {"data": tokens(7, 12), "recipe": "released", "batch_size": 3, "steps": 5},
    "stages": {"data": tokens(7, 12), "recipe": "align", "batch_size": 3, "steps": 10},
    "batches": {"data": tokens(8, 12), "recipe": "align", "batch_size": 2, "accumulate": 2, "steps": 10},
    "rows of batches": {"data": tokens(9, 12), "recipe": "align", "batch_size": 3, "accumulate": 3, "steps": 5},
    "packed": {
        "data": pack_documents([tokens(1, n, seed=n)[0] for n in (9, 5, 16, 7)], 12, boundaries=True),
        "recipe": "distill",
        "hidden_weight": 0.5,
        "accumulate": 3,
        "steps": 3,
    },
    "lora": {"data": tokens(6, 12), "recipe": "distill", "train": "lora", "batch_size": 4, "steps": 4},
    "attention": {"data": tokens(6, 12), "recipe": "align", "train": "attention", "checkpointing": True, "steps": 6},
}


def run(name: str, wrap: Any = None, **more: Any) -> tuple[Any, Any]:
    student, teacher = (model.double() for model in pair())
    given = student if wrap is None else wrap(student)
    options = {"lr": 3e-3, "validation": tokens(5, 12, seed=5), "validate_every": 2, "progress": False} | RUNS[name]
    return distill(given, teacher, **(options | more)), student


def runs() -> Iterator[tuple[str, Any, Any]]:
    for name in RUNS:
        yield name, *run(name)


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    about: dict[str, Any] = {}

    def write(name: str, report: Any, student: Any) -> None:
        about[name] = report.to_dict()
        save_file(
            {key: p.detach().clone() for key, p in student.named_parameters()}, folder / f"{name} {rank}.safetensors"
        )

    for found in runs():
        write(*found)

    accelerator = Accelerator()
    wrapped: list[Any] = []

    def wrap(student: Any) -> Any:
        wrapped.append(accelerator.prepare(student))
        return wrapped[-1]

    write("wrapped", *run("rows", wrap))
    about["class"] = type(wrapped[0]).__name__
    about["same report"] = wrapped[0].freqrank_report.losses == about["wrapped"]["losses"]

    # All processes end at step 7, and go on later from step 6.
    def schedule(step: int) -> float:
        if step == 7 and not resumed:
            raise Killed
        return 1.0

    resumed = False
    options = {"checkpoint": folder / "checkpoint", "checkpoint_every": 3, "schedule": schedule}
    try:
        run("stages", **options)
    except Killed:
        resumed = True
    seen: list[int] = []
    write("resumed", *run("stages", on_step=lambda done, report: seen.append(done), **options))
    about["steps seen"] = seen
    write("whole", *run("stages", schedule=schedule))
    try:
        run("stages", **options, seed=1)
    except ValueError as error:
        about["another run"] = str(error)

    student, teacher = pair()
    before = [p.detach().clone() for p in student.parameters()]
    try:
        broken = poison(student.model.layers[1].mlp.up_proj, 2)  # called in the main process alone
        distill(student, teacher, tokens(4, 12), steps=5, on_step=broken, progress=False)
    except FloatingPointError as error:
        about["not finite"] = str(error)
    about["restored"] = all(torch.equal(p, q) for p, q in zip(student.parameters(), before, strict=True))

    # A group made by hand, without a launcher's environment, and models that differ: the main process's counts.
    torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)

    def changed(student: Any) -> Any:
        with torch.no_grad():
            student.lm_head.weight.add_(rank)
        return student

    write("by hand", *run("rows", changed, progress=True))
    (folder / f"{rank}.json").write_text(json.dumps(about))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes wrote: the reports of each, and the folder."""
    folder = tmp_path_factory.mktemp("processes")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [*launch, __file__, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        _, errors = running.communicate(timeout=500)
    finally:
        running.terminate()  # the launcher then ends its processes; nothing, if it has ended
    assert running.returncode == 0, errors[-4000:]
    assert errors.count("training:   0%") == 1  # the main process's bar of the one run that has one
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], folder


def equal_parameters(folder: Path, name: str, other: str) -> None:
    first, second = (load_file(folder / f"{which}.safetensors") for which in (name, other))
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_two_processes_train_as_one_does(two_processes):
    reports, folder = two_processes
    for name, expected, student in runs():
        for report in (found[name] for found in reports):
            for series in ("losses", "next_token", "gradient_norms", "learning_rates"):
                assert report[series] == pytest.approx(getattr(expected, series), rel=1e-9), (name, series)
            assert [step for step, _ in report["validation"]] == [step for step, _ in expected.validation]
            assert [v for _, v in report["validation"]] == pytest.approx([v for _, v in expected.validation], rel=1e-9)
            assert report["tokens"] == expected.tokens
            assert report["stages"] == expected.stages
            assert report["settings"]["processes"] == 2
        equal_parameters(folder, f"{name} 0", f"{name} 1")
        for key, p in load_file(folder / f"{name} 0.safetensors").items():
            torch.testing.assert_close(p, student.get_parameter(key).detach(), atol=1e-9, rtol=1e-6, msg=(name, key))


def test_two_processes_take_a_model_that_accelerate_prepared(two_processes):
    reports, folder = two_processes
    for rank, report in enumerate(reports):
        assert report["class"] == "DistributedDataParallel"
        assert report["same report"]
        assert report["wrapped"]["losses"] == report["rows"]["losses"]
        equal_parameters(folder, f"wrapped {rank}", f"rows {rank}")


def test_two_processes_resume_stop_and_refuse_together(two_processes):
    reports, folder = two_processes
    for rank, report in enumerate(reports):
        assert report["resumed"]["losses"] == report["whole"]["losses"]
        equal_parameters(folder, f"resumed {rank}", f"whole {rank}")
        assert "holds a run that differs in seed" in report["another run"]
        assert re.search("not finite at step 3; .* in the output of model.layers.1.mlp.up_proj", report["not finite"])
        assert report["restored"]
    assert reports[0]["steps seen"] == [7, 8, 9, 10]  # by the main process
    assert reports[1]["steps seen"] == []


def test_a_process_group_made_by_hand(two_processes):
    reports, folder = two_processes
    for rank, report in enumerate(reports):
        assert report["by hand"]["losses"] == report["rows"]["losses"]
        equal_parameters(folder, f"by hand {rank}", f"rows {rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
