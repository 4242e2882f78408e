"""Compare training speed, start-up and memory with plain PyTorch loops, interleaved in one run.

    python benchmarks/speed.py --baselines ../shared/bench --idx data/fashion-mnist [--rounds 3] [--json FILE]

`--baselines` holds plain.py (the tutorial loop over an image folder), lightning_job.py and limit.py (the bare ceiling:
forward, backward, step on tensors in memory). The peers Lightning and timm run where they are installed,
the others are named. Every round runs all sides of a network one after the other; medians over the rounds
are printed with ratios. `--skip SIDE` leaves a side out. `--only tutorial` compares the time to what three epochs of
the tutorial loop reach. `--only busy` measures the training while N (`--beside`) other processes compute in two threads
each, for some lengths of OpenMP's spinning.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from cnnrun.data.sources.idx import Idx

NETS = {"lenet": 12_800, "vgg-small": 3_840, "resnet18": 768}  # training images, for epochs of some seconds on 2 cores
HERE = Path(__file__).resolve().parent
NETS_DIR = HERE / "nets"
PEERS = {"Lightning": "pytorch_lightning", "timm": "timm"}  # name -> package
CHECK = """
import sys
from cnnrun.commands.app import main
sys.argv = ["cnnrun", "check", sys.argv[1]]
try:
    main()
except SystemExit:
    pass
"""
# The ceiling script in bfloat16, with freed memory kept: what a step could reach with everything that cnnrun knows.
FAST_CEILING = """
import runpy, sys
from cnnrun.base.process_settings import keep_freed_memory
keep_freed_memory()
import torch
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
    runpy.run_path(sys.argv[0])
"""
COMPETITOR = """
import torch
torch.set_num_threads(2)
a = torch.randn(1024, 1024)
while True:
    a @ a
"""
FIRST_STEP = """
import os, sys
import cnnrun.commands.app
from cnnrun.training.learner import Learner
update_weights = Learner.update_weights
def update_once(*arguments):
    update_weights(*arguments)
    os._exit(0)
Learner.update_weights = update_once
sys.argv = ["cnnrun", "train", *sys.argv[1:]]
cnnrun.commands.app.main()
"""


def run(command: list[str], cwd: Path) -> tuple[str, float, float]:
    """Run a command; returns its output, wall seconds and peak resident MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} left with {status}:\n{out[-2000:]}")
    return out, time.perf_counter() - start, usage.ru_maxrss / 1024


def write_images(idx: Path, folder: Path, count: int, val_count: int = 256) -> Path:
    """Write a folder of PNG files once: `count` for training and `val_count` for validation."""
    from PIL import Image

    if folder.exists():
        return folder
    split = Idx(root=str(idx)).read().splits["train"]
    for part, numbers in (("train", range(count)), ("val", range(count, count + val_count))):
        for number in numbers:
            place = folder / part / str(int(split.targets["labels"][number]))
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.images[number, :, :, 0]).save(place / f"{number}.png")
    return folder


def last_speed(out: str, pattern: str) -> float:
    return float(re.findall(pattern, out)[-1].replace(",", ""))


def installed_peers() -> list[str]:
    return [name for name, package in PEERS.items() if find_spec(package)]


