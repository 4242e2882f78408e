"""Embeddings by Euclidean distance, and averaged with the mirror image: trained, measured, exported, compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image as Pil
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score

from cnnrun.base.errors import ConfigError
from cnnrun.experiment import assemble, config_file, open_run
from cnnrun.export.onnx import Onnx
from cnnrun.export.python_file import Code
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.export_run import export_run
from cnnrun.results.studies.train_run import train_run
from tests.support.interrupted_trainings import digest, stop_at

CPU = torch.device("cpu")
TEXT = """
name: digits
task: {verify: {dimension: 16, SETTINGS}}
data:
  source: digits
  split: {by: label, val: ["5", "6"], test: ["7", "8", "9"]}
model:
  - conv: {name: first, out_channels: 8, norm: batch, activation: relu}
  - max_pool
  - flatten
train: {epochs: 2, batch: 60, sampler: {identities: 12}, optimizer: {adamw: 0.003}, monitor: val/eer}
"""
EUCLIDEAN = "similarity: euclidean, loss: triplet"
KINDS = {"euclidean": EUCLIDEAN, "mirror": "mirror: true", "both": f"{EUCLIDEAN}, mirror: true"}


def build_experiment(kind: str, *overrides: str):
    return config_file.parse_config(TEXT.replace("SETTINGS", KINDS[kind]), "f.yaml", list(overrides))


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory) -> Path:
    return Path(train_run(build_experiment(request.param), tmp_path_factory.mktemp("runs"), CPU, resume=False)["run"])


@pytest.fixture
def opened(run):
    experiment, trained = open_run.open_trained(run, run.parent.parent, CPU)
    data = assemble.prepare_dataset(experiment)
    test = data.splits["test"]
    return trained, test.load_images(torch.arange(len(test))).float(), test.targets["labels"].numpy()


def test_the_mirror_image_is_averaged_outside_of_training(opened):
    trained, images, _ = opened
    network, spec = trained.network, trained.task.spec
    with torch.no_grad():
        outputs = [network.head(network.layers(network.normalize(part))) for part in (images, images.flip(3))]
        expected = (outputs[0] + outputs[1]) / 2 if spec.mirror else outputs[0]
        assert torch.equal(network(images), expected)
        if spec.similarity == "cosine":
            expected = torch.nn.functional.normalize(expected)
        torch.testing.assert_close(trained.results(images)["embedding"], expected)
        network.train()
        try:
            once = network.head(network.layers(network.normalize(images)))
            assert torch.equal(network(images), once)
        finally:
            network.eval()


def test_metrics_are_of_distances_or_cosines(run, opened):
    trained, images, labels = opened
    embeddings = trained.results(images)["embedding"].double().numpy()
    similarity = trained.task.spec.similarity
    distances = cdist(embeddings, embeddings, metric=similarity)
    first, second = np.triu_indices(len(labels), 1)
    is_same = labels[first] == labels[second]
    measured = evaluate_run(run, run.parent.parent, CPU, None)
    assert measured["numbers"]["auc"] == pytest.approx(roc_auc_score(is_same, -distances[first, second]), abs=1e-6)
    rows = measured["tables"]["operating_points"]
    for row in rows:
        is_near = distances[first, second]
        accepted = (
            is_near <= row["threshold here"] if similarity == "euclidean" else 1 - is_near >= row["threshold here"]
        )
        assert accepted[~is_same].mean() <= float(row["FAR"])
        assert accepted[is_same].mean() == pytest.approx(row["TAR"], abs=1e-4)
    nearest = distances[:, np.r_[[int(np.argmax(labels == label)) for label in (7, 8, 9)]]]
    probes = np.setdiff1d(np.arange(len(labels)), [int(np.argmax(labels == label)) for label in (7, 8, 9)])
    assert measured["numbers"]["rank_1"] == pytest.approx((nearest.argmin(1) + 7 == labels)[probes].mean(), abs=2e-3)


def test_exports_equal_the_network_and_say_how_to_compare(run, tmp_path):
    trained = open_run.open_trained(run, run.parent.parent, CPU)[1]
    assert export_run(Onnx(), run, run.parent.parent, None, tmp_path / "m.onnx")["passed"]
    assert export_run(Code(), run, run.parent.parent, None, tmp_path / "m.py")["passed"]
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    point = next(point for point in trained.choices.operating_points if point.far == trained.task.spec.far)
    is_euclidean = trained.task.spec.similarity == "euclidean"
    assert json.loads(metadata["threshold"]) == (-point.threshold if is_euclidean else point.threshold)
    assert ("distance" in metadata["embedding"]) == is_euclidean
    assert json.loads(metadata["pairs of two people"]) == point.impostor_pairs


def test_people_are_enrolled_identified_and_verified(run, tmp_path, run_cli):
    split = build_experiment("euclidean").data.source.read().splits["train"]
    for label in (7, 8):
        for number in (split.targets["labels"] == label).nonzero()[:4, 0].tolist():
            path = tmp_path / "people" / f"digit {label}" / f"{number}.png"
            path.parent.mkdir(exist_ok=True, parents=True)
            Pil.fromarray(split.images[number, :, :, 0]).save(path)
    measure = "distance" if open_run.read_run_config(run).task.similarity == "euclidean" else "similarity"
    first, second = sorted((tmp_path / "people" / "digit 7").iterdir())[:2]
    code, out, _ = run_cli("verify", first, second, "--run", run, "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["same"] == (
        answer[measure] <= answer["threshold"] if measure == "distance" else answer[measure] >= answer["threshold"]
    )
    code, out, _ = run_cli("verify", first, first, "--run", run)
    assert out.startswith("the same: " + measure)
    gallery = tmp_path / "g.safetensors"
    assert run_cli("enroll", tmp_path / "people", "--gallery", gallery, "--run", run)[0] == 0
    code, out, _ = run_cli("identify", tmp_path / "people", "--gallery", gallery, "--run", run, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["person"] for row in rows] == ["digit 7"] * 4 + ["digit 8"] * 4  # each is in the gallery itself
    assert all(abs(row[measure] - (0 if measure == "distance" else 1)) < 2e-3 for row in rows)
    threshold = "9" if measure == "distance" else "-0.99"
    code, out, _ = run_cli("verify", first, second, "--run", run, "--threshold", threshold)
    assert out.startswith("the same")
    impossible = "-0.5" if measure == "distance" else "1.5"
    assert run_cli("verify", first, second, "--run", run, "--threshold", impossible)[0] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_equals_an_uninterrupted_one(kind, tmp_path):
    made = build_experiment(kind, "train.freeze=first")
    train_run(made, tmp_path / "whole", CPU, resume=True)
    with stop_at(12):
        train_run(made, tmp_path / "cut", CPU, resume=True)
    train_run(made, tmp_path / "cut", CPU, resume=True)
    assert digest(tmp_path / "whole/digits/1") == digest(tmp_path / "cut/digits/1")


def test_frozen_features_are_not_stored_for_networks_that_see_mirror_images(tmp_path, capfd):
    train_run(build_experiment("mirror", "train.freeze=first"), tmp_path, CPU, resume=False)
    assert "mirror images are averaged" in capfd.readouterr().err


def test_the_mirror_image_is_part_of_the_digest(opened):
    trained = opened[0]
    averages_mirror, digest_before = trained.network.averages_mirror, trained.digest
    trained.network.averages_mirror = not averages_mirror
    assert replace(trained).digest != digest_before
    trained.network.averages_mirror = averages_mirror
    assert replace(trained).digest == digest_before


def test_a_network_without_landmarks_takes_no_photos(run, tmp_path, run_cli):
    Pil.new("L", (8, 8)).save(tmp_path / "a.png")
    code, _, err = run_cli("verify", tmp_path / "a.png", tmp_path / "a.png", "--run", run, "--find")
    assert code == 2
    assert "does not say where a face's landmarks are" in err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.verify.threshold=-0.6", "no distance is a match at -0.6"),
        (
            "task.verify.landmarks={left_eye: [50, 10], right_eye: [20, 10]}",
            "left_eye must lie to the left of right_eye",
        ),
        ("task.verify.landmarks={left_eye: [20, 10], right_eye: [20.05, 10]}", "by a pixel or more"),
        ("task.verify.landmarks={left_eye: [-1, 10], right_eye: [20, 10]}", "must be at least 0; got -1"),
    ],
)
def test_thresholds_and_landmarks_that_cannot_be_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        build_experiment("euclidean", override)


def test_explained_embeddings_are_directions(opened):
    trained, images, _ = opened
    with torch.no_grad():
        scores = trained.task.showing.class_scores(trained.network(images), trained.choices)
    assert scores.quantity == "cosine"
    torch.testing.assert_close(scores.display_BK.norm(dim=1), torch.ones(len(images)))


def test_losses_that_ignore_an_embeddings_length_are_refused_for_distances():
    with pytest.raises(ConfigError, match="similarity: euclidean needs loss: triplet; arcface ignores"):
        build_experiment("euclidean", "task.verify.loss=arcface")
