"""The shipped configs: each builds and learns from its data, and digits.yaml reaches the accuracy that it states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cnnrun.base.errors import DataError
from cnnrun.data.training_batches import BatchPlan, BatchReading, TrainingBatches
from cnnrun.experiment import assemble, config_file, schema
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.studies.train_run import train_run
from cnnrun.training.learner import Learner

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CPU = torch.device("cpu")


def dataset_or_skip(experiment: schema.Experiment, monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        return assemble.prepare_dataset(experiment)
    except DataError as error:
        pytest.skip(f"its data is not here (scripts/get_data): {error.lines[0][:80]}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_starts_at_the_chance_loss_and_learns(path, monkeypatch, tmp_path):
    experiment = config_file.read_config(path, ["train.batch=32", "train.ema=null"])
    data = dataset_or_skip(experiment, monkeypatch)
    learning = Learner(setup := assemble.build_setup(experiment, data, None, CPU))
    batch = TrainingBatches(data.splits["train"], setup.augment, BatchPlan(32, 10, 0), BatchReading(CPU)).at(0)
    losses = []
    for step in range(6):
        losses.append(float(learning.backward(batch, step)))
        learning.update_weights(step, 0.02)
    if (chance := setup.task.learning.guess_loss()) is not None:
        assert losses[0] == pytest.approx(chance, abs=0.6)
        assert losses[-1] < losses[0]
    # A detector's loss grows at first: the better its boxes, the higher the scores it is to give.
    assert torch.tensor(losses).isfinite().all()
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_header_states_metric_machine_and_command(path):
    head = path.read_text().split("\ntask:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for word in ("n = ", "2 CPU cores", f"cnnrun train configs/{path.name}"):
        assert word in head
    assert any(number in head for number in ("accuracy", "AP50", "EER", "rank-1", "RMSE", "MAE", "mAP", "IoU"))


def test_fashion_vgg_has_at_most_half_a_million_parameters():
    experiment = config_file.read_config(ROOT / "configs" / "fashion-vgg.yaml")
    from cnnrun.contracts.facts import DataFacts

    task = experiment.task.bind(DataFacts(tuple("0123456789"), (1, 28, 28)))
    assert assemble.build_experiment_network(experiment, task).parameter_count <= 500_000


@pytest.mark.slow
def test_digits_reach_98_percent(tmp_path):
    """Mean over four splits of the data, because the accuracy of one run on 359 images varies by one per cent.

    With seed 0 and one split it was 0.994 on one machine, and on another 0.989 with two threads and 0.975 with one,
    where only last bits differ (benchmarks/README.md).
    """
    reached = []
    for seed in range(4):
        experiment = config_file.read_config(
            ROOT / "configs" / "digits.yaml", [f"seed={seed}", f"data.split.seed={seed}"]
        )
        run = train_run(experiment, tmp_path, CPU, resume=False)["run"]
        reached.append(evaluate_run(Path(run), tmp_path, CPU, "test")["numbers"]["accuracy"])
    assert sum(reached) / 4 >= 0.98, reached
