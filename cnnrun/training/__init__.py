"""Training of one network: learner, loop, optimizers, schedules, checkpoints, run folder and metrics log.

`loop.fit` trains a `learner.Job` to its end. This package imports `model` and the packages below it.
"""
