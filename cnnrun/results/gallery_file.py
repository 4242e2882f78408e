"""A gallery: the embeddings of people who are known, in a file bound to the network that made them.

The file is safetensors: `embeddings` [N, D] float32 of unit length and `person` [N] int64, with names and the network's
digest as JSON in its metadata. What does not fit is refused whole.
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

FORMAT = 1
_KEY = "cnnrun.results.gallery_file"
_AT_ONCE = 1 << 28  # bytes of similarities
_SAME = 1 - 1e-6  # the cosine from which on two embeddings are of one picture, whatever batch each came in
SearchMethod = Literal["exact", "faiss"]
Embeddings = NDArray[np.float32]


@dataclass(frozen=True)
class Gallery:
    """Embeddings in the order of their people: `person_N` are places in `people`, never falling."""

    network_digest: str
    people: tuple[str, ...]
    embeddings_ND: Embeddings
    person_N: NDArray[np.int64]

    def is_same(self, other: Gallery) -> bool:
        """Return whether the other gallery holds the same embeddings of the same people, made by the same network."""
        same_names = (self.network_digest, self.people) == (other.network_digest, other.people)
        same_people = same_names and np.array_equal(self.person_N, other.person_N)
        return same_people and np.array_equal(self.embeddings_ND, other.embeddings_ND)

    def image_counts(self) -> dict[str, int]:
        """Pictures of each person."""
        return dict(zip(self.people, np.bincount(self.person_N, minlength=len(self.people)).tolist(), strict=True))

    def embeddings_by_person(self) -> dict[str, Embeddings]:
        """Each person's embeddings."""
        edges = np.searchsorted(self.person_N, np.arange(1, len(self.people)))
        return dict(zip(self.people, np.split(self.embeddings_ND, edges), strict=True))

    @cached_property
    def faiss_index(self) -> Any:
        """faiss's index of all embeddings. Raises ConfigError where faiss is not installed."""
        require_package("faiss", "faiss", "--search faiss")
        import faiss  # type: ignore[import-not-found, unused-ignore]

        index = faiss.IndexFlatIP(self.embeddings_ND.shape[1])
        index.add(self.embeddings_ND)
        return index

    def most_similar(
        self, queries_QD: Embeddings, most: int, search: SearchMethod = "exact"
    ) -> list[list[tuple[str, float]]]:
        """The `most` people most similar to each query, by the most similar of their pictures."""
        most = min(most, len(self.people))
        found = _by_faiss(self, queries_QD, most) if search == "faiss" else _exactly(self, queries_QD, most)
        return [[(self.people[person], value) for person, value in row] for row in found]


def build_gallery(model: str, people: Mapping[str, Embeddings]) -> Gallery:
    """A gallery of people's embeddings, in the order of their names."""
    names = sorted(people)
    person = np.repeat(np.arange(len(names)), [len(people[name]) for name in names])
    return Gallery(model, tuple(names), np.concatenate([people[name] for name in names]), person)


def write_gallery(path: Path, gallery: Gallery) -> None:
    """The file, whole or as it was. Raises StorageError."""
    about = {"format": FORMAT, "model": gallery.network_digest, "people": gallery.people}
    tensors: dict[str, NDArray[Any]] = {
        "embeddings": np.ascontiguousarray(gallery.embeddings_ND),
        "person": gallery.person_N,
    }
    write_file(path, safetensors.numpy.save(tensors, {_KEY: json.dumps(about)}))


def read_gallery(path: Path) -> Gallery:
    """The gallery in a file. Raises CheckpointError for anything that is not one, whole and well."""
    try:
        with open_file(path, CheckpointError), safetensors.safe_open(path, "np") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            if names != {"embeddings", "person"} or _KEY not in metadata:
                raise CheckpointError(f"{escape(str(path))}: not a gallery (`cnnrun enroll` makes them)")
            embeddings, person = file.get_tensor("embeddings"), file.get_tensor("person")
    except (OSError, SafetensorError, TypeError, ValueError, AttributeError) as error:  # of types that numpy has not
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise CheckpointError(f"{escape(str(path))}: cannot be read as a gallery ({escape(reason)})") from None
    try:
        about = json.loads(metadata[_KEY])
        problem = _problem(about, embeddings, person)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        problem = "its description is damaged"
    if problem:
        raise CheckpointError(f"{escape(str(path))}: {problem}")
    return Gallery(about["model"], tuple(about["people"]), embeddings, person)


