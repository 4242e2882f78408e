"""Metrics of identification: the people of a gallery are ranked by their similarity to a probe image.

Closed-set metrics assume that the person is in the gallery; open-set metrics also have probes of strangers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.similarity import COSINE, Similarity

FPIRS = (0.1, 0.01)
_CHUNK = 1024  # probes that are compared with the gallery at once, to bound memory
_MIN_FALSE_ALARMS = 10  # a threshold for an FPIR means little if fewer are expected


@dataclass(frozen=True)
class GalleryAndProbes:
    """Indices of the enrolled images, and of the other images of the same people: the probes."""

    enrolled_G: NDArray[np.int64]
    probes_Q: NDArray[np.int64]


def enrol_first(labels_N: NDArray[np.int64], count: int) -> GalleryAndProbes:
    """Enrol the first `count` images of each person who has more; their other images are probes.

    The order of the images is that of the split.
    """
    order = np.argsort(labels_N, kind="stable")
    sorted_labels = labels_N[order]
    starts = np.r_[0, np.flatnonzero(np.diff(sorted_labels)) + 1]
    lengths = np.diff(np.r_[starts, len(sorted_labels)])
    index_in_person = np.arange(len(sorted_labels)) - np.repeat(starts, lengths)
    has_probes = np.repeat(lengths > count, lengths)
    enrolled = has_probes & (index_in_person < count)
    probes = has_probes & (index_in_person >= count)
    return GalleryAndProbes(np.sort(order[enrolled]), np.sort(order[probes]))


def similarity_per_person(
    embeddings_ND: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    enrolled_G: NDArray[np.int64],
    probes_Q: NDArray[np.int64],
    similarity: Similarity,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The largest similarity of each probe to an image of each enrolled person [Q, P], and the people's labels [P]."""
    order = enrolled_G[np.argsort(labels_N[enrolled_G], kind="stable")]
    people, starts = np.unique(labels_N[order], return_index=True)
    similarities = similarity.compare_all(embeddings_ND[probes_Q], embeddings_ND[order])
    return np.maximum.reduceat(similarities, starts, axis=1), people


def identification_ranks(
    embeddings_ND: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    gallery: GalleryAndProbes,
    similarity: Similarity = COSINE,
) -> NDArray[np.int64]:
    """Rank of each probe's own person by similarity, from 1; people who are equally similar rank before them."""
    ranks = []
    for start in range(0, len(gallery.probes_Q), _CHUNK):
        probes = gallery.probes_Q[start : start + _CHUNK]
        similarity_QP, people = similarity_per_person(embeddings_ND, labels_N, gallery.enrolled_G, probes, similarity)
        own_Q = similarity_QP[np.arange(len(probes)), np.searchsorted(people, labels_N[probes])]
        ranks.append((similarity_QP >= own_Q[:, None]).sum(1))
    return np.concatenate(ranks)


def cumulative_match_rows(ranks_Q: NDArray[np.int64], people: int, max_rank: int = 20) -> list[dict[str, Any]]:
    """Cumulative match characteristic: how often the right person is among the first k, for k up to `max_rank`."""
    return [{"rank": k, "rate": float((ranks_Q <= k).mean())} for k in range(1, min(people, max_rank) + 1)]


def open_set_rows(
    embeddings_ND: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    gallery: GalleryAndProbes,
    similarity: Similarity = COSINE,
) -> list[dict[str, Any]]:
    """Share of known people who are missed (FNIR) at the threshold for each share of strangers accepted (FPIR).

    Half of the people are enrolled while the others are strangers, then the halves change roles. A known person is
    missed if somebody else is more similar, or if the similarity is below the threshold (NIST's FRVT 1:N). Empty if
    there are fewer than four people.
    """
    people = np.unique(labels_N[gallery.enrolled_G])
    if len(people) < 4:
        return []
    stranger_parts, known_parts = [], []
    for half in (people[::2], people[1::2]):
        enrolled = gallery.enrolled_G[np.isin(labels_N[gallery.enrolled_G], half)]
        is_enrolled = np.isin(labels_N[gallery.probes_Q], half)
        for start in range(0, len(is_enrolled), _CHUNK):
            probes, is_known = gallery.probes_Q[start : start + _CHUNK], is_enrolled[start : start + _CHUNK]
            similarity_QP, labels_P = similarity_per_person(embeddings_ND, labels_N, enrolled, probes, similarity)
            best, is_right = similarity_QP.max(1), labels_P[similarity_QP.argmax(1)] == labels_N[probes]
            stranger_parts.append(best[~is_known])
            known_parts.append(np.where(is_right, best, -np.inf)[is_known])
    strangers, known = np.sort(np.concatenate(stranger_parts))[::-1], np.concatenate(known_parts)
    return [_open_set_row(strangers, known, fpir, similarity) for fpir in FPIRS]


def _open_set_row(
    strangers: NDArray[np.float32], known: NDArray[np.float32], fpir: float, similarity: Similarity = COSINE
) -> dict[str, Any]:
    """Table row of one FPIR, from the falling similarities of strangers and those of known people (-inf if missed)."""
    accepted = int(len(strangers) * fpir + 1e-9)
    accepted = int((strangers > strangers[accepted]).sum())  # strangers as similar as the first refused one are refused
    lowest_accepted = strangers[accepted - 1] if accepted else max(strangers[0], similarity.largest)
    threshold = (float(lowest_accepted) + float(strangers[accepted])) / 2  # halfway, so that rounding does not decide
    needed = f"{_MIN_FALSE_ALARMS / fpir:,.0f} give {_MIN_FALSE_ALARMS} alarms"
    few = len(strangers) * fpir < _MIN_FALSE_ALARMS
    return {
        "FPIR": fpir,
        "threshold": similarity.to_display(threshold),
        "FNIR": float((known < threshold).mean()),
        "pictures of people": len(known),
        "of strangers": len(strangers),
        "note": f"too few images of strangers: {len(strangers):,}; {needed}" if few else "",
    }
