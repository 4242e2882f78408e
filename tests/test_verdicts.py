"""One verdict: `check`, `data check` and `train` say the same of the same data, whatever tool wrote it."""

from __future__ import annotations

import pytest
import verdict_tables
import verdicts

INPUTS = verdict_tables.INPUTS


@pytest.mark.parametrize("name", INPUTS)
def test_the_three_commands_are_of_one_mind(tmp_path, name):
    verdict = INPUTS[name]
    said = verdicts.verdicts(verdict.build, tmp_path / "files")
    assert not verdicts.faults(verdict, said), said
