"""Out of memory on a GPU: in the network, in augmentation, during evaluation and in the optimizer; and peak memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cnnrun.data.augment.settings import Augment
from cnnrun.experiment import schema
from cnnrun.results.studies.train_run import train_run
from cnnrun.tasks.classification import ClassifyMeter
from cnnrun.training.learner import Learner
from cnnrun.training.run_records import read_result
from tests.support.configs import tiny_experiment

pytestmark = pytest.mark.cuda
WIDE = "model=[{conv: {out_channels: 512, norm: batch}}, {conv: {out_channels: 512, norm: batch}}, global_avg_pool]"


def tiny(*overrides: str) -> schema.Experiment:
    return tiny_experiment("train.epochs=1", *overrides)


@pytest.fixture
def limit_memory(gpu):
    """Return a function that allows `mib` MiB more memory; on a pretended GPU, no tensor above a tenth of that."""

    def allow(mib: int) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        taken = torch.cuda.memory_reserved()
        real = torch.cuda.get_device_name() != "a pretended GPU"
        torch.cuda.set_per_process_memory_fraction((taken + (mib if real else mib / 10) * 2**20) / total)

    yield allow
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_batch_too_large_for_memory_is_split_into_micro_batches(limit_memory, gpu, tmp_path, capfd):
    limit_memory(400)
    result = train_run(tiny(WIDE, "train.batch=1024"), tmp_path, gpu, resume=False)
    err = capfd.readouterr().err
    assert "memory ran out at step 0: continuing with 2 micro-batches per batch; the batch size is unchanged" in err
    assert result["steps"] == 1
    assert read_result(Path(result["run"]))["peak_memory_mib"] > 0


def run_out_of_memory_once(monkeypatch, owner: type, name: str) -> None:
    """Make the first call of a method raise an out-of-memory error."""
    real, calls = getattr(owner, name), []

    def call(self, *arguments):
        calls.append(name)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, *arguments)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name", "when"),
    [(Augment, "apply", "at step 0"), (ClassifyMeter, "update", "while evaluating after step 17")],
)
def test_training_continues_after_augmentation_or_evaluation_runs_out_of_memory(
    gpu, tmp_path, monkeypatch, capfd, owner, name, when
):
    run_out_of_memory_once(monkeypatch, owner, name)
    result = train_run(tiny("data.augment={shift: 0.2}"), tmp_path, gpu, resume=False)
    assert f"memory ran out {when}: continuing with 2 micro-batches" in capfd.readouterr().err
    assert result["steps"] == 17


def test_running_out_of_memory_in_the_optimizer_ends_the_run_in_one_line(gpu, tmp_path, monkeypatch, run_cli, tiny):

    def short(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Learner, "update_weights", short)
    code, _, err = run_cli("train", tiny, "--device", "cuda", "--runs", tmp_path / "runs")
    assert code == 6
    assert "memory ran out in the optimizer's step 0: CUDA out of memory" in err
    assert "Traceback" not in err
