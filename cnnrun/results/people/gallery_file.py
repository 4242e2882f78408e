"""A gallery: embeddings of known people, in a file that is bound to the network that computed them.

The file is safetensors: `embeddings` [N, D] float32 and `person` [N] int64, with names and the digests of the network
and of the face finder as JSON in its metadata. A file that differs from this in any way is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from cnnrun.base.atomic_files import write_file
from cnnrun.base.bounded_files import open_file
from cnnrun.base.errors import CheckpointError, ConfigError, DataError, escape
from cnnrun.base.extras import require_package
from cnnrun.base.similarity import SIMILARITIES, Embeddings, Similarity, SimilarityKind

FORMAT = 1
_METADATA_KEY = "cnnrun.results.gallery_file"
_MAX_SIMILARITY_BYTES = 1 << 28  # size of the similarities that are computed together
SearchMethod = Literal["exact", "faiss"]


@dataclass(frozen=True)
class GalleryMaker:
    """Maker of embeddings: the network's digest and, for photos, the face finder's digest and the face's template."""

    network: str
    finder: str = ""
    template: str = ""
    similarity: SimilarityKind = "cosine"


@dataclass(frozen=True)
class Gallery:
    """Embeddings grouped by person: `person_N` are indices into `people`, in ascending order."""

    maker: GalleryMaker
    people: tuple[str, ...]
    embeddings_ND: Embeddings
    person_N: NDArray[np.int64]

    def is_same(self, other: Gallery) -> bool:
        """Return whether the other gallery holds the same embeddings of the same people, made by the same network."""
        same_names = (self.maker, self.people) == (other.maker, other.people)
        same_people = same_names and np.array_equal(self.person_N, other.person_N)
        return same_people and np.array_equal(self.embeddings_ND, other.embeddings_ND)

    @property
    def similarity(self) -> Similarity:
        """The comparison of two embeddings."""
        return SIMILARITIES[self.maker.similarity]

    def image_counts(self) -> dict[str, int]:
        """Number of images of each person."""
        return dict(zip(self.people, np.bincount(self.person_N, minlength=len(self.people)).tolist(), strict=True))

    def embeddings_by_person(self) -> dict[str, Embeddings]:
        """Each person's embeddings."""
        edges = np.searchsorted(self.person_N, np.arange(1, len(self.people)))
        return dict(zip(self.people, np.split(self.embeddings_ND, edges), strict=True))

    @cached_property
    def faiss_index(self) -> Any:
        """Index of all embeddings for faiss. Raises ConfigError if faiss is not installed."""
        require_package("faiss", "faiss", "--search faiss")
        import faiss  # type: ignore[import-not-found, unused-ignore]

        kind = faiss.IndexFlatIP if self.maker.similarity == "cosine" else faiss.IndexFlatL2
        index = kind(self.embeddings_ND.shape[1])
        index.add(self.embeddings_ND)
        return index

    def most_similar(
        self, queries_QD: Embeddings, max_people: int, search: SearchMethod = "exact"
    ) -> list[list[tuple[str, float]]]:
        """Find the people most similar to each query, at most `max_people`, by the most similar of their images."""
        max_people = min(max_people, len(self.people))
        rows = (
            _search_faiss(self, queries_QD, max_people)
            if search == "faiss"
            else _search_exactly(self, queries_QD, max_people)
        )
        return [[(self.people[person], value) for person, value in row] for row in rows]


def build_gallery(maker: GalleryMaker, people: Mapping[str, Embeddings]) -> Gallery:
    """Build a gallery from embeddings by person, in the order of the names."""
    names = sorted(people)
    person_N = np.repeat(np.arange(len(names)), [len(people[name]) for name in names])
    return Gallery(maker, tuple(names), np.concatenate([people[name] for name in names]), person_N)


