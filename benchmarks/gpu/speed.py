"""Training speed of cnnrun's own steps against a bare loop over the same network, interleaved.

    python benchmarks/gpu/speed.py --device cuda

A side `cnnrun` takes the steps of `loop.fit` (`Training.compute_gradients` and `update_weights`: data, augmentation, checks, averages,
losses read), `free` so with `train.deterministic: false`. `bare` is what one would write by hand: the same network,
criterion and optimizer, autocast, channels_last and compile, the fastest kernels that cuDNN finds, on a few batches on
the device, with no augmentation, no checks and no average of the weights. Images/s, medians of the rounds.
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
from common import ROOT, Options, attempt, begun_training, emit, options, write_arrays
from devices import answer, ask_nvidia_smi, peak_mib, timed, used_mib

from cnnrun.base.progress import Clock
from cnnrun.data.augment.settings import Augment
from cnnrun.experiment import assemble, config_file, schema
from cnnrun.training.determinism import deterministic_kernels
from cnnrun.training.learner import Learner

NETS = {"vgg-small": 28, "resnet50": 224, "resnet18": 32, "lenet": 28, "digit-scenes": 96}
FACTOR = 0.05  # of the peak learning rate: pictures without meaning must not make it diverge
WARM_UP = 6  # steps before anything is timed
BATCHES = 4  # of the bare loop, and so many steps at least in a round
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
    """Measure every network in float32 and bfloat16, then what time allows of them compiled."""
    given = options(__doc__)
    data: dict[str, Any] = {}
    cases = [(name, precision, False) for name in NETS for precision in ("float32", "bfloat16")]
    compiled = ["lenet"] if given.is_small else NETS
    cases += [(name, precision, True) for precision in ("bfloat16", "float32") for name in compiled]
    with tempfile.TemporaryDirectory(prefix="cnnrun-speed-") as folder:
        for name, precision, is_compiled in cases:
            most = min(given.seconds_left, 60.0 if is_compiled else 20.0)
            about = {"net": name, "precision": precision, "compile": is_compiled}
            with attempt("speed", seconds=most, **about):
                torch.compiler.reset()
                if name not in data:
                    data[name] = prepared(name, given, Path(folder))
                emit("speed", **about, **measure(*data[name], about, given))
            if given.device.type == "cuda":
                torch.cuda.empty_cache()


def prepared(name: str, given: Options, folder: Path) -> tuple[schema.Experiment, Any]:
    """Return a network's experiment on synthetic pictures, and its data, decoded."""
    few = given.is_small
    side = 64 if few and name == "resnet50" else NETS[name]
    small = ["train.batch=8"] if few and name.startswith("resnet") else []
    if name == "digit-scenes":
        sizes = ["data.source={digit_scenes: {train: 64, held_out: 16}}"] if few else []
        tried = config_file.read_config(ROOT / "configs" / "digit-scenes.yaml", sizes)
    elif name == "resnet50":  # a little larger than the network sees: they are resized into cnnrun's own cache
        path = write_arrays(folder / "resnet50.npz", 64 if few else 1024, side + 16, channels=3, classes=50)
        tried = config_file.parse_config(_RESNET50.format(path=path, side=side, cache=folder / "cache"), name, small)
    else:
        path = write_arrays(folder / f"{name}.npz", 256 if few else 12_800, side)
        overrides = [f"data.source={{arrays: {path}}}", f"data.image={{size: {side}, channels: 1}}", *small]
        tried = config_file.read_config(ROOT / "benchmarks" / "nets" / f"{name}.yaml", overrides)
    return tried, assemble.prepare_dataset(tried)


