"""Measure the time until configs/fashion-vgg.yaml reaches 0.935 val accuracy, and the test accuracy at that point.

    python benchmarks/gpu/time_to_accuracy.py --device cuda

Only val decides when the training ends; test is measured once, at the end.
"""

from __future__ import annotations

import gzip
import struct
import tempfile
import time
from pathlib import Path

from common import ROOT, Options, attempt, emit, parse_options

from cnnrun.experiment import config_file
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.studies.train_run import train_run

TARGET = 0.935
DATA = ROOT / "data" / "fashion-mnist"
FEW = {"train": 600, "t10k": 200}


def main() -> None:
    """Train if the data is present."""
    options = parse_options(__doc__)
    if not (DATA / "train-images-idx3-ubyte.gz").exists():
        emit("time_to_accuracy", skipped="data/fashion-mnist is not here: scripts/get_data fashion-mnist")
        return
    with tempfile.TemporaryDirectory(prefix="cnnrun-accuracy-") as folder, attempt("time_to_accuracy"):
        train(options, Path(folder))


def train(options: Options, folder: Path) -> None:
    """Emit each epoch, the seconds to the target, and the accuracy on test."""
    root = write_few_images(folder) if options.is_small else DATA
    overrides = [f"data.source={{idx: {{root: {root}}}}}", *(["train.epochs=1"] if options.is_small else [])]
    experiment = config_file.read_config(ROOT / "configs" / "fashion-vgg.yaml", overrides)
    reached: list[float] = []
    began = time.perf_counter()

    def should_stop(epoch: int, value: float) -> bool:
        took = time.perf_counter() - began
        emit("epoch", epoch=epoch, took=took, val_accuracy=value)
        if value >= TARGET:
            reached.append(took)
        return bool(reached) or options.seconds_left < 0

    result = train_run(experiment, folder / "runs", options.device, resume=False, should_stop=should_stop)
    keys = ("steps", "seconds", "images_per_second", "data_wait_share", "peak_memory_mib", "best")
    figures = {("training_seconds" if key == "seconds" else key): result[key] for key in keys}
    emit("time_to_accuracy", target=TARGET, reached=bool(reached), took=reached[0] if reached else None, **figures)
    result = evaluate_run(Path(result["run"]), folder / "runs", options.device, "test")
    emit("test", samples=result["samples"], step=result["step"], accuracy=result["numbers"]["accuracy"])


def write_few_images(folder: Path) -> Path:
    """Write the first images and labels of each file to new files; returns their folder."""
    target = folder / "fashion-mnist"
    target.mkdir()
    for part, count in FEW.items():
        for kind, size, header_size in (("images-idx3", 28 * 28, 16), ("labels-idx1", 1, 8)):
            with gzip.open(DATA / f"{part}-{kind}-ubyte.gz") as file:
                header = bytearray(file.read(header_size))
                pixels = file.read(count * size)
            header[4:8] = struct.pack(">I", count)
            (target / f"{part}-{kind}-ubyte").write_bytes(bytes(header) + pixels)
    return target


if __name__ == "__main__":
    main()
