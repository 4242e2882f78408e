"""Studies of several trainings, or of short ones: seeds, sweeps, ablations, learning rates, plans, the selftest."""
