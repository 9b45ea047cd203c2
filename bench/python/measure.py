"""Times the implementations of one case side by side, after checking each against float64.

Every implementation runs in the same process on the same data. Samples are taken in rounds: one of each implementation
and of a copy of as many bytes, in random order, so that whatever else the machine does falls on all of them alike.
Ratios are medians over rounds of the ratio within a round. The data is cold: on a GPU the L2 cache is overwritten
before each call, on a CPU the calls rotate among copies of the inputs that together exceed the cache.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _ExtraFields_Allocation

from bench.python import machine
from bench.python.registry import BASELINE, DTYPES, Case, Implementation, Inputs, NotApplicable

COPY = "copy of as many bytes"
MATMUL = "matrix product"
MATMUL_SIZE = {"cpu": 1024, "cuda": 4096}
ROTATION_LIMIT = 1024  # copies of the inputs
SAMPLE_SECONDS = 1e-3  # a sample on the CPU repeats a call until it lasts about as long
FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU
LONGEST_HOST = 2e-3  # seconds that a GPU is kept waiting for the host, so that only its own time is measured
SLEEP_CLOCK = 2e9  # cycles a second: no GPU's is much faster
SLOW = 8.0  # an implementation this many times slower than the fastest one takes part in the first rounds only
SLOW_ROUNDS = 3
LONG_CALL = 0.1  # seconds; longer calls need no call before the timed ones
ALONE_SAMPLES = 3


def to_tensors(result: Any) -> tuple[Tensor, ...]:
    """A result of torch, NumPy or CuPy, or a tuple of them."""
    if isinstance(result, (tuple, list)):
        return tuple(tensor for item in result for tensor in to_tensors(item))
    return (result.detach() if isinstance(result, Tensor) else torch.as_tensor(result),)


def relative_error(result: Any, reference: Tensor | tuple[Tensor, ...]) -> float:
    """The largest relative L2 error of the tensors of a result; infinite if shapes differ."""
    got, want = to_tensors(result), to_tensors(reference)
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in want]:
        return float("inf")
    errors = []
    for a, b in zip(got, want, strict=True):
        error = float((a.to(b.device, torch.float64) - b).norm() / b.norm().clamp(min=1e-300))
        errors.append(error if error == error else float("inf"))
    return max(errors)


@dataclass(eq=False)
class Timed:
    name: str
    run: Callable[[int], Any]  # of the index into the rotation
    sets: int
    reference: Any = None
    error_of: Callable[[Any, Any], float] = relative_error
    arrays: bool = False  # takes arrays of NumPy or CuPy
    calls: int = 1  # a sample
    estimate: float = 0.0  # seconds a call
    host: float = LONGEST_HOST  # seconds until a call returns, at best
    samples: dict[int, float] = field(default_factory=dict)  # round -> seconds a call
    next_set: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.samples.values())


class Clock:
    """Seconds a call takes on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def sample(self, timed: Timed) -> float:
        if timed.estimate < LONG_CALL:
            timed.run(timed.next_set)  # wakes its threads up, while those of the one before fall asleep
        if self.device.type == "cuda":
            return self._device_time(timed)
        sets = [(timed.next_set + 1 + i) % timed.sets for i in range(timed.calls)]
        timed.next_set = (timed.next_set + 1 + timed.calls) % timed.sets
        begin = time.perf_counter_ns()
        for i in sets:
            timed.run(i)
        return (time.perf_counter_ns() - begin) * 1e-9 / timed.calls

    def _device_time(self, timed: Timed) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        torch.cuda._sleep(int(timed.host * SLEEP_CLOCK))
        begin.record()
        called = time.perf_counter()
        timed.run(0)
        timed.host = min(timed.host, time.perf_counter() - called)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


def missing_modules(implementation: Implementation) -> list[str]:
    missing = []
    for name in implementation.needs:
        try:
            present = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # of a parent
            present = False
        if not present:
            missing.append(name)
    return missing


def _clone(inputs: Inputs) -> Inputs:
    return tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in inputs)


def _same(x: Any, before: Any) -> bool:
    return not isinstance(x, Tensor) or torch.equal(x, before)


