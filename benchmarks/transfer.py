"""Measure what ImageNet weights gain on a small folder of images: a few epochs from scratch, from weights, and frozen.

    python benchmarks/transfer.py --weights data/mobilenet-v2/mobilenet_v2-b0353104.pth [--seeds 3] [--images 100]

The task is Fashion-MNIST as a folder of PNG files: `--images` per class to learn from and 200 per class for the test.
The ways differ only in the printed settings. Each is a whole `cnnrun train` and `cnnrun eval` on the test split.
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
TEST_IMAGES = 200
# Each way has its own learning rate, as it would in use: the one of these with the best mean accuracy on val.
WAYS: dict[str, tuple[list[float], list[str]]] = {
    "from scratch": ([0.005, 0.01, 0.02, 0.05, 0.1], []),
    "from weights": ([0.005, 0.01, 0.02], ["model.weights={weights}"]),
    "from weights, layers at a tenth of the head's rate": (
        [0.05, 0.1],
        ["model.weights={weights}", "train.optimizer.sgd.groups=[{{params: 'layers.*', lr: {tenth}}}]"],
    ),
    "from weights, all but the head frozen": ([0.05, 0.1], ["model.weights={weights}", "train.freeze=last"]),
}


def write_images(folder: Path, idx: Path, count: int) -> None:
    """Write the first `count` training and TEST_IMAGES test images of each class as PNG files."""
    from PIL import Image

    from cnnrun.data.sources.idx import Idx

    indexed = Idx(root=str(idx)).read()
    for split, limit in (("train", count), ("test", TEST_IMAGES)):
        source, counts = indexed.splits[split], [0] * len(indexed.classes)
        for number, label in enumerate(source.targets["labels"].tolist()):
            if counts[label] < limit:
                path = folder / split / str(label) / f"{counts[label]:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(source.images[number][:, :, 0]).save(path)  # type: ignore[index, call-overload]
                counts[label] += 1


def cnnrun(*words: str) -> Any:
    command = [sys.executable, "-m", "cnnrun", *words, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("data/mobilenet-v2/mobilenet_v2-b0353104.pth"))
    parser.add_argument("--idx", type=Path, default=Path("data/fashion-mnist"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=100)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {args.seeds} seeds, {args.images} images a class")
    with tempfile.TemporaryDirectory() as work:
        folder, weights = Path(work) / "pictures", Path(work) / "mobilenet_v2.safetensors"
        write_images(folder, args.idx, args.images)
        cnnrun("import", str(args.weights), "--like", "mobilenet_v2", "--classes", "imagenet", "--out", str(weights))
        config = Path(work) / "transfer.yaml"
        config.write_text(CONFIG.format(folder=folder))
        for way, (rates, overrides) in WAYS.items():
            results = [(rate, *train_and_test(config, weights, rate, overrides, args.seeds)) for rate in rates]
            for rate, val, test, seconds in results:
                chosen = "  <- chosen on val" if sum(val) == max(sum(result[1]) for result in results) else ""
                print(
                    f"{way}, lr {rate:g}: val {spread(val)}  test {spread(test)}  {spread(seconds, 0)} s{chosen}",
                    flush=True,
                )


def train_and_test(
    config: Path, weights: Path, rate: float, overrides: list[str], seeds: int
) -> tuple[list[float], list[float], list[float]]:
    """Return for each seed the accuracy on val (of the best epoch) and on test, and the seconds of training."""
    val, test, seconds = [], [], []
    for seed in range(seeds):
        settings = [override.format(weights=weights, tenth=rate / 10) for override in overrides]
        words = [str(config), f"seed={seed}", f"train.optimizer.sgd.lr={rate}", *settings]
        began = time.perf_counter()
        result = cnnrun("train", *words, "--runs", f"{config.parent}/runs")
        seconds.append(time.perf_counter() - began)
        val.append(result["best"]["val/accuracy"])
        test.append(cnnrun("eval", result["run"])["numbers"]["accuracy"])
    return val, test, seconds


def spread(values: list[float], digits: int = 4) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
