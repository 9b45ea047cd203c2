"""Runs a function in several processes of one torch.distributed group, over gloo on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _main(rank: int, work: Callable[[int, int], Any], size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=size, timeout=timedelta(seconds=300)
    )
    result = work(rank, size)
    dist.barrier()
    dist.destroy_process_group()
    torch.save(result, f"{folder}/{rank}.pt")


def run_on_ranks(work: Callable[[int, int], Any], size: int, folder: Path, seconds: float = 500) -> list[Any]:
    """``work(rank, size)`` of every rank. ``work`` must be importable; ranks that hang are ended and fail the test."""
    context = mp.spawn(_main, (work, size, str(folder)), nprocs=size, join=False)
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"the ranks have not finished in {seconds} seconds"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
