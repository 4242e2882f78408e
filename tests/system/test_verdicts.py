"""One verdict: `check`, `data check` and `train` say the same of the same data, whatever tool wrote it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.verdicts import INPUTS, PARTS, three_commands
from tests.support.verdicts.three_commands import Said, Verdict

EACH = ("check", "data check", "train")
EVERY = 3  # of the inputs one is tried here; `benchmarks/verdicts.py` tries all, which takes five minutes


def test_no_two_inputs_have_one_name():
    assert len(INPUTS) == sum(map(len, PARTS)) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", list(INPUTS)[::EVERY])
def test_the_three_commands_are_of_one_mind(tmp_path, name):
    said = three_commands.run_commands(INPUTS[name].build, tmp_path / "files")
    assert not three_commands.disagreements(INPUTS[name], said), said


def answers(code: int = 8, out: str = "", err: str = "t.csv:2: label is empty\n") -> dict[str, Said]:
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
def test_a_command_of_another_mind_is_noticed(command, other):
    verdict, said = Verdict(lambda folder: None, 8, "label is empty"), answers()
    assert not three_commands.disagreements(verdict, said)
    assert three_commands.disagreements(verdict, said | {command: replace(said[command], **other)})


def test_what_only_train_or_only_check_says_is_noticed():
    fine = Verdict(lambda folder: None)
    said = answers(0, "no picture of eel in val\n", "d: 1 file left out\n")
    said["train"] = Said(0, "", "d: 1 file left out\ndata: no picture of eel in val\n")
    assert not three_commands.disagreements(fine, said)
    assert three_commands.disagreements(fine, said | {"check": replace(said["check"], out="")})
    assert three_commands.disagreements(fine, said | {"data check": replace(said["data check"], err="")})
    assert three_commands.disagreements(
        fine, said | {"train": replace(said["train"], err="data: no picture of eel in val\n")}
    )
