"""Measure the study commands and the tasks `regress` and `multilabel`: see benchmarks/README.md.

python benchmarks/study.py plans digits fashion-lenet    plan, then train each config: estimate and measurement
python benchmarks/study.py cells                         count red cells, find the kinds of cells: three seeds each
python benchmarks/study.py rotated --seeds 3             rotated digits
python benchmarks/study.py apart --seeds 15              the embedded digits: how often two seeds are told apart
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from cnnrun.experiment.open_run import measure_run
from cnnrun.results import compare

ROOT = Path(__file__).parents[1]


def cnnrun(*words: object) -> dict:
    """Run a command in a separate process, as a user starts it; returns its JSON."""
    command = [sys.executable, "-m", "cnnrun", *map(str, words), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def plans(names: list[str], runs: Path) -> None:
    """Print a row for each config: estimate, measurement and their ratio."""
    print("config            plan took   seconds: planned  measured  ratio   MiB: planned  measured  ratio")
    for name in names:
        config = ROOT / "configs" / f"{name}.yaml"
        began = time.perf_counter()
        planned = cnnrun("plan", config, "--runs", runs)
        took = time.perf_counter() - began
        result = cnnrun("train", config, "--runs", runs)
        pairs = [(planned[key], result[key]) for key in ("seconds", "peak_memory_mib")]
        cells = [f"{estimate:14,.1f} {actual:9,.1f} {estimate / actual:6.2f}" for estimate, actual in pairs]
        print(f"{name:<18}{took:8.1f}    {'   '.join(cells)}", flush=True)


def train_seeds(name: str, count: int, runs: Path) -> None:
    """Train a config with several seeds; print the summary and the tables of every run."""
    config = ROOT / "configs" / f"{name}.yaml"
    began = time.perf_counter()
    result = cnnrun("train", config, "--seeds", count, "--resume", "--runs", runs)
    seconds = (time.perf_counter() - began) / count
    print(f"{name}: n = {count}, on {result['split']}, {seconds:.0f} s a seed, start-up included once")
    for metric, row in result["summary"].items():
        ends = f"{row['from']:.4f} .. {row['to']:.4f}" if "from" in row else ""
        print(f"  {metric:<10} {row['mean']:.4f} +- {row.get('deviation', 0):.4f}   {ends}")
    for run in result["runs"]:
        evaluation = cnnrun("eval", run["run"])
        for table in ("per_target", "per_class"):
            for row in evaluation["tables"].get(table, ()):
                print("   ", run["seed"], {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})


def apart(count: int, runs: Path) -> None:
    """Print how often `compare` tells real trainings of one config with two seeds apart."""
    config = ROOT / "configs" / "digits.yaml"
    result = cnnrun("train", config, "--seeds", count, "--resume", "--runs", runs)
    measurements = [
        measure_run(Path(row["run"]), runs, torch.device("cpu"), None).measurement for row in result["runs"]
    ]
    distinguished = [
        any(row["distinguishable"] for row in compare.compare_metrics(first, other))
        for first, other in itertools.combinations(measurements, 2)
    ]
    print(
        f"{len(distinguished)} pairs of {count} seeds: not distinguishable in {len(distinguished) - sum(distinguished)}"
    )
    accuracy = [row["numbers"]["accuracy"] for row in result["runs"]]
    print(f"accuracy {statistics.mean(accuracy):.4f} +- {statistics.stdev(accuracy):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plans", "cells", "rotated", "apart"])
    parser.add_argument("configs", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, help="folder of the runs; by default a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = (options.runs or Path(folder)).resolve()
        if options.what == "plans":
            plans(options.configs, runs)
        elif options.what == "apart":
            apart(options.seeds, runs)
        else:
            names = {"cells": ["bccd-count", "bccd-presence"], "rotated": ["rotated-digits"]}[options.what]
            for name in names:
                train_seeds(name, options.seeds, runs)


if __name__ == "__main__":
    main()
