"""Compare a metric after training in float32 and in bfloat16, paired by seed: both trainings run side by side.

    python benchmarks/precision.py configs/digit-scenes.yaml --metric AP [--seeds 5] [KEY.PATH=VALUE ...]

Each side has one thread, so that the two do not wait for each other; times are therefore not those of a training alone.
The metric is that of test. The interval is Student's for the mean of the paired differences (95 %).
"""

from __future__ import annotations

import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from config_runs import measure, parse_arguments
from scipy import stats

PRECISIONS = ("float32", "bfloat16")


def main() -> None:
    args = parse_arguments(__doc__, seeds=5)
    print(f"{args.config}: {args.metric}, torch {torch.__version__}, {os.cpu_count()} cores, {args.seeds} seeds")
    differences: list[float] = []
    times: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(PRECISIONS)) as pool:
        for seed in range(args.seeds):
            tasks = {
                precision: pool.submit(
                    measure,
                    args.config,
                    args.metric,
                    [f"seed={seed}", f"train.precision={precision}", *args.overrides],
                    Path(folder) / f"{precision}-{seed}",
                    {"OMP_NUM_THREADS": "1"},
                )
                for precision in PRECISIONS
            }
            found = {precision: task.result() for precision, task in tasks.items()}
            differences.append(found["bfloat16"][0] - found["float32"][0])
            for precision, (_, seconds) in found.items():
                times[precision].append(seconds)
            text = "  ".join(f"{name} {value:.4f} in {seconds:.0f} s" for name, (value, seconds) in found.items())
            print(f"  seed {seed}: {text}", flush=True)
    mean = statistics.mean(differences)
    line = f"  bfloat16 - float32: {mean:+.4f}"
    if len(differences) > 1 and (error := statistics.stdev(differences) / len(differences) ** 0.5):
        half = stats.t.ppf(0.975, len(differences) - 1) * error
        line += f" ({mean - half:+.4f} .. {mean + half:+.4f})"
    speedup = statistics.median(times["float32"]) / statistics.median(times["bfloat16"])
    print(f"{line}, whole command {speedup:.2f} times as fast in one thread", flush=True)


if __name__ == "__main__":
    main()
