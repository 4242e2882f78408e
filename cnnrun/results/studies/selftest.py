"""`cnnrun selftest`: checks that this machine trains a config correctly, on a few of its images, in under a minute."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import SelftestError
from cnnrun.base.randomness import permutation
from cnnrun.data.dataset import Examples
from cnnrun.data.training_batches import batches_in_order
from cnnrun.experiment.assemble import load_initial_weights
from cnnrun.experiment.config_file import parse_config
from cnnrun.experiment.preparation import PreparedTraining, prepare_training
from cnnrun.experiment.schema import Experiment
from cnnrun.results.studies.repeatability import check_repeat, check_resume, check_workers
from cnnrun.results.studies.sample_trainings import GENTLE_OPTIMIZER, CheckResult, SelftestContext
from cnnrun.training.learner import Learner

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
_MAX_BATCH, _STEPS_PER_EPOCH, _MAX_VAL_IMAGES = 64, 4, 512  # two epochs are trained
_LEARN_SECONDS, _LEARN_STEPS = 6.0, (12, 120)
_SHUFFLES = 8


def run_selftest(experiment: Experiment | None, device: torch.device) -> dict[str, Any]:
    """Run every check on a config, by default on a small built-in one; returns the results."""
    start = time.monotonic()
    experiment = experiment or parse_config(BUILT_IN_CONFIG, "selftest.yaml", ["name=selftest"])
    with _silence_notes():
        training = prepare_training(experiment, load_initial_weights(experiment), device)
    results = []
    with TemporaryDirectory(prefix="cnnrun-selftest-") as folder:
        context = _build_context(training, device, Path(folder))
        for check in CHECKS:
            with _silence_notes():
                results.append(check(context))
    return {
        "name": experiment.name,
        "seconds": round(time.monotonic() - start, 1),
        "passed": all(result.passed is not False for result in results),
        "checks": [asdict(result) for result in results],
    }


def refuse_failed_checks(result: dict[str, Any]) -> None:
    """Raise SelftestError if a check failed."""
    failed_checks = [check["check"] for check in result["checks"] if check["passed"] is False]
    if failed_checks:
        count = f"{len(failed_checks)} of {len(result['checks'])}"
        raise SelftestError(f"selftest: {count} checks failed: {'; '.join(failed_checks)}")


@contextlib.contextmanager
def _silence_notes() -> Iterator[None]:
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _build_context(training: PreparedTraining, device: torch.device, folder: Path) -> SelftestContext:
    spec, data = training.experiment.train, training.data
    batch = min(max(min(spec.batch, _MAX_BATCH), 2 * spec.accumulate), len(data.splits["train"]))
    counts = {"train": batch * _STEPS_PER_EPOCH, "val": _MAX_VAL_IMAGES}
    splits = {name: _random_samples(data.splits[name], count) for name, count in counts.items()}
    facts = replace(data.facts, counts={name: len(examples) for name, examples in splits.items()})
    short_settings = {"epochs": 2, "batch": batch, "save_every": None, "keep": 1000, "early_stop": None}
    short = training.with_train(**short_settings, compile=False, drop_last=True)
    return SelftestContext(replace(short, data=replace(data, facts=facts, splits=splits)), device, folder)


def _random_samples(examples: Examples, count: int) -> Examples:
    is_selected = torch.zeros(len(examples), dtype=torch.bool)
    is_selected[permutation(0, 0, len(examples))[:count]] = True
    return examples.select(is_selected)


def check_first_loss(context: SelftestContext) -> CheckResult:
    """Compare the loss before the first step with that of a guess."""
    check = "the first loss equals that of a random guess"
    expected = context.task.learning.guess_loss()
    if context.training.weights:
        return CheckResult(check, None, "starts from given weights")
    if expected is None:
        return CheckResult(check, None, "unknown for this task")
    setup = context.build_setup("untrained")
    loss = float(Learner(setup).backward(setup.batches(1).at(0), 0))
    is_close = abs(loss - expected) <= 0.3 + 0.25 * expected
    return CheckResult(check, is_close, f"{loss:.3f}, a guess has {expected:.3f}")


def check_overfitting(context: SelftestContext) -> CheckResult:
    """Overfit sixteen images."""
    learner = Learner(context.build_setup("overfit", accumulate=1, optimizer=GENTLE_OPTIMIZER, clip=None))
    batch = context.first_batch(16)
    first = highest = loss = float(learner.backward(batch, 0))
    start, step = time.monotonic(), 0
    while loss > 0.05 * first and step < 300 and time.monotonic() - start < _LEARN_SECONDS:
        learner.update_weights(step, 1.0)
        step += 1
        loss = float(learner.backward(batch, step))
        highest = max(highest, loss)
    # Without a known loss of a guess, as for detectors, the loss may rise at first: better boxes raise the scores that
    # the network has to reach.
    reference = highest if context.task.learning.guess_loss() is None else first
    is_overfitted = loss < first and loss < reference / 2
    return CheckResult("one batch can be overfitted", is_overfitted, f"loss {first:.3f} -> {loss:.3f} in {step} steps")


def check_shuffled_labels(context: SelftestContext) -> CheckResult:
    """Train on true and on shuffled targets, and compare how well each predicts the targets of val."""
    check = "nothing is learned from shuffled labels"
    if context.task.requirements.has_unseen_classes:
        _train_on(context, "true", lambda examples: examples)
        return CheckResult(check, None, "val has other people than train, so its labels have no loss")
    true_gain = _label_gain(context, "true", lambda examples: examples)
    shuffled_gain = _label_gain(context, "shuffled", _shuffle_labels)
    gains = f"true labels lower the loss by {true_gain:.3f}, shuffled ones by {shuffled_gain:.3f}"
    if true_gain < 0.02:
        return CheckResult(check, None, f"{gains}: too few steps to tell")
    return CheckResult(check, shuffled_gain < 0.25 * true_gain, gains)


def _shuffle_labels(examples: Examples) -> Examples:
    order = permutation(1, 0, len(examples))
    if examples.masks is not None:  # read by the index in the source
        return replace(examples, source_rows=examples.source_rows[order])
    targets = {name: values[order] for name, values in examples.targets.items()}
    objects = None if examples.objects is None else examples.objects.select(order)
    return replace(examples, targets=targets, objects=objects)


def _train_on(context: SelftestContext, name: str, transform: Callable[[Examples], Examples]) -> Learner:
    """Train briefly on transformed training images; keeps and returns the learner."""
    steps = int(min(max(_LEARN_SECONDS / max(context.step_seconds, 1e-6), _LEARN_STEPS[0]), _LEARN_STEPS[1]))
    data = replace(context.data, splits=context.data.splits | {"train": transform(context.data.splits["train"])})
    setup = context.build_setup(name, data, optimizer=GENTLE_OPTIMIZER, clip=None, ema=None)
    learner, batches = Learner(setup), setup.batches(setup.spec.accumulate)
    for step in range(steps):
        learner.backward(batches.at(step), step)
        learner.update_weights(step, 1.0)
    batches.close()
    context.learners[name] = learner
    return learner


def _label_gain(context: SelftestContext, name: str, transform: Callable[[Examples], Examples]) -> float:
    """Train, and return by how much the loss on val's own targets is lower than on shuffled ones."""
    learner, examples = _train_on(context, name, transform), context.data.splits["val"]
    count = len(examples)
    targets = examples.batch_targets(torch.arange(count), context.device)
    orders = [torch.arange(count), *(permutation(2, number, count) for number in range(_SHUFFLES))]
    totals = [0.0] * len(orders)
    for outputs, index_B in _val_outputs(context, learner):
        for number, order in enumerate(orders):
            rows_B = order[index_B].to(context.device)
            losses = learner.criterion(outputs, {key: values[rows_B] for key, values in targets.items()})
            totals[number] += float(sum(losses.values())) * len(outputs)
    own_loss, *other_losses = (total / count for total in totals)
    return sum(other_losses) / len(other_losses) - own_loss


