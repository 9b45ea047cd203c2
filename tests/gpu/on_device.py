"""Where the tests of this folder run: on a GPU, or with FREQRANK_TEST_DEVICE=cpu, to try the tests themselves, without.

They need torch, numpy and pytest alone: `make gpu-check` runs them on machines that have nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import freqrank
import pytest
import torch

DEVICE = os.environ.get("FREQRANK_TEST_DEVICE", "cuda")
CUDA = DEVICE == "cuda"

needs_cuda = pytest.mark.skipif(not CUDA, reason="needs streams and graphs")


def skip_module_without_device() -> None:
    if not CUDA:
        return
    why = ""
    if not torch.cuda.is_available():
        why = f"no NVIDIA GPU that torch {torch.__version__} can use"
    elif not freqrank._native.cuda_loaded():
        why = f"the CUDA library: {freqrank._native.libraries['cuda']}"
    if why:
        pytest.skip(why, allow_module_level=True)


def room(gigabytes: float) -> None:
    """Skips the test unless the GPU has so much free memory."""
    if CUDA:
        torch.cuda.empty_cache()  # what earlier tests freed is free for whoever asks, but torch's
    free = torch.cuda.mem_get_info()[0] if CUDA else 0
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory; there are {free / 2**30:.1f}")


def assert_waits_for_nothing(work: Callable[[], object]) -> None:
    """Fails if ``work`` makes the host wait for the GPU; of fewer launches than a GPU's queue takes before it does."""
    work()  # kernels are loaded, and memory is taken from the driver, at first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(400_000_000)
        marker = torch.cuda.Event()
        marker.record()
        work()
        assert not marker.query(), "the GPU slept, and the host waited for it"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
