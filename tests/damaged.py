"""A finished run and an unfinished one, and what a command says of a damaged copy: for the test and the benchmark."""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from conftest import TINY
from damage import Damage

from cnnrun.commands import app
from cnnrun.experiment import schema
from cnnrun.results import calibrate
from cnnrun.results.train_run import train_run

CPU = torch.device("cpu")


def runs_of_each_state(root: Path) -> tuple[Path, Path, Path]:
    """A config, a finished run of it, and the same run as if its training had been killed at the very end."""
    config = root / "tiny.yaml"
    config.write_text(TINY.replace("epochs: 2", "epochs: 3, save_every: 5, ema: {decay: 0.9}"))
    finished = Path(train_run(schema.load(config), root / "runs", CPU, resume=False)["run"])
    # What is damaged is the newest checkpoint: it shall be the one that is evaluated.
    (finished / "checkpoints" / "best").write_text((finished / "checkpoints" / "latest").read_text())
    calibrate.calibrate(finished, root / "runs", CPU)
    killed = root / "killed" / "tiny" / "1"
    shutil.copytree(finished, killed)
    (killed / "result.json").unlink()
    return config, finished, killed


def trial(source: Path, damage: Damage, words: Sequence[str]) -> tuple[int, str]:
    """Exit code and stderr of a command on a damaged copy of the run."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "runs" / "tiny" / "1"
        shutil.copytree(source, copy)
        damage(copy)
        run = [] if words[0] == "train" else [str(copy)]
        before, sys.argv = sys.argv, ["cnnrun", *words, *run, "--runs", str(Path(name) / "runs")]
        error = io.StringIO()
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(error):
                app.main()
        except SystemExit as left:
            return int(left.code or 0), error.getvalue()
        finally:
            sys.argv = before
    return 0, error.getvalue()
