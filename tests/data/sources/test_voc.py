from __future__ import annotations

import re
from pathlib import Path

import pytest

from cnnrun.base.errors import DataError
from cnnrun.contracts.objects import DIFFICULT
from cnnrun.data.index import index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.data.settings import Data
from cnnrun.data.sources.voc import Voc
from tests.support.images import save_picture

BCCD = Path(__file__).parents[4] / "shared" / "data" / "bccd"
OBJECT = (
    "<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
    "<xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"
)


BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"


def write_annotated_image(root: Path, name: str, objects, size=(40, 30), picture=(40, 30), head="") -> None:
    """Write one image and its XML file; sizes are (width, height)."""
    save_picture(root / "JPEGImages" / f"{name}.png", seed=sum(map(ord, name)), size=picture)
    written = "".join(
        OBJECT.format(*box, name=label, difficult=int("difficult" in rest)) for label, box, *rest in objects
    )
    measured = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    path = root / "Annotations" / f"{name}.xml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{head}<annotation><filename>{name}.png</filename>{measured}{written}</annotation>")


def write_lists(root: Path, **splits) -> None:
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    for name, names in splits.items():
        (lists / f"{name}.txt").write_text("\n".join(names) + "\n")


@pytest.fixture
def two(tmp_path) -> Path:
    write_annotated_image(tmp_path, "a", [("dog", (1, 2, 11, 22)), ("cat", (5, 5, 40, 30))])
    write_annotated_image(tmp_path, "b", [])
    write_annotated_image(tmp_path, "c", [("cat", (0, 0, 9, 9), "difficult")])
    write_lists(tmp_path, train=["a", "b"], val=["c  1"])
    return tmp_path


def prepare(root: Path, **settings):
    data = Data.model_validate(
        {"source": {"voc": str(root)}, "image": {"size": [30, 40], "channels": 3}, "cache": "memory"} | settings
    )
    return build_dataset(data, index_source(data), lambda what, count: _Silent())


class _Silent:
    def __enter__(self):
        return lambda count: None

    def __exit__(self, *raised):
        pass


def test_voc_boxes_classes_and_split_lists_are_read(two):
    found = Voc(root=str(two)).read()
    assert found.classes == ("cat", "dog")
    train, val = found.splits["train"], found.splits["val"]
    assert train.objects.pad()["boxes"][0].tolist() == [[1, 2, 11, 22], [5, 5, 40, 30]]
    assert train.objects.pad()["objects"].tolist() == [[1, 0], [-1, -1]]  # the second image has no objects
    assert train.objects.pad()["areas"][0].tolist() == [200, 35 * 25]
    assert val.objects.pad()["roles"].tolist() == [[DIFFICULT]]
    assert train.sizes.tolist() == [[30, 40], [30, 40]]
    assert found.bad_boxes == ()


def test_difficult_objects_and_the_first_pixel_follow_the_settings(two):
    assert Voc(root=str(two), difficult="keep").read().splits["val"].objects.pad()["roles"].tolist() == [[0]]
    assert Voc(root=str(two), first_pixel=1).read().splits["train"].objects.pad()["boxes"][0, 0].tolist() == [
        0,
        1,
        11,
        22,
    ]


def test_any_list_can_be_a_split_and_without_lists_all_is_training(two):
    write_lists(two, mine=["b"], rest=["a", "c"])
    found = Voc(root=str(two), splits={"train": "rest", "test": "mine"}).read()
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 2, "test": 1}
    for path in (two / "ImageSets" / "Main").iterdir():
        path.unlink()
    assert {name: len(split) for name, split in Voc(root=str(two)).read().splits.items()} == {"train": 3}
    with pytest.raises(DataError, match="cannot be read"):
        Voc(root=str(two), splits={"train": "none"}).read()
    with pytest.raises(DataError, match="leaves the root"):
        Voc(root=str(two), splits={"train": "../../Annotations/a"}).read()


def test_common_ways_to_list_names_are_read_and_mistakes_refused(two):
    write_lists(two, train=["a.png", "b  -1"], val=["c"])
    assert len(Voc(root=str(two)).read().splits["train"]) == 2
    for names, words in (
        (["a", "a"], "lists 'a' twice"),
        (["a -1", "b 1"], "a list of one class"),
        ([], "lists no images"),
    ):
        write_lists(two, train=names)
        with pytest.raises(DataError, match=words):
            Voc(root=str(two)).read()


