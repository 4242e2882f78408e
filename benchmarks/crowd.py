"""Measure what one crowded image costs: 4,000 images of ten boxes, one with 3,000. Results: benchmarks/README.md.

python benchmarks/crowd.py [--other DIR]     memory of the targets and of reading the source; also for another checkout
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGES, BOXES, CROWD = 4000, 10, 3000
# Runs in both checkouts.
SIDE = """
import importlib, sys, torch
def first_of(*places):
    # The first of several module:name that this checkout has; names differ between commits.
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"none of {places}")
Coco = first_of("cnnrun.data.sources.coco:Coco", "cnnrun.sources.coco:Coco", "cnnrun.sources.boxes:Coco")
reset_peak_memory = first_of("cnnrun.base.device:reset_peak_memory", "cnnrun.device:forget_peak_memory")
peak_memory_mib = first_of("cnnrun.base.device:peak_memory_mib", "cnnrun.device:peak_memory_mib")
cpu = torch.device("cpu")
reset_peak_memory(cpu)
before = peak_memory_mib(cpu)
split = Coco(train=sys.argv[1]).read().splits["train"]
tensors = [*split.targets.values()]
if getattr(split, "objects", None) is not None:
    tensors += [*split.objects.columns.values(), split.objects.offsets_N1]
print(sum(tensor.nbytes for tensor in tensors) / 2**20, peak_memory_mib(cpu) - before)
"""


def write_coco(path: Path) -> Path:
    """Write a COCO file of such images; the image files are not needed to read it."""
    images = [{"id": n, "file_name": f"{n}.png", "width": 640, "height": 480} for n in range(IMAGES)]
    counts = [CROWD if n == 7 else BOXES for n in range(IMAGES)]
    places = [(n, k) for n, count in enumerate(counts) for k in range(count)]
    boxes = [
        {"id": number, "image_id": n, "category_id": 1, "bbox": [k % 600, k // 600, 20, 20]}
        for number, (n, k) in enumerate(places)
    ]
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "person"}]}))
    return path


def main() -> None:
    """Print MiB of the targets and the growth of the process's peak for each checkout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--other", type=Path, help="another checkout to compare with")
    other = parser.parse_args().other
    here = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        path = write_coco(Path(folder) / "train.json")
        for side in [checkout for checkout in (other, here) if checkout]:
            environment = os.environ | {"PYTHONPATH": str(side), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-c", SIDE, str(path)]
            done = subprocess.run(command, env=environment, cwd=side, capture_output=True, text=True, check=True)
            size, peak = map(float, done.stdout.split())
            print(f"{side}: targets {size:.1f} MiB, peak while reading grew by {peak:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
