from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from cnnrun.base.errors import CheckpointError, ParityError
from cnnrun.experiment import open_run
from cnnrun.export import parity, writer
from cnnrun.export.onnx import Onnx
from cnnrun.results.export_run import export_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported_model(trained_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    report = export_run(Onnx(), trained_run, trained_run.parent.parent, None, path)
    return path, report


def test_the_onnx_file_gives_the_networks_outputs_on_raw_pixels(exported_model, trained_run):
    path, report = exported_model
    experiment, trained = open_run.open_trained(trained_run, trained_run.parent.parent, CPU)
    split, data = open_run.prepare_eval_data(experiment, trained, None)
    examples = data.splits[split]
    pixels = examples.load_images(torch.arange(len(examples))).permute(0, 2, 3, 1).contiguous().numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7, 100):
        (theirs,) = session.run(None, {"pixels": pixels[:batch]})
        ours = trained.results(torch.from_numpy(pixels[:batch]).permute(0, 3, 1, 2).float())["probabilities"]
        np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-5)
    (theirs,) = session.run(None, {"pixels": pixels})
    accuracy = (theirs.argmax(1) == examples.targets["labels"].numpy()).mean()
    assert accuracy == pytest.approx(report["metrics"]["network"]["accuracy"])


def test_the_onnx_file_describes_its_inputs_outputs_and_classes(exported_model):
    trained_home = Path(__file__).parents[2]
    path, report = exported_model
    model = onnx.load(path)
    assert [entry.name for entry in model.graph.input] == ["pixels"]
    assert [entry.name for entry in model.graph.output] == ["probabilities"]
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert dims[0].dim_param
    assert [dim.dim_value for dim in dims[1:]] == [8, 8, 1]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == list("0123456789")
    assert metadata["task"] == "classify"
    assert report["samples_compared"] >= 64
    assert report["batch_sizes"] == [1, 2, 7]
    written = json.loads((path.parent / "parity.json").read_text())
    assert written["passed"] is True
    assert str(trained_home).encode() not in path.read_bytes()  # no local path leaks into the file


def test_a_file_that_differs_from_the_network_is_removed_with_exit_code_7(trained_run, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the one before")
    real = Onnx.reload

    def distorted(self, file):
        run = real(self, file)
        return lambda pixels: [value + np.float32(0.01) for value in run(pixels)]

    monkeypatch.setattr(Onnx, "reload", distorted)
    with pytest.raises(ParityError) as refused:
        export_run(Onnx(), trained_run, tmp_path, None, path)
    assert refused.value.exit_code == 7
    assert "probabilities differ by up to" in str(refused.value)
    assert path.read_bytes() == b"the one before"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx", "parity-failed.json"]
    assert json.loads((tmp_path / "parity-failed.json").read_text())["passed"] is False


def test_a_differing_metric_fails_the_export_even_when_probabilities_agree(trained_run, tmp_path, monkeypatch):
    task = open_run.open_trained(trained_run, tmp_path, CPU)[1].task
    monkeypatch.setattr(type(task.predicting), "find_disagreement", lambda *a: None)
    real = Onnx.reload

    def shuffled(self, file):
        run = real(self, file)
        return lambda pixels: [np.roll(value, 1, axis=1) for value in run(pixels)]

    monkeypatch.setattr(Onnx, "reload", shuffled)
    with pytest.raises(ParityError, match="accuracy is"):
        export_run(Onnx(), trained_run, tmp_path, None, tmp_path / "model.onnx")


@pytest.mark.parametrize(("off", "passes"), [(0.0, True), (0.00004, True), (0.0002, False)])
def test_metrics_of_the_exported_file_must_agree_to_four_digits(trained_run, tmp_path, monkeypatch, off, passes):
    """The exported file's metrics are shifted by `off`; half a unit in the fourth digit is the bound."""
    real, calls = parity.measure_metrics, []

    def moved(*arguments):
        calls.append(real(*arguments))
        return calls[-1] if len(calls) == 1 else {name: value + off for name, value in calls[-1].items()}

    monkeypatch.setattr(parity, "measure_metrics", moved)
    if passes:
        assert export_run(Onnx(), trained_run, tmp_path, None, tmp_path / "model.onnx")["passed"]
    else:
        with pytest.raises(ParityError, match="in the network and"):
            export_run(Onnx(), trained_run, tmp_path, None, tmp_path / "model.onnx")


def test_metadata_gives_the_image_height_before_the_width(trained_run, tmp_path):
    trained = open_run.open_trained(trained_run, tmp_path, CPU)[1]
    wide = replace(trained, task=trained.task.spec.bind(replace(trained.facts, image_shape=(3, 20, 30))))
    assert writer.artefact_metadata(wide)["input"] == "uint8 [batch, 20, 30, 3], RGB"


@pytest.mark.parametrize("data", [b"", b"text", b"\x08\x07" * 50])
def test_a_file_that_is_not_onnx_is_refused(tmp_path, data):
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(CheckpointError, match="ONNX Runtime cannot load it"):
        Onnx().reload(tmp_path / "m.onnx")


def test_parity_is_checked_on_64_samples_and_three_batch_sizes():
    assert parity.MIN_SAMPLES >= 64
    assert parity.BATCH_SIZES == (1, 2, 7)


def test_an_image_is_stable_if_small_noise_does_not_change_its_result():
    """The network tests whether the first pixel is above 0; noise on a pixel of exactly 0 changes the answer."""

    def agree(ours, theirs):
        return None if torch.equal(ours["above"], theirs["above"]) else "differ"

    task = SimpleNamespace(predicting=SimpleNamespace(find_disagreement=agree))
    for value, steady in ((1.0, True), (0.0, False), (-1.0, True)):
        trained = SimpleNamespace(results=lambda x: {"above": x[:, 0, 0, 0] > 0}, task=task)
        picture = torch.full((1, 1, 4, 4), value)
        assert parity._is_stable(trained, picture, trained.results(picture)) is steady


def test_a_small_split_is_filled_up_with_training_samples(trained_run, tmp_path, monkeypatch):
    from cnnrun.experiment.schema import Experiment

    small = Experiment.model_validate(open_run.read_config(trained_run / "config.yaml"))
    split = small.data.split.model_copy(update={"test": 0.01})
    monkeypatch.setattr(
        open_run,
        "read_config",
        lambda *a, **k: small.model_copy(update={"data": small.data.model_copy(update={"split": split})}),
    )
    report = export_run(Onnx(), trained_run, tmp_path, None, tmp_path / "model.onnx")
    assert report["samples_compared"] == 64
    assert report["split"] == "test"