def test_two_annotation_files_for_one_image_are_refused(two):
    text = (two / "Annotations" / "a.xml").read_text()
    (two / "Annotations" / "b.xml").write_text(text)  # a copy that still names a.png
    with pytest.raises(DataError, match=r"b.xml: describes a.png, as a.xml does; an image has one annotation file"):
        Voc(root=str(two)).read()


def pictures_of(root: Path) -> list[str]:
    split = Voc(root=str(root)).read().splits["train"]
    return [Path(split.sample_name(number)).name for number in range(len(split))]


def replace_in_annotation(root: Path, name: str, old: str, new: str) -> None:
    path = root / "Annotations" / f"{name}.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("written", ["a.png", "JPEGImages/a.png", r"C:\\data\\a.png", " a.png\n"])
def test_the_image_is_the_one_named_in_the_annotation(two, written):
    save_picture(two / "JPEGImages" / "a.jpg", seed=3)  # another image of the same stem
    replace_in_annotation(two, "a", "a.png", written)
    assert pictures_of(two) == ["a.png", "b.png"]
    replace_in_annotation(two, "b", "b.png", "")
    (two / "JPEGImages" / "b.png").rename(two / "JPEGImages" / "b.PNG")
    assert pictures_of(two) == ["a.png", "b.PNG"]


def test_a_missing_named_image_falls_back_to_the_annotations_name_with_a_note(two, capsys):
    replace_in_annotation(two, "a", "a.png", "scan-17.tif")
    assert pictures_of(two) == ["a.png", "b.png"]
    assert "the <filename> of 1 annotation file is not there" in capsys.readouterr().err
    save_picture(two / "JPEGImages" / "a.jpg", seed=3)
    with pytest.raises(
        DataError, match=r"a.xml: its <filename> 'scan-17.tif' is not there, and several .* a.jpg and a.png;"
    ):
        pictures_of(two)


def test_images_without_an_annotation_file_are_counted(tmp_path, capsys):
    write_annotated_image(tmp_path, "a", [("dog", (1, 2, 11, 22))])
    for name in ("b.png", "c.JPG", "._a.png", "Thumbs.db"):
        save_picture(tmp_path / "JPEGImages" / "x.png", seed=1)
        (tmp_path / "JPEGImages" / "x.png").rename(tmp_path / "JPEGImages" / name)
    (tmp_path / "Annotations" / "._a.xml").write_bytes(b"\0\5\x16\7")  # as macOS leaves them in archives
    (tmp_path / "Annotations" / "a.xml").rename(tmp_path / "Annotations" / "a.XML")
    assert pictures_of(tmp_path) == ["a.png"]
    assert "left out 2 images without an annotation file" in capsys.readouterr().err


def test_a_missing_size_is_read_from_the_image(tmp_path):
    write_annotated_image(tmp_path, "a", [("dog", (1, 2, 11, 22))], size=None)
    assert Voc(root=str(tmp_path)).read().splits["train"].sizes.tolist() == [[30, 40]]


@pytest.mark.parametrize(
    ("box", "words", "kept"),
    [
        ((5, 5, 5, 9), r"a box of no area \(5, 5, 5, 9\)", False),
        ((9, 5, 5, 9), "corners swapped", False),
        ((41, 5, 50, 9), "outside its image of 40x30", False),
        (("nan", 5, 9, 9), "that is not finite", False),
        ((30, 5, 45, 9), "reaches out of its image of 40x30", True),
    ],
)
def test_bad_boxes_are_named_with_file_and_object(tmp_path, box, words, kept):
    write_annotated_image(tmp_path, "a", [("dog", (1, 2, 11, 22)), ("dog", box)])
    write_annotated_image(tmp_path, "b", [("dog", (3, 3, 20, 20 + i)) for i in range(3)])
    write_lists(tmp_path, train=["a", "b"])
    (bad,) = Voc(root=str(tmp_path)).read().bad_boxes
    import re

    assert bad.name.endswith("a.xml: object 2")
    assert re.search(words, bad.problem)
    assert bad.is_used is kept
    if kept:
        assert any("1 box is cut at the edges of the image" in note for note in prepare(tmp_path).notes)
        return
    with pytest.raises(DataError, match=r"a.xml: object 2: .*"):
        prepare(tmp_path)
    dataset = prepare(tmp_path, bad_boxes="skip")
    assert (dataset.splits["train"].objects.pad()["objects"] >= 0).sum() in (3, 4)  # one image is in val
    assert any("left out (data.bad_boxes: skip), such as" in note for note in dataset.notes)


