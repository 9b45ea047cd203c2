import freqrank_simt


def test_executor_is_importable():
    assert freqrank_simt.Executor(seed=3) is not None
    assert issubclass(freqrank_simt.KernelError, RuntimeError)
