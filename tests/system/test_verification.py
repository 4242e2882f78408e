"""Verification of people who are not in the training data: train, evaluate, resume, export and the commands."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image as Pil
from sklearn.metrics import roc_auc_score

from cnnrun.base.errors import ConfigError, DataError, NonFiniteError
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts
from cnnrun.data.index import index_source
from cnnrun.experiment import assemble, config_file, open_run, schema
from cnnrun.export.onnx import Onnx
from cnnrun.export.python_file import Code
from cnnrun.model.trained_network import TrainedNetwork
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.export_run import export_run
from cnnrun.results.studies.train_run import train_run
from cnnrun.training.evaluation import measure_split
from tests.support.forked_processes import run_on_ranks
from tests.support.images import save_picture
from tests.support.interrupted_trainings import digest, stop_at

CPU = torch.device("cpu")
DIGITS = """
task: {verify: {dimension: 16}}
data:
  source: digits
  split: {by: label, val: ["5", "6"], test: ["7", "8", "9"]}
  augment: {shift: 0.1}
model:
  - conv: {out_channels: 16, norm: batch, activation: relu}
  - max_pool
  - conv: {out_channels: 24, norm: batch, activation: relu}
  - flatten
train: {epochs: 3, batch: 60, sampler: {identities: 12}, optimizer: {adamw: 0.003}, monitor: val/eer}
"""
LOSSES = ["arcface", "cosface: {margin: 0.2}", "softmax", "triplet"]


def digits_experiment(*overrides: str) -> schema.Experiment:
    return config_file.parse_config(DIGITS, "digits.yaml", ["name=digits", *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    made = digits_experiment("train.epochs=8", "train.ema={decay: 0.9}")
    return Path(train_run(made, root, CPU, resume=False)["run"])


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """The digits 7 to 9 as people, with twelve images each."""
    root = tmp_path_factory.mktemp("people")
    split = digits_experiment().data.source.read().splits["train"]
    for label in (7, 8, 9):
        for number in (split.targets["labels"] == label).nonzero()[:12, 0].tolist():
            path = root / f"digit {label}" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Pil.fromarray(split.images[number, :, :, 0]).save(path)
    return root


def threshold_at(far: float, trained: TrainedNetwork) -> float:
    """The threshold that val set for a FAR."""
    (threshold,) = [point.threshold for point in trained.choices.operating_points if point.far == far]
    return threshold


def test_no_class_is_in_two_splits():
    found = index_source(digits_experiment().data)
    classes = {name: set(split.targets["labels"][rows].tolist()) for name, (split, rows) in found.splits.items()}
    assert classes == {"train": {0, 1, 2, 3, 4}, "val": {5, 6}, "test": {7, 8, 9}}
    data = assemble.prepare_dataset(digits_experiment())
    assert digits_experiment().task.bind(data.facts).learning.build_criterion().centres.shape == (5, 16)
    assert "no class in two splits" in data.notes[0]


def test_verification_learns_and_eval_equals_the_training_metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "val/loss" not in rows[0]
    assert set(digits_experiment().task.metrics()) == {key[4:] for key in rows[0] if key.startswith("val/")}
    best = min(row["val/eer"] for row in rows)
    assert best < 0.4
    result = evaluate_run(run, run.parent.parent, CPU, "val")
    assert result["numbers"]["eer"] == best  # what training said of its best checkpoint
    test = evaluate_run(run, run.parent.parent, CPU, None)
    assert test["split"] == "test"
    assert [row["value"] for row in test["tables"]["verification"]] == [test["numbers"][n] for n in ("eer", "auc")]


def test_thresholds_are_chosen_on_val_and_only_applied_to_test(run):
    """The model stores the thresholds chosen on val at the best checkpoint, and test is measured at them."""
    given = open_run.open_trained(run, run.parent.parent, CPU)[1]
    val = evaluate_run(run, run.parent.parent, CPU, "val")
    chosen = {row["FAR"]: row["threshold here"] for row in val["tables"]["operating_points"]}
    assert [point.far for point in given.choices.operating_points] == given.task.spec.fars
    assert {f"{point.far:g}": point.threshold for point in given.choices.operating_points} == chosen
    held = {row["FAR wanted"]: row for row in val["tables"]["at_the_models_thresholds"]}
    assert all(row["FAR"] <= float(far) for far, row in held.items())  # on val itself, by construction
    test = evaluate_run(run, run.parent.parent, CPU, "test")
    kept = {row["FAR wanted"]: row["threshold"] for row in test["tables"]["at_the_models_thresholds"]}
    assert kept == chosen
    assert {row["FAR"]: row["threshold here"] for row in test["tables"]["operating_points"]} != chosen


@pytest.mark.parametrize("loss", LOSSES)
def test_every_verification_loss_learns(loss, tmp_path):
    """Val has the classes of train here, because five digits teach little about other digits."""
    written = f"{{{loss}}}" if ":" in loss else loss
    made = digits_experiment(f"task.verify.loss={written}", "data.split={val: 0.2}", "data.leakage=keep")
    path = Path(train_run(made, tmp_path, CPU, resume=False)["run"])
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val/auc"] > 0.9
    assert rows[-1]["val/rank_1"] > 0.6


@pytest.mark.parametrize(
    "more", [["task.verify.loss={arcface: {warmup: 0.8}}", "train.accumulate=2"], ["task.verify.loss=triplet"]]
)
def test_a_resumed_verification_training_equals_an_uninterrupted_one(tmp_path, more):
    made = digits_experiment("train.epochs=2", "train.ema={decay: 0.9}", *more)
    train_run(made, tmp_path / "whole", CPU, resume=True)
    with stop_at(17):
        train_run(made, tmp_path / "cut", CPU, resume=True)
    train_run(made, tmp_path / "cut", CPU, resume=True)
    assert digest(tmp_path / "whole/digits/1") == digest(tmp_path / "cut/digits/1")


def test_centres_are_trained_saved_and_initialized_from_the_seed(run, tmp_path):
    given = open_run.open_trained(run, run.parent.parent, CPU)[1]
    firsts = []
    for seed in (0, 0, 1):
        from cnnrun.training.learner import Learner

        made = digits_experiment(f"seed={seed}")
        setup = assemble.build_setup(made, assemble.prepare_dataset(made), None, CPU)
        firsts.append(Learner(setup).criterion.centres.detach().clone())
    assert torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[0], firsts[2])
    assert not torch.allclose(given.criterion.centres, firsts[0], atol=1e-3)


def test_the_centres_can_have_their_own_learning_rate(tmp_path):
    groups = "train.optimizer={adamw: {lr: 0.003, groups: [{params: 'criterion.*', lr: 0.03}]}}"
    try:
        made = digits_experiment(groups, "train.epochs=1")
    except ConfigError as error:
        pytest.fail(str(error))
    path = Path(train_run(made, tmp_path, CPU, resume=False)["run"])
    assert path.exists()
    with pytest.raises(ConfigError, match="matches no trainable parameter"):
        digits_experiment(groups.replace("criterion.*", "criterion.weights"), "train.epochs=1")


def test_a_failed_resume_keeps_the_thresholds_of_the_best_checkpoint(tmp_path, monkeypatch):
    """A resume whose first batch cannot be read does not save the best checkpoint again."""
    from cnnrun.data.training_batches import TrainingBatches

    made = digits_experiment("train.epochs=2")
    steps = made.train.steps_per_epoch(assemble.prepare_dataset(made).facts.counts["train"])
    with stop_at(steps + 1):
        train_run(made, tmp_path, CPU, resume=True)
    run = tmp_path / "digits" / "1"
    shutil.rmtree(run / "checkpoints" / f"step-{steps + 2:08d}")
    before = open_run.open_trained(run, tmp_path, CPU)[1].choices
    assert len(before.operating_points) == 4

    def unreadable(self, step):
        raise DataError("no")

    with monkeypatch.context() as patched:
        patched.setattr(TrainingBatches, "at", unreadable)
        with pytest.raises(DataError):
            train_run(made, tmp_path, CPU, resume=True)
    assert open_run.open_trained(run, tmp_path, CPU)[1].choices == before


def test_a_checkpoint_that_was_not_measured_has_no_threshold(tmp_path, run_cli, people):
    made = digits_experiment("train.epochs=2", "train.save_every=7")
    with stop_at(20):
        train_run(made, tmp_path, CPU, resume=True)
    run = tmp_path / "digits" / "1"
    words = ["verify", *sorted((people / "digit 7").iterdir())[:2], "--run", run / "checkpoints" / "latest"]
    code, _, err = run_cli(*words)
    assert code == 2
    assert "available: none" in err
    given = open_run.open_trained(run / "checkpoints" / "latest", tmp_path, CPU)[1]
    assert given.choices == Choices()
    assert "no threshold was chosen" in given.task.predicting.metadata(given.choices)["embedding"]
    assert evaluate_run(run / "checkpoints" / "latest", tmp_path, CPU, None)["numbers"]["eer"] < 0.6


def test_non_finite_embeddings_are_refused():
    task, facts = digits_experiment().task, assemble.prepare_dataset(digits_experiment()).facts
    meter = task.bind(facts).measuring.build_meter(Choices())
    meter.update({"embedding": torch.full((6, 16), torch.nan)}, {"labels": torch.tensor([0, 0, 0, 1, 1, 1])})
    with pytest.raises(NonFiniteError, match="not finite"):
        meter.compute()


def test_two_people_have_no_confidence_interval(run):
    rows = evaluate_run(run, run.parent.parent, CPU, "val")["tables"]["verification"]
    assert all(row["note"] == "no intervals: people are fewer than 5" and "from" not in row for row in rows)


@pytest.mark.parametrize("size", [2, 3])
def test_embedding_metrics_on_several_ranks_equal_one_process(run, size):
    made, given = open_run.open_trained(run, run.parent.parent, CPU)
    name, data = open_run.prepare_eval_data(made, given, "test")
    alone = measure_split(given.to_measure(), data.splits[name], 60)

    def of(rank: int) -> object:
        from cnnrun.base.ranks import join_ranks

        with join_ranks(CPU, 60) as ranks:
            return measure_split(given.to_measure(), data.splits[name], 60, ranks).metrics

    assert run_on_ranks(size, of) == [alone.metrics] * size


def test_an_exported_embedding_equals_the_network_and_states_its_threshold(run, tmp_path):
    given = open_run.open_trained(run, run.parent.parent, CPU)[1]
    point = threshold_at(0.01, given)
    report = export_run(Onnx(), run, run.parent.parent, None, tmp_path / "m.onnx")
    assert report["passed"]
    assert report["metrics"]["network"]["eer"] == pytest.approx(report["metrics"]["artefact"]["eer"], abs=1e-4)
    told = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(told["threshold"]) == point
    assert json.loads(told["far"]) == 0.01
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    (embeddings,) = session.run(["embedding"], {"pixels": pixels})
    np.testing.assert_allclose((embeddings**2).sum(1), 1, atol=1e-5)
    assert export_run(Code(), run, run.parent.parent, None, tmp_path / "m.py")["passed"]


def test_a_different_embedding_is_reported_as_disagreement():
    find_disagreement = digits_experiment().task.bind(DataFacts((), (1, 1, 1))).predicting.find_disagreement
    ours = torch.nn.functional.normalize(torch.randn(6, 16))
    assert find_disagreement({"embedding": ours}, {"embedding": ours + 1e-7}) is None
    turned = ours.roll(1, 1)
    assert "cosine with the network's" in find_disagreement({"embedding": ours}, {"embedding": turned})


@pytest.mark.parametrize(
    ("overrides", "where", "message"),
    [
        (
            ["data.split={val: 0.2}"],
            "data.split",
            "measured on classes that it was not trained on: set data.split.by: label",
        ),
        (["train.monitor=val/loss"], "train.monitor", "'val/loss' is not measured"),
        (
            ["task=classify", "train.monitor=val/accuracy"],
            "data.split.by",
            "measured on the classes that it is trained on",
        ),
        (["task.verify.fars=[0.01, 0.1]"], "fars", "the largest first"),
        (["task.verify.far=0.05"], "task", "give one of fars"),
        (["data.split={by: image, val: ['1']}", "data.leakage=keep"], "data.split", "with `by: label`"),
        (
            ["task.verify.loss=triplet", "train.sampler=uniform"],
            "train.sampler",
            "in a batch: use `sampler: identities`",
        ),
        (["data.augment={mixup: 0.3}"], "data.augment.mixup", "cannot learn from mixed images"),
        (["model=[{conv: 4}]"], "model", "add `flatten` or `global_avg_pool`"),
    ],
)
def test_incompatible_settings_are_refused_before_data_is_read(overrides, where, message):
    with pytest.raises(ConfigError) as told:
        digits_experiment(*overrides)
    assert any(where in line and message in line for line in told.value.lines), told.value.lines


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.split.val=['11']"], "data.split.val: no class '11'"),
        (["data.split.val=['9']"], "class '9' is held out both for val and for test"),
        (["data.split.test=['0', '1', '2', '3', '4', '7', '8', '9']"], "the train split is empty"),
        (["data.split.val=['5']"], "the val split: verify needs images of two or more people"),
        (["data.split.val=0.0"], "the data has no val split"),
        (["data.split.test=['1', '2', '3', '4', '7', '8', '9']"], "verify needs two or more people"),
        (["train.sampler.identities=7"], "train.sampler: train.batch 60 is not a multiple of 7 images"),
        (
            ["train.sampler.identities=10"],
            "train.sampler: a batch needs 6 classes of 10 images, but train has 5 classes",
        ),
        (
            ["task.verify.loss=triplet", "train.accumulate=5"],
            "each micro-batch of a rank needs two classes with 12 images each",
        ),
        (
            ["data.split={by: label, test: ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9'], val: 0.2}"],
            "train split is empty",
        ),
        (["task.verify.gallery=400"], "a person with more than 400 images"),
    ],
)
def test_unsuitable_data_is_refused_before_training(overrides, message, tmp_path):
    with pytest.raises((ConfigError, DataError), match=message.replace("(", r"\(").replace(")", r"\)")):
        train_run(digits_experiment(*overrides), tmp_path, CPU, resume=False)
    assert not list(tmp_path.iterdir())


# --- folders and files of pairs ---------------------------------------------------------------------------------------

FOLDERS = """
task: {{verify: {{dimension: 4}}}}
data:
  source: {{folder: {{root: {root}}}}}
  image: {{size: 8, channels: 3}}
  split: {{by: label, val: 0.3}}
