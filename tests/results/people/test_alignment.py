"""The similarity transform that aligns a face."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pil
from PIL import ImageDraw

from cnnrun.results.people.alignment import FaceTemplate, align_face, fit_similarity_transform
from cnnrun.results.people.face_finder import LANDMARKS

ALL = {
    "left_eye": (47, 47),
    "right_eye": (100, 47),
    "nose": (75, 80),
    "left_mouth": (52, 110),
    "right_mouth": (98, 110),
}


@given(
    st.floats(0.05, 20),
    st.floats(-np.pi, np.pi),
    st.tuples(st.floats(-500, 500), st.floats(-500, 500)),
    st.integers(2, 5),
)
def test_an_exact_similarity_is_found(scale, angle, shift, count):
    points = np.array(list(ALL.values()), float)[:count]
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    found, found_shift = fit_similarity_transform(points, points @ matrix.T + shift)
    np.testing.assert_allclose(found, matrix, atol=1e-8 * scale)
    np.testing.assert_allclose(found_shift, shift, atol=1e-6 * max(1, scale))


def test_it_is_the_least_squares_solution():
    draw = np.random.default_rng(0)
    source, target = draw.normal(size=(5, 2)), draw.normal(size=(5, 2))
    matrix, shift = fit_similarity_transform(source, target)
    rows = [row for x, y in source for row in ((x, -y, 1, 0), (y, x, 0, 1))]
    (a, b, c, d), *_ = np.linalg.lstsq(np.array(rows), target.ravel(), rcond=None)
    np.testing.assert_allclose(matrix, [[a, -b], [b, a]], atol=1e-12)
    np.testing.assert_allclose(shift, [c, d], atol=1e-12)


def draw_face(scale: float, angle_degrees: float) -> tuple[Pil.Image, np.ndarray]:
    """A photo with a coloured disc at each landmark, and the landmarks."""
    turn = np.radians(angle_degrees)
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = (np.array(list(ALL.values()), float) - 75) @ matrix.T + 400
    photo = Pil.new("RGB", (800, 800), (40, 40, 40))
    drawing = ImageDraw.Draw(photo)
    for index, (x, y) in enumerate(points):
        radius = 5 * scale
        drawing.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 50 * index, 255 - 50 * index))
    return photo, points.astype(np.float32)


@pytest.mark.parametrize("names", [LANDMARKS[:2], LANDMARKS])
@pytest.mark.parametrize(("scale", "angle"), [(1.0, 0), (0.4, 20), (3.0, -35), (3.0, 170)])
def test_landmarks_come_to_their_places(names, scale, angle):
    photo, points = draw_face(scale, angle)
    face = align_face(photo, points, FaceTemplate({name: ALL[name] for name in names}, (150, 150)))
    assert face.shape == (150, 150, 3)
    for index, (x, y) in enumerate(ALL.values()):
        assert np.abs(face[round(y), round(x)].astype(int) - (255, 50 * index, 255 - 50 * index)).max() < 12
        assert np.abs(face[round(y), round(x) + 9].astype(int) - 40).max() < 12


def test_landmarks_at_one_place_give_no_face():
    for spread in (0.0, 1e-9, np.nan):
        points = np.full((5, 2), 30, np.float32) + np.arange(10, dtype=np.float32).reshape(5, 2) * np.float32(spread)
        face = align_face(Pil.new("RGB", (60, 60)), points, FaceTemplate.default(150))
        assert face.shape == (150, 150, 3)
        assert not face.any()


def test_beyond_the_photo_its_edge_continues():
    photo = Pil.new("RGB", (60, 60), (0, 200, 0))
    photo.paste((200, 0, 0), (0, 0, 60, 5))
    points = np.array([[10, 10], [50, 10], [30, 30], [15, 45], [45, 45]], np.float32)
    face = align_face(photo, points, FaceTemplate.default(150))
    assert face[2, 75].tolist() == [200, 0, 0]
    assert face[149, 75].tolist() == [0, 200, 0]
    assert face[60, 75].tolist() == [0, 200, 0]
    assert FaceTemplate.default(75).landmarks["left_eye"] == pytest.approx((23.85, 23.55))
