"""`cnnrun identify`: find the people of a gallery in images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnrun.base.errors import DataError
from cnnrun.base.progress import say
from cnnrun.contracts.prediction import Prediction
from cnnrun.data.image_paths import list_images
from cnnrun.results.people import gallery_file
from cnnrun.results.people.embeddings import IdentityOptions, compute_embeddings
from cnnrun.results.people.gallery_file import SearchMethod
from cnnrun.results.predict import PredictedFile

_REPORTED_STRANGER_RATE = 0.05  # a note is printed if a larger share of strangers is accepted as someone


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
    for path, embedding in compute_embeddings(trained, list_images(paths), batch):
        if isinstance(embedding, DataError):
            yield PredictedFile(path, None, str(embedding))
            continue
        (people,) = gallery.most_similar(embedding[None], search.max_people, search.method)
        yield PredictedFile(path, Identification(people, threshold.value))
