"""YOLO's layout: data.yaml, images and label files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pil
from pycocotools import mask as coco_mask

from cnnrun.base.errors import DataError
from cnnrun.data.mask_drawing import draw_mask
from cnnrun.data.sources.voc import Voc
from cnnrun.data.sources.yolo import Yolo, _LabelReader
from tests.support.images import save_picture

BCCD = Path(__file__).parents[4] / "shared" / "data" / "bccd"
YAML = "train: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n"


def write_image(root: Path, name: str, lines: str | None, size: tuple[int, int] = (40, 20)) -> None:
    """An image of (width, height), and its label file unless `lines` is None."""
    image = root / "images" / f"{name}.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    save_picture(image, seed=sum(map(ord, name)), size=size)
    if lines is not None:
        labels = root / "labels" / f"{name}.txt"
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text(lines)


@pytest.fixture
def root(tmp_path) -> Path:
    write_image(tmp_path, "train/a", "1 0.5 0.5 0.5 0.5\n0 0.25 0.5 0.1 0.2\n\n")
    write_image(tmp_path, "train/b", None)
    write_image(tmp_path, "val/c", "0 0.1 0.1 0.3 0.1 0.2 0.6\n")  # a triangle
    (tmp_path / "data.yaml").write_text(YAML)
    return tmp_path


def test_boxes_classes_and_splits_are_read(root, capfd):
    found = Yolo(path=str(root / "data.yaml")).read()
    assert found.classes == ("cat", "dog")
    train, val = found.splits["train"], found.splits["val"]
    assert [Path(path).name for path in train.images] == ["a.png", "b.png"]
    np.testing.assert_allclose(train.objects.pad()["boxes"][0], [[10, 5, 30, 15], [8, 8, 12, 12]], atol=1e-5)
    assert train.objects.pad()["objects"].tolist() == [[1, 0], [-1, -1]]
    np.testing.assert_allclose(val.objects.pad()["boxes"][0], [[4, 2, 12, 12]], atol=1e-5)
    err = capfd.readouterr().err
    assert "1 image without a label file, such as 'b.png'" in err
    assert "1 polygon read as the boxes around them" in err
    assert train.sizes.tolist() == [[20, 40], [20, 40]]


def test_a_folder_is_enough_and_lists_roboflows_paths_and_several_folders_are_read(root):
    expected = {name: len(split) for name, split in Yolo(path=str(root)).read().splits.items()}
    assert expected == {"train": 2, "val": 1}
    (root / "train.txt").write_text("images/train/a.png\n./images/val/c.png\n")
    for text, counts in {
        "train: ../images/train\nvalid: ../images/val\nnames: [cat, dog]\nnc: 2\n": {"train": 2, "val": 1},
        "train: train.txt\nnames: [cat, dog]\n": {"train": 2},
        "path: images\ntrain: [train, val]\nnames: [cat, dog]\n": {"train": 3},
        "path: .\ntrain: images/train\ntest: images/val\nnames: {'0': cat, '1': dog}\n": {"train": 2, "test": 1},
    }.items():
        (root / "data.yaml").write_text(text)
        assert {name: len(split) for name, split in Yolo(path=str(root)).read().splits.items()} == counts


def test_the_root_and_the_classes_can_be_given(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("config") / "coco8.yaml"
    elsewhere.write_text("path: ../datasets/coco8\n" + YAML)
    assert len(Yolo(path=str(elsewhere), root=str(root)).read().splits["train"]) == 2
    with pytest.raises(DataError, match=r"coco8.yaml: train: 'images/train' is not in .*root is the folder"):
        Yolo(path=str(elsewhere)).read()
    (root / "data.yaml").unlink()
    with pytest.raises(DataError, match="has no data.yaml; give data.source.yolo.classes"):
        Yolo(path=str(root)).read()
    assert Yolo(path=str(root), classes=["x", "y"]).read().classes == ("x", "y")


def test_labels_may_lie_beside_the_images(tmp_path):
    for name in ("a", "b"):
        save_picture(tmp_path / f"{name}.png", seed=1, size=(10, 10))
        (tmp_path / f"{name}.txt").write_text("0 0.5 0.5 1 1\n")
    (tmp_path / "data.yaml").write_text("train: .\nnames: [all]\n")
    boxes = Yolo(path=str(tmp_path)).read().splits["train"].objects.pad()["boxes"]
    assert boxes.tolist() == [[[0, 0, 10, 10]]] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", "class '2' is not a number from 0 to 1"),
        ("cat 0.5 0.5 0.1 0.1", "class 'cat' is not a number"),
        ("-1 0.5 0.5 0.1 0.1", "class '-1' is not a number"),
        ("0 0.5 0.5 0.1", "3 numbers after the class; expected centre x"),
        ("0 0.5 0.5 0.1 0.1 0.9", "5 numbers after the class"),
        ("0 20 10 5 5", "'20' is not a fraction of the image"),
        ("0 0.5 nan 0.1 0.1", "'nan' is not a fraction"),
        ("0 0.5 0,5 0.1 0.1", "'0,5' is not a fraction"),
        ("0", "0 numbers after the class"),
    ],
)
def test_a_wrong_line_is_named(root, line, message):
    (root / "labels" / "train" / "a.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(DataError) as told:
        Yolo(path=str(root)).read()
    assert len(told.value.lines) == 1
    assert "a.txt:2: " in told.value.lines[0]
    assert message in told.value.lines[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [cat, dog]", "has no `train`"),
        ("train: images/train", "needs names, a list of classes"),
        ("train: images/train\nnames: []", "needs names"),
        ("train: images/train\nnames: {0: cat, 2: dog}", "its numbers are not 0 to 1"),
        ("train: images/train\nnames: [cat, cat]", "'cat' is there twice"),
        ("train: images/train\nnames: [yes, no]", "number 0 is True; write a text in quotes"),
        ("train: images/train\nnames: [cat, dog]\nnc: 3", "nc is 3, but there are 2 names"),
        ("train: nowhere\nnames: [cat, dog]", "train: 'nowhere' is not in"),
        ("train: 3\nnames: [cat, dog]", "train: expected a folder"),
        ("train: /etc\nnames: [cat, dog]", "is absolute"),
        ("train: ../../etc\nnames: [cat, dog]", "leaves the root with '..'"),
        ("train: https://x.org/a.zip\nnames: [cat, dog]", "is not in"),
        ("- a", "not a data.yaml"),
        ("a: [", "not YAML"),
        ("a: &a [*a]", "needs names"),
        ("train: labels\nnames: [cat, dog]", "no images"),
    ],
)
def test_a_wrong_data_yaml_is_refused_in_one_line(root, text, message):
    (root / "data.yaml").write_text(text)
    with pytest.raises(DataError) as told:
        Yolo(path=str(root)).read()
    assert len(told.value.lines) == 1
    assert message in told.value.lines[0]


def test_a_list_of_images_is_checked(root):
    (root / "data.yaml").write_text("train: list.txt\nnames: [cat, dog]\n")
    for text, message in (
        ("images/train/a.png\nimages/train/z.png\n", "list.txt:2: 'images/train/z.png' is not there"),
        ("/etc/passwd\n", "list.txt:1: '/etc/passwd' is absolute"),
        ("images/train/a.png\n./images/train/a.png\n", "lists an image twice"),
        ("\n", "lists no images"),
    ):
        (root / "list.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            Yolo(path=str(root)).read()


def test_unreadable_images_are_all_named(root):
    (root / "images" / "train" / "b.png").write_bytes(b"")
    (root / "images" / "train" / "d.png").write_bytes(b"no image")
    with pytest.raises(DataError) as told:
        Yolo(path=str(root)).read()
    assert [line.split(": ")[0].rsplit("/", 1)[-1] for line in told.value.lines] == ["b.png", "d.png"]


def test_counts_and_presence_are_given(root):
    counts = Yolo(path=str(root), give="counts").read()
    assert counts.number_names == ("cat", "dog")
    assert counts.splits["train"].targets["numbers"].tolist() == [[1, 1], [0, 0]]


@given(st.lists(st.tuples(*[st.floats(0.05, 0.45)] * 4), max_size=5), st.integers(4, 5000), st.integers(4, 5000))
def test_fractions_become_pixels(boxes, height, width):
    reader = _LabelReader(Path(), 1, needs_polygons=False)
    for x, y, half_width, half_height in boxes:
        words = ["0", *(f"{value:.9f}" for value in (x + 0.5, y + 0.5, half_width * 2, half_height * 2))]
        x1, y1, x2, y2 = reader._parse_line(words, (height, width), 1).corners
        expected = [(x + 0.5 - half_width) * width, (y + 0.5 - half_height) * height]
        expected += [(x + 0.5 + half_width) * width, (y + 0.5 + half_height) * height]
        np.testing.assert_allclose([x1, y1, x2, y2], expected, atol=1e-4)


@pytest.mark.skipif(not BCCD.exists(), reason="needs ../shared/data/bccd")
def test_real_data_written_as_yolo_is_read_as_from_voc(tmp_path):
    voc = Voc(root=str(BCCD)).read()
    split = voc.splits["test"]
    boxes, labels = (split.objects.pad()[name] for name in ("boxes", "objects"))
    for index, path in enumerate(split.images):
        image = tmp_path / "images" / "test" / Path(path).name
        image.parent.mkdir(parents=True, exist_ok=True)
        image.hardlink_to(path) if image.parent.stat().st_dev == Path(path).stat().st_dev else image.write_bytes(
            Path(path).read_bytes()
        )
        height, width = split.sizes[index].tolist()
        lines = []
        for (x1, y1, x2, y2), label in zip(boxes[index].tolist(), labels[index].tolist(), strict=True):
            if label >= 0:
                centre = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
                lines.append(" ".join([str(label), *(f"{value:.8f}" for value in centre)]))
        labels_path = tmp_path / "labels" / "test" / f"{image.stem}.txt"
        labels_path.parent.mkdir(parents=True, exist_ok=True)
        labels_path.write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text(f"train: images/test\nnames: {list(voc.classes)}\n")
    found = Yolo(path=str(tmp_path)).read().splits["train"]
    order = [Path(path).name for path in split.images]
    mine = [order.index(Path(path).name) for path in found.images]
    np.testing.assert_allclose(found.objects.pad()["boxes"], boxes[mine], atol=1e-3)
    assert found.objects.pad()["objects"].tolist() == labels[mine].tolist()


def test_poses_are_refused(root):
    (root / "data.yaml").write_text(YAML + "kpt_shape: [4, 3]\n")
    with pytest.raises(DataError, match="kpt_shape: lines with key points are not read"):
        Yolo(path=str(root / "data.yaml")).read()


# pycocotools itself is older than NumPy's rule.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_polygons_are_masks_as_in_coco(root):
    """Both sources draw them alike; lines of boxes are named."""
    polygon = "0.1 0.2 0.6 0.25 0.5 0.9"
    for split in ("train", "val"):
        for file in (root / "labels" / split).glob("*.txt"):
            file.write_text(f"1 {polygon}\n")
    source = {"yolo": {"path": str(root / "data.yaml"), "give": "masks"}}
    contents = Yolo.model_validate(source["yolo"]).read()
    assert contents.classes[0] == "background"
    masks = contents.splits["train"].masks
    pixels = [value * side for value, side in zip(map(float, polygon.split()), (40, 20) * 3, strict=True)]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([pixels], 20, 40)))
    np.testing.assert_array_equal(draw_mask(masks.images[0]), 2 * expected)
    (root / "labels" / "train" / "a.txt").write_text(f"1 {polygon}\n0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(DataError, match=r"a\.txt:2: a box; `give: masks` needs polygons"):
        Yolo.model_validate(source["yolo"]).read()


def test_a_detector_trains_on_it(tmp_path, run_cli):
    for split, count in (("train", 8), ("val", 4)):
        for number in range(count):
            pixels = np.full((32, 32, 3), 60 if split == "train" else 90, np.uint8)
            pixels[8:24, 4 + number : 20 + number] = (200, 30, 30)
            path = tmp_path / "images" / split / f"{split}{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Pil.fromarray(pixels).save(path)
            labels = tmp_path / "labels" / split / f"{split}{number}.txt"
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_text(f"0 {(12 + number) / 32} 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [square]\n")
    (tmp_path / "c.yaml").write_text(
        "task: {detect: {levels: [last]}}\n"
        f"data: {{source: {{yolo: '{tmp_path}'}}, image: {{size: 32, channels: 3}}}}\n"
        "model: [{conv: {out_channels: 8, stride: 2, norm: batch, activation: relu}},"
        " {conv: {name: last, out_channels: 8, stride: 2, norm: batch, activation: relu}}]\n"
        "train: {epochs: 1, batch: 4}\n"
    )
    assert run_cli("check", tmp_path / "c.yaml")[0] == 0
    assert run_cli("train", tmp_path / "c.yaml", "--runs", tmp_path / "runs", "--no-report")[0] == 0
