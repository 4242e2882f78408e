"""Compare the training speed of cnnrun's own steps with a bare loop over the same network, interleaved.

    python benchmarks/gpu/speed.py --device cuda

The side `cnnrun` runs the steps of `loop.fit` (`Training.compute_gradients` and `update_weights`: data,
augmentation, checks, averages, reading of losses). `free` does the same with `train.deterministic: false`. `bare` is
a loop as one would write it by hand: the same network, criterion and optimizer, autocast, channels_last and compile,
the fastest kernels that cuDNN finds, on a few batches on the device, without augmentation, checks and average of the
weights. Results are images/s, medians of the rounds.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Options, attempt, emit, parse_options, start_training, write_arrays
from devices import ask_nvidia_smi, peak_mib, read_answer, timed, used_mib

from cnnrun.base.progress import Clock
from cnnrun.data.augment.settings import Augment
from cnnrun.experiment import assemble, config_file, schema
from cnnrun.training.determinism import deterministic_kernels
from cnnrun.training.learner import Learner

NETS = {"vgg-small": 28, "resnet50": 224, "resnet18": 32, "lenet": 28, "digit-scenes": 96}
FACTOR = 0.05  # of the peak learning rate, so that training on random images does not diverge
WARM_UP = 6  # steps before anything is timed
BATCHES = 4  # of the bare loop, and the minimum number of steps in a round
_SMI = ("power.draw", "clocks.sm", "temperature.gpu", "memory.used")
_RESNET50 = """
task: classify
data:
  source: {{arrays: {path}}}
  image: {{size: {side}, channels: 3}}
  augment: {{flip: horizontal}}
  cache: disk
  cache_dir: {cache}
model: resnet50
train: {{batch: 128, optimizer: {{sgd: {{lr: 0.1, momentum: 0.9, nesterov: true}}}}, schedule: constant}}
"""


def main() -> None:
    """Measure every network in float32 and bfloat16, then compiled, as far as time allows."""
    options = parse_options(__doc__)
    data: dict[str, tuple[schema.Experiment, Any]] = {}
    cases = [(name, precision, False) for name in NETS for precision in ("float32", "bfloat16")]
    compiled = ["lenet"] if options.is_small else NETS
    cases += [(name, precision, True) for precision in ("bfloat16", "float32") for name in compiled]
    with tempfile.TemporaryDirectory(prefix="cnnrun-speed-") as folder:
        for name, precision, is_compiled in cases:
            limit = min(options.seconds_left, 60.0 if is_compiled else 20.0)
            about = {"net": name, "precision": precision, "compile": is_compiled}
            with attempt("speed", seconds=limit, **about):
                torch.compiler.reset()
                if name not in data:
                    data[name] = prepare_data(name, options, Path(folder))
                emit("speed", **about, **measure(*data[name], about, options))
            if options.device.type == "cuda":
                torch.cuda.empty_cache()


def prepare_data(name: str, options: Options, folder: Path) -> tuple[schema.Experiment, Any]:
    """Return a network's experiment on synthetic images, and its decoded data."""
    side = 64 if options.is_small and name == "resnet50" else NETS[name]
    small = ["train.batch=8"] if options.is_small and name.startswith("resnet") else []
    if name == "digit-scenes":
        sizes = ["data.source={digit_scenes: {train: 64, held_out: 16}}"] if options.is_small else []
        experiment = config_file.read_config(ROOT / "configs" / "digit-scenes.yaml", sizes)
    elif name == "resnet50":  # images a little larger than the input, so that they are resized into cnnrun's cache
        path = write_arrays(
            folder / "resnet50.npz", 64 if options.is_small else 1024, side + 16, channels=3, classes=50
        )
        experiment = config_file.parse_config(
            _RESNET50.format(path=path, side=side, cache=folder / "cache"), name, small
        )
    else:
        path = write_arrays(folder / f"{name}.npz", 256 if options.is_small else 12_800, side)
        overrides = [f"data.source={{arrays: {path}}}", f"data.image={{size: {side}, channels: 1}}", *small]
        experiment = config_file.read_config(ROOT / "benchmarks" / "nets" / f"{name}.yaml", overrides)
    return experiment, assemble.prepare_dataset(experiment)


