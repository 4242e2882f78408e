"""The MTCNN cascade (Zhang et al. 2016): three networks that propose, refine and judge faces and their landmarks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cnnrun.results.people import face_boxes
from cnnrun.results.people.summed_areas import SummedAreas

LANDMARKS = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
WINDOW_PX, STRIDE_PX = 12, 2  # of the proposal network
_CROP_SIDES = (24, 48)  # inputs of the refinement and the output network
_MIN_SCORES = (0.6, 0.7, 0.7)
_PYRAMID_FACTOR = 0.709  # each size of the image has about half the area of the one before
_MAX_STRIP_PIXELS = 1 << 20  # of a resized image that the proposal network sees at once, to bound memory
_MAX_CROPS = 512  # crops that are judged at once, to bound memory
_MAX_FACES = 1_000  # in one image; the most certain remain


@dataclass(frozen=True)
class FoundFaces:
    """Faces of an image, by falling score: boxes (x1, y1, x2, y2), scores, and landmarks (x, y), in pixels.

    The order of the landmarks is `LANDMARKS`; left is the left of the image.
    """

    boxes_N4: NDArray[np.float32]
    scores_N: NDArray[np.float32]
    landmarks_N52: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.scores_N)


@dataclass(frozen=True)
class CascadeNetworks:
    """The networks of the cascade: (face, box) of windows and of crops of 24 pixels, (face, box, landmarks) of 48."""

    proposal: nn.Module
    refinement: nn.Module
    output: nn.Module


class FaceFinder:
    """Finder of faces; `digest` identifies its networks, so that a gallery can say by which finder it was made."""

    def __init__(self, networks: CascadeNetworks, digest: str, device: torch.device) -> None:
        self.digest, self._networks, self._device = digest, networks, device

    def find(self, pixels_HWC: NDArray[np.uint8], min_face_px: int = 20) -> FoundFaces:
        """Find the faces of an RGB image whose shorter side has at least `min_face_px` pixels."""
        with torch.inference_mode():
            areas = SummedAreas(pixels_HWC, self._device)
            boxes = self._propose(areas, min_face_px)
            boxes = self._refine(areas, boxes) if len(boxes) else boxes
            if not len(boxes):
                return FoundFaces(*(np.empty((0, *shape), np.float32) for shape in ((4,), (), (5, 2))))
            return FoundFaces(*(values.cpu().numpy() for values in self._accept(areas, boxes)))

    def _propose(self, areas: SummedAreas, min_face_px: int) -> Tensor:
        """Square boxes [N, 4] that may hold a face."""
        proposals = [self._propose_at_scale(areas, scale) for scale in _pyramid_scales(areas, min_face_px)]
        boxes, scores, offsets = _join(proposals, (4, 1, 4), self._device)
        remaining = _suppress(boxes, scores[:, 0], 0.7)
        return _keep_inside(
            areas, face_boxes.make_square(face_boxes.move_edges(boxes[remaining], offsets[remaining], 0))
        )

    def _propose_at_scale(self, areas: SummedAreas, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [N, 4], scores [N, 1] and offsets [N, 4] of the windows of one size of the image."""
        strips = []
        for first_row, face_1CRW, offsets_1CRW in self._strips(areas, scale):
            scores_RW = face_1CRW[0, 1]
            row, column = (scores_RW >= _MIN_SCORES[0]).nonzero(as_tuple=True)
            corners_N2 = STRIDE_PX * torch.stack([column, row + first_row], 1) + 1
            boxes = torch.cat([corners_N2 / scale, (corners_N2 + WINDOW_PX - 1) / scale], 1).floor()
            strips.append((boxes, scores_RW[row, column][:, None], offsets_1CRW[0, :, row, column].T))
        boxes, scores, offsets = _join(strips, (4, 1, 4), self._device)
        remaining = _suppress(boxes, scores[:, 0], 0.5)
        return boxes[remaining], scores[remaining], offsets[remaining]

    def _strips(self, areas: SummedAreas, scale: float) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The proposal network's outputs for strips of the resized image, each with the strip's first row of cells."""
        height, width = int(areas.height * scale + 1), int(areas.width * scale + 1)
        border = WINDOW_PX - STRIDE_PX
        rows_per_strip = max(1, _MAX_STRIP_PIXELS // (STRIDE_PX * width))
        for first_row in range(0, -(-(height - border) // STRIDE_PX), rows_per_strip):
            end = min(height, STRIDE_PX * (first_row + rows_per_strip) + border)
            pixels = areas.resize(height, width, slice(STRIDE_PX * first_row, end))
            yield first_row, *self._networks.proposal(_normalize(pixels))

    def _refine(self, areas: SummedAreas, boxes_N4: Tensor) -> Tensor:
        """Square boxes [N, 4] of the proposals that the refinement network accepts."""
        scores, offsets = self._judge_crops(areas, boxes_N4, self._networks.refinement, _CROP_SIDES[0])
        remaining = (scores > _MIN_SCORES[1]).nonzero()[:, 0]
        remaining = remaining[_suppress(boxes_N4[remaining], scores[remaining], 0.7)]
        return _keep_inside(
            areas, face_boxes.make_square(face_boxes.move_edges(boxes_N4[remaining], offsets[remaining], 1))
        )

    def _accept(self, areas: SummedAreas, boxes_N4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and landmarks of the faces that the output network accepts, by falling score."""
        scores, offsets, fractions = self._judge_crops(areas, boxes_N4, self._networks.output, _CROP_SIDES[1])
        accepted = (scores > _MIN_SCORES[2]).nonzero()[:, 0]
        accepted = accepted[scores[accepted].argsort(descending=True, stable=True)[:_MAX_FACES]]
        boxes, scores = boxes_N4[accepted], scores[accepted]
        landmarks = face_boxes.landmarks_in_image(boxes, fractions[accepted])
        boxes = face_boxes.move_edges(boxes, offsets[accepted], 1)
        outermost = face_boxes.keep_outermost(boxes, scores, 0.7)
        return boxes[outermost], scores[outermost], landmarks[outermost]

    def _judge_crops(self, areas: SummedAreas, boxes_N4: Tensor, network: nn.Module, side: int) -> tuple[Tensor, ...]:
        """The score of each box, and the network's other outputs."""
        pixels_N4 = face_boxes.pixels_of_boxes(boxes_N4, areas.height, areas.width)
        outputs = [network(_normalize(areas.crops(part, side))) for part in pixels_N4.split(_MAX_CROPS)]
        face, *others = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return face[:, 1], *others


