"""Measure how much of a training step on several ranks is the sum of the gradients.

    torchrun --nproc-per-node 2 benchmarks/gradient_sums.py CONFIG [KEY.PATH=VALUE ...]

It is the most that an overlap with the backward pass could save. Each rank has one thread. Prints medians of rank 0.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from cnnrun.base.ranks import join_ranks
from cnnrun.experiment import assemble, config_file
from cnnrun.training.learner import Learner

STEPS, WARM_UP = 40, 5


def main(config: str, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    experiment = config_file.read_config(Path(config), ["train.precision=float32", *overrides], warn=False)
    device = torch.device("cpu")
    with join_ranks(device, timeout=600) as ranks:
        data = assemble.prepare_dataset(experiment)
        setup = replace(assemble.build_setup(experiment, data, None, device), ranks=ranks)
        learner, batches = Learner(setup), setup.batches(1)
        steps, sums = [], []
        for step in range(STEPS):
            began = time.perf_counter()
            loss = learner.backward(batches.at(step), step)
            ranks.barrier()  # else the sum would contain the wait for the slower rank
            middle = time.perf_counter()
            learner.all_reduce_gradients(loss)
            sums.append(time.perf_counter() - middle)
            learner.update_weights(step, 0.1)
            steps.append(time.perf_counter() - began)
        if ranks.is_first:
            step_ms, sum_ms = (1000 * statistics.median(values[WARM_UP:]) for values in (steps, sums))
            count = sum(parameter.numel() for parameter in learner.parameters)
            print(f"{count:,} parameters, {ranks.world_size} ranks: a step {step_ms:.1f} ms, the sum {sum_ms:.2f} ms")
            print(f"the sum is {sum_ms / step_ms:.1%} of a step")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
