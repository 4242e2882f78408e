"""Malformed configs stored as files: each gives exit code 2 and one line per mistake, at its position."""

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


def test_every_malformed_config_has_expected_messages():
    assert {path.name for path in FOLDER.glob("*.yaml")} == set(EXPECTED)
    assert len(EXPECTED) >= 60


@pytest.mark.parametrize("name", EXPECTED)
def test_each_mistake_is_one_line_at_its_position(name, run_cli):
    code, out, err = run_cli("check", FOLDER / name)
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == len(EXPECTED[name]), err
    for line, expected in zip(lines, EXPECTED[name], strict=True):
        assert line.startswith(f"{FOLDER / name}:{expected}")


@pytest.mark.parametrize("command", ["train", "summary"])
def test_train_and_summary_refuse_a_malformed_config_like_check(command, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli(command, FOLDER / "many-mistakes.yaml")
    assert (code, len(err.splitlines())) == (2, 8)
    assert not (tmp_path / "runs").exists()
