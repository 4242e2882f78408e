"""Training of one network: setup, learner, loop, optimizers, schedules, checkpoints, run folder and metrics log.

`loop.fit` trains a `setup.TrainingSetup` to its end. This package imports `model` and the packages below it.
"""

__all__ = [
    "checkpoint_pointers",
    "checkpoints",
    "determinism",
    "dtypes",
    "ema",
    "evaluation",
    "event_file",
    "frozen_layers",
    "hooks",
    "learner",
    "loop",
    "optimizers",
    "precision",
    "run_folder",
    "run_records",
    "schedules",
    "settings",
    "setup",
    "state",
    "step_time",
]
