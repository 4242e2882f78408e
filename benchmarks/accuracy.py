"""Measure a metric and wall time of a config over seeds: for each a whole `cnnrun train` and one `cnnrun eval`.

    python benchmarks/accuracy.py configs/fashion-vgg.yaml [--metric accuracy] [--seeds 3] [KEY.PATH=VALUE ...]

The reported split is test, which training never reads. Wall time is that of the command, start-up included.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

import torch
from config_runs import measure, parse_arguments


def main() -> None:
    args = parse_arguments(__doc__, seeds=3)
    print(f"{args.config}: torch {torch.__version__}, {os.cpu_count()} cores, {args.seeds} seeds")
    values, seconds = [], []
    with tempfile.TemporaryDirectory() as runs:
        for seed in range(args.seeds):
            value, took = measure(args.config, args.metric, [f"seed={seed}", *args.overrides], Path(runs))
            values.append(value)
            seconds.append(took)
            print(f"  seed {seed}: test {args.metric} {value:.4f} in {took:.0f} s", flush=True)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    print(f"  mean {statistics.mean(values):.4f} +- {spread:.4f}, median {statistics.median(seconds):.0f} s")


if __name__ == "__main__":
    main()
