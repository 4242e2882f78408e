"""The head is loaded from a weights file only if it was trained for the same task on the same classes or numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cnnrun.contracts.facts import DataFacts, NumberStatistics
from cnnrun.contracts.task import TaskSpec
from cnnrun.data.image_settings import ImageSettings
from cnnrun.model.network import build_network, materialize
from cnnrun.model.structures import Model
from cnnrun.model.weights_file import Weights, WeightsDescription, match_weights
from cnnrun.tasks.classification import Classify
from cnnrun.tasks.multilabel import Multilabel
from cnnrun.tasks.regression.task import Regress
from tests.support.networks import NODES

ANIMALS = DataFacts(("cat", "dog"), (1, 4, 4))
SIZES = DataFacts((), (1, 4, 4), numbers=(NumberStatistics("height"), NumberStatistics("width")))
ANGLES = replace(SIZES, numbers=(NumberStatistics("pitch"), NumberStatistics("yaw")))
CLASSIFY, MULTILABEL, REGRESS = Classify(), Multilabel(), Regress()


def flat_network(task: TaskSpec, facts: DataFacts):
    return build_network(NODES.validate_python(["flatten", {"linear": 3}]), task.bind(facts)).network


def weights_of(task: TaskSpec, facts: DataFacts) -> Weights:
    layers = NODES.validate_python(["flatten", {"linear": 3}])
    description = WeightsDescription(
        task=task, image=ImageSettings(size=(4, 4), channels=1), model=Model(layers=layers)
    )
    return Weights(materialize(flat_network(task, facts), 0).state_dict(), "name", description, facts)


@pytest.mark.parametrize(
    ("trained", "wanted", "has_head"),
    [
        ((CLASSIFY, ANIMALS), (CLASSIFY, ANIMALS), True),
        ((REGRESS, SIZES), (REGRESS, SIZES), True),
        ((CLASSIFY, ANIMALS), (CLASSIFY, replace(ANIMALS, classes=("car", "bus"))), False),
        ((CLASSIFY, ANIMALS), (MULTILABEL, ANIMALS), False),
        ((REGRESS, SIZES), (REGRESS, ANGLES), False),
        ((REGRESS, SIZES), (Regress(columns=["width", "height"]), SIZES), False),
        ((REGRESS, SIZES), (Regress(columns=["width"]), SIZES), False),
    ],
)
def test_the_head_is_matched_only_for_the_same_task_on_the_same_classes_or_numbers(trained, wanted, has_head):
    task, facts = wanted
    matches = match_weights(flat_network(task, facts), weights_of(*trained), None, task.bind(facts))
    assert any(name.startswith("head.") for name in matches) == has_head
    assert any(name.startswith("layers.") for name in matches)


def test_without_a_description_the_data_alone_decide_about_the_head():
    described = weights_of(REGRESS, SIZES)
    for facts, has_head in ((SIZES, True), (ANGLES, False)):
        matches = match_weights(
            flat_network(REGRESS, facts), replace(described, description=None), None, REGRESS.bind(facts)
        )
        assert any(name.startswith("head.") for name in matches) == has_head
