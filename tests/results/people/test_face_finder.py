"""The MTCNN cascade equals the one of the package that its weights come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image as Pil

from cnnrun.base.errors import CheckpointError
from cnnrun.results.people import face_boxes, face_finder
from cnnrun.results.people.cascade_weights import NETWORKS, build_cascade_network, read_finder_file, write_finder_file
from tests.support.face_data import EMBEDDER, FINDER, ORIGINALS, PHOTOS, needs_models, needs_photos, original_cascade

CPU = torch.device("cpu")
NAMES = ("obama", "obama2", "obama3", "biden", "obama_partial_face", "obama_partial_face2", "astronaut")


def read_photo(name: str) -> np.ndarray:
    (path,) = PHOTOS.glob(f"{name}.*")
    return np.asarray(Pil.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def finder():
    return read_finder_file(FINDER, CPU)


@pytest.fixture(scope="module")
def original():
    return original_cascade()


@needs_models
@pytest.mark.parametrize(("name", "part"), [("mtcnn_pnet", "pnet"), ("mtcnn_rnet", "rnet"), ("mtcnn_onet", "onet")])
def test_each_network_gives_the_originals_bits(name, part, original):
    network = build_cascade_network(name).to_empty(device=CPU)
    state = torch.load(ORIGINALS / "facenet_pytorch" / "data" / f"{part}.pt", weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    side = NETWORKS[name][0]
    sizes = [(side, side)] if name != "mtcnn_pnet" else [(12, 12), (35, 60), (101, 64)]
    for height, width in sizes:
        pixels = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.no_grad():
            face, box, *landmarks = network(pixels)
            box_there, *landmarks_there, face_there = getattr(original, part)(pixels)
        assert torch.equal(face, face_there)
        assert torch.equal(box, box_there)
        assert [torch.equal(*pair) for pair in zip(landmarks, landmarks_there, strict=True)] == [True] * len(landmarks)


@needs_photos
@pytest.mark.parametrize("name", NAMES)
def test_it_finds_the_originals_faces(name, finder, original):
    pixels = read_photo(name)
    found = finder.find(pixels)
    boxes, scores, landmarks = original.detect(Pil.fromarray(pixels), landmarks=True)
    order = np.argsort(-scores.astype(float))
    assert len(found) == len(boxes) >= 1
    np.testing.assert_allclose(found.boxes_N4, boxes[order].astype(float), atol=0.01)
    np.testing.assert_allclose(found.scores_N, scores[order].astype(float), atol=1e-5)
    np.testing.assert_allclose(found.landmarks_N52, landmarks[order].astype(float), atol=0.01)


@needs_photos
def test_many_faces_of_many_sizes_are_the_originals(finder, original):
    sheet = Pil.new("RGB", (900, 700), (90, 120, 90))
    for index, name in enumerate((*NAMES, *NAMES)):
        face = Pil.fromarray(read_photo(name))
        face.thumbnail((60 + 15 * index, 200))
        sheet.paste(face, (20 + 170 * (index % 5), 20 + 220 * (index // 5)))
    found = finder.find(np.asarray(sheet))
    boxes, _, landmarks = original.detect(sheet, landmarks=True)
    assert len(found) == len(boxes) >= 10
    for box, points in zip(found.boxes_N4, found.landmarks_N52, strict=True):
        nearest = np.abs(boxes - box).max(1).argmin()
        assert np.abs(boxes[nearest] - box).max() < 1
        assert np.abs(landmarks[nearest] - points).max() < 1


@needs_photos
def test_strips_of_a_large_image_change_nothing(finder, monkeypatch):
    pixels = read_photo("astronaut")
    whole = finder.find(pixels)
    for pixels_per_strip in (1, 5_000, 60_000):
        monkeypatch.setattr(face_finder, "_MAX_STRIP_PIXELS", pixels_per_strip)
        monkeypatch.setattr(face_finder, "_MAX_CROPS", 7)
        found = finder.find(pixels)
        np.testing.assert_allclose(found.boxes_N4, whole.boxes_N4, atol=1e-2)
        np.testing.assert_allclose(found.landmarks_N52, whole.landmarks_N52, atol=1e-2)
        if pixels_per_strip == 1:
            monkeypatch.setattr(face_finder, "_MAX_STRIP_PIXELS", 1 << 30)


@needs_models
@pytest.mark.parametrize("size", [(1, 1), (5, 300), (19, 19), (20, 20), (21, 500)])
def test_images_without_room_for_a_face_have_none(size, finder):
    assert len(finder.find(np.full((*size, 3), 128, np.uint8))) == 0


@needs_models
def test_a_smaller_face_is_found_only_where_it_is_asked_for(finder):
    if not PHOTOS.exists():
        pytest.skip("needs the photos (scripts/get_data face-photos)")
    photo = Pil.fromarray(read_photo("astronaut"))
    photo.thumbnail((160, 160))  # the face has about 35 pixels
    pixels = np.asarray(photo)
    assert len(finder.find(pixels)) == 1
    assert len(finder.find(pixels, min_face_px=80)) == 0


@needs_models
@pytest.mark.parametrize("damage", ["another file", "a tensor less", "not finite"])
def test_a_file_that_is_no_finder_is_refused(damage, tmp_path):
    path = tmp_path / "finder.safetensors"
    if damage == "another file":
        path = EMBEDDER
    else:
        tensors = {name: build_cascade_network(name).to_empty(device=CPU).state_dict() for name in NETWORKS}
        tensors = {
            name: {key: torch.zeros_like(value) for key, value in state.items()} for name, state in tensors.items()
        }
        if damage == "a tensor less":
            tensors["mtcnn_onet"].popitem()
        else:
            next(iter(tensors["mtcnn_pnet"].values())).fill_(float("nan"))
        write_finder_file(path, tensors, {"licence": "none"})
    with pytest.raises(CheckpointError):
        read_finder_file(path, CPU)


def test_boxes_inside_others_are_suppressed_whatever_their_size():
    boxes = torch.tensor([[0.0, 0, 100, 100], [40, 40, 50, 50], [200, 0, 300, 100], [205, 0, 305, 100]])
    kept = face_boxes.keep_outermost(boxes, torch.tensor([0.8, 0.9, 0.7, 0.75]), 0.7)
    assert kept.tolist() == [1, 3]  # the more certain of each two


def test_nothing_is_suppressed_among_no_boxes():
    assert face_boxes.keep_outermost(torch.empty(0, 4), torch.empty(0), 0.7).tolist() == []


@needs_models
def test_pictures_without_faces_have_none(finder, original):
    """Some of these pass the first stages and are refused by the last."""
    for seed in range(6):
        draw = np.random.default_rng(seed)
        pixels = np.asarray(Pil.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((400, 300)))
        found = original.detect(Pil.fromarray(pixels))[0]
        assert len(finder.find(pixels)) == (0 if found is None else len(found))


def test_squares_keep_the_centre():
    squares = face_boxes.make_square(torch.tensor([[0.0, 0, 10, 4], [5, 5, 9, 25]]))
    assert squares.tolist() == [[0, -3, 10, 7], [-3, 5, 17, 25]]
