"""Measurements of a device: its time, its memory, and what nvidia-smi reports."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(steps: Callable[[int], None], count: int, device: torch.device) -> float:
    """Return the seconds that `count` steps take, until the device has finished them."""
    synchronize(device)
    began = time.perf_counter()
    steps(count)
    synchronize(device)
    return time.perf_counter() - began


def used_mib(device: torch.device) -> float:
    """Return the MiB of the device's memory that tensors use now, and reset the peak."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.init()  # otherwise the next line fails for a device with a number
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**20


def peak_mib(device: torch.device) -> float:
    """Return the peak MiB of the device's memory that tensors used since `used_mib`."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0


def ask_nvidia_smi(*columns: str) -> subprocess.Popen[str] | None:
    """Start a query of nvidia-smi for these columns; None if there is no nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return None
    query = [f"--query-gpu={','.join(columns)}", "--format=csv,noheader,nounits"]
    return subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def read_answer(query: subprocess.Popen[str] | None, columns: Sequence[str]) -> dict[str, str]:
    """Return the answer of nvidia-smi by column; empty if it did not answer."""
    if query is None:
        return {}
    try:
        output = query.communicate(timeout=10)[0].strip()
    except subprocess.TimeoutExpired:
        query.kill()
        return {}
    values = [value.strip() for value in output.splitlines()[0].split(",")] if output else []
    return dict(zip(columns, values, strict=False))
