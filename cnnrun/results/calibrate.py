"""`cnnrun calibrate`: a temperature fitted on val, kept beside the run for the weights it was fitted for."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnrun.base.atomic_files import write_json
from cnnrun.base.errors import CheckpointError, ConfigError, DataError
from cnnrun.base.extras import require_package
from cnnrun.base.progress import say
from cnnrun.contracts.results import Measurement
from cnnrun.data.dataset import Examples
from cnnrun.data.training_batches import batches_in_order
from cnnrun.experiment.open_run import open_trained, prepare_eval_data
from cnnrun.model.trained_network import TrainedNetwork
from cnnrun.tasks.temperature import MAX_TEMPERATURE, MIN_TEMPERATURE, TEMPERATURE, fit_temperature
from cnnrun.training.run_records import CALIBRATION, read_calibration

_NOTHING = 1e-6  # a likelihood that has no lowest place


def calibrate_run(target: Path | None, root: Path, device: torch.device) -> dict[str, Any]:
    """Fit the temperature of the checkpoint that the run chose, and keep it; returns what it changes on val.

    Thresholds that val chose are chosen anew. Raises ConfigError for a task without probabilities.
    """
    require_package("scipy", "stats", "calibrate")
    experiment, given = open_trained(target, root, device, with_calibration=False)
    name, data = prepare_eval_data(experiment, given, "val")
    outputs, targets = _outputs(given, data.splits[name], experiment.train.batch)
    task, facts = given.task, given.facts

    def nll(temperature: float) -> float:
        found = task.negative_log_likelihood(outputs, targets, facts, temperature)
        if found is None:
            raise ConfigError(f"{task.kind} gives no probabilities here; there is nothing to calibrate")
        return found if math.isfinite(found) else math.inf

    before, temperature = nll(1.0), fit_temperature(nll)
    if not (1.01 * MIN_TEMPERATURE < temperature < MAX_TEMPERATURE / 1.01 and nll(temperature) > _NOTHING):
        count = f"{len(data.splits[name]):,} pictures of {name}"
        raise DataError(f"the {count} are all told rightly, or all wrongly: no temperature can be fitted to them")
    warm = replace(facts, chosen=facts.chosen | {TEMPERATURE: temperature})
    cold, heated = (_measured(replace(given, facts=each), outputs, targets) for each in (facts, warm))
    record = {
        "step": given.step,
        "split": name,
        "samples": len(data.splits[name]),
        "nll": [before, nll(temperature)],
        **({"ece": [cold.metrics["ece"], heated.metrics["ece"]]} if "ece" in cold.metrics else {}),
        "chosen": {**(heated.choices or facts.chosen), TEMPERATURE: temperature},
    }
    try:
        others = {digest: each.model_dump() for digest, each in read_calibration(given.run).items()}
    except CheckpointError as error:  # what `eval` refuses with the advice to come here
        say(f"{error.lines[0]}; it is written anew")
        others = {}
    write_json(given.run / CALIBRATION, {**others, given.digest: record})
    return {"run": str(given.run), "temperature": temperature, **record}


def _outputs(given: TrainedNetwork, examples: Examples, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The raw outputs and the targets of a whole split."""
    parts = list(batches_in_order(examples, batch, given.device))
    with torch.inference_mode():
        outputs = torch.cat([given.network(part.images) for part in parts])
    return outputs, {name: torch.cat([part.targets[name] for part in parts]) for name in parts[0].targets}


def _measured(given: TrainedNetwork, outputs: Tensor, targets: dict[str, Tensor]) -> Measurement:
    meter = given.task.meter(given.facts)
    with torch.inference_mode():
        meter.update(given.decoder(outputs), targets)
    return meter.compute(tables=False)
