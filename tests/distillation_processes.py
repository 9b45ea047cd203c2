"""What tests/test_distillation.py runs in one process, and in several under torchrun: named runs of `distill`.

    torchrun --nproc-per-node 2 tests/distillation_processes.py FOLDER

Every process writes its reports and parameters to FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from freqrank import distill
from freqrank.attention.distillation import pack_documents
from safetensors.torch import save_file
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

    from accelerate import Accelerator

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
    (folder / f"{rank}.json").write_text(json.dumps(about))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