def _keep_inside(areas: SummedAreas, boxes_N4: Tensor) -> Tensor:
    """The boxes that lie within the image at least in part."""
    pixels_N4 = face_boxes.pixels_of_boxes(boxes_N4, areas.height, areas.width)
    return boxes_N4[(pixels_N4[:, 2:] > pixels_N4[:, :2]).all(1)]


def _pyramid_scales(areas: SummedAreas, min_face_px: int) -> list[float]:
    """Factors of the image's size, so that faces of every size fill a window once; none if no face fits."""
    scale, scales = WINDOW_PX / min_face_px, list[float]()
    side = min(areas.height, areas.width) * scale
    while side >= WINDOW_PX:
        scales.append(scale)
        scale, side = scale * _PYRAMID_FACTOR, side * _PYRAMID_FACTOR
    return scales


def _join(parts: Sequence[tuple[Tensor, ...]], columns: Sequence[int], device: torch.device) -> list[Tensor]:
    """Concatenate the tensors of each position; without parts, they are empty with these numbers of columns."""
    empty = tuple(torch.empty(0, count, device=device) for count in columns)
    return [torch.cat(tensors) for tensors in zip(empty, *parts, strict=True)]


def _suppress(boxes_N4: Tensor, scores_N: Tensor, max_overlap: float) -> Tensor:
    """Indices of the boxes that remain after greedy non-maximum suppression, by falling score."""
    from torchvision.ops import nms  # this import takes a second

    remaining: Tensor = nms(boxes_N4, scores_N, max_overlap)
    return remaining


def _normalize(pixels_NCHW: Tensor) -> Tensor:
    """Pixel values 0..255 -> -1..1, in the layout that convolutions are fastest in."""
    return ((pixels_NCHW - 127.5) / 128).contiguous(memory_format=torch.channels_last)
