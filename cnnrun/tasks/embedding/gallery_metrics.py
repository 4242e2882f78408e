"""Who is it: the people of a gallery in the order of their similarity to a picture, and whether it is any of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FPIRS = (0.1, 0.01)
_AT_ONCE = 1024  # probes
_ENOUGH = 10  # false alarms to be expected at an FPIR for it to mean something


@dataclass(frozen=True)
class GalleryAndProbes:
    """Some pictures of each person, enrolled; the others, to be recognised."""

    enrolled_G: NDArray[np.int64]
    probes_Q: NDArray[np.int64]


def enrol_first(labels_N: NDArray[np.int64], count: int) -> GalleryAndProbes:
    """The first `count` pictures of each person in the split's order, of people who have more than that."""
    order = np.argsort(labels_N, kind="stable")
    ordered = labels_N[order]
    starts = np.r_[0, np.flatnonzero(np.diff(ordered)) + 1]
    lengths = np.diff(np.r_[starts, len(ordered)])
    place = np.arange(len(ordered)) - np.repeat(starts, lengths)
    enough = np.repeat(lengths > count, lengths)
    return GalleryAndProbes(np.sort(order[enough & (place < count)]), np.sort(order[enough & (place >= count)]))


def similarity_per_person(
    embeddings_ND: NDArray[np.float32], labels_N: NDArray[np.int64], enrolled_G: NDArray[np.int64], probe: slice | Any
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The largest similarity of each probe to each enrolled person [Q, P], and those people [P]."""
    order = enrolled_G[np.argsort(labels_N[enrolled_G], kind="stable")]
    people, starts = np.unique(labels_N[order], return_index=True)
    return np.maximum.reduceat(embeddings_ND[probe] @ embeddings_ND[order].T, starts, axis=1), people


def identification_ranks(
    embeddings_ND: NDArray[np.float32], labels_N: NDArray[np.int64], gallery: GalleryAndProbes
) -> NDArray[np.int64]:
    """The place of each probe's own person, from 1; who is as similar stands before."""
    found = []
    for start in range(0, len(gallery.probes_Q), _AT_ONCE):
        probes = gallery.probes_Q[start : start + _AT_ONCE]
        best, people = similarity_per_person(embeddings_ND, labels_N, gallery.enrolled_G, probes)
        own = best[np.arange(len(probes)), np.searchsorted(people, labels_N[probes])]
        found.append((best >= own[:, None]).sum(1))
    return np.concatenate(found)


def cumulative_match_rows(ranks_Q: NDArray[np.int64], people: int, most: int = 20) -> list[dict[str, Any]]:
    """The cumulative match characteristic: how often the right person is among the first k."""
    return [{"rank": k, "rate": float((ranks_Q <= k).mean())} for k in range(1, min(people, most) + 1)]


def open_set_rows(
    embeddings_ND: NDArray[np.float32], labels_N: NDArray[np.int64], gallery: GalleryAndProbes
) -> list[dict[str, Any]]:
    """How many known people are missed (FNIR) at the threshold at which so many strangers are taken for one (FPIR).

    Half of the people are enrolled and the others are strangers, then the other way round; a known person is missed
    when somebody else is more similar, or the similarity is below the threshold (NIST's FRVT 1:N).
    """
    people = np.unique(labels_N[gallery.enrolled_G])
    if len(people) < 4:
        return []
    alarms, hits = [], []
    for known in (people[::2], people[1::2]):
        enrolled = gallery.enrolled_G[np.isin(labels_N[gallery.enrolled_G], known)]
        mine = np.isin(labels_N[gallery.probes_Q], known)
        for start in range(0, len(mine), _AT_ONCE):
            probes, own = gallery.probes_Q[start : start + _AT_ONCE], mine[start : start + _AT_ONCE]
            best, who = similarity_per_person(embeddings_ND, labels_N, enrolled, probes)
            top, right = best.max(1), who[best.argmax(1)] == labels_N[probes]
            alarms.append(top[~own])
            hits.append(np.where(right, top, -np.inf)[own])
    strangers, found = np.sort(np.concatenate(alarms))[::-1], np.concatenate(hits)
    return [_missed(strangers, found, fpir) for fpir in FPIRS]


def _missed(strangers: NDArray[np.float32], found: NDArray[np.float32], fpir: float) -> dict[str, Any]:
    place = int(len(strangers) * fpir + 1e-9)  # so many strangers may reach the threshold
    place = int((strangers > strangers[place]).sum())  # those that are as similar as the next one are not let in
    above = strangers[place - 1] if place else max(strangers[0], 1.0)
    threshold = (float(above) + float(strangers[place])) / 2  # so that rounding does not decide
    few = len(strangers) * fpir < _ENOUGH
    return {
        "FPIR": fpir,
        "threshold": threshold,
        "FNIR": float((found < threshold).mean()),
        "pictures of people": len(found),
        "of strangers": len(strangers),
        "note": f"too few pictures of strangers: {len(strangers):,}; {_ENOUGH / fpir:,.0f} give {_ENOUGH} alarms"
        if few
        else "",
    }
