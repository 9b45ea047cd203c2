"""Runs the benchmarks: python -m bench.python.run [--quick] [--family dct] [--device cpu|cuda] [--out FOLDER]."""

from __future__ import annotations

import os

# Waiting OpenMP threads spin for 10 ms and longer: long enough to take the cores from whatever is measured next.
# Between two calls of one implementation they still do. Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("KMP_BLOCKTIME", "1")
# Or some versions of torch print two lines for each call whose memory is counted.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import argparse
import datetime
import importlib.util
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.python import machine, results
from bench.python.measure import COPY, MATMUL, measure
from bench.python.registry import BASELINE, Case, Family, families

SAVE_SECONDS = 20
QUICK_SECONDS = 45  # for all families together
ROUNDS = {False: (5, 60), True: (3, 15)}


@contextmanager
def _progress(total: int, what: str) -> Iterator[Any]:
    """A function that prints a line and moves on: with a bar under the lines where rich is there, else a count."""
    if importlib.util.find_spec("rich") is not None and sys.stdout.isatty():
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
            task = bar.add_task(what, total=total)

            def advance(line: str) -> None:
                bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
                bar.advance(task)

            yield advance
    else:
        count = iter(range(1, total + 1))
        yield lambda line: print(f"[{next(count)}/{total}] {line}", flush=True)


def _line(case: Case, rows: list[dict[str, Any]]) -> str:
    parts = []
    for row in rows:
        name = row["implementation"]
        if "refused" in row:
            parts.append(f"{name} {row['refused']}")
        elif name == BASELINE:
            share = row["fraction_of_copy"]
            parts.insert(0, results.seconds(row["seconds"]) + ("" if share is None else f", {share:.2f} of copy"))
        elif row["ratio"] is not None and name not in (COPY, MATMUL):
            parts.append(f"{name} x{row['ratio']:.2f}")
    return f"{case.name}: {'; '.join(parts)}"


def run_family(
    family: Family,
    cases: list[Case],
    device: torch.device,
    *,
    seconds: float,
    quick: bool,
    seed: int = 0,
    peers: Sequence[str] = ("",),
    save: Callable[[dict[str, Any]], object] = lambda document: None,
) -> dict[str, Any]:
    """Measures the cases in about so many seconds; the document of results, saved now and then on the way."""
    deadline = time.perf_counter() + seconds
    implementations = [
        each
        for each in family.implementations
        if each.name == BASELINE or any(re.search(peer, each.name) for peer in peers)
    ]
    rows: list[dict[str, Any]] = []
    left_out: Counter[tuple[str, str]] = Counter()
    made = document(family.name, family.title, family.axis, rows, device, quick=quick, seconds=seconds)
    saved = time.perf_counter()
    with _progress(len(cases), family.name) as advance:
        for index, case in enumerate(cases):
            share = (deadline - time.perf_counter()) / (len(cases) - index)
            found, reasons = measure(case, implementations, device, seconds=share, rounds=ROUNDS[quick], seed=seed)
            about = {
                "case": case.name, "op": case.op, "shape": list(case.shape), "dtype": case.dtype,
                "options": dict(case.options), "device": device.type, "n": case.n, "series": case.series,
                "bytes": case.bytes,
            }  # fmt: skip
            rows += [{**about, **row} for row in found]
            new = [item for item in reasons.items() if item not in left_out]
            left_out.update(reasons.items())
            missing = [f"left out: {name} {reason}" for name, reason in new]
            advance("\n  ".join([_line(case, found), *missing]))
            made["left_out"] = [
                {"implementation": name, "reason": why, "cases": count} for (name, why), count in left_out.items()
            ]
            made["settings"]["complete"] = index + 1 == len(cases)
            if made["settings"]["complete"] or time.perf_counter() - saved > SAVE_SECONDS:
                saved = time.perf_counter()
                save(made)
    return made


def document(
    family: str,
    title: str,
    axis: str,
    rows: list[dict[str, Any]],
    device: torch.device,
    *,
    quick: bool,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Rows with everything that has to be known about them."""
    return {
        "schema": results.SCHEMA,
        "family": family,
        "title": title,
        "axis": axis,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine.describe(device),
        "versions": machine.versions(),
        "settings": {
            "device": device.type,
            "threads": torch.get_num_threads(),
            "quick": quick,
            "complete": True,
            "seconds": seconds,
            "environment": {key: os.environ.get(key) for key in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "FREQRANK_ISA")},
        },
        "left_out": [],
        "rows": rows,
    }


def default_folder(part: bool) -> Path:
    """Results of all cases are kept; of a part of them only for a look."""
    return machine.ROOT / ("build/bench-quick" if part else "bench/results")


def use_this_tree() -> None:
    """Imports this tree's package if it was built in place."""
    if (machine.ROOT / "python" / "freqrank" / "_lib").exists():
        sys.path.insert(0, str(machine.ROOT / "python"))


def _arguments(argv: Iterable[str] | None, known: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.python.run", description="Benchmarks beside peers.")
    parser.add_argument("--quick", action="store_true", help="a few cases of each family, in a minute")
    parser.add_argument("--family", action="append", choices=list(known), help="may be repeated; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results; default: bench/results, build/bench-quick for part of it",
    )
    parser.add_argument("--threads", type=int, default=machine.cpu_count(), help="of every implementation on the CPU")
    parser.add_argument("--match", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument(
        "--peer", action="append", metavar="REGEX", help="only peers whose name matches; may be repeated"
    )
    parser.add_argument("--minutes", type=float, help="for each family; default: the family's own")
    parser.add_argument("--render", action="store_true", help="measure nothing, make RESULTS.md and plots again")
    return parser.parse_args(None if argv is None else list(argv))


def summarise(folder: Path) -> None:
    """Writes RESULTS.md and the plots."""
    if importlib.util.find_spec("matplotlib") is not None:
        results.plot(folder)
    else:
        print("no plots: matplotlib cannot be imported")
    (folder / results.SUMMARY).write_text(results.render(folder))
    print(f"wrote {folder / results.SUMMARY}")


def main(argv: Iterable[str] | None = None) -> int:
    use_this_tree()
    known = families()
    arguments = _arguments(argv, known)
    folder = arguments.out or default_folder(arguments.quick or bool(arguments.match or arguments.peer))
    if arguments.render:
        summarise(folder)
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device here", file=sys.stderr)
        return 3
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    machine.keep_freed_memory()

    chosen = [known[name] for name in arguments.family or known]
    refused = 0
    for family in chosen:
        cases = family.cases(device.type)
        if arguments.quick:
            cases = [case for case in cases if case.quick]
        if arguments.match:
            cases = [case for case in cases if re.search(arguments.match, case.name)]
        if not cases:
            print(f"{family.name}: no case for this")
            continue
        seconds = QUICK_SECONDS / len(chosen) if arguments.quick else 60 * family.minutes
        if arguments.minutes is not None:
            seconds = 60 * arguments.minutes
        name = f"{machine.slug(device)}-{family.name.replace('_', '-')}"
        measured = run_family(
            family,
            cases,
            device,
            seconds=seconds,
            quick=arguments.quick,
            peers=arguments.peer or ("",),
            save=partial(results.write, folder, name),
        )
        refused += sum("refused" in row and row["implementation"] == BASELINE for row in measured["rows"])
        print(f"wrote {folder / name}.json")
    summarise(folder)
    if refused:
        print(f"{refused} results of {BASELINE} are wrong", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
