"""The precision of a training: `auto` becomes bfloat16 where that is clearly faster for the network on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from cnnrun.base.atomic_files import Folder, json_bytes, make_folder
from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.device import is_out_of_memory
from cnnrun.base.errors import UserError
from cnnrun.base.progress import say
from cnnrun.contracts.layer import Shape
from cnnrun.data.cache import user_cache_folder
from cnnrun.model.network import Network, materialize
from cnnrun.training.frozen_layers import set_training_mode

Precision = Literal["auto", "float32", "bfloat16", "float16"]
# `auto` is float32 until `choose_precision` has measured.
DTYPES = {
    "auto": torch.float32,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_MIN_SPEEDUP = 1.15  # smaller gains are not worth the coarser numbers
_STEP_SECONDS = 0.05  # a measured step has as many images as take about this long
_FIRST_IMAGES, _ROUNDS = 4, 5
_STORED = "precisions.json"  # speedups by network, in the user's cache folder
_MAX_STORED_BYTES, _MAX_STORED = 1 << 20, 1000
_SPEEDUPS = TypeAdapter(dict[str, float])


@dataclass(frozen=True)
class StepSize:
    """A training step's input: images of `shape` per micro-batch, and the device that computes it."""

    images: int
    shape: Shape
    device: torch.device


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Context that computes in a precision on a device."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=DTYPES[precision] != torch.float32)


def choose_precision(network: Network, frozen_until: str | None, step: StepSize) -> Precision:
    """Choose bfloat16 if the device computes in it and it is at least 1.15 times as fast, else float32; says which.

    `network` has no memory yet, and is used up. The speedup is measured once for a network on a machine and stored in
    the user's cache folder, so that a repeated training computes in the same precision.
    """
    if not has_bfloat16(step.device):
        say(f"precision: float32 ({step.device.type} does not compute in bfloat16)")
        return "float32"
    key = _network_key(network, frozen_until, step)
    stored = _read_speedups()
    if (speedup := stored.get(key)) is None:
        network = materialize(network, 0).to(step.device).to(memory_format=torch.channels_last)
        set_training_mode(network, frozen_until)
        speedup = _measure_speedup(network, step)
        _store_speedups({**stored, key: round(speedup, 3)})
    chosen: Precision = "bfloat16" if speedup >= _MIN_SPEEDUP else "float32"
    say(f"precision: {chosen} (bfloat16 is {speedup:.2f} times as fast as float32 here)")
    return chosen


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    features = torch.cpu.get_capabilities()
    return any(bool(features.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is Arm's


def _measure_speedup(network: Network, step: StepSize) -> float:
    """Return the time of a step in float32, divided by that in bfloat16; 0 if a layer cannot compute in bfloat16."""
    with _one_thread():
        images = _images(min(step.images, _FIRST_IMAGES), step)
        _time_step(network, images, step.device, "float32")
        affordable = int(len(images) * _STEP_SECONDS / _time_step(network, images, step.device, "float32"))
        images = _images(max(len(images), min(step.images, affordable)), step)
        times: dict[Precision, list[float]] = {"float32": [], "bfloat16": []}
        try:
            for _ in range(1 + _ROUNDS):
                for precision, seconds in times.items():
                    seconds.append(_time_step(network, images, step.device, precision))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return 0.0
        return min(times["float32"][1:]) / min(times["bfloat16"][1:])  # the first round warms up


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Context in which PyTorch uses one thread, whose processor time does not depend on other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _images(count: int, step: StepSize) -> Tensor:
    values = torch.arange(count * math.prod(step.shape)).remainder_(256).float()
    return values.view(count, *step.shape).to(step.device).contiguous(memory_format=torch.channels_last)


def _time_step(network: Network, images: Tensor, device: torch.device, precision: Precision) -> float:
    """Seconds for a forward and a backward pass: of the processor on a CPU, of the clock on another device."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    _wait_for_gpu(device)
    start = clock()
    with autocast(device, precision):
        outputs = network(images)
    outputs.float().square().mean().backward()
    network.zero_grad()
    _wait_for_gpu(device)
    return clock() - start


def _wait_for_gpu(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _network_key(network: Network, frozen_until: str | None, step: StepSize) -> str:
    """Digest of everything that the speedup depends on: the network, the step's size, the device and PyTorch."""
    device = torch.cuda.get_device_name(step.device) if step.device.type == "cuda" else torch.cpu.get_capabilities()
    parts = (repr(network), frozen_until, step.images, step.shape, device, torch.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _read_speedups() -> dict[str, float]:
    """Read the stored speedups; none if there is no cache folder or the file is damaged: they are measured again."""
    folder = user_cache_folder()
    if folder is None or not (folder / _STORED).exists():
        return {}
    try:
        data = read_bytes(folder / _STORED, UserError, _MAX_STORED_BYTES, Folder(folder))
        return _SPEEDUPS.validate_json(data)
    except (UserError, ValidationError, OSError):
        return {}


def _store_speedups(speedups: dict[str, float]) -> None:
    """Store the newest speedups; a folder that cannot be written only means that they are measured again."""
    newest = dict(list(speedups.items())[-_MAX_STORED:])
    with contextlib.suppress(OSError, UserError):
        if folder := user_cache_folder():
            make_folder(folder)
            Folder(folder).replace(_STORED, json_bytes(newest))
