"""A config's training and its metric on test, each by a command, for measurements over seeds."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def parse_arguments(description: str | None, seeds: int) -> argparse.Namespace:
    """Parse `CONFIG [KEY.PATH=VALUE ...] [--seeds N] [--metric NAME]`; `seeds` is the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--metric", default="accuracy")
    return parser.parse_intermixed_args()


def measure(
    config: str, metric: str, settings: Sequence[str], runs: Path, environment: Mapping[str, str] | None = None
) -> tuple[float, float]:
    """Train and evaluate by commands; returns the metric on test and the seconds of the training, start-up included."""
    variables = {**os.environ, **(environment or {})}
    cnnrun = [sys.executable, "-m", "cnnrun"]
    start = time.perf_counter()
    train = [*cnnrun, "train", config, *settings, "--runs", str(runs)]
    subprocess.run(train, check=True, capture_output=True, env=variables)
    seconds = time.perf_counter() - start
    evaluate = [*cnnrun, "eval", "--runs", str(runs), "--split", "test", "--json"]
    done = subprocess.run(evaluate, check=True, capture_output=True, env=variables)
    return json.loads(done.stdout)["numbers"][metric], seconds
