"""The device on which the network runs, its memory, and its failures."""

from __future__ import annotations

import contextlib
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
from cnnrun.base.counts import format_count
from cnnrun.base.errors import ConfigError, ResourceError
from cnnrun.base.progress import say

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def choose_device(name: str) -> torch.device:
    """Return the device for `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.

    Under torchrun, `cuda` is the GPU with the process's local rank. A chosen GPU becomes the process's current device,
    so that streams, events and pinned memory without a device belong to it. Raises ConfigError if the name is wrong
    and ResourceError if there is no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.version.cuda and _NVIDIA_DRIVER.exists():
            say("PyTorch finds no GPU although an NVIDIA driver is installed (it may be too old); running on the CPU")
    if is_distributed := torchrun.world_size() > 1:
        name = f"cuda:{torchrun.local_rank()}" if name == "cuda" else name
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise ConfigError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device(name)
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise ResourceError(f"--device {name}: {_missing_gpu_reason(count, is_distributed)}")
    torch.cuda.set_device(int(index or 0))
    return torch.device("cuda", int(index or 0))


def _missing_gpu_reason(count: int, is_distributed: bool) -> str:
    """Reason that there is no such GPU, and what to do."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch was built without CUDA; install a build with CUDA, or use --device cpu"
    fix = "start no more processes than it has" if is_distributed and count else "use --device cpu"
    return f"this machine has {format_count(count, 'CUDA device')}; {fix}"


def tensor_on(device: torch.device, values: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
    """Copy values to a tensor on a device, without waiting for the GPU as `torch.tensor(values, device=...)` does."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


# Messages of libraries whose error type does not say that memory ran out: PyTorch (Linux, Windows, CUDA, MPS), CUDA's
# libraries, C++, numpy, mmap, the C library. oneDNN's ("could not ...") may have another cause, so a caller that stops
# because of one also shows the error.
_OUT_OF_MEMORY_WORDS = (
    *("out of memory", "out_of_memory", "outofmemory", "can't allocate memory", "cannot allocate memory"),
    *("not enough memory", "alloc_failed", "failed to allocate", "unable to allocate", "bad_alloc", "bad allocation"),
    *("could not create a primitive", "could not execute a primitive", "could not create a memory"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out on the host or a device, by its type or its message."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError | OSError):
        return False
    text = str(error).lower()
    return any(words in text for words in _OUT_OF_MEMORY_WORDS)


# Messages of CUDA when the GPU or its driver fails, which no program can repair.
_GPU_FAILURE_WORDS = (
    *("uncorrectable ecc", "hardware stack error", "unspecified launch failure", "unknown error", "has fallen off"),
    *("no kernel image is available", "driver version is insufficient", "driver on your system is too old"),
    *("busy or unavailable", "system not yet initialized", "found no nvidia driver"),
)


def is_gpu_broken(error: BaseException) -> bool:
    """Return whether an error comes from a failing GPU or driver, by its message."""
    text = str(error).lower()
    names_gpu = "cuda" in text or "nvidia" in text
    return isinstance(error, RuntimeError) and names_gpu and any(words in text for words in _GPU_FAILURE_WORDS)


def reset_peak_memory(device: torch.device) -> None:
    """Restart the measurement of peak memory, as far as the system allows."""
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def peak_memory_mib(device: torch.device) -> int:
    """Peak memory of this process in MiB: of the GPU if `device` is one, else of the host."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    try:
        (kib,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except (OSError, ValueError):  # not on Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / (2**20 if sys.platform == "darwin" else 2**10))  # bytes on macOS, KiB elsewhere
    return round(int(kib) / 2**10)
