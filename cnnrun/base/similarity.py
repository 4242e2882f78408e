"""Similarity of embeddings, the larger the more alike: their cosine, or their Euclidean distance with a minus."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SimilarityKind = Literal["cosine", "euclidean"]
Embeddings = NDArray[np.float32]


class Similarity:
    """Comparison of embeddings. `name` is the number that people see, `largest` the similarity of equal embeddings.

    Embeddings of one image have at least the similarity `same_image`: batches of different sizes round differently.
    """

    kind: SimilarityKind
    name: str
    largest: float
    same_image: float

    def of_all(self, queries_QD: Embeddings, embeddings_ND: Embeddings) -> NDArray[np.float32]:
        """Similarity of each query to each embedding: [Q, N]."""
        raise NotImplementedError

    def of_pairs(self, first_MD: Embeddings, second_MD: Embeddings) -> NDArray[np.float64]:
        """Similarity of the two embeddings of each row, computed in float64: [M]."""
        raise NotImplementedError

    def shown(self, similarity: float) -> float:
        """Return the number that people see for a similarity, and the similarity for such a number."""
        raise NotImplementedError


class Cosine(Similarity):
    """Cosine of the angle between embeddings of unit length: at most 1."""

    kind, name, largest, same_image = "cosine", "similarity", 1.0, 1 - 1e-6

    def of_all(self, queries_QD: Embeddings, embeddings_ND: Embeddings) -> NDArray[np.float32]:
        similarities: NDArray[np.float32] = queries_QD @ embeddings_ND.T
        return similarities

    def of_pairs(self, first_MD: Embeddings, second_MD: Embeddings) -> NDArray[np.float64]:
        similarities: NDArray[np.float64] = np.einsum("md,md->m", first_MD, second_MD, dtype=np.float64)
        return similarities

    def shown(self, similarity: float) -> float:
        return similarity


class Euclidean(Similarity):
    """Minus the Euclidean distance between embeddings of any length: at most 0. People see the distance."""

    kind, name, largest, same_image = "euclidean", "distance", 0.0, -2e-3

    def of_all(self, queries_QD: Embeddings, embeddings_ND: Embeddings) -> NDArray[np.float32]:
        squares_Q1, squares_N = _squared_lengths(queries_QD)[:, None], _squared_lengths(embeddings_ND)
        squared_QN: NDArray[Any] = squares_Q1 + squares_N - 2 * (queries_QD @ embeddings_ND.T)
        distances: NDArray[np.float32] = np.sqrt(squared_QN.clip(min=0)).astype(np.float32)
        return -distances

    def of_pairs(self, first_MD: Embeddings, second_MD: Embeddings) -> NDArray[np.float64]:
        differences = first_MD.astype(np.float64) - second_MD
        distances: NDArray[np.float64] = np.sqrt(np.einsum("md,md->m", differences, differences))
        return -distances

    def shown(self, similarity: float) -> float:
        return -similarity


def _squared_lengths(embeddings_ND: Embeddings) -> NDArray[np.float32]:
    squares: NDArray[np.float32] = np.einsum("nd,nd->n", embeddings_ND, embeddings_ND)
    return squares


COSINE, EUCLIDEAN = Cosine(), Euclidean()
SIMILARITIES: dict[SimilarityKind, Similarity] = {"cosine": COSINE, "euclidean": EUCLIDEAN}