def test_an_annotated_size_unlike_the_images_is_refused(tmp_path):
    write_annotated_image(tmp_path, "a", [("dog", (1, 2, 11, 22))])
    write_annotated_image(tmp_path, "b", [("dog", (1, 2, 11, 22))], size=(30, 40))
    write_lists(tmp_path, train=["a", "b"])
    with pytest.raises(DataError, match=r"b.png: is 40x30 pixels; its boxes are written for 30x40"):
        prepare(tmp_path, cache="disk", cache_dir=str(tmp_path / "cache"))


def test_two_images_of_the_annotations_name_need_a_filename(tmp_path):
    write_annotated_image(tmp_path, "a", [("dog", (1, 2, 11, 22))])
    (tmp_path / "JPEGImages" / "a.jpg").write_bytes((tmp_path / "JPEGImages" / "a.png").read_bytes())
    several = "and several images have the annotation's own name: a.jpg and a.png; write one of them into <filename>"
    for filename, problem in (
        ("", "has no <filename>"),
        ("<filename>b.png</filename>", "its <filename> 'b.png' is not there"),
    ):
        (tmp_path / "Annotations" / "a.xml").write_text(f"<annotation>{filename}</annotation>")
        with pytest.raises(DataError, match=re.escape(f"a.xml: {problem}, {several}")):
            Voc(root=str(tmp_path)).read()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<annotation>", "not XML"),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><annotation/>", "declares a document type"),
        ("<annotation><filename>none.png</filename></annotation>", "no image 'none.png'"),
        ("<annotation><object><bndbox/></object></annotation>", "an object without a name"),
        ("<annotation><object><name>x</name></object></annotation>", "needs numbers for xmin"),
        ("<annotation><size><width>a</width></size></annotation>", "a size that is not a number"),
        ("<annotation><size><width>1_0</width></size></annotation>", "a size that is not a number"),
        (f"<annotation><size><width>{'9' * 30}</width><height>4</height></size></annotation>", "an image of 1"),
        ('<?xml version="1.0" encoding="GB2312"?><annotation/>', "not XML in UTF-8"),
        ('<?xml version="1.0" encoding="foo"?><annotation/>', "not XML in UTF-8"),
        (
            "<annotation><object><name>x</name><difficult>5</difficult>" + BOX + "</object></annotation>",
            "difficult is '5'",
        ),
        (f"<annotation><filename>{'none.png' * 100}</filename></annotation>", "no image 'none.png"),
        ("<annotations/>", "is a <annotations> and not an <annotation>"),
        ('<annotation xmlns="urn:x"/>', r"in a namespace \(urn:x\)"),
        ('<annotation><a:object xmlns:a="urn:x"/></annotation>', "in a namespace"),
        (f"<annotation><Object><name>x</name>{BOX}</Object></annotation>", "has <Object>, which is not read"),
        ("<Annotation/>", "has <Annotation>, which is not read; write <annotation>"),
        (f"<annotation><object><NAME>x</NAME>{BOX}</object></annotation>", "has <NAME>"),
        (f"<annotation><object><name>x</name>{BOX}{BOX}</object></annotation>", "more than one <bndbox>"),
        (f"<annotation><object><name>x</name><name>y</name>{BOX}</object></annotation>", "more than one <name>"),
        (f"<annotation>{BOX}</annotation>", "has a <bndbox> outside of any <object>"),
        (f"<annotation><item><name>x</name>{BOX}</item></annotation>", "has a <bndbox> outside of any <object>"),
        (
            "<annotation><item><a>1</a><b>2</b><c>3</c><d>4</d></item></annotation>",
            "has a <item> that may be an object",
        ),
    ],
)
def test_invalid_annotation_files_are_refused(tmp_path, text, words):
    write_annotated_image(tmp_path, "a", [("dog", (1, 2, 11, 22))])
    (tmp_path / "Annotations" / "a.xml").write_text(text)
    if "none.png" in text:
        (tmp_path / "JPEGImages" / "a.png").unlink()
    with pytest.raises(DataError, match=words) as refused:
        Voc(root=str(tmp_path)).read()
    assert "a.xml" in refused.value.lines[0]


