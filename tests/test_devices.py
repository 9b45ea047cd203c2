"""Devices without a GPU at hand: errors, plans, tracing for CUDA, and the tools that check a CUDA build."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import freqrank
import pytest
import torch
from freqrank import _native
from freqrank.ops import linalg
from torch._subclasses import FakeTensorMode

ROOT = Path(__file__).parent.parent


def on(device, op, *arguments):
    """The kernel that tensors of another device would reach, called with CPU tensors."""
    return op.default.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device)), *arguments)


# --- ops without a kernel for the device --------------------------------------------------------------------------


def test_ops_without_a_kernel_say_so():
    with pytest.raises(ValueError, match=r"freqrank has no kernel of gram for XPU; .*x\.cpu\(\)"):
        on("XPU", torch.ops.freqrank.gram, torch.ones(2, 2), None, None)


@pytest.mark.skipif(_native.cuda_loaded(), reason="the CUDA library is loaded")
def test_without_the_cuda_library_the_error_says_how_to_build_it():
    q = torch.ones(1, 2, 1, 4)
    for op, arguments in (
        (torch.ops.freqrank.dct, (torch.ones(3, 4), [1], [4], [4], 2, 0, 0, 0)),
        (torch.ops.freqrank.linear_attention, (q, q, q, *5 * [None], 1.0, False, 0.0, False, False)),
        (torch.ops.freqrank.gram, (torch.ones(3, 4), None, None)),
        (torch.ops.freqrank.cholesky_ex, (torch.eye(3), False)),
        (torch.ops.freqrank.cholesky_solve_ex, (torch.eye(3), torch.eye(3), False)),
        (torch.ops.freqrank.solve_triangular, (torch.eye(3), torch.eye(3), False, True, False)),
        (torch.ops.freqrank.whiten, (torch.eye(3), None)),
    ):
        with pytest.raises(
            ValueError, match=r"CUDA library is not .*FREQRANK_CUDA=1 pip install \. --no-build-isolation"
        ):
            on("CUDA", op, *arguments)


def test_every_op_has_a_kernel_or_an_error_for_cuda():
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("freqrank::")]
    computing = [name for name in names if has_kernel(name, "CPU")]
    assert len(computing) >= 9
    assert all(has_kernel(name, key) for name in computing for key in ("CUDA", "MPS", "XPU"))


def test_the_reason_is_kept():
    assert _native.libraries["cuda"].startswith(("loaded (", "not built", "not loaded: "))
    library = Path(_native.__file__).parent / "_lib" / "libfreqrank_cuda.so"
    if library.exists() and not torch.backends.cuda.is_built():
        assert _native.libraries["cuda"] == f"not loaded: torch {torch.__version__} is built without CUDA"


# --- tracing for a GPU that is not here ---------------------------------------------------------------------------


def test_fake_cuda_tensors_are_traced():
    with FakeTensorMode():
        x = torch.empty(3, 20, device="cuda", dtype=torch.bfloat16)
        y = freqrank.dct(x, norm="ortho", n=32)
        assert (y.shape, y.dtype, y.device.type) == ((3, 32), torch.bfloat16, "cuda")
        assert freqrank.gram(x).device.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_derivatives_of_the_solvers_stay_on_the_gpu(first, second, dtype):
    """The formulas themselves: without a GPU autograd has no thread for one."""
    where = {"device": "cuda", "dtype": dtype}
    with FakeTensorMode(), torch.no_grad():
        a, b = torch.empty(2, 6, 6, **where), torch.empty(2, 6, 6, **where)
        context = SimpleNamespace(saved_tensors=(a,), upper=first, needs_input_grad=(True, False))
        [from_cholesky, _] = linalg._cholesky_backward(context, b, None)
        context = SimpleNamespace(saved_tensors=(a, b), options=(first, second, True), needs_input_grad=(True, True))
        [from_a, from_b, *_] = linalg._solve_backward(context, b)
        context = SimpleNamespace(saved_tensors=(b, a), upper=first, needs_input_grad=(True, True))
        [solved_a, solved_b, _] = linalg._cholesky_solve_backward(context, b, a, None)
        for grad in (from_cholesky, from_a, from_b, solved_a, solved_b, freqrank.logdet(a)):
            assert (grad.device.type, grad.dtype) == ("cuda", dtype)
            assert grad.shape == a.shape[: grad.dim()]


def test_export_for_cuda():
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        x = torch.empty(3, 20, device="cuda")
        graph = make_fx(lambda x: freqrank.dctn(x, norm="ortho"))(x)
    assert any(node.target is torch.ops.freqrank.dct.default for node in graph.graph.nodes)


def test_batch_dimensions_of_gram_on_a_gpu():
    with FakeTensorMode():
        x = torch.empty(*6 * [2], 1, 4, 3, device="cuda")
        assert freqrank.gram(x).shape == (*6 * [2], 1, 3, 3)
        with pytest.raises(ValueError, match=r"at most 6 leading .* larger than 1; got \(2, 2, 2, 2, 2, 2, 2, 1\)"):
            freqrank.gram(x.expand(2, *x.shape))


def test_mixed_devices():
    with FakeTensorMode():
        gpu, cpu = torch.empty(3, 3, device="cuda"), torch.empty(3, 3)
        q, k = torch.empty(1, 2, 1, 4, device="cuda"), torch.empty(1, 2, 1, 4)
        with pytest.raises(ValueError, match="y must be on the device of x, cuda:0; got cpu"):
            freqrank.gram(gpu, cpu)
        with pytest.raises(ValueError, match="B must be on the device of A, cpu; got cuda:0"):
            freqrank.solve_triangular(cpu, gpu, upper=False)
        with pytest.raises(ValueError, match="k must be on the device of q, cuda:0; got cpu"):
            freqrank.linear_attention(q, k, q)


# --- plans --------------------------------------------------------------------------------------------------------


def test_describe_plan_takes_what_the_op_takes():
    x = torch.empty(6, 100, 34, dtype=torch.float16)
    text = freqrank.describe_plan(freqrank.dct, x, 4, dim=1)
    assert "type IV of length 100, 204 rows" in text
    assert text == freqrank.describe_plan("dct", (6, 100, 34), 4, dim=1, dtype=torch.float16)
    assert "type III of length 34" in freqrank.describe_plan(freqrank.idct, x)
    assert freqrank.describe_plan(freqrank.dctn, x, dim=(0, 1)).count("type II of length") == 2
    assert "a copy" in freqrank.describe_plan(freqrank.dctn, x, dim=())
    assert "nothing to do" in freqrank.describe_plan(freqrank.dct, (0, 8))
    integers = torch.empty(6, 7, dtype=torch.int32)
    assert freqrank.describe_plan(freqrank.dct, integers) == freqrank.describe_plan(freqrank.dct, (6, 7))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to ask")
def test_describe_plan_for_a_gpu_that_is_not_here():
    text = freqrank.describe_plan(freqrank.dct, (1000, 100), device="cuda")
    assert text.startswith("for a GPU like the H100, as none can be asked here\n")
    assert "mixed radix (" in text
    assert "1000 rows, input float32 -> output float32" in text
    assert "moves 400000 + 400000 bytes" in text
    meta = torch.empty(1000, 100, device="meta")
    assert freqrank.describe_plan(freqrank.dct, meta, device=torch.device("cuda", 3)) == text
    strided = freqrank.describe_plan(freqrank.dct, meta.mT, dim=0, device="cuda")
    assert "moves 400000 + 400000 bytes" in strided


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "says"),
    [
        (("fft", (3,)), {}, ValueError, "op must be freqrank's dct, idct, dctn or idctn, .*; got 'fft'"),
        ((torch.fft.fft, (3,)), {}, ValueError, "op must be freqrank's dct"),
        ((freqrank.dct, (3, -1)), {}, ValueError, r"x must be a tensor or the sizes of one; got \(3, -1\)"),
        ((freqrank.dct, (3,)), {"device": "mps"}, ValueError, "device must be 'cpu' or 'cuda'; got 'mps'"),
        ((freqrank.dct, torch.ones(3)), {"dtype": torch.float16}, TypeError, "dtype goes with sizes"),
        ((freqrank.dct, torch.empty(3, device="meta")), {}, ValueError, "device must be given for a meta tensor"),
        ((freqrank.dct, (3,)), {"dim": 1}, ValueError, "dim out of range"),
        ((freqrank.dct, (3,)), {"s": 3}, TypeError, "unexpected keyword argument 's'"),
    ],
)
def test_describe_plan_refuses(arguments, options, kind, says):
    with pytest.raises(kind, match=says):
        freqrank.describe_plan(*arguments, **options)


# --- tools --------------------------------------------------------------------------------------------------------

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8freqrank4fastEv' for 'sm_90a'
ptxas info    : Function properties for _ZN8freqrank4fastEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 56 registers, used 1 barriers, 128 bytes smem
ptxas info    : Compiling entry function '_ZN8freqrank4slowEv' for 'sm_90a'
ptxas info    : Function properties for _ZN8freqrank4slowEv
    {stack} bytes stack frame, {spill} bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def ptxas_report(folder: Path, *options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools/ptxas-report", folder, *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def build_folder(tmp_path):
    command = {"directory": str(tmp_path), "command": "nvcc -c a.cu -o a.o", "file": str(tmp_path / "a.cu")}
    (tmp_path / "compile_commands.json").write_text(json.dumps([command]))
    (tmp_path / "a.o.ptxas").write_text(REPORT.format(stack=0, spill=16))
    return tmp_path


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_spills_fail_unless_allowed(build_folder):
    done = ptxas_report(build_folder)
    assert done.returncode == 1
    assert "1 of 2 kernels keep registers in memory" in done.stderr
    assert "\nslow " in done.stderr
    assert ptxas_report(build_folder, "--kernel", "fast*").returncode == 0
    assert ptxas_report(build_folder, "--kernel", "none*").returncode == 2

    allowed = build_folder / "allowed.txt"
    allowed.write_text("# why\n\nslow* sm_90a rarely used\n")
    assert ptxas_report(build_folder, "--allowed", allowed).returncode == 0
    allowed.write_text("slow* sm_80 rarely used\n")
    assert ptxas_report(build_folder, "--allowed", allowed).returncode == 1
    allowed.write_text("slow* sm_90a\n")
    assert "PATTERN ARCHITECTURE reason" in ptxas_report(build_folder, "--allowed", allowed).stderr

    (build_folder / "a.o.ptxas").write_text(REPORT.format(stack=64, spill=0).replace("8 bytes spill", "0 bytes spill"))
    assert ptxas_report(build_folder).returncode == 1  # a local array in memory is as slow


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_figures_of_kernels(build_folder):
    done = ptxas_report(build_folder, "--json", build_folder / "kernels.json", "--kernel", "fast*")
    assert done.returncode == 0
    (kernel,) = json.loads((build_folder / "kernels.json").read_text())
    assert kernel == {
        "name": "fast", "arch": "sm_90a", "source": "a.cu", "registers": 56, "barriers": 1,
        "static_shared_bytes": 128, "stack_bytes": 0, "spill_store_bytes": 0, "spill_load_bytes": 0,
    }  # fmt: skip


def test_a_report_that_is_missing_or_cut_off_is_no_success(build_folder):
    text = (build_folder / "a.o.ptxas").read_text()
    (build_folder / "a.o.ptxas").write_text(text[: text.rindex("ptxas info")])
    done = ptxas_report(build_folder)
    assert done.returncode != 0
    assert "cut off" in done.stderr
    (build_folder / "a.o.ptxas").unlink()
    assert "build first" in ptxas_report(build_folder).stderr
    assert ptxas_report(build_folder / "nowhere").returncode != 0


def test_the_compiler_launcher_keeps_the_report_and_shows_the_rest(tmp_path):
    compiler = tmp_path / "compiler"
    printed = REPORT.format(stack=8, spill=8) + "a.cu(1): warning: look here\n"
    command = [ROOT / "tools/keep-ptxas-log", compiler, "-c", "a.cu", "-o", tmp_path / "a.o"]
    for status in (0, 3):
        compiler.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{printed}END\nexit {status}\n")
        compiler.chmod(0o755)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == status
        assert done.stderr == "a.cu(1): warning: look here\n"
        assert (tmp_path / "a.o.ptxas").exists() == (status == 0)  # half a report is none


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tools/gpu-check", "--out", tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "there is no NVIDIA GPU" in done.stdout
    assert not (tmp_path / "out").exists()
    done = subprocess.run(
        ["make", "--no-print-directory", "gpu-check", f"PYTHON={sys.executable}", f"OUT={tmp_path / 'out'}"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "MAKEFLAGS": ""},
    )  # fmt: skip
    assert done.returncode != 0
    assert "there is no NVIDIA GPU" in done.stdout
    assert "Error 3" in done.stderr


def test_gpu_check_refuses_a_folder_of_peers_that_is_none(tmp_path):
    command = [sys.executable, ROOT / "tools/gpu-check", "--peers", tmp_path / "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "PEERS must be a folder of wheels" in done.stderr
