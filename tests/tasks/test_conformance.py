"""Every task keeps the contract of its parts: what one part makes, the others take."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from types import NoneType
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from cnnrun.config.spec import union_members
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts, NumberStatistics
from cnnrun.contracts.layer import ShapeError
from cnnrun.contracts.prediction import Overlay, Prediction
from cnnrun.contracts.results import Measurement, Results, View
from cnnrun.contracts.stored_facts import parse_choices
from cnnrun.contracts.target_kind import TargetKind
from cnnrun.contracts.task import Task, TaskSpec
from cnnrun.contracts.task_parts import AssignedCell, Criterion, FeatureLevel, Targets
from cnnrun.tasks import TaskUnion
from cnnrun.tasks.classification import Classify
from cnnrun.tasks.detection.task import Detect
from cnnrun.tasks.embedding.losses import Triplet
from cnnrun.tasks.embedding.task import Verify
from cnnrun.tasks.multilabel import Multilabel
from cnnrun.tasks.regression.losses import Gaussian, Quantile
from cnnrun.tasks.regression.task import Regress

COUNT = 24
MAPS, VECTOR = (8, 4, 6), (16,)
FACTS = DataFacts(
    ("ape", "bee", "cat"),
    (3, 32, 48),
    (100.0, 90.0, 80.0),
    (60.0, 50.0, 40.0),
    (12, 6, 6),
    {"train": COUNT, "val": COUNT},
    class_ids=(7, 8, 9),
    numbers=(NumberStatistics("weight", 5.0, 2.0, 0.0, 10.0), NumberStatistics("turn", 180.0, 90.0, 0.0, 359.0)),
)
VIEWS = [View((60 + number, 90), 0.5, 0.5, 1.0, 2.0) for number in range(COUNT)]
SPECS: list[TaskSpec] = [
    *(kind() for kind in union_members(TaskUnion)),
    Classify(label_smoothing=0.1, class_weights="balanced", top_k=2),
    Multilabel(positive_weights="balanced"),
    Regress(loss=Gaussian(), angles={"turn": 360.0}),
    Regress(loss=Quantile(), columns=["weight"]),
    Detect(score={"bee": 0.0}, least_score=0.0, most=7),
    Verify(loss=Triplet(), fars=[0.5, 0.1], far=0.1, dimension=5),
]
TASKS = [pytest.param(spec.bind(FACTS), id=f"{spec.kind} {number}") for number, spec in enumerate(SPECS)]
every_task = pytest.mark.parametrize("task", TASKS)


def draw_targets(kind: TargetKind) -> Targets:
    """Targets of this kind for COUNT samples, of all classes."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(COUNT) % 3
    corner = torch.rand(COUNT, 2, 2, generator=generator) * torch.tensor([30.0, 16.0])
    boxes = torch.cat([corner, corner + 6 + 9 * torch.rand(COUNT, 2, 2, generator=generator)], 2)
    objects = torch.stack([labels, torch.where(labels > 1, -1, labels)], 1)
    targets: dict[TargetKind, Targets] = {
        TargetKind.LABELS: {"labels": labels},
        TargetKind.LABEL_SETS: {"present": torch.rand(COUNT, 3, generator=generator) < 0.5},
        TargetKind.NUMBERS: {"numbers": torch.rand(COUNT, 2, generator=generator) * torch.tensor([10.0, 359.0])},
        TargetKind.MASKS: {"masks": torch.randint(0, 3, (COUNT, 32, 48), generator=generator).byte()},
        TargetKind.BOXES: {
            "boxes": boxes,
            "objects": objects,
            "roles": torch.zeros(COUNT, 2, dtype=torch.uint8),
            "areas": (boxes[..., 2:] - boxes[..., :2]).prod(2),
            "view": torch.tensor([view.as_tuple() for view in VIEWS]),
        },
    }
    return targets[kind]


def targets_of(task: Task) -> Targets:
    return draw_targets(task.spec.target_kind)


def build_head(task: Task) -> tuple[nn.Module, tuple[int, ...]]:
    """The task's head on a vector, or on feature maps if it cannot take a vector."""
    torch.manual_seed(0)
    try:
        return task.learning.build_head([VECTOR]).eval(), VECTOR
    except ShapeError:
        return task.learning.build_head([MAPS]).eval(), MAPS


