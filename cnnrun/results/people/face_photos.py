"""Photos with any number of people: their faces are found, aligned, and judged by size and sharpness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.counts import format_count
from cnnrun.base.errors import DataError, escape
from cnnrun.base.progress import say
from cnnrun.data.image_files import decode_image, image_errors, read_image_bytes
from cnnrun.data.image_settings import MAX_PIXELS, ImageRefusedError, ImageSettings
from cnnrun.results.people.alignment import FaceTemplate, align_face
from cnnrun.results.people.face_finder import LANDMARKS, FaceFinder

_BORDER_GREY = (128, 128, 128)
_MIN_SCORE = 0.95  # below it, most finds in pictures without people lie, and almost none of a real face
_MIN_EYE_DISTANCE_PX = 13.0  # in the photo itself; dlib's template has 53, and with fewer people cannot be told apart
# Blurred to this sharpness, a face of dlib's network moves by about 0.4, where the threshold of a match is 0.6.
_MIN_SHARPNESS = 0.045
_SHARPNESS_SIDE_PX = 150  # the size that the limit was found at


@dataclass(frozen=True)
class PhotoFace:
    """A face in a photo: its box (x1, y1, x2, y2) and landmarks (x, y) in pixels of the photo, and its aligned pixels.

    `problem` says why the person cannot be recognised; it is empty for a good face.
    """

    box: tuple[float, float, float, float]
    landmarks: Sequence[tuple[float, float]]
    score: float
    pixels_HWC: NDArray[np.uint8]
    problem: str

    @property
    def area(self) -> float:
        """Area of the box in square pixels."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])

    def to_json(self) -> dict[str, Any]:
        """Return what is known of the face, without its pixels, as plain data for JSON."""
        landmarks = {
            name: [round(side, 1) for side in point] for name, point in zip(LANDMARKS, self.landmarks, strict=True)
        }
        problem = {"problem": self.problem} if self.problem else {}
        return {"box": [round(side, 1) for side in self.box], "score": self.score, "landmarks": landmarks, **problem}


@dataclass(frozen=True)
class PhotoSettings:
    """Changes of photos before their faces are looked for, for photos that show little more than a face.

    They are made `enlarge` times as large, with a border of the fraction `margin` of each side. With `largest`, only
    the largest face of each photo is kept. Faces smaller than `min_face_px` are not looked for.
    """

    enlarge: int = 1
    margin: float = 0.0
    largest: bool = False
    min_face_px: int = 20


@dataclass(frozen=True)
class FaceReader:
    """Reader of the faces in photos, aligned to a template."""

    finder: FaceFinder
    template: FaceTemplate
    image: ImageSettings
    settings: PhotoSettings = PhotoSettings()

    def read_faces(self, path: Path) -> list[PhotoFace]:
        """Find the faces in a photo, from left to right. Raises DataError if the file cannot be read."""
        photo = read_photo(path, self.image)
        with image_errors(str(path)):
            prepared, border_px = self._prepare(photo)
        found = self.finder.find(np.asarray(prepared), self.settings.min_face_px)
        faces = [
            self._build_face(
                prepared, border_px, found.boxes_N4[index], found.landmarks_N52[index], found.scores_N[index]
            )
            for index in range(len(found))
        ]
        if self.settings.largest and faces:
            return [max(faces, key=lambda face: (not face.problem, face.area))]
        return sorted(faces, key=lambda face: face.box[0])

    def _build_face(
        self,
        prepared: Any,
        border_px: tuple[int, int],
        box_4: NDArray[np.float32],
        landmarks_52: NDArray[np.float32],
        score: float,
    ) -> PhotoFace:
        """Align a face that was found in the prepared photo, and judge it."""
        pixels_HWC = align_face(prepared, landmarks_52, self.template)
        (x1, y1), (x2, y2) = self._in_photo(box_4.reshape(2, 2), border_px)
        landmarks = self._in_photo(landmarks_52, border_px)
        problem = describe_problem(pixels_HWC, float(score), math.dist(*landmarks[:2]))
        return PhotoFace((x1, y1, x2, y2), landmarks, float(score), pixels_HWC, problem)

    def _prepare(self, photo: Any) -> tuple[Any, tuple[int, int]]:
        """Enlarge a photo and add its border; returns it with the border's width and height in pixels."""
        from PIL import Image as Pil

        width, height = (side * self.settings.enlarge for side in photo.size)
        left, top = round(width * self.settings.margin), round(height * self.settings.margin)
        if (width + 2 * left) * (height + 2 * top) > MAX_PIXELS:
            raise ImageRefusedError(f"more than {MAX_PIXELS:,} pixels once it is enlarged and has its margin")
        enlarged = photo.resize((width, height), Pil.Resampling.BICUBIC) if self.settings.enlarge > 1 else photo
        if not (left or top):
            return enlarged, (0, 0)
        bordered = Pil.new("RGB", (width + 2 * left, height + 2 * top), _BORDER_GREY)
        bordered.paste(enlarged, (left, top))
        return bordered, (left, top)

    def _in_photo(self, points_N2: NDArray[np.float32], border_px: tuple[int, int]) -> list[tuple[float, float]]:
        """Convert points of the prepared photo to points of the photo itself."""
        points = (points_N2.astype(np.float64) - border_px) / self.settings.enlarge
        return [(float(x), float(y)) for x, y in points]


