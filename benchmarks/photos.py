"""Compare the first epoch over photos of 12 megapixels with a DataLoader, and with another commit, interleaved.

    python benchmarks/photos.py [--photos 200] [--rounds 3] [--other DIR]

Whole processes: `cnnrun train` for one epoch with an empty cache, and a plain loop (ImageFolder, Resize, DataLoader
with 2 workers) that trains the same small network for one epoch. Peak memory is that of the process without its
workers. Photos are written to a temporary folder, 3 MB each.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from photo_files import write_photos

CONFIG = """
name: photos
task: classify
data: {{source: {{folder: {folder}}}, image: {{size: 224, channels: 3}}, split: {{val: 0.1}}, cache_dir: {cache}}}
model:
  - conv: {{out_channels: 8, stride: 4, activation: relu}}
  - conv: {{out_channels: 16, stride: 2, activation: relu}}
  - global_avg_pool
train: {{epochs: 1, batch: 32}}
"""
PLAIN = """
import sys, torch
from torch import nn
from torchvision import datasets, transforms
photos = datasets.ImageFolder(sys.argv[1], transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()]))
network = nn.Sequential(
    nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2),
)
optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
for images, labels in torch.utils.data.DataLoader(photos, 32, shuffle=True, num_workers=2):
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
"""


def run(command: list[str], tree: Path, cwd: Path) -> tuple[float, float]:
    """Run a command; returns wall seconds and peak resident MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(tree)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    errors = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} left with {status}:\n{errors.decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--other", type=Path)
    args = parser.parse_args()
    here = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_photos(work / "photos", args.photos, (3000, 4000), (3400, 4400))
        (work / "c.yaml").write_text(CONFIG.format(folder=work / "photos", cache=work / "cache"))
        train = [sys.executable, "-m", "cnnrun", "train", "c.yaml", "--runs", str(work / "runs")]
        sides = {
            "cnnrun": (train, here),
            **({"other commit": (train, args.other.resolve())} if args.other else {}),
            "plain, 2 workers": ([sys.executable, "-c", PLAIN, str(work / "photos")], here),
        }
        measured: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for number in range(args.rounds):
            for side, (command, tree) in sides.items():
                shutil.rmtree(work / "cache", ignore_errors=True)
                measured[side].append(run(command, tree, work))
                print(f"  round {number + 1} {side}: {measured[side][-1][0]:.1f} s", flush=True)
    ours = statistics.median(seconds for seconds, _ in measured["cnnrun"])
    for side, values in measured.items():
        seconds, peaks = zip(*values, strict=True)
        middle = statistics.median(seconds)
        spread = f"{min(seconds):.1f} .. {max(seconds):.1f}"
        print(f"{side:<18} {middle:6.1f} s ({spread}), {max(peaks):,.0f} MiB; side / cnnrun {middle / ours:.2f}")


if __name__ == "__main__":
    main()
