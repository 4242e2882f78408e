"""`init` reads data of every kind and layout, says why, and asks where it is not clear."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cnnrun.base.errors import ConfigError, DataError
from cnnrun.data.index import index_source
from cnnrun.data.settings import Data
from cnnrun.experiment.init.layouts import guess_data
from cnnrun.experiment.init.reading import Reading, Request
from cnnrun.experiment.init.survey import survey_source
from cnnrun.experiment.init.table_layouts import _find_separator
from tests.support.images import save_class_folders, save_picture

XML = (
    "<annotation><filename>{name}</filename><size><width>40</width><height>30</height></size><object><name>{label}"
    "</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>22</ymax></bndbox></object></annotation>"
)


def read(path: Path, task: str | None = None, label: list[str] | None = None) -> Reading:
    """The reading of some data, whose source must be readable and fit its task."""
    reading = guess_data(str(path), Request(task, label))
    index = index_source(Data.model_validate({"source": reading.source, "split": {"val": 0.0, "test": 0.0}}))
    assert index.counts["train"] > 0
    return reading


def write_table(path: Path, header: list[str] | None, rows: list[list[object]], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(([header] if header else []) + rows)
    return path


def pictures(folder: Path, count: int = 12, suffix: str = ".png", size: tuple[int, int] = (40, 30)) -> list[str]:
    return [save_picture(folder / f"p{number}{suffix}", seed=number, size=size).name for number in range(count)]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_class_folders_with_and_without_splits_and_inside_a_folder(tmp_path):
    for place in ("a", "b/train", "b/valid", "c/archive"):
        save_class_folders(tmp_path / place)
    (tmp_path / "c" / "README.md").write_text("hello")
    for name in "abc":
        reading = read(tmp_path / name)
        assert reading.task == "classify"
        assert "folders of images are the classes" in reading.describe()
        assert "if it is not: --task verify" in reading.describe()
    assert read(tmp_path / "c").source == {"folder": str(tmp_path / "c" / "archive")}


def test_many_small_folders_raise_the_question_of_verification(tmp_path):
    for person in range(12):
        for number in range(4):
            save_picture(tmp_path / f"s{person}" / f"{number}.png", seed=10 * person + number)
    (question,) = read(tmp_path).questions
    assert "12 folders of about 4 images: are they people" in question
    reading = read(tmp_path, "verify")
    assert (reading.task, reading.questions) == ("verify", ())


def test_folders_of_folders_and_odd_splits_are_refused_with_what_to_give(tmp_path):
    for group in ("x", "y"):
        save_class_folders(tmp_path / "deep" / group)
    with pytest.raises(DataError, match=r"give init one of them: .*deep/x, .*deep/y"):
        read(tmp_path / "deep")
    pictures(tmp_path / "odd" / "images")
    pictures(tmp_path / "odd" / "test")
    with pytest.raises(DataError) as refused:
        read(tmp_path / "odd")
    assert "task: ..." in refused.value.lines[1]
    with pytest.raises(DataError, match="no such file or folder"):
        read(tmp_path / "nowhere")


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "task", "setting"),
    [
        (lambda n: [["cat", "dog"][n % 2]], "classify", {"label": "what"}),
        (lambda n: [n * 1.5], "regress", {"numbers": ["what"]}),
        (lambda n: [f"{n}"[-1]], "classify", {"label": "what"}),
        (lambda n: [1990 + n], "regress", {"numbers": ["what"]}),
        (lambda n: [["red;big", "red", "big;old", "old"][n % 4]], "multilabel", {"labels": "what"}),
        (lambda n: [["red, big", "red", "big, old", "old"][n % 4]], "multilabel", {"labels": "what", "separator": ","}),
        (lambda n: [["red|big", "red", "big|old", "old"][n % 4]], "multilabel", {"labels": "what", "separator": "|"}),
        (lambda n: [["red big", "red", "big old", "old"][n % 4]], "multilabel", {"labels": "what", "separator": " "}),
        (lambda n: [["hot dog", "ice cream"][n % 2]], "classify", {"label": "what"}),
    ],
)
def test_a_column_is_read_by_what_it_holds(cells, task, setting, tmp_path):
    rows = [[name, *cells(number)] for number, name in enumerate(pictures(tmp_path, 40))]
    reading = read(write_table(tmp_path / "t.csv", ["file", "what"], rows))
    table = reading.source["table"]
    assert reading.task == task
    assert {key: table[key] for key in setting} == setting
    assert "because" in reading.describe()


def test_columns_of_zeros_and_ones_are_one_label_or_a_set(tmp_path):
    names = pictures(tmp_path)
    single = [[name, n % 2, 1 - n % 2] for n, name in enumerate(names)]
    reading = read(write_table(tmp_path / "a.csv", ["f", "cat", "dog"], single))
    assert (reading.task, reading.source["table"]["label"]) == ("classify", ["cat", "dog"])
    assert read(tmp_path / "a.csv", "multilabel").source["table"]["labels"] == ["cat", "dog"]
    sets = [[name, n % 2, n % 3 == 0] for n, name in enumerate(names)]
    reading = read(write_table(tmp_path / "b.csv", ["f", "cat", "dog"], sets))
    assert (reading.task, reading.source["table"]["labels"]) == ("multilabel", ["cat", "dog"])


def test_several_numbers_are_regressed_together_and_an_index_is_left_out(tmp_path):
    rows = [[n, name, n / 7, 3 - n / 5] for n, name in enumerate(pictures(tmp_path))]
    reading = read(write_table(tmp_path / "t.csv", ["", "image", "x", "y"], rows))
    assert reading.source["table"]["numbers"] == ["x", "y"]
    assert "column '' only numbers the rows" in reading.notes


@pytest.mark.parametrize("gap", ["", "n/a"])
def test_a_gap_in_a_column_of_numbers_is_named(gap, tmp_path):
    names = pictures(tmp_path, count=30)
    rows = [[name, gap if number == 7 else number * 0.37] for number, name in enumerate(names)]
    table = write_table(tmp_path / "t.csv", ["file", "age"], rows)
    for task, label in ((None, None), ("regress", None), ("regress", ["age"]), (None, ["age"])):
        with pytest.raises(
            DataError, match=rf"t\.csv:9: column 'age' holds numbers, but '{gap}' here \(1 of 30 rows\)"
        ):
            read(table, task, label)
    assert guess_data(str(table), Request("classify", ["age"])).task == "classify"


def test_the_user_chooses_columns_and_task(tmp_path):
    rows = [[name, ["a", "b"][n % 2], n % 3, n / 3] for n, name in enumerate(pictures(tmp_path, 20))]
    table = write_table(tmp_path / "t.csv", ["image", "label", "grade", "weight"], rows)
    assert read(table).source["table"]["label"] == "label"
    assert read(table, None, ["grade"]).source["table"]["label"] == "grade"
    assert read(table, "regress", ["grade"]).source["table"]["numbers"] == ["grade"]
    assert read(table, None, ["grade", "weight"]).source["table"]["numbers"] == ["grade", "weight"]
    with pytest.raises(ConfigError, match=r"--label wieght: .* did you mean 'weight'"):
        read(table, None, ["wieght"])
    with pytest.raises(DataError, match="column 'label' holds no numbers"):
        read(table, "regress", ["label", "weight"])
    with pytest.raises(ConfigError, match="--task segment: this data serves classify"):
        read(table, "segment")


def test_a_table_that_is_not_clear_is_asked_about(tmp_path):
    rows = [[name, ["a", "b"][n % 2], ["c", "d", "e"][n % 3]] for n, name in enumerate(pictures(tmp_path))]
    with pytest.raises(DataError, match="which column is to be learned") as refused:
        read(write_table(tmp_path / "t.csv", ["image", "shape", "colour"], rows))
    assert refused.value.lines[1].startswith("say it: --label COLUMN")
    rows = [[name, f"name {n}"] for n, name in enumerate(pictures(tmp_path))]
    with pytest.raises(DataError, match="12 different values in 12 rows, too many to be classes"):
        read(write_table(tmp_path / "u.csv", ["image", "label"], rows))


def test_paths_are_found_in_near_folders_absolute_or_without_suffix(tmp_path):
    names = pictures(tmp_path / "data" / "img")
    labels = [["a", "b"][n % 2] for n in range(len(names))]
    rows = [list(row) for row in zip(names, labels, strict=True)]
    beside = write_table(tmp_path / "data" / "t.csv", ["image", "label"], rows)
    elsewhere = write_table(tmp_path / "data" / "meta" / "t.csv", ["image", "label"], rows)
    for table in (beside, elsewhere):
        assert Path(read(table).source["table"]["root"]).resolve() == tmp_path / "data" / "img"
    absolute = [[tmp_path / "data" / "img" / name, label] for name, label in rows]
    reading = read(write_table(tmp_path / "absolute" / "t.csv", ["image", "label"], absolute))
    assert reading.source["table"]["root"] == "/"
    ids = [[name.removesuffix(".png"), label] for name, label in rows]
    reading = read(write_table(tmp_path / "data" / "ids.csv", ["id", "label"], ids))
    assert (reading.source["table"]["image"], reading.source["table"]["suffix"]) == ("id", ".png")
    unnamed = write_table(tmp_path / "data" / "unnamed.csv", None, rows)
    assert read(unnamed, None, ["column_2"]).source["table"]["columns"] == ["image", "column_2"]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=4), st.sampled_from([";", "|", ","]), st.data())
@settings(max_examples=60, deadline=None)
def test_the_separator_of_lists_is_found(labels, mark, data):
    sets = data.draw(st.lists(st.lists(st.sampled_from(labels), unique=True, min_size=1), min_size=3, max_size=9))
    cells = [f"{mark} ".join(part) for part in sets]
    found = _find_separator(cells)
    assert found in (mark, None)
    parts = [part for members in sets if len(members) > 1 for part in members]
    if found is None and parts:  # too little repeats to be sure
        distinct = {tuple(members) for members in sets}
        repeated = [part for part in parts if sum(part in members for members in distinct) > 1]
        assert len(repeated) <= 0.5 * len(parts) or len({p for s in distinct for p in s}) >= len(distinct)


# --- boxes ------------------------------------------------------------------------------------------------------------


def coco(names: list[str], folder: str = "") -> dict[str, object]:
    return {
        "images": [
            {"id": n, "file_name": f"{folder}{name}", "width": 40, "height": 30} for n, name in enumerate(names)
        ],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [2, 3, 18, 19], "area": 342, "iscrowd": 0}
            for n in range(len(names))
        ],
        "categories": [{"id": 1, "name": "dog"}],
    }


@pytest.mark.parametrize(
    ("annotations", "images", "prefix"),
    [
        ({"train": "annotations/instances_train2017.json", "val": "annotations/instances_val2017.json"}, "{0}2017", ""),
        ({"train": "train/_annotations.coco.json", "val": "valid/_annotations.coco.json"}, None, ""),
        ({"train": "annotations/instances_default.json"}, "images", ""),
        ({"train": "result.json"}, "images", "images/"),
    ],
    ids=["coco", "roboflow", "cvat", "label-studio"],
)
def test_coco_files_are_found_where_tools_write_them(annotations, images, prefix, tmp_path):
    for split, name in annotations.items():
        file = tmp_path / name
        folder = file.parent if images is None else tmp_path / images.format(split)
        names = pictures(folder, 4 if split == "train" else 2, ".jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(coco(names, prefix)))
    (tmp_path / "captions.json").write_text(json.dumps({"images": [], "annotations": [{}], "categories": [1]}))
    reading = read(tmp_path)
    assert reading.task == "detect"
    assert {split for split in ("train", "val") if split in reading.source["coco"]} == set(annotations)
    for task, give in (("multilabel", "presence"), ("regress", "counts")):
        assert read(tmp_path, task).source["coco"]["give"] == give


@pytest.mark.parametrize(
    "folders",
    [("Annotations", "JPEGImages"), ("xml", "photos"), (".", "."), ("annots", ".")],
    ids=["voc", "other names", "one folder", "images above"],
)
def test_voc_files_are_found_under_any_folder_names(folders, tmp_path):
    annotations, images = (tmp_path / name for name in folders)
    for name in pictures(images, 5, ".jpg"):
        annotations.mkdir(exist_ok=True)
        (annotations / f"{Path(name).stem}.xml").write_text(XML.format(name=name, label="dog"))
    reading = read(tmp_path)
    assert reading.task == "detect"
    assert "5 XML files describe the objects of images" in reading.reason


def test_voc_with_a_folder_for_each_split(tmp_path):
    for split in ("train", "valid", "test"):
        for name in pictures(tmp_path / split, 3, ".jpg"):
            (tmp_path / split / f"{Path(name).stem}.xml").write_text(XML.format(name=name, label="dog"))
    folders = {"train": "train", "val": "valid", "test": "test"}
    assert read(tmp_path).source["voc"] == {"root": str(tmp_path), "annotations": folders, "images": folders}


@pytest.mark.parametrize("has_description", [True, False])
def test_polygons_of_yolo_can_be_masks(has_description, tmp_path):
    for name in pictures(tmp_path / "images", count=6):
        labels = tmp_path / "labels" / f"{Path(name).stem}.txt"
        labels.parent.mkdir(exist_ok=True)
        labels.write_text("0 0.1 0.1 0.6 0.1 0.3 0.7\n")
    if has_description:
        (tmp_path / "data.yaml").write_text("train: images\nnames: [cell]\n")
    assert "--task segment" in read(tmp_path).describe()
    assert read(tmp_path, "segment").source["yolo"]["give"] == "masks"
    for file in (tmp_path / "labels").glob("*.txt"):
        file.write_text("0 0.5 0.5 0.2 0.2\n")
    assert "--task segment" not in read(tmp_path).describe()
    with pytest.raises(ConfigError, match="--task segment: not all objects have polygons"):
        read(tmp_path, "segment")


def test_other_text_files_near_the_labels_of_yolo_do_no_harm(tmp_path):
    """Below a folder named labels, in one, and with labels beside the images."""
    root = tmp_path / "labels" / "set"
    for number, folder in enumerate(("images", "train/images")):
        for name in pictures(root / str(number) / folder, count=3):
            labels = root / str(number) / folder.replace("images", "labels") / f"{Path(name).stem}.txt"
            labels.parent.mkdir(exist_ok=True)
            labels.write_text("0 0.1 0.1 0.6 0.1 0.3 0.7\n")
        (root / str(number) / folder.replace("images", "labels") / "notes.txt").write_bytes(b"caf\xe9")
        (root / str(number) / "README.roboflow.txt").write_bytes(b"caf\xe9 5")
        (root / str(number) / "data.yaml").write_text(f"train: {folder}\nnames: [cell]\n")
        assert "--task segment" in read(root / str(number)).describe()


def test_yolo_with_a_data_yaml_without_and_with_a_list_of_classes(tmp_path):
    def write(root: Path, prefix: str = "") -> None:
        for name in pictures(root / prefix / "images", 4):
            labels = root / prefix / "labels" / f"{Path(name).stem}.txt"
            labels.parent.mkdir(exist_ok=True)
            labels.write_text("1 0.5 0.5 0.4 0.4\n")

    write(tmp_path / "a")
    (tmp_path / "a" / "data.yaml").write_text("train: images\nnames: [cat, dog]\n")
    assert read(tmp_path / "a").source == {"yolo": {"path": str(tmp_path / "a" / "data.yaml")}}
    write(tmp_path / "b")
    (tmp_path / "b" / "classes.txt").write_text("cat\ndog\n")
    assert read(tmp_path / "b").source["yolo"]["classes"] == ["cat", "dog"]
    write(tmp_path / "c", "train")
    write(tmp_path / "c", "valid")
    reading = read(tmp_path / "c")
    assert reading.source["yolo"]["classes"] == ["class_0", "class_1"]
    assert "rename class_0" in reading.notes[0]


# --- masks ------------------------------------------------------------------------------------------------------------


def save_masks(images: Path, masks: Path, values: list[int], suffix: str = "", kind: str = ".jpg") -> None:
    rng = np.random.default_rng(0)
    masks.mkdir(parents=True, exist_ok=True)
    for name in pictures(images, 6, kind):
        pixels = rng.choice(values, (30, 40)).astype(np.uint8)
        pixels.flat[: len(values)] = values
        Image.fromarray(pixels).save(masks / f"{Path(name).stem}{suffix}.png")


@pytest.mark.parametrize(
    ("images", "masks", "suffix", "kind"),
    [
        ("images", "masks", "", ".jpg"),
        ("photos", "annotations", "", ".jpg"),
        ("all", "all", "", ".jpg"),
        ("all", "all", "_mask", ".png"),
        ("images", "labels", "_gt", ".png"),
    ],
)
def test_masks_are_found_beside_images_or_in_a_folder_of_their_own(images, masks, suffix, kind, tmp_path):
    save_masks(tmp_path / images, tmp_path / masks, [0, 1, 2], suffix, kind)
    reading = read(tmp_path)
    source = reading.source["masks"]
    assert reading.task == "segment"
    assert source["classes"] == ["background", "class_1", "class_2"]
    assert source.get("mask_suffix", "") == suffix


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 255], {"classes": ["background", "object"], "values": [0, 255], "ignore": []}),
        ([0, 1, 255], {"classes": ["background", "class_1"]}),
        ([0, 7, 9], {"classes": ["background", "class_7", "class_9"], "values": [0, 7, 9]}),
    ],
)
def test_the_values_of_masks_become_classes(values, expected, tmp_path):
    save_masks(tmp_path / "images", tmp_path / "masks", values)
    source = read(tmp_path).source["masks"]
    assert {key: source[key] for key in ("classes", "values", "ignore") if key in source} == expected


def test_masks_with_a_folder_for_each_split(tmp_path):
    for split in ("train", "val"):
        save_masks(tmp_path / split / "images", tmp_path / split / "masks", [0, 1])
    source = read(tmp_path).source["masks"]
    assert set(source["images"]) == set(source["masks"]) == {"train", "val"}


def save_coloured_masks(root: Path, colours: list[tuple[int, int, int]]) -> None:
    for number in range(6):
        save_picture(root / "images" / f"{number}.jpg", seed=number, size=(12, 10))
        pixels = np.array(colours, np.uint8)[np.random.default_rng(number).integers(0, len(colours), (10, 12))]
        (root / "masks").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "masks" / f"{number}.png")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("class_dict.csv", "name,r,g,b\nsky,0,0,0\nold road,255,128,0\nunused,1,2,3\n"),
        ("label_colors.txt", "0 0 0\tsky\n255 128 0\told road\n"),
        ("labels.txt", "sky 0 0 0\nold road 255 128 0\n"),
    ],
)
def test_colours_of_masks_have_the_names_of_a_list(name, text, tmp_path):
    save_coloured_masks(tmp_path, [(0, 0, 0), (255, 128, 0)])
    (tmp_path / name).write_text(text)
    reading = read(tmp_path)
    source = reading.source["masks"]
    assert (source["classes"], source["colours"]) == (["sky", "old road"], ["#000000", "#ff8000"])
    assert name in reading.notes[0]


def test_colours_of_masks_without_names_are_said(tmp_path):
    save_coloured_masks(tmp_path, [(0, 0, 0), (255, 128, 0)])
    reading = read(tmp_path)
    assert reading.source["masks"]["classes"] == ["background", "class_ff8000"]
    assert reading.notes[0] == "the masks have the colours #000000, #ff8000: name the classes"


def test_pictures_in_the_place_of_masks_are_refused(tmp_path):
    pictures(tmp_path / "images", 6, ".jpg")
    for name in pictures(tmp_path / "images", 6, ".jpg"):
        save_picture(tmp_path / "masks" / f"{Path(name).stem}.png", size=(40, 30))
    with pytest.raises(DataError, match="different colours; a mask has one for each class"):
        read(tmp_path)


# --- equal names in several splits ------------------------------------------------------------------------------------


SPLIT_FOLDERS = {"train": "train", "val": "val", "test": "test"}


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("{0}/images", "{0}/masks"),
        ("images/{0}", "masks/{0}"),
        ("{0}", "{0}_masks"),
        ("{0}_images", "{0}_labels"),
        ("{0}", "{0}annot"),
    ],
)
def test_images_are_paired_with_the_masks_of_their_own_split(images, masks, tmp_path):
    for split in SPLIT_FOLDERS:
        save_masks(tmp_path / images.format(split), tmp_path / masks.format(split), [0, 1])
    source = read(tmp_path).source["masks"]
    assert source["images"] == {split: str(tmp_path / images.format(split)) for split in SPLIT_FOLDERS}
    assert source["masks"] == {split: str(tmp_path / masks.format(split)) for split in SPLIT_FOLDERS}


@pytest.mark.parametrize("images", ["{0}", "images/{0}", "{0}2017"])
def test_coco_files_get_the_images_of_their_own_split(images, tmp_path):
    for split in SPLIT_FOLDERS:
        names = pictures(tmp_path / images.format(split), 3)
        file = tmp_path / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(coco(names)))
    source = read(tmp_path).source["coco"]
    assert source["images"] == {split: str(tmp_path / images.format(split)) for split in SPLIT_FOLDERS}


def test_voc_files_get_the_images_of_their_own_split(tmp_path):
    for split in SPLIT_FOLDERS:
        for name in pictures(tmp_path / "images" / split, 3, ".jpg"):
            xml = tmp_path / "annotations" / split / f"{Path(name).stem}.xml"
            xml.parent.mkdir(parents=True, exist_ok=True)
            xml.write_text(XML.format(name=name, label="dog"))
    source = read(tmp_path).source["voc"]
    assert source["images"] == {split: f"images/{split}" for split in SPLIT_FOLDERS}
    assert source["annotations"] == {split: f"annotations/{split}" for split in SPLIT_FOLDERS}


def test_a_table_gets_the_images_of_its_own_split(tmp_path):
    for split in ("test", "train"):
        names = pictures(tmp_path / split, 6)
    rows = [[name, "ab"[number % 2]] for number, name in enumerate(names)]
    table = write_table(tmp_path / "train.csv", ["image", "label"], rows)
    assert Path(read(table).source["table"]["root"]).resolve() == tmp_path / "train"


# --- what must not be lost or mistaken --------------------------------------------------------------------------------


def test_a_class_in_a_single_mask_is_a_class(tmp_path):
    save_masks(tmp_path / "images", tmp_path / "masks", [0, 1])
    mask = np.asarray(Image.open(tmp_path / "masks" / "p3.png")).copy()
    mask[0, 0] = 2
    Image.fromarray(mask).save(tmp_path / "masks" / "p3.png")
    assert read(tmp_path).source["masks"]["classes"] == ["background", "class_1", "class_2"]


def test_masks_of_four_bits_have_the_values_that_the_source_reads(tmp_path):
    pictures(tmp_path / "images", 4, ".jpg")
    (tmp_path / "masks").mkdir()
    for number in range(4):
        Image.new("L", (40, 30), 17 * (number % 2)).save(tmp_path / "masks" / f"p{number}.png", bits=4)
    source = read(tmp_path).source["masks"]
    assert len(source["classes"]) == 2


def test_the_first_row_of_a_table_of_ids_without_names_is_kept(tmp_path):
    rows = [[name.removesuffix(".png"), "ab"[number % 2]] for number, name in enumerate(pictures(tmp_path, 10))]
    reading = read(write_table(tmp_path / "t.csv", None, rows), None, ["column_2"])
    index = index_source(Data.model_validate({"source": reading.source, "split": {"val": 0.0, "test": 0.0}}))
    assert index.counts["train"] == 10


def test_class_folders_with_words_of_masks_in_their_names_are_classes(tmp_path):
    for name in ("kate", "joanna", "unlabeled", "segway"):
        pictures(tmp_path / name, 4)
    assert read(tmp_path).source == {"folder": str(tmp_path)}
    for name in ("cat", "dog"):
        for number in range(4):
            save_picture(tmp_path / "twins" / name / f"{number}.jpg", seed=number)
            save_picture(tmp_path / "twins" / name / f"{number}.png", seed=number)
    assert read(tmp_path / "twins").task == "classify"


def test_images_with_few_masks_are_no_classes(tmp_path):
    pictures(tmp_path / "images", 20, ".jpg")
    pictures(tmp_path / "masks", 5)
    with pytest.raises(DataError, match="are named like images and masks, but too few images have a mask"):
        read(tmp_path)


def test_a_list_of_classes_among_labels_and_a_foreign_yaml_do_no_harm(tmp_path):
    for name in pictures(tmp_path / "y" / "images", 4):
        labels = tmp_path / "y" / "labels" / f"{Path(name).stem}.txt"
        labels.parent.mkdir(exist_ok=True)
        labels.write_text("0 0.5 0.5 0.4 0.4\n")
    (tmp_path / "y" / "labels" / "classes.txt").write_text("cat\n")
    assert read(tmp_path / "y").source["yolo"]["classes"] == ["cat"]
    save_class_folders(tmp_path / "f")
    (tmp_path / "f" / "dataset.yaml").write_text("filenames: many\n")
    (tmp_path / "f" / "data.yaml").write_bytes(b"\xff\xfe\x00names")
    assert read(tmp_path / "f").task == "classify"


def test_people_of_other_splits_are_read_for_verification(tmp_path):
    for split, people in (("train", range(6)), ("val", range(6, 9))):
        for person in people:
            for number in range(3):
                save_picture(tmp_path / split / f"p{person}" / f"{number}.png", seed=10 * person + number)
    reading = guess_data(str(tmp_path), Request("verify"))
    assert survey_source(reading.source, has_disjoint_classes=True).class_count == 9


def test_odd_text_does_not_end_in_a_traceback(tmp_path):
    rows = [[name, "\u00b2", "x" * 300] for name in pictures(tmp_path, 6)]
    with pytest.raises(DataError):
        read(write_table(tmp_path / "t.csv", ["image", "two", "long"], rows))
    save_class_folders(tmp_path / "f")
    with pytest.raises(ConfigError, match="--label names columns of a table"):
        read(tmp_path / "f", None, ["x"])
    with pytest.raises(ConfigError, match="--label names columns of a table"):
        guess_data("digits", Request(None, ["x"]))