def write_gallery(path: Path, gallery: Gallery) -> None:
    """Write a gallery atomically. Raises StorageError."""
    maker = gallery.maker
    metadata: dict[str, Any] = {"format": FORMAT, "model": maker.network, "people": gallery.people}
    if maker.finder:
        metadata |= {"finder": maker.finder, "template": maker.template}
    if maker.similarity != "cosine":
        metadata["similarity"] = maker.similarity
    tensors: dict[str, NDArray[Any]] = {
        "embeddings": np.ascontiguousarray(gallery.embeddings_ND),
        "person": gallery.person_N,
    }
    write_file(path, safetensors.numpy.save(tensors, {_METADATA_KEY: json.dumps(metadata)}))


def read_gallery(path: Path) -> Gallery:
    """Read a gallery from a file. Raises CheckpointError if it is not a complete, valid gallery."""
    try:
        with open_file(path, CheckpointError), safetensors.safe_open(path, "np") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            if names != {"embeddings", "person"} or _METADATA_KEY not in metadata:
                raise CheckpointError(f"{escape(str(path))}: not a gallery (`cnnrun enroll` creates one)")
            embeddings, person = file.get_tensor("embeddings"), file.get_tensor("person")
    except (OSError, SafetensorError, TypeError, ValueError, AttributeError) as error:  # and dtypes numpy lacks
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise CheckpointError(f"{escape(str(path))}: cannot be read as a gallery ({escape(reason)})") from None
    try:
        description = json.loads(metadata[_METADATA_KEY])
        problem = _gallery_problem(description, embeddings, person)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        problem = "its description is damaged"
    if problem:
        raise CheckpointError(f"{escape(str(path))}: {problem}")
    finder, template = (description.get(key, "") for key in ("finder", "template"))
    maker = GalleryMaker(description["model"], finder, template, description.get("similarity", "cosine"))
    return Gallery(maker, tuple(description["people"]), embeddings, person)


def _gallery_problem(description: Any, embeddings: NDArray[Any], person: NDArray[Any]) -> str | None:
    """Describe what is wrong with the content of a gallery file; None for a valid one."""
    people = description["people"]
    if description["format"] != FORMAT:
        return f"written by another version of cnnrun (format {description['format']!r}, this reads {FORMAT})"
    has_names = isinstance(people, list) and all(isinstance(name, str) and name for name in people)
    has_maker = isinstance(description["model"], str) and all(
        isinstance(description.get(key, ""), str) for key in ("finder", "template")
    )
    similarity = description.get("similarity", "cosine")
    if not has_names or not has_maker or similarity not in SIMILARITIES or len(set(people)) < len(people):
        return "its description is damaged"
    if embeddings.dtype != np.float32 or person.dtype != np.int64 or embeddings.ndim != 2:
        return "its tensors are not a gallery's"
    if person.shape != embeddings.shape[:1] or not len(person):
        return "its tensors are not a gallery's"
    if (np.diff(person) < 0).any() or person[0] < 0 or not np.array_equal(np.unique(person), np.arange(len(people))):
        return "its embeddings do not match its people"
    squared_lengths = np.einsum("nd,nd->n", embeddings, embeddings)
    if similarity == "cosine" and not (np.abs(squared_lengths - 1) < 1e-3).all():
        return "its embeddings are not of unit length"
    if not np.isfinite(squared_lengths).all():
        return "its embeddings are not finite"
    return None


def _search_exactly(gallery: Gallery, queries_QD: Embeddings, max_people: int) -> list[list[tuple[int, float]]]:
    """Search by the product with every embedding, some queries at a time."""
    starts = np.searchsorted(gallery.person_N, np.arange(len(gallery.people)))
    rows: list[list[tuple[int, float]]] = []
    parts = -(-len(queries_QD) * len(gallery.person_N) * 4 // _MAX_SIMILARITY_BYTES) or 1
    for queries in np.array_split(queries_QD, parts):
        similarities = gallery.similarity.compare_all(queries, gallery.embeddings_ND)
        if len(starts) < similarities.shape[1]:
            similarities = np.maximum.reduceat(similarities, starts, axis=1)
        for similarities_P in similarities:
            nearest = np.arange(len(similarities_P))
            if max_people < len(nearest):
                nearest = np.argpartition(-similarities_P, max_people - 1)[:max_people]
            nearest = nearest[np.lexsort((nearest, -similarities_P[nearest]))]
            rows.append([(int(person), float(similarities_P[person])) for person in nearest])
    return rows


def _search_faiss(gallery: Gallery, queries_QD: Embeddings, max_people: int) -> list[list[tuple[int, float]]]:
    """Search by faiss's flat index, which is exact as well; for distances it gives their squares."""
    rows, index = [], gallery.faiss_index
    for query in queries_QD:
        image_count, best = max_people, dict[int, float]()
        while len(best) < max_people:  # several of the nearest images may show one person
            similarities, indices = index.search(query[None], min(image_count, len(gallery.person_N)))
            best = {}
            if gallery.maker.similarity == "euclidean":
                similarities = -np.sqrt(similarities)
            for similarity, person in zip(similarities[0].tolist(), gallery.person_N[indices[0]].tolist(), strict=True):
                best.setdefault(person, similarity)
            image_count *= 4
        rows.append(sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))[:max_people])
    return rows


