"""What linear attention's CUDA kernels move and multiply, counted by the host executor. No GPU is needed.

    python -m bench.python.linear_attention_counters [--build build/native] [--out bench/results] [--match REGEX]

Writes `linear-attention-counters.json`, which `python -m bench.python.run --render` puts into RESULTS.md. Each case
runs with some tokens and with twice as many; the difference is what tokens cost once a block has its state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from bench.python.counters import CLOCK, COPY_RATE, SMS, arguments_of, load, registers, write

CHUNK = 64  # tokens that a row of the table is for
ONE_SM = {"sms": 1, "shared_bytes_per_sm": 0}  # as with enough heads: a block walks through the whole sequence
STORAGE = {"bfloat16": np.uint16, "float32": np.float32}
CACHE_WIDTH = 64  # bytes that an SM gets from the second cache in a cycle
MMA_OPERATIONS = 2 * 16 * 8 * 16
# An H200's bf16 matrix products, and the part of that rate that mma.sync, without wgmma, is said to reach.
MATMUL_RATE, MMA_PART = 7.9e14, 0.6

TITLE = "Linear attention on CUDA: what the kernels move and multiply (host executor)"
NOTE = f"""
No time in this table: the kernels' source ran under the host executor. Counts are for {CHUNK} tokens of one head, or
for one state and token of decoding. *must move* is each tensor once: q, k, v, o in the forward pass; q, k, v, do, dq,
dk, dv in the backward pass. *requested* are the bytes of the 32-byte sectors that instructions touch, as often as they
do; *unique* those that a kernel touches, once each; *fragments*, beside what is requested, those of a feature map's
projection, which stay in the caches. *passes* are those over the banks of shared memory, *mma* products of 16x16 and
16x8 matrices. The estimates are the fraction of an H200's copy rate ({COPY_RATE / 1e12:.1f} TB/s, {SMS} SMs,
{CLOCK / 1e9:.1f} GHz) over the bytes that must move, if all else took no time: with the requested bytes at the copy
rate, with these and the fragments at {CACHE_WIDTH} bytes a cycle from the second cache, with tensor cores at {MMA_PART}
of {MATMUL_RATE / 1e12:.0f} TFLOP/s, with a pass of shared memory a cycle; *R* is the least of the four. A decoding step
behind a map reads the projection in each block, which is counted among the requested bytes though it comes from the
second cache, since all heads share it. Instructions, latency and the time to fill and empty the GPU are not in it.
Registers and spilled bytes of the scan are ptxas' for sm_90a.
""".strip().replace("\n", " ")


@dataclass(frozen=True)
class Case:
    what: str
    dim: int
    dtype: str = "bfloat16"
    backward: bool = False
    normalize: bool = False
    decay: str = ""  # "head" or "token"
    mapped: bool = False
    rest: bool = False  # of o, for a backward pass
    split: bool = False

    @property
    def name(self) -> str:
        return f"{self.what}, heads of {self.dim}, {self.dtype}"

    @property
    def must_move(self) -> int:
        size = np.dtype(STORAGE[self.dtype]).itemsize
        if self.what.startswith("decoding step"):
            return 2 * self.dim * self.dim * 4 + 4 * self.dim * size  # the state both ways; q, k, v, o
        return (7 if self.backward else 4) * CHUNK * self.dim * size


def cases() -> Iterator[Case]:
    for dim in (64, 128, 256):
        yield Case("forward", dim)
        yield Case("forward, normalised", dim, normalize=True)
        yield Case("forward, normalised, before a backward pass", dim, normalize=True, rest=True)
        yield Case("forward, a decay a head", dim, decay="head")
        yield Case("forward, split into short segments", dim, split=True)
        yield Case("backward: dq, dk, dv", dim, backward=True)
        yield Case("backward, normalised", dim, backward=True, normalize=True)
        yield Case("backward with the gradient of a decay a token", dim, backward=True, decay="token")
    for dim in (64, 128):
        yield Case("forward, features made on the way", dim, mapped=True)
        yield Case("backward, features made on the way", dim, backward=True, mapped=True)
    for dim in (64, 128):
        yield Case("forward", dim, "float32")
        yield Case("backward: dq, dk, dv", dim, "float32", backward=True)
    for dim in (64, 128, 256):
        yield Case("decoding step", dim)
    for dim in (64, 128, 256):
        yield Case("decoding step behind a map", dim)


class Runner:
    def __init__(self, simt: ModuleType) -> None:
        self.simt = simt

    def array(self, dtype: Any, *shape: int) -> Any:
        element = np.dtype(dtype)
        return self.simt.memory(int(np.prod(shape)) * element.itemsize).view(element).reshape(shape)

    def scan(self, case: Case, tokens: int) -> tuple[dict[str, Any], Any]:
        """The plan and the counters of a call over so many tokens of one head."""
        names = ["q", "k", "v", "o", *(["grad_o", "dq", "dk", "dv"] if case.backward else [])]
        arrays = {name: self.array(STORAGE[case.dtype], 1, tokens, 1, case.dim) for name in names}
        if case.mapped:
            arrays["projection"] = self.array(np.float32, case.dim, case.dim)
        if case.normalize:
            arrays["denominator"] = self.array(np.float32, 1, 1, tokens)
        if case.rest:
            arrays["rest"] = self.array(STORAGE[case.dtype], 1, tokens, 1, case.dim)
        if case.decay:
            shape = (1,) if case.decay == "head" else (1, tokens, 1)
            arrays["log_decay"] = self.array(np.float32, *shape)
            if case.backward:
                arrays["dlog_decay"] = self.array(np.float32, *shape)
        executor = self.simt.Executor(0)
        options = {"half": case.dtype, "normalize": case.normalize, "scale": 0.125, "eps": 1e-6, "feature": 1}
        limits = {"sms": SMS} if case.split else ONE_SM
        return self.simt.linear_attention(executor, arrays, options | limits), executor.counters

    def step(self, case: Case, batch: int) -> Any:
        arrays = {name: self.array(STORAGE[case.dtype], batch, 1, case.dim) for name in ("q", "k", "v", "o")}
        executor = self.simt.Executor(0)
        arrays["kv"] = self.array(np.float32, batch, 1, case.dim, case.dim)
        if case.what != "decoding step":
            arrays["projection"] = self.array(np.float32, case.dim, case.dim)
        self.simt.linear_attention_step(executor, arrays | {"scale": 0.125, "eps": 1e-6})
        return executor.counters

    @staticmethod
    def total(counters: Any) -> dict[str, int]:
        sums: dict[str, int] = {}
        for kernel in counters.values():
            for key, value in kernel.items():
                if key not in ("lines", "launches", "threads", "shared_bytes"):
                    sums[key] = sums.get(key, 0) + value
        return sums

    def row(self, case: Case) -> dict[str, Any]:
        plan: dict[str, Any] = {"scans": [], "segment_length": 0}
        if case.what.startswith("decoding step"):
            few, many, units = self.step(case, 1), self.step(case, 2), 1
        else:
            # enough for a few segments in both, whether they are cut by the plan or for the gradient of the decay
            tokens = 2048 if case.split else 1024 if case.decay == "token" else 2 * CHUNK
            _, few = self.scan(case, tokens)
            plan, many = self.scan(case, 2 * tokens)
            units = tokens // CHUNK
        once, twice = self.total(few), self.total(many)
        counts = {key: (twice[key] - once[key]) / units for key in twice}
        read, written = 32 * counts["global_read_sectors"], 32 * counts["global_written_sectors"]
        # both directions' fragments in the kernel of the map's gradient, for q and for k
        tiles = sum(scan["mapped"] for scan in plan["scans"]) + (4 if case.mapped and case.backward else 0)
        fragments = 4 * case.dim**2 * tiles
        read -= fragments
        a_second = COPY_RATE / SMS
        least = case.must_move / a_second
        times = {
            "memory_allows": (read + written) / a_second,
            "second_cache_allows": (read + written + fragments) / (CACHE_WIDTH * CLOCK),
            "tensor_cores_allow": counts["mma"] * MMA_OPERATIONS / (MATMUL_RATE * MMA_PART / SMS),
            "shared_memory_allows": counts["shared_passes"] / CLOCK,
        }
        kernel = next(name for name in many if name != "linear_attention_carry")
        return {
            "pass": case.what,
            "K, V": case.dim,
            "dtype": case.dtype,
            "segments": plan["segment_length"] if case.split or case.decay == "token" else None,
            "scans": len(plan["scans"]) or None,
            "must_move": case.must_move,
            "requested": round(read + written),
            "fragments": fragments or None,
            "unique": round(counts["global_read_unique_bytes"] + counts["global_written_unique_bytes"]),
            "mma": round(counts["mma"]) or None,
            "matrix_loads": round(counts["matrix_loads"]) or None,
            "passes": round(counts["shared_passes"]),
            "bank_conflicts": round(counts["bank_conflicts"]),
            "barriers": round(counts["barriers"]),
            "shared_bytes": many[kernel]["shared_bytes"],
            **{key: round(least / time, 2) if time else None for key, time in times.items()},
            "R": round(min(1.0, least / max(times.values())), 2),
        }


def main() -> int:
    arguments = arguments_of("python -m bench.python.linear_attention_counters", __doc__)
    runner, rows = Runner(load(arguments.build)), []
    used = registers(arguments.ptxas)
    for case in cases():
        if not re.search(arguments.match, case.name):
            continue
        row = runner.row(case)
        kernel = f"linear_attention::device::ScanMma<bfloat16, {(64, 128, 256).index(case.dim)}>"
        if row["mma"] and kernel in used:
            row["registers"], row["spilled"] = used[kernel]
        rows.append(row)
        print(case.name, row, flush=True)
    if not arguments.match:
        write(arguments.out / "linear-attention-counters.json", TITLE, NOTE, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