def _problem(about: Any, embeddings: NDArray[Any], person: NDArray[Any]) -> str | None:
    """What is wrong with what was read, or None."""
    people = about["people"]
    if about["format"] != FORMAT:
        return f"written by another version of cnnrun (format {about['format']!r}, this reads {FORMAT})"
    named = isinstance(people, list) and all(isinstance(name, str) and name for name in people)
    if not named or not isinstance(about["model"], str) or len(set(people)) < len(people):
        return "its description is damaged"
    if embeddings.dtype != np.float32 or person.dtype != np.int64 or embeddings.ndim != 2:
        return "its tensors are not a gallery's"
    if person.shape != embeddings.shape[:1] or not len(person):
        return "its tensors are not a gallery's"
    if (np.diff(person) < 0).any() or person[0] < 0 or not np.array_equal(np.unique(person), np.arange(len(people))):
        return "its pictures are not those of its people"
    lengths = np.einsum("nd,nd->n", embeddings, embeddings)
    if not (np.abs(lengths - 1) < 1e-3).all():
        return "holds embeddings that are not of unit length"
    return None


def _exactly(gallery: Gallery, queries_QD: Embeddings, most: int) -> list[list[tuple[int, float]]]:
    """By the product with every embedding."""
    starts = np.searchsorted(gallery.person_N, np.arange(len(gallery.people)))
    found: list[list[tuple[int, float]]] = []
    for queries in np.array_split(queries_QD, -(-len(queries_QD) * len(gallery.person_N) * 4 // _AT_ONCE) or 1):
        best = queries @ gallery.embeddings_ND.T
        if len(starts) < best.shape[1]:
            best = np.maximum.reduceat(best, starts, axis=1)
        for row in best:
            top = np.argpartition(-row, most - 1)[:most] if most < len(row) else np.arange(len(row))
            top = top[np.lexsort((top, -row[top]))]
            found.append([(int(person), float(row[person])) for person in top])
    return found


def _by_faiss(gallery: Gallery, queries_QD: Embeddings, most: int) -> list[list[tuple[int, float]]]:
    """By faiss's flat index: exact as well."""
    found, index = [], gallery.faiss_index
    for query in queries_QD:
        wanted, best = most, dict[int, float]()
        while len(best) < most:  # several of the nearest pictures may be of one person
            values, places = index.search(query[None], min(wanted, len(gallery.person_N)))
            best = {}
            for value, person in zip(values[0].tolist(), gallery.person_N[places[0]].tolist(), strict=True):
                best.setdefault(person, value)
            wanted *= 4
        found.append(sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))[:most])
    return found


def refuse_other_network(gallery: Gallery, path: Path, model: str, dimension: int) -> None:
    """Raises CheckpointError where another network made the gallery: its numbers mean something else there."""
    if gallery.network_digest != model:
        raise CheckpointError(
            f"{escape(str(path))}: made by another network ({gallery.network_digest[:12]}, this one is {model[:12]}); "
            "enroll the people again"
        )
    if gallery.embeddings_ND.shape[1] != dimension:
        raise CheckpointError(f"{escape(str(path))}: its embeddings have {gallery.embeddings_ND.shape[1]} numbers")


def add_people(gallery: Gallery | None, model: str, new: Mapping[str, Embeddings]) -> tuple[Gallery, int]:
    """The gallery with more people, or more pictures of its own; and how many it had already.

    Raises DataError where two people share a picture: one of the names is wrong.
    """
    people = dict(gallery.embeddings_by_person()) if gallery else {}
    again = 0
    for name, rows in new.items():
        for other, theirs in people.items():
            if other != name and (rows @ theirs.T >= _SAME).any():
                both = " and ".join(escape(each) for each in (other, name))
                raise DataError(f"{both} have a picture that is the same to the network: one of the names is wrong")
        kept = people.get(name, rows[:0])
        for row in rows:
            fresh = not (kept @ row >= _SAME).any()
            kept = np.concatenate([kept, row[None]]) if fresh else kept
            again += not fresh
        people[name] = kept
    return build_gallery(model, people), again


def remove_people(gallery: Gallery, names: Sequence[str], *, allow_empty: bool = False) -> Gallery | None:
    """The gallery without some people; None where nobody is left and `more` are to come.

    Raises ConfigError where one is not in it, or nobody would be left.
    """
    people = gallery.embeddings_by_person()
    for name in names:
        if people.pop(name, None) is None:
            raise ConfigError(f"--remove {escape(name)}: nobody of that name in the gallery")
    if not people and allow_empty:
        return None
    if not people:
        raise ConfigError("nobody would be left in the gallery; remove the file instead")
    return build_gallery(gallery.network_digest, people)
