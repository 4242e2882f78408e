"""Compare `cnnrun predict` on photo files with a plain loop and with another commit, interleaved in one run.

    python benchmarks/predict.py [--photos 512] [--rounds 5] [--other DIR]

The network is mobilenet_v2 at 224 x 224; the photos are JPEGs of 500 x 375. `--other` is a worktree of another commit.
Every side is a process of its own that opens the network, predicts every file once to warm up the disk's cache, and
then times a second pass. plain: Image.open, resize, stack, network in float32 under inference_mode, batches of 64, by a
DataLoader with 0 or 2 workers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from photo_files import write_photos

CONFIG = """
name: photos
task: classify
data: {{source: {{folder: {folder}}}, image: {{size: 224, channels: 3}}, split: {{val: 0.2}}, leakage: keep}}
model: mobilenet_v2
train: {{epochs: 1, batch: 8, precision: float32}}
"""
OURS = """
import json, sys, time
from pathlib import Path
try:
    from cnnrun.base.process_settings import keep_freed_memory, limit_spinning
    limit_spinning(); keep_freed_memory()
except ImportError:
    pass
import torch
from cnnrun.experiment.open_run import open_network
from cnnrun.results.predict import predict_files
photos, run, *options = sys.argv[1:]
trained = open_network(Path(run), Path("runs"), torch.device("cpu"))
paths = sorted(Path(photos).rglob("*.jpg"))
more = {"fast": True} if "fast" in options else {}
for _ in range(2):
    start = time.perf_counter()
    answers = [predicted.prediction.to_json()["label"] for predicted in predict_files(trained, paths, 64, **more)]
    seconds = time.perf_counter() - start
print(json.dumps({"images_per_second": len(paths) / seconds, "answers": answers}))
"""
PLAIN = """
import json, sys, time
from pathlib import Path
import numpy as np, torch, torchvision
from PIL import Image
photos, workers = sys.argv[1:]
paths = sorted(Path(photos).rglob("*.jpg"))
class Photos(torch.utils.data.Dataset):
    def __len__(self):
        return len(paths)
    def __getitem__(self, index):
        image = Image.open(paths[index]).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
network = torchvision.models.mobilenet_v2(num_classes=2).eval()
loader = torch.utils.data.DataLoader(Photos(), 64, num_workers=int(workers))
with torch.inference_mode():
    for _ in range(2):
        start = time.perf_counter()
        answers = [int(label) for images in loader for label in network(images).argmax(1)]
        seconds = time.perf_counter() - start
print(json.dumps({"images_per_second": len(paths) / seconds, "answers": answers}))
"""


def run_side(tree: Path, script: str, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-c", script, *arguments]  # `-c` looks into the working directory first
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--other", type=Path)
    args = parser.parse_args()
    here = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_photos(work / "few", 40, (375, 500), (1500, 2000))
        write_photos(work / "photos", args.photos, (375, 500), (1500, 2000))
        (work / "c.yaml").write_text(CONFIG.format(folder=work / "few"))
        train = [sys.executable, "-m", "cnnrun", "train", "c.yaml", "--runs", str(work / "runs")]
        subprocess.run(train, cwd=work, env=os.environ | {"PYTHONPATH": str(here)}, check=True, capture_output=True)
        photos, run = str(work / "photos"), str(work / "runs" / "photos" / "1")
        sides = {
            "cnnrun": (here, OURS, [photos, run]),
            "cnnrun --fast": (here, OURS, [photos, run, "fast"]),
            **({"other commit": (args.other.resolve(), OURS, [photos, run])} if args.other else {}),
            "plain, 0 workers": (here, PLAIN, [photos, "0"]),
            "plain, 2 workers": (here, PLAIN, [photos, "2"]),
        }
        speeds: dict[str, list[float]] = {side: [] for side in sides}
        answers = {}
        for number in range(args.rounds):
            for side, arguments in sides.items():
                result = run_side(*arguments)
                speeds[side].append(result["images_per_second"])
                answers[side] = result["answers"]
                print(f"  round {number + 1} {side}: {speeds[side][-1]:.1f}", flush=True)
    ours = statistics.median(speeds["cnnrun"])
    for side, values in speeds.items():
        median, spread = statistics.median(values), f"{min(values):.1f} .. {max(values):.1f}"
        print(f"{side:<18} {median:7.1f} images/s ({spread})  cnnrun / side {ours / median:.2f}")
    changed = sum(a != b for a, b in zip(answers["cnnrun"], answers["cnnrun --fast"], strict=True))
    print(f"--fast changes {changed} of {args.photos} answers")


if __name__ == "__main__":
    main()
