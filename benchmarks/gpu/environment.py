"""Describe the machine: its GPU and driver, versions, and its speed of copying and multiplying.

python benchmarks/gpu/environment.py --device cuda
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from common import ROOT, Options, attempt, emit, parse_options
from devices import ask_nvidia_smi, read_answer, timed
from packages import requirements

_SMI = ("driver_version", "memory.total", "power.limit", "clocks.max.sm", "mig.mode.current")
_ROUNDS = 5


def main() -> None:
    """Emit the facts that are known at once first, and measurements that take seconds last."""
    options = parse_options(__doc__)
    with attempt("software"):
        software()
    with attempt("device"):
        device(options)
    with attempt("copy"):
        copy_speed(options)
    for dtype, is_tf32 in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
        with attempt("matmul", dtype=str(dtype), tf32=is_tf32):
            multiply_speed(options, dtype, is_tf32)
    with attempt("compile", seconds=max(1.0, options.seconds_left)):
        compiles(options)


def software() -> None:
    """Emit the versions of Python, torch and what cnnrun depends on."""
    emit(
        "software",
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda or "none",
        cudnn=torch.backends.cudnn.version() or "none",
        nccl=".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none",
        cpus=os.cpu_count() or 0,
        threads=torch.get_num_threads(),
        compiler=shutil.which("g++") or shutil.which("gcc") or "none",
    )
    names = [requirement.name for requirement in requirements(ROOT / "pyproject.toml")]
    emit("packages", **{name: _version(name) for name in [*names, "numpy", "triton"]})


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not there"


def device(options: Options) -> None:
    """Emit the GPU's name, memory, capability and driver."""
    if options.device.type != "cuda":
        emit("device", name=platform.processor() or platform.machine(), cpu=torch.backends.cpu.get_cpu_capability())
        return
    properties = torch.cuda.get_device_properties(options.device)
    emit(
        "device",
        name=properties.name,
        gib=properties.total_memory / 2**30,
        capability=f"{properties.major}.{properties.minor}",
        processors=properties.multi_processor_count,
        bf16=torch.cuda.is_bf16_supported(),
        **{name.replace(".", "_"): value for name, value in read_answer(ask_nvidia_smi(*_SMI), _SMI).items()},
    )


def copy_speed(options: Options) -> None:
    """Emit the GB/s of a copy within the device's memory, counting the bytes read and written."""
    size = 2**22 if options.is_small else 2**30
    source = torch.zeros(size, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    emit("copy", mib=size / 2**20, gb_per_s=2 * size / _best_seconds(options, lambda: target.copy_(source)) / 1e9)


def multiply_speed(options: Options, dtype: torch.dtype, is_tf32: bool) -> None:
    """Emit the TFLOP/s of a product of two random square matrices."""
    side = 256 if options.is_small else 8192
    left, right = (torch.randn(side, side, dtype=dtype, device=options.device) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = is_tf32
    try:
        seconds = _best_seconds(options, lambda: left @ right)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    emit("matmul", dtype=str(dtype), tf32=is_tf32, side=side, tflops=2 * side**3 / seconds / 1e12)


def compiles(options: Options) -> None:
    """Emit whether torch.compile gives the eager result, and how long its first call takes."""
    inputs = torch.randn(64, 64, device=options.device)
    began = time.perf_counter()
    compiled = torch.compile(_fused)(inputs)
    took = time.perf_counter() - began
    gap = float((compiled - _fused(inputs)).abs().max())
    emit("compile", ok=gap < 1e-4, reason=f"differs from eager by {gap:g}", took=took)


def _fused(values: torch.Tensor) -> torch.Tensor:
    return torch.relu(values * 2 + 1).sum(1)


def _best_seconds(options: Options, work: Callable[[], object]) -> float:
    """Return the shortest time of some calls, after two to warm up."""
    times = [timed(lambda _: work(), 1, options.device) for _ in range(_ROUNDS + 2)]
    return min(times[2:])


if __name__ == "__main__":
    main()
