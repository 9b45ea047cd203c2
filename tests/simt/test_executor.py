"""What the host executor gives to Python; its checks themselves are tested in test_machine.cpp."""

import freqrank_simt
import numpy as np
import pytest


@pytest.fixture
def tiles():
    x, y = (freqrank_simt.memory(4096).view(np.float32) for _ in range(2))
    x[:] = np.arange(1024)
    return x, y


def test_counters(tiles):
    x, y = tiles
    executor = freqrank_simt.Executor(seed=3)
    executor.expect_written(y)
    freqrank_simt.test_transpose(executor, x, y)
    executor.check_written()
    np.testing.assert_array_equal(y.reshape(32, 32), x.reshape(32, 32).T)
    executor.require_no_bank_conflicts()
    executor.require_full_sectors("test_transpose")
    counts = executor.counters["test_transpose"]
    assert counts["launches"] == counts["blocks"] == counts["barriers"] == 1
    assert counts["global_read_bytes"] == counts["global_read_unique_bytes"] == 4096
    assert counts["global_read_sectors"] == counts["global_written_sectors"] == 128
    assert sum(line["shared_reads"] for line in counts["lines"].values()) == counts["shared_reads"] == 32
    assert all("machine_kernels.h:" in line for line in counts["lines"])


def test_bank_conflicts_are_named(tiles):
    executor = freqrank_simt.Executor()
    freqrank_simt.test_transpose(executor, *tiles, padded=False)
    with pytest.raises(freqrank_simt.KernelError, match=r"kernel test_transpose, .*machine_kernels.h:\d+: 992"):
        executor.require_no_bank_conflicts()


def test_errors_name_kernel_and_line(tiles):
    x, y = tiles
    with pytest.raises(
        freqrank_simt.KernelError, match=r"kernel test_transpose, .*machine_kernels.h:\d+, block 0, thread"
    ):
        freqrank_simt.test_transpose(freqrank_simt.Executor(), x[:1023], y)


def test_unwritten_output_is_named(tiles):
    x, y = tiles
    executor = freqrank_simt.Executor()
    extra = freqrank_simt.memory(4)
    executor.expect_written(extra)
    freqrank_simt.test_transpose(executor, x, y)
    with pytest.raises(freqrank_simt.KernelError, match="test_transpose: element 0"):
        executor.check_written()


def test_memory_is_sparse():
    memory = freqrank_simt.memory(1 << 44)
    memory[-1] = 7
    assert memory.nbytes == 1 << 44
    assert memory[-1] == 7
