"""Facts and choices are read as both editions stored them, and damaged ones are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cnnrun.contracts.choices import Choices, OperatingPoint
from cnnrun.contracts.facts import DataFacts, NumberStatistics
from cnnrun.contracts.stored_facts import parse_choices, parse_described_choices, parse_stored_facts

FACTS = DataFacts(
    ("ape", "bee"),
    (3, 8, 6),
    (0.5, 1.0, 2.0),
    (1.0, 2.0, 3.0),
    (30, 20),
    {"train": 50, "val": 9},
    "0" * 64,
    (7, 9),
    (NumberStatistics("weight", 5.0, 2.0, -1.0, 9.0),),
)
CHOICES = Choices(1.5, {"ape": 0.25}, (OperatingPoint(0.1, 0.375, 45), OperatingPoint(0.01, 0.625, 45)))
POINT = {"far": 0.1, "threshold": 0.5, "impostor_pairs": 3}
NAN, INFINITY = float("nan"), float("inf")


def stored(data: Any) -> Any:
    return json.loads(json.dumps(data))


def test_facts_of_this_edition_have_no_choices():
    assert "chosen" not in FACTS.to_json()
    assert parse_stored_facts(stored(FACTS.to_json())) == (FACTS, Choices())


def test_facts_of_the_first_edition_have_their_choices_among_them():
    record = stored(FACTS.to_json() | {"chosen": CHOICES.by_description()})
    before = stored(record)
    assert parse_stored_facts(record) == (FACTS, CHOICES)
    assert record == before  # the caller's record is left as it is
    assert parse_stored_facts(stored(FACTS.to_json() | {"chosen": {}})) == (FACTS, Choices())


def test_facts_without_optional_entries_have_defaults():
    assert parse_stored_facts({"classes": ["a"], "image": [1, 2, 3]}) == (DataFacts(("a",), (1, 2, 3)), Choices())


@pytest.mark.parametrize(
    "damage",
    [
        {"classes": [1, 2]}, {"classes": ["ape", "ape"]}, {"classes": None}, {"image": [3, 8]}, {"image": [3, 0, 6]},
        {"image": ["x", 1, 2]}, {"mean": [1.0, 2.0]}, {"mean": [NAN, 0.0, 0.0]}, {"std": [1.0, 0.0, 1.0]},
        {"std": [INFINITY, 1.0, 1.0]}, {"class_counts": [1]}, {"class_counts": [1, -1]}, {"class_counts": [1.5, 1]},
        {"counts": {"train": -1}}, {"counts": []}, {"class_ids": [1, 2, 3]}, {"fingerprint": 3}, {"unknown": 1},
        {"numbers": [{"name": "a", "mean": NAN}]}, {"numbers": [{"mean": 1.0}]}, {"numbers": [{"name": "a", "x": 1}]},
        {"chosen": None}, {"chosen": []}, {"chosen": {"temperature": 0}}, {"chosen": {"unknown": 1.0}},
    ],
    ids=repr,
)  # fmt: skip
def test_damaged_facts_are_refused(damage):
    with pytest.raises(ValueError):
        parse_stored_facts(FACTS.to_json() | damage)


def nested(depth: int) -> list[Any]:
    data: list[Any] = []
    for _ in range(depth):
        data = [data]
    return data


@pytest.mark.parametrize("data", [{"chosen": nested(100_000)}, {"classes": nested(100_000)}], ids=["chosen", "classes"])
def test_deeply_nested_facts_are_refused(data):
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_stored_facts(FACTS.to_json() | data)


@pytest.mark.parametrize("data", [None, [], 3, "facts", [FACTS.to_json()]], ids=repr)
def test_records_that_are_not_an_object_are_refused(data):
    for parse in (parse_stored_facts, parse_choices, parse_described_choices):
        with pytest.raises(ValueError):
            parse(data)


@pytest.mark.parametrize(
    "damage",
    [
        {"temperature": 0}, {"temperature": -1.0}, {"temperature": NAN}, {"temperature": "1"}, {"temperature": []},
        {"class_thresholds": None}, {"class_thresholds": {"ape": None}}, {"class_thresholds": {"ape": INFINITY}},
        {"operating_points": None}, {"operating_points": [3]}, {"operating_points": [{"far": 0.1}]},
        {"operating_points": [POINT | {"threshold": NAN}]}, {"operating_points": [POINT | {"impostor_pairs": 1.5}]},
        {"operating_points": [POINT | {"far": "0.1"}]}, {"operating_points": [POINT | {"unknown": 1}]}, {"unknown": 1},
    ],
    ids=repr,
)  # fmt: skip
def test_damaged_choices_are_refused(damage):
    assert parse_choices(stored({"operating_points": [POINT]})).operating_points == (OperatingPoint(**POINT),)
    with pytest.raises(ValueError):
        parse_choices(CHOICES.to_json() | damage)


@pytest.mark.parametrize(
    "damage",
    [
        {"temperature": 0}, {"temperature": NAN}, {"temperature": INFINITY}, {"temperature": "1"},
        {"temperature": None}, {"threshold of ape": NAN}, {"pairs of two people": INFINITY},
        {"pairs of two people": NAN}, {"threshold at FAR nan": 0.5}, {"threshold at FAR x": 0.5}, {"unknown": 1.0},
    ],
    ids=repr,
)  # fmt: skip
def test_damaged_choices_of_the_first_edition_are_refused(damage):
    assert parse_described_choices(CHOICES.by_description()) == CHOICES
    with pytest.raises(ValueError):
        parse_described_choices(CHOICES.by_description() | damage)