def measure(tried: schema.Experiment, data: Any, about: dict[str, Any], given: Options) -> dict[str, Any]:
    """Return each side's images/s, cnnrun's part of the bare loop's, and what the GPU did meanwhile."""
    learns = {"precision": about["precision"], "compile": about["compile"]}
    found: dict[str, Any] = {"batch": tried.train.batch}
    with ExitStack() as stack:

        def job(*, deterministic: bool) -> Any:
            spec = tried.train.model_copy(update={**learns, "deterministic": deterministic})
            return assemble.assemble_job(tried.model_copy(update={"train": spec}), data, None, None, given.device)

        held = used_mib(given.device)
        training = stack.enter_context(begun_training(job(deterministic=True)))
        sides = {"cnnrun": by_kernels(partial(own_steps, training), given.device, deterministic=True)}
        sides["cnnrun"](WARM_UP)
        found["mib"] = peak_mib(given.device) - held
        if not about["compile"]:
            free = stack.enter_context(begun_training(job(deterministic=False)))
            sides["free"] = by_kernels(partial(own_steps, free), given.device, deterministic=False)
            sides["free"](WARM_UP)
        held = used_mib(given.device)
        sides["bare"] = by_kernels(bare_steps(job(deterministic=False)), given.device, deterministic=False)
        sides["bare"](WARM_UP)
        found["bare_mib"] = peak_mib(given.device) - held
        speeds, waits = rounds(sides, training, given)
        found |= summed_up(speeds) | {"wait": statistics.median(waits), "n": len(waits)}
        found |= {key.replace(".", "_"): each for key, each in watched(sides["cnnrun"]).items()}
    return found


def by_kernels(steps: Callable[[int], None], device: torch.device, *, deterministic: bool) -> Callable[[int], None]:
    """Return the steps as they run by deterministic kernels, or by the fastest."""

    def run(count: int) -> None:
        with deterministic_kernels(device, deterministic):
            steps(count)

    return run


def own_steps(training: Any, count: int) -> None:
    """Take steps as `loop.fit` does."""
    for _ in range(count):
        training.learner.criterion.set_progress(1.0)
        batch = training.compute_gradients()
        training.update_weights(FACTOR)
        training.state.step += 1
        training.clock.images += batch.global_size
    training.loss_monitor.read_pending(training.learner)


def bare_steps(job: Any) -> Callable[[int], None]:
    """Return a loop of steps as one writes it by hand, on batches that are on the device already."""
    learner = Learner(job)
    source = replace(job, augment=Augment()).batches(job.dataset.splits["train"], 1)
    batches = [source.at(step) for step in range(min(BATCHES, source.steps_per_epoch))]
    source.close()
    ready = [(each.images.contiguous(memory_format=torch.channels_last), each.targets) for each in batches]
    for group in learner.optimizer.param_groups:
        group["lr"] = group["peak"] * FACTOR

    def steps(count: int) -> None:
        for number in range(count):
            pictures, targets = ready[number % len(ready)]
            with learner.autocast(job.device):
                outputs = learner.forward(pictures)
            sum(learner.criterion(outputs.float(), targets).values()).backward()
            learner.optimizer.step()
            learner.optimizer.zero_grad()

    return steps


def rounds(
    sides: dict[str, Callable[[int], None]], training: Any, given: Options
) -> tuple[dict[str, list[float]], list[float]]:
    """Run the sides in turn; returns each one's images/s by round, and cnnrun's shares of time waiting for data."""
    count, batch = steps_of_a_round(sides["bare"], given), training.job.spec.batch
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    waits = []
    for _ in range(3 if given.is_small else 5):
        for name, steps in sides.items():
            training.clock = Clock()
            speeds[name].append(count * batch / timed(steps, count, given.device))
            if name == "cnnrun":
                waits.append(training.clock.data_wait_share)
    return speeds, waits


def steps_of_a_round(steps: Callable[[int], None], given: Options) -> int:
    """Return how many steps take about a third of a second."""
    each = timed(steps, BATCHES, given.device) / BATCHES
    return max(BATCHES, min(400, int((0.1 if given.is_small else 0.3) / each)))


def summed_up(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Return each side's median and range, and cnnrun's part of the bare loop's speed."""
    found: dict[str, Any] = {}
    for name, values in speeds.items():
        found |= {name: statistics.median(values), f"{name}_range": f"{min(values):,.0f} to {max(values):,.0f}"}
    return {**found, "ratio": found["cnnrun"] / found["bare"]}


def watched(steps: Callable[[int], None]) -> dict[str, str]:
    """Return what nvidia-smi says of the GPU while it trains."""
    asked = ask_nvidia_smi(*_SMI)
    while asked and asked.poll() is None:
        steps(BATCHES)
    return answer(asked, _SMI)


if __name__ == "__main__":
    main()
