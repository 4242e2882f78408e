"""A plain install trains, evaluates and exports; a command that needs an extra says so in one line before any work."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.forked_python import run_python

# Packages that `pip install cnnrun` does not install: `None` in sys.modules makes importing them fail.
_PLAIN = """
import sys
for package in ("scipy", "sklearn", "pyarrow", "faiss", "optuna", "webdataset", "braceexpand"):
    assert package not in sys.modules
    sys.modules[package] = None
from cnnrun.commands import app
for words in {commands!r}:
    sys.argv = ["cnnrun", *words]
    try:
        app.main()
    except SystemExit as left:
        if left.code:
            raise
"""


def run_plain(folder, *commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the commands one after the other in a process without extras, until one fails."""
    code = _PLAIN.format(commands=[list(map(str, words)) for words in commands])
    return run_python(["-c", code], folder)


@pytest.mark.slow
def test_a_plain_install_trains_evaluates_and_exports(tiny, tmp_path):
    done = run_plain(
        tmp_path,
        ["check", tiny],
        ["data", "check", tiny],
        ["train", tiny],
        ["eval", "--plots", "plots"],
        ["export", "onnx"],
        ["report"],
        ["explain", "gradcam"],
    )
    assert done.returncode == 0, done.stderr
    assert "the search for nearly the same images needs scipy: pip install 'cnnrun[stats]'" in done.stdout
    assert list(tmp_path.glob("runs/tiny/1/exports/model.onnx"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "--seeds", "2"], "--seeds needs scipy: pip install 'cnnrun[stats]'"),
        (["check", "data.augment.mixup=0.2"], "data.augment.mixup: mixup needs scipy: pip install 'cnnrun[stats]'"),
        (["sweep", "train.epochs=1..2"], "sweep needs optuna: pip install 'cnnrun[sweep]'"),
    ],
)
def test_a_missing_extra_is_one_line_before_any_work(tiny, tmp_path, words, line):
    done = run_plain(tmp_path, [words[0], tiny, *words[1:]])
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith(line), done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_missing_extra_is_one_line_for_a_trained_run(tiny, tmp_path):
    assert run_plain(tmp_path, ["train", tiny]).returncode == 0
    for words, need in (
        (["calibrate"], "calibrate needs scipy"),
        (["compare", "runs/tiny/1", "runs/tiny/1"], "compare needs scipy"),
        (["explain", "embed"], "explain embed needs sklearn"),
    ):
        done = run_plain(tmp_path, words)
        assert done.returncode == 2, done.stderr
        assert done.stderr.rstrip().endswith(f"{need}: pip install 'cnnrun[stats]'"), done.stderr
