"""Measure what reliability costs and what ranks gain. Results: benchmarks/reliability.md.

    python benchmarks/reliability.py --only save            hashing and fsync of 256 MiB
    python benchmarks/reliability.py --only share           a checkpoint an epoch, configs/fashion-vgg.yaml
    python benchmarks/reliability.py --only ranks           2 ranks of 1 thread against 1 rank of 2 threads, vgg-small
    python benchmarks/reliability.py --only before --other DIR   images/s compared with another checkout, interleaved
    python benchmarks/reliability.py --only cost --other DIR     a step, a save, a first epoch, interleaved
    python benchmarks/reliability.py --only supervisor      30 chains of kills under a supervisor
    python benchmarks/reliability.py --only damage          every damage of tests/support/damaged_runs.py, links
    python benchmarks/reliability.py --only hostile         every input of tests/support/hostile_inputs.py

`share`, `ranks`, `before` and `cost` need Fashion-MNIST (scripts/get_data fashion-mnist), and a quiet machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from cnnrun.base.atomic_files import Folder
from cnnrun.experiment import config_file
from cnnrun.training import checkpoints, loop

HERE = Path(__file__).parent
CHOICES = ("save", "share", "ranks", "before", "cost", "supervisor", "hostile", "damage")
sys.path.insert(0, str(HERE.parent))


def scratch_folder() -> Path:
    """Return a folder on the disk of the checkout that git ignores."""
    folder = HERE.parent / "runs"
    folder.mkdir(exist_ok=True)
    return folder


def print_median(name: str, values: list[float], unit: str) -> None:
    spread = f"{min(values):.4g} .. {max(values):.4g}"
    print(f"{name}: {statistics.median(values):.4g} {unit} ({spread}, n = {len(values)})", flush=True)


def save(rounds: int) -> None:
    """Compare saving a checkpoint of 256 MiB with saving it without hashes and fsync."""
    part = {f"w{number}": torch.randn(1 << 20) for number in range(32)}  # 128 MiB
    parts = {"model": part, "optimizer": {name: value.clone() for name, value in part.items()}}
    found: dict[str, list[float]] = {"whole": [], "bare": []}
    sync, hashing = os.fsync, hashlib.sha256
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as name:
        for number in range(rounds + 1):
            for side in found:
                if side == "bare":
                    os.fsync = lambda descriptor: None
                    hashlib.sha256 = lambda data: hashing(b"")
                shutil.rmtree(Path(name), ignore_errors=True)
                Path(name).mkdir()
                os.sync()
                began = time.perf_counter()
                checkpoints.save(Folder(Path(name)), 1, parts, {})
                seconds = time.perf_counter() - began
                os.fsync, hashlib.sha256 = sync, hashing
                if number:  # the first warms up
                    found[side].append(seconds)
    print_median("256 MiB saved", found["whole"], "s")
    print_median("neither hashed nor synced", found["bare"], "s")
    print_median("the difference", [a - b for a, b in zip(found["whole"], found["bare"], strict=True)], "s")


def share(rounds: int) -> None:
    """Print the share of fashion-vgg's wall time that its checkpoints take, over two epochs."""
    seconds: list[float] = []
    original = loop.TrainingLoop.save

    def timed(*arguments, **settings):
        began = time.perf_counter()
        original(*arguments, **settings)
        seconds.append(time.perf_counter() - began)

    loop.TrainingLoop.save = timed
    from cnnrun.base.process_settings import keep_freed_memory
    from cnnrun.results.studies.train_run import train_run

    keep_freed_memory()
    experiment = config_file.read_config(HERE.parent / "configs" / "fashion-vgg.yaml", ["train.epochs=2"])
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as name:
        result = train_run(experiment, Path(name), torch.device("cpu"), resume=False)
    print_median("a checkpoint", seconds, "s")
    print(f"of {result['seconds']:.1f} s in all: {sum(seconds) / result['seconds']:.3%}")


