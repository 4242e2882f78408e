"""Measure faces: unseen people by several methods; a closed set; the speed of a gallery.

    python benchmarks/faces.py verify                 # five divisions of the people, all methods on the same pairs
    python benchmarks/faces.py closed                 # five images per person to learn from, five to recognise
    python benchmarks/faces.py published              # dlib's network without training: all pairs, and the closed set
    python benchmarks/faces.py gallery                # one query in 100,000 and in 1,000,000 embeddings

`scripts/get_data orl-faces` downloads the images, `scripts/get_data face-models` the published networks; the aligned
faces are made by `cnnrun faces data/orl-faces --out data/orl-aligned --enlarge 3 --margin 0.5 --largest`. `--seeds`
selects the divisions; `--runs` is the runs folder.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cnnrun.base.similarity import COSINE, EUCLIDEAN, SIMILARITIES, Similarity
from cnnrun.data.dataset import Examples
from cnnrun.experiment import assemble, config_file, open_run, schema
from cnnrun.results.people.embeddings import IdentityOptions, PhotoOptions
from cnnrun.results.people.enrolment import enroll_people
from cnnrun.results.people.gallery_file import Gallery, GalleryMaker, build_gallery
from cnnrun.results.people.identification import GallerySearch, IdentifyRequest, identify_people
from cnnrun.results.studies.train_run import train_run
from cnnrun.tasks.embedding.pair_metrics import RankedPairs, all_pairs, bootstrap_over_people
from cnnrun.tasks.intervals import bootstrap_interval

ROOT = Path(__file__).parents[1]
CONFIG, TRANSFER = ROOT / "configs" / "orl-faces.yaml", ROOT / "configs" / "orl-faces-transfer.yaml"
EMBEDDER = ROOT / "data" / "face-models" / "face_resnet29.safetensors"
FACES, ALIGNED_FACES = ROOT / "data" / "orl-faces", ROOT / "data" / "orl-aligned"
ALIGNED = [f"data.source.folder={ALIGNED_FACES}", "data.image.size=[56, 56]"]
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


def equal_error(
    embeddings: Rows, labels: NDArray[np.int64], similarity: Similarity = COSINE
) -> tuple[float, float, float]:
    """Return the EER over all pairs, and the middle 95 % of a bootstrap over people."""
    pairs = all_pairs(labels)
    scores = pairs.similarities(embeddings, similarity)
    eer = RankedPairs(scores, pairs.same_M, similarity.largest).roc_curve().eer()
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


def published_embeddings(images: torch.Tensor) -> Rows:
    """Embeddings by dlib's face network, of aligned faces: no training here."""
    trained = open_run.open_network(EMBEDDER, Path(), CPU)
    return np.concatenate([trained.results(part)["embedding"].numpy() for part in images.split(50)])


def embed_test(trained: Any, experiment: schema.Experiment) -> tuple[Rows, NDArray[np.int64], Any]:
    """Embeddings and labels of the test people, and the data."""
    data = assemble.prepare_dataset(experiment)
    test = data.splits["test"]
    images = test.load_images(torch.arange(len(test))).float()
    embeddings = np.concatenate([trained.results(part)["embedding"].numpy() for part in images.split(50)])
    return embeddings, test.targets["labels"].numpy(), data


def measure_division(seed: int, runs: Path, words: list[str]) -> dict[str, tuple[Rows, NDArray[np.int64], Similarity]]:
    """Embeddings of one division's test people by each method, with their labels and how they are compared."""
    methods = {}
    for name, config, more in (
        ("from scratch, as in the file", CONFIG, []),
        ("from scratch, aligned", CONFIG, [*ALIGNED, "name=orl-aligned"]),
        ("from scratch, aligned, mirror", CONFIG, [*ALIGNED, "name=orl-mirror", "task.verify.mirror=true"]),
        ("transfer", TRANSFER, []),
    ):
        seconds, experiment, trained = train_division(config, runs, seed, f"data.split.seed={seed}", *more, *words)
        embeddings, labels, data = embed_test(trained, experiment)
        print(f"division {seed}, {name}: {seconds:.0f} s of training, step {trained.step}", flush=True)
        methods[name] = embeddings, labels, COSINE
        if config == CONFIG and not more:
            # The baselines learn from everybody outside test, also from val, which the network uses only to choose.
            known = np.concatenate([pixels(data.splits[part]) for part in ("train", "val")])
            found = baselines(known, pixels(data.splits["test"]))
            methods |= {baseline: (rows, labels, COSINE) for baseline, rows in found.items()}
    test = data.splits["test"]  # the transfer's: aligned faces of 150 pixels
    images = test.load_images(torch.arange(len(test))).float()
    return methods | {"published network": (published_embeddings(images), labels, EUCLIDEAN)}


