"""Check trainings that must end with the same bits: repeated, stopped and resumed, and `--strict-resume`.

    python benchmarks/gpu/same_bits.py --device cuda

The comparison covers every tensor of the last checkpoint, its state, metrics.jsonl and the best checkpoint's name.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import RICH, ROOT, Options, attempt, emit, parse_options

from cnnrun.base.errors import InterruptionError
from cnnrun.experiment import config_file
from cnnrun.results.studies.train_run import train_run
from cnnrun.training import checkpoints
from cnnrun.training.learner import Learner

STOP = 7  # the step under way when SIGTERM comes: within an epoch
SCENES = ["data.source={digit_scenes: {train: 80, held_out: 16}}", "train.batch=16", "train.epochs=2"]


def main() -> None:
    """Compare in every precision: a classifier first, then a detector."""
    options = parse_options(__doc__)
    cases = [("rich", precision) for precision in ("float32", "bfloat16", "float16")]
    cases += [("scenes", precision) for precision in ("float32", "bfloat16")]
    with tempfile.TemporaryDirectory(prefix="cnnrun-same-bits-") as folder:
        for name, precision in cases:
            with attempt("same_bits", seconds=options.seconds_left, case=name, precision=precision):
                compare(name, precision, options, Path(folder) / f"{name}-{precision}")


def compare(name: str, precision: str, options: Options, folder: Path) -> None:
    """Train in each way, one after the other; emit how each differs from the first."""
    folder.mkdir()
    config = folder / f"{name}.yaml"
    scenes = (ROOT / "configs" / "digit-scenes.yaml").read_text()
    config.write_text(scenes if name == "scenes" else RICH)
    overrides = [*(SCENES if name == "scenes" else []), f"train.precision={precision}"]
    experiment, device = config_file.read_config(config, overrides), options.device
    about = {"case": name, "precision": precision}
    whole = Path(train_run(experiment, folder / "whole", device, resume=False)["run"])
    again = Path(train_run(experiment, folder / "again", device, resume=False)["run"])
    emit("same_bits", **about, how="repeated", **difference(whole, again))
    with stopped_at(STOP):
        train_run(experiment, folder / "cut", device, resume=False)
    resumed = Path(train_run(experiment, folder / "cut", device, resume=True)["run"])
    emit("same_bits", **about, how="resumed", **difference(whole, resumed))
    if precision == "float32":
        with stopped_at(STOP):
            train_run(experiment, folder / "strict", device, resume=False)
        strict = resume_strictly([str(config), *overrides], folder / "strict", device, options)
        emit("same_bits", **about, how="--strict-resume", **difference(whole, strict))


def resume_strictly(words: list[str], root: Path, device: torch.device, options: Options) -> Path:
    """Resume on the command line; returns the run."""
    message = ["--strict-resume", "--no-report", "--device", str(device), "--runs", str(root), "--json"]
    command = [sys.executable, "-m", "cnnrun", "train", *words, *message]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, options.seconds_left))
    if done.returncode:
        raise RuntimeError(f"--strict-resume left with {done.returncode}: {done.stderr.strip()[-500:]}")
    return next(path.parent for path in root.glob("*/*/result.json"))


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """Send SIGTERM during optimizer step `step`; it must end the training in the block."""
    original = Learner.backward

    def stopping(learner: Any, batch: Any, number: int) -> Any:
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(learner, batch, number)

    Learner.backward = stopping
    try:
        yield
    except InterruptionError:
        return
    finally:
        Learner.backward = original
    raise RuntimeError(f"SIGTERM at step {step} did not stop the training")


def difference(first: Path, second: Path) -> dict[str, Any]:
    """Return how two runs differ: tensors by name, the largest difference, and files."""
    saved = [load_last_checkpoint(run) for run in (first, second)]
    tensors = [
        {f"{part}.{name}": value for part, values in checkpoint.parts.items() for name, value in values.items()}
        for checkpoint in saved
    ]
    if tensors[0].keys() != tensors[1].keys():
        return {"ok": False, "reason": f"other tensors: {sorted(tensors[0].keys() ^ tensors[1].keys())[:5]}"}
    differences = {name: tensor_difference(value, tensors[1][name]) for name, value in tensors[0].items()}
    different = [name for name, value in differences.items() if value]
    files = [name for name in ("metrics.jsonl", "checkpoints/best") if not is_same_file(first / name, second / name)]
    files += ["the checkpoint's state"] if saved[0].state != saved[1].state else []
    largest = max(differences.values(), default=0.0)
    message = (
        f"{len(different)} of {len(differences)} tensors differ, by at most {largest:g} ({', '.join(different[:4])})"
    )
    reason = "; ".join([*([message] if different else []), *(f"{file} differs" for file in files)])
    return {
        "ok": not reason,
        "tensors": len(differences),
        "different": len(different),
        "largest": largest,
        "reason": reason,
    }


def load_last_checkpoint(run: Path) -> checkpoints.Checkpoint:
    """Return the last checkpoint of a run. Raises RuntimeError if there is none."""
    checkpoint = checkpoints.load_newest(run / "checkpoints", "latest", print)
    if checkpoint is None:
        raise RuntimeError(f"{run}: no checkpoint")
    return checkpoint


def tensor_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the largest difference of two tensors, 0 only if all bits are equal."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return float("inf")
    if first.numpy().tobytes() == second.numpy().tobytes():
        return 0.0
    return float((first.double() - second.double()).abs().max()) or 5e-324  # only the sign of a zero


def is_same_file(first: Path, second: Path) -> bool:
    """Return whether two files hold the same bytes."""
    return first.read_bytes() == second.read_bytes()


if __name__ == "__main__":
    main()