def draw_outputs(task: Task) -> Tensor:
    head, shape = build_head(task)
    with torch.no_grad():
        outputs: Tensor = head(torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(2)))
    return outputs


def build_criterion(task: Task) -> Criterion:
    torch.manual_seed(0)  # a criterion may have weights of its own
    return task.learning.build_criterion()


def decode(task: Task, choices: Choices) -> Results:
    results: Results = task.predicting.build_decoder(choices)(draw_outputs(task))
    return results


def measure(task: Task, choices: Choices, tables: bool = True) -> Measurement:
    meter, results, targets = task.measuring.build_meter(choices), decode(task, choices), targets_of(task)
    for part in torch.arange(COUNT).split(10):
        meter.update(
            {name: values[part] for name, values in results.items()},
            {name: values[part] for name, values in targets.items()},
        )
    return meter.compute(tables)


def predict(task: Task) -> tuple[Prediction, ...]:
    thresholds = task.predicting.thresholds(Choices())
    return tuple(task.predicting.predictions(decode(task, Choices()), VIEWS, thresholds))


def test_every_task_and_kind_of_target_is_tested():
    assert {type(spec) for spec in SPECS} == set(union_members(TaskUnion))
    assert {spec.target_kind for spec in SPECS} == set(TargetKind)


@every_task
def test_each_part_is_of_its_class_or_none(task):
    hints = get_type_hints(Task)
    for field in fields(Task):
        classes = get_args(hints[field.name]) or (hints[field.name],)
        assert isinstance(getattr(task, field.name), classes), field.name
        assert (NoneType in classes) == (field.name in ("calibration", "matching", "cells"))
    assert (task.kind, task.facts, task.requirements) == (task.spec.kind, FACTS, task.spec.requirements())


@every_task
def test_binding_to_data_that_was_not_counted_is_never_refused(task):
    uncounted = task.spec.bind(DataFacts((), (3, 32, 48)))
    assert {field.name for field in fields(Task) if getattr(uncounted, field.name) is None} == {
        field.name for field in fields(Task) if getattr(task, field.name) is None
    }


@every_task
def test_losses_are_named_finite_scalars(task):
    losses = build_criterion(task)(draw_outputs(task), targets_of(task))
    assert losses
    assert all(loss.shape == () and loss.isfinite() and loss >= 0 for loss in losses.values())
    guess = task.learning.guess_loss()
    assert guess is None or guess > 0


@every_task
@torch.no_grad()
def test_sample_losses_equal_the_loss_of_each_sample_alone(task):
    criterion, outputs, targets = build_criterion(task).double(), draw_outputs(task).double(), targets_of(task)
    losses_B = criterion.sample_losses(outputs, targets)
    assert losses_B.shape == (COUNT,)
    for index, loss in enumerate(losses_B.tolist()):
        alone = {name: values[index : index + 1] for name, values in targets.items()}
        expected = sum(criterion(outputs[index : index + 1], alone).values())
        assert loss == pytest.approx(float(expected), rel=1e-12, abs=1e-15)
    if not task.requirements.needs_class_batches:  # pairs within a batch have no loss of one sample
        whole = sum(criterion(outputs, targets).values())
        assert float(losses_B.mean()) == pytest.approx(float(whole), rel=1e-9)
        assert losses_B.std() > 0


@every_task
def test_targets_are_mixed_by_the_tasks_that_require_it(task):
    targets, outputs = targets_of(task), draw_outputs(task)
    partners = {name: values.flip(0) for name, values in targets.items()}
    if not task.requirements.can_mix_targets:
        with pytest.raises(NotImplementedError):
            task.learning.mix_targets(targets, partners, torch.ones(COUNT))
        return
    criterion = build_criterion(task)
    for weight, expected in ((1.0, targets), (0.0, partners)):
        mixed = task.learning.mix_targets(targets, partners, torch.full((COUNT,), weight))
        torch.testing.assert_close(criterion(outputs, mixed), criterion(outputs, expected))


@every_task
def test_results_have_their_declared_shapes(task):
    results = decode(task, Choices())
    assert list(results) == list(task.predicting.result_shapes())  # the order of an exported file's outputs
    assert {name: values.shape[1:] for name, values in results.items()} == task.predicting.result_shapes()