def refuse_other_maker(gallery: Gallery, path: Path, maker: GalleryMaker, dimension: int) -> None:
    """Raise CheckpointError if a gallery was made in another way: its embeddings cannot be compared with these."""
    name = escape(str(path))
    if gallery.maker.network != maker.network:
        digests = f"{gallery.maker.network[:12]}, this one is {maker.network[:12]}"
        raise CheckpointError(f"{name}: made by another network ({digests}); enroll the people again")
    if gallery.embeddings_ND.shape[1] != dimension:
        sizes = f"{gallery.embeddings_ND.shape[1]} values, the network's have {dimension}"
        raise CheckpointError(f"{name}: its embeddings have {sizes}; enroll the people again")
    if gallery.maker == maker:
        return
    if gallery.maker.similarity != maker.similarity:
        raise CheckpointError(f"{name}: compared by {gallery.maker.similarity} similarity; enroll the people again")
    if gallery.maker.finder == maker.finder:
        raise CheckpointError(f"{name}: made from faces that were aligned in another way; enroll the people again")
    if not maker.finder:
        raise CheckpointError(f"{name}: made from faces that were found in photos; give --find, or enroll again")
    if not gallery.maker.finder:
        raise CheckpointError(f"{name}: made from images without looking for faces; give --no-find, or enroll again")
    raise CheckpointError(f"{name}: made with another face finder; enroll the people again")


def add_people(
    gallery: Gallery | None, maker: GalleryMaker, embeddings_by_person: Mapping[str, Embeddings]
) -> tuple[Gallery, int]:
    """Add embeddings by person to a gallery; returns the new gallery and how many of them were duplicates.

    Raises DataError if two people share an image: one of the names must be wrong.
    """
    people = dict(gallery.embeddings_by_person()) if gallery else {}
    duplicates, similarity = 0, SIMILARITIES[maker.similarity]
    for name, embeddings in embeddings_by_person.items():
        for other_name, other_embeddings in people.items():
            if other_name != name and similarity.are_same_image(embeddings, other_embeddings).any():
                names = f"{escape(other_name)} and {escape(name)}"
                raise DataError(f"{names} have an image with the same embedding: one of the names is wrong")
        known_embeddings = people.get(name, embeddings[:0])
        for embedding in embeddings:
            is_new = not similarity.are_same_image(embedding[None], known_embeddings).any()
            known_embeddings = np.concatenate([known_embeddings, embedding[None]]) if is_new else known_embeddings
            duplicates += not is_new
        people[name] = known_embeddings
    return build_gallery(maker, people), duplicates


def remove_people(gallery: Gallery, names: Sequence[str], *, allow_empty: bool = False) -> Gallery | None:
    """Remove people from a gallery; returns None if nobody is left and `allow_empty` is true.

    Raises ConfigError if a name is not in the gallery, or if nobody would be left.
    """
    people = gallery.embeddings_by_person()
    for name in names:
        if people.pop(name, None) is None:
            raise ConfigError(f"--remove {escape(name)}: nobody of that name in the gallery")
    if not people and allow_empty:
        return None
    if not people:
        raise ConfigError("--remove: nobody would be left in the gallery; delete the file instead")
    return build_gallery(gallery.maker, people)
