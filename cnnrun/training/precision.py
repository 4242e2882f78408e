"""The precision of a training: `auto` becomes bfloat16 where that is clearly faster for the network on this machine."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import replace

import torch
from pydantic import TypeAdapter, ValidationError

from cnnrun.base.atomic_files import Folder, json_bytes, make_folder
from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.errors import UserError, first_line
from cnnrun.base.progress import say
from cnnrun.data.cache import user_cache_folder
from cnnrun.model.network import Network, materialize
from cnnrun.training.dtypes import Precision, has_bfloat16
from cnnrun.training.frozen_layers import feature_shape, separate_trunk, set_training_mode
from cnnrun.training.step_time import StepSize, measure_seconds_per_image, thread_speedup

_MIN_SPEEDUP = 1.15  # smaller gains are not worth the coarser numbers
_SPEEDUPS_FILE = "precisions.json"  # speedups by network, in the user's cache folder
_MAX_FILE_BYTES, _MAX_SPEEDUPS = 1 << 20, 1000
_SPEEDUPS = TypeAdapter(dict[str, float])


def choose_precision(
    network: Network, frozen_until: str | None, step: StepSize, stores_features: bool = False
) -> Precision:
    """Choose bfloat16 if the device computes in it and it is at least 1.15 times as fast, else float32, and print it.

    `network` must be on the meta device; do not use it afterwards. With `stores_features` the training computes the
    features of the frozen layers once, so only the layers behind them are measured. The speedup is measured once for
    a network on a machine and stored in the user's cache folder, so that a repeated training computes in the same
    precision. If it cannot be measured (a layer cannot compute in bfloat16, or memory runs out), the choice is float32.
    """
    if not has_bfloat16(step.device):
        say(f"precision: float32 ({step.device.type} does not compute in bfloat16)")
        return "float32"
    key = _network_key(network, (frozen_until, stores_features), step)
    stored = _read_speedups()
    if (speedup := stored.get(key)) is None:
        try:
            network = materialize(network, 0).to(step.device).to(memory_format=torch.channels_last)
            set_training_mode(network, frozen_until)
            if frozen_until and stores_features:
                network, step = _after_frozen_layers(network, frozen_until, step)
            speedup = _measure_speedup(network, step)
        except (RuntimeError, ValueError, MemoryError) as error:
            say(f"precision: float32 (bfloat16 cannot be measured: {first_line(error)})")
            return "float32"
        finally:
            _forget_measurement(step.device)
        _store_speedups({**_read_speedups(), key: round(speedup, 3)})
    chosen: Precision = "bfloat16" if speedup >= _MIN_SPEEDUP else "float32"
    say(f"precision: {chosen} (bfloat16 is {speedup:.2f} times as fast as float32 here)")
    return chosen


def estimate_images_per_second(network: Network, step: StepSize) -> float:
    """Estimate the training speed on a machine that does nothing else, in the precision that `auto` chooses.

    It is measured in processor time, so other programs hardly change it. `network` must have memory.
    """
    precisions: tuple[Precision, ...] = ("float32", "bfloat16") if has_bfloat16(step.device) else ("float32",)
    float32_seconds, *others = measure_seconds_per_image(network, step, precisions)
    chosen = [seconds for seconds in others if float32_seconds / seconds >= _MIN_SPEEDUP]
    threads = torch.get_num_threads() if step.device.type == "cpu" else 1
    return thread_speedup(threads) / min([float32_seconds, *chosen])


def _after_frozen_layers(network: Network, until: str, step: StepSize) -> tuple[Network, StepSize]:
    """The layers behind the frozen ones, and a step that begins with the features of the frozen ones."""
    parts = separate_trunk(network, until)
    assert parts is not None, "features are stored only where the layers can be separated"
    trunk, rest = parts
    return rest, replace(step, shape=feature_shape(trunk, step.shape))


def _measure_speedup(network: Network, step: StepSize) -> float:
    """Return the time of a step in float32, divided by that in bfloat16. Raises what a layer or the device raises."""
    float32_seconds, bfloat16_seconds = measure_seconds_per_image(network, step, ("float32", "bfloat16"))
    return float32_seconds / bfloat16_seconds


def _forget_measurement(device: torch.device) -> None:
    """Return a GPU's memory, so that neither the training nor its peak memory knows of the measurement."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _network_key(network: Network, frozen: tuple[str | None, bool], step: StepSize) -> str:
    """Digest of everything that the speedup depends on: the network, the step's size, the device and PyTorch."""
    device = torch.cuda.get_device_name(step.device) if step.device.type == "cuda" else torch.cpu.get_capabilities()
    parts = (repr(network), frozen, step.images, step.shape, device, torch.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _read_speedups() -> dict[str, float]:
    """Read the stored speedups; none if there is no cache folder or the file is damaged: they are measured again."""
    folder = user_cache_folder()
    if folder is None or not (folder / _SPEEDUPS_FILE).exists():
        return {}
    try:
        data = read_bytes(folder / _SPEEDUPS_FILE, UserError, _MAX_FILE_BYTES, Folder(folder))
        return _SPEEDUPS.validate_json(data)
    except (UserError, ValidationError, OSError):
        return {}


def _store_speedups(speedups: dict[str, float]) -> None:
    """Store the newest speedups; a folder that cannot be written only means that they are measured again."""
    newest = dict(list(speedups.items())[-_MAX_SPEEDUPS:])
    with contextlib.suppress(OSError, UserError):
        if folder := user_cache_folder():
            make_folder(folder)
            Folder(folder).replace(_SPEEDUPS_FILE, json_bytes(newest))