def read_photo(path: Path, settings: ImageSettings) -> Any:
    """Read a photo as an upright RGB Pillow image. Raises DataError."""
    with image_errors(str(path)):
        eight_bits = settings.model_copy(update={"bits": 8})  # as the cascade takes photos
        (photo,) = decode_image(read_image_bytes(path), 3, eight_bits).pillow_images
        return photo


def describe_problem(pixels_HWC: NDArray[np.uint8], score: float, eye_distance_px: float) -> str:
    """Reason that the person in an aligned face cannot be recognised; empty for a good face."""
    if not score >= _MIN_SCORE:
        return f"perhaps not a face (score {score:.2f}, at least {_MIN_SCORE:g})"
    if not eye_distance_px >= _MIN_EYE_DISTANCE_PX:
        return f"too small ({eye_distance_px:.0f} pixels between the eyes, at least {_MIN_EYE_DISTANCE_PX:g})"
    if (sharpness := measure_sharpness(pixels_HWC)) < _MIN_SHARPNESS:
        return f"too blurred (sharpness {sharpness:.3f}, at least {_MIN_SHARPNESS:g})"
    return ""


def measure_sharpness(pixels_HWC: NDArray[np.uint8]) -> float:
    """Standard deviation of the grey image's Laplacian, divided by that of the grey image, at 150 pixels at most."""
    from PIL import Image as Pil

    side = max(pixels_HWC.shape[:2])
    if side > _SHARPNESS_SIDE_PX:
        factor = _SHARPNESS_SIDE_PX / side
        size = (round(pixels_HWC.shape[1] * factor), round(pixels_HWC.shape[0] * factor))
        pixels_HWC = np.asarray(Pil.fromarray(pixels_HWC).resize(size, Pil.Resampling.BILINEAR), np.uint8)
    grey = pixels_HWC.mean(2)
    inner = grey[1:-1, 1:-1]
    laplacian = grey[1:-1, 2:] + grey[1:-1, :-2] + grey[2:, 1:-1] + grey[:-2, 1:-1] - 4 * inner
    return float(laplacian.std() / max(inner.std(), 1.0))


def choose_single_face(path: Path, faces: Sequence[PhotoFace]) -> PhotoFace:
    """Choose the one face of a photo that can be recognised, and say which others are left out.

    Raises DataError if there is none, or more than one.
    """
    good, bad = ([face for face in faces if bool(face.problem) == is_bad] for is_bad in (False, True))
    name = escape(str(path))
    if len(good) == 1:
        for face in bad:
            say(f"{name}: another face is left out: {face.problem}")
        return good[0]
    if len(good) > 1:
        raise DataError(f"{name}: {format_count(len(good), 'face')}, but one is expected; cut the person out")
    if not faces:
        raise DataError(f"{name}: no face found")
    raise DataError(f"{name}: no face that can be recognised: {faces[0].problem}")