@every_task
def test_metrics_are_those_that_may_be_monitored(task):
    targets = targets_of(task)
    assert task.measuring.split_problem(targets) is None
    whole, short = measure(task, Choices()), measure(task, Choices(), tables=False)
    assert set(whole.metrics) == set(task.spec.metrics())
    assert set(task.spec.metrics().values()) <= {"max", "min"}
    assert (short.metrics, short.choices) == (whole.metrics, whole.choices)
    undefined = {name for name, value in whole.metrics.items() if value is None}
    assert undefined == set(task.measuring.undefined_metrics(targets))
    assert set(whole.bootstrap_draws) | set(whole.correct) <= set(whole.metrics)
    json.dumps([whole.tables, whole.matrices, task.measuring.comparison_key()])


@every_task
def test_choices_of_a_measurement_can_be_stored_and_used(task):
    choices = measure(task, Choices()).choices
    assert choices.consistency_problem() is None
    assert parse_choices(json.loads(json.dumps(choices.to_json()))) == choices
    assert set(measure(task, choices).metrics) == set(task.spec.metrics())
    json.dumps(task.predicting.metadata(choices), allow_nan=False)
    assert set(task.predicting.thresholds(choices)) <= set(FACTS.classes)


@every_task
def test_predictions_are_json_text_and_csv(task):
    predictions = predict(task)
    assert len(predictions) == COUNT
    for prediction in predictions:
        assert isinstance(prediction, Prediction)
        content = json.loads(json.dumps(prediction.to_json(), allow_nan=False))
        assert set(task.predicting.unreadable_json) <= set(content)
        assert not {"path", "error"} & set(content)  # of the file
        assert len(prediction.to_text().splitlines()) == 1
        columns, rows = prediction.csv_columns(), prediction.csv_rows()
        assert columns == predictions[0].csv_columns()
        assert len(set(columns)) == len(columns)
        assert rows
        assert max(map(len, rows)) <= len(columns)
        assert all(cell is None or isinstance(cell, str | int | float) for row in rows for cell in row)


@every_task
def test_predictions_of_a_batch_equal_those_one_by_one(task):
    results, thresholds = decode(task, Choices()), task.predicting.thresholds(Choices())
    for number, expected in enumerate(predict(task)):
        alone = {name: values[number : number + 1] for name, values in results.items()}
        (prediction,) = task.predicting.predictions(alone, [VIEWS[number]], thresholds)
        assert describe(prediction) == describe(expected)


def describe(prediction: Prediction) -> tuple[object, ...]:
    """Everything that a prediction says, comparable by ==."""
    class_map, overlay = prediction.class_map(), prediction.overlay()
    drawn = overlay and (overlay.boxes, None if overlay.class_map is None else overlay.class_map.tolist())
    return prediction.to_json(), prediction.csv_rows(), None if class_map is None else class_map.tolist(), drawn


@every_task
def test_only_tasks_with_objects_or_overlays_give_them(task):
    predictions = predict(task)
    overlays = [prediction.overlay() for prediction in predictions]
    objects = [found for prediction in predictions for found in prediction.coco_results()]
    if task.predicting.has_overlays:
        assert all(isinstance(overlay, Overlay) for overlay in overlays)
        colours = {box.colour for overlay in overlays for box in overlay.boxes}
        assert colours <= set(range(len(FACTS.classes)))
    else:
        assert overlays == [None] * COUNT
    if task.predicting.has_objects:
        assert set(task.predicting.thresholds(Choices())) == set(FACTS.classes)
        assert {found["category_id"] for found in objects} <= set(FACTS.class_ids)
    else:
        assert objects == []


@every_task
def test_results_agree_with_themselves_and_not_with_others(task):
    results, predicting = decode(task, Choices()), task.predicting
    assert predicting.find_disagreement(results, results) is None
    assert predicting.largest_difference(results, results) == pytest.approx(0, abs=1e-6)
    for change in (lambda values: values * float("nan"), lambda values: values.roll(1, 0)):
        others = {name: change(values) if values.is_floating_point() else values for name, values in results.items()}
        assert predicting.find_disagreement(results, others)


