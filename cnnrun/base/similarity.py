"""Similarity of embeddings, the larger the more alike: their cosine, or their Euclidean distance with a minus."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

_FEW_QUERIES, _BLOCK_ROWS = 16, 2048
SimilarityKind = Literal["cosine", "euclidean"]
Embeddings = NDArray[np.float32]


class Similarity:
    """Comparison of embeddings. `name` is the number that people see, `largest` the similarity of equal embeddings."""

    kind: SimilarityKind
    name: str
    largest: float

    def compare_all(self, queries_QD: Embeddings, embeddings_ND: Embeddings) -> NDArray[np.float32]:
        """Similarity of each query to each embedding: [Q, N]."""
        raise NotImplementedError

    def compare_pairs(self, first_MD: Embeddings, second_MD: Embeddings) -> NDArray[np.float64]:
        """Similarity of the two embeddings of each row, computed in float64: [M]."""
        raise NotImplementedError

    def are_same_image(self, queries_QD: Embeddings, embeddings_ND: Embeddings) -> NDArray[np.bool_]:
        """Tell which embeddings are equal but for rounding in batches of different sizes, so of one image: [Q, N]."""
        raise NotImplementedError

    def to_display(self, similarity: float) -> float:
        """Return the number that people see for a similarity."""
        raise NotImplementedError

    def from_display(self, number: float) -> float:
        """Return the similarity for a number that people see."""
        return self.to_display(number)  # a sign, or nothing


class Cosine(Similarity):
    """Cosine of the angle between embeddings of unit length: at most 1."""

    kind, name, largest = "cosine", "similarity", 1.0

    def compare_all(self, queries_QD: Embeddings, embeddings_ND: Embeddings) -> NDArray[np.float32]:
        similarities: NDArray[np.float32] = queries_QD @ embeddings_ND.T
        return similarities

    def compare_pairs(self, first_MD: Embeddings, second_MD: Embeddings) -> NDArray[np.float64]:
        similarities: NDArray[np.float64] = np.einsum("md,md->m", first_MD, second_MD, dtype=np.float64)
        return similarities

    def are_same_image(self, queries_QD: Embeddings, embeddings_ND: Embeddings) -> NDArray[np.bool_]:
        return self.compare_all(queries_QD, embeddings_ND) >= 1 - 1e-6

    def to_display(self, similarity: float) -> float:
        return similarity


class Euclidean(Similarity):
    """Minus the Euclidean distance between embeddings of any length: at most 0. People see the distance."""

    kind, name, largest = "euclidean", "distance", 0.0

    def compare_all(self, queries_QD: Embeddings, embeddings_ND: Embeddings) -> NDArray[np.float32]:
        if len(queries_QD) <= _FEW_QUERIES:
            return -np.stack([_distances(query, embeddings_ND) for query in queries_QD])
        # In float64, because the squares of near embeddings cancel out.
        queries, embeddings = queries_QD.astype(np.float64), embeddings_ND.astype(np.float64)
        squares_Q1, squares_N = _squared_lengths(queries)[:, None], _squared_lengths(embeddings)
        squared_QN: NDArray[np.float64] = squares_Q1 + squares_N - 2 * (queries @ embeddings.T)
        distances: NDArray[np.float32] = np.sqrt(squared_QN.clip(min=0)).astype(np.float32)
        return -distances

    def compare_pairs(self, first_MD: Embeddings, second_MD: Embeddings) -> NDArray[np.float64]:
        differences = first_MD.astype(np.float64) - second_MD
        distances: NDArray[np.float64] = np.sqrt(np.einsum("md,md->m", differences, differences))
        return -distances

    def are_same_image(self, queries_QD: Embeddings, embeddings_ND: Embeddings) -> NDArray[np.bool_]:
        lengths_Q1 = np.linalg.norm(queries_QD, axis=1, keepdims=True)
        are_same: NDArray[np.bool_] = self.compare_all(queries_QD, embeddings_ND) >= -1e-3 * lengths_Q1
        return are_same

    def to_display(self, similarity: float) -> float:
        return -similarity


def _distances(query_D: Embeddings, embeddings_ND: Embeddings) -> NDArray[np.float32]:
    """Euclidean distance of a query to each embedding, from differences, in blocks that fit into a cache: [N]."""
    squares_N = np.empty(len(embeddings_ND), np.float32)
    for start in range(0, len(embeddings_ND), _BLOCK_ROWS):
        differences = embeddings_ND[start : start + _BLOCK_ROWS] - query_D
        squares_N[start : start + _BLOCK_ROWS] = np.einsum("nd,nd->n", differences, differences)
    distances: NDArray[np.float32] = np.sqrt(squares_N)
    return distances


def _squared_lengths(embeddings_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = np.einsum("nd,nd->n", embeddings_ND, embeddings_ND)
    return squares


COSINE, EUCLIDEAN = Cosine(), Euclidean()
SIMILARITIES: dict[SimilarityKind, Similarity] = {"cosine": COSINE, "euclidean": EUCLIDEAN}
