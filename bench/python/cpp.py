"""Runs the C++ benchmarks and keeps their results like those of the others: python -m bench.python.cpp BINARY."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench.python import machine, results, run
from bench.python.registry import BASELINE

LIBRARY = "the C++ library, called without torch"


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each benchmark from its repetitions."""
    repetitions: dict[str, list[dict[str, Any]]] = {}
    for item in report["benchmarks"]:
        if item["run_type"] == "iteration":
            repetitions.setdefault(item["name"].split("/min_time")[0], []).append(item)
    rows = []
    for name, items in repetitions.items():
        family, device, case = name.split("/", 2)
        row: dict[str, Any] = {
            "case": f"{family} {case}", "op": family, "shape": [], "dtype": case.rsplit(" ", 1)[-1], "options": {},
            "device": device, "n": 0, "series": family, "bytes": 0, "implementation": BASELINE,
        }  # fmt: skip
        failed = [item["error_message"] for item in items if item.get("error_occurred")]
        if failed:
            rows.append({**row, "refused": f"fails: {failed[0]}"})
            continue
        seconds = sorted(item["real_time"] * {"ns": 1e-9, "us": 1e-6, "ms": 1e-3}[item["time_unit"]] for item in items)
        low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        row |= {
            "n": int(items[0]["n"]),
            "bytes": int(items[0]["bytes"]),
            "seconds": median,
            "quartiles": [low, high],
            "samples": len(items),
            "calls_per_sample": int(statistics.median(item["iterations"] for item in items)),
            "error": None,
            "ratio": None,
            "fraction_of_copy": statistics.median(item["of_copy"] for item in items),
            "bytes_per_second": items[0]["bytes"] / median,
        }
        rows.append(row)
    return rows


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.python.cpp", description="Runs the C++ benchmarks.")
    parser.add_argument("binary", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--filter", default="", help="regular expression that names must contain")
    parser.add_argument("--out", type=Path, help="folder of results")
    parser.add_argument("--threads", type=int, default=machine.cpu_count())
    arguments = parser.parse_args(None if argv is None else list(argv))
    folder = arguments.out or run.default_folder(part=arguments.quick or bool(arguments.filter))
    run.use_this_tree()
    import freqrank  # noqa: F401  # the machine's description asks it for the instruction set

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "report.json"
        command = [
            str(arguments.binary.resolve()), f"--threads={arguments.threads}", f"--benchmark_out={file}",
            "--benchmark_out_format=json", "--benchmark_display_aggregates_only=true",
            *(["--quick"] if arguments.quick else []),
            *([f"--benchmark_filter={arguments.filter}"] if arguments.filter else []),
        ]  # fmt: skip
        print("running", arguments.binary, flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            print(done.stdout, file=sys.stderr)
            print(f"{arguments.binary} ended with {done.returncode}", file=sys.stderr)
            return 1
        rows = _rows(json.loads(file.read_text()))
    for row in rows:
        about = row.get("refused") or f"{results.seconds(row['seconds'])}, {row['fraction_of_copy']:.2f} of copy"
        print(f"{row['device']} {row['case']}: {about}")
    for name in dict.fromkeys(row["device"] for row in rows):
        device = torch.device(name)
        of_device = [row for row in rows if row["device"] == name]
        document = run.document("cpp", LIBRARY, "n", of_device, device, quick=arguments.quick)
        document["settings"]["threads"] = arguments.threads
        print(f"wrote {results.write(folder, f'{machine.slug(device)}-cpp', document)}")
    run.summarise(folder)
    return 1 if any("refused" in row for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
