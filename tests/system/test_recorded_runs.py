"""Runs that the first edition wrote are read, evaluated, exported and resumed as then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file

RECORDED = Path(__file__).parents[1] / "support" / "recorded_runs"
RUNS = sorted(path.name for path in RECORDED.iterdir() if path.is_dir())


@pytest.fixture
def recorded(tmp_path, request) -> Path:
    """A copy of the recorded run that the test is parametrized with, without what it is expected to give."""
    run = tmp_path / "runs" / request.param / "1"
    shutil.copytree(RECORDED / request.param, run, ignore=shutil.ignore_patterns("expected"))
    return run


def _expected(run: Path, name: str) -> dict:
    return json.loads((RECORDED / run.parent.name / "expected" / name).read_text())


@pytest.mark.parametrize("recorded", RUNS, indirect=True)
def test_evaluation_of_a_recorded_run(recorded, run_cli):
    code, out, error = run_cli("eval", recorded, "--json")
    assert code == 0, error
    actual, expected = json.loads(out), _expected(recorded, "evaluation.json")
    assert [actual[key] for key in ("step", "split", "samples")] == [
        expected[key] for key in ("step", "split", "samples")
    ]
    # Other processors round differently, and a sample or two may change sides.
    assert actual["numbers"] == pytest.approx(expected["numbers"], abs=5e-3)


@pytest.mark.parametrize("recorded", RUNS, indirect=True)
def test_export_of_a_recorded_run_has_its_thresholds_and_temperature(recorded, run_cli, tmp_path):
    code, _, error = run_cli("export", "onnx", recorded, "--out", tmp_path / "model.onnx")
    assert code == 0, error
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    expected = _expected(recorded, "metadata.json")
    del metadata["cnnrun"], expected["cnnrun"]
    assert metadata == expected


@pytest.mark.parametrize("recorded", ["classify"], indirect=True)
def test_resuming_a_recorded_run(recorded, run_cli):
    checkpoints = recorded / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000034")
    (recorded / "result.json").unlink()
    for pointer in ("best", "latest"):
        (checkpoints / pointer).write_text("step-00000017")
    rows = (recorded / "metrics.jsonl").read_text().splitlines(keepends=True)
    (recorded / "metrics.jsonl").write_text(rows[0])
    code, out, error = run_cli("train", recorded / "config.yaml", "--resume", "--runs", recorded.parents[1])
    assert code == 0, error
    assert str(recorded) in out + error
    actual, expected = (
        load_file(run / "checkpoints" / "step-00000034" / "model.safetensors")
        for run in (recorded, RECORDED / "classify")
    )
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_prediction_by_a_recorded_weights_file(run_cli, tmp_path):
    from PIL import Image

    Image.new("L", (8, 8), 100).save(tmp_path / "a.png")
    code, out, error = run_cli("predict", tmp_path / "a.png", "--run", RECORDED / "imported.safetensors", "--json")
    assert code == 0, error
    assert set(json.loads(out)) == {"path", "label", "probability", "top"}
