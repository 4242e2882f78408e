"""Measured time of a network's training step, in processor time: other programs hardly affect it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnnrun.contracts.layer import Shape
from cnnrun.training.dtypes import Precision, autocast

_WANTED_SECONDS = 0.05  # target duration of a measured step, which sets its number of images
_FIRST_IMAGES = 2  # batch norm needs two
_ROUNDS = 5
_SERIAL_SHARE = 0.1  # of a step: it does not get faster with more threads


@dataclass(frozen=True)
class StepSize:
    """A training step's input: images per micro-batch, the shape of each or of its features, and the device."""

    images: int
    shape: Shape
    device: torch.device


def measure_seconds_per_image(network: nn.Module, step: StepSize, precisions: tuple[Precision, ...]) -> list[float]:
    """Measure forward and backward pass in each precision; returns seconds per image.

    They are the shortest of five rounds, or those of a single one if a step of two images takes longer than 0.05 s.
    On a CPU it is the processor time of one thread: with several, other programs would make them wait for each other.
    """
    with one_thread():
        images = _images(_FIRST_IMAGES, step)
        _time_step(network, images, step.device, "float32")
        first_seconds = _time_step(network, images, step.device, "float32")
        affordable = int(_FIRST_IMAGES * _WANTED_SECONDS / first_seconds)
        images = _images(max(_FIRST_IMAGES, min(step.images, affordable)), step)
        round_count = _ROUNDS if first_seconds <= _WANTED_SECONDS else 1
        rounds = [
            [_time_step(network, images, step.device, precision) for precision in precisions]
            for _ in range(1 + round_count)  # the first warms up
        ]
        return [min(seconds) / len(images) for seconds in zip(*rounds[1:], strict=True)]


def thread_speedup(threads: int) -> float:
    """Estimate how many times as fast as one thread `threads` threads are, by Amdahl's law."""
    return threads / (1 + _SERIAL_SHARE * (threads - 1))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread. Several would wait for each other, and the longer the more other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _images(count: int, step: StepSize) -> Tensor:
    values = torch.arange(count * math.prod(step.shape)).remainder_(256).float()
    images = values.view(count, *step.shape).to(step.device)
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def _time_step(network: nn.Module, images: Tensor, device: torch.device, precision: Precision) -> float:
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
