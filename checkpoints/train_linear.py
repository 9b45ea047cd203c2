"""Make the bundled linearised twin: convert the bundled base model and recover it by distillation, on a CPU.

    python checkpoints/train_linear.py --steps 2000 --output python/freqrank/bundled/linear

Seeded; the schedule is a function of the step alone, so `--steps N` repeats a run on the same machine and Python.
The log, one JSON object a line, goes to --log. The layer's options and the training's settings are also in the saved
config.json: they are chosen for a small model and few tokens, and are not all the released ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from pathlib import Path

import torch
import transformers
from freqrank import distill, linearize
from freqrank.attention.distillation import TrainingReport, validation_loss
from freqrank.data import RandomWindows, stdlib_bytes, windows
from freqrank.models.quantizer import attach
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("python/freqrank/bundled/base"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--kl-weight", type=float, default=1.0)
    parser.add_argument("--hidden-weight", type=float, default=1.0)
    parser.add_argument("--feature-map", default="recommended", help="a combination or a map, see freqrank.linearize")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="of freqrank.linearize")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("python/freqrank/bundled/linear"))
    parser.add_argument("--log", type=Path, default=Path("checkpoints/train_linear.jsonl"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    teacher = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    teacher.requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    options = {name: json.loads(value) for name, value in (option.split("=", 1) for option in args.option)}
    conversion = linearize(student, feature_map=args.feature_map, seed=args.seed, **options)
    validation = windows(stdlib_bytes("validation"), args.context, 64, seed=1)
    data = RandomWindows(stdlib_bytes("train"), args.context, args.batch, args.seed)

    args.log.parent.mkdir(parents=True, exist_ok=True)
    with args.log.open("w") as log:

        def write(**row: object) -> None:
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)

        write(
            **{name: value if isinstance(value, (int, float, str)) else str(value) for name, value in
            vars(args).items()}, conversion=conversion.to_dict(), teacher_validation=round(validation_loss(teacher,
            validation), 4), python=platform.python_version(), torch=torch.__version__,
            transformers=transformers.__version__, threads=torch.get_num_threads(),
        )  # fmt: skip

        def on_step(done: int, report: TrainingReport) -> None:
            if done % 50 == 0 or done == args.steps:
                recent = report.next_token[-50:]
                row = {"step": done, "seconds": round(report.seconds, 1), "train": round(sum(recent) / len(recent), 4)}
                if report.validation and report.validation[-1][0] == done:
                    row["validation"] = round(report.validation[-1][1], 4)
                write(**row)

        training = distill(
            student,
            teacher,
            data,
            recipe="align",
            steps=args.steps,
            batch_size=args.batch,
            lr=args.lr,
            kl_weight=args.kl_weight,
            hidden_weight=args.hidden_weight,
            validation=validation,
            validate_every=250,
            on_step=on_step,
            seed=args.seed,
            progress=False,
        )
        made = student.config.quantization_config.linear_attention
        attach(student, linear_attention={**made, "recipe": training.recipe, "training": training.settings})
        student = student.to(torch.bfloat16)
        student.save_pretrained(args.output)
        rounded = validation_loss(student.float(), validation)
        write(saved=str(args.output), validation_after_bf16=round(rounded, 4))


if __name__ == "__main__":
    main()
