"""Many trainings, or short ones: seeds, sweeps, ablations, learning rates, plans, the selftest."""
