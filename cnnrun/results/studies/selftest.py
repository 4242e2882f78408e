"""`cnnrun selftest`: whether this machine trains a config as it must, on a few of its pictures, in under a minute."""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from cnnrun.base.atomic_files import Folder
from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import SelftestError
from cnnrun.base.progress import say
from cnnrun.base.randomness import permutation
from cnnrun.contracts.batch import Batch
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.decode import Decoder
from cnnrun.data.storage import Streamed
from cnnrun.data.training_batches import batches_in_order
from cnnrun.experiment import assemble
from cnnrun.experiment.config_file import parse_config
from cnnrun.experiment.schema import Experiment
from cnnrun.experiment.training_checks import prepare_training
from cnnrun.model.weights_file import Weights
from cnnrun.training import checkpoints
from cnnrun.training.learner import Job, Learner
from cnnrun.training.loop import fit
from cnnrun.training.optimizers import AdamW
from cnnrun.training.step import backward, update_weights

BUILT_IN_CONFIG = """
task: classify
data: {source: digits, split: {val: 0.2, test: 0.1}, augment: {shift: 0.1}}
model:
  - conv: {out_channels: 16, norm: batch, activation: relu}
  - max_pool
  - conv: {out_channels: 32, norm: batch, activation: relu}
  - flatten
  - dropout: 0.1
train: {batch: 64, ema: {decay: 0.9}}
"""
_BATCH, _STEPS, _VAL = 64, 4, 512  # at most: pictures a batch, steps in each of two epochs, pictures to measure on
_LEARN_SECONDS, _LEARN_STEPS = 6.0, (12, 120)
_SHUFFLES = 8
# Learning is tried with this: the optimizer and schedule of the config are set for thousands of steps, not for these.
GENTLE_OPTIMIZER = AdamW(lr=5e-4, weight_decay=0.0)


@dataclass(frozen=True)
class CheckResult:
    """What one check found; `passed` is None where it cannot be told."""

    check: str
    passed: bool | None
    found: str


@dataclass
class SelftestBench:
    """The config over a few of its pictures, and the networks that were trained on them."""

    experiment: Experiment
    data: Dataset
    weights: Weights | None
    device: torch.device
    folder: Path
    learners: dict[str, Learner] = field(default_factory=dict)
    step_seconds: float = 0.0

    def make_job(self, name: str, data: Dataset | None = None, **train: Any) -> Job:
        """A fresh job over these pictures."""
        spec = self.experiment.train.model_copy(update=train)
        made = self.experiment.model_copy(update={"train": spec})
        (self.folder / name).mkdir(exist_ok=True)
        return assemble.assemble_job(made, data or self.data, self.weights, Folder(self.folder / name), self.device)

    def first_batch(self, count: int) -> Batch:
        """So many pictures as they are."""
        examples = self.data.splits["train"]
        chosen = torch.zeros(len(examples), dtype=torch.bool)
        chosen[:count] = True
        return next(batches_in_order(examples.select(chosen), count, self.device))


def run_selftest(experiment: Experiment | None, device: torch.device) -> dict[str, Any]:
    """Every check's verdict; without `experiment` those of a small config of cnnrun's own."""
    began = time.monotonic()
    experiment = experiment or parse_config(BUILT_IN_CONFIG, "selftest.yaml", ["name=selftest"])
    experiment, given, data = prepare_training(experiment)
    verdicts = []
    with TemporaryDirectory(prefix="cnnrun-selftest-") as folder:
        bench = _bench(experiment, data, given, device, Path(folder))
        for check in CHECKS:
            with _quietly():
                verdicts.append(check(bench))
    return {
        "name": experiment.name,
        "seconds": round(time.monotonic() - began, 1),
        "passed": all(verdict.passed is not False for verdict in verdicts),
        "checks": [asdict(verdict) for verdict in verdicts],
    }


