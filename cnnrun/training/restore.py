"""Restoring a training from a checkpoint."""

from __future__ import annotations

from cnnrun.base.atomic_files import Folder, storage_errors
from cnnrun.base.errors import CheckpointError, first_line
from cnnrun.model import tensor_matching
from cnnrun.training import checkpoints
from cnnrun.training.learner import Job, Learner
from cnnrun.training.run_records import CHECKPOINTS
from cnnrun.training.state import TrainingState


def open_checkpoints_folder(job: Job) -> Folder | None:
    """Open, or create, the folder of the run's checkpoints; None on ranks that write nothing."""
    if not job.run:
        return None
    with storage_errors(job.run.path / CHECKPOINTS, 0):
        return job.run.open_child(CHECKPOINTS, create=True)


def restore_training(
    learner: Learner, checkpoint: checkpoints.Checkpoint, job: Job, folder: Folder | None
) -> TrainingState:
    """Restore the learner from `checkpoint`, and finish what a killed process left undone; returns the state.

    Raises CheckpointError if the checkpoint does not fit this training.
    """
    state = TrainingState.from_json(checkpoint.state.get("training"), str(checkpoint.path / checkpoints.STATE))
    if missing := [part for part in learner.checkpoint_parts() if part not in checkpoint.parts]:
        raise CheckpointError(f"{checkpoint.path}: has no {missing[0]}.safetensors, which this training needs")
    try:
        tensor_matching.check_exact_match(learner.network.state_dict(), checkpoint.parts["model"])
        if learner.ema:
            tensor_matching.check_exact_match(learner.ema.average, checkpoint.parts["ema"])
        learner.restore(checkpoint, job.spec.optimizer, state.step)
    except tensor_matching.TensorMismatchError as mismatch:
        raise CheckpointError(*mismatch.table(f"{checkpoint.path}: not of this network")) from None
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.path}: not of this training: {first_line(error)}") from None
    if folder:
        with storage_errors(folder.path, 0):
            checkpoints.repair_before_resume(folder, checkpoint.path, None if state.best is None else state.best_step)
    return state
