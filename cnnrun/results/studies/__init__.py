"""Studies of several trainings, or of short ones: seeds, sweeps, ablations, learning rates, plans, the selftest."""

__all__ = ["ablate", "find_lr", "folds", "plan", "seeds", "selftest", "sweep", "train_run", "training_series"]