def test_a_class_missing_from_training_is_refused(two):
    write_annotated_image(two, "d", [("cow", (1, 2, 11, 22))])
    write_lists(two, val=["d"])
    with pytest.raises(DataError, match=r"d.xml: object 1 is a 'cow', which is not a class"):
        Voc(root=str(two)).read()


@pytest.mark.skipif(not BCCD.is_dir(), reason="the blood-cell set is not here (../shared/data/bccd)")
def test_the_blood_cell_dataset_is_read():
    found = Voc(root=str(BCCD)).read()
    assert found.classes == ("Platelets", "RBC", "WBC")
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 205, "val": 87, "test": 72}
    assert sum(int((split.objects.pad()["objects"] >= 0).sum()) for split in found.splits.values()) == 4888 - 2
    assert sorted(bad.name.rpartition("/")[2] for bad in found.bad_boxes) == [
        "BloodImage_00338.xml: object 13", "BloodImage_00343.xml: object 4",
    ]  # fmt: skip


def test_check_refuses_bad_boxes_as_training_does(tmp_path, run_cli):
    write_annotated_image(tmp_path, "a", [("dog", (5, 5, 5, 9)), ("dog", (5, 5, 9, 9))])
    for name in "bcdefghij":
        write_annotated_image(tmp_path, name, [("dog", (5, 5, 9, 9))])
    config = tmp_path / "c.yaml"
    config.write_text(
        f"task: detect\ndata: {{source: {{voc: '{tmp_path}'}}, image: {{size: 16, channels: 3}}}}\n"
        "model: [{conv: 4}]\n"
    )
    code, _, err = run_cli("check", config)
    assert code == 8
    assert "a.xml: object 1: a box of no area (5, 5, 5, 9)" in err
    assert "data.bad_boxes: skip" in err


def test_other_folder_names_and_a_folder_for_each_split_give_the_same_samples(two, tmp_path):
    import shutil

    expected = Voc(root=str(two)).read()
    other = tmp_path / "other"
    for split, names in (("train", "ab"), ("valid", "c")):
        for name in names:
            (other / split).mkdir(parents=True, exist_ok=True)
            shutil.copy(two / "JPEGImages" / f"{name}.png", other / split)
            shutil.copy(two / "Annotations" / f"{name}.xml", other / split)
    folders = {"train": "train", "val": "valid"}
    found = Voc(root=str(other), annotations=folders, images=folders).read()
    assert found.classes == expected.classes
    for split, part in expected.splits.items():
        names = [Path(str(part.images[row])).name for row in range(len(part))]
        assert [Path(str(found.splits[split].images[row])).name for row in range(len(part))] == names
        for column, values in part.objects.columns.items():
            assert values.equal(found.splits[split].objects.columns[column])
    shutil.move(two / "Annotations", two / "labels")
    shutil.move(two / "JPEGImages", two / "photos")
    moved = Voc(root=str(two), annotations="labels", images="photos").read()
    assert moved.splits["train"].objects.columns["objects"].equal(expected.splits["train"].objects.columns["objects"])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"annotations": "absent"}, "no folder absent"),
        ({"annotations": "../elsewhere"}, "leaves the root with"),
        ({"annotations": {"train": "Annotations"}}, "give both annotations and images"),
        ({"annotations": {"val": "a"}, "images": {"val": "a"}}, "give both annotations and images"),
        ({"annotations": {"train": "a"}, "images": {"train": "a", "val": "b"}}, "name different splits"),
        (
            {"annotations": {"train": "a"}, "images": {"train": "a"}, "splits": {"train": "train"}},
            "splits are lists of one folder",
        ),
    ],
)
def test_wrong_folders_are_refused(two, settings, problem):
    with pytest.raises((DataError, ValueError), match=problem):
        Voc(root=str(two), **settings).read()