def sides(net: str, folder: Path, baselines: Path, work: Path) -> dict[str, tuple[list[str], str]]:
    """Return name -> (command, pattern of its images/s)."""
    python = sys.executable
    ours = [python, "-m", "cnnrun", "train", f"{NETS_DIR / net}.yaml", f"data.source.folder.root={folder}", "--json"]
    limit = [python, str(baselines / "limit.py"), net, str(NETS[net])]
    plain = [python, str(baselines / "plain.py"), net, "2", str(folder)]
    ours += ["--runs", str(work / "runs")]
    peers = {
        "Lightning": [python, str(baselines / "lightning_job.py")],
        "timm": [python, str(HERE / "timm_job.py"), str(baselines)],
    }
    train = r"train (\d+) img/s"
    return {
        "cnnrun": (ours, r'"images_per_second": ([\d.]+)'),
        "cnnrun, float32": ([*ours, "train.precision=float32"], r'"images_per_second": ([\d.]+)'),
        "plain, 2 workers": ([*plain, "2"], train),
        "plain, 0 workers": ([*plain, "0"], train),
        **{
            f"{name}, {workers} workers": ([*peers[name], net, "2", str(folder), workers], train)
            for name in installed_peers()
            for workers in ("2", "0")
        },
        "ceiling, eager": (limit, r"limit \S+ (\d+) img/s"),
        "ceiling, bfloat16": ([python, "-c", FAST_CEILING, *limit[1:]], r"limit \S+ (\d+) img/s"),
        "ceiling, compiled": ([*limit, "compile"], r"limit \S+ (\d+) img/s"),
    }


def speed(args: argparse.Namespace, work: Path) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for net in args.nets:
        folder = write_images(args.idx, work / f"pictures-{NETS[net]}", NETS[net])
        found[net] = {}
        for number in range(args.rounds):
            for name, (command, pattern) in sides(net, folder, args.baselines, work).items():
                if name in args.skip:
                    continue
                out, _, _ = run(command, work)
                found[net].setdefault(name, []).append(last_speed(out, pattern))
                print(f"  {net} round {number + 1} {name}: {found[net][name][-1]:,.0f}", flush=True)
    return found


def busy(args: argparse.Namespace, work: Path) -> dict[str, list[float]]:
    """Return training images/s of lenet beside other processes, for values of GOMP_SPINCOUNT, and in one thread."""
    folder = write_images(args.idx, work / f"pictures-{NETS['lenet']}", NETS["lenet"])
    command, pattern = sides("lenet", folder, args.baselines, work)["cnnrun"]
    settings = {f"GOMP_SPINCOUNT={spins}": [f"GOMP_SPINCOUNT={spins}"] for spins in args.spins}
    settings |= {"cnnrun": [], "cnnrun, OMP_NUM_THREADS=1": ["OMP_NUM_THREADS=1"]}
    found: dict[str, list[float]] = {name: [] for name in settings}
    others = [subprocess.Popen([sys.executable, "-c", COMPETITOR]) for _ in range(args.beside)]
    try:
        for number in range(args.rounds):
            for name, setting in settings.items():
                out, _, _ = run(["env", *setting, *command], work)
                found[name].append(last_speed(out, pattern))
                print(f"  round {number + 1} {name}: {found[name][-1]:,.0f}", flush=True)
    finally:
        for other in others:
            other.kill()
    return found


def start_up(args: argparse.Namespace, work: Path) -> dict[str, list[float]]:
    """Return seconds of imports, --help, a bad config, and the first training step on the full Fashion-MNIST."""
    bad = work / "bad.yaml"
    bad.write_text("task: classify\ndata: {source: digits}\nmodel: [{convv: 3}]\n")
    python = sys.executable
    first = [python, "-c", FIRST_STEP, f"{NETS_DIR / 'lenet'}.yaml", f"data.source={{idx: {args.idx}}}"]
    commands = {
        "import torch": [python, "-c", "import torch"],
        "import torch, torchvision": [python, "-c", "import torch, torchvision"],
        "cnnrun --help": [python, "-m", "cnnrun", "--help"],
        "cnnrun check of a bad file": [python, "-c", CHECK, str(bad)],
        "first step of cnnrun train": [*first, "--runs", str(work / "runs")],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.rounds + 2):
        for name, command in commands.items():
            seconds[name].append(run(command, work)[1])
    return seconds


