"""`check`, `data check` and `train` give the same verdict on the same data, whatever tool wrote it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.verdicts import INPUTS, PARTS, three_commands
from tests.support.verdicts.three_commands import Said, Verdict

EACH = ("check", "data check", "train")
EVERY = 3  # only every third input is tested here; `benchmarks/verdicts.py` tries all, which takes five minutes


def test_input_names_are_unique():
    assert len(INPUTS) == sum(map(len, PARTS)) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", list(INPUTS)[::EVERY])
def test_the_three_commands_agree(tmp_path, name):
    said = three_commands.run_commands(INPUTS[name].build, tmp_path / "files")
    assert not three_commands.disagreements(INPUTS[name], said), said


def equal_answers(code: int = 8, out: str = "", err: str = "t.csv:2: label is empty\n") -> dict[str, Said]:
    return dict.fromkeys(EACH, Said(code, out, err))


@pytest.mark.parametrize("command", EACH)
@pytest.mark.parametrize(
    "other",
    [
        {"code": 2},
        {"err": "t.csv:3: label is empty\n"},
        {"err": ""},
        {"err": "Traceback (most recent call last):\nt.csv:2: label is empty\n"},
    ],
)
def test_a_command_that_disagrees_is_noticed(command, other):
    verdict, said = Verdict(lambda folder: None, 8, "label is empty"), equal_answers()
    assert not three_commands.disagreements(verdict, said)
    assert three_commands.disagreements(verdict, said | {command: replace(said[command], **other)})


def test_a_line_missing_from_one_command_is_noticed():
    fine = Verdict(lambda folder: None)
    said = equal_answers(0, "no image of eel in val\n", "d: 1 file left out\n")
    said["train"] = Said(0, "", "d: 1 file left out\ndata: no image of eel in val\n")
    assert not three_commands.disagreements(fine, said)
    assert three_commands.disagreements(fine, said | {"check": replace(said["check"], out="")})
    assert three_commands.disagreements(fine, said | {"data check": replace(said["data check"], err="")})
    assert three_commands.disagreements(
        fine, said | {"train": replace(said["train"], err="data: no image of eel in val\n")}
    )
