"""Measure what commands cost and print with many classes, each in a separate process.

    python benchmarks/classes.py --classes 1200                    # every task
    python benchmarks/classes.py --classes 30 --task classify

The data is noise: a network that has learned nothing confuses all classes, which gives the longest output.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

SIDE, IMAGES_PER_CLASS = 8, 4  # pixels; images of a class: two of train, one of val, one of test
TASKS = ("classify", "multilabel", "detect")


def write_arrays(folder: Path, classes: int, label_sets: bool) -> dict:
    draw, splits = np.random.default_rng(0), {}
    for split, each in (("train", IMAGES_PER_CLASS - 2), ("val", 1), ("test", 1)):
        labels = np.repeat(np.arange(classes), each)
        splits[f"x_{split}"] = draw.integers(0, 256, (len(labels), SIDE, SIDE), dtype=np.uint8)
        splits[f"y_{split}"] = np.eye(classes, dtype=np.uint8)[labels] if label_sets else labels
    np.savez(folder / "many.npz", **splits)
    names = [f"class {number}" for number in range(classes)]
    return {"arrays": {"path": str(folder / "many.npz"), "labels" if label_sets else "classes": names}}


def write_coco(folder: Path, classes: int) -> dict:
    """Write images of 32 x 32 with four boxes each, all classes equally often."""
    import json

    from PIL import Image

    draw, source = np.random.default_rng(0), {}
    for split, each in (("train", IMAGES_PER_CLASS - 2), ("val", 1), ("test", 1)):
        pictures = folder / split
        pictures.mkdir()
        images, boxes = [], []
        for number in range(1, max(8, classes * each // 4) + 1):
            Image.fromarray(draw.integers(0, 256, (32, 32), dtype=np.uint8)).save(pictures / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 32, "height": 32})
            for _ in range(4):
                x, y, w, h = (int(value) for value in (*draw.integers(0, 16, 2), *draw.integers(6, 16, 2)))
                boxes.append({"id": len(boxes) + 1, "image_id": number, "category_id": len(boxes) % classes + 1,
                              "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})  # fmt: skip
        categories = [{"id": number + 1, "name": f"class {number}"} for number in range(classes)]
        file = folder / f"{split}.json"
        file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
        source[split] = str(file)
    return {"coco": {**source, "pictures": {split: str(folder / split) for split in source}}}


def write_config(folder: Path, task: str, classes: int) -> Path:
    source = write_coco(folder, classes) if task == "detect" else write_arrays(folder, classes, task == "multilabel")
    layers = [{"conv": {"out_channels": 8, "stride": 2, "activation": "relu"}}]
    content = {
        "name": "many",
        "task": {"detect": {"channels": 8, "depth": 1}} if task == "detect" else task,
        "data": {"source": source, "image": {"size": 32 if task == "detect" else SIDE, "channels": 1}},
        "model": layers if task == "detect" else [*layers, "flatten"],
        "train": {"epochs": 1, "batch": 8 if task == "detect" else 64, "optimizer": {"sgd": {"lr": 0.01}}},
    }
    path = folder / "many.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def measure(folder: Path, *words: str) -> tuple[float, int, float]:
    """Return processor seconds, characters on stdout and stderr, and peak resident MiB of a command."""
    with (folder / "out").open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "cnnrun", *words], stdout=out, stderr=out, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    text = (folder / "out").read_text()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}: exit {process.returncode}\n{text[-2000:]}")
    return usage.ru_utime + usage.ru_stime, len(text), usage.ru_maxrss / 1024


def commands_of(task: str) -> list[list[str]]:
    train = ["train", "many.yaml", "--no-report"]
    common = [["check", "many.yaml"], ["data", "check", "many.yaml"], train, ["eval", "runs/many/1"]]
    common += [["eval", "runs/many/1", "--json"], ["report", "runs/many/1"]]
    return [*common, [*train, "seed=2"], ["compare", "runs/many/1", "runs/many/2"]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--classes", type=int, default=1200)
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--only", help="run only commands that begin with this, and the trainings", default="")
    options = parser.parse_args()
    print("| task | command | CPU seconds | characters | peak MiB |\n|---|---|---|---|---|")
    for task in options.task or TASKS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_config(folder, task, options.classes)
            for words in commands_of(task):
                command = " ".join(words)
                if words[0] != "train" and not command.startswith(options.only):
                    continue
                seconds, letters, memory = measure(folder, *words)
                page = folder / "runs" / "many" / "1" / "report.html"
                size = f", a page of {page.stat().st_size:,} bytes" if words[0] == "report" else ""
                print(f"| {task} | `{command}`{size} | {seconds:.1f} | {letters:,} | {memory:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