def speed(command: list[str], cwd: Path, threads: int) -> float:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return float(json.loads(lines[-1])["images_per_second"])


def ranks(rounds: int, images: int) -> None:
    data = HERE.parent / "data" / "fashion-mnist"
    net = ["train", str(HERE / "nets" / "vgg-small.yaml"), f"data.source={{idx: {data}}}", "--json"]
    net += [f"data.split={{val: {1 - images / 60000}}}", "train.epochs=1"]
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "cnnrun"]
    sides = {
        "1 rank, 2 threads": ([sys.executable, "-m", "cnnrun"], 2),
        "2 ranks, 1 thread": (two, 1),
    }
    found: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as name:
        for _ in range(rounds):
            for side, (start, threads) in sides.items():
                found[side].append(speed([*start, *net, "--runs", name], HERE.parent, threads))
                print(f"  {side}: {found[side][-1]:,.0f}", flush=True)
    for side, values in found.items():
        print_median(side, values, "images/s")
    ratios = [b / a for a, b in zip(*found.values(), strict=True)]
    print_median("ratio", ratios, "x")


def before(rounds: int, other: Path) -> None:
    data = HERE.parent / "data" / "fashion-mnist"
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as name:
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
                print_median(f"{net}, {side}", values, "images/s")
            print_median(f"{net}, ratio", [b / a for a, b in zip(*found.values(), strict=True)], "x")


# One side of `cost`, run in the checkout that is its working directory.
SIDE = """
import importlib, json, sys, tempfile, time
from pathlib import Path
import torch
torch.set_num_threads(2)

def first_of(*places):
    # The first of several module:name that this checkout has; names differ between commits.
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"none of {places}")

def wrap(holder, names, before, after=lambda: None):
    # Calls before and after around the first of these functions that this checkout has.
    name = next(name for name in names if hasattr(holder, name))
    function = getattr(holder, name)
    def wrapped(*arguments, **settings):
        before()
        result = function(*arguments, **settings)
        after()
        return result
    setattr(holder, name, wrapped)
modules = ("cnnrun.base.process_settings", "cnnrun.base.device", "cnnrun.device")
first_of(*(f"{module}:keep_freed_memory" for module in modules))()
read_config = first_of("cnnrun.experiment.config_file:read_config", "cnnrun.experiment:load")
train_run = first_of("cnnrun.results.studies.train_run:train_run", "cnnrun.commands:train")
Training = first_of("cnnrun.training.loop:TrainingLoop", "cnnrun.training.loop:Training", "cnnrun.train:Training")
log = first_of("cnnrun.training.metrics_log:MetricsLog", "cnnrun.tracker:Tracker")
experiment = read_config(Path(sys.argv[1]), sys.argv[2:])
steps, begun, saved, records = [], [], [], []
wrap(Training, ["update_weights", "update"], lambda: steps.append(time.perf_counter()))
wrap(Training, ["save"], lambda: begun.append(time.perf_counter()), lambda: saved.append(time.perf_counter()))
wrap(log, ["record"], lambda: records.append(time.perf_counter()))
with tempfile.TemporaryDirectory() as name:
    train_run(experiment, Path(name) / "warm", torch.device("cpu"), resume=False)
    for times in (steps, begun, saved, records):
        times.clear()
    start = time.perf_counter()
    train_run(experiment, Path(name) / "runs", torch.device("cpu"), resume=False)
between = sorted(b - a for a, b in zip(steps, steps[1:]))
saves = [b - a for a, b in zip(begun, saved)]
print(json.dumps({"step": between[len(between) // 4], "save": min(saves), "epoch": records[0] - start}))
"""


