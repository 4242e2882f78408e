"""`cnnrun identify`: find the people of a gallery in images."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnrun.base.errors import ConfigError, DataError
from cnnrun.base.progress import say
from cnnrun.base.similarity import COSINE, Embeddings, Similarity
from cnnrun.contracts.prediction import CaptionedBox, Overlay, Prediction
from cnnrun.data.image_paths import list_images
from cnnrun.results.people import gallery_file
from cnnrun.results.people.embeddings import Embedder, IdentityOptions
from cnnrun.results.people.face_photos import PhotoFace
from cnnrun.results.people.gallery_file import SearchMethod
from cnnrun.results.predict import PredictedFile, overlay_drawer

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
    similarity: Similarity = COSINE

    @property
    def person(self) -> str | None:
        """The person in the image; None if nobody is similar enough."""
        person, similarity = self.matches[0]
        return person if similarity >= self.threshold else None

    @property
    def _shown_matches(self) -> list[tuple[str, float]]:
        return [(name, self.similarity.to_display(value)) for name, value in self.matches]

    def to_json(self) -> dict[str, Any]:
        measure = self.similarity.name
        return {
            "person": self.person,
            measure: self._shown_matches[0][1],
            "threshold": self.similarity.to_display(self.threshold),
            "matches": [{"person": name, measure: value} for name, value in self._shown_matches],
        }

    def to_text(self) -> str:
        matches = "  ".join(f"{name} {value:.3f}" for name, value in self._shown_matches)
        return f"{self.person or 'unknown'}   ({matches})"

    def csv_columns(self) -> list[str]:
        return identification_columns(self.similarity, len(self.matches))

    def csv_rows(self) -> list[list[Any]]:
        ranked = [cell for match in self._shown_matches for cell in match]
        return [[self.person or "", self._shown_matches[0][1], *ranked]]


def identification_columns(similarity: Similarity, matches: int) -> list[str]:
    """Names of the CSV columns of an identification with this many matches."""
    ranked = [f"{column} {rank}" for rank in range(1, matches + 1) for column in ("person", similarity.name)]
    return ["person", similarity.name, *ranked]


@dataclass(frozen=True)
class PhotoIdentification(Prediction):
    """The faces of a photo, each with the people most similar to it, or None for a face that cannot be recognised."""

    faces: Sequence[tuple[PhotoFace, Identification | None]]
    similarity: Similarity
    max_matches: int

    def to_json(self) -> dict[str, Any]:
        return {"faces": [face.to_json() | (who.to_json() if who else {"person": None}) for face, who in self.faces]}

    def to_text(self) -> str:
        if not self.faces:
            return "no face found"
        texts = [who.to_text() if who else f"unknown: {face.problem}" for face, who in self.faces]
        return texts[0] if len(texts) == 1 else f"{len(texts)} faces: " + "; ".join(texts)

    def answer(self) -> tuple[str | None, ...]:
        return tuple(who.person if who else None for _, who in self.faces)

    def csv_columns(self) -> list[str]:
        columns = ("face", "x1", "y1", "x2", "y2", "score", "problem")
        return [*columns, *identification_columns(self.similarity, self.max_matches)]

    def csv_rows(self) -> list[list[Any]]:
        if not self.faces:
            return [[0]]
        rows = []
        for number, (face, who) in enumerate(self.faces, 1):
            sides = [round(side, 1) for side in face.box]
            rows.append([number, *sides, face.score, face.problem, *(who.csv_rows()[0] if who else [])])
        return rows

    def overlay(self) -> Overlay:
        return Overlay([_caption_face(face, who) for face, who in self.faces])


def _caption_face(face: PhotoFace, who: Identification | None) -> CaptionedBox:
    person = who.person if who else None
    if person is None:
        return CaptionedBox(face.box, face.problem.split(" (")[0] or "unknown", 0)
    colour = 1 + zlib.crc32(person.encode()) % 15  # a person has the same colour in every photo
    return CaptionedBox(face.box, person, colour)


@dataclass(frozen=True)
class IdentifyRequest:
    """The images to identify people in, the gallery, the search in it, and a folder for drawings of photos."""

    paths: Sequence[Path]
    gallery: Path
    search: GallerySearch
    draw: Path | None = None


def identify_people(options: IdentityOptions, request: IdentifyRequest, batch: int) -> Iterator[PredictedFile]:
    """Identify the person in each image, or everybody in each photo; nobody where none is similar enough."""
    embedder = options.open_embedder()
    if request.draw and not embedder.reader:
        raise ConfigError("--draw shows the faces that are found in photos; give --find")
    threshold = options.choose_threshold(embedder)
    gallery = gallery_file.read_gallery(request.gallery)
    gallery_file.refuse_other_maker(gallery, request.gallery, embedder.maker, embedder.matching.dimension)
    images, fars = len(gallery.person_N), embedder.matching.fars
    if threshold.far is not None and (note := _stranger_note(threshold.far, fars, images)):
        say(note)
    search, paths = request.search, list_images(request.paths)

    def identify(embedding: Embeddings) -> Identification:
        (people,) = gallery.most_similar(embedding[None], search.max_people, search.method)
        return Identification(people, threshold.value, gallery.similarity)

    if embedder.reader:
        yield from _identify_in_photos(
            embedder, paths, identify, min(search.max_people, len(gallery.people)), request.draw
        )
        return
    for path, image in embedder.embed_each(paths, batch):
        if isinstance(image, DataError):
            yield PredictedFile(path, None, str(image))
        else:
            yield PredictedFile(path, identify(image.embedding))


def _identify_in_photos(
    embedder: Embedder,
    paths: Iterable[Path],
    identify: Callable[[Embeddings], Identification],
    max_matches: int,
    folder: Path | None,
) -> Iterator[PredictedFile]:
    """Identify everybody in each photo, and draw the photos into `folder` if it is given."""
    draw = overlay_drawer(folder, embedder.trained.image, 3)
    for path in paths:
        try:
            faces = embedder.embed_photo(path)
        except DataError as error:
            yield PredictedFile(path, None, str(error))
            continue
        identified = [(face, None if embedding is None else identify(embedding)) for face, embedding in faces]
        predicted = PredictedFile(path, PhotoIdentification(identified, embedder.matching.similarity, max_matches))
        draw(predicted)
        yield predicted
