"""Precision: `auto` is measured, said, recorded in the run and kept; val is always measured in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cnnrun.base.ranks import Ranks
from cnnrun.data.cache import user_cache_folder
from cnnrun.experiment import assemble
from cnnrun.experiment.config_file import parse_config, read_config
from cnnrun.experiment.open_run import measure_run
from cnnrun.experiment.preparation import prepare_training
from cnnrun.results.studies.train_run import train_run
from cnnrun.training import precision, step_time
from cnnrun.training.precision import choose_precision, estimate_images_per_second
from cnnrun.training.step_time import StepSize
from tests.support.configs import LINKED, TINY, tiny_experiment
from tests.support.interrupted_trainings import digest, stop_at
from tests.support.small_runs import train_tiny

CPU = torch.device("cpu")


def network_of(text: str = TINY):
    experiment = parse_config(text, "some.yaml")
    return assemble.build_checked_network(experiment, assemble.prepare_dataset(experiment).facts).network


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A processor with bfloat16 on which it is `measured.speedup` times as fast; counts the measurements."""

    class Measured:
        speedup, count = 2.0, 0
        network, step = None, None

        def measure(self, network, step):
            self.count += 1
            self.network, self.step = network, step
            return self.speedup

    measured = Measured()
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "_measure_speedup", measured.measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user cache"))
    return measured


@pytest.mark.parametrize(
    ("speedup", "expected"), [(0.0, "float32"), (1.149, "float32"), (1.15, "bfloat16"), (2.0, "bfloat16")]
)
def test_auto_becomes_a_plain_word_in_the_run(tmp_path, capfd, measured, speedup, expected):
    measured.speedup = speedup
    run = train_tiny(tmp_path, "train.epochs=1")
    assert read_config(run / "config.yaml").train.precision == expected
    assert f"precision: {expected} (bfloat16 is {speedup:.2f} times" in capfd.readouterr().err


def test_a_processor_without_bfloat16_trains_in_float32(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False})
    run = train_tiny(tmp_path, "train.epochs=1")
    assert read_config(run / "config.yaml").train.precision == "float32"
    assert "precision: float32 (cpu does not compute in bfloat16)" in capfd.readouterr().err


def test_a_precision_in_the_config_is_not_measured(tmp_path, measured):
    for name in ("float32", "bfloat16"):
        run = train_tiny(tmp_path, "train.epochs=1", f"train.precision={name}")
        assert read_config(run / "config.yaml").train.precision == name
    assert measured.count == 0


def test_a_network_is_measured_once_on_a_machine(measured):
    step = StepSize(64, (1, 8, 8), CPU)
    assert choose_precision(network_of(), None, step) == "bfloat16"
    measured.speedup = 1.0
    assert choose_precision(network_of(), None, step) == "bfloat16"
    assert measured.count == 1
    for other in (
        (network_of(LINKED), None, step),
        (network_of(), "conv1", step),
        (network_of(), None, StepSize(32, (1, 8, 8), CPU)),
    ):
        assert choose_precision(*other) == "float32"
    assert measured.count == 4


@pytest.mark.parametrize(
    ("overrides", "layers", "shape"),
    [
        (["train.freeze=conv1"], ["max_pool1", "flatten1", "dropout1", "linear1"], (4, 8, 8)),
        (["train.freeze=flatten1"], ["dropout1", "linear1"], (64,)),
        (["train.freeze=conv1", "data.augment.shift=0.1"], None, (1, 8, 8)),
        (["train.freeze=conv1", "data.memory_gib=0.001"], None, (1, 8, 8)),
        ([], None, (1, 8, 8)),
    ],
    ids=["features", "flat features", "augmented", "more than memory", "all layers learn"],
)
def test_what_the_training_computes_in_each_step_is_measured(measured, overrides, layers, shape):
    experiment = tiny_experiment(*overrides)
    prepare_training(experiment, None, CPU)
    names = [name for name, _ in measured.network.layers.named_children()]
    assert names == (layers or ["conv1", "max_pool1", "flatten1", "dropout1", "linear1"])
    assert measured.step.shape == shape
    assert measured.network.layers.linear1.training
    seconds = step_time.measure_seconds_per_image(measured.network, measured.step, ("float32",))
    assert seconds[0] > 0


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": "b"}', b"[1]", b"\xff"])
def test_stored_speedups_that_are_damaged_are_measured_again(measured, content):
    file = user_cache_folder() / "precisions.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    assert choose_precision(network_of(), None, StepSize(64, (1, 8, 8), CPU)) == "bfloat16"
    assert list(json.loads(file.read_text()).values()) == [2.0]


