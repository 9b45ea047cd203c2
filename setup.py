"""A shim: CMake describes the native build, this only calls it at the right moment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # before its bdist_wheel and pyproject.toml's license expression
    raise SystemExit(
        f"freqrank builds with setuptools >= 77; this is {setuptools.__version__}. "
        "Run `pip install -U setuptools cmake ninja` first."
    )
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()


def cuda_option(torch_cuda: str | None) -> str:
    """FREQRANK_CUDA for CMake: the environment's word, else AUTO (wherever nvcc is) if torch itself has CUDA."""
    wish = os.environ.get("FREQRANK_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"FREQRANK_CUDA must be 1 (compile the CUDA kernels) or 0 (do not); got {wish!r}")
    return {"1": "ON", "0": "OFF", "": "AUTO" if torch_cuda else "OFF"}[wish]


class CMakeBuild(build_ext):
    def run(self) -> None:
        try:
            import torch
        except ImportError:
            raise SystemExit(
                "freqrank builds against the torch you already have, and none can be imported here. If torch is "
                "installed, pip's build isolation hides it: use `pip install . --no-build-isolation`. Otherwise "
                "install torch >= 2.10 first."
            ) from None
        cuda = cuda_option(torch.version.cuda)
        package = ROOT / "python" / "freqrank" if self.inplace else Path(self.build_lib).resolve() / "freqrank"
        build = ROOT / "build" / "native"
        # a virtual environment that is not activated has its cmake and ninja beside its python
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        for tool in ("cmake", "ninja"):
            if shutil.which(tool, path=environment["PATH"]) is None:
                raise SystemExit(f"freqrank is built with {tool}, which is not here: `pip install cmake ninja` first")
        subprocess.run(
            [
                "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DFREQRANK_TESTS=OFF",
                f"-DFREQRANK_TORCH_ROOT={Path(torch.__file__).parent}", f"-DFREQRANK_TORCH_OUTPUT={package / '_lib'}",
                f"-DFREQRANK_CUDA={cuda}", f"-DFREQRANK_CUDA_ARCHS={os.environ.get('FREQRANK_CUDA_ARCHS', '')}",
            ],
            check=True, env=environment,
        )  # fmt: skip
        (package / "_lib" / "libfreqrank_cuda.so").unlink(missing_ok=True)  # an older build's, if this has none
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True, env=environment)

    def get_outputs(self) -> list[str]:
        return [str(library) for library in sorted((Path(self.build_lib) / "freqrank" / "_lib").glob("*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # the library uses torch's stable ABI and no Python symbol
        return "py3", "none", super().get_tag()[2]


if sys.platform != "linux":
    raise SystemExit(f"freqrank builds on Linux; this is {sys.platform}")

setup(
    ext_modules=[Extension("freqrank._native_library", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