def _val_outputs(context: SelftestContext, learner: Learner) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the network's raw outputs on val batch by batch, with the indices of the samples."""
    learner.network.eval()
    for batch in batches_in_order(context.data.splits["val"], context.experiment.train.batch, context.device):
        with torch.no_grad():
            outputs = learner.network(batch.images).float()
        yield outputs, batch.index_B


def check_live_units(context: SelftestContext) -> CheckResult:
    """Find channels whose activation is the same for every image."""
    learner, ranges = context.learners["true"], {}  # type: ignore[var-annotated]

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            values_CN = output.transpose(0, 1).flatten(1)
            low, high = values_CN.amin(1), values_CN.amax(1)
            previous = ranges.get(name, (low, high))
            ranges[name] = (torch.minimum(low, previous[0]), torch.maximum(high, previous[1]))

        return hook

    modules = {
        name: module
        for name, module in learner.network.named_modules()
        if type(module).__module__ == "torch.nn.modules.activation"
    }
    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    for _ in _val_outputs(context, learner):
        pass  # the hooks look at the activations
    for handle in handles:
        handle.remove()
    dead_shares = {name: float((low == high).float().mean()) for name, (low, high) in ranges.items()}
    check = "no channel is dead"
    if not dead_shares:
        return CheckResult(check, None, "no activations")
    name = max(dead_shares, key=lambda name: dead_shares[name])
    return CheckResult(
        check, dead_shares[name] < 0.9, f"largest share of dead channels: {dead_shares[name]:.0%} of {name}"
    )


def check_gradient_flow(context: SelftestContext) -> CheckResult:
    """Check that no parameter's gradient is missing or all zeros after some training."""
    learner = context.learners["true"]
    learner.network.train()
    learner.backward(context.first_batch(min(16, context.experiment.train.batch)), 0)
    named_parameters = learner.network_and_criterion.named_parameters()
    parameters = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    unreached = [name for name, parameter in parameters if parameter.grad is None or not bool(parameter.grad.any())]
    failure = f"none for {join_names([name.removeprefix('network.') for name in unreached], 3)}"
    check = "gradients reach every weight"
    return CheckResult(check, not unreached, failure if unreached else f"{len(parameters)} tensors")


def check_single_images(context: SelftestContext) -> CheckResult:
    """Compare outputs of single images with those of a batch: in evaluation, batch norm must not mix images."""
    learner = context.learners["true"]
    learner.network.eval()
    images = context.first_batch(8).images
    with torch.inference_mode():
        batched = learner.network(images)
        single = torch.cat([learner.network(image[None]) for image in images])
    difference = float((batched - single).abs().max() / batched.abs().max().clamp(min=1e-6))
    check = "an image gives the same output alone and in a batch"
    return CheckResult(check, difference < 1e-3, f"largest difference {difference:.1e}")


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
