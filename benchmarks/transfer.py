"""What ImageNet weights are worth on a small folder of pictures: a few epochs from scratch, from weights, and frozen.

    python benchmarks/transfer.py --weights data/mobilenet-v2/mobilenet_v2-b0353104.pth [--seeds 3] [--pictures 100]

The task is Fashion-MNIST as a folder of PNG files, `--pictures` a class to learn from and 200 a class to report on; the
ways differ in nothing but what is printed. Each is a whole `cnnrun train` and `cnnrun eval` on the test split.
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
from pathlib import Path
from typing import Any

import torch

CONFIG = """
task: classify
data:
  source: {{folder: {folder}}}
  image: {{size: 96, channels: 3}}
model: {{zoo: mobilenet_v2}}
train: {{epochs: 3, batch: 32, optimizer: {{sgd: {{lr: 0.05, momentum: 0.9, nesterov: true}}}}, monitor: val/accuracy}}
"""
TEST_PICTURES = 200
# Each way has a rate of its own, as each would in use: of these, the one of the best mean accuracy on the val split.
WAYS: dict[str, tuple[list[float], list[str]]] = {
    "from scratch": ([0.005, 0.01, 0.02, 0.05, 0.1], []),
    "from weights": ([0.005, 0.01, 0.02], ["model.weights={weights}"]),
    "from weights, layers at a tenth of the head's rate": (
        [0.05, 0.1],
        ["model.weights={weights}", "train.optimizer.sgd.groups=[{{params: 'layers.*', lr: {tenth}}}]"],
    ),
    "from weights, all but the head frozen": ([0.05, 0.1], ["model.weights={weights}", "train.freeze=last"]),
}


def pictures(folder: Path, idx: Path, count: int) -> None:
    """Write the first `count` training and TEST_PICTURES test pictures of each class as PNG files."""
    from PIL import Image

    from cnnrun.data.sources.idx import Idx

    indexed = Idx(root=str(idx)).read()
    for split, wanted in (("train", count), ("test", TEST_PICTURES)):
        source, seen = indexed.splits[split], [0] * len(indexed.classes)
        for number, label in enumerate(source.targets["labels"].tolist()):
            if seen[label] < wanted:
                path = folder / split / str(label) / f"{seen[label]:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(source.images[number][:, :, 0]).save(path)  # type: ignore[index, call-overload]
                seen[label] += 1


def cnnrun(*words: str) -> Any:
    command = [sys.executable, "-m", "cnnrun", *words, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("data/mobilenet-v2/mobilenet_v2-b0353104.pth"))
    parser.add_argument("--idx", type=Path, default=Path("data/fashion-mnist"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=100)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {args.seeds} seeds, {args.pictures} pictures a class")
    with tempfile.TemporaryDirectory() as work:
        folder, weights = Path(work) / "pictures", Path(work) / "mobilenet_v2.safetensors"
        pictures(folder, args.idx, args.pictures)
        cnnrun("import", str(args.weights), "--like", "mobilenet_v2", "--classes", "imagenet", "--out", str(weights))
        config = Path(work) / "transfer.yaml"
        config.write_text(CONFIG.format(folder=folder))
        for way, (rates, overrides) in WAYS.items():
            tried = [(rate, *runs(config, weights, rate, overrides, args.seeds)) for rate in rates]
            for rate, val, test, seconds in tried:
                chosen = "  <- chosen on val" if sum(val) == max(sum(each[1]) for each in tried) else ""
                print(
                    f"{way}, lr {rate:g}: val {shown(val)}  test {shown(test)}  {shown(seconds, 0)} s{chosen}",
                    flush=True,
                )


def runs(
    config: Path, weights: Path, rate: float, overrides: list[str], seeds: int
) -> tuple[list[float], list[float], list[float]]:
    """Accuracy on val (the best epoch's) and on test, and the seconds of training, of each seed."""
    val, test, seconds = [], [], []
    for seed in range(seeds):
        given = [each.format(weights=weights, tenth=rate / 10) for each in overrides]
        words = [str(config), f"seed={seed}", f"train.optimizer.sgd.lr={rate}", *given]
        began = time.perf_counter()
        made = cnnrun("train", *words, "--runs", f"{config.parent}/runs")
        seconds.append(time.perf_counter() - began)
        val.append(made["best"]["val/accuracy"])
        test.append(cnnrun("eval", made["run"])["numbers"]["accuracy"])
    return val, test, seconds


def shown(values: list[float], digits: int = 4) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


if __name__ == "__main__":
    main()
