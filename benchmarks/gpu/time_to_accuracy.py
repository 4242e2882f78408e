"""Seconds until configs/fashion-vgg.yaml reaches a val accuracy of 0.935, and what test says of those weights.

    python benchmarks/gpu/time_to_accuracy.py --device cuda

Only val decides when the training ends; test is measured once, at the end.
"""

from __future__ import annotations

import gzip
import struct
import tempfile
import time
from pathlib import Path

from common import ROOT, Options, attempt, emit, options

from cnnrun.experiment import config_file
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.train_run import train_run

TARGET = 0.935
DATA = ROOT / "data" / "fashion-mnist"
FEW = {"train": 600, "t10k": 200}


def main() -> None:
    """Train, if the pictures are there."""
    given = options(__doc__)
    if not (DATA / "train-images-idx3-ubyte.gz").exists():
        emit("time_to_accuracy", skipped="data/fashion-mnist is not here: scripts/get_data fashion-mnist")
        return
    with tempfile.TemporaryDirectory(prefix="cnnrun-accuracy-") as folder, attempt("time_to_accuracy"):
        train(given, Path(folder))


def train(given: Options, folder: Path) -> None:
    """Emit each epoch, the seconds to the target, and the accuracy on test."""
    root = few_pictures(folder) if given.is_small else DATA
    overrides = [f"data.source={{idx: {{root: {root}}}}}", *(["train.epochs=1"] if given.is_small else [])]
    tried = config_file.read_config(ROOT / "configs" / "fashion-vgg.yaml", overrides)
    reached: list[float] = []
    began = time.perf_counter()

    def enough(epoch: int, value: float) -> bool:
        took = time.perf_counter() - began
        emit("epoch", epoch=epoch, took=took, val_accuracy=value)
        if value >= TARGET:
            reached.append(took)
        return bool(reached) or given.seconds_left < 0

    result = train_run(tried, folder / "runs", given.device, resume=False, should_stop=enough)
    keys = ("steps", "seconds", "images_per_second", "data_wait_share", "peak_memory_mib", "best")
    said = {("training_seconds" if key == "seconds" else key): result[key] for key in keys}
    emit("time_to_accuracy", target=TARGET, reached=bool(reached), took=reached[0] if reached else None, **said)
    found = evaluate_run(Path(result["run"]), folder / "runs", given.device, "test")
    emit("test", samples=found["samples"], step=found["step"], accuracy=found["numbers"]["accuracy"])


def few_pictures(folder: Path) -> Path:
    """Write the first pictures of each file as files of their own; returns their folder."""
    made = folder / "fashion-mnist"
    made.mkdir()
    for part, count in FEW.items():
        for kind, size, head in (("images-idx3", 28 * 28, 16), ("labels-idx1", 1, 8)):
            with gzip.open(DATA / f"{part}-{kind}-ubyte.gz") as file:
                begin = bytearray(file.read(head))
                pixels = file.read(count * size)
            begin[4:8] = struct.pack(">I", count)
            (made / f"{part}-{kind}-ubyte").write_bytes(bytes(begin) + pixels)
    return made


if __name__ == "__main__":
    main()
