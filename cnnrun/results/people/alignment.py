"""Alignment of faces: a similarity transform (scale, rotation, shift) brings the landmarks to fixed places."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.errors import ConfigError
from cnnrun.contracts.layer import HeightWidth
from cnnrun.contracts.task import Task
from cnnrun.results.people.face_finder import LANDMARKS

# The eyes in the images of 150 x 150 pixels that dlib's face network learned from.
_TEMPLATE_SIDE = 150
_TEMPLATE = {"left_eye": (47.7, 47.1), "right_eye": (100.3, 47.1)}


@dataclass(frozen=True)
class FaceTemplate:
    """Positions (x, y) of landmarks in an aligned face, in pixels, and the face's size."""

    landmarks: Mapping[str, Sequence[float]]
    size: HeightWidth

    @classmethod
    def of_task(cls, task: Task) -> FaceTemplate:
        """Template of a task, for its images. Raises ConfigError if it has none."""
        matching, (_, height, width) = task.matching, task.facts.image_shape
        if matching is None or not matching.landmarks:
            raise ConfigError("this network does not say where a face's landmarks are (task.verify.landmarks)")
        for name, (x, y) in matching.landmarks.items():
            if x > width or y > height:
                raise ConfigError(
                    f"landmark {name} at ({x:g}, {y:g}) is outside of the image of {width}x{height} pixels"
                )
        return cls(matching.landmarks, (height, width))

    def to_json(self) -> str:
        """Return the template as text, which is equal for equal templates."""
        return json.dumps([list(self.size), {name: list(point) for name, point in sorted(self.landmarks.items())}])

    @classmethod
    def default(cls, side: int) -> FaceTemplate:
        """Template of dlib's face network, for square images of another size."""
        factor = side / _TEMPLATE_SIDE
        return cls({name: (x * factor, y * factor) for name, (x, y) in _TEMPLATE.items()}, (side, side))


# A face that is enlarged more is not cut out: it would be a few blurred pixels.
_MAX_ENLARGEMENT = 50.0


def align_face(photo: Any, landmarks_52: NDArray[np.float32], template: FaceTemplate) -> NDArray[np.uint8]:
    """Cut a face out of a Pillow image, upright: RGB pixels [H, W, 3], black if the face is far too small.

    Landmarks are in the order of `LANDMARKS`; those of the template are used.
    """
    from PIL import Image as Pil

    indices = [LANDMARKS.index(name) for name in template.landmarks]
    target = np.array(list(template.landmarks.values()), np.float64)
    scale_and_turn, shift = fit_similarity_transform(landmarks_52[indices].astype(np.float64), target)
    enlargement = float(np.hypot(*scale_and_turn[0]))
    if not enlargement < _MAX_ENLARGEMENT:  # also where the landmarks coincide
        return np.zeros((*template.size, 3), np.uint8)
    # A transform that shrinks would skip pixels, so the photo is reduced to about twice the face's size before.
    reduction = max(1, int(0.5 / enlargement))
    inverse = np.linalg.inv(scale_and_turn)
    corners = _corners_in_photo(inverse, shift, template.size)
    part = _cut_out(photo, corners).reduce(reduction)
    offset = -inverse @ shift - corners[:2]
    to_part = np.column_stack([inverse, offset]) / reduction
    height, width = template.size
    face = part.transform((width, height), Pil.Transform.AFFINE, to_part.ravel(), Pil.Resampling.BILINEAR)
    pixels: NDArray[np.uint8] = np.asarray(face, np.uint8)
    return pixels


def fit_similarity_transform(
    source_K2: NDArray[np.float64], target_K2: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit the matrix [2, 2] and shift [2] of the similarity transform that is nearest in least squares.

    The transform maps a point p to matrix @ p + shift (Umeyama 1991, without reflections).
    """
    source, target = source_K2 - source_K2.mean(0), target_K2 - target_K2.mean(0)
    # As complex numbers, scale and rotation are one factor.
    source_K, target_K = source @ (1, 1j), target @ (1, 1j)
    spread = np.vdot(source_K, source_K).real
    factor = np.vdot(source_K, target_K) / spread if spread > 0 else complex(np.inf, 0)
    matrix = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
    return matrix, target_K2.mean(0) - matrix @ source_K2.mean(0)


def _corners_in_photo(inverse: NDArray[Any], shift: NDArray[Any], size: HeightWidth) -> tuple[int, int, int, int]:
    """Rectangle (left, top, right, bottom) that a face covers, with a border of two pixels of the face.

    It may reach beyond the photo.
    """
    height, width = size
    corners = np.array([(x, y) for x in (-2, width + 2) for y in (-2, height + 2)]) - shift
    in_photo = corners @ inverse.T
    left, top = np.floor(in_photo.min(0)).astype(int).tolist()
    right, bottom = np.ceil(in_photo.max(0)).astype(int).tolist()
    return left, top, right, bottom


def _cut_out(photo: Any, corners: tuple[int, int, int, int]) -> Any:
    """Cut a rectangle out of a Pillow image; beyond the image its edge continues, which adds no contour to a face."""
    from PIL import Image as Pil

    limits = (photo.width, photo.height) * 2
    inside = [min(max(side, 0), limit) for side, limit in zip(corners, limits, strict=True)]
    left, top = (min(side, limit - 1) for side, limit in zip(inside[:2], limits, strict=False))
    right, bottom = max(inside[2], left + 1), max(inside[3], top + 1)
    part = photo.crop((left, top, right, bottom))
    missing = ((top - corners[1], corners[3] - bottom), (left - corners[0], corners[2] - right), (0, 0))
    if not any(map(any, missing)):
        return part
    widths = [(max(0, before), max(0, after)) for before, after in missing]
    return Pil.fromarray(np.pad(np.asarray(part), widths, mode="edge"))