@every_task
def test_targets_and_scores_can_be_shown(task):
    targets, outputs = targets_of(task), draw_outputs(task)
    texts = task.showing.describe_targets(targets)
    assert len(texts) == COUNT
    assert all(text and len(text.splitlines()) == 1 for text in texts)
    assert all(isinstance(line, str) for line in task.showing.data_notes())
    if task.showing.has_overlays:
        assert len(task.showing.target_overlays(targets)) == COUNT
    else:
        with pytest.raises(NotImplementedError):
            task.showing.target_overlays(targets)
    scores = task.showing.class_scores(outputs, Choices())
    assert len(scores.raw_BK) == len(scores.display_BK) == len(scores.default_B) == COUNT
    assert not scores.names or scores.raw_BK.shape[1] == len(scores.names)
    assert int(scores.default_B.max()) < scores.raw_BK.shape[1]


@every_task
def test_feature_level_notes_take_the_targets_of_a_split(task):
    """Objects of a split are concatenated, with the count of each image."""
    targets, levels = targets_of(task), [FeatureLevel(MAPS, (9, 9), (8.0, 8.0))]
    if task.spec.target_kind is TargetKind.BOXES:
        is_object = targets["objects"] >= 0
        targets = {name: values[is_object] for name, values in targets.items() if name != "view"}
        targets["counts"] = is_object.sum(1)
    assert all(isinstance(line, str) for line in task.showing.feature_level_notes(levels, targets))


@every_task
def test_a_temperature_acts_exactly_on_the_tasks_that_can_be_calibrated(task):
    plain, warm = decode(task, Choices()), decode(task, Choices(temperature=2.0))
    is_same = all(torch.equal(plain[name], warm[name]) for name in plain)
    if task.calibration is None:
        assert is_same
        return
    assert not is_same
    assert task.predicting.metadata(Choices(temperature=2.0))["temperature"] == 2.0
    nll = [task.calibration.negative_log_likelihood(draw_outputs(task), targets_of(task), t) for t in (1.0, 2.0)]
    assert all(isinstance(value, float) and torch.tensor(value).isfinite() for value in nll)
    assert nll[0] != nll[1]


@every_task
def test_matching_finds_the_points_that_the_meter_chose(task):
    choices = measure(task, Choices()).choices
    if task.matching is None:
        assert choices.operating_points == ()
        return
    embeddings = task.matching.embeddings(decode(task, Choices()))
    assert embeddings.shape == (COUNT, task.matching.dimension)
    assert [point.far for point in choices.operating_points] == list(task.matching.fars)
    for point in choices.operating_points:
        assert task.matching.find_operating_point(choices, point.far) == point
        assert isinstance(task.matching.operating_point_note(point), str)
    assert task.matching.find_operating_point(choices) in choices.operating_points
    assert task.matching.find_operating_point(choices, 0.987) is None
    assert task.matching.find_operating_point(Choices()) is None


@every_task
def test_cells_are_assigned_to_drawn_objects(task):
    if task.cells is None:
        return
    outputs, targets = draw_outputs(task), targets_of(task)
    cells = task.cells.assigned_cells(outputs, targets)
    objects = task.showing.target_overlays(targets)[0].boxes
    assert cells
    for cell in cells:
        assert isinstance(cell, AssignedCell)
        assert 0 <= cell.cell_index < outputs.shape[1]
        assert 0 <= cell.object_index < len(objects)
        assert 0 <= cell.quality <= 1
        assert 0 <= cell.x_px < FACTS.image_shape[2]
        assert 0 <= cell.y_px < FACTS.image_shape[1]


def test_thresholds_of_the_first_edition_are_found_for_rates_of_more_than_six_digits():
    """Their description has six digits of the rate."""
    spec = Verify(fars=[0.1234567], far=0.1234567)
    (point,) = measure(spec.bind(FACTS), Choices()).choices.operating_points
    stored = Choices.from_descriptions(Choices(operating_points=(point,)).by_description())
    assert stored.operating_points == (replace(point, far=0.123457),)
    assert spec.find_operating_point(stored) == stored.operating_points[0]
    (row,) = measure(spec.bind(FACTS), stored).tables["at_the_models_thresholds"]
    assert row["threshold"] == point.threshold


def test_a_part_of_a_wrong_class_is_found():
    task = Classify().bind(FACTS)
    with pytest.raises(AssertionError):
        test_each_part_is_of_its_class_or_none(replace(task, learning=task.showing))
    with pytest.raises(AssertionError):
        test_each_part_is_of_its_class_or_none(replace(task, calibration=task.measuring))
