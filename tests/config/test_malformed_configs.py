"""Malformed configs kept as files: each costs exit code 2 and one line a mistake, at the right place."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "malformed"
# `name.yaml`, then for each mistake `line:column: the start of the message`.
EXPECTED: dict[str, list[str]] = {}
for _line in (FOLDER / "expected.txt").read_text().splitlines():
    if _line.startswith("  "):
        EXPECTED[next(reversed(EXPECTED))].append(_line.strip())
    else:
        EXPECTED[_line] = []


def test_there_are_sixty_and_all_are_expected():
    assert {path.name for path in FOLDER.glob("*.yaml")} == set(EXPECTED)
    assert len(EXPECTED) >= 60


@pytest.mark.parametrize("name", EXPECTED)
def test_one_line_a_mistake_at_the_right_place(name, run_cli):
    code, out, err = run_cli("check", FOLDER / name)
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == len(EXPECTED[name]), err
    for line, expected in zip(lines, EXPECTED[name], strict=True):
        assert line.startswith(f"{FOLDER / name}:{expected}")


@pytest.mark.parametrize("command", ["train", "summary"])
def test_every_command_that_takes_a_config_refuses_it_alike(command, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli(command, FOLDER / "many-mistakes.yaml")
    assert (code, len(err.splitlines())) == (2, 8)
    assert not (tmp_path / "runs").exists()
