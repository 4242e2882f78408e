"""Cosine and Euclidean similarity."""

from __future__ import annotations

import numpy as np
import pytest

from cnnrun.base.similarity import COSINE, EUCLIDEAN, SIMILARITIES


def draw(count: int, dimension: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


def test_cosine_is_the_product_of_unit_vectors():
    rows = draw(7)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(COSINE.of_all(rows[:3], rows), rows[:3] @ rows.T, atol=1e-6)
    np.testing.assert_allclose(COSINE.of_pairs(rows[:3], rows[3:6]), (rows[:3] * rows[3:6]).sum(1), atol=1e-6)


def test_euclidean_is_minus_the_distance():
    first, second = draw(5), draw(9, seed=1)
    expected = -np.linalg.norm(first[:, None].astype(float) - second, axis=2)
    np.testing.assert_allclose(EUCLIDEAN.of_all(first, second), expected, atol=1e-5)
    np.testing.assert_allclose(EUCLIDEAN.of_pairs(first, second[:5]), np.diag(expected), atol=1e-12)
    assert EUCLIDEAN.shown(-0.6) == 0.6


@pytest.mark.parametrize("similarity", SIMILARITIES.values(), ids=SIMILARITIES)
def test_equal_embeddings_are_most_similar_and_count_as_one_image(similarity):
    rows = draw(20, 128)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) / 1.4 ** (similarity is EUCLIDEAN)
    similarities = similarity.of_all(rows, rows)
    assert np.diag(similarities).max() <= similarity.largest + 1e-6
    assert (np.diag(similarities) >= similarity.same_image).all()
    assert (similarities[~np.eye(20, dtype=bool)] < similarity.same_image).all()
    assert similarity.shown(similarity.shown(0.3)) == 0.3
