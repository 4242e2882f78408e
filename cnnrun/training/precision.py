"""The precision of a training: `auto` becomes bfloat16 where that is clearly faster for the network on this machine."""

from __future__ import annotations

import contextlib
import hashlib

import torch
from pydantic import TypeAdapter, ValidationError

from cnnrun.base.atomic_files import Folder, json_bytes, make_folder
from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.device import is_out_of_memory
from cnnrun.base.errors import UserError
from cnnrun.base.progress import say
from cnnrun.data.cache import user_cache_folder
from cnnrun.model.network import Network, materialize
from cnnrun.training.dtypes import Precision, has_bfloat16
from cnnrun.training.frozen_layers import set_training_mode
from cnnrun.training.step_time import StepSize, measure_seconds_per_image

_MIN_SPEEDUP = 1.15  # smaller gains are not worth the coarser numbers
_SERIAL_SHARE = 0.1  # of a step: it does not get faster with more threads
_STORED = "precisions.json"  # speedups by network, in the user's cache folder
_MAX_STORED_BYTES, _MAX_STORED = 1 << 20, 1000
_SPEEDUPS = TypeAdapter(dict[str, float])


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


def estimate_images_per_second(network: Network, step: StepSize) -> float:
    """Estimate the training speed on a machine that does nothing else, in the precision that `auto` chooses.

    It is measured in processor time, so other programs hardly change it. `network` must have memory.
    """
    exact, fast = _measure_precisions(network, step)
    seconds = fast if fast is not None and exact / fast >= _MIN_SPEEDUP else exact
    threads = torch.get_num_threads() if step.device.type == "cpu" else 1
    return threads / (1 + _SERIAL_SHARE * (threads - 1)) / seconds  # Amdahl's law


def _measure_speedup(network: Network, step: StepSize) -> float:
    """Return the time of a step in float32, divided by that in bfloat16; 0 if a layer cannot compute in bfloat16."""
    exact, fast = _measure_precisions(network, step)
    return exact / fast if fast is not None else 0.0


def _measure_precisions(network: Network, step: StepSize) -> tuple[float, float | None]:
    """Measure seconds per image in float32 and in bfloat16; None if device or a layer cannot compute in bfloat16."""
    if has_bfloat16(step.device):
        try:
            exact, fast = measure_seconds_per_image(network, step, ("float32", "bfloat16"))
            return exact, fast
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
    return measure_seconds_per_image(network, step, ("float32",))[0], None


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