def measure(experiment: schema.Experiment, data: Any, about: dict[str, Any], options: Options) -> dict[str, Any]:
    """Return the images/s of each side, their ratio, and the state of the GPU during training."""
    settings = {"precision": about["precision"], "compile": about["compile"]}
    figures: dict[str, Any] = {"batch": experiment.train.batch}
    with ExitStack() as stack:

        def build(*, deterministic: bool) -> Any:
            spec = experiment.train.model_copy(update={**settings, "deterministic": deterministic})
            return assemble.build_setup(experiment.model_copy(update={"train": spec}), data, None, options.device)

        before = used_mib(options.device)
        training = stack.enter_context(start_training(build(deterministic=True)))
        sides = {"cnnrun": with_kernels(partial(run_own_steps, training), options.device, deterministic=True)}
        sides["cnnrun"](WARM_UP)
        figures["mib"] = peak_mib(options.device) - before
        if not about["compile"]:
            free = stack.enter_context(start_training(build(deterministic=False)))
            sides["free"] = with_kernels(partial(run_own_steps, free), options.device, deterministic=False)
            sides["free"](WARM_UP)
        before = used_mib(options.device)
        sides["bare"] = with_kernels(build_bare_steps(build(deterministic=False)), options.device, deterministic=False)
        sides["bare"](WARM_UP)
        figures["bare_mib"] = peak_mib(options.device) - before
        speeds, waits = run_rounds(sides, training, options)
        figures |= summarize_speeds(speeds) | {"wait": statistics.median(waits), "n": len(waits)}
        figures |= {key.replace(".", "_"): value for key, value in watch_gpu(sides["cnnrun"]).items()}
    return figures


def with_kernels(steps: Callable[[int], None], device: torch.device, *, deterministic: bool) -> Callable[[int], None]:
    """Return the steps as they run with deterministic kernels, or with the fastest."""

    def run(count: int) -> None:
        with deterministic_kernels(device, deterministic):
            steps(count)

    return run


def run_own_steps(training: Any, count: int) -> None:
    """Run steps as `loop.fit` does."""
    for _ in range(count):
        training.learner.criterion.set_progress(1.0)
        batch = training.compute_gradients()
        training.learner.update_weights(training.state.step, FACTOR)
        training.state.step += 1
        training.clock.images += batch.global_size
    training.loss_monitor.read_pending()


def build_bare_steps(setup: Any) -> Callable[[int], None]:
    """Return a hand-written training loop over batches that are on the device already."""
    learner = Learner(setup)
    source = replace(setup, augment=Augment()).batches(1)
    batches = [source.at(step) for step in range(min(BATCHES, source.steps_per_epoch))]
    source.close()
    ready = [(batch.images.contiguous(memory_format=torch.channels_last), batch.targets) for batch in batches]
    for group in learner.optimizer.param_groups:
        group["lr"] = group["peak"] * FACTOR

    def steps(count: int) -> None:
        for number in range(count):
            images, targets = ready[number % len(ready)]
            with learner.autocast():
                outputs = learner.forward(images)
            sum(learner.criterion(outputs.float(), targets).values()).backward()
            learner.optimizer.step()
            learner.optimizer.zero_grad()

    return steps


def run_rounds(
    sides: dict[str, Callable[[int], None]], training: Any, options: Options
) -> tuple[dict[str, list[float]], list[float]]:
    """Run the sides in turn; returns the images/s of each by round, and cnnrun's shares of time waiting for data."""
    count, batch = count_steps_of_a_round(sides["bare"], options), training.setup.spec.batch
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    waits = []
    for _ in range(3 if options.is_small else 5):
        for name, steps in sides.items():
            training.clock = Clock()
            speeds[name].append(count * batch / timed(steps, count, options.device))
            if name == "cnnrun":
                waits.append(training.clock.data_wait_share)
    return speeds, waits


def count_steps_of_a_round(steps: Callable[[int], None], options: Options) -> int:
    """Return the number of steps that take about a third of a second."""
    seconds = timed(steps, BATCHES, options.device) / BATCHES
    return max(BATCHES, min(400, int((0.1 if options.is_small else 0.3) / seconds)))


def summarize_speeds(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Return the median and range of each side, and the ratio of cnnrun to the bare loop."""
    figures: dict[str, Any] = {}
    for name, values in speeds.items():
        figures |= {name: statistics.median(values), f"{name}_range": f"{min(values):,.0f} to {max(values):,.0f}"}
    return {**figures, "ratio": figures["cnnrun"] / figures["bare"]}


def watch_gpu(steps: Callable[[int], None]) -> dict[str, str]:
    """Return what nvidia-smi reports about the GPU while it trains."""
    query = ask_nvidia_smi(*_SMI)
    while query and query.poll() is None:
        steps(BATCHES)
    return read_answer(query, _SMI)


if __name__ == "__main__":
    main()
