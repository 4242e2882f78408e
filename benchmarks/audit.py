"""Count how many planted duplicates the audit finds, and its false alarms.

    python benchmarks/audit.py [--idx data/fashion-mnist] [--folder IMAGES] [--seed 0]

Duplicates of distinct images are planted, 200 of each kind: copies of a file, the same pixels in another format,
re-encoded as JPEG (quality 60 to 95), resized (to 0.5 to 2 times, three filters), resized and re-encoded. The distinct
images are 5,000 of Fashion-MNIST's test split (the thresholds were chosen on its training split), or those of a folder.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from cnnrun.data.sources.idx import Idx
from cnnrun.experiment import config_file
from cnnrun.experiment.data_check import check_data

PLANTED = 200
FILTERS = [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS]


def encode_jpeg(image: Image.Image, rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(60, 96)))
    return buffer.getvalue()


def resize_randomly(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    factor = rng.uniform(0.5, 2)
    size = (max(8, round(image.width * factor)), max(8, round(image.height * factor)))
    return image.resize(size, FILTERS[rng.integers(3)])


def plant(distinct: list[Image.Image], folder: Path, rng: np.random.Generator) -> None:
    """Write the distinct images to train/ and the planted ones to val/, named after the kind and the source image."""
    for part in ("train", "val"):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True)
    files = [folder / "train" / "ab"[i % 2] / f"{i}.png" for i in range(len(distinct))]
    for image, path in zip(distinct, files, strict=True):
        image.save(path)
    chosen = rng.permutation(len(distinct))[: 5 * PLANTED].reshape(5, PLANTED)
    for kind, numbers in zip(("bytes", "pixels", "encoded", "resized", "both"), chosen, strict=True):
        for i in map(int, numbers):
            stem = folder / "val" / "ab"[i % 2] / f"{kind}-{i}"
            if kind == "bytes":
                stem.with_suffix(".png").write_bytes(files[i].read_bytes())
            elif kind == "pixels":
                distinct[i].save(stem.with_suffix(".bmp"))
            elif kind == "encoded":
                stem.with_suffix(".jpg").write_bytes(encode_jpeg(distinct[i], rng))
            elif kind == "resized":
                resize_randomly(distinct[i], rng).save(stem.with_suffix(".png"))
            else:
                stem.with_suffix(".jpg").write_bytes(encode_jpeg(resize_randomly(distinct[i], rng), rng))


def count_findings(report: dict) -> dict[str, int]:
    """Return how many planted images of each kind were found, and how many distinct images were wrongly paired."""
    hits: dict[str, set[str]] = {}
    false_alarms: set[str] = set()
    for finding in report["findings"]:
        if "same picture" not in finding["what"]:
            continue
        for names in finding["examples"]:
            stems = [Path(name.rpartition(" (")[0]).stem for name in names]
            planted = [stem for stem in stems if "-" in stem]
            for stem in planted:
                if stem.split("-")[1] in stems:
                    hits.setdefault(stem.split("-")[0], set()).add(stem)
            sources = {stem.split("-")[-1] for stem in stems}
            if len(sources) > 1:
                false_alarms |= {stem for stem in stems if "-" not in stem}
    return {kind: len(stems) for kind, stems in hits.items()} | {"false alarms": len(false_alarms)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idx", type=Path, default=Path("data/fashion-mnist"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    if args.folder:
        paths = sorted(path for path in args.folder.rglob("*") if path.suffix in (".jpg", ".png"))[:5000]
        distinct = [Image.open(path).convert("RGB") for path in paths]
    else:
        pixels = Idx(root=str(args.idx)).read().splits["test"].images[:5000]
        distinct = [Image.fromarray(image[:, :, 0]) for image in pixels]
    from cnnrun.data import audit

    audit.MAX_EXAMPLES = 10**9  # so that all can be counted
    with tempfile.TemporaryDirectory() as work:
        plant(distinct, Path(work), rng)
        text = (
            f"task: classify\ndata: {{source: {{folder: {work}}}, image: {{size: 32, channels: 1}}}}\nmodel: [flatten]"
        )
        report = check_data(config_file.parse_config(text, "audit", [f"data.cache_dir={work}/cache"]), None, None)
        print(json.dumps({"distinct": len(distinct), "planted of each": PLANTED} | count_findings(report)))


if __name__ == "__main__":
    main()
