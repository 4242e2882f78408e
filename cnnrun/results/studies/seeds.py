"""`cnnrun train --seeds N`: the same config under several seeds, and what it gives on average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cnnrun.base import torchrun
from cnnrun.base.atomic_files import write_json
from cnnrun.base.errors import ConfigError, DataError
from cnnrun.base.extras import require_package
from cnnrun.base.progress import say
from cnnrun.experiment.schema import Experiment
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.report import write as reporting
from cnnrun.results.train_run import train_run
from cnnrun.tasks.intervals import metric_bounds
from cnnrun.training.run_records import read_facts


def train_seeds(
    experiment: Experiment, count: int, root: Path, device: torch.device, resume: bool, strict: bool, page: bool = False
) -> dict[str, Any]:
    """A run for each of `count` seeds from the config's on, and the summary, which is kept under the config's name.

    With `resume`, finished runs of the same config and seed are taken as they are. Raises DataError where the data
    changed between them.
    """
    if torchrun.world_size() > 1:
        raise ConfigError("--seeds trains one after the other; start it without torchrun, or each seed with it")
    if experiment.seed + count > 2**63:
        raise ConfigError(f"--seeds {count}: seeds end below 2^63, and the config's is {experiment.seed}")
    require_package("scipy", "stats", "--seeds")
    seeds = range(experiment.seed, experiment.seed + count)
    rows = []
    for place, seed in enumerate(seeds, 1):
        of_seed = experiment.model_copy(update={"seed": seed})
        say(f"seed {seed} ({place} of {count})")
        result = train_run(of_seed, root, device, resume, strict)
        run = Path(result["run"])
        if page:
            reporting.report_after_training(run, root, device, overwrite="already_finished" not in result)
        measured = evaluate_run(run, root, device, None)
        rows.append({"seed": seed, "run": str(run), "split": measured["split"], "numbers": measured["numbers"]})
    _same_data([Path(row["run"]) for row in rows])
    made = {
        "name": experiment.name,
        "split": rows[0]["split"],
        "seeds": list(seeds),
        "runs": rows,
        "summary": {
            name: mean_with_interval([row["numbers"][name] for row in rows], name) for name in rows[0]["numbers"]
        },
    }
    path = root / experiment.name / f"seeds-{seeds[0]}-{seeds[-1]}.json"
    write_json(path, made)
    return {"path": str(path), **made}


def mean_with_interval(values: Sequence[float | None], name: str) -> dict[str, float | None]:
    """Mean, deviation, and the ends of Student's 95 % interval of the mean; of one value no more than that.

    The interval is cut at the bounds of a number of that name. A number that is not defined has no mean.
    """
    from scipy.stats import t

    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None}
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return {"mean": mean}
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1))
    half = float(t.ppf(0.975, len(known) - 1)) * deviation / math.sqrt(len(known))
    least, most = metric_bounds(name, mean)
    return {"mean": mean, "deviation": deviation, "from": max(least, mean - half), "to": min(most, mean + half)}


def _same_data(folders: Sequence[Path]) -> None:
    """Raises DataError where not all runs learned from the same data."""
    seen = {facts.fingerprint: folder for folder in folders if (facts := read_facts(folder))}
    if len(seen) > 1:
        one, other, *_ = seen.values()
        raise DataError(f"{one} and {other} learned from different data; train all seeds anew, without --resume")