def test_a_cache_that_cannot_be_written_only_costs_another_measurement(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choose_precision(network_of(), None, StepSize(64, (1, 8, 8), CPU)) == "bfloat16"


def test_resuming_keeps_the_precision_with_which_the_run_began(tmp_path, capfd, measured):
    whole = train_tiny(tmp_path / "whole")
    with stop_at(13):
        train_tiny(tmp_path / "cut")
    measured.speedup = 1.0
    (user_cache_folder() / "precisions.json").unlink()
    resumed = Path(train_run(tiny_experiment(), tmp_path / "cut", CPU, resume=True)["run"])
    assert read_config(resumed / "config.yaml").train.precision == "bfloat16"
    assert digest(resumed) == digest(whole)
    assert measured.count == 1


def test_another_precision_in_the_config_is_another_training(tmp_path, capfd, measured):
    with stop_at(13):
        train_tiny(tmp_path)
    second = Path(train_run(tiny_experiment("train.precision=float32"), tmp_path, CPU, resume=True)["run"])
    assert second.name != "1"
    assert "train.precision was bfloat16, is float32 now" in capfd.readouterr().err


def test_the_measurement_is_a_ratio_of_times_and_restores_the_threads():
    threads = torch.get_num_threads()
    network = assemble.materialize(network_of(), 0).to(memory_format=torch.channels_last)
    speedup = precision._measure_speedup(network, StepSize(64, (1, 8, 8), CPU))
    assert 0.05 < speedup < 20
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("bfloat16_seconds", "expected"), [(0.01, 100), (0.019, 50)])
def test_the_estimate_of_init_measures_each_precision_once(monkeypatch, bfloat16_seconds, expected):
    calls = []

    def measure(network, step, precisions):
        calls.append(precisions)
        return [0.02, bfloat16_seconds]

    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "measure_seconds_per_image", measure)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert estimate_images_per_second(network_of(), StepSize(64, (1, 8, 8), CPU)) == pytest.approx(expected)
    assert calls == [("float32", "bfloat16")]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError('"kernel" not implemented for BFloat16'),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("one"),
    ],
)
def test_a_measurement_that_fails_means_float32_and_is_not_stored(measured, monkeypatch, capfd, error):
    def fail(network, step):
        raise error

    monkeypatch.setattr(precision, "_measure_speedup", fail)
    step = StepSize(64, (1, 8, 8), CPU)
    assert choose_precision(network_of(), None, step) == "float32"
    assert f"precision: float32 (bfloat16 cannot be measured: {error})" in capfd.readouterr().err
    monkeypatch.setattr(precision, "_measure_speedup", measured.measure)
    assert choose_precision(network_of(), None, step) == "bfloat16"


def test_every_rank_takes_the_first_ranks_choice(tmp_path, measured):
    class Second(Ranks):
        rank, world_size = 1, 2

        def broadcast(self, compute):
            return "float32"

    prepared = prepare_training(tiny_experiment(), None, CPU, Second())
    assert prepared.experiment.train.precision == "float32"
    assert measured.count == 0


@pytest.mark.parametrize("extra", [[], ["train.freeze=conv1"]], ids=["all layers", "frozen features"])
def test_val_is_measured_in_float32_as_eval_measures_it(tmp_path, extra):
    """With frozen layers, the features of val are computed once: they must be those of the network as it is used."""
    run = train_tiny(tmp_path, "train.precision=bfloat16", "train.epochs=1", *extra)
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    evaluated = measure_run(run, run.parent, CPU, "val").measurement.metrics
    assert logged["val/loss"] == pytest.approx(evaluated["loss"], rel=1e-6)
    assert logged["val/accuracy"] == evaluated["accuracy"]
