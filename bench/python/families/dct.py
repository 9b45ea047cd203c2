"""The discrete cosine transforms."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import freqrank
import torch
from freqrank.ops.reference import dct_matrix
from torch import Tensor

from bench.python.registry import Case, Family, Inputs, NotApplicable

TOLERANCE = {"float16": 5e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-13}
SMALL = 1 << 17  # elements; below, one thread may beat several


def norm_of(type: int) -> str | None:
    """The norm measured: orthonormal but for type I, whose orthonormal form torch-dct does not have."""
    return None if type == 1 else "ortho"


# --- cases --------------------------------------------------------------------------------------------------------

POWERS = [2**k for k in range(3, 14)]
SMOOTH = [96, 100, 360, 1000, 1536, 6000]
PRIMES = [31, 67, 127, 257, 509, 1009, 2003, 4099, 8191]
ODD = [45, 225, 1125, 3375]
QUICK = {"powers of two": (16, 64, 256, 1024, 4096), "smooth lengths": (100, 1000), "primes": (127, 1009)}


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    return (torch.randn(case.shape, generator=generator, device=device).to(case.torch_dtype),)


def _extension(x: Tensor, type: int) -> Tensor:
    """Rows transformed by the Fourier transform of their symmetric extension: the definition, in float64."""
    n = x.shape[-1]
    if type == 1:
        y = torch.fft.rfft(torch.cat([x, x[..., 1:-1].flip(-1)], -1)).real
        return y[..., :n]
    if type == 2:
        z = x.new_zeros(*x.shape[:-1], 4 * n)
        z[..., 1 : 2 * n : 2] = x
        z[..., 2 * n + 1 :: 2] = x.flip(-1)
        y = torch.fft.rfft(z).real[..., :n]
        y[..., 0] /= 2**0.5
    elif type == 3:
        z = x.new_zeros(*x.shape[:-1], 4 * n)
        z[..., :n] = x
        z[..., 0] *= 2**0.5
        z[..., 3 * n + 1 :] = x[..., 1:].flip(-1)
        y = torch.fft.rfft(z).real[..., 1 : 2 * n : 2]
    else:
        z = x.new_zeros(*x.shape[:-1], 8 * n)
        z[..., 1 : 2 * n : 2] = x
        z[..., 6 * n + 1 :: 2] = x.flip(-1)
        y = torch.fft.rfft(z).real[..., 1 : 2 * n : 2]
    return y / (2 * n) ** 0.5


def reference(case: Case, x: Tensor) -> Tensor:
    x = x.double()
    for dim in _dims(case):
        rows = x.movedim(dim, -1)
        flat = rows.reshape(-1, rows.shape[-1])
        blocks = flat.split(max(1, (1 << 21) // flat.shape[-1]))
        done = torch.cat([_extension(block, case.options["type"]) for block in blocks])
        x = done.reshape(rows.shape).movedim(-1, dim)
    return x


def _dims(case: Case) -> list[int]:
    return [-1, -2] if case.op == "dctn" else [case.options.get("dim", -1)]


def _case(series: str, shape: tuple[int, ...], n: int, *, type: int = 2, dtype: str = "float32", **other: Any) -> Case:
    quick = other.pop("quick", False)
    op = other.pop("op", "dct")
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        n=n,
        series=series,
        bytes=2 * math.prod(shape) * torch.empty((), dtype=getattr(torch, dtype)).element_size(),
        tolerance=TOLERANCE[dtype],
        inputs=_inputs,
        reference=reference,
        options={"type": type, **other},
        quick=quick,
    )


def cases(device: str) -> Iterator[Case]:
    elements = 1 << 22 if device == "cpu" else 1 << 26

    def rows(n: int, dtype: str = "float32") -> tuple[int, int]:
        return max(1, elements // (2 if dtype == "float64" else 1) // n), n  # float64: as many bytes

    families = {"powers of two": POWERS, "smooth lengths": SMOOTH, "primes": PRIMES, "odd lengths": ODD}
    if device == "cuda":
        families["powers of two"] = [*POWERS, 16384, 32768]
    for series, lengths in families.items():
        for n in lengths:
            yield _case(series, rows(n), n, quick=n in QUICK.get(series, ()))
    for dtype in ("bfloat16", "float64"):
        for n in (64, 256, 1000, 1009, 1024, 4096) if device == "cpu" else (*POWERS[2:], 1000, 1009):
            yield _case(dtype, rows(n, dtype), n, dtype=dtype, quick=n == 256)
    for type, name in ((1, "type I"), (3, "type III"), (4, "type IV")):
        for n in (65, 257, 1001, 1025, 4097) if type == 1 else (64, 256, 1000, 1009, 1024, 4096):
            yield _case(name, rows(n), n, type=type, quick=n in (256, 257))
    for count in (1, 4):
        for n in (64, 256, 1009, 1024, 4096, 8192):
            yield _case(f"{count} row" + "s" * (count > 1), (count, n), n, quick=n == 1024)
    for n in (64, 256, 1000, 1024, 4096):
        yield _case("along the first dimension", (n, elements // n), n, dim=0, quick=n == 256)
    for n in (64, 128, 512):
        for type in (2, 3):
            yield _case("two dimensions", (elements // n**2, n, n), n, type=type, op="dctn", quick=(n, type) == (64, 2))


family = Family("dct", "Discrete cosine transforms", "N", cases, minutes=7)


# --- implementations ----------------------------------------------------------------------------------------------


@family.implementation("freqrank")
def _freqrank(case: Case, x: Tensor) -> Callable[[Tensor], Tensor]:
    type = case.options["type"]
    norm = norm_of(type)
    if case.op == "dctn":
        return lambda x: freqrank.dctn(x, type, dim=(-2, -1), norm=norm)
    dim = case.options.get("dim", -1)
    return lambda x: freqrank.dct(x, type, dim=dim, norm=norm)


def _in_float32(function: Callable[[Tensor], Tensor], case: Case) -> Callable[[Tensor], Tensor]:
    """For what knows no 16-bit type."""
    if case.torch_dtype.itemsize >= 4:
        return function
    return lambda x: function(x.float()).to(case.torch_dtype)


def _fastest(candidates: list[Callable[[Any], Any]], x: Any) -> Callable[[Any], Any]:
    def seconds(function: Callable[[Any], Any]) -> float:
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            function(x)
            times.append(time.perf_counter() - begin)
        return sorted(times)[5]

    return min(candidates, key=seconds)


def _as_numpy(x: Tensor) -> Any:
    return x.numpy() if x.dtype in (torch.float32, torch.float64) else x


@family.implementation("scipy.fft", needs=("scipy",), devices=("cpu",), convert=_as_numpy)
def _scipy(case: Case, x: Tensor) -> Callable[[Any], Any]:
    import scipy.fft

    type = case.options["type"]
    norm = norm_of(type)

    def transform(workers: int) -> Callable[[Any], Any]:
        if case.op == "dctn":
            function = lambda x: scipy.fft.dctn(x, type, axes=(-2, -1), norm=norm, workers=workers)  # noqa: E731
        else:
            dim = case.options.get("dim", -1)
            function = lambda x: scipy.fft.dct(x, type, axis=dim, norm=norm, workers=workers)  # noqa: E731
        if case.torch_dtype.itemsize >= 4:
            return function
        return lambda x: torch.from_numpy(function(x.float().numpy())).to(case.torch_dtype)

    threads = torch.get_num_threads()
    if x.numel() > SMALL or threads == 1:
        return transform(threads)
    return _fastest([transform(1), transform(threads)], _as_numpy(x))


@family.implementation("torch-dct", needs=("torch_dct",))
def _torch_dct(case: Case, x: Tensor) -> Callable[[Tensor], Tensor]:
    import torch_dct

    type = case.options["type"]
    if case.op == "dctn":
        functions = {2: torch_dct.dct_2d, 3: torch_dct.idct_2d}
    else:
        functions = {1: torch_dct.dct1, 2: torch_dct.dct, 3: torch_dct.idct}
    if type not in functions:
        raise NotApplicable("has types I to III only")
    if case.options.get("dim", -1) != -1:
        raise NotApplicable("transforms the last dimension only")
    if type == 1:
        return _in_float32(functions[1], case)
    return _in_float32(lambda x: functions[type](x, norm="ortho"), case)


@cache
def _matrix(type: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return dct_matrix(type, n, norm_of(type)).to(device, dtype)


@family.implementation("matmul, cached matrix")
def _matmul(case: Case, x: Tensor) -> Callable[[Tensor], Tensor]:
    limit = 1024 if x.device.type == "cpu" else 4096
    if case.n > limit:
        raise NotApplicable(f"is measured up to N = {limit}")
    matrix = _matrix(case.options["type"], case.n, x.dtype, x.device)
    out = torch.empty_like(x)
    if case.op == "dctn":
        middle = torch.empty_like(x)
        return lambda x: torch.matmul(matrix, torch.matmul(x, matrix.mT, out=middle), out=out)
    if case.options.get("dim", -1) == 0:
        return lambda x: torch.mm(matrix, x, out=out)
    return lambda x: torch.mm(x, matrix.mT, out=out)


def _fft_rows(type: int, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The transform of rows by a real Fourier transform of the same length (Makhoul 1980) between two gathers.

    Buffers, index lists and factors are made once. The gather before types II takes the samples in an order that
    conjugates the spectrum: then a second gather of real and imaginary parts yields all coefficients with their sign.
    """
    n, rows, device = x.shape[-1], x.shape[0], x.device
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    complex_dtype = torch.complex128 if wide == torch.float64 else torch.complex64
    i = torch.arange(n, device=device)

    def turns(angle: Tensor, scale: float) -> Tensor:  # angle in units of pi, float64
        return torch.polar(torch.full_like(angle, scale), torch.pi * angle).to(complex_dtype)

    if type == 1:
        mirrored = torch.cat([i, i[1:-1].flip(0)])
        buffer = torch.empty(rows, 2 * (n - 1), dtype=wide, device=device)
        return lambda x: torch.fft.rfft(torch.index_select(x, 1, mirrored, out=buffer)).real.contiguous()

    if type in (2, 3):
        order = torch.cat([i[::2], i[1::2].flip(0)])  # sample j of Makhoul's sequence
        k = torch.arange(n // 2 + 1, device=device, dtype=torch.float64)
        if type == 2:
            order = order[(-i) % n]
            factors = turns(k / (2 * n), 2 / (2 * n) ** 0.5)
            factors[0] /= 2**0.5
            parts = torch.where(i <= n // 2, 2 * i, 2 * (n - i) + 1)
            buffer = torch.empty(rows, n, dtype=wide, device=device)
            out = torch.empty(rows, n, dtype=wide, device=device)

            def forward(x: Tensor) -> Tensor:
                spectrum = torch.fft.rfft(torch.index_select(x, 1, order, out=buffer))
                spectrum *= factors
                return torch.index_select(torch.view_as_real(spectrum).flatten(1), 1, parts, out=out)

            return forward

        order = torch.argsort(order[(-i) % n])
        factors = turns(-k / (2 * n), (2 * n) ** 0.5 / 2)
        factors[0] *= 2**0.5
        j = torch.arange(n // 2 + 1, device=device)
        parts = torch.stack([j, (n - j) % n], 1).flatten()
        coefficients = torch.empty(rows, parts.numel(), dtype=wide, device=device)
        spectrum = torch.view_as_complex(coefficients.view(rows, -1, 2))
        out = torch.empty(rows, n, dtype=wide, device=device)

        def inverse(x: Tensor) -> Tensor:
            torch.index_select(x, 1, parts, out=coefficients)
            coefficients[:, 1] = 0
            spectrum.mul_(factors)
            return torch.index_select(torch.fft.irfft(spectrum, n), 1, order, out=out)

        return inverse

    if n % 2:
        raise NotApplicable("type IV is written for even lengths only")
    m = torch.arange(n // 2, device=device)
    pairs = torch.stack([2 * m, n - 1 - 2 * m], 1).flatten()
    before = turns(-(4 * m.double() + 1) / (4 * n), 2 / (2 * n) ** 0.5)
    # coefficient 2k is the real part of entry k, coefficient N - 1 - 2k the negated imaginary one
    after = turns(-m.double() / n, 1.0)
    order = torch.where(i % 2 == 0, i, n - i)
    signs = torch.where(i % 2 == 0, 1, -1).to(wide)
    packed = torch.empty(rows, n, dtype=wide, device=device)
    halves = torch.view_as_complex(packed.view(rows, -1, 2))
    out = torch.empty(rows, n, dtype=wide, device=device)

    def fourth(x: Tensor) -> Tensor:
        torch.index_select(x, 1, pairs, out=packed)
        spectrum = torch.fft.fft(halves.mul_(before))
        spectrum *= after
        return torch.index_select(torch.view_as_real(spectrum).flatten(1), 1, order, out=out).mul_(signs)

    return fourth


@family.implementation("torch.fft-built")
def _torch_fft(case: Case, x: Tensor) -> Callable[[Tensor], Tensor]:
    type, n = case.options["type"], case.n
    rows = x.reshape(-1, n)
    first = _fft_rows(type, rows)
    if case.op == "dctn":
        second = _fft_rows(type, rows)

        def both(x: Tensor) -> Tensor:
            y = first(x.view(-1, n)).view(case.shape)
            return second(y.mT.contiguous().view(-1, n)).view(case.shape).mT.contiguous()

        return _in_float32(both, case)
    if case.options.get("dim", -1) == 0:
        return _in_float32(lambda x: first(x.mT.contiguous()).mT.contiguous(), case)
    return _in_float32(first, case)


def _as_cupy(x: Tensor) -> Any:
    import cupy

    return x if x.dtype == torch.bfloat16 else cupy.from_dlpack(x)


@family.implementation("cupyx.scipy.fft", needs=("cupy", "cupyx"), devices=("cuda",), convert=_as_cupy)
def _cupyx(case: Case, x: Tensor) -> Callable[[Any], Any]:
    import cupyx.scipy.fft

    type = case.options["type"]
    if type not in (2, 3):
        raise NotApplicable("has types II and III only")
    if x.dtype in (torch.float16, torch.bfloat16):
        raise NotApplicable("has no 16-bit transforms")
    if case.op == "dctn":
        return lambda x: cupyx.scipy.fft.dctn(x, type, axes=(-2, -1), norm="ortho")
    dim = case.options.get("dim", -1)
    return lambda x: cupyx.scipy.fft.dct(x, type, axis=dim, norm="ortho")


def _hadamard_reference(case: Case, x: Tensor) -> Tensor:
    y = x.double()
    for stride in (1 << bit for bit in range(case.n.bit_length() - 1)):
        a, b = y.view(-1, case.n // (2 * stride), 2, stride).unbind(2)
        y = torch.stack([a + b, a - b], 2).view(case.shape)
    return y / case.n**0.5


# Another transform, as fast as one of this shape has been made: what a DCT's time should come close to.
@family.implementation(
    "fast-hadamard-transform", needs=("fast_hadamard_transform",), devices=("cuda",), reference=_hadamard_reference
)
def _hadamard(case: Case, x: Tensor) -> Callable[[Tensor], Tensor]:
    from fast_hadamard_transform import hadamard_transform

    if case.op == "dctn" or case.options.get("dim", -1) != -1 or case.options["type"] != 2:
        raise NotApplicable("transforms the last dimension only, and has one type")
    if case.n & (case.n - 1) or not 8 <= case.n <= 32768 or x.dtype == torch.float64:
        raise NotApplicable("takes powers of two from 8 to 32768, and no float64")
    scale = case.n**-0.5
    return lambda x: hadamard_transform(x, scale)
