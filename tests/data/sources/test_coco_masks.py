"""COCO's polygons and run lengths as masks: the pixels of COCO's own tools, in a fixed order, read like mask files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from cnnrun.base.errors import DataError
from cnnrun.base.progress import progress_bar
from cnnrun.contracts.drawn_masks import DrawnMask
from cnnrun.contracts.target_kind import IGNORED
from cnnrun.data.index import index_source
from cnnrun.data.mask_drawing import draw_mask, read_runs
from cnnrun.data.prepare import build_dataset, data_fingerprint
from cnnrun.data.settings import Data
from cnnrun.data.sources.coco import Coco
from cnnrun.data.sources.segmentations import segmentation_corners
from tests.support.images import save_picture

# pycocotools itself is older than NumPy's rule.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
HEIGHT, WIDTH = 30, 40
LEFT, RIGHT = [[2, 3, 18, 3, 18, 20, 2, 20]], [[22.5, 5, 35, 6.5, 30, 25, 21, 12], [36, 2, 39, 2, 39, 6, 36, 6]]


def annotation(number: int, image: int, category: int, segmentation: Any, **changed: Any) -> dict[str, Any]:
    row = {"id": number, "image_id": image, "category_id": category, "bbox": [1, 1, 20, 20], "area": 400.0}
    return row | {"segmentation": segmentation} | changed


def save(root: Path, annotations: list[dict[str, Any]], names: tuple[str, str] = ("cat", "dog"), count: int = 2) -> str:
    """An annotation file of images 0, 1, ... and the categories 5 and 90."""
    images = [{"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT} for number in range(count)]
    for row in images:
        save_picture(root / row["file_name"], seed=row["id"], size=(WIDTH, HEIGHT))
    categories = [{"id": 5, "name": names[0]}, {"id": 90, "name": names[1]}]
    path = root / "train.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return str(path)


def runs_of(mask: np.ndarray, as_text: bool) -> dict[str, Any]:
    """The RLE of a mask as COCO's tools write it: text, or a list of numbers."""
    counts = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    return {"size": list(mask.shape), "counts": counts if as_text else read_runs(counts)}


def data_of(path: str, **changed: Any) -> Data:
    image = {"size": [HEIGHT, WIDTH], "channels": 3}
    return Data.model_validate(
        {"source": {"coco": {"train": path, "give": "masks"}}, "image": image, "split": {"val": 0.0, "test": 0.0}}
        | {"cache": "memory"}
        | changed
    )


def masks_of(path: str, **changed: Any) -> np.ndarray:
    """The masks of the training images, [N, H, W], in the order of their names."""
    data = data_of(path, **changed)
    examples = build_dataset(data, index_source(data), progress_bar).splits["train"]
    names = [examples.source.sample_name(row) for row in examples.source_rows.tolist()]
    masks = examples.masks.take(examples.source_rows)[:, 0].numpy()
    return masks[np.argsort(names)]


coordinates = st.floats(-5, 45, allow_nan=False).map(lambda value: round(value, 2))
polygons = st.lists(coordinates, min_size=6, max_size=16).filter(lambda polygon: len(polygon) % 2 == 0)


@settings(max_examples=150)
@given(st.lists(polygons, min_size=1, max_size=3))
def test_polygons_cover_the_pixels_of_cocos_tools(segmentation):
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, HEIGHT, WIDTH)))
    shapes = json.dumps({"size": [HEIGHT, WIDTH], "shapes": [[3, segmentation]]}).encode()
    np.testing.assert_array_equal(draw_mask(DrawnMask("a", shapes)), 3 * expected)


@settings(max_examples=150)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.floats(0, 1), st.booleans())
def test_run_lengths_equal_those_of_cocos_tools(height, width, seed, density, as_text):
    expected = np.random.default_rng(seed).random((height, width)) < density
    shapes = json.dumps({"size": [height, width], "shapes": [[1, runs_of(expected, as_text)]]}).encode()
    np.testing.assert_array_equal(draw_mask(DrawnMask("a", shapes)), expected)


@given(st.text(max_size=30))
def test_text_that_is_no_run_lengths_is_refused_or_read(text):
    try:
        runs = read_runs(text)
    except ValueError:
        return
    assert all(isinstance(run, int) for run in runs)


def test_masks_equal_cocos_own_where_objects_do_not_overlap(tmp_path):
    text = runs_of(np.pad(np.ones((4, 5)), ((20, 6), (30, 5))), as_text=True)
    path = save(
        tmp_path, [annotation(1, 0, 90, LEFT), annotation(2, 0, 5, RIGHT), annotation(3, 1, 5, text, iscrowd=0)]
    )
    found, coco = masks_of(path), COCO(path)
    for image in (0, 1):
        expected = np.zeros((HEIGHT, WIDTH), np.uint8)
        for row in coco.loadAnns(coco.getAnnIds(imgIds=image)):
            expected[coco.annToMask(row) == 1] = {5: 1, 90: 2}[row["category_id"]]
        np.testing.assert_array_equal(found[image], expected)
    contents = Coco(train=path, give="masks").read()
    assert contents.classes == ("background", "cat", "dog")
    assert contents.splits["train"].objects is None