def refuse_failed_checks(result: dict[str, Any]) -> None:
    """Raises SelftestError where a check failed."""
    failed = [each["check"] for each in result["checks"] if each["passed"] is False]
    if failed:
        raise SelftestError(f"selftest: {len(failed)} of {len(result['checks'])} checks failed: {'; '.join(failed)}")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _bench(
    experiment: Experiment, data: Dataset, given: Weights | None, device: torch.device, folder: Path
) -> SelftestBench:
    spec = experiment.train
    batch = min(max(min(spec.batch, _BATCH), 2 * spec.accumulate), len(data.splits["train"]))
    counts = {"train": batch * _STEPS, "val": _VAL}
    splits = {name: _some(data.splits[name], count) for name, count in counts.items()}
    facts = replace(data.facts, counts={name: len(each) for name, each in splits.items()})
    few = {"epochs": 2, "batch": batch, "save_every": None, "keep": 1000, "early_stop": None, "compile": False}
    made = experiment.model_copy(update={"train": spec.model_copy(update=few | {"drop_last": True})})
    return SelftestBench(made, replace(data, facts=facts, splits=splits), given, device, folder)


def _some(examples: Examples, count: int) -> Examples:
    chosen = torch.zeros(len(examples), dtype=torch.bool)
    chosen[permutation(0, 0, len(examples))[:count]] = True
    return examples.select(chosen)


def _state(run: Path) -> list[Any]:
    """All that two equal runs have in common, to the bit."""
    saved = checkpoints.load_newest(run / "checkpoints", "latest", say)
    assert saved is not None
    tensors = [(part, name, value) for part, of in sorted(saved.parts.items()) for name, value in sorted(of.items())]
    return [*tensors, saved.state, (run / "metrics.jsonl").read_bytes()]


def _differences(a: list[Any], b: list[Any]) -> list[str]:
    """What of two states is not equal, by name."""
    found = []
    for one, other in zip(a, b, strict=True):
        if isinstance(one, tuple):
            equal = one[:2] == other[:2] and torch.equal(one[2], other[2])
            found += [] if equal else [f"{one[0]} {one[1]}"]
        elif one != other:
            found.append("counters" if isinstance(one, dict) else "metrics.jsonl")
    return found


def _same(bench: SelftestBench, check: str, name: str, well: str) -> CheckResult:
    differ = _differences(_state(bench.folder / "first"), _state(bench.folder / name))
    more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
    return CheckResult(check, not differ, f"differs in {differ[0]}{more}" if differ else well)


def check_repeat(bench: SelftestBench) -> CheckResult:
    """The same training twice."""
    result = fit(bench.make_job("first", save_every=1))
    fit(bench.make_job("again"))
    bench.step_seconds = bench.experiment.train.batch / result["images_per_second"]
    return _same(bench, "a repeated run is the same", "again", f"{result['steps']} steps, to the last bit")


