"""One training: the learner, the loop, optimizers, schedules, checkpoints, the run folder, the metrics log.

`loop.fit` trains a `learner.Job` to its end. Imports `model` and what is below.
"""
