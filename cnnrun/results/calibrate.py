"""`cnnrun calibrate`: fit a temperature on val and store it in the run, under the digest of the weights it fits."""

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
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.results import Measurement
from cnnrun.data.dataset import Examples
from cnnrun.data.training_batches import batches_in_order
from cnnrun.experiment.open_run import open_trained, prepare_eval_data
from cnnrun.model.trained_network import TrainedNetwork
from cnnrun.tasks.temperature import MAX_TEMPERATURE, MIN_TEMPERATURE, fit_temperature
from cnnrun.training.run_records import CALIBRATION, read_calibration

_NO_MAXIMUM = (
    f"the likelihood has no maximum at temperatures from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g} (for a classifier: "
    "nearly all are right, or nearly all wrong)"
)


def calibrate_run(run: Path | None, runs: Path, device: torch.device) -> dict[str, Any]:
    """Fit the temperature of a run's best checkpoint on val and store it; returns it with the metrics before and after.

    Thresholds that were chosen on val are chosen again. Raises ConfigError for a task without probabilities and
    DataError if no temperature can be fitted.
    """
    require_package("scipy", "stats", "calibrate")
    experiment, trained = open_trained(run, runs, device, with_calibration=False)
    if (calibration := trained.task.calibration) is None:
        kind = trained.task.kind
        raise ConfigError(f"{kind}: this network gives no probabilities, so there is nothing to calibrate")
    split_name, data = prepare_eval_data(experiment, trained, "val")
    outputs, targets = _outputs(trained, data.splits[split_name], experiment.train.batch)

    def nll(temperature: float) -> float:
        value = calibration.negative_log_likelihood(outputs, targets, temperature)
        return value if math.isfinite(value) else math.inf

    nll_before, temperature = nll(1.0), fit_temperature(nll)
    if temperature is None:
        raise DataError(f"no temperature fits {split_name}: {_NO_MAXIMUM}")
    calibrated = trained.choices.replaced_by(Choices(temperature))
    before = _measure_outputs(trained, outputs, targets)
    after = _measure_outputs(replace(trained, choices=calibrated), outputs, targets)
    choices = calibrated.replaced_by(after.choices)
    record = {
        "step": trained.step,
        "split": split_name,
        "samples": len(data.splits[split_name]),
        "nll": [nll_before, nll(temperature)],
        **({error: [before.metrics[error], after.metrics[error]]} if (error := calibration.error_metric) else {}),
    }
    try:
        records = read_calibration(trained.run)
    except CheckpointError as error:  # `eval` refuses such a file and points to `calibrate`
        say(f"{error.lines[0]}; writing a new file")
        records = {}
    write_json(trained.run / CALIBRATION, {**records, trained.digest: {**record, "choices": choices.to_json()}})
    return {"run": str(trained.run), "temperature": temperature, **record, "chosen": choices.by_description()}


def _outputs(trained: TrainedNetwork, examples: Examples, batch_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the raw outputs of a whole split; returns them with its targets."""
    outputs, targets = [], []
    with torch.inference_mode():
        for batch in batches_in_order(examples, batch_size, trained.device):
            outputs.append(trained.network(batch.images))
            targets.append(batch.targets)
    return torch.cat(outputs), {name: torch.cat([part[name] for part in targets]) for name in targets[0]}


def _measure_outputs(trained: TrainedNetwork, outputs: Tensor, targets: dict[str, Tensor]) -> Measurement:
    meter = trained.task.measuring.build_meter(trained.choices)
    with torch.inference_mode():
        meter.update(trained.decoder(outputs), targets)
    return meter.compute(tables=False)
