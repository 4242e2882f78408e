"""What the study commands and the tasks of numbers are held to, measured: see benchmarks/README.md.

python benchmarks/study.py plans digits fashion-lenet    plan, then train, each config: foretold and measured
python benchmarks/study.py cells                         red cells counted, kinds of cells present: three seeds each
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

from cnnrun.results import compare

ROOT = Path(__file__).parents[1]


def cnnrun(*words: object) -> dict:
    """A command in a process of its own, as a user starts it; its JSON."""
    command = [sys.executable, "-m", "cnnrun", *map(str, words), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def plans(names: list[str], root: Path) -> None:
    """A row a config: what was foretold, what came, and their ratio."""
    print("config            plan took   seconds: planned  measured  ratio   MiB: planned  measured  ratio")
    for name in names:
        config = ROOT / "configs" / f"{name}.yaml"
        began = time.perf_counter()
        planned = cnnrun("plan", config, "--runs", root)
        took = time.perf_counter() - began
        made = cnnrun("train", config, "--runs", root)
        pairs = [(planned[key], made[key]) for key in ("seconds", "peak_memory_mib")]
        cells = [f"{ours:14,.1f} {theirs:9,.1f} {ours / theirs:6.2f}" for ours, theirs in pairs]
        print(f"{name:<18}{took:8.1f}    {'   '.join(cells)}", flush=True)


def seeds_of(name: str, count: int, root: Path) -> None:
    """A config under several seeds: the summary, and every run's tables."""
    config = ROOT / "configs" / f"{name}.yaml"
    began = time.perf_counter()
    made = cnnrun("train", config, "--seeds", count, "--resume", "--runs", root)
    each = (time.perf_counter() - began) / count
    print(f"{name}: n = {count}, on {made['split']}, {each:.0f} s a seed, start-up included once")
    for number, row in made["summary"].items():
        ends = f"{row['from']:.4f} .. {row['to']:.4f}" if "from" in row else ""
        print(f"  {number:<10} {row['mean']:.4f} +- {row.get('deviation', 0):.4f}   {ends}")
    for run in made["runs"]:
        found = cnnrun("eval", run["run"])
        for table in ("per_target", "per_class"):
            for row in found["tables"].get(table, ()):
                print("   ", run["seed"], {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})


def apart(count: int, root: Path) -> None:
    """Pairs of seeds of one config, real trainings: how often compare tells them apart."""
    config = ROOT / "configs" / "digits.yaml"
    made = cnnrun("train", config, "--seeds", count, "--resume", "--runs", root)
    seen = [compare._measure_run(Path(row["run"]), root, torch.device("cpu"), None).measurement for row in made["runs"]]
    told = [
        any(row["distinguishable"] for row in compare.compare_metrics(first, other))
        for first, other in itertools.combinations(seen, 2)
    ]
    print(f"{len(told)} pairs of {count} seeds: not distinguishable in {len(told) - sum(told)}")
    accuracy = [row["numbers"]["accuracy"] for row in made["runs"]]
    print(f"accuracy {statistics.mean(accuracy):.4f} +- {statistics.stdev(accuracy):.4f}")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("what", choices=["plans", "cells", "rotated", "apart"])
    words.add_argument("configs", nargs="*")
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--runs", type=Path, help="a folder to keep the runs in; else a temporary one")
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = (given.runs or Path(folder)).resolve()
        if given.what == "plans":
            plans(given.configs, root)
        elif given.what == "apart":
            apart(given.seeds, root)
        else:
            names = {"cells": ["bccd-count", "bccd-presence"], "rotated": ["rotated-digits"]}[given.what]
            for name in names:
                seeds_of(name, given.seeds, root)


if __name__ == "__main__":
    main()