def test_small_objects_lie_over_large_ones_and_crowds_below_all(tmp_path):
    whole, part = [[0, 0, 20, 0, 20, 20, 0, 20]], [[5, 5, 10, 5, 10, 10, 5, 10]]
    crowd = runs_of(np.ones((HEIGHT, WIDTH)), as_text=False)
    rows = [
        annotation(1, 0, 5, part, area=25),
        annotation(2, 0, 90, whole, area=400),
        annotation(3, 0, 5, crowd, iscrowd=1, area=5),
    ]
    for order in (rows, rows[::-1]):
        mask = masks_of(save(tmp_path, order))[0]
        assert (mask[7, 7], mask[2, 2], mask[25, 30]) == (1, 2, IGNORED)


def test_the_drawn_pixels_decide_which_object_is_on_top(tmp_path):
    """Not `area`, which may be wrong, nor the box: YOLO has no other measure."""
    thin, small = [[0, 0, 2, 0, 39, 28, 39, 29]], [[10, 5, 25, 5, 25, 20, 10, 20]]
    pixels = {
        index: coco_mask.area(coco_mask.frPyObjects(shape, HEIGHT, WIDTH))[0]
        for index, shape in ((0, thin), (1, small))
    }
    assert pixels[0] < pixels[1]
    expected = None
    for areas in ((0, 10), (10, 0), (None, None)):
        rows = [annotation(1, 0, 5, thin, area=areas[0]), annotation(2, 0, 90, small, area=areas[1])]
        mask = masks_of(save(tmp_path, rows))[0]
        expected = mask if expected is None else expected
        np.testing.assert_array_equal(mask, expected)
    assert (mask == 1).sum() == pixels[0]


def test_objects_that_show_no_pixel_are_treated_as_boxes_are(tmp_path):
    outside, nothing = [[60, 5, 70, 5, 70, 20]], [[5, 5, 20, 5, 5, 5]]
    empty = runs_of(np.zeros((HEIGHT, WIDTH)), as_text=False)
    rows = [annotation(1, 0, 90, LEFT), annotation(2, 1, 5, outside), annotation(3, 1, 5, nothing)]
    path = save(tmp_path, [*rows, annotation(4, 1, 5, empty)])
    kinds = sorted(box.kind for box in Coco(train=path, give="masks").read().bad_boxes)
    assert kinds == ["a box of no area", "a box of no area", "a box outside its image"]
    with pytest.raises(DataError, match="annotation 2 of"):
        masks_of(path)
    assert not masks_of(path, bad_boxes="skip")[1].any()


def test_a_bbox_is_not_needed_and_an_object_is(tmp_path):
    row = annotation(1, 0, 90, LEFT)
    del row["bbox"]
    assert (masks_of(save(tmp_path, [row]))[0] == 2).any()
    for rows in ([], [annotation(1, 0, 90, runs_of(np.ones((HEIGHT, WIDTH)), as_text=False), iscrowd=1)]):
        with pytest.raises(DataError, match="no training image has an object, so every pixel is background"):
            Coco(train=save(tmp_path, rows), give="masks").read()


@pytest.mark.parametrize(("height", "width"), [(10**6, 10**6), (6000, 9000)])
def test_an_image_that_is_too_large_is_a_bad_file(height, width, tmp_path):
    path = Path(save(tmp_path, [annotation(1, 0, 90, LEFT), annotation(2, 1, 90, LEFT)]))
    content = json.loads(path.read_text())
    content["images"][1] |= {"height": height, "width": width}
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"the mask of 1.png in .*: {width}x{height} pixels; at most 50,000,000"):
        masks_of(str(path))
    assert len(masks_of(str(path), bad_files="skip")) == 1


@pytest.mark.parametrize("count", [252, 253, 1203])
def test_more_categories_than_a_mask_has_values_are_refused(count, tmp_path):
    path = Path(save(tmp_path, [annotation(1, 0, 90, LEFT)]))
    content = json.loads(path.read_text())
    content["categories"] = [
        {"id": 90, "name": "first"},
        *({"id": 1000 + k, "name": f"c{k}"} for k in range(count - 1)),
    ]
    path.write_text(json.dumps(content))
    if count == 252:
        assert masks_of(str(path)).max() == 1
    else:
        with pytest.raises(
            DataError, match=f"{count + 1:,} classes with the background; `give: masks` takes at most 253"
        ):
            masks_of(str(path))


@settings(max_examples=100)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32), st.floats(0, 1), st.booleans())
def test_the_box_around_run_lengths_is_that_of_their_pixels(height, width, seed, density, as_text):
    mask = np.random.default_rng(seed).random((height, width)) < density
    rows, columns = np.nonzero(mask)
    expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else (0, 0, 0, 0)
    assert segmentation_corners(runs_of(mask, as_text), (height, width)) == expected


