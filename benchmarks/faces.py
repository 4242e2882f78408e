"""Measure faces: configs/orl-faces.yaml on unseen people, with three baselines; a closed set; the speed of a gallery.

    python benchmarks/faces.py verify                 # five divisions of the people, all four methods on the same pairs
    python benchmarks/faces.py closed                 # five images per person to learn from, five to recognise
    python benchmarks/faces.py gallery                # one query in 100,000 and in 1,000,000 embeddings

`scripts/get_data orl-faces` downloads the images. `--seeds` selects the divisions; `--runs` is the runs folder.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.data.dataset import Examples
from cnnrun.experiment import assemble, config_file, open_run, schema
from cnnrun.results.people.embeddings import IdentityOptions
from cnnrun.results.people.enrolment import enroll_people
from cnnrun.results.people.gallery_file import Gallery, GalleryMaker, build_gallery
from cnnrun.results.people.identification import GallerySearch, IdentifyRequest, identify_people
from cnnrun.results.studies.train_run import train_run
from cnnrun.tasks.embedding.pair_metrics import RankedPairs, all_pairs, bootstrap_over_people
from cnnrun.tasks.intervals import bootstrap_interval

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "orl-faces.yaml"
CPU = torch.device("cpu")
Rows = NDArray[np.float32]


def unit(rows: NDArray[Any]) -> Rows:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def pixels(examples: Examples) -> NDArray[np.float64]:
    return examples.load_images(torch.arange(len(examples))).flatten(1).double().numpy()


def baselines(learned: NDArray[np.float64], tested: NDArray[np.float64]) -> dict[str, Rows]:
    """Return embeddings without a network: pixels, pixels minus the mean face, and 40 eigenfaces of the same people."""
    from sklearn.decomposition import PCA

    eigenfaces = PCA(40, random_state=0).fit(learned)
    return {
        "raw pixels": unit(tested),
        "mean-centred pixels": unit(tested - learned.mean(0)),
        "40 eigenfaces": unit(eigenfaces.transform(tested)),
    }


def equal_error(embeddings: Rows, labels: NDArray[np.int64]) -> tuple[float, float, float]:
    """Return the EER over all pairs, and the middle 95 % of a bootstrap over people."""
    pairs = all_pairs(labels)
    scores = pairs.similarities(embeddings)
    eer = RankedPairs(scores, pairs.same_M).roc_curve().eer()
    low, high = bootstrap_interval(
        eer, bootstrap_over_people(scores, pairs, labels, lambda curve: {"eer": curve.eer()})["eer"]
    )
    return eer, low, high


def train_division(config: Path, runs: Path, seed: int, *words: str) -> tuple[float, schema.Experiment, Any]:
    """Train one division; returns the seconds, decoding and evaluation included, and the opened run."""
    experiment = config_file.read_config(config, [f"seed={seed}", *words])
    began = time.perf_counter()
    run = train_run(experiment, runs, CPU, resume=True)["run"]
    return time.perf_counter() - began, *open_run.open_trained(Path(run), runs, CPU)


def verify(seeds: range, runs: Path, words: list[str]) -> None:
    rows_by_method: dict[str, list[tuple[float, float, float]]] = {}
    for seed in seeds:
        seconds, experiment, trained = train_division(CONFIG, runs, seed, f"data.split.seed={seed}", *words)
        data = assemble.prepare_dataset(experiment)
        test = data.splits["test"]
        images, labels = test.load_images(torch.arange(len(test))).float(), test.targets["labels"].numpy()
        # The baselines learn from everybody outside test, also from val, which the network uses only to choose.
        known = np.concatenate([pixels(data.splits[name]) for name in ("train", "val")])
        methods = {"cnnrun": trained.results(images)["embedding"].numpy(), **baselines(known, pixels(test))}
        print(f"division {seed}: {seconds:.0f} s of training, step {trained.step}")
        for name, embeddings in methods.items():
            row = equal_error(embeddings, labels)
            rows_by_method.setdefault(name, []).append(row)
            print(f"  {name:<20} EER {row[0]:.4f}  (95 % of bootstraps over people: {row[1]:.4f} .. {row[2]:.4f})")
    for name, rows in rows_by_method.items():
        values = [row[0] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        mean = [statistics.mean(column) for column in zip(*rows, strict=True)]
        mean_eer = f"mean EER {mean[0]:.4f} +- {spread:.4f} (n = {len(values)})"
        print(f"{name:<20} {mean_eer}; mean ends of the intervals: {mean[1]:.4f} .. {mean[2]:.4f}")


def link_division(seed: int, folder: Path) -> Path:
    """Link the images: of each person five to learn from and five to recognise, drawn with the seed.

    Nothing is chosen here, so val contains the training images again and the last checkpoint counts.
    """
    draw = np.random.default_rng(seed)
    for person in sorted((ROOT / "data" / "orl-faces").iterdir()):
        for place, number in enumerate((draw.permutation(10) + 1).tolist()):
            for part in ("train", "val") if place < 5 else ("test",):
                link = folder / part / person.name / f"{number}.pgm"
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.hardlink_to(person / link.name)
    return folder


def closed(seeds: range, runs: Path, words: list[str]) -> None:
    rates, times = [], []
    for seed in seeds:
        folder = link_division(seed, runs / f"closed-{seed}")
        more = [f"data.source.folder={folder}", "data.split={by: image}", "data.leakage=keep", "train.epochs=150"]
        seconds, _, trained = train_division(CONFIG, runs, seed, f"name=closed-{seed}", *more, *words)
        path = folder / "gallery.safetensors"
        path.unlink(missing_ok=True)
        last = trained.run / "checkpoints" / "latest"
        options = IdentityOptions(last, runs, CPU, threshold=-1.0)
        enroll_people(options, folder / "train", path, False, [], 64)
        rows = list(identify_people(options, IdentifyRequest([folder / "test"], path, GallerySearch(1, "exact")), 64))
        right = sum(row.to_json()["person"] == row.path.parent.name for row in rows)
        rates.append(right / len(rows))
        times.append(seconds)
        print(f"division {seed}: {right} of {len(rows)} right, {seconds:.0f} s of training", flush=True)
    spread = statistics.stdev(rates) if len(rates) > 1 else 0.0
    print(f"rank-1 {statistics.mean(rates):.4f} +- {spread:.4f} (n = {len(rates)}), {max(times):.0f} s at most")


def queries(counts: list[int], dimension: int, rounds: int) -> None:
    draw = np.random.default_rng(0)
    for count in counts:
        gallery = build_gallery(GalleryMaker("0" * 64), {"all": unit(draw.normal(size=(count, dimension)))})
        people = np.sort(draw.integers(0, count // 5, count))
        names, person = np.unique(people, return_inverse=True)
        gallery = Gallery(gallery.maker, tuple(map(str, names)), gallery.embeddings_ND, person)
        for search in ("exact", "faiss"):
            times = []
            for _ in range(rounds):
                _ = gallery.faiss_index if search == "faiss" else None  # built once
                query = unit(draw.normal(size=(1, dimension)))
                began = time.perf_counter()
                gallery.most_similar(query, 3, search)  # type: ignore[arg-type]
                times.append(1000 * (time.perf_counter() - began))
            spread = f"{min(times):.1f} .. {max(times):.1f}"
            print(
                f"{count:,} embeddings of {dimension}, {search}: {statistics.median(times):.1f} ms a query ({spread})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("verify", "closed", "gallery"))
    parser.add_argument("words", nargs="*", help="key.path=value")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--dimension", type=int, default=128)
    options = parser.parse_args()
    if options.what == "gallery":
        queries([100_000, 1_000_000], options.dimension, 31)
    else:
        {"verify": verify, "closed": closed}[options.what](range(options.seeds), options.runs, options.words)


if __name__ == "__main__":
    main()
