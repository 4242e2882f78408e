"""Weights to begin with or to use: of a file, a run or a checkpoint."""

from __future__ import annotations

import stat
from pathlib import Path

from torch import Tensor

from cnnrun.base.errors import CheckpointError, escape
from cnnrun.contracts.facts import Facts
from cnnrun.model.weights_file import Weights, file_digest, read_weights_file
from cnnrun.training import checkpoints, run_folder
from cnnrun.training.run_records import CHECKPOINTS, parse_facts

_POINTERS = ("best", "latest")


def read_weights(path: Path) -> Weights:
    """Read a safetensors file, a PyTorch state dict (through the guarded reader), a run or a checkpoint.

    Raises CheckpointError.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")
    return _of_run(path) if stat.S_ISDIR(mode) or path.name in _POINTERS else read_weights_file(path)


def _of_run(path: Path) -> Weights:
    """The averaged weights of a run's best checkpoint, or of the checkpoint given, where it has an average."""
    if path.name in _POINTERS and (name := checkpoints.read_pointer(path.parent, path.name)):
        path = path.parent / name  # checkpoints/best, checkpoints/latest
    if (path / "manifest.json").exists():
        saved: checkpoints.Checkpoint | None = checkpoints.load(path)
    else:
        if (path / CHECKPOINTS).is_dir():
            run_folder.refuse_links(path)
        saved = checkpoints.load_newest(path / CHECKPOINTS, "best", lambda line: None)
    if saved is None:
        raise CheckpointError(f"{path}: neither a run nor a checkpoint")
    facts, tensors = weights_of_checkpoint(saved)
    return Weights(tensors, "name", None, facts, file_digest(saved.path / checkpoints.MANIFEST))


def weights_of_checkpoint(saved: checkpoints.Checkpoint) -> tuple[Facts, dict[str, Tensor]]:
    """The data facts and the weights that a checkpoint gives: the averaged ones where it has them.

    Raises CheckpointError where it has none, or a variance below zero.
    """
    tensors = saved.parts.get("ema", saved.parts.get("model"))
    if not tensors:
        raise CheckpointError(f"{saved.path}: has no weights")
    variances = {name: value for name, value in tensors.items() if name.endswith("running_var")}
    if bad := [name for name, value in variances.items() if value.float().min() < 0]:
        raise CheckpointError(f"{saved.path}: {escape(bad[0])} is a variance below zero")
    return parse_facts(saved.state.get("facts"), str(saved.path / checkpoints.STATE)), tensors
