"""COCO JSON files as Roboflow, Label Studio, VIA and others write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.verdicts.three_commands import Build, Verdict, save_square, write_config

COUNT, SIDE = 16, 24
Change = Callable[[dict[str, Any]], None]
FINE = ("check",)


def annotations() -> dict[str, Any]:
    """COCO annotations of 16 images with one box each, of two categories."""
    images = [{"id": i, "file_name": f"{i:02}.png", "width": SIDE, "height": SIDE} for i in range(1, COUNT + 1)]
    boxes = [
        {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [4, 4, 8 + i / 4, 8], "area": 64, "iscrowd": 0}
        for i in range(1, COUNT + 1)
    ]
    return {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}


def coco(change: Change = lambda data: None, source: str = "{coco: d/t.json}", **more: str) -> Build:
    """Write the changed annotations, and the images whose file names are plain names."""

    def build(folder: Path) -> None:
        for i in range(1, COUNT + 1):
            save_square(folder / "d" / f"{i:02}.png", i, (SIDE, SIDE))
        data = annotations()
        change(data)
        (folder / "d" / "t.json").write_text(json.dumps(data))
        write_config(folder, source, "detect", **more)

    return build


def change_each(key: str, change: Callable[[dict[str, Any]], Any], rows: str = "annotations") -> Build:
    """Change one key of each annotation, image or category."""

    def of_all(data: dict[str, Any]) -> None:
        for row in data[rows]:
            row[key] = change(row)

    return coco(of_all)


def change_one(rows: str = "annotations", **values: Any) -> Build:
    """Change some keys of the fourth annotation or image."""
    return coco(lambda data: data[rows][3].update(values))


def drop_key(key: str, rows: str) -> Build:
    def drop(data: dict[str, Any]) -> None:
        for row in data[rows]:
            del row[key]

    return coco(drop)


def roboflow(data: dict[str, Any]) -> None:
    """As in Roboflow, category 0 is the name of the project and has no box."""
    data["categories"] = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        *({**row, "supercategory": "pets"} for row in data["categories"]),
    ]


def via(data: dict[str, Any]) -> None:
    for row in data["images"]:
        row["id"] = str(row["id"])
    for row in data["annotations"]:
        row["image_id"] = str(row["image_id"])


def list_image_twice(data: dict[str, Any]) -> None:
    data["images"].append({**data["images"][0], "id": 99})


def make_all_crowds(data: dict[str, Any]) -> None:
    for row in data["annotations"]:
        row |= {"iscrowd": 1, "segmentation": {"counts": [0, 64], "size": [SIDE, SIDE]}}


def make_one_crowd(data: dict[str, Any]) -> None:
    data["annotations"][3] |= {"iscrowd": 1, "segmentation": {"counts": "abc", "size": [SIDE, SIDE]}}


def use_segmentation(data: dict[str, Any]) -> None:
    for row in data["annotations"]:
        row["segmentation"] = [[4, 4, 12, 4, 12, 12]]
        del row["bbox"]


INPUTS = {
    "coco: plain": Verdict(coco(), 0, "2 classes", FINE),
    "Roboflow: category 0 is the project": Verdict(
        coco(roboflow), 0, "no object of pets in train", finding="without an object in train"
    ),
    "Label Studio: images/ and a hash": Verdict(
        change_each("file_name", lambda row: f"images/1f3a-{row['file_name']}", "images"), 8, "No such file"
    ),
    "Label Studio: images\\ of Windows": Verdict(
        change_each("file_name", lambda row: f"images\\{row['file_name']}", "images"), 8, "has backslashes"
    ),
    "Label Studio: categories from 0": Verdict(
        coco(
            lambda data: data.update(
                categories=[{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
                annotations=[{**row, "category_id": row["category_id"] - 1} for row in data["annotations"]],
            )
        ),
        0,
        "2 classes",
        FINE,
    ),
    "VIA: ids as texts": Verdict(coco(via), 8, "is not a whole number"),
    "segmentation without bbox": Verdict(coco(use_segmentation), 8, "bbox is not [x, y, width, height]"),
    "bbox of corners": Verdict(change_each("bbox", lambda row: [14, 14, 22, 22]), 8, "x1, y1, x2, y2"),
    "bbox of 0 to 1": Verdict(change_each("bbox", lambda row: [0.1, 0.1, 0.4, 0.4]), 8, "write them in pixels"),
    "bbox as text": Verdict(change_one(bbox="[4, 4, 8, 8]"), 8, "bbox is not [x, y, width, height]"),
    "bbox of negative size": Verdict(change_one(bbox=[12, 12, -8, -8]), 8, "of negative size"),
    "bbox of no area": Verdict(change_one(bbox=[4, 4, 0, 8]), 8, "a box of no area"),
    "bbox of no area, skipped": Verdict(
        coco(lambda data: data["annotations"][3].update(bbox=[4, 4, 0, 8]), bad_boxes="skip"),
        0,
        "1 box is left out",
        finding="a box of no area",
    ),
    "bbox that reaches out": Verdict(
        change_one(bbox=[18, 4, 10, 8]), 0, "cut at the edges of the image", finding="reaches out of its image"
    ),
    "category unknown": Verdict(change_one(category_id=7), 8, "its category_id is 7, but there is no such category"),
    "category_id as text": Verdict(change_one(category_id="1"), 8, "its category_id is the text '1'"),
    "image_id unknown": Verdict(change_one(image_id=77), 8, "its image_id is 77, but there is no such image"),
    "images without size": Verdict(drop_key("width", "images"), 8, "needs height and width"),
    "image size of another version": Verdict(change_one("images", width=48), 8, "its boxes are written for 48x24"),
    "an image listed twice": Verdict(coco(list_image_twice), 8, "is already that of image 1"),
    "folder of pictures missing": Verdict(
        coco(source="{coco: {train: d/t.json, images: images}}"), 8, "no such folder"
    ),
    "a picture missing": Verdict(change_one("images", file_name="99.png"), 8, "No such file"),
    "RLE crowd": Verdict(coco(make_one_crowd), 0, "2 classes", FINE),
    "ignore: 1, as CrowdHuman": Verdict(change_one(ignore=1), 0, "`ignore` has no effect on 1 annotation"),
    "all are crowds": Verdict(coco(make_all_crowds), 8, "no training image has a box"),
    "iscrowd as true": Verdict(change_one(iscrowd=True), 0, "2 classes", FINE),
    "no annotations yet": Verdict(coco(lambda data: data.update(annotations=[])), 8, "no training image has a box"),
    "categories empty": Verdict(coco(lambda data: data.update(categories=[])), 8, "no categories"),
    "cat and Cat as categories": Verdict(
        change_each("name", lambda row: ("cat", "Cat")[row["id"] - 1], "categories"),
        0,
        "differ only in spelling",
        finding="'cat' = 'Cat'",
    ),
    "the same box twice": Verdict(
        coco(lambda data: data["annotations"].append({**data["annotations"][0], "id": 99})), 0, "the same box and class"
    ),
    "absolute file_name": Verdict(
        change_each("file_name", lambda row: f"/data/{row['file_name']}", "images"), 8, "is absolute"
    ),
    "coco_url only": Verdict(
        change_each("file_name", lambda row: f"http://x.org/{row['id']}.jpg", "images"), 8, "is a URL"
    ),
    "a list of results": Verdict(
        lambda folder: (coco()(folder), (folder / "d" / "t.json").write_text("[]"))[0], 8, "not a COCO file"
    ),
    "NaN in it": Verdict(change_one(area=float("nan")), 8, "NaN is not JSON"),
    "the labels are in val alone": Verdict(
        coco(source="{coco: {train: d/t.json, val: d/missing.json}}"), 8, "missing.json"
    ),
}
