"""Boxes as COCO's and VOC's many writers have them: Roboflow, Label Studio, VIA, LabelImg, CVAT, LabelMe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from three_commands import Build, Verdict, config, save

COUNT, SIDE = 16, 24
Change = Callable[[dict[str, Any]], None]
Rewrite = Callable[[str, int], str]
BOX = "<bndbox><xmin>4</xmin><ymin>4</ymin><xmax>12</xmax><ymax>12</ymax></bndbox>"


def annotations() -> dict[str, Any]:
    """COCO's file of 16 pictures with one box each, of two categories."""
    images = [{"id": i, "file_name": f"{i:02}.png", "width": SIDE, "height": SIDE} for i in range(1, COUNT + 1)]
    boxes = [
        {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [4, 4, 8 + i / 4, 8], "area": 64, "iscrowd": 0}
        for i in range(1, COUNT + 1)
    ]
    return {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}


def coco(change: Change = lambda data: None, source: str = "{coco: d/t.json}", **more: str) -> Build:
    """That file, changed, and the pictures that it names where they are plain names."""

    def build(folder: Path) -> None:
        for i in range(1, COUNT + 1):
            save(folder / "d" / f"{i:02}.png", i, (SIDE, SIDE))
        data = annotations()
        change(data)
        (folder / "d" / "t.json").write_text(json.dumps(data))
        config(folder, source, "detect", **more)

    return build


def each(key: str, change: Callable[[dict[str, Any]], Any], rows: str = "annotations") -> Build:
    """One key of each annotation (or image, or category) changed."""

    def of_all(data: dict[str, Any]) -> None:
        for row in data[rows]:
            row[key] = change(row)

    return coco(of_all)


def one(rows: str = "annotations", **values: Any) -> Build:
    """Some keys of the fourth annotation (or image) changed."""
    return coco(lambda data: data[rows][3].update(values))


def dropped(key: str, rows: str) -> Build:
    def drop(data: dict[str, Any]) -> None:
        for row in data[rows]:
            del row[key]

    return coco(drop)


def roboflow(data: dict[str, Any]) -> None:
    """Roboflow's: category 0 is the project's name, of which there is no box."""
    data["categories"] = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        *({**row, "supercategory": "pets"} for row in data["categories"]),
    ]


def via(data: dict[str, Any]) -> None:
    for row in data["images"]:
        row["id"] = str(row["id"])
    for row in data["annotations"]:
        row["image_id"] = str(row["image_id"])


def twice_listed(data: dict[str, Any]) -> None:
    data["images"].append({**data["images"][0], "id": 99})


def only_crowds(data: dict[str, Any]) -> None:
    for row in data["annotations"]:
        row |= {"iscrowd": 1, "segmentation": {"counts": [0, 64], "size": [SIDE, SIDE]}}


def one_crowd(data: dict[str, Any]) -> None:
    data["annotations"][3] |= {"iscrowd": 1, "segmentation": {"counts": "abc", "size": [SIDE, SIDE]}}


def segmented(data: dict[str, Any]) -> None:
    for row in data["annotations"]:
        row["segmentation"] = [[4, 4, 12, 4, 12, 12]]
        del row["bbox"]


def voc(
    change: Rewrite = lambda text, i: text, source: str = "{voc: d}", files: Callable[[Path], None] = lambda root: None
) -> Build:
    """VOC's folders of 16 pictures with one object each; each file's text is rewritten."""

    def build(folder: Path) -> None:
        root = folder / "d"
        (root / "Annotations").mkdir(parents=True)
        for i in range(COUNT):
            save(root / "JPEGImages" / f"{i:02}.png", i, (SIDE, SIDE))
            size = f"<size><width>{SIDE}</width><height>{SIDE}</height><depth>3</depth></size>"
            thing = f"<object><name>{('cat', 'dog')[i % 2]}</name><pose>Unspecified</pose>{BOX}</object>"
            text = f"<annotation><folder>d</folder><filename>{i:02}.png</filename>{size}{thing}</annotation>"
            (root / "Annotations" / f"{i:02}.xml").write_text(change(text, i))
        files(root)
        config(folder, source, "detect")

    return build