def verify(seeds: range, runs: Path, words: list[str]) -> None:
    rows_by_method: dict[str, list[tuple[float, float, float]]] = {}
    for seed in seeds:
        for name, (embeddings, labels, similarity) in measure_division(seed, runs, words).items():
            row = equal_error(embeddings, labels, similarity)
            rows_by_method.setdefault(name, []).append(row)
            print(f"  {name:<30} EER {row[0]:.4f}  (95 % of bootstraps over people: {row[1]:.4f} .. {row[2]:.4f})")
    for name, rows in rows_by_method.items():
        values = [row[0] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        mean = [statistics.mean(column) for column in zip(*rows, strict=True)]
        mean_eer = f"mean EER {mean[0]:.4f} +- {spread:.4f} (n = {len(values)})"
        print(f"{name:<30} {mean_eer}; mean ends of the intervals: {mean[1]:.4f} .. {mean[2]:.4f}")


def all_people() -> None:
    """Measure the published network on all pairs of all 40 people: nothing is trained or chosen on them."""
    files = sorted(ALIGNED_FACES.glob("*/*.png"))
    images = torch.stack([torch.from_numpy(np.asarray(Image.open(file))).permute(2, 0, 1) for file in files]).float()
    labels = np.unique([file.parent.name for file in files], return_inverse=True)[1]
    eer, low, high = equal_error(published_embeddings(images), labels, EUCLIDEAN)
    print(f"published network, {len(files)} images: EER {eer:.4f} (bootstraps over people: {low:.4f} .. {high:.4f})")


def identify_published(seeds: range, runs: Path) -> None:
    """Closed set by the published network: five images of each person are enrolled, the others identified."""
    for seed in seeds:
        folder, began = link_division(seed, runs / f"published-{seed}", ALIGNED_FACES), time.perf_counter()
        path = folder / "gallery.safetensors"
        path.unlink(missing_ok=True)
        options = IdentityOptions(EMBEDDER, runs, CPU, threshold=100.0, photos=PhotoOptions(find=False))
        enroll_people(options, folder / "train", path, False, [], 64)
        request = IdentifyRequest([folder / "test"], path, GallerySearch(1, "exact"))
        rows = list(identify_people(options, request, 64))
        right = sum(row.to_json()["person"] == row.path.parent.name for row in rows)
        print(f"division {seed}: {right} of {len(rows)} right, {time.perf_counter() - began:.1f} s", flush=True)


def link_division(seed: int, folder: Path, faces: Path = FACES) -> Path:
    """Link the images: of each person five to learn from and five to recognise, drawn with the seed.

    Nothing is chosen here, so val contains the training images again and the last checkpoint counts.
    """
    draw, suffix = np.random.default_rng(seed), ".pgm" if faces == FACES else ".png"
    for person in sorted(path for path in faces.iterdir() if path.is_dir()):
        for place, number in enumerate((draw.permutation(10) + 1).tolist()):
            for part in ("train", "val") if place < 5 else ("test",):
                link = folder / part / person.name / f"{number}{suffix}"
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
    for count, kind in itertools.product(counts, SIMILARITIES):
        maker = GalleryMaker("0" * 64, similarity=kind)
        gallery = build_gallery(maker, {"all": unit(draw.normal(size=(count, dimension)))})
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
                f"{count:,} embeddings of {dimension}, {kind}, {search}: "
                f"{statistics.median(times):.1f} ms a query ({spread})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("verify", "closed", "published", "gallery"))
    parser.add_argument("words", nargs="*", help="key.path=value")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--dimension", type=int, default=128)
    options = parser.parse_args()
    if options.what == "gallery":
        queries([100_000, 1_000_000], options.dimension, 31)
    elif options.what == "published":
        all_people()
        identify_published(range(options.seeds), options.runs)
    else:
        {"verify": verify, "closed": closed}[options.what](range(options.seeds), options.runs, options.words)


if __name__ == "__main__":
    main()