def cost(rounds: int, other: Path) -> None:
    """Compare a step (lower quartile), a save (the fastest) and a first epoch with its data, on both sides."""
    data = HERE.parent / "data" / "fashion-mnist"
    settings = [f"data.source={{idx: {data}}}", "data.split={val: 0.6}", "train.epochs=3", "train.save_every=60"]
    found: dict[str, dict[str, list[float]]] = {name: {"other": [], "this": []} for name in ("step", "save", "epoch")}
    for number in range(rounds):
        sides = [("other", other), ("this", HERE.parent)]
        for side, folder in sides if number % 2 else sides[::-1]:
            command = [sys.executable, "-c", SIDE, str(HERE / "nets" / "lenet.yaml"), *settings]
            environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "2"}
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                found[name][side].append(1000 * value)
        print(f"  round {number + 1} of {rounds}", flush=True)
    for name, both in found.items():
        for side, values in both.items():
            print_median(f"{name}, {side}", values, "ms")
        print_median(f"{name}, ratio", [b / a for a, b in zip(both["other"], both["this"], strict=True)], "x")


def supervisor(rounds: int) -> None:
    """Run `rounds` chains of kills for each of ten places."""
    from tests.support.supervised_commands import chains

    counts, failed = Counter[str](), 0
    for chain in chains(rounds):
        counts["chains"] += 1
        counts["kills"] += chain.kills
        counts["starts"] += chain.starts
        failed += bool(chain.trouble)
        print(
            f"  {chain.place}: {chain.kills} kills, {chain.starts} starts; {chain.trouble or 'as undisturbed'}",
            flush=True,
        )
    print(f"{dict(counts)}; {counts['chains'] - failed} of {counts['chains']} equal to undisturbed, none done twice")


def hostile_inputs(rounds: int) -> None:
    """Print a row of Markdown for each input."""
    from tests.support import hostile_inputs

    print("| input | exit code | peak MiB | s | what it says |\n|---|---|---|---|---|")
    for name, (build, expected) in hostile_inputs.INPUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            answer = hostile_inputs.answer(build, Path(folder) / "files")
        message = answer.err.splitlines()[0].replace("|", "/") if answer.err else ""
        mark = "" if answer.code == expected else f" (expected {expected})"
        print(
            f"| {name} | {answer.code}{mark} | {answer.peak_mib:,} | {answer.seconds:.1f} | {message[:110]} |",
            flush=True,
        )


def damages(rounds: int) -> None:
    """Try every damage to a run: print the number of each exit code, and the damages with a code other than 0, 3, 4."""
    from tests.support.damaged_runs import checkpoint_damages, file_damages, run_on_damaged_copy, runs_of_each_state

    with tempfile.TemporaryDirectory() as name:
        config, finished, killed = runs_of_each_state(Path(name))
        resume = ("train", str(config), "--resume", "--no-report")
        kinds = {
            "files, eval": (finished, file_damages, ("eval",)),
            "files, report": (finished, file_damages, ("report",)),
            "files, train --resume": (killed, file_damages, resume),
            "checkpoints, eval": (finished, checkpoint_damages, ("eval",)),
            "checkpoints, train --resume": (killed, checkpoint_damages, resume),
        }
        for kind, (source, list_damages, words) in kinds.items():
            codes, wrong = Counter[int](), list[str]()
            for what, apply in list_damages(source):
                code, err = run_on_damaged_copy(source, apply, words)
                codes[code] += 1
                if code not in (0, 3, 4):
                    wrong.append(f"{code} {what}: {err.splitlines()[-1] if err else ''}")
            print(f"{kind}: {sum(codes.values())} damages, exit codes {dict(sorted(codes.items()))}", flush=True)
            print("\n".join(f"  {line}" for line in wrong), end="\n" if wrong else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CHOICES, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--other", type=Path)
    options = parser.parse_args()
    if options.only == "ranks":
        ranks(options.rounds, options.images)
    elif options.only in ("before", "cost"):
        {"before": before, "cost": cost}[options.only](options.rounds, options.other)
    else:
        measurements = {
            "save": save,
            "share": share,
            "supervisor": supervisor,
            "hostile": hostile_inputs,
            "damage": damages,
        }
        measurements[options.only](options.rounds)


if __name__ == "__main__":
    main()
