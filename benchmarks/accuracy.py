"""Measure a metric and wall time of a config over seeds: for each a whole `cnnrun train` and one `cnnrun eval`.

    python benchmarks/accuracy.py configs/fashion-vgg.yaml [--metric accuracy] [--seeds 3] [KEY.PATH=VALUE ...]

The reported split is test, which training never reads. Wall time is that of the command, start-up included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--metric", default="accuracy")
    args = parser.parse_intermixed_args()
    print(f"{args.config}: torch {torch.__version__}, {os.cpu_count()} cores, {args.seeds} seeds")
    values, seconds = [], []
    with tempfile.TemporaryDirectory() as runs:
        for seed in range(args.seeds):
            command = [
                sys.executable,
                "-m",
                "cnnrun",
                "train",
                args.config,
                f"seed={seed}",
                *args.overrides,
                "--runs",
                runs,
            ]
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
            done = subprocess.run(
                [sys.executable, "-m", "cnnrun", "eval", "--runs", runs, "--json"], check=True, capture_output=True
            )
            result = json.loads(done.stdout)
            values.append(result["numbers"][args.metric])
            print(f"  seed {seed}: {result['split']} {args.metric} {values[-1]:.4f} in {seconds[-1]:.0f} s", flush=True)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    print(f"  mean {statistics.mean(values):.4f} +- {spread:.4f}, median {statistics.median(seconds):.0f} s")


if __name__ == "__main__":
    main()
