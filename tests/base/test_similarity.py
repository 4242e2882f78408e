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
    np.testing.assert_allclose(COSINE.compare_all(rows[:3], rows), rows[:3] @ rows.T, atol=1e-6)
    np.testing.assert_allclose(COSINE.compare_pairs(rows[:3], rows[3:6]), (rows[:3] * rows[3:6]).sum(1), atol=1e-6)


def test_euclidean_is_minus_the_distance():
    first, second = draw(5), draw(9, seed=1)
    expected = -np.linalg.norm(first[:, None].astype(float) - second, axis=2)
    np.testing.assert_allclose(EUCLIDEAN.compare_all(first, second), expected, atol=1e-5)
    np.testing.assert_allclose(EUCLIDEAN.compare_pairs(first, second[:5]), np.diag(expected), atol=1e-12)
    assert EUCLIDEAN.to_display(-0.6) == 0.6


@pytest.mark.parametrize("similarity", SIMILARITIES.values(), ids=SIMILARITIES)
def test_equal_embeddings_are_most_similar_and_count_as_one_image(similarity):
    rows = draw(20, 128)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) if similarity is COSINE else 1
    rounded = rows * np.float32(1 + 1e-7)
    similarities = similarity.compare_all(rows, rounded)
    assert np.diag(similarities).max() <= similarity.largest + 1e-6
    assert np.array_equal(similarity.are_same_image(rows, rounded), np.eye(20, dtype=bool))
    assert similarity.from_display(similarity.to_display(0.3)) == 0.3


@pytest.mark.parametrize("length", [0.01, 1.4, 13, 1000])
def test_distances_of_near_embeddings_do_not_cancel_out(length):
    """Few queries take differences, many take products: both are exact, whatever the length."""
    rows = (draw(40, 128) * np.float32(length)).astype(np.float32)
    near = (rows + draw(40, 128, seed=2) * np.float32(1e-3 * length)).astype(np.float32)
    expected = np.linalg.norm(rows.astype(float) - near, axis=1)
    for count in (1, 40):
        distances = -EUCLIDEAN.compare_all(near[:count], rows).diagonal()
        np.testing.assert_allclose(distances, expected[:count], rtol=1e-3)
    assert not EUCLIDEAN.are_same_image(near, rows).all()
