"""Choices survive their description and JSON, and newer choices take the place of older ones."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnrun.contracts.choices import Choices, OperatingPoint
from cnnrun.contracts.stored_facts import parse_choices, parse_described_choices

POSITIVE = st.floats(0.01, 100)
FARS = [0.1, 0.01, 0.001, 0.25, 1e-05, 0.123456]  # descriptions have six digits


@st.composite
def choices(draw: st.DrawFn) -> Choices:
    """Any choices whose operating points come from one measurement, and so from the same pairs."""
    impostor_pairs = draw(st.integers(0, 10**9))
    fars = draw(st.lists(st.sampled_from(FARS), unique=True, max_size=4))
    return Choices(
        draw(st.none() | POSITIVE),
        draw(st.dictionaries(st.text(max_size=12), st.floats(0, 1), max_size=4)),
        tuple(OperatingPoint(far, draw(st.floats(-1, 1)), impostor_pairs) for far in fars),
    )


@given(choices())
def test_choices_survive_their_description(expected):
    assert Choices.from_descriptions(expected.by_description()) == expected
    assert parse_described_choices(json.loads(json.dumps(expected.by_description()))) == expected


@given(choices())
def test_choices_survive_json(expected):
    assert parse_choices(json.loads(json.dumps(expected.to_json()))) == expected


def test_descriptions_are_those_of_the_first_edition():
    points = (OperatingPoint(0.1, 0.25, 45), OperatingPoint(0.0001, 0.75, 45))
    assert Choices(1.5, {"bee": 0.4}, points).by_description() == {
        "threshold of bee": 0.4,
        "threshold at FAR 0.1": 0.25,
        "threshold at FAR 0.0001": 0.75,
        "pairs of two people": 45.0,
        "temperature": 1.5,
    }
    assert Choices().by_description() == {}


@pytest.mark.parametrize("description", ["threshold", "Temperature", "threshold at FAR x", ""])
def test_unknown_descriptions_are_refused(description):
    with pytest.raises(ValueError, match=r"unknown choice|could not convert"):
        Choices.from_descriptions({description: 0.5})


@given(choices(), choices())
def test_newer_choices_replace_older_ones_kind_by_kind(older, newer):
    replaced = older.replaced_by(newer)
    assert replaced.temperature == (older.temperature if newer.temperature is None else newer.temperature)
    assert replaced.class_thresholds == (newer.class_thresholds or older.class_thresholds)
    assert replaced.operating_points == (newer.operating_points or older.operating_points)
    assert older.replaced_by(Choices()) == Choices().replaced_by(older) == older
    assert replaced.replaced_by(newer) == replaced


def test_a_temperature_of_zero_or_less_is_inconsistent():
    for temperature in (0.0, -1.0):
        assert Choices(temperature).consistency_problem() == "a temperature must be above 0"
    assert Choices(1e-6).consistency_problem() is None
    assert Choices().consistency_problem() is None
