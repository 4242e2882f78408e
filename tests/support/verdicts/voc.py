"""VOC XML files as LabelImg, CVAT, Roboflow, LabelMe and others write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.verdicts.three_commands import Build, Verdict, save_square, write_config

COUNT, SIDE = 16, 24
Rewrite = Callable[[str, int], str]
BOX = "<bndbox><xmin>4</xmin><ymin>4</ymin><xmax>12</xmax><ymax>12</ymax></bndbox>"


def voc(
    change: Rewrite = lambda text, i: text, source: str = "{voc: d}", files: Callable[[Path], None] = lambda root: None
) -> Build:
    """VOC folders of 16 images with one object each. The text of each file is rewritten."""

    def build(folder: Path) -> None:
        root = folder / "d"
        (root / "Annotations").mkdir(parents=True)
        for i in range(COUNT):
            save_square(root / "JPEGImages" / f"{i:02}.png", i, (SIDE, SIDE))
            size = f"<size><width>{SIDE}</width><height>{SIDE}</height><depth>3</depth></size>"
            thing = f"<object><name>{('cat', 'dog')[i % 2]}</name><pose>Unspecified</pose>{BOX}</object>"
            text = f"<annotation><folder>d</folder><filename>{i:02}.png</filename>{size}{thing}</annotation>"
            (root / "Annotations" / f"{i:02}.xml").write_text(change(text, i))
        files(root)
        write_config(folder, source, "detect")

    return build


def swap(old: str, new: str, only: int | None = None) -> Build:
    """Replace a text in all files, or only in one."""
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

INPUTS = {
    "voc: plain": Verdict(voc(), 0, "2 classes", FINE),
    "LabelImg: absolute <path>": Verdict(
        swap("<size>", "<path>C:\\Users\\me\\d\\00.png</path><size>"), 0, "2 classes", FINE
    ),
    "LabelImg: <filename> without suffix": Verdict(
        voc(lambda text, i: text.replace(f"{i:02}.png", f"{i:02}")),
        0,
        "the annotation's own name is used",
    ),
    "LabelImg: one <filename> copied to all": Verdict(
        voc(lambda text, i: text.replace(f"{i:02}.png", "00.png")), 8, "an image has one annotation file"
    ),
    "CVAT: attributes and occluded": Verdict(swap("</object>", f"{ATTRIBUTES}</object>"), 0, "2 classes", FINE),
    "Roboflow: names of another export": Verdict(
        voc(lambda text, i: text.replace(f"{i:02}.png", f"{i:02}_png.rf.0a1b.jpg")),
        0,
        "the annotation's own name is used",
    ),
    "roLabelImg: rotated boxes": Verdict(swap(BOX, ROB), 8, "needs numbers for xmin"),
    "LabelMe: polygons and no boxes": Verdict(swap(BOX, LABELME), 8, "needs numbers for xmin"),
    "LabelMe: a polygon beside the box": Verdict(swap(BOX, BOX + LABELME), 0, "2 classes", FINE),
    "<Bndbox>": Verdict(swap("bndbox>", "Bndbox>", only=3), 8, "write <bndbox>"),
    "<objects> around them": Verdict(
        voc(lambda text, i: text.replace("<object>", "<objects><object>").replace("</object>", "</object></objects>")),
        0,
        "2 classes",
        FINE,
    ),
    "<box> for <bndbox>": Verdict(swap("bndbox>", "box>", only=3), 8, "needs numbers for xmin"),
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
        swap(BOX, '<bndbox xmin="4" ymin="4" xmax="12" ymax="12"/>'), 8, "needs numbers for xmin"
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
        voc(lambda text, i: text.split("<object>")[0] + "</annotation>"), 8, "no training image has a box"
    ),
    "all are difficult": Verdict(swap(BOX, f"<difficult>1</difficult>{BOX}"), 8, "no training image has a box"),
    "difficult in val alone": Verdict(
        voc(
            lambda text, i: text.replace(BOX, f"<difficult>1</difficult>{BOX}") if i > 11 else text,
            files=lists("\n".join(NAMES[:12]), "\n".join(NAMES[12:])),
        ),
        8,
        "the val split: no image has an object",
    ),
    "XML without picture": Verdict(
        voc(files=lambda root: (root / "JPEGImages" / "03.png").unlink()), 8, "no image '03.png'"
    ),
    "picture without XML": Verdict(
        voc(files=lambda root: (root / "Annotations" / "03.xml").unlink()),
        0,
        "left out 1 image without an annotation file",
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
        "'fox', which is not a class",
    ),
    "folders of other names": Verdict(
        voc(files=lambda root: (root / "JPEGImages").rename(root / "images")), 8, "no folder JPEGImages"
    ),
    "numbers with decimal commas": Verdict(swap("<xmin>4<", "<xmin>4,5<", only=3), 8, "needs numbers for xmin"),
}
