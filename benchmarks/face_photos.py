"""Measure faces in photos: the finder beside the package that its weights come from, embedding, and false finds.

    python benchmarks/face_photos.py speed [--rounds 7]   # photos of scripts/get_data face-photos, as 1,280 x 960
    python benchmarks/face_photos.py false FOLDER...      # pictures without faces: what is found in them

`speed` runs each side in a process of its own, as its users do, one thread each for the comparison, two for the whole
way; the sides take turns. Times are of the calls alone, without start-up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODELS, PHOTOS = ROOT / "data" / "face-models", ROOT / "data" / "face-photos"
SIDE = """
import json, sys, time
sys.path.insert(0, {root!r})
from cnnrun.base.process_settings import keep_freed_memory, limit_spinning
if {ours}:
    limit_spinning()
    keep_freed_memory()
from pathlib import Path
import numpy as np, torch
from PIL import Image
torch.set_num_threads({threads})
photos = []
for path in sorted(Path({photos!r}).iterdir()):
    photo = Image.open(path).convert("RGB")
    photos.append(photo.resize((1280, 960)))
{setup}
for photo in photos:
    call(photo)
times = []
for photo in photos:
    began = time.perf_counter()
    call(photo)
    times.append(time.perf_counter() - began)
print(json.dumps(times))
"""
FINDER = f"""
from cnnrun.results.people.cascade_weights import read_finder_file
finder = read_finder_file(Path({str(MODELS / "face-finder.safetensors")!r}), torch.device("cpu"))
def call(photo):
    finder.find(np.asarray(photo))
"""
ORIGINAL = """
from tests.support.face_data import original_cascade
cascade = original_cascade()
def call(photo):
    cascade.detect(photo, landmarks=True)
"""
WHOLE_WAY = f"""
import tempfile
from cnnrun.results.people.embeddings import IdentityOptions
network = Path({str(MODELS / "face_resnet29.safetensors")!r})
embedder = IdentityOptions(network, Path("runs"), torch.device("cpu")).open_embedder()
folder = Path(tempfile.mkdtemp())
for number, photo in enumerate(photos):
    photo.save(folder / f"{{number}}.jpg", quality=95)
photos = sorted(folder.iterdir())
def call(path):
    embedder.embed_photo(path)
"""
# name -> (set-up of `call`, whether it is ours, threads)
SIDES = {
    "cnnrun, finding": (FINDER, True, 1),
    "facenet-pytorch, detect": (ORIGINAL, False, 1),
    "cnnrun, found and embedded": (WHOLE_WAY, True, 2),
}


def measure(setup: str, is_ours: bool, threads: int) -> list[float]:
    """Seconds of each photo."""
    code = SIDE.format(root=str(ROOT), ours=is_ours, threads=threads, photos=str(PHOTOS), setup=setup)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment, cwd=ROOT
    )
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def speed(rounds: int) -> None:
    times = {name: list[float]() for name in SIDES}
    for _ in range(rounds):
        for name, side in SIDES.items():
            times[name].append(1000 * statistics.mean(measure(*side)))
    for name, values in times.items():
        spread = f"{min(values):.0f} .. {max(values):.0f}"
        print(f"{name:<30} {statistics.median(values):6.0f} ms a photo ({spread}; {SIDES[name][2]} threads)")
    ours, theirs = (statistics.median(times[name]) for name in list(SIDES)[:2])
    print(f"the package takes {theirs / ours:.2f} times as long ({rounds} rounds)")


def count_false_finds(folders: list[Path]) -> None:
    """Faces that are found in pictures without faces, and how many of them count as recognisable."""
    import torch

    from cnnrun.data.image_paths import list_images
    from cnnrun.data.image_settings import ImageSettings
    from cnnrun.results.people.alignment import FaceTemplate
    from cnnrun.results.people.cascade_weights import read_finder_file
    from cnnrun.results.people.face_photos import FaceReader

    finder = read_finder_file(MODELS / "face-finder.safetensors", torch.device("cpu"))
    reader = FaceReader(finder, FaceTemplate.default(150), ImageSettings())
    for folder in folders:
        paths = list(list_images([folder]))
        faces = [(path, face) for path in paths for face in reader.read_faces(path)]
        good = [face for _, face in faces if not face.problem]
        print(f"{folder}: {len(paths)} pictures, {len(faces)} false finds, {len(good)} of them recognisable")
        for path, face in faces:
            print(f"  {path.name}: score {face.score:.3f}, {face.problem or 'recognisable'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "false"))
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.what == "speed":
        speed(args.rounds)
    else:
        count_false_finds(args.folders)


if __name__ == "__main__":
    main()