def _rotation(case: Case, device: torch.device, seed: int) -> list[Inputs]:
    generator = torch.Generator(device).manual_seed(seed)
    first = case.inputs(case, generator, device)
    size = sum(x.numel() * x.element_size() for x in first if isinstance(x, Tensor))
    copies = 0
    if device.type == "cpu":
        copies = min(ROTATION_LIMIT, -(-2 * machine.cpu_cache_bytes() // max(size, 1)))
    return [first] + [_clone(first) for _ in range(copies)]


def _yardsticks(case: Case, device: torch.device) -> list[Timed]:
    """What the machine does at best: a copy, and for cases that state their operations a matrix product."""
    half = max(case.bytes // 2, 1)
    sets = 1
    if device.type == "cpu":
        sets = min(ROTATION_LIMIT, 1 + -(-2 * machine.cpu_cache_bytes() // half))
    sources = [torch.zeros(half, dtype=torch.int8, device=device) for _ in range(sets)]
    to = torch.empty_like(sources[0])
    found = [Timed(COPY, lambda i: to.copy_(sources[i]), sets)]
    if case.flops:
        n = MATMUL_SIZE[device.type]
        dtype = DTYPES[case.compute or case.dtype]
        a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
        found.append(Timed(MATMUL, lambda i: a @ b, 1))
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(events: Iterable[tuple[int, int]]) -> int:
    """The most bytes held at a time, from address and size of blocks in order; a negative size gives a block back."""
    held: dict[int, int] = {}
    now = most = 0
    for address, size in events:
        if size > 0:
            held[address] = size
            now += size
            most = max(most, now)
        else:  # a block from before the first event is not in there
            now -= held.pop(address, 0)
    return most


def with_memory(run: Callable[[], Any], device: torch.device, *, arrays: bool = False) -> tuple[Any, int | None]:
    """The result of a call, and the bytes that it holds at its peak beside its inputs, the result among them.

    Counted is what torch's allocator hands out. For functions of `arrays` on a CPU, what NumPy's and Python's do is
    added, peak to peak. None for arrays on a GPU: CuPy has a pool of its own. Takes longer than the call.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        return result, None if arrays else torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        if arrays:
            tracemalloc.start()
        result = run()
        in_python = tracemalloc.get_traced_memory()[1]  # 0 where nothing is traced
        tracemalloc.stop()
    assert profile.kineto_results is not None
    waiting, found = profile.kineto_results.experimental_event_tree(), []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        block = event.typed[1]
        if isinstance(block, _ExtraFields_Allocation):
            found.append((event.start_time_ns, block.ptr, block.alloc_size))
    found.sort(key=lambda each: each[0])
    return result, in_python + _peak((address, size) for _, address, size in found)


def _resident(what: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at the most."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return 1024 * int(line.split()[1])


def _call_alone(
    case: Case, prepare: Callable[..., Any], device: torch.device, seed: int, threads: int, answer: Connection
) -> None:
    """Sends seconds, error and memory of one call, on a CPU the growth of the resident set, or why there is none."""
    try:
        torch.set_num_threads(threads)
        inputs = case.inputs(case, torch.Generator(device).manual_seed(seed), device)
        call = prepare(case, *inputs)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the most is counted from here on
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            allocated = torch.cuda.memory_allocated(device)
        before, begin = _resident("VmRSS"), time.perf_counter()
        result = call(*inputs)
        _synchronize(device)
        seconds = time.perf_counter() - begin
        memory = max(0, _resident("VmHWM") - before)
        if device.type == "cuda":  # the GPU's own is what is short
            memory = torch.cuda.max_memory_allocated(device) - allocated
        assert case.error is not None
        answer.send((seconds, case.error(result, case.reference(case, *inputs)), memory))
    except NotApplicable as reason:
        answer.send(reason)
    except Exception as error:
        answer.send(f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _measure_alone(
    case: Case, implementations: Sequence[Implementation], device: torch.device, seconds: float, seed: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """For calls too long and too large to be repeated side by side: each in a fresh process, one after another."""
    deadline = time.perf_counter() + seconds
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for implementation in implementations:
        name = implementation.name
        if missing := missing_modules(implementation):
            left_out[name] = f"{' and '.join(missing)} cannot be imported"
            continue
        samples: list[tuple[float, float, int]] = []
        while len(samples) < ALONE_SAMPLES and (not samples or time.perf_counter() < deadline):
            receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
            arguments = (case, implementation.prepare, device, seed, torch.get_num_threads(), send)
            process = multiprocessing.get_context("spawn").Process(target=_call_alone, args=arguments)
            process.start()
            send.close()  # so that the other end's death is an end of file here
            try:
                found = receive.recv()
            except EOFError:
                found = None
            process.join()
            if found is None:
                found = f"fails: its process ended with code {process.exitcode}"
            if not isinstance(found, tuple):
                break
            samples.append(found)
        if isinstance(found, NotApplicable):
            left_out[name] = str(found)
        elif isinstance(found, str):
            rows.append({"implementation": name, "error": None, "refused": found})
        else:
            times = [sample[0] for sample in samples]
            low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
            rows.append(
                {
                    "implementation": name,
                    "seconds": statistics.median(times),
                    "quartiles": [low, high],
                    "samples": len(times),
                    "calls_per_sample": 1,
                    "error": samples[0][1],
                    "ratio": None,
                    "fraction_of_copy": None,
                    "bytes_per_second": None,
                    "memory": max(sample[2] for sample in samples),
                }
            )
    return rows, left_out


def _paired_ratio(over: Timed, under: Timed) -> float:
    rounds = over.samples.keys() & under.samples.keys()
    return statistics.median(over.samples[r] / under.samples[r] for r in rounds)


def measure(
    case: Case,
    implementations: Sequence[Implementation],
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int] = (5, 60),
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of results, and for each implementation without one the reason.

    Takes at least the first, at most the second number of rounds, and in between as many as fit into `seconds`. Of
    cases that run alone at least one call and at most three.
    """
    if case.alone:
        return _measure_alone(case, implementations, device, seconds, seed)
    deadline = time.perf_counter() + seconds
    shuffle = random.Random(seed)
    sets = _rotation(case, device, seed)
    pristine = _clone(sets[0])
    references: dict[Callable[..., Any], Any] = {}
    left_out: dict[str, str] = {}
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    contenders: list[Timed] = []

    for implementation in implementations:
        name = implementation.name
        if device.type not in implementation.devices:
            continue
        if missing := missing_modules(implementation):
            left_out[name] = f"{' and '.join(missing)} cannot be imported"
            continue
        try:
            call = implementation.prepare(case, *sets[0])
            convert = implementation.convert
            arguments = sets
            if convert is not None:
                arguments = [tuple(convert(x) if isinstance(x, Tensor) else x for x in inputs) for inputs in sets]
            define = implementation.reference or case.reference
            if define not in references:
                references[define] = define(case, *sets[0])
            error_of = relative_error if implementation.reference else case.error or relative_error
            errors[name] = error_of(call(*arguments[0]), references[define])
            if changed := [pair for pair in zip(sets[0], pristine, strict=True) if not _same(*pair)]:
                refused[name] = "wrong: it changes its input"
                for x, before in changed:
                    x.copy_(before)
                continue
        except NotApplicable as reason:
            left_out[name] = str(reason)
            continue
        except Exception as error:  # a peer that is broken says so, and the others go on
            why = f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if name == BASELINE:
                refused[name] = why
            else:
                left_out[name] = why
            continue
        if errors[name] > case.tolerance:
            refused[name] = f"wrong: error {errors[name]:.1e} is above {case.tolerance:.0e}"
            continue
        run = lambda i, call=call, arguments=arguments: call(*arguments[i])  # noqa: E731
        contenders.append(Timed(name, run, len(arguments), references[define], error_of, convert is not None))

    timed = contenders + _yardsticks(case, device)
    clock = Clock(device)
    gc.collect()
    gc.disable()
    try:
        for each in timed:
            each.estimate = clock.sample(each)
            each.estimate = min(each.estimate, clock.sample(each))
            if device.type == "cpu":
                each.calls = max(1, round(SAMPLE_SECONDS / each.estimate))
        fastest = min((each.estimate for each in contenders), default=0.0)
        for number in range(rounds[1]):
            if number >= rounds[0] and time.perf_counter() > deadline:
                break
            round_of = [t for t in timed if number < SLOW_ROUNDS or t.estimate <= SLOW * fastest]
            shuffle.shuffle(round_of)
            for each in round_of:
                each.samples[number] = clock.sample(each)
        _synchronize(device)
    finally:
        gc.enable()

    memory: dict[str, int | None] = {}
    for each in timed:  # after all times, so that it disturbs none
        result, memory[each.name] = with_memory(partial(each.run, 0), device, arrays=each.arrays)
        if each in contenders:  # still right, and the inputs are what they were
            again = each.error_of(result, each.reference)
            if again > case.tolerance:
                refused[each.name] = f"wrong after {len(each.samples)} samples: error {again:.1e}"
        del result

    by_name = {each.name: each for each in timed if each.name not in refused}
    rows = []
    for each in by_name.values():
        times = list(each.samples.values())
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        row: dict[str, Any] = {
            "implementation": each.name,
            "seconds": each.median,
            "quartiles": [low, high],
            "samples": len(times),
            "calls_per_sample": each.calls,
            "error": errors.get(each.name),
            "ratio": None,
            "fraction_of_copy": None,
            "bytes_per_second": case.bytes / each.median,
            "memory": memory[each.name],
        }
        if each.name == MATMUL:
            row["bytes_per_second"] = None
            row["flops_per_second"] = 2 * MATMUL_SIZE[device.type] ** 3 / each.median
        else:
            row["fraction_of_copy"] = _paired_ratio(by_name[COPY], each)
            if each.name != COPY and BASELINE in by_name:
                row["ratio"] = _paired_ratio(each, by_name[BASELINE])
            if case.flops and each.name != COPY:
                row["flops_per_second"] = case.flops / each.median
                row["fraction_of_matmul"] = (
                    _paired_ratio(by_name[MATMUL], each) * case.flops / (2 * MATMUL_SIZE[device.type] ** 3)
                )
        rows.append(row)
    for name, why in refused.items():
        rows.append({"implementation": name, "error": errors.get(name), "refused": why})
    return rows, left_out