model: [{{conv: 4}}, flatten]
train: {{epochs: 1, batch: 4, monitor: val/eer}}
"""


@pytest.fixture
def faces(tmp_path) -> Path:
    """Ten people with four images each, in the layout of LFW."""
    root = tmp_path / "lfw"
    for person in range(10):
        for number in range(1, 5):
            name = f"Person_{person}"
            save_picture(root / name / f"{name}_{number:04d}.png", seed=100 * person + number)
    return root


def folders_experiment(root: Path, *overrides: str) -> schema.Experiment:
    return config_file.parse_config(FOLDERS.format(root=root), "f.yaml", ["name=f", *overrides])


def test_whole_people_are_held_out(faces):
    found = index_source(folders_experiment(faces, "data.split.test=0.2").data)
    people = {name: set(split.targets["labels"][rows].tolist()) for name, (split, rows) in found.splits.items()}
    assert {name: len(each) for name, each in people.items()} == {"train": 5, "val": 3, "test": 2}
    assert len(set.union(*people.values())) == 10


def test_a_test_folder_may_have_new_people_but_none_of_train(faces, tmp_path, run_cli):
    root = tmp_path / "parted"
    for person in range(10):
        shutil.copytree(faces / f"Person_{person}", root / ("test" if person > 6 else "train") / f"Person_{person}")
    found = index_source(folders_experiment(root).data)
    assert sorted(found.contents.classes) == [f"Person_{n}" for n in range(10)]
    assert found.counts == {"train": 20, "test": 12, "val": 8}
    assert assemble.prepare_dataset(folders_experiment(root)).facts.class_counts.count(0) == 5
    with pytest.raises(DataError, match="Person_7' is not a class of the training split"):
        config_file.parse_config(
            FOLDERS.format(root=root).replace("by: label, ", "").replace("data:", "data:\n  leakage: keep"), "f.yaml"
        ).data.source.read()
    save_picture(root / "train" / "Person_8" / "new.png", seed=9999)
    with pytest.raises(DataError, match=r"1 class in more than one split"):
        assemble.prepare_dataset(folders_experiment(root, "data.split.val=['Person_0', 'Person_1']"))
    kept = assemble.prepare_dataset(
        folders_experiment(root, "data.split.val=['Person_0', 'Person_1']", "data.leakage=skip")
    )
    assert len(kept.splits["train"]) == 20
    save_picture(root / "val" / "Person_9" / "new.png", seed=9998)
    save_picture(root / "val" / "Person_1" / "new.png", seed=9997)
    with pytest.raises(DataError, match="both in val and in test: fix the data"):
        assemble.prepare_dataset(folders_experiment(root, "data.leakage=skip"))
    shutil.rmtree(root / "val")
    path = tmp_path / "f.yaml"
    path.write_text(FOLDERS.format(root=root))
    code, out, _ = run_cli("data", "check", path, "data.split.val=['Person_0', 'Person_1']")
    assert code == 8
    assert "classes, such as people, in several splits" in out


PAIRS = [("Person_7", 1, 2), ("Person_8", 1, "Person_9", 3), ("Person_9", 1, 4), ("Person_7", 2, "Person_8", 4)]


def write_pairs(path: Path, *rows: tuple[object, ...], header: str = "") -> Path:
    path.write_text(header + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def test_people_of_a_pairs_file_are_the_test_split_and_only_its_pairs_are_measured(faces, tmp_path):
    path = write_pairs(
        tmp_path / "pairs.txt", *PAIRS, ("Person_8", 1, 2), ("Person_9", "Person_9_0002.png", "Person_7", 3)
    )
    made = folders_experiment(faces, f"data.source.folder.pairs={path}", "train.epochs=1")
    data = assemble.prepare_dataset(made)
    train = data.splits["train"]
    assert {data.facts.classes[label] for label in data.splits["test"].targets["labels"].tolist()} == {
        "Person_7",
        "Person_8",
        "Person_9",
    }
    assert len(data.splits["test"]) == 12
    assert len(train) + len(data.splits["val"]) == 28
    run = Path(train_run(made, tmp_path / "runs", CPU, resume=False)["run"])
    result = evaluate_run(run, tmp_path / "runs", CPU, None)
    (row, _) = result["tables"]["verification"]
    assert (row["pairs of one person"], row["pairs of two people"]) == ("3", "3")
    given = open_run.open_trained(run, tmp_path / "runs", CPU)[1]
    test = data.splits["test"]
    embeddings = given.results(test.load_images(torch.arange(12)).float())["embedding"]
    place = {Path(test.sample_name(n)).stem: n for n in range(12)}
    pairs = [("Person_7_0001", "Person_7_0002"), ("Person_8_0001", "Person_9_0003"), ("Person_9_0001", "Person_9_0004")]
    pairs += [
        ("Person_7_0002", "Person_8_0004"),
        ("Person_8_0001", "Person_8_0002"),
        ("Person_9_0002", "Person_7_0003"),
    ]
    scores = [float(embeddings[place[a]] @ embeddings[place[b]]) for a, b in pairs]
    assert result["numbers"]["auc"] == pytest.approx(roc_auc_score([a[:8] == b[:8] for a, b in pairs], scores))


def test_the_folds_of_an_lfw_pairs_file_are_kept(faces, tmp_path):
    rows = [("Person_7", 1, 2), ("Person_8", 1, 2), ("Person_7", 1, "Person_8", 1), ("Person_7", 2, "Person_9", 1)]
    rows += [("Person_9", 1, 2), ("Person_8", 3, 4), ("Person_9", 3, "Person_8", 3), ("Person_7", 4, "Person_9", 4)]
    path = write_pairs(tmp_path / "pairs.txt", *rows, header="2\t2\n")
    pairs = (
        folders_experiment(faces, f"data.source.folder.pairs={path}")
        .data.source.read(has_disjoint_classes=True)
        .splits["test"]
        .targets["pairs"]
    )
    assert sorted(pairs[:, :, 1][pairs[:, :, 0] >= 0].tolist()) == [0] * 4 + [1] * 4


def test_drawn_folds_have_pairs_of_both_kinds(faces, tmp_path):
    rows = [("Person_7", a, b) for a in range(1, 5) for b in range(a + 1, 5)]
    rows += [("Person_7", 1, "Person_8", 1), ("Person_9", 2, "Person_8", 2), ("Person_9", 3, "Person_8", 2)]
    path = write_pairs(tmp_path / "pairs.txt", *rows)
    pairs = (
        folders_experiment(faces, f"data.source.folder.pairs={path}")
        .data.source.read(has_disjoint_classes=True)
        .splits["test"]
        .targets["pairs"]
    )
    assert sorted(pairs[:, :, 1][pairs[:, :, 0] >= 0].tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([*PAIRS, ("Nobody", 1, 2)], "", "pairs.txt:5: no person in the test images is called 'Nobody'"),
        ([*PAIRS, ("Person_7", 1, "\u00b2")], "", "pairs.txt:5: 'Person_7' has no image '\u00b2'"),
        ([*PAIRS, ("Person_7", 1, "9" * 5000)], "", "pairs.txt:5: 'Person_7' has no image"),
        (PAIRS, "500\n", "its first line says 500 pairs of a kind; it has 2 and 2"),
        (PAIRS, "2\n", ""),
        (PAIRS, "\ufeff2\t1\n", ""),
        ([*PAIRS, ("Person_7", 1, 9)], "", "pairs.txt:5: 'Person_7' has no image '9'"),
        ([*PAIRS, ("Person_7", 3, 3)], "", "pairs.txt:5: the image is compared with itself"),
        ([*PAIRS, ("Person_7", 2, 1)], "", "pairs.txt:5: repeats the pair of line 1"),
        ([*PAIRS, ("Person_7", 1)], "", "pairs.txt:5: a pair is written `name 1 2` or `name 1 other 2`; has 2 words"),
        (
            [("Person_7", 1, 2), ("Person_8", 1, 2)],
            "",
            "2 pairs of one person and 0 of two; two of each kind are needed",
        ),
        ([("Person_7", 1, "Person_8", 2)], "", "0 pairs of one person and 1 of two"),
        (PAIRS, "2\t1\n", ""),
        (PAIRS, "2\t2\n", "2 folds of 2 pairs of one person and then 2 of two"),
        (PAIRS, "1\t2\n", ""),
        (PAIRS, "0\t2\n", "0 folds of 2 pairs"),
        (PAIRS, "99999999\t99999999\n", "99999999 folds"),
        ([], "", "has no pairs"),
        ([(f"Person_{n}", 1, f"Person_{n + 1}", 1) for n in range(9)] + [("Person_0", 1, 2)], "", "lists every person"),
    ],
)
def test_b23_mistakes_in_a_pairs_file_are_reported_by_line(faces, tmp_path, rows, header, message):
    path = write_pairs(tmp_path / "pairs.txt", *rows, header=header)
    made = folders_experiment(faces, f"data.source.folder.pairs={path}")
    if not message:
        made.data.source.read(has_disjoint_classes=True)
        return
    with pytest.raises(DataError) as told:
        made.data.source.read(has_disjoint_classes=True)
    assert message in str(told.value)


def test_a_pair_number_that_matches_two_images_is_refused(faces, tmp_path):
    save_picture(faces / "Person_7" / "Person_7_0001.jpg", seed=5)
    path = write_pairs(tmp_path / "pairs.txt", *PAIRS)
    with pytest.raises(DataError, match="pairs.txt:1: 'Person_7' has 2 images 'Person_7_0001'"):
        folders_experiment(faces, f"data.source.folder.pairs={path}").data.source.read(has_disjoint_classes=True)


def test_a_pairs_file_is_refused_for_classification(faces, tmp_path):
    path = write_pairs(tmp_path / "pairs.txt", *PAIRS)
    more = ["task=classify", "data.split={val: 0.2}", "train.monitor=val/loss"]
    with pytest.raises(ConfigError, match="classify is not measured on pairs"):
        folders_experiment(faces, f"data.source.folder.pairs={path}", *more)


def test_skipping_unreadable_images_may_leave_too_few_folds(faces, tmp_path):
    path = write_pairs(tmp_path / "pairs.txt", *PAIRS)
    for number in (1, 2):
        (faces / "Person_7" / f"Person_7_{number:04d}.png").write_bytes(b"no")
    made = folders_experiment(faces, f"data.source.folder.pairs={path}", "data.bad_files=skip")
    run = Path(train_run(made, tmp_path / "runs", CPU, resume=False)["run"])
    with pytest.raises(DataError, match="fewer than two folds"):
        evaluate_run(run, tmp_path / "runs", CPU, None)


def test_data_split_refuses_a_config_that_holds_out_whole_classes(faces, tmp_path, run_cli):
    path = tmp_path / "f.yaml"
    path.write_text(FOLDERS.format(root=faces))
    code, _, err = run_cli("data", "split", path, "--out", tmp_path / "t.csv")
    assert (code, "cannot use data.split.by: label; remove that line" in err) == (2, True)


def test_held_out_classes_are_refused_if_the_source_defines_the_test_split(faces, tmp_path):
    path = write_pairs(tmp_path / "pairs.txt", *PAIRS)
    made = folders_experiment(
        faces, f"data.source.folder.pairs={path}", "data.split={by: label, val: 0.3, test: [Person_1]}"
    )
    with pytest.raises(DataError, match=r"data.split.test: the source has a test split of its own; remove this line"):
        index_source(made.data)


def test_b24_pickled_pairs_are_refused(faces, tmp_path):
    import pickle

    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(([b"\xff\xd8"], [True])))
    with pytest.raises(DataError, match="not text"):
        folders_experiment(faces, f"data.source.folder.pairs={tmp_path / 'lfw.bin'}").data.source.read(
            has_disjoint_classes=True
        )


def test_a_table_may_have_new_people_in_val_and_test(faces, tmp_path):
    rows = ["path,label,split"]
    for person in range(10):
        split = "test" if person > 6 else "val" if person > 4 else "train"
        rows += [f"Person_{person}/Person_{person}_{n:04d}.png,P{person},{split}" for n in range(1, 5)]
    (faces / "t.csv").write_text("\n".join(rows) + "\n")
    made = folders_experiment(faces, f"data.source={{table: {{path: {faces / 't.csv'}, split: split}}}}")
    assert index_source(made.data).counts == {"train": 20, "val": 8, "test": 12}
    with pytest.raises(DataError, match="'P5' is not a class of the training rows"):
        made.data.source.read()


# --- the commands -----------------------------------------------------------------------------------------------------


def test_verify_compares_two_images_with_the_stored_threshold(run, people, run_cli):
    first, second = sorted((people / "digit 7").iterdir())[:2]
    other = min((people / "digit 8").iterdir())
    given = open_run.open_trained(run, run.parent.parent, CPU)[1]
    for a, b in ((first, second), (first, other)):
        code, out, err = run_cli("verify", a, b, "--run", run, "--json")
        assert code == 0, err
        told = json.loads(out)
        assert told["threshold"] == threshold_at(0.01, given)
        rows = [json.loads(run_cli("predict", path, "--run", run, "--json")[1])["embedding"] for path in (a, b)]
        assert told["similarity"] == pytest.approx(float(np.dot(*rows)), abs=1e-5)
        assert told["same"] == (told["similarity"] >= told["threshold"])
        assert told["far"] == 0.01
    assert json.loads(run_cli("verify", first, first, "--run", run, "--json")[1])["similarity"] == pytest.approx(
        1, abs=1e-5
    )
    assert "not the same: similarity" in run_cli("verify", first, other, "--run", run, "--threshold", "1")[1]
    assert json.loads(run_cli("verify", first, other, "--run", run, "--threshold", "-1", "--json")[1])["same"]
    code, out, err = run_cli("verify", first, other, "--run", run, "--far", "0.0001", "--json")
    assert json.loads(out)["threshold"] == threshold_at(0.0001, given)
    assert "too few pairs of two people" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--far", "0.3"], 2, "no threshold was chosen on val for this FAR (available: 0.1, 0.01, 0.001, 0.0001)"),
        (["--far", "0.1", "--threshold", "0.2"], 2, "--threshold and --far: give one of them"),
    ],
)
def test_verify_refuses_invalid_thresholds(run, people, run_cli, words, code, message):
    paths = sorted((people / "digit 7").iterdir())[:2]
    left, _, err = run_cli("verify", *paths, "--run", run, *words)
    assert (left, message in err) == (code, True), err


def test_verify_refuses_a_network_of_another_task(trained_run, people, run_cli):
    paths = sorted((people / "digit 7").iterdir())[:2]
    code, _, err = run_cli("verify", *paths, "--run", trained_run)
    assert code == 2
    assert err == "this network is for classify and gives no embeddings; give a run of the task verify\n"


def test_verify_reports_unreadable_files_by_name(run, people, tmp_path, run_cli):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    good = min((people / "digit 7").iterdir())
    code, out, err = run_cli("verify", good, tmp_path / "broken.png", "--run", run)
    assert (code, out) == (8, "")
    assert "broken.png" in err
    assert run_cli("verify", good, tmp_path / "none.png", "--run", run)[0] == 8
    assert run_cli("verify", good, people, "--run", run)[0] == 2


def test_people_are_enrolled_added_removed_and_identified(run, people, tmp_path, run_cli):
    path = tmp_path / "g.safetensors"
    known = tmp_path / "known"
    for person in ("digit 7", "digit 8"):
        (known / person).mkdir(parents=True)
        for file in sorted((people / person).iterdir())[:5]:
            shutil.copy(file, known / person)
    code, out, err = run_cli("enroll", known, "--gallery", path, "--run", run, "--json")
    assert code == 0, err
    assert json.loads(out)["people"] == {"digit 7": 5, "digit 8": 5}
    before = path.read_bytes()
    code, _, err = run_cli("enroll", known, "--gallery", path, "--run", run)
    assert code == 0, "a command that is repeated changes nothing"
    assert "already holds these people" in err
    code, _, err = run_cli("enroll", people, "--gallery", path, "--run", run)
    assert code == 2
    assert "already exists; use --add" in err
    assert path.read_bytes() == before
    assert json.loads(run_cli("enroll", known, "--gallery", path, "--add", "--run", run, "--json")[1])["people"] == {
        "digit 7": 5,
        "digit 8": 5,
    }  # the very same pictures are not kept twice
    code, out, err = run_cli("enroll", people, "--gallery", path, "--add", "--run", run, "--json")
    assert json.loads(out)["people"] == {"digit 7": 12, "digit 8": 12, "digit 9": 12}
    code, out, err = run_cli(
        "enroll", "--gallery", path, "--remove", "digit 9", "--remove", "digit 7", "--run", run, "--json"
    )
    assert (json.loads(out)["people"], json.loads(out)["removed"]) == ({"digit 8": 12}, ["digit 9", "digit 7"])
    assert "digit 8      12" in run_cli("enroll", "--gallery", path)[1]
    assert run_cli("enroll", "--gallery", path, "--remove", "digit 5", "--run", run)[0] == 2
    assert run_cli("enroll", "--gallery", path, "--remove", "digit 8", "--run", run)[0] == 2
    assert json.loads(run_cli("enroll", "--gallery", path, "--json")[1])["people"] == {"digit 8": 12}
    assert list(tmp_path.glob(".*")) == []


def test_one_image_under_two_names_is_not_enrolled(run, people, tmp_path, run_cli):
    shutil.copytree(people, tmp_path / "known")
    photo = min((people / "digit 7").iterdir())
    shutil.copy(photo, tmp_path / "known" / "digit 9" / "again.png")
    path, told = tmp_path / "g.safetensors", "digit 7 and digit 9 have an image with the same embedding"
    code, _, err = run_cli("enroll", tmp_path / "known", "--gallery", path, "--run", run)
    assert (code, told in err, path.exists()) == (8, True, False)
    assert run_cli("enroll", people, "--gallery", path, "--run", run)[0] == 0
    before = path.read_bytes()
    (tmp_path / "alias" / "bob").mkdir(parents=True)
    shutil.copy(photo, tmp_path / "alias" / "bob")
    code, _, err = run_cli("enroll", tmp_path / "alias", "--gallery", path, "--add", "--run", run)
    assert (code, "digit 7 and bob have an image" in err, path.read_bytes() == before) == (8, True, True)


def test_the_images_of_a_person_are_replaced(run, people, tmp_path, run_cli):
    path = tmp_path / "g.safetensors"
    for person, count in (("first", 3), ("later", 2)):
        (tmp_path / person / "anna").mkdir(parents=True)
        for photo in sorted((people / "digit 8").iterdir())[:count]:
            shutil.copy(photo, tmp_path / person / "anna")
    assert run_cli("enroll", tmp_path / "first", "--gallery", path, "--run", run)[0] == 0
    words = ["enroll", tmp_path / "later", "--gallery", path, "--add", "--remove", "anna", "--run", run, "--json"]
    assert json.loads(run_cli(*words)[1])["people"] == {"anna": 2}
    _, _, err = run_cli("enroll", tmp_path / "first", "--gallery", path, "--add", "--run", run)
    assert "images left out: 2; each has the same embedding as another" in err


def test_a_csv_keeps_its_columns_if_the_first_image_is_unreadable(run, people, gallery, tmp_path, run_cli):
    (tmp_path / "broken.png").write_bytes(b"no")
    photo = min((people / "digit 9").iterdir())
    both = [tmp_path / "broken.png", photo]
    out = run_cli("identify", *both, "--gallery", gallery, "--run", run, "--csv")[1]
    table = list(csv.reader(io.StringIO(out)))
    ranks = [f"{column} {rank}" for rank in range(1, len(table[0]) // 2 - 1) for column in ("person", "similarity")]
    assert table[0] == ["path", "person", "similarity", *ranks, "error"]
    assert [row[1] for row in table[1:]] == ["", "digit 9"]
    table = list(csv.reader(io.StringIO(run_cli("predict", *both, "--run", run, "--csv")[1])))
    assert [len(row) for row in table] == [18, 18, 18]
    table = list(csv.reader(io.StringIO(run_cli("predict", both[0], "--run", run, "--csv")[1])))
    assert table[0] == ["path", "error"]
    assert (len(table), "broken.png" in table[1][0]) == (2, True)


@pytest.fixture
def gallery(run, people, tmp_path, run_cli) -> Path:
    path = tmp_path / "gallery.safetensors"
    assert run_cli("enroll", people, "--gallery", path, "--run", run)[0] == 0
    return path


def test_identify_returns_the_best_matches_or_unknown(run, people, gallery, run_cli):
    photos = sorted((people / "digit 9").iterdir())[:3]
    code, out, err = run_cli("identify", *photos, "--gallery", gallery, "--run", run, "--json", "--top", "2")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["path"] for row in rows] == list(map(str, photos))
    for row in rows:
        assert row["person"] == row["matches"][0]["person"] == "digit 9"  # its own picture is enrolled
        assert row["similarity"] == pytest.approx(1, abs=1e-5)
        assert len(row["matches"]) == 2
    stranger = Pil.new("L", (8, 8), 255)
    stranger.save(gallery.parent / "stranger.png")
    words = ["identify", gallery.parent / "stranger.png", photos[0], "--gallery", gallery, "--run", run]
    alike = json.loads(run_cli(*words, "--json")[1].splitlines()[0])["similarity"]
    out = run_cli(*words, "--threshold", (alike + 1) / 2, "--json")[1]
    assert [json.loads(line)["person"] for line in out.splitlines()] == [None, "digit 9"]
    assert "stranger.png: unknown   (" in run_cli(*words, "--threshold", (alike + 1) / 2)[1]
    out = run_cli("identify", people / "digit 9", "--gallery", gallery, "--run", run, "--csv")[1]
    table = list(csv.reader(io.StringIO(out)))
    ranks = [f"{column} {rank}" for rank in range(1, len(table[0]) // 2 - 1) for column in ("person", "similarity")]
    assert table[0] == ["path", "person", "similarity", *ranks, "error"]
    assert len(table) == 13
    text = run_cli("identify", photos[0], "--gallery", gallery, "--run", run)[1]
    assert f"{photos[0]}: digit 9   (digit 9 1.000" in text


def test_identify_warns_how_often_strangers_are_accepted(run, people, gallery, run_cli):
    photo = min((people / "digit 9").iterdir())
    err = run_cli("identify", photo, "--gallery", gallery, "--run", run, "--far", "0.1")[2]
    assert (
        "a stranger is compared with 36 images, at a false accept rate of 0.1 each (on val): up to 98% of strangers"
        in err
    )
    assert "--far 0.01 accepts fewer" in err


def test_unreadable_images_are_rows_with_an_error(run, people, gallery, tmp_path, run_cli):
    (tmp_path / "broken.png").write_bytes(b"no")
    photo = min((people / "digit 9").iterdir())
    code, out, _ = run_cli("identify", tmp_path / "broken.png", photo, "--gallery", gallery, "--run", run, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 8
    assert "error" in rows[0]
    assert rows[1]["person"] == "digit 9"


def test_a_gallery_of_another_network_is_refused(run, people, gallery, tmp_path, run_cli):
    other = train_run(digits_experiment("train.epochs=1"), tmp_path / "other", CPU, resume=False)["run"]
    photo = min((people / "digit 9").iterdir())
    for words in (["identify", photo], ["enroll", people, "--add"], ["enroll", "--remove", "digit 9"]):
        before = gallery.read_bytes()
        code, _, err = run_cli(*words, "--gallery", gallery, "--run", other)
        assert code == 3
        assert "made by another network" in err
        assert gallery.read_bytes() == before


def test_predict_prints_the_embedding(run, people, run_cli):
    photo = min((people / "digit 9").iterdir())
    row = json.loads(run_cli("predict", photo, "--run", run, "--json")[1])
    assert np.square(row["embedding"]).sum() == pytest.approx(1, abs=1e-5)
    assert "an embedding of 16 numbers" in run_cli("predict", photo, "--run", run)[1]
    table = list(csv.reader(io.StringIO(run_cli("predict", photo, "--run", run, "--csv")[1])))
    assert table[0] == ["path", *[f"e{n}" for n in range(16)], "error"]
    assert [float(cell) for cell in table[1][1:-1]] == row["embedding"]


def test_selftest_passes_for_verification(run_cli, tmp_path):
    path = tmp_path / "digits.yaml"
    path.write_text(DIGITS)
    code, out, err = run_cli("selftest", path, "--json")
    assert code == 0, (out, err)
    verdicts = {row["check"]: row["passed"] for row in json.loads(out)["checks"]}
    unknown = {"the first loss equals that of a random guess", "nothing is learned from shuffled labels"}
    assert {name for name, passed in verdicts.items() if passed is None} == unknown
