from __future__ import annotations

import json
import re

import pytest

from cnnrun.base.errors import DataError
from cnnrun.data.sources.coco import Coco
from tests.support.images import save_picture


def content(**changed):
    made = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "b.png", "width": 40, "height": 30},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 5, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [1, 2, 10, 20], "area": 120.5, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 5, "bbox": [0, 0, 40, 30], "iscrowd": 1, "segmentation": {}},
        ],
    }
    return made | changed


@pytest.fixture
def write(tmp_path):
    def write_annotations(data, name="train.json"):
        for each in ("a", "b"):
            if not (tmp_path / f"{each}.png").exists():
                save_picture(tmp_path / f"{each}.png", seed=ord(each), size=(40, 30))
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return str(path)

    return write_annotations


def test_coco_boxes_crowds_areas_and_ids_are_read(write):
    found = Coco(train=write(content()), val=write(content(), "val.json")).read()
    assert found.classes == ("cat", "dog")
    assert found.class_ids == (5, 90)
    split = found.splits["train"]
    assert split.objects.pad()["boxes"][0].tolist() == [[1, 2, 11, 22], [0, 0, 40, 30]]
    assert split.objects.pad()["objects"].tolist() == [[1, 0], [-1, -1]]
    assert split.objects.pad()["roles"].tolist() == [[0, 2], [0, 0]]
    assert split.objects.pad()["areas"][0].tolist() == [120.5, 1200]
    assert [split.sample_name(number).rpartition("/")[2] for number in (0, 1)] == ["a.png", "b.png"]


def test_images_can_lie_in_another_folder(write, tmp_path):
    path = write(content())
    (tmp_path / "p").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "p" / "a.png")
    for given in (str(tmp_path / "p"), {"train": str(tmp_path / "p")}):
        assert Coco(train=path, images=given).read().splits["train"].sample_name(0) == str(tmp_path / "p" / "a.png")
    with pytest.raises(DataError, match="no such folder"):
        Coco(train=path, images=str(tmp_path / "q")).read()


def one(**changed):
    return content(annotations=[{"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 2, 10, 20]} | changed])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{", "not JSON"),
        ('{"images": [], "images": []}', "a key appears twice among images"),
        (json.dumps(one(area=float("nan"))), "NaN is not JSON"),
        ("[" * 100_000, "not JSON"),
        ({"images": []}, "needs images, annotations and categories"),
        (content(images=[{"file_name": "a.png"}]), "images is not a list of entries with an id"),
        (content(categories=[]), "no categories"),
        (content(categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]), "two categories have one name"),
        (content(categories=[{"id": 5, "name": "a"}, {"id": 5, "name": "b"}]), "the id 5 is used twice"),
        (content(images=content()["images"][:1] * 2), "images: the id 7 is used twice"),
        (
            content(images=[content()["images"][0], {"id": 3, "file_name": "./a.png", "width": 40, "height": 30}]),
            r"image 3: file_name './a.png' is already that of image 7; give both one id",
        ),
        (one(id="x"), "the id 'x' is not a whole number"),
        (one(image_id=99), "annotation 1: its image_id is 99, but there is no such image"),
        (one(category_id=6), "annotation 1: its category_id is 6, but there is no such category"),
        (one(bbox=[1, 2, 3]), r"annotation 1: bbox is not \[x, y, width, height\]"),
        (one(bbox=[1, 2, 3, "4"]), "bbox is not"),
        (one(area="large"), "its area is not a number"),
        (one(area=-1), "its area is not a number"),
        (one(area=10**400), "its area is not a number"),
        (one(bbox=[1, 2, 10**400, 4]), "bbox is not"),
        (one(iscrowd="0"), "iscrowd is neither 0 nor 1"),
        (one(image_id=[1]), "its image_id is .*, but there is no such image"),
        (one(category_id={}), "its category_id is .*, but there is no such category"),
        (content(categories=[{"id": 5, "name": None}]), "category 5: needs a name"),
        (content(categories=[{"id": 5, "name": " "}]), "category 5: needs a name"),
        (content(images=[{"id": 7, "file_name": "a.png", "width": 10**30, "height": 4}]), "needs height and width"),
        (content(images=[{"id": 7, "file_name": "a.png", "width": True, "height": 4}]), "needs height and width"),
        (content(images=[{"id": 7, "file_name": "../a.png", "width": 4, "height": 4}]), "leaves the root"),
        (content(images=[{"id": 7, "file_name": "/etc/passwd", "width": 4, "height": 4}]), "is absolute"),
        (content(images=[{"id": 7, "file_name": "http://x/a.png", "width": 4, "height": 4}]), "is a URL"),
        (content(images=[{"id": 7, "file_name": "a.png", "width": 0, "height": 4}]), "needs height and width"),
        (one(bbox=[0.1, 0.1, 0.5, 0.5]), "all boxes lie within 0..1"),
    ],
)
def test_invalid_coco_files_are_refused(write, data, words):
    with pytest.raises(DataError, match=words) as refused:
        Coco(train=write(data)).read()
    assert "train.json" in refused.value.lines[0]


@pytest.mark.parametrize(
    ("box", "words"),
    [([5, 5, 0, 4], "no area"), ([5, 5, -2, 4], "negative size"), ([50, 5, 4, 4], "outside its image")],
)
def test_bad_boxes_are_named_with_annotation_and_image(write, box, words):
    data = content()
    data["annotations"].append({"id": 44, "image_id": 7, "category_id": 5, "bbox": box})
    found = Coco(train=write(data)).read()
    (bad,) = found.bad_boxes
    assert bad.name.endswith("train.json: annotation 44 of a.png")
    assert re.search(words, bad.problem)
    assert (found.splits["train"].objects.pad()["objects"] >= 0).sum() == 2


def test_boxes_written_as_corners_are_refused(write):
    rows = [{"id": k, "image_id": 7, "category_id": 5, "bbox": [10 + k, 10, 30 + k, 28]} for k in range(1, 6)]
    with pytest.raises(DataError, match="5 of 5 boxes reach out of their images, and would not if they were written"):
        Coco(train=write(content(annotations=rows))).read()


def test_splits_with_different_categories_are_refused(write):
    other = content(categories=[{"id": 90, "name": "dog"}, {"id": 5, "name": "cow"}], annotations=[])
    with pytest.raises(DataError, match="its categories are not the training split's, such as 5"):
        Coco(train=write(content()), val=write(other, "val.json")).read()
