"""Restoring a training from a checkpoint."""

from __future__ import annotations

from cnnrun.base.errors import CheckpointError, first_line
from cnnrun.model import tensor_matching
from cnnrun.training import checkpoints
from cnnrun.training.learner import Learner
from cnnrun.training.state import TrainingState


def restore_training(learner: Learner, checkpoint: checkpoints.Checkpoint) -> TrainingState:
    """Restore the learner from `checkpoint`; returns the state. Raises CheckpointError if it does not fit."""
    state = TrainingState.from_json(checkpoint.state.get("training"), str(checkpoint.path / checkpoints.STATE))
    if missing := [part for part in learner.checkpoint_parts() if part not in checkpoint.parts]:
        raise CheckpointError(f"{checkpoint.path}: has no {missing[0]}.safetensors, which this training needs")
    try:
        tensor_matching.check_exact_match(learner.network.state_dict(), checkpoint.parts["model"])
        if learner.ema:
            tensor_matching.check_exact_match(learner.ema.average, checkpoint.parts["ema"])
        learner.restore(checkpoint, state.step)
    except tensor_matching.TensorMismatchError as mismatch:
        raise CheckpointError(*mismatch.message_lines(f"{checkpoint.path}: not of this network")) from None
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.path}: not of this training: {first_line(error)}") from None
    return state