def test_the_cache_names_the_annotation_file(tmp_path, run_cli):
    path = save(tmp_path, [annotation(1, 0, 90, LEFT), annotation(2, 1, 90, LEFT)])
    masks_of(path, cache="disk", cache_dir=str(tmp_path / "cache"))
    sources = {json.loads(file.read_text()).get("source") for file in (tmp_path / "cache").rglob("*.json")}
    assert path in sources


def test_a_category_named_background_is_the_background(tmp_path):
    path = save(tmp_path, [annotation(1, 0, 90, LEFT), annotation(2, 1, 5, LEFT)], names=("cat", "background"))
    assert Coco(train=path, give="masks").read().classes == ("background", "cat")
    assert [np.unique(mask).tolist() for mask in masks_of(path)] == [[0], [0, 1]]


def test_every_cache_gives_the_same_masks_and_the_shapes_are_in_its_key(tmp_path):
    cached = {"cache_dir": str(tmp_path / "cache"), "cache": "disk"}
    path = save(tmp_path, [annotation(1, 0, 90, LEFT), annotation(2, 1, 5, RIGHT)])
    first, fingerprint = masks_of(path), fingerprint_of(path)
    for settings_ in (cached, cached, {"cache": "none", "cache_dir": str(tmp_path / "cache")}):
        np.testing.assert_array_equal(masks_of(path, **settings_), first)
    changed = save(tmp_path, [annotation(1, 0, 90, LEFT), annotation(2, 1, 5, LEFT)])
    assert (masks_of(changed, **cached) != first).any()
    assert fingerprint_of(changed) != fingerprint


def fingerprint_of(path: str) -> str:
    data = data_of(path, fingerprint="content")
    return data_fingerprint(data, index_source(data))


def test_a_mask_of_another_size_than_its_image_is_named(tmp_path):
    path = save(tmp_path, [annotation(1, 0, 90, LEFT)])
    save_picture(tmp_path / "1.png", size=(WIDTH + 1, HEIGHT))
    with pytest.raises(DataError, match=r"1\.png: is 41x30 pixels; its objects are drawn for 40x30"):
        masks_of(path)
    assert len(masks_of(path, bad_files="skip")) == 1


@pytest.mark.parametrize(
    ("segmentation", "problem"),
    [
        (None, "it has no segmentation"),
        ([], "it has no segmentation"),
        ("", "it has no segmentation"),
        ([[1, 2, 3, 4]], r"is not \[x1, y1"),
        ([[1, 2, 3, 4, 5, 6, 7]], r"is not \[x1, y1"),
        ([1, 2, 3, 4, 5, 6], r"is not \[x1, y1"),
        ([[1, 2, 3, 4, 5, "6"]], "something that is not a number of pixels"),
        ([[1, 2, 3, 4, 5, True]], "something that is not a number of pixels"),
        ([[1, 2, 3, 4, 5, 10**400]], "something that is not a number of pixels"),
        ([[1, 2, 3, 4, 5, 1e9]], r"has 1e\+09, far outside the image of 40x30"),
        ({}, "is of size None"),
        ({"size": [WIDTH, HEIGHT], "counts": [1200]}, r"is of size \[40, 30\], its image of \[30, 40\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [1199]}, "not run lengths of all pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [1201, -1]}, "not run lengths of all pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [1200.0]}, "not run lengths of all pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": "\x01\x02"}, "not run lengths of all pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": "o" * 100}, "not run lengths of all pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": None}, "not run lengths of all pixels"),
    ],
)
def test_segmentations_that_cannot_be_drawn_are_named(segmentation, problem, tmp_path):
    path = save(tmp_path, [annotation(1, 0, 90, LEFT), annotation(7, 1, 5, segmentation)])
    with pytest.raises(DataError, match=f"annotation 7: .*{problem}"):
        Coco(train=path, give="masks").read()
    Coco(train=path).read()  # boxes need none


def test_polygons_are_learned_measured_and_predicted(tmp_path, run_cli):
    """From polygons to a written config, a trained network and its metric."""
    rows, count = [], 40
    for number in range(count):
        x = 3 + number % 15
        rows.append(annotation(number, number, 90, [[x, 5, x + 15, 5, x + 15, 20, x, 20]]))
    path = save(tmp_path / "cells", rows, count=count)
    for row in rows:
        pixels, x = np.full((HEIGHT, WIDTH, 3), 40, np.uint8), row["segmentation"][0][0]
        pixels[5:20, x : x + 15] = 220
        Image.fromarray(pixels).save(tmp_path / "cells" / f"{row['image_id']}.png")
    code, _, err = run_cli("init", path, "--task", "segment", "--minutes", "0.1", "--out", tmp_path / "c.yaml")
    assert code == 0, err
    assert run_cli("check", tmp_path / "c.yaml")[0] == 0
    runs = ("--runs", tmp_path / "runs")
    assert run_cli("train", tmp_path / "c.yaml", "train.epochs=12", "--no-report", *runs)[0] == 0
    code, out, err = run_cli("eval", tmp_path / "c.yaml", *runs, "--split", "val", "--json")
    assert code == 0, err
    assert json.loads(out)["numbers"]["mean_iou"] > 0.7
