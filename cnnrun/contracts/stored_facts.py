"""Data facts and choices as files store them, and as checkpoints of format 2 and 3 store them."""

from __future__ import annotations

import json
from typing import Any

from pydantic import FiniteFloat, TypeAdapter

from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts

_FACTS, _CHOICES = TypeAdapter(DataFacts), TypeAdapter(Choices)


def parse_stored_facts(data: Any) -> tuple[DataFacts, Choices]:
    """Parse stored facts, and the choices that checkpoints of format 2 and 3 store among them. Raises ValueError."""
    choices = Choices()
    if isinstance(data, dict) and "chosen" in data:
        data = dict(data)
        choices = parse_described_choices(data.pop("chosen"))
    facts = _FACTS.validate_json(_to_json(data), strict=True)
    if problem := facts.consistency_problem():
        raise ValueError(problem)
    return facts, choices


def parse_choices(data: Any) -> Choices:
    """Parse stored choices. Raises ValueError."""
    choices = _CHOICES.validate_json(_to_json(data), strict=True)
    if problem := choices.consistency_problem():
        raise ValueError(problem)
    return choices


def parse_described_choices(data: Any) -> Choices:
    """Parse choices by description, as old checkpoints and calibrations store them. Raises ValueError."""
    values = TypeAdapter(dict[str, FiniteFloat]).validate_json(_to_json(data), strict=True)
    return parse_choices(Choices.from_descriptions(values).to_json())


def _to_json(data: Any) -> str:
    """Format as JSON, which pydantic reads more strictly than Python's objects. Raises ValueError."""
    try:
        return json.dumps(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
