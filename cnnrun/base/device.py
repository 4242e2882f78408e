"""Where the network runs, and how the process is set up for it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnrun.base import torchrun
from cnnrun.base.errors import ConfigError, ResourceError
from cnnrun.base.progress import say

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def choose_device(name: str) -> torch.device:
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:1`. Raises ConfigError or ResourceError.

    Of the processes that torchrun starts on a host, each takes the GPU of its number there. A GPU that is chosen is the
    process's current one: streams, events and pinned memory that name no device belong to it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.version.cuda and _NVIDIA_DRIVER.exists():
            say("PyTorch sees no GPU, but a driver of NVIDIA's is there (too old for it?); the processor computes")
    if several := torchrun.world_size() > 1:
        name = f"cuda:{torchrun.local_rank()}" if name == "cuda" else name
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()) or (kind == "cpu" and number):
        raise ConfigError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device(name)
    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        raise ResourceError(f"--device {name}: {_why_missing(count, several)}")
    torch.cuda.set_device(int(number or 0))
    return torch.device("cuda", int(number or 0))


def _why_missing(count: int, several: bool) -> str:
    """Return why there is no such GPU, and what to do."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch was built without CUDA; install one with it, or use --device cpu"
    fix = "start no more processes than it has" if several and count else "use --device cpu"
    return f"this machine has {count} CUDA device(s); {fix}"


def tensor_on(device: torch.device, values: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
    """`torch.tensor(values)` on a device. Unlike with `device=`, the host does not wait until a GPU has got there."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


# What libraries say when memory runs out, where the type of their error does not: PyTorch's allocators (Linux, Windows,
# CUDA, MPS), CUDA's libraries, C++, numpy, mmap, the C library. oneDNN says only what it could not do, so these two may
# mean something else; whoever gives up says what the error was.
_OUT_OF_MEMORY = (
    *("out of memory", "out_of_memory", "outofmemory", "can't allocate memory", "cannot allocate memory"),
    *("not enough memory", "alloc_failed", "failed to allocate", "unable to allocate", "bad_alloc", "bad allocation"),
    *("could not create a primitive", "could not execute a primitive", "could not create a memory"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device: by the error's type, or by what it says."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError | OSError):
        return False
    text = str(error).lower()
    return any(words in text for words in _OUT_OF_MEMORY)


# What CUDA says where the GPU or its driver fails, and no program can help it.
_BROKEN = (
    *("uncorrectable ecc", "hardware stack error", "unspecified launch failure", "unknown error", "has fallen off"),
    *("no kernel image is available", "driver version is insufficient", "driver on your system is too old"),
    *("busy or unavailable", "system not yet initialized", "found no nvidia driver"),
)


def is_gpu_broken(error: BaseException) -> bool:
    """Return whether an error is the GPU's or its driver's, by what it says."""
    text = str(error).lower()
    of_gpu = "cuda" in text or "nvidia" in text
    return isinstance(error, RuntimeError) and of_gpu and any(words in text for words in _BROKEN)


def reset_peak_memory(device: torch.device) -> None:
    """From here on the peak is counted anew, as far as the system lets one."""
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def peak_memory_mib(device: torch.device) -> int:
    """The most memory that this process has had: of the GPU where the network is on one, else of the host."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    try:
        (kib,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except (OSError, ValueError):  # no Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / (2**20 if sys.platform == "darwin" else 2**10))  # bytes there, KiB elsewhere
    return round(int(kib) / 2**10)


def keep_freed_memory() -> None:
    """Tell the C library to keep freed memory for the next step instead of handing it back to the kernel.

    A training step frees and takes the same large tensors again and again; by default glibc returns each to the
    kernel, which then clears every page anew. Measured on 2 cores (benchmarks/README.md): lenet's bare loop 12,200 ->
    19,400 images/s, vgg-small's 1,130 -> 1,340. Peak memory grows by some per cent, being what the step needs anyway.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in other C libraries (musl)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    mallopt(_M_TOP_PAD, 64 << 20)
