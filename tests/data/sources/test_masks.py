"""The source of masks: which image has which mask, what its values mean, and which masks are refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cnnrun.base.errors import DataError
from cnnrun.base.progress import progress_bar
from cnnrun.contracts.target_kind import IGNORED
from cnnrun.data.index import index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.data.settings import Data
from cnnrun.data.sources.masks import MaskFolders
from cnnrun.results.studies.selftest import _shuffle_labels


@pytest.fixture
def root(tmp_path) -> Path:
    """Ten images of 12 x 8 with masks of the values 0, 1, 2 and 255."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(10):
        pixels, mask = rng.integers(0, 255, (8, 12), dtype=np.uint8), rng.choice([0, 1, 2, 255], (8, 12))
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "masks" / f"{number}.png")
    return tmp_path


def data_of(root: Path, image: dict | None = None, **settings) -> Data:
    source = {"images": str(root / "images"), "masks": str(root / "masks"), "classes": ["a", "b", "c"], **settings}
    asked = {"source": {"masks": source}, "image": image or {"size": [8, 12], "channels": 1}, "split": {"val": 0.3}}
    return Data.model_validate({**asked, "cache": "memory"})


def read(data: Data):
    return build_dataset(data, index_source(data), progress_bar)


def masks_of(dataset, split: str) -> dict[str, np.ndarray]:
    """The masks of a split by the names of their images."""
    samples = dataset.splits[split]
    masks = samples.batch_targets(torch.arange(len(samples)), torch.device("cpu"))["masks"].numpy()
    return {Path(samples.sample_name(index)).stem: mask for index, mask in enumerate(masks)}


def written(root: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(root / "masks" / f"{name}.png"))


def test_each_image_has_the_mask_of_its_name_in_every_split(root):
    dataset = read(data_of(root))
    assert {split: len(samples) for split, samples in dataset.splits.items()} == {"train": 7, "val": 3}
    for split in dataset.splits:
        for name, mask in masks_of(dataset, split).items():
            np.testing.assert_array_equal(mask, written(root, name))
    assert dataset.facts.class_counts == (7, 7, 7)


def test_values_and_values_to_ignore_are_read_as_the_config_says(root):
    dataset = read(data_of(root, values=[255, 2, 1], ignore=[0]))
    for name, mask in masks_of(dataset, "train").items():
        expected = np.select([written(root, name) == value for value in (255, 2, 1)], [0, 1, 2], IGNORED)
        np.testing.assert_array_equal(mask, expected)


def test_a_palette_is_read_by_index(root):
    mask = Image.open(root / "masks" / "3.png")
    coloured = Image.frombytes("P", mask.size, mask.tobytes())
    coloured.putpalette([(7 * index) % 256 for index in range(768)])
    coloured.save(root / "masks" / "3.png")
    found = {name: each for split in ("train", "val") for name, each in masks_of(read(data_of(root)), split).items()}
    np.testing.assert_array_equal(found["3"], np.asarray(mask))


def test_folders_named_like_splits_are_the_splits(root, tmp_path):
    for folder in ("images", "masks"):
        for number in range(10):
            split = "val" if number < 4 else "train"
            (root / folder / split).mkdir(exist_ok=True)
            (root / folder / f"{number}.png").rename(root / folder / split / f"{number}.png")
    dataset = read(data_of(root))
    assert {split: len(samples) for split, samples in dataset.splits.items()} == {"train": 6, "val": 4}


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
def test_masks_are_fitted_like_their_images_by_nearest_pixels(root, fit):
    """A mask that equals its image pixel by pixel still does so after fitting by a whole factor."""
    for path in (root / "images").iterdir():
        Image.fromarray((written(root, path.stem) % 3 * 100).astype(np.uint8)).save(path)
        Image.fromarray((written(root, path.stem) % 3).astype(np.uint8)).save(root / "masks" / path.name)
    dataset = read(data_of(root, {"size": [24, 24], "channels": 1, "fit": fit, "mean": [0], "std": [1]}))
    values = np.concatenate([mask.ravel() for mask in masks_of(dataset, "train").values()])
    assert set(np.unique(values)) == ({0, 1, 2, IGNORED} if fit == "pad" else {0, 1, 2})
    assert (values == IGNORED).mean() == (pytest.approx(1 / 3) if fit == "pad" else 0)


def test_images_without_a_mask_are_named(root):
    (root / "masks" / "3.png").unlink()
    Image.new("L", (12, 8)).save(root / "masks" / "4.bmp")
    with pytest.raises(DataError) as refused:
        read(data_of(root))
    assert "images/3.png: no mask of its name in" in str(refused.value.lines)
    assert "images/4.png: 2 masks of its name in" in str(refused.value.lines)


def test_a_mask_is_of_one_image(root):
    Image.new("L", (12, 8)).save(root / "images" / "3.bmp")
    with pytest.raises(DataError) as refused:
        read(data_of(root))
    (line,) = refused.value.lines
    assert line.endswith("images/3.png: has the mask of 3.bmp; give one another name")


