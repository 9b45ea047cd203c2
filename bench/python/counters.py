"""What the DCT's CUDA kernels move, counted by the host executor that runs their source. No GPU is needed.

    python -m bench.python.counters [--build build/native] [--out bench/results] [--match REGEX]

Writes `dct-counters.json`, which `python -m bench.python.run --render` puts into RESULTS.md. Each case runs with some
rows and with twice as many; the difference is what rows cost once a block has its tables. Registers and spills come
from ptxas' reports for sm_90a, where the build compiled the kernels for CUDA.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
STORAGE = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32, "float64": np.float64}
LIMITS = {"sms": 1}  # so that blocks loop though there are few rows

# An H200: copy rate, SMs, clock.
COPY_RATE, SMS, CLOCK = 4.3e12, 132, 1.7e9

TITLE = "DCT on CUDA: what the kernels move (host executor)"
NOTE = f"""
No time in this table: the kernels' source ran under the host executor. *stated* are the plan's bytes, *read* and
*written* those that the kernels touched; *requested* counts each as often as it was asked for, tables (from the caches)
too. *sectors* are the requested bytes over those of the 32-byte sectors that they lie in (1 is best). *passes* and
*shuffles* of shared memory are for 32 elements. The estimate is the fraction of an H200's copy rate
({COPY_RATE / 1e12:.1f} TB/s, {SMS} SMs, {CLOCK / 1e9:.1f} GHz) that shared memory allows if it serves one pass or
shuffle a cycle, 1 at most; instructions and latency are not in it. Registers and spilled bytes are ptxas' for sm_90a.
""".strip().replace("\n", " ")


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    type: int
    dtype: str
    first: bool = False  # along the first dimension: neighbouring rows lie beside each other

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.lengths))
        return f"n={size} type={self.type} {self.dtype}{' dim=0' if self.first else ''}"

    def shapes(self, rows: int) -> tuple[tuple[int, ...], list[int]]:
        if self.first:
            return (*self.lengths, rows), [0]
        return (rows, *self.lengths), list(range(1, 1 + len(self.lengths)))


def cases() -> Iterator[Case]:
    for n in (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        for type in (2, 3, 4):
            for dtype in ("float32", "bfloat16"):
                yield Case((n,), type, dtype)
    for n in (64, 1024):
        for dtype in ("float32", "bfloat16"):
            yield Case((n,), 2, dtype, first=True)
    for n in (96, 384, 1000, 1536, 3000, 1018, 1019, 4099):
        yield Case((n,), 2, "float32")
    yield Case((257,), 1, "float32")
    yield Case((1024,), 2, "float64")
    yield Case((16384,), 2, "float32")
    yield Case((65536,), 2, "float32")
    for n in (8, 16, 64):
        yield Case((n, n), 2, "float32")


class Runner:
    def __init__(self, simt: ModuleType) -> None:
        self.simt = simt

    def arrays(self, case: Case, rows: int) -> tuple[Any, Any, list[int]]:
        shape, dims = case.shapes(rows)
        element = np.dtype(STORAGE[case.dtype])
        size = int(np.prod(shape)) * element.itemsize
        x, out = (self.simt.memory(size).view(element).reshape(shape) for _ in range(2))
        return x, out, dims

    def rows(self, case: Case) -> tuple[int, str]:
        """Rows that give every block of an SM its work, and the algorithm."""
        x, out, dims = self.arrays(case, max(1, (1 << 22) // int(np.prod(case.lengths))))
        plan = self.simt.dct_plan(x, out, case.dtype, dims, list(case.lengths), case.type, limits=LIMITS)
        steps = [step for step in plan["steps"] if step["algorithm"] != "tables"]
        return max(step["rows_per_block"] * min(step["blocks"], 4) for step in steps), steps[0]["algorithm"]

    def count(self, case: Case, rows: int) -> dict[str, int]:
        x, out, dims = self.arrays(case, rows)
        executor = self.simt.Executor(0)
        steps = self.simt.dct(executor, x, out, case.dtype, dims, list(case.lengths), case.type, limits=LIMITS)
        total = {
            "elements": x.size,
            "stated_read": sum(step["read_bytes"] for step in steps),
            "stated_written": sum(step["write_bytes"] for step in steps),
            "block_shared_bytes": max(step["shared_bytes"] for step in steps),
        }
        for kernel in executor.counters.values():
            for key, value in kernel.items():
                if key != "lines":
                    total[key] = total.get(key, 0) + value
        return total

    def row(self, case: Case) -> dict[str, Any]:
        rows, algorithm = self.rows(case)
        once, twice = self.count(case, rows), self.count(case, 2 * rows)
        more = {key: twice[key] - once[key] for key in twice}
        passes, shuffles = more["shared_passes"] / more["elements"], more["shuffles"] / more["elements"]
        size = np.dtype(STORAGE[case.dtype]).itemsize
        elements_a_cycle = COPY_RATE / (2 * size) / SMS / CLOCK
        requested = more["global_read_bytes"], more["global_written_bytes"]
        return {
            "algorithm": algorithm,
            "n": "x".join(map(str, case.lengths)) + (" dim=0" if case.first else ""),
            "type": case.type,
            "dtype": case.dtype,
            "rows": rows,
            "bytes_stated": f"{more['stated_read']} + {more['stated_written']}",
            "bytes_read": more["global_read_unique_bytes"],
            "bytes_written": more["global_written_unique_bytes"],
            "requested": sum(requested),
            "sectors_read": round(requested[0] / (32 * more["global_read_sectors"]), 3),
            "sectors_written": round(requested[1] / (32 * more["global_written_sectors"]), 3),
            "passes": round(32 * passes, 2),
            "bank_conflicts": more["bank_conflicts"],
            "shuffles": round(32 * shuffles, 2),
            "shared_bytes": twice["block_shared_bytes"],
            "estimated_limit": round(min(1.0, 1 / (elements_a_cycle * (passes + shuffles))), 2),
        }


def load(build: Path) -> ModuleType:
    sys.path.insert(0, str(build))
    if importlib.util.find_spec("freqrank_simt") is None:
        raise SystemExit(f"no freqrank_simt in {build}: `cmake --build {build} --target freqrank_simt`")
    return importlib.import_module("freqrank_simt")


def registers(reports: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Kernel -> registers and spilled bytes for sm_90a."""
    loader = SourceFileLoader("ptxas_report", str(ROOT / "tools" / "ptxas-report"))
    spec = importlib.util.spec_from_loader("ptxas_report", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    loader.exec_module(module)
    kernels = [kernel for path in reports for kernel in module.parse(path.read_text(), path.name)]
    names = module.demangle([kernel.name for kernel in kernels]) if kernels else []
    found = zip(names, kernels, strict=True)
    return {name: (k.registers, k.in_memory) for name, k in found if k.arch == "sm_90a"}


def write(path: Path, title: str, note: str, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({"title": title, "note": note, "rows": []}, indent=1)
    path.write_text(head.replace('"rows": []', f'"rows": [\n  {body}\n ]') + "\n")
    print(f"wrote {path}")


def arguments_of(program: str, about: str | None) -> argparse.Namespace:
    """The command line; `ptxas` holds the paths of nvcc's reports."""
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "native")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--ptxas", type=Path, nargs="*", help="reports of nvcc -Xptxas -v; default: those of the build")
    parser.add_argument("--match", metavar="REGEX", default="", help="only cases whose name matches; prints them")
    arguments = parser.parse_args()
    if arguments.ptxas is None:
        arguments.ptxas = list(arguments.build.rglob("*.ptxas"))
    return arguments


def main() -> int:
    arguments = arguments_of("python -m bench.python.counters", __doc__)
    runner, rows = Runner(load(arguments.build)), []
    used = registers(arguments.ptxas)

    for case in cases():
        if not re.search(arguments.match, case.name):
            continue
        row = runner.row(case)
        kernel = f"dct::device::PowerOfTwo<{case.lengths[0]}>"
        if row["algorithm"] == "power of two" and kernel in used:
            row["registers"], row["spilled"] = used[kernel]
        rows.append(row)
        print(case.name, row, flush=True)
    if arguments.match:
        return 0
    write(arguments.out / "dct-counters.json", TITLE, NOTE, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
