"""Durations are printed with the units that suit them."""

from __future__ import annotations

import pytest

from cnnrun.base.durations import format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (3600 * 24 * 60, "1,440 h 0 min"),
    ],
)
def test_a_duration_has_units_that_suit_it(seconds, text):
    assert format_duration(seconds) == text
