"""Measure resnet50's peak memory, compare it with `cnnrun plan`, and run a training that runs out of memory.

    python benchmarks/gpu/memory.py --device cuda

For the last one the process may use less of the GPU than the batch needs; on a CPU a hook raises the error.
"""

from __future__ import annotations

import contextlib
import gc
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Options, attempt, emit, parse_options, write_arrays

from cnnrun.base.device import reset_peak_memory
from cnnrun.experiment import assemble, config_file, schema
from cnnrun.results.studies import plan
from cnnrun.training.loop import fit

PRECISIONS = ("float32", "bfloat16")
PLAN_SECONDS = 2.0  # of training that a plan measures, instead of its eight
ENOUGH = 0.6  # share of the memory of the large batch that the process may use
_RESNET50 = """
task: classify
data: {{source: {{arrays: {path}}}, image: {{size: {side}, channels: 3}}}}
model: resnet50
train: {{epochs: 1, optimizer: {{sgd: {{lr: 0.001, momentum: 0.9}}}}, schedule: constant}}
"""


def main() -> None:
    """Measure the middle batch, run out of memory, plan; then measure the other batches."""
    options = parse_options(__doc__)
    (middle, *others), side = ((8, 4), 64) if options.is_small else ((128, 32, 256), 224)
    with tempfile.TemporaryDirectory(prefix="cnnrun-memory-") as name:
        folder = Path(name)
        path = write_arrays(folder / "pictures.npz", 3 * max(middle, *others), side, channels=3, classes=20)
        config = _RESNET50.format(path=path, side=side)
        peaks = {precision: measure_peak(config, precision, middle, options) for precision in PRECISIONS}
        with attempt("out_of_memory", seconds=options.seconds_left):
            run_out(options, folder)
        for precision in PRECISIONS:
            with attempt("plan", seconds=options.seconds_left, precision=precision):
                planned = planned_peak(parse_experiment(config, precision, middle), options.device, folder)
                emit("plan", precision=precision, batch=middle, planned_mib=planned, measured_mib=peaks[precision])
        for batch in others:
            for precision in PRECISIONS:
                measure_peak(config, precision, batch, options)


def measure_peak(config: str, precision: str, batch: int, options: Options) -> int | None:
    """Emit the peak of a short training in MiB, and return it."""
    about = {"net": "resnet50", "precision": precision, "batch": batch}
    with attempt("peak", seconds=options.seconds_left, **about):
        peak = train_epoch(parse_experiment(config, precision, batch), options.device)
        emit("peak", **about, mib=peak)
        return peak
    return None


def parse_experiment(config: str, precision: str, batch: int) -> schema.Experiment:
    """Return the experiment with this precision and batch."""
    return config_file.parse_config(
        config, "resnet50", ["name=resnet50", f"train.precision={precision}", f"train.batch={batch}"]
    )


def train_epoch(experiment: schema.Experiment, device: torch.device) -> int:
    """Train an epoch; returns the peak in MiB as the training reports it."""
    release_memory(device)
    setup = assemble.build_setup(experiment, assemble.prepare_dataset(experiment), None, device)
    return int(fit(setup)["peak_memory_mib"])


def release_memory(device: torch.device) -> None:
    """Release the device's cached memory and reset the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak_memory(device)


def planned_peak(experiment: schema.Experiment, device: torch.device, folder: Path) -> int:
    """Return the peak in MiB that `cnnrun plan` estimates, from a shorter training than usual."""
    release_memory(device)
    if hasattr(plan, "_MEASURED_SECONDS"):
        plan._MEASURED_SECONDS = PLAN_SECONDS
    return int(plan.plan_training(experiment, device, folder)["peak_memory_mib"])


def run_out(options: Options, folder: Path) -> None:
    """Train with a batch that does not fit; the training must continue with smaller micro-batches and say so."""
    batch = 32 if options.is_small else 4096
    path = write_arrays(folder / "few.npz", 2 * batch, 28)
    overrides = [f"data.source={{arrays: {path}}}", "data.image={size: 28, channels: 1}"]
    overrides += [f"train.batch={batch}", "train.epochs=2", "train.optimizer={sgd: {lr: 0.001}}"]
    experiment = config_file.read_config(ROOT / "benchmarks" / "nets" / "vgg-small.yaml", overrides)
    data = assemble.prepare_dataset(experiment)
    setup = assemble.build_setup(experiment, data, None, options.device)
    if options.device.type == "cuda":
        release_memory(options.device)
        fit(setup)
        setup = assemble.build_setup(experiment, data, None, options.device)
    stderr = io.StringIO()
    with short_of_memory(setup, options.device, batch), contextlib.redirect_stderr(stderr):
        result = fit(setup)
    print(stderr.getvalue())
    lines = [line for line in stderr.getvalue().splitlines() if "micro-batches" in line]
    is_ok = bool(lines) and result["steps"] == 4
    reason = f"{result['steps']} of 4 steps, messages about memory: {lines or 'none'}"
    emit("out_of_memory", batch=batch, ok=is_ok, said=lines, peak_mib=result["peak_memory_mib"], reason=reason)


@contextmanager
def short_of_memory(setup: Any, device: torch.device, batch: int) -> Iterator[None]:
    """Make a batch too large in the block, but not a half or a quarter of it."""
    if device.type != "cuda":

        def refuse(module: Any, inputs: Any) -> None:
            if len(inputs[0]) > batch // 4:
                raise torch.OutOfMemoryError("CUDA out of memory (rehearsed)")

        with setup.network.register_forward_pre_hook(refuse):
            yield
        return
    peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(ENOUGH * peak / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


if __name__ == "__main__":
    main()
