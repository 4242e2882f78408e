"""Functions behind the commands about people (`verify`, `enroll`, `identify`); they return plain data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.base.counts import format_count
from cnnrun.base.errors import ConfigError, DataError, escape
from cnnrun.base.file_sequences import is_hidden_or_system_name
from cnnrun.base.progress import say
from cnnrun.contracts.prediction import Prediction
from cnnrun.contracts.task_parts import Matching
from cnnrun.data.image_files import is_image_name
from cnnrun.data.image_paths import list_images
from cnnrun.experiment.open_run import open_network
from cnnrun.model.trained_network import TrainedNetwork
from cnnrun.results import gallery_file
from cnnrun.results.gallery_file import Gallery, SearchMethod
from cnnrun.results.inference import compute_results
from cnnrun.results.predict import PredictedFile

_REPORTED_STRANGER_RATE = 0.05  # a note is printed if a larger share of strangers is accepted as someone


@dataclass(frozen=True)
class SimilarityThreshold:
    """A minimum similarity, and the FAR that it was chosen for on val; None if the user gave it."""

    value: float
    far: float | None


@dataclass(frozen=True)
class IdentityOptions:
    """Network, device and operating point: a similarity threshold or a false accept rate, or the default."""

    run: Path | None
    runs: Path
    device: torch.device
    threshold: float | None = None
    far: float | None = None

    def open_embedding_network(self) -> tuple[TrainedNetwork, Matching]:
        """Open the network; returns it with its matching. Raises ConfigError if it gives no embeddings."""
        trained = open_network(self.run, self.runs, self.device)
        if trained.task.matching is None:
            raise ConfigError(
                f"this network is for {trained.task.kind} and gives no embeddings; give a run of the task verify"
            )
        return trained, trained.task.matching

    def choose_threshold(self, trained: TrainedNetwork, matching: Matching) -> SimilarityThreshold:
        """Choose the threshold, with a note if few pairs support it. Raises ConfigError if val set none for the FAR."""
        if self.threshold is not None and self.far is not None:
            raise ConfigError("--threshold and --far: give one of them")
        if self.threshold is not None:
            return SimilarityThreshold(self.threshold, None)
        point = matching.find_operating_point(trained.choices, self.far)
        if point is None:
            available = ", ".join(f"{point.far:g}" for point in trained.choices.operating_points) or "none"
            raise ConfigError(f"no threshold was chosen on val for this FAR (available: {available}); give --threshold")
        if note := matching.operating_point_note(point):
            say(f"threshold for FAR {point.far:g}: {note}")
        return SimilarityThreshold(point.threshold, point.far)


def verify_pair(options: IdentityOptions, first_path: Path, second_path: Path, batch: int = 2) -> dict[str, Any]:
    """Compare two images and decide whether they show the same person."""
    trained, matching = options.open_embedding_network()
    threshold = options.choose_threshold(trained, matching)
    embeddings, _ = _embed_images(trained, list(list_images([first_path, second_path])), batch)
    if len(embeddings) != 2:
        raise ConfigError("verify compares two images; give two files")
    similarity = float(embeddings[0] @ embeddings[1])
    return {
        "pictures": [str(first_path), str(second_path)],
        "similarity": similarity,
        "threshold": threshold.value,
        "far": threshold.far,
        "same": similarity >= threshold.value,
    }


def _embed_images(trained: TrainedNetwork, paths: Sequence[Path], batch: int) -> tuple[NDArray[np.float32], list[str]]:
    """Embed images: [N, D], and their paths. Raises DataError with a line for each file that cannot be read."""
    files = list(_compute_embeddings(trained, paths, batch))
    if problems := [str(embedding) for _, embedding in files if isinstance(embedding, DataError)]:
        raise DataError(*problems)
    return np.array([embedding for _, embedding in files], np.float32), [str(path) for path, _ in files]


def _compute_embeddings(
    trained: TrainedNetwork, paths: Iterable[Path], batch: int
) -> Iterator[tuple[Path, NDArray[np.float32] | DataError]]:
    """Compute the embedding of each image; returns the error in its place for a file that cannot be read."""
    matching = trained.task.matching
    assert matching is not None
    for chunk, results, _ in compute_results(trained, paths, batch):
        embeddings = iter(matching.embeddings(results).cpu().numpy() if results else ())
        for path, error in chunk:
            yield path, next(embeddings) if error is None else error


def enroll_people(
    options: IdentityOptions, folder: Path | None, gallery_path: Path, add: bool, remove: Sequence[str], batch: int
) -> dict[str, Any]:
    """Create a gallery from a folder of people, add people to it or remove them; returns its people.

    Without a folder and names to remove, the gallery is only read. Raises ConfigError for arguments that do not fit.
    """
    _check_arguments(folder, gallery_path, add, remove)
    if folder is None and not remove:  # reading needs no network
        return _summarize_gallery(gallery_path, gallery_file.read_gallery(gallery_path), [], [])
    trained, matching = options.open_embedding_network()
    existing = gallery_file.read_gallery(gallery_path) if gallery_path.exists() else None
    if existing is not None and folder is not None and not add:
        return _confirm_same_people(trained, folder, gallery_path, existing, batch)
    if existing is not None:
        gallery_file.refuse_other_network(existing, gallery_path, trained.digest, matching.dimension)
    if existing is not None and remove:
        existing = gallery_file.remove_people(existing, remove, allow_empty=folder is not None)
    people = _embed_people(trained, folder, batch) if folder else {}
    gallery, duplicates = gallery_file.add_people(existing, trained.digest, people) if people else (existing, 0)
    assert gallery is not None
    if duplicates:
        say(f"images left out: {duplicates:,}; each has the same embedding as another image of the same person")
    gallery_file.write_gallery(gallery_path, gallery)
    return _summarize_gallery(gallery_path, gallery, sorted(people), list(remove))


def _confirm_same_people(
    trained: TrainedNetwork, folder: Path, gallery_path: Path, existing: Gallery, batch: int
) -> dict[str, Any]:
    """Summarize an existing gallery of this same folder: repeating the command changes nothing.

    Raises ConfigError if the gallery holds anything else.
    """
    enrolled, _ = gallery_file.add_people(None, trained.digest, _embed_people(trained, folder, batch))
    if not enrolled.is_same(existing):
        raise ConfigError(f"--gallery {escape(str(gallery_path))}: already exists; use --add to add these people")
    say(f"{gallery_path} already holds these people")
    return _summarize_gallery(gallery_path, existing, [], [])


def _check_arguments(folder: Path | None, gallery_path: Path, add: bool, remove: Sequence[str]) -> None:
    escaped_path = escape(str(gallery_path))
    if gallery_path.suffix != ".safetensors":
        raise ConfigError(f"--gallery {escaped_path}: give a file that ends in .safetensors")
    if (folder is None or add) and not gallery_path.exists():
        raise ConfigError(f"--gallery {escaped_path}: no such file; give a folder of people without --add to create it")
    if add and folder is None:
        raise ConfigError("--add needs a folder of people")
    if remove and folder is not None and not add:
        raise ConfigError("--remove needs an existing gallery; with a folder of people, give --add too")


def _summarize_gallery(gallery_path: Path, gallery: Gallery, added: list[str], removed: list[str]) -> dict[str, Any]:
    return {
        "path": str(gallery_path),
        "model": gallery.network_digest,
        "people": gallery.image_counts(),
        "added": added,
        "removed": removed,
    }


def _embed_people(trained: TrainedNetwork, folder: Path, batch: int) -> dict[str, NDArray[np.float32]]:
    """Embed the images of each person, from a folder that holds a folder for each. Raises DataError."""
    if not folder.is_dir():
        raise DataError(f"{escape(str(folder))}: no such folder")
    entries = sorted(entry for entry in folder.iterdir() if not is_hidden_or_system_name(entry.name))
    paths_by_person = {entry.name: list(list_images([entry])) for entry in entries if entry.is_dir()}
    if not paths_by_person:
        raise DataError(f"{escape(str(folder))}: needs a folder for each person")
    loose_names = [entry.name for entry in entries if entry.is_file() and is_image_name(entry.name)]
    if loose_names:
        example = f"such as {escape(loose_names[0])!r}"
        images = format_count(len(loose_names), "image")
        say(f"{escape(str(folder))}: {images} left out, in no person's folder, {example}")
    embeddings, _ = _embed_images(trained, [path for paths in paths_by_person.values() for path in paths], batch)
    boundaries = np.cumsum([len(paths) for paths in paths_by_person.values()])[:-1]
    return dict(zip(paths_by_person, np.split(embeddings, boundaries), strict=True))


def _stranger_note(far: float, fars: Sequence[float], image_count: int) -> str:
    """Note on how many strangers are accepted, given the false accept rate of one pair; empty if they are few."""
    stranger_rate = 1 - (1 - far) ** image_count
    if stranger_rate <= _REPORTED_STRANGER_RATE:
        return ""
    lower_far = max((value for value in fars if value < far), default=None)
    advice = f"; --far {lower_far:g} accepts fewer" if lower_far else ""
    return (
        f"a stranger is compared with {image_count:,} images, at a false accept rate of {far:g} each (on val): up to "
        f"{stranger_rate:.0%} of strangers are accepted as someone{advice}"
    )


@dataclass(frozen=True)
class GallerySearch:
    """Settings of a search in a gallery: the number of people to find, and the method."""

    max_people: int
    method: SearchMethod


@dataclass(frozen=True)
class Identification(Prediction):
    """The people most similar to the one in an image, most similar first, and the similarity that a match needs."""

    matches: Sequence[tuple[str, float]]
    threshold: float

    @property
    def person(self) -> str | None:
        """The person in the image; None if nobody is similar enough."""
        person, similarity = self.matches[0]
        return person if similarity >= self.threshold else None

    def to_json(self) -> dict[str, Any]:
        return {
            "person": self.person,
            "similarity": self.matches[0][1],
            "threshold": self.threshold,
            "matches": [{"person": name, "similarity": similarity} for name, similarity in self.matches],
        }

    def to_text(self) -> str:
        matches = "  ".join(f"{name} {similarity:.3f}" for name, similarity in self.matches)
        return f"{self.person or 'unknown'}   ({matches})"

    def csv_columns(self) -> list[str]:
        ranks = range(1, len(self.matches) + 1)
        ranked = [f"{column} {rank}" for rank in ranks for column in ("person", "similarity")]
        return ["person", "similarity", *ranked]

    def csv_rows(self) -> list[list[Any]]:
        ranked = [cell for match in self.matches for cell in match]
        return [[self.person or "", self.matches[0][1], *ranked]]


def identify_people(
    options: IdentityOptions, paths: Sequence[Path], gallery_path: Path, search: GallerySearch, batch: int
) -> Iterator[PredictedFile]:
    """Identify the person in each image, or nobody if none is similar enough."""
    trained, matching = options.open_embedding_network()
    threshold = options.choose_threshold(trained, matching)
    gallery = gallery_file.read_gallery(gallery_path)
    gallery_file.refuse_other_network(gallery, gallery_path, trained.digest, matching.dimension)
    if threshold.far is not None and (note := _stranger_note(threshold.far, matching.fars, len(gallery.person_N))):
        say(note)
    for path, embedding in _compute_embeddings(trained, list_images(paths), batch):
        if isinstance(embedding, DataError):
            yield PredictedFile(path, None, str(embedding))
            continue
        (people,) = gallery.most_similar(embedding[None], search.max_people, search.method)
        yield PredictedFile(path, Identification(people, threshold.value))
