"""Measure what verifying the cache costs, compare_sides with a commit that does not verify; and the speed of hashes.

    git archive COMMIT | tar -x -C /tmp/before
    python benchmarks/cache.py --before /tmp/before [--rounds 7]

Each measurement is a separate process; the sides are interleaved. It prints processor seconds of all threads, and
wall-clock seconds, which other jobs on the machine lengthen:

build    decode images into a new entry
open     open a complete entry, in memory (mapped) or to be read image by image from the disk
cold     the same, with the entry's files out of the page cache
epoch    read every image once, in random batches of 128: the first epoch, and the second
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

SIZES = {"60,000 x 1x28x28": (60_000, 28, 1), "5,000 x 3x128x128": (5_000, 128, 3)}
HASHES: dict[str, Callable[[bytes], object]] = {
    "blake2b": lambda data: hashlib.blake2b(data).digest(),
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "crc32": zlib.crc32,
}

# Runs in both checkouts. The images have another size than the network's input, so that they go through the cache.
MEASUREMENT = """
import importlib, json, sys, time
import numpy as np, torch
import cnnrun

def first_of(*places):
    # The first of several module:name that this checkout has; names differ between commits.
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"none of {places}")

count, side, channels, gib, folder = *map(int, sys.argv[1:4]), float(sys.argv[4]), sys.argv[5]
store_split = first_of("cnnrun.data.storage:store_split", "cnnrun.store:stored")
storage = importlib.import_module(store_split.__module__)
for name in ("_key", "_cache_key"):
    if hasattr(storage, name):
        setattr(storage, name, lambda *arguments: "0" * 32)
Split = first_of("cnnrun.contracts.source:Split", "cnnrun.contracts:Split")
ImageSettings = first_of("cnnrun.data.image_files:ImageSettings", "cnnrun.pictures:Image")
progress_bar = first_of("cnnrun.base.progress:progress_bar", "cnnrun.progress:bar")
pixels = np.random.default_rng(0).integers(0, 256, (count, side + 1, side + 1, channels), dtype=np.uint8)
split = Split(pixels, {"labels": torch.zeros(count, dtype=torch.int64)}, "numbers")
Settings = first_of("cnnrun.data.storage:StorageSettings", "cnnrun.data.storage:CacheSettings")
settings = Settings(cache="disk", cache_dir=folder, memory_gib=gib, workers=2)
image = ImageSettings(size=side, channels=channels)
def now():
    return np.array([time.process_time(), time.perf_counter()])
began = now()
stored = store_split(split, (channels, side, side), image, settings, None, progress_bar)
images = stored.images if hasattr(stored, "images") else stored.pictures
seconds = [now() - began]
for epoch in range(2):
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
    began = now()
    for rows in order.split(128):
        images.take(rows)
    seconds.append(now() - began)
print(json.dumps([cnnrun.__file__, type(images).__name__, np.array(seconds).tolist()]))
"""


def measure(tree: Path, size: tuple[int, int, int], gib: float, folder: str) -> np.ndarray:
    """Return the seconds of opening, of the first and of the second epoch, each as (processor, wall-clock)."""
    command = [sys.executable, "-c", MEASUREMENT, *map(str, size), str(gib), folder]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    package, kind, seconds = json.loads(done.stdout)
    assert Path(package).is_relative_to(tree.resolve())
    assert kind in (("MemoryStore", "InMemory", "Held") if gib >= 1 else ("DiskStore", "OnDisk"))
    return np.array(seconds)


def drop_pages(folder: str) -> None:
    """Drop an entry's files from the page cache, so that they are read from the disk again."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def compare_sides(
    sides: dict[str, Path], size: tuple[int, int, int], rounds: int
) -> dict[str, dict[str, list[np.ndarray]]]:
    """Return the seconds of each measurement, by side."""
    table: dict[str, dict[str, list[np.ndarray]]] = {}

    def note(what: str, side: str, seconds: np.ndarray) -> None:
        table.setdefault(what, {}).setdefault(side, []).append(seconds)

    for round_ in range(rounds):
        order = list(sides) if round_ % 2 else list(sides)[::-1]
        with tempfile.TemporaryDirectory() as work:
            for side in order:
                note("build", side, measure(sides[side], size, 4.0, f"{work}/{side}")[0])
            for kind, gib in (("in memory", 4.0), ("from disk", 1e-9)):
                for side in order:
                    opened, first, second = measure(sides[side], size, gib, f"{work}/{side}")
                    note(f"open, {kind}", side, opened)
                    note(f"first epoch, {kind}", side, first)
                    note(f"second epoch, {kind}", side, second)
                for side in order:
                    drop_pages(f"{work}/{side}")
                    opened, first, _ = measure(sides[side], size, gib, f"{work}/{side}")
                    note(f"cold: open and first epoch, {kind}", side, opened + first)
    return table


def print_hash_speeds(rounds: int) -> None:
    data = os.urandom(32 << 20)
    for name, hash_data in HASHES.items():
        speeds = []
        for _ in range(rounds):
            began = time.perf_counter()
            hash_data(data)
            speeds.append(len(data) / (time.perf_counter() - began) / 1e9)
        print(f"  {name:<10} {statistics.median(speeds):.2f} GB/s ({min(speeds):.2f} .. {max(speeds):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the files of the commit to compare with")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    sides = {"before": args.before, "now": Path(__file__).parent.parent}
    print(f"{args.rounds} rounds, interleaved\nhashes, 32 MiB, one thread")
    print_hash_speeds(args.rounds)
    for name, size in SIZES.items():
        print(f"\n{name}: seconds, median (min .. max)")
        for what, by_side in compare_sides(sides, size, args.rounds).items():
            for column, clock in enumerate(("on a processor", "by the clock")):
                cells = [f"{side} {spread([seconds[column] for seconds in by_side[side]])}" for side in sides]
                print(f"  {what:<38} {clock:<15} " + "   ".join(cells), flush=True)


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} .. {max(seconds):.3f})"


if __name__ == "__main__":
    main()
