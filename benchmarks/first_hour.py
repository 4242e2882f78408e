"""The first hour of a new user: init, check, train, eval and export, for data that nobody prepared.

    python benchmarks/first_hour.py --minutes 5 --out runs/first-hour PATH ["PATH --task verify" ...]

The config is used unchanged. Each data set is a path with options of `cnnrun init`. Prints a row for each: how it was
read, seconds of every command, the task's metrics on test (on val where there is no test), and what failed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

_METRICS = ("accuracy", "f1", "mAP", "mae", "r2", "AP50", "AP", "mean_iou", "eer", "auc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("runs/first-hour"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| data | task | init | check | train | eval | export | score |\n|---|---|---|---|---|---|---|---|")
    for number, words in enumerate(args.data):
        print(measure(shlex.split(words), args.out / f"{number}.yaml", args.out / "runs", args.minutes), flush=True)


def measure(words: list[str], config: Path, runs: Path, minutes: float) -> str:
    """Run the five commands on one data set; returns a row of the table."""
    config.unlink(missing_ok=True)
    commands = {
        "init": ["init", *words, "--out", str(config), "--minutes", str(minutes), "--json"],
        "check": ["check", str(config)],
        "train": ["train", str(config), "--runs", str(runs), "--no-report"],
        "eval": ["eval", str(config), "--runs", str(runs), "--json"],
        "export": ["export", "onnx", str(config), "--runs", str(runs)],
    }
    cells, outputs = [], dict[str, str]()
    for name, command in commands.items():
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "cnnrun", *command], capture_output=True, text=True)
        outputs[name] = done.stdout
        cells.append(f"{time.perf_counter() - start:.0f} s")
        if done.returncode:
            cells[-1] += f", exit code {done.returncode}"
            lines = done.stderr.strip().splitlines()[-4:]
            print(f"{name} {words[0]}: {lines}", file=sys.stderr)
            break
    task = json.loads(outputs["init"])["task"] if outputs["init"] else ""
    return f"| {' '.join(words)} | {task} | {' | '.join(cells)} | {describe_scores(outputs.get('eval', ''))} |"


def describe_scores(evaluation: str) -> str:
    """The usual metrics of an evaluation, with their intervals."""
    if not evaluation:
        return ""
    data = json.loads(evaluation)
    names = [name for name in data["numbers"] if name in _METRICS and data["numbers"][name] is not None]
    texts = []
    for name in names:
        low, high = data["intervals"].get(name, (None, None))
        interval = f" ({low:.3f} .. {high:.3f})" if low is not None else ""
        texts.append(f"{name} {data['numbers'][name]:.3f}{interval}")
    return f"{', '.join(texts)}; {data['samples']} images of {data['split']}"


if __name__ == "__main__":
    main()