def test_a_mask_of_no_image_is_reported(root, capsys):
    (root / "images" / "3.png").unlink()
    read(data_of(root))
    assert "1 mask has no image and is not used, such as '3.png'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda path: Image.new("L", (12, 8), 7).save(path),
            "the mask has the value 7, which is neither in source.masks.values nor in ignore",
        ),
        (
            lambda path: Image.new("RGB", (12, 8)).save(path),
            "needs grey values of 8 bits, or a palette; it has RGB",
        ),
        (lambda path: Image.new("L", (6, 4)).save(path), "masks/3.png: is 6x4 pixels; its image is 12x8"),
        (lambda path: path.write_bytes(b"no mask"), "masks/3.png: not an image"),
    ],
    ids=["unknown value", "colours", "another size", "no image"],
)
def test_bad_masks_are_named_and_can_be_left_out(root, spoil, words):
    spoil(root / "masks" / "3.png")
    with pytest.raises(DataError, match=words):
        read(data_of(root))
    dataset = read(data_of(root).model_copy(update={"bad_files": "skip"}))
    assert sum(map(len, dataset.splits.values())) == 9


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"classes": ["a"]}, "at least 2"),
        ({"classes": ["a", "b"], "values": [0]}, "values has 1 numbers; there are 2 classes"),
        ({"classes": ["a", "b"], "values": [3, 3]}, "a value is used twice"),
        ({"classes": ["a", "b"], "values": [0, 255]}, "a value is used twice"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        MaskFolders(images="i", masks="m", **settings)


def test_another_mask_is_another_fingerprint(root):
    before = read(data_of(root)).facts.fingerprint
    Image.fromarray(np.zeros((8, 12), np.uint8)).save(root / "masks" / "3.png")
    assert read(data_of(root)).facts.fingerprint != before


def test_the_masks_of_digit_scenes_show_their_digits():
    """Each box of a scene holds pixels of its class, up to its edges, and outside of all boxes is background."""
    import torch

    asked = {"train": 40, "held_out": 5}
    boxes, masks = (
        read(Data.model_validate({"source": {"digit_scenes": {**asked, "give": give}}})).splits["train"]
        for give in ("boxes", "masks")
    )
    index = torch.arange(40)
    assert torch.equal(boxes.load_images(index), masks.load_images(index))
    targets = boxes.batch_targets(index, torch.device("cpu"))
    for mask, corners, labels in zip(
        masks.batch_targets(index, torch.device("cpu"))["masks"], targets["boxes"], targets["objects"], strict=True
    ):
        outside = mask.clone()
        for (x1, y1, x2, y2), label in zip(corners.int().tolist(), labels.tolist(), strict=True):
            if label >= 0:
                inside = mask[y1:y2, x1:x2] == label + 1
                assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
                outside[y1:y2, x1:x2] = 0
        assert not outside.any()


def test_two_folders_of_one_split_are_refused(root):
    for folder in ("train", "val", "valid"):
        (root / "images" / folder).mkdir()
    with pytest.raises(DataError, match="both val and valid are val folders"):
        read(data_of(root))


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_png_files_of_few_bits_keep_their_values(root, bits):
    values = np.arange(96, dtype=np.uint8).reshape(8, 12) % 3
    write_grey_png(root / "masks" / "3.png", values, bits)
    masks = [masks_of(read(data_of(root)), split) for split in ("train", "val")]
    assert ((masks[0] | masks[1])["3"] == values).all()


def write_grey_png(path: Path, values: np.ndarray, bits: int) -> None:
    """Write a grey PNG of a bit depth that Pillow reads but does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    digits = np.unpackbits(values[:, :, None], axis=2)[:, :, 8 - bits :].reshape(height, width * bits)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(digits, axis=1))
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_a_grey_mask_of_16_bits_is_refused(root):
    Image.fromarray(np.zeros((8, 12), np.uint16)).save(root / "masks" / "3.png")
    with pytest.raises(DataError, match="a mask needs grey values of 8 bits, or a palette; it has I;16"):
        read(data_of(root))


def test_the_selftest_shuffles_masks(root):
    examples = read(data_of(root)).splits["train"]
    index = torch.arange(len(examples))
    true, shuffled = (
        each.batch_targets(index, torch.device("cpu"))["masks"] for each in (examples, _shuffle_labels(examples))
    )
    assert sum(bool((mask == other).all()) for mask, other in zip(true, shuffled, strict=True)) < 4
    assert sorted(mask.tolist() for mask in true) == sorted(mask.tolist() for mask in shuffled)
    images = [each.load_images(index) for each in (examples, _shuffle_labels(examples))]
    assert torch.equal(*images)


@pytest.mark.parametrize("suffix", ["", "_mask"])
def test_images_and_masks_in_one_folder_are_those_of_two_folders(root, suffix, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    for number in range(10):
        Image.open(root / "images" / f"{number}.png").save(both / f"{number}.{'png' if suffix else 'bmp'}")
        Image.open(root / "masks" / f"{number}.png").save(both / f"{number}{suffix}.png")
    together = {"images": str(both), "masks": str(both), "mask_suffix": suffix}
    expected, found = read(data_of(root)), read(data_of(root, **together))
    for split in ("train", "val"):
        by_name = {Path(name).stem: mask for name, mask in masks_of(expected, split).items()}
        for name, mask in masks_of(found, split).items():
            assert np.array_equal(mask, by_name.pop(Path(name).stem))
        assert not by_name


def test_a_folder_for_each_split_and_a_suffix_of_masks_elsewhere(root, tmp_path):
    for split, numbers in (("train", range(7)), ("val", range(7, 10))):
        for folder, suffix in (("pictures", ""), ("truth", "_gt")):
            target = tmp_path / split / folder
            target.mkdir(parents=True)
            for number in numbers:
                source = root / ("masks" if suffix else "images") / f"{number}.png"
                Image.open(source).save(target / f"{number}{suffix}.png")
    folders = {
        kind: {split: str(tmp_path / split / name) for split in ("train", "val")}
        for kind, name in (("images", "pictures"), ("masks", "truth"))
    }
    found = read(data_of(root, **folders, mask_suffix="_gt"))
    assert {split: len(found.splits[split]) for split in found.splits} == {"train": 7, "val": 3}
    for split in ("train", "val"):
        for name, mask in masks_of(found, split).items():
            expected = np.asarray(Image.open(root / "masks" / f"{Path(name).stem}.png"))
            assert np.array_equal(mask.squeeze(), expected)


def test_folders_of_different_splits_are_refused(root):
    for images, masks, problem in (
        ({"train": "a"}, "b", "name different splits"),
        ({"train": "a"}, {"train": "b", "val": "c"}, "name different splits"),
        ({"val": "a"}, {"val": "b"}, "have no train"),
    ):
        with pytest.raises(ValueError, match=problem):
            MaskFolders(images=images, masks=masks, classes=["a", "b"])


def test_arrays_and_their_masks_in_one_folder(root):
    for path in sorted((root / "images").glob("*.png")):
        np.save(root / "masks" / f"{path.stem}.npy", np.full((8, 12, 5), int(path.stem), np.uint8))
        (root / "masks" / path.name).rename(root / "masks" / f"{path.stem}_mask.png")
    together = {"images": str(root / "masks"), "masks": str(root / "masks"), "mask_suffix": "_mask"}
    dataset = read(data_of(root, {"size": [8, 12], "channels": 5}, **together))
    assert sum(len(samples) for samples in dataset.splits.values()) == 10


# --- masks of colours -------------------------------------------------------------------------------------------------

COLOURS = ["#000000", "#ff8000", "#0000fe"]


def paint(root: Path, mode: str = "RGB", kind: str = "png") -> None:
    """Replace the masks by colours: the values 0, 1, 2 and, for 255, #ffffff."""
    palette = np.zeros((256, 3), np.uint8)
    palette[[0, 1, 2, 255]] = [[0, 0, 0], [255, 128, 0], [0, 0, 254], [255, 255, 255]]
    for path in sorted((root / "masks").glob("*.png")):
        painted = Image.fromarray(palette[np.asarray(Image.open(path))])
        path.unlink()
        painted = painted.quantize(256) if mode == "P" else painted.convert(mode)
        painted.save(path.with_suffix(f".{kind}"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_masks_of_colours_equal_masks_of_values(root, mode):
    expected = {split: masks_of(read(data_of(root)), split) for split in ("train", "val")}
    paint(root, mode)
    painted = read(data_of(root, colours=COLOURS, ignore=["#FFFFFF"]))
    for split, masks in expected.items():
        found = masks_of(painted, split)
        assert all(np.array_equal(found[name], mask) for name, mask in masks.items())


def test_a_colour_that_is_no_class_is_named(root):
    paint(root)
    with pytest.raises(
        DataError, match="has the colour #ffffff, which is neither in source.masks.colours nor in ignore"
    ):
        read(data_of(root, colours=COLOURS))
    with pytest.raises(DataError, match="it has RGB; give source.masks.colours"):
        read(data_of(root))


def test_masks_saved_as_jpeg_are_refused_for_their_blurred_colours(root):
    paint(root, kind="jpg")
    with pytest.raises(DataError, match="which is neither in source.masks.colours nor in ignore"):
        read(data_of(root, colours=COLOURS, ignore=["#ffffff"]))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"colours": COLOURS[:2]}, "colours has 2 entries; there are 3 classes"),
        ({"colours": COLOURS, "values": [0, 1, 2]}, "give values or colours, not both"),
        ({"colours": [*COLOURS[:2], "#FF8000"]}, "a colour is used twice, among colours and ignore"),
        ({"colours": COLOURS, "ignore": ["#0000FE"]}, "a colour is used twice, among colours and ignore"),
        ({"colours": COLOURS, "ignore": [255]}, "ignore has 255, which is not one of the colours"),
        ({"ignore": ["#ffffff"]}, "ignore has '#ffffff', which is not one of the values"),
        ({"colours": [*COLOURS[:2], "blue"]}, "blue|pattern"),
    ],
)
def test_colours_that_mean_nothing_are_refused(root, settings, problem):
    with pytest.raises(ValueError, match=problem):
        data_of(root, **settings)