def memory(args: argparse.Namespace, work: Path) -> dict[str, list[float]]:
    """Return peak MiB of the ceiling script on 60,000 images and of one Fashion-MNIST epoch. Takes minutes."""
    peaks: dict[str, list[float]] = {}
    for net in ("lenet", "vgg-small"):
        ours = ["train", f"{NETS_DIR / net}.yaml", f"data.source={{idx: {args.idx}}}", "train.epochs=1"]
        commands = {
            f"cnnrun {net}": [sys.executable, "-m", "cnnrun", *ours, "--runs", str(work / "runs")],
            f"ceiling {net}": [sys.executable, str(args.baselines / "limit.py"), net, "60000"],
        }
        for name, command in commands.items():
            peaks[name] = [run(command, work)[2]]
    return peaks


def tutorial(args: argparse.Namespace, work: Path) -> None:
    """Print what three epochs of the tutorial loop reach, and in which time cnnrun reaches it: whole processes."""
    folder = write_images(args.idx, work / "tutorial", 55_000, 5_000)
    python = sys.executable
    for _ in range(args.rounds):
        out, seconds, _ = run([python, str(args.baselines / "plain.py"), "vgg-small", "3", str(folder), "2"], work)
        print(f"  plain, 3 epochs: accuracy {re.findall(r'acc ([0-9.]+)', out)[-1]} after {seconds:.1f} s", flush=True)
        for epochs in (1, 2, 3):
            ours = ["train", f"{NETS_DIR / 'vgg-small'}.yaml", f"data.source.folder.root={folder}", "--json"]
            runs = [
                "--runs",
                str(work / f"runs-{epochs}"),
                f"train.epochs={epochs}",
                "train.monitor=val/accuracy",
                "--no-report",
            ]
            out, seconds, _ = run([python, "-m", "cnnrun", *ours, *runs], work)
            reached = json.loads(out.strip().splitlines()[-1])
            print(f"  cnnrun, {epochs} epochs: {reached['best']} after {seconds:.1f} s", flush=True)


def show(title: str, table: dict[str, list[float]], base: str, *, higher_is_better: bool = False) -> None:
    print(f"\n{title}")
    middle = {name: statistics.median(values) for name, values in table.items()}
    for name, values in table.items():
        ratio = middle[base] / middle[name] if higher_is_better else middle[name] / middle[base]
        print(
            f"  {name:<28} median {middle[name]:>10,.2f}  ({min(values):,.2f} .. {max(values):,.2f})  ratio {ratio:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baselines", type=Path, required=True)
    parser.add_argument("--idx", type=Path, default=Path("data/fashion-mnist"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nets", nargs="*", default=list(NETS))
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--only", choices=["speed", "start", "memory", "busy", "tutorial"])
    parser.add_argument(
        "--beside", type=int, default=1, help="competing processes of `--only busy`; 0 is an idle machine"
    )
    parser.add_argument("--spins", nargs="*", default=["300000"], help="of `--only busy`; OpenMP's own is 300000")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.baselines, args.idx = args.baselines.resolve(), args.idx.resolve()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {args.rounds} rounds, interleaved")
    if missing := PEERS.keys() - installed_peers():
        print(f"not installed, so left out: {', '.join(sorted(missing))}")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        results: dict[str, Any] = {}
        if args.only in (None, "start"):
            results["start"] = start_up(args, work)
            show("seconds, ratio to import torch", results["start"], "import torch")
            show("seconds, ratio to import torch, torchvision", results["start"], "import torch, torchvision")
        if args.only in (None, "memory"):
            results["memory"] = memory(args, work)
            show("peak MiB, ratio to the lenet ceiling", results["memory"], "ceiling lenet")
        if args.only == "tutorial":
            tutorial(args, work)
        if args.only == "busy":
            results["busy"] = busy(args, work)
            show(f"images/s beside {args.beside}; ratio to cnnrun", results["busy"], "cnnrun")
        if args.only in (None, "speed"):
            results["speed"] = speed(args, work)
            for net, table in results["speed"].items():
                show(f"{net}: training images/s; ratio = cnnrun / side", table, "cnnrun", higher_is_better=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