def check_resume(bench: SelftestBench) -> CheckResult:
    """The training gone on with from the middle of its first epoch."""
    found = checkpoints.list_checkpoints(bench.folder / "first" / "checkpoints")
    middle = found[max(0, len(found) // 4 - 1)]
    shutil.copytree(bench.folder / "first", bench.folder / "resumed")
    for later in found[found.index(middle) + 1 :]:
        shutil.rmtree(bench.folder / "resumed" / "checkpoints" / later.name)
    fit(bench.make_job("resumed"), checkpoints.load(bench.folder / "resumed" / "checkpoints" / middle.name))
    return _same(bench, "a resumed run is the same", "resumed", f"gone on with from {middle.name}, to the last bit")


def check_workers(bench: SelftestBench) -> CheckResult:
    """The training over pictures that two threads decode anew each time, read ahead."""

    def streamed(examples: Examples) -> Examples:
        image = bench.experiment.data.image
        decoder = Decoder(examples.source, bench.data.facts.image, image, None)
        pictures = Streamed(decoder, 2, bench.experiment.data.timeout)
        return replace(examples, images=pictures, rows=examples.source_rows)

    data = replace(bench.data, splits={name: streamed(each) for name, each in bench.data.splits.items()})
    fit(replace(bench.make_job("workers", data), prefetch=3))
    return _same(bench, "workers do not matter", "workers", "two that read ahead change no bit")


def check_first_loss(bench: SelftestBench) -> CheckResult:
    """The loss before the first step."""
    check = "the first loss is that of a guess"
    expected = bench.experiment.task.chance_loss(bench.data.facts)
    if bench.weights:
        return CheckResult(check, None, "starts from given weights")
    if expected is None:
        return CheckResult(check, None, "unknown for this task")
    job = bench.make_job("ignorant")
    loss = _loss(Learner(job), job, job.batches(job.dataset.splits["train"], 1).at(0), 0)
    fine = abs(loss - expected) <= 0.3 + 0.25 * expected
    return CheckResult(check, fine, f"{loss:.3f}, a guess has {expected:.3f}")


def _loss(learner: Learner, job: Job, batch: Batch, step: int) -> float:
    loss = backward(learner, job, batch, step)
    return math.inf if loss is None else float(loss)


def check_overfitting(bench: SelftestBench) -> CheckResult:
    """Sixteen pictures learned by heart."""
    job = bench.make_job("overfit", accumulate=1, optimizer=GENTLE_OPTIMIZER, clip=None)
    learner, batch = Learner(job), bench.first_batch(16)
    first = highest = loss = _loss(learner, job, batch, 0)
    began, step = time.monotonic(), 0
    while loss > 0.05 * first and step < 300 and time.monotonic() - began < _LEARN_SECONDS:
        update_weights(learner, job, step, 1.0)
        step += 1
        loss = _loss(learner, job, batch, step)
        highest = max(highest, loss)
    # Where a guess's loss is not known, as a detector's, it may grow at first: the better the boxes, the higher the
    # scores that are to be given.
    begun = highest if bench.experiment.task.chance_loss(bench.data.facts) is None else first
    fine = loss < first and loss < begun / 2
    return CheckResult("one batch can be overfitted", fine, f"loss {first:.3f} -> {loss:.3f} in {step} steps")


def check_shuffled_labels(bench: SelftestBench) -> CheckResult:
    """What true and shuffled targets teach about val: how much better its targets fit than others' of val."""
    check = "shuffled labels teach nothing"
    if bench.experiment.task.is_open_set:
        _taught(bench, "true", lambda examples: examples)
        return CheckResult(check, None, "val shows others than were learned, so no label of theirs has a loss")
    true, false = _gain(bench, "true", lambda examples: examples), _gain(bench, "shuffled", _shuffled)
    found = f"true ones are worth {true:.3f} of the loss, shuffled ones {false:.3f}"
    if true < 0.02:
        return CheckResult(check, None, f"{found}: too few steps to tell")
    return CheckResult(check, false < 0.25 * true, found)


def _shuffled(examples: Examples) -> Examples:
    order = permutation(1, 0, len(examples))
    targets = {name: values[order] for name, values in examples.targets.items()}
    objects = None if examples.objects is None else examples.objects.select(order)
    return replace(examples, targets=targets, objects=objects)


def _taught(bench: SelftestBench, name: str, changed: Callable[[Examples], Examples]) -> Learner:
    """What learned from the training pictures, changed, for a while."""
    steps = int(min(max(_LEARN_SECONDS / max(bench.step_seconds, 1e-6), _LEARN_STEPS[0]), _LEARN_STEPS[1]))
    data = replace(bench.data, splits=bench.data.splits | {"train": changed(bench.data.splits["train"])})
    job = bench.make_job(name, data, optimizer=GENTLE_OPTIMIZER, clip=None, ema=None)
    learner, batches = Learner(job), job.batches(data.splits["train"], job.spec.accumulate)
    for step in range(steps):
        _loss(learner, job, batches.at(step), step)
        update_weights(learner, job, step, 1.0)
    batches.close()
    bench.learners[name] = learner
    return learner


def _gain(bench: SelftestBench, name: str, changed: Callable[[Examples], Examples]) -> float:
    learner = _taught(bench, name, changed)
    outputs, targets = _outputs(bench, learner)
    with torch.inference_mode():
        own = _total(learner.criterion(outputs, targets))
        others = [
            _total(learner.criterion(outputs, {key: values[order] for key, values in targets.items()}))
            for order in (permutation(2, number, len(outputs)).to(bench.device) for number in range(_SHUFFLES))
        ]
    return sum(others) / len(others) - own


def _total(losses: dict[str, Tensor]) -> float:
    return float(sum(losses.values()))


def _outputs(bench: SelftestBench, learner: Learner) -> tuple[Tensor, dict[str, Tensor]]:
    """The network's raw outputs on val, and its targets."""
    examples = bench.data.splits["val"]
    learner.network.eval()
    with torch.inference_mode():
        parts = batches_in_order(examples, bench.experiment.train.batch, bench.device)
        outputs = torch.cat([learner.network(part.images).float() for part in parts])
    return outputs, examples.batch_targets(torch.arange(len(examples)), bench.device)


def check_live_units(bench: SelftestBench) -> CheckResult:
    """Channels of activations that say the same of every picture."""
    learner, seen = bench.learners["true"], {}  # type: ignore[var-annotated]

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            flat = output.transpose(0, 1).flatten(1)
            low, high = flat.amin(1), flat.amax(1)
            before = seen.get(name, (low, high))
            seen[name] = (torch.minimum(low, before[0]), torch.maximum(high, before[1]))

        return hook

    own = "torch.nn.modules.activation"
    units = {name: module for name, module in learner.network.named_modules() if type(module).__module__ == own}
    handles = [module.register_forward_hook(watch(name)) for name, module in units.items()]
    _outputs(bench, learner)
    for handle in handles:
        handle.remove()
    dead = {name: float((low == high).float().mean()) for name, (low, high) in seen.items()}
    check = "units are alive"
    if not dead:
        return CheckResult(check, None, "no activations")
    worst = max(dead, key=lambda name: dead[name])
    return CheckResult(check, dead[worst] < 0.9, f"most dead ones: {dead[worst]:.0%} of {worst}")


def check_gradient_flow(bench: SelftestBench) -> CheckResult:
    """Gradients after some learning: none may be missing or nothing but zeros."""
    learner = bench.learners["true"]
    job = bench.make_job("gradients")
    learner.network.train()
    _loss(learner, job, bench.first_batch(min(16, bench.experiment.train.batch)), 0)
    learning = [(name, each) for name, each in learner.network_and_criterion.named_parameters() if each.requires_grad]
    without = [name for name, each in learning if each.grad is None or not bool(each.grad.any())]
    found = f"none for {join_names([name.removeprefix('network.') for name in without], 3)}"
    return CheckResult("gradients reach every weight", not without, found if without else f"{len(learning)} tensors")


def check_single_images(bench: SelftestBench) -> CheckResult:
    """Pictures alone and together, as batch norm must treat them alike once trained."""
    learner = bench.learners["true"]
    learner.network.eval()
    pictures = bench.first_batch(8).images
    with torch.inference_mode():
        together = learner.network(pictures)
        alone = torch.cat([learner.network(picture[None]) for picture in pictures])
    gap = float((together - alone).abs().max() / together.abs().max().clamp(min=1e-6))
    return CheckResult("a picture alone gives what it gives in a batch", gap < 1e-3, f"largest difference {gap:.1e}")


CHECKS = (
    check_repeat,
    check_resume,
    check_workers,
    check_first_loss,
    check_overfitting,
    check_shuffled_labels,
    check_live_units,
    check_gradient_flow,
    check_single_images,
)
