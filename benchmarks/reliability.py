"""What reliability costs, and what ranks gain. Results: benchmarks/reliability.md.

    python benchmarks/reliability.py --only save            hashing and fsync of 256 MiB
    python benchmarks/reliability.py --only share           a checkpoint an epoch, configs/fashion-vgg.yaml
    python benchmarks/reliability.py --only ranks           2 ranks of 1 thread against 1 rank of 2 threads, vgg-small
    python benchmarks/reliability.py --only before --other DIR   images/s against another checkout, interleaved

All need Fashion-MNIST (scripts/get_data fashion-mnist) but the first, and a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from cnnrun import checkpoint, experiment, train
from cnnrun.atomic_files import Folder

HERE = Path(__file__).parent


def scratch() -> Path:
    """On the disk of the checkout, where git does not look."""
    folder = HERE.parent / "runs"
    folder.mkdir(exist_ok=True)
    return folder


def line(name: str, values: list[float], unit: str) -> None:
    spread = f"{min(values):.4g} .. {max(values):.4g}"
    print(f"{name}: {statistics.median(values):.4g} {unit} ({spread}, n = {len(values)})", flush=True)


def save(rounds: int) -> None:
    """A checkpoint of 256 MiB as it is written, against the same files neither hashed nor waited for."""
    part = {f"w{number}": torch.randn(1 << 20) for number in range(32)}  # 128 MiB
    parts = {"model": part, "optimizer": {name: value.clone() for name, value in part.items()}}
    found: dict[str, list[float]] = {"whole": [], "bare": []}
    sync, hashing = os.fsync, checkpoint.hashlib.sha256
    with tempfile.TemporaryDirectory(dir=scratch()) as name:
        for number in range(rounds + 1):
            for side in found:
                if side == "bare":
                    os.fsync = lambda descriptor: None
                    checkpoint.hashlib.sha256 = lambda data: hashing(b"")
                shutil.rmtree(Path(name), ignore_errors=True)
                Path(name).mkdir()
                os.sync()
                began = time.perf_counter()
                checkpoint.save(Folder(Path(name)), 1, parts, {})
                seconds = time.perf_counter() - began
                os.fsync, checkpoint.hashlib.sha256 = sync, hashing
                if number:  # the first is for warming up
                    found[side].append(seconds)
    line("256 MiB saved", found["whole"], "s")
    line("neither hashed nor synced", found["bare"], "s")
    line("the difference", [a - b for a, b in zip(found["whole"], found["bare"], strict=True)], "s")


def share(rounds: int) -> None:
    """The part of fashion-vgg's wall time that goes into its checkpoints, over two epochs."""
    seconds: list[float] = []
    real = train.Training.save

    def timed(*arguments, **settings):
        began = time.perf_counter()
        real(*arguments, **settings)
        seconds.append(time.perf_counter() - began)

    train.Training.save = timed
    from cnnrun import commands
    from cnnrun.device import keep_freed_memory

    keep_freed_memory()
    made = experiment.load(HERE.parent / "configs" / "fashion-vgg.yaml", ["train.epochs=2"])
    with tempfile.TemporaryDirectory(dir=scratch()) as name:
        result = commands.train(made, Path(name), torch.device("cpu"), resume=False)
    line("a checkpoint", seconds, "s")
    print(f"of {result['seconds']:.1f} s in all: {sum(seconds) / result['seconds']:.3%}")


def speed(command: list[str], cwd: Path, threads: int) -> float:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True)
    found = [each for each in done.stdout.splitlines() if each.startswith("{")]
    return float(json.loads(found[-1])["images_per_second"])


def ranks(rounds: int, pictures: int) -> None:
    data = HERE.parent / "data" / "fashion-mnist"
    net = ["train", str(HERE / "nets" / "vgg-small.yaml"), f"data.source={{idx: {data}}}", "--json"]
    net += [f"data.split={{val: {1 - pictures / 60000}}}", "train.epochs=1"]
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "cnnrun"]
    sides = {
        "1 rank, 2 threads": ([sys.executable, "-m", "cnnrun"], 2),
        "2 ranks, 1 thread": (two, 1),
    }
    found: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(dir=scratch()) as name:
        for _ in range(rounds):
            for side, (start, threads) in sides.items():
                found[side].append(speed([*start, *net, "--runs", name], HERE.parent, threads))
                print(f"  {side}: {found[side][-1]:,.0f}", flush=True)
    for side, values in found.items():
        line(side, values, "images/s")
    ratios = [b / a for a, b in zip(*found.values(), strict=True)]
    line("ratio", ratios, "x")


def before(rounds: int, other: Path) -> None:
    data = HERE.parent / "data" / "fashion-mnist"
    with tempfile.TemporaryDirectory(dir=scratch()) as name:
        for net, part in (("lenet", 0.3), ("vgg-small", 0.9)):
            found: dict[str, list[float]] = {"other": [], "this": []}
            for _ in range(rounds):
                for side, folder in (("other", other), ("this", HERE.parent)):
                    command = [sys.executable, "-m", "cnnrun", "train", str(HERE / "nets" / f"{net}.yaml")]
                    command += [f"data.source={{idx: {data}}}", f"data.split={{val: {part}}}", "train.epochs=2"]
                    found[side].append(speed([*command, "--json", "--runs", name], folder, 2))
                    shutil.rmtree(Path(name), ignore_errors=True)
                    Path(name).mkdir()
            for side, values in found.items():
                line(f"{net}, {side}", values, "images/s")
            line(f"{net}, ratio", [b / a for a, b in zip(*found.values(), strict=True)], "x")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", choices=("save", "share", "ranks", "before"), required=True)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--pictures", type=int, default=6000)
    options.add_argument("--other", type=Path)
    given = options.parse_args()
    if given.only == "ranks":
        ranks(given.rounds, given.pictures)
    elif given.only == "before":
        before(given.rounds, given.other)
    else:
        {"save": save, "share": share}[given.only](given.rounds)


if __name__ == "__main__":
    main()
