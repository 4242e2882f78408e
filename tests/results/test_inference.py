"""Results of files: batch norms folded, the next batch read ahead, bfloat16 by `--fast`; equal to the network's."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from cnnrun.base.errors import DataError, UserError
from cnnrun.data.training_batches import batches_in_order
from cnnrun.experiment.open_run import measure_run, open_trained
from cnnrun.model.batch_norm_folding import fold_batch_norms
from cnnrun.model.network import materialize
from cnnrun.results import inference
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.inference import InferenceNetwork, compute_results
from cnnrun.training.evaluation import measure_metrics
from tests.support.images import save_picture
from tests.support.networks import build_from_zoo
from tests.support.small_runs import TASKS

CPU = torch.device("cpu")


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    for number in range(10):
        save_picture(tmp_path / "photos" / f"{number}.png", seed=number, size=(20, 24))
    return sorted((tmp_path / "photos").iterdir())


def trained_of(runs: dict[str, Path], task: str):
    return open_trained(runs[task], runs[task].parent, CPU)[1]


@pytest.mark.parametrize("task", TASKS)
def test_results_of_files_are_the_networks(of_each_task, photos, task):
    trained = trained_of(of_each_task, task)
    channels, height, width = trained.facts.image_shape
    pixels = torch.stack(
        [
            torch.from_numpy(inference.load_with_view(path, (height, width), channels, trained.image)[0].copy())
            for path in photos
        ]
    )
    expected = trained.results(pixels.permute(0, 3, 1, 2).float())
    parts = [results for _, results, _ in compute_results(trained, photos, 4)]
    for name, values in expected.items():
        actual = torch.cat([part[name] for part in parts])
        assert torch.allclose(actual.float(), values.float(), rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "densenet121", "shufflenet_v2_x1_0", "regnet_y_400mf"])
def test_a_folded_network_is_equal_and_leaves_the_original_alone(name):
    network = materialize(build_from_zoo(name, (3, 64, 64), 10).network, 0).eval()
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded = fold_batch_norms(network)
    images = torch.rand(2, 3, 64, 64) * 255
    with torch.inference_mode():
        expected, actual = network(images), folded(images)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    norms = [sum(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules()) for net in (network, folded)]
    assert norms[1] < norms[0] / 2 or name.startswith("densenet")  # its norms stand before the convolutions


def test_the_next_batch_is_read_while_the_network_computes(of_each_task, photos, monkeypatch):
    """When a batch's results are computed, the images of the next one have been asked for, and no further ones."""
    trained, asked, seen = trained_of(of_each_task, "classify"), [], []
    load, compute = inference.load_with_view, InferenceNetwork.results

    def load_and_note(path, *rest):
        asked.append(path)
        return load(path, *rest)

    def compute_and_note(self, images):
        deadline = time.monotonic() + 10
        while len(asked) < min(10, 3 * (len(seen) + 2)) and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append(len(asked))
        return compute(self, images)

    monkeypatch.setattr(inference, "load_with_view", load_and_note)
    monkeypatch.setattr(InferenceNetwork, "results", compute_and_note)
    assert len(list(compute_results(trained, photos, 3))) == 4
    assert seen == [6, 9, 10, 10]


def test_an_error_in_finding_files_comes_after_the_results_before_it(of_each_task, photos):
    def paths():
        yield from photos[:5]
        raise DataError("no such folder")

    chunks = compute_results(trained_of(of_each_task, "classify"), paths(), 2)
    assert [[path for path, _ in next(chunks)[0]] for _ in range(2)] == [photos[:2], photos[2:4]]
    with pytest.raises(DataError, match="no such folder"):
        next(chunks)


def test_fast_says_what_bfloat16_changes(of_each_task, photos, capfd, monkeypatch):
    monkeypatch.setattr(inference, "has_bfloat16", lambda device: True)
    for task in TASKS:
        trained = trained_of(of_each_task, task)
        capfd.readouterr()
        fast = [results for _, results, _ in compute_results(trained, photos, 4, fast=True)]
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("--fast")]
        assert len(lines) == 1
        found = re.search(r"on the first 4 images, .* by up to ([0-9.e-]+) from those in float32", lines[0])
        assert found
        assert 0 < float(found[1]) < 0.5 or task == "detect"
        assert (", and 0 of 4 answers change" in lines[0]) == (task in ("classify", "multilabel", "detect"))
        assert len(fast) == 3


def test_fast_is_refused_where_there_is_no_bfloat16(of_each_task, photos, monkeypatch):
    monkeypatch.setattr(inference, "has_bfloat16", lambda device: False)
    with pytest.raises(UserError, match="--fast needs a device that computes in bfloat16; cpu does not"):
        list(compute_results(trained_of(of_each_task, "classify"), photos, 4, fast=True))


@pytest.mark.parametrize("task", TASKS)
def test_eval_fast_measures_what_predict_fast_computes(of_each_task, task, monkeypatch):
    """Its metrics are those of the folded network in bfloat16: near those in float32, and not the same loss."""
    monkeypatch.setattr(inference, "has_bfloat16", lambda device: True)
    run = of_each_task[task]
    exact, fast = (evaluate_run(run, run.parent, CPU, "val", fast=fast) for fast in (False, True))
    assert ("precision" in exact, fast["precision"]) == (False, "bfloat16")
    examples = measure_run(run, run.parent, CPU, "val").examples
    network = InferenceNetwork(trained_of(of_each_task, task), fast=True)
    measured = measure_metrics(
        network.results, trained_of(of_each_task, task).task, trained_of(of_each_task, task).choices,
        batches_in_order(examples, 8, CPU),
    )  # fmt: skip
    for name, value in measured.items():
        assert fast["numbers"][name] == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-4)), name
    if "loss" in exact["numbers"]:
        assert fast["numbers"]["loss"] != exact["numbers"]["loss"]
        assert fast["numbers"]["loss"] == pytest.approx(exact["numbers"]["loss"], rel=0.1)
