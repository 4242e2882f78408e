"""What is measured of a device: its time, its memory, what nvidia-smi says of it."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence

import torch


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(steps: Callable[[int], None], count: int, device: torch.device) -> float:
    """Return the seconds of some steps, to the end of what the device does for them."""
    synchronize(device)
    began = time.perf_counter()
    steps(count)
    synchronize(device)
    return time.perf_counter() - began


def used_mib(device: torch.device) -> float:
    """Return MiB of the device's memory that tensors hold now; from here on the peak is counted anew."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.init()  # without which the next line is refused for a device with a number
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**20


def peak_mib(device: torch.device) -> float:
    """Return the most MiB of the device's memory that tensors held since `used_mib`."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0


def ask_nvidia_smi(*columns: str) -> subprocess.Popen[str] | None:
    """Start asking nvidia-smi for columns; None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    query = [f"--query-gpu={','.join(columns)}", "--format=csv,noheader,nounits"]
    return subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def answer(asked: subprocess.Popen[str] | None, columns: Sequence[str]) -> dict[str, str]:
    """Return what nvidia-smi said, by column; nothing where it did not answer."""
    if asked is None:
        return {}
    try:
        said = asked.communicate(timeout=10)[0].strip()
    except subprocess.TimeoutExpired:
        asked.kill()
        return {}
    values = [each.strip() for each in said.splitlines()[0].split(",")] if said else []
    return dict(zip(columns, values, strict=False))
