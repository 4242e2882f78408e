"""`compare` refuses an unfinished run by name, unless `--unfinished` is given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cnnrun.base.errors import CheckpointError
from cnnrun.base.file_sequences import Files
from cnnrun.contracts.source import Masks
from cnnrun.experiment import config_file
from cnnrun.results import compare
from cnnrun.results.studies.train_run import train_run
from tests.support.configs import TINY
from tests.support.interrupted_trainings import stop_at

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of one config: 1 is finished, 2 was stopped in its second epoch, 3 ended by early stopping."""
    root = tmp_path_factory.mktemp("runs")
    train_run(config_file.parse_config(TINY, "tiny.yaml", ["name=tiny"]), root, CPU, resume=False)
    stopped = config_file.parse_config(TINY, "tiny.yaml", ["name=tiny", "seed=1"])
    with stop_at(20):
        train_run(stopped, root, CPU, resume=False)
    early = ["name=tiny", "seed=2", "train.epochs=5", "train.early_stop={patience: 1, min_delta: 0.9}"]
    train_run(config_file.parse_config(TINY, "tiny.yaml", early), root, CPU, resume=False)
    return root / "tiny"


def test_an_unfinished_run_is_refused_by_name(runs, run_cli):
    code, out, err = run_cli("compare", runs / "1", runs / "2")
    assert (code, out) == (3, "")
    steps = json.loads((runs / "1" / "result.json").read_text())["steps"]
    line = f"{runs / '2'}: unfinished (step 21 of {steps}); finish it with `cnnrun train CONFIG --resume`"
    assert err.strip().splitlines()[-1].endswith(f"{line}, or compare with --unfinished")
    with pytest.raises(CheckpointError) as error:
        compare.compare_runs([runs / "2", runs / "1", runs / "2"], runs.parent, CPU, None)
    assert len(error.value.lines) == 2


def test_the_unfinished_option_compares_an_unfinished_run_and_reports_it(runs, run_cli):
    code, out, _ = run_cli("compare", runs / "1", runs / "2", "--unfinished")
    assert code == 0
    assert f"{runs / '2'} is unfinished (step 21 of" in out
    assert f"{runs / '1'} is unfinished" not in out
    code, out, _ = run_cli("compare", runs / "1", runs / "2", "--unfinished", "--json")
    first, other = json.loads(out)["runs"]
    assert first["unfinished"] is None
    assert other["unfinished"]["step"] == 21
    assert other["step"] < 21  # the best so far, of the end of the first epoch


def test_a_named_checkpoint_of_an_unfinished_run_is_compared_and_reported(runs, run_cli):
    code, out, _ = run_cli("compare", runs / "1", runs / "2" / "checkpoints" / "latest")
    assert code == 0
    assert f"{runs / '2'} is unfinished (step 21 of" in out
    assert "its checkpoint of step 21 is compared" in out


def test_a_run_ended_by_early_stopping_is_finished(runs, run_cli):
    result = json.loads((runs / "3" / "result.json").read_text())
    assert result["steps"] < json.loads((runs / "1" / "result.json").read_text())["steps"] / 2 * 5
    code, out, _ = run_cli("compare", runs / "1", runs / "3")
    assert code == 0
    assert "unfinished" not in out


def test_a_run_without_a_checkpoint_is_at_step_0(runs, tmp_path):
    shutil.copytree(runs / "2", tmp_path / "2")
    shutil.rmtree(tmp_path / "2" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"2: unfinished \(step 0 of "):
        compare.compare_runs([runs / "1", tmp_path / "2"], runs.parent, CPU, None)


def test_masks_are_equal_if_files_and_values_are():
    table = tuple(range(256))
    files, others = Files([b"masks/a.png", b"masks/b.png"]), Files([b"masks/a.png", b"other/b.png"])
    pixels = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
    assert compare._have_equal_masks(None, None)
    assert compare._have_equal_masks(Masks(files, table), Masks(files, table))
    assert compare._have_equal_masks(Masks(pixels, table), Masks(pixels.copy(), table))
    assert not compare._have_equal_masks(Masks(files, table), None)
    assert not compare._have_equal_masks(Masks(files, table), Masks(others, table))
    assert not compare._have_equal_masks(Masks(files, table), Masks(files, table[::-1]))
    assert not compare._have_equal_masks(Masks(pixels, table), Masks(pixels + 1, table))