def swap(old: str, new: str, only: int | None = None) -> Build:
    """A piece of the text replaced in all files, or in one."""
    return voc(lambda text, i: text.replace(old, new) if only in (None, i) else text)


def lists(train: str, val: str = "") -> Callable[[Path], None]:
    def write(root: Path) -> None:
        folder = root / "ImageSets" / "Main"
        folder.mkdir(parents=True)
        (folder / "train.txt").write_text(train)
        if val:
            (folder / "val.txt").write_text(val)

    return write


NAMES = [f"{i:02}" for i in range(COUNT)]
ROB = "<robndbox><cx>8</cx><cy>8</cy><w>8</w><h>8</h><angle>0.3</angle></robndbox>"
LABELME = "<polygon><pt><x>4</x><y>4</y></pt><pt><x>12</x><y>4</y></pt><pt><x>12</x><y>12</y></pt></polygon>"
ATTRIBUTES = (
    "<occluded>1</occluded><attributes><attribute><name>rotation</name><value>0.0</value></attribute></attributes>"
)
FINE = ("check",)

COCO = {
    "coco: plain": Verdict(coco(), 0, "2 classes", FINE),
    "Roboflow: category 0 is the project": Verdict(
        coco(roboflow), 0, "no object of pets in train", finding="classes without an object in train"
    ),
    "Label Studio: images/ and a hash": Verdict(
        each("file_name", lambda row: f"images/1f3a-{row['file_name']}", "images"), 8, "No such file"
    ),
    "Label Studio: images\\ of Windows": Verdict(
        each("file_name", lambda row: f"images\\{row['file_name']}", "images"), 8, "has backslashes"
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
    "VIA: ids as texts": Verdict(coco(via), 8, "is no whole number"),
    "segmentation without bbox": Verdict(coco(segmented), 8, "bbox is not [x, y, width, height]"),
    "bbox of corners": Verdict(each("bbox", lambda row: [14, 14, 22, 22]), 8, "x1, y1, x2, y2"),
    "bbox of 0 to 1": Verdict(each("bbox", lambda row: [0.1, 0.1, 0.4, 0.4]), 8, "write them in pixels"),
    "bbox as text": Verdict(one(bbox="[4, 4, 8, 8]"), 8, "bbox is not [x, y, width, height]"),
    "bbox of negative size": Verdict(one(bbox=[12, 12, -8, -8]), 8, "of negative size"),
    "bbox of no area": Verdict(one(bbox=[4, 4, 0, 8]), 8, "a box of no area"),
    "bbox of no area, skipped": Verdict(
        coco(lambda data: data["annotations"][3].update(bbox=[4, 4, 0, 8]), bad_boxes="skip"),
        0,
        "1 boxes are left out",
        finding="a box of no area",
    ),
    "bbox that reaches out": Verdict(
        one(bbox=[18, 4, 10, 8]), 0, "are cut at their pictures' edges", finding="reaches out of its picture"
    ),
    "category unknown": Verdict(one(category_id=7), 8, "of category 7, which is not there"),
    "category_id as text": Verdict(one(category_id="1"), 8, "its category_id is the text '1'"),
    "image_id unknown": Verdict(one(image_id=77), 8, "of image 77, which is not there"),
    "images without size": Verdict(dropped("width", "images"), 8, "needs height and width"),
    "image size of another version": Verdict(one("images", width=48), 8, "its boxes are written for 48x24"),
    "an image listed twice": Verdict(coco(twice_listed), 8, "stands at image 1 already"),
    "folder of pictures missing": Verdict(
        coco(source="{coco: {train: d/t.json, pictures: images}}"), 8, "no such folder"
    ),
    "a picture missing": Verdict(one("images", file_name="99.png"), 8, "No such file"),
    "RLE crowd": Verdict(coco(one_crowd), 0, "2 classes", FINE),
    "ignore: 1, as CrowdHuman": Verdict(one(ignore=1), 0, "1 annotation(s) with `ignore` are objects like others"),
    "all are crowds": Verdict(coco(only_crowds), 2, "no training picture has a box"),
    "iscrowd as true": Verdict(one(iscrowd=True), 0, "2 classes", FINE),
    "no annotations yet": Verdict(coco(lambda data: data.update(annotations=[])), 2, "no training picture has a box"),
    "categories empty": Verdict(coco(lambda data: data.update(categories=[])), 8, "no categories"),
    "cat and Cat as categories": Verdict(
        each("name", lambda row: ("cat", "Cat")[row["id"] - 1], "categories"),
        0,
        "differ in writing alone",
        finding="'cat' = 'Cat'",
    ),
    "the same box twice": Verdict(
        coco(lambda data: data["annotations"].append({**data["annotations"][0], "id": 99})), 0, "the same box and class"
    ),
    "absolute file_name": Verdict(
        each("file_name", lambda row: f"/data/{row['file_name']}", "images"), 8, "is absolute"
    ),
    "coco_url only": Verdict(each("file_name", lambda row: f"http://x.org/{row['id']}.jpg", "images"), 8, "is a URL"),
    "a list of results": Verdict(
        lambda folder: (coco()(folder), (folder / "d" / "t.json").write_text("[]"))[0], 8, "not COCO's"
    ),
    "NaN in it": Verdict(one(area=float("nan")), 8, "NaN is no JSON"),
    "the labels are in val alone": Verdict(
        coco(source="{coco: {train: d/t.json, val: d/missing.json}}"), 8, "missing.json"
    ),
}

VOC = {
    "voc: plain": Verdict(voc(), 0, "2 classes", FINE),
    "LabelImg: absolute <path>": Verdict(
        swap("<size>", "<path>C:\\Users\\me\\d\\00.png</path><size>"), 0, "2 classes", FINE
    ),
    "LabelImg: <filename> without suffix": Verdict(
        voc(lambda text, i: text.replace(f"{i:02}.png", f"{i:02}")), 0, "name a picture that is not there"
    ),
    "LabelImg: one <filename> copied to all": Verdict(
        voc(lambda text, i: text.replace(f"{i:02}.png", "00.png")), 8, "a picture has one annotation file"
    ),
    "CVAT: attributes and occluded": Verdict(swap("</object>", f"{ATTRIBUTES}</object>"), 0, "2 classes", FINE),
    "Roboflow: names of another export": Verdict(
        voc(lambda text, i: text.replace(f"{i:02}.png", f"{i:02}_png.rf.0a1b.jpg")),
        0,
        "name a picture that is not there",
    ),
    "roLabelImg: rotated boxes": Verdict(swap(BOX, ROB), 8, "lacks a number for xmin"),
    "LabelMe: polygons and no boxes": Verdict(swap(BOX, LABELME), 8, "lacks a number for xmin"),
    "LabelMe: a polygon beside the box": Verdict(swap(BOX, BOX + LABELME), 0, "2 classes", FINE),
    "<Bndbox>": Verdict(swap("bndbox>", "Bndbox>", only=3), 8, "write <bndbox>"),
    "<objects> around them": Verdict(
        voc(lambda text, i: text.replace("<object>", "<objects><object>").replace("</object>", "</object></objects>")),
        0,
        "2 classes",
        FINE,
    ),
    "<box> for <bndbox>": Verdict(swap("bndbox>", "box>", only=3), 8, "lacks a number for xmin"),
    "<item> for <object>": Verdict(swap("object>", "item>", only=3), 8, "has a <bndbox> outside of any <object>"),
    "<obj> with attributes": Verdict(
        voc(
            lambda text, i: (
                text.replace(
                    text[text.index("<object>") : text.index("</annotation>")],
                    '<obj name="cat" x1="4" y1="4" x2="9" y2="9"/>',
                )
                if i == 3
                else text
            )
        ),
        8,
        "has a <obj> that may be an object",
    ),
    "xmin as attributes": Verdict(
        swap(BOX, '<bndbox xmin="4" ymin="4" xmax="12" ymax="12"/>'), 8, "lacks a number for xmin"
    ),
    "a default namespace": Verdict(
        swap("<annotation>", '<annotation xmlns="http://x.org/voc">', only=3), 8, "namespace"
    ),
    "a prefix's namespace": Verdict(
        voc(
            lambda text, i: (
                text.replace("<annotation>", '<annotation xmlns:v="urn:v">')
                .replace("<object>", "<v:object>")
                .replace("</object>", "</v:object>")
            )
        ),
        8,
        "namespace",
    ),
    "two <object> in one": Verdict(
        swap(BOX, f"{BOX}<object><name>cat</name>{BOX}</object>", only=3), 0, "the same box with another class"
    ),
    "<size> of 0": Verdict(swap(f"<width>{SIDE}</width>", "<width>0</width>"), 0, "2 classes", FINE),
    "<size> turned": Verdict(
        swap(f"<width>{SIDE}</width>", "<width>48</width>", only=3), 8, "its boxes are written for 48x24"
    ),
    "an empty file": Verdict(voc(lambda text, i: "" if i == 3 else text), 8, "not XML"),
    "an annotation without objects": Verdict(
        voc(lambda text, i: text.split("<object>")[0] + "</annotation>" if i == 3 else text), 0, "2 classes", FINE
    ),
    "no annotation has objects": Verdict(
        voc(lambda text, i: text.split("<object>")[0] + "</annotation>"), 2, "no training picture has a box"
    ),
    "all are difficult": Verdict(swap(BOX, f"<difficult>1</difficult>{BOX}"), 2, "no training picture has a box"),
    "difficult in val alone": Verdict(
        voc(
            lambda text, i: text.replace(BOX, f"<difficult>1</difficult>{BOX}") if i > 11 else text,
            files=lists("\n".join(NAMES[:12]), "\n".join(NAMES[12:])),
        ),
        0,
        "no object of cat, dog in val",
        finding="classes without an object in val",
    ),
    "XML without picture": Verdict(
        voc(files=lambda root: (root / "JPEGImages" / "03.png").unlink()), 8, "no picture '03.png'"
    ),
    "picture without XML": Verdict(
        voc(files=lambda root: (root / "Annotations" / "03.xml").unlink()), 0, "without an annotation file are left out"
    ),
    "a list that names what is not there": Verdict(voc(files=lists("\n".join([*NAMES, "99"]))), 8, "99"),
    "a list of paths": Verdict(
        voc(files=lists("\n".join(f"JPEGImages/{name}.png" for name in NAMES))), 0, "2 classes", FINE
    ),
    "a list of one class": Verdict(
        voc(files=lists("\n".join(f"{name} {(-1, 1)[i % 2]}" for i, name in enumerate(NAMES)))),
        8,
        "a list of one class",
    ),
    "lists in another folder": Verdict(
        voc(files=lambda root: (root / "train.txt").write_text("\n".join(NAMES[:12]))), 0, "d/train.txt: not read"
    ),
    "a list valid.txt beside train.txt": Verdict(
        voc(
            files=lambda root: (
                lists("\n".join(NAMES[:12]))(root),
                (root / "ImageSets/Main/valid.txt").write_text("15"),
            )
        ),
        0,
        "ImageSets/Main/valid.txt: not read",
    ),
    "trainval.txt of VOC2007 alone": Verdict(
        voc(
            files=lambda root: (
                lists("")(root),
                (root / "ImageSets/Main/train.txt").rename(root / "ImageSets/Main/trainval.txt"),
            )
        ),
        0,
        "ImageSets/Main/trainval.txt: not read",
    ),
    "trainval.txt beside train and val": Verdict(
        voc(
            files=lambda root: (
                lists("\n".join(NAMES[:12]), "\n".join(NAMES[12:]))(root),
                (root / "ImageSets/Main/trainval.txt").write_text("00"),
            )
        ),
        0,
        "2 classes",
        FINE,
    ),
    "a class in val alone": Verdict(
        voc(
            lambda text, i: text.replace("dog", "fox") if i > 11 else text,
            files=lists("\n".join(NAMES[:12]), "\n".join(NAMES[12:])),
        ),
        8,
        "'fox', not a class",
    ),
    "folders of other names": Verdict(
        voc(files=lambda root: (root / "JPEGImages").rename(root / "images")), 8, "no folder JPEGImages"
    ),
    "numbers with decimal commas": Verdict(swap("<xmin>4<", "<xmin>4,5<", only=3), 8, "lacks a number for xmin"),
}

INPUTS = COCO | VOC
