"""Read weights from a file, a run or a checkpoint."""

from __future__ import annotations

import stat
from pathlib import Path

from torch import Tensor

from cnnrun.base.errors import CheckpointError, ConfigError, escape
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts
from cnnrun.experiment.config_file import read_config
from cnnrun.model.weights_file import Weights, WeightsDescription, file_digest, read_weights_file
from cnnrun.training import checkpoints, run_folder
from cnnrun.training.checkpoint_pointers import POINTERS, read_pointer
from cnnrun.training.run_records import CHECKPOINTS, CONFIG, parse_facts


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
    return _read_run_weights(path) if stat.S_ISDIR(mode) or path.name in POINTERS else read_weights_file(path)


def _read_run_weights(path: Path) -> Weights:
    """Read the weights of a run's best checkpoint, or of a checkpoint; the averaged ones if it has them."""
    if path.name in POINTERS and (name := read_pointer(path.parent, path.name)):
        path = path.parent / name  # checkpoints/best, checkpoints/latest
    if (path / "manifest.json").exists():
        checkpoint: checkpoints.Checkpoint | None = checkpoints.load(path)
    else:
        if (path / CHECKPOINTS).is_dir():
            run_folder.refuse_links(path)
        checkpoint = checkpoints.load_newest(path / CHECKPOINTS, "best", lambda line: None)
    if checkpoint is None:
        raise CheckpointError(f"{path}: no checkpoint here; give a checkpoint, or a run that has one")
    facts, _, tensors = checkpoint_weights(checkpoint)
    description = _describe_run(checkpoint.path.parent.parent)
    return Weights(tensors, "name", description, facts, file_digest(checkpoint.path / checkpoints.MANIFEST))


def _describe_run(run: Path) -> WeightsDescription | None:
    """Description of a run's network from its config; None without a config that this version can read."""
    try:
        experiment = read_config(run / CONFIG, warn=False)
    except ConfigError:
        return None
    return WeightsDescription(task=experiment.task, image=experiment.data.image, model=experiment.model)


def checkpoint_weights(checkpoint: checkpoints.Checkpoint) -> tuple[DataFacts, Choices, dict[str, Tensor]]:
    """The data facts, the choices and the weights of a checkpoint; the averaged weights if it has them.

    Raises CheckpointError if it has no weights, or if a variance is below zero.
    """
    tensors = checkpoint.parts.get("ema", checkpoint.parts.get("model"))
    if not tensors:
        raise CheckpointError(f"{checkpoint.path}: has no weights")
    variances = {name: value for name, value in tensors.items() if name.endswith("running_var")}
    if negative := [name for name, value in variances.items() if value.float().min() < 0]:
        raise CheckpointError(f"{checkpoint.path}: {escape(negative[0])} is a variance below zero")
    return *parse_facts(checkpoint.state, str(checkpoint.path / checkpoints.STATE)), tensors
