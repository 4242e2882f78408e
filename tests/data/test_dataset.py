from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from cnnrun.base.errors import DataError
from cnnrun.base.progress import progress_bar
from cnnrun.config.spec import union_members
from cnnrun.contracts.source import Split
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.duplicates import MAX_RELATIVE_DIFFERENCE, find_near_duplicates
from cnnrun.data.image_files import load_with_view
from cnnrun.data.image_stores import MemoryStore
from cnnrun.data.index import index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.data.settings import Data
from cnnrun.data.sources import Source
from tests.support.images import save_picture

DATA = TypeAdapter(Data)


def folder_data(root: Path, **more) -> Data:
    image = {"size": 8, "channels": 3}
    return DATA.validate_python({"source": {"folder": str(root)}, "image": image, **more})


def prepare(data: Data) -> Dataset:
    return build_dataset(data, index_source(data), progress_bar)


def whole(examples: Examples) -> torch.Tensor:
    return examples.load_images(torch.arange(len(examples)))


def tree_digest(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            digest.update(str(path).encode() + path.read_bytes() + str(path.stat().st_mtime_ns).encode())
    return digest.hexdigest()


def test_held_out_splits_are_stratified_disjoint_and_complete():
    data = DATA.validate_python({"source": "digits", "split": {"val": 0.2, "test": 0.1}})
    indexed = index_source(data)
    labels = indexed.contents.splits["train"].targets["labels"]
    rows = {name: set(part.tolist()) for name, (_, part) in indexed.splits.items()}
    assert not rows["train"] & rows["val"]
    assert not rows["train"] & rows["test"]
    assert not rows["val"] & rows["test"]
    assert len(rows["train"] | rows["val"] | rows["test"]) == 1797
    for label in range(10):
        count = int((labels == label).sum())
        held = sum(int(labels[row]) == label for row in rows["test"])
        assert held == round(0.1 * count)


def test_held_out_splits_follow_the_split_seed():
    def val(seed: int) -> list[int]:
        data = DATA.validate_python({"source": "digits", "split": {"seed": seed}})
        return index_source(data).splits["val"][1].tolist()

    assert val(0) == val(0)
    assert val(0) != val(1)


def test_mean_and_std_equal_numpy_in_float64():
    data = DATA.validate_python({"source": "digits"})
    made = prepare(data)
    train = made.splits["train"]
    pixels = whole(train).numpy().astype(np.float64)
    assert made.facts.mean == pytest.approx((pixels.mean(),), rel=1e-12)
    assert made.facts.std == pytest.approx((pixels.std(),), rel=1e-10)
    assert sum(made.facts.class_counts) == len(train)


def test_a_folder_in_memory_equals_its_files_one_by_one(picture_folder):
    before = tree_digest(picture_folder)
    made = prepare(folder_data(picture_folder))
    train = made.splits["train"]
    data = folder_data(picture_folder)
    for number in range(len(train)):
        expected = load_with_view(Path(train.sample_name(number)), (8, 8), 3, data.image)[0]
        assert np.array_equal(train.load_images(torch.tensor([number]))[0].permute(1, 2, 0).numpy(), expected)
    assert made.facts.classes == ("cat", "dog")
    assert tree_digest(picture_folder) == before


def test_every_bad_file_is_named(picture_folder):
    for number in range(3):
        (picture_folder / "cat" / f"bad{number}.png").write_bytes(b"no picture")
    with pytest.raises(DataError) as refused:
        prepare(folder_data(picture_folder))
    assert len(refused.value.lines) == 4
    assert all("bad" in line for line in refused.value.lines)
    assert "data.bad_files: skip" in refused.value.lines[-1]


def test_a_dataset_of_one_colour_is_refused(tmp_path):
    from PIL import Image as Pil

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Pil.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    with pytest.raises(DataError, match="one and the same colour"):
        prepare(folder_data(tmp_path, leakage="keep"))


def test_a_constant_channel_is_refused_by_its_name_unless_the_config_has_its_deviation(tmp_path):
    from PIL import Image as Pil

    for seed in range(20):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        pixels[:, :, 2] = 7
        path = tmp_path / "ab"[seed % 2] / f"{seed}.png"
        path.parent.mkdir(exist_ok=True)
        Pil.fromarray(pixels).save(path)
    with pytest.raises(DataError, match="the blue channel is the same in every training image; set data.image.std"):
        prepare(folder_data(tmp_path))
    data = folder_data(tmp_path)
    image = data.image.model_copy(update={"std": [60.0, 60.0, 1.0]})
    made = prepare(data.model_copy(update={"image": image}))
    assert (made.facts.std, made.facts.mean[2]) == ((60.0, 60.0, 1.0), 7.0)


def test_val_is_a_fraction_of_the_samples_that_test_leaves():
    indexed = index_source(DATA.validate_python({"source": "digits", "split": {"val": 0.5, "test": 0.2}}))
    assert indexed.counts["test"] == pytest.approx(0.2 * 1797, abs=10)
    assert indexed.counts["val"] == pytest.approx(0.5 * 0.8 * 1797, abs=10)


def test_training_copies_of_val_and_test_images_are_left_out(tmp_path):
    for split, count in (("train", 8), ("val", 3), ("test", 3)):
        for label in ("cat", "dog"):
            for number in range(count):
                seed = sum(map(ord, split + label)) * 100 + number
                save_picture(tmp_path / split / label / f"{number}.png", seed=seed)
    for held, label in (("val", "cat"), ("test", "dog")):
        picture = (tmp_path / held / label / "0.png").read_bytes()
        for number in range(3):
            (tmp_path / "train" / label / f"copy{number}.png").write_bytes(picture)
    made = prepare(folder_data(tmp_path, leakage="skip"))
    seen = {name: {one.numpy().tobytes() for one in whole(examples)} for name, examples in made.splits.items()}
    assert not seen["train"] & (seen["val"] | seen["test"])
    assert {name: len(examples) for name, examples in made.splits.items()} == {"train": 16, "val": 6, "test": 6}
    assert {Path(each["picture"]).stem for each in made.skipped_samples} == {"copy0", "copy1", "copy2"}
    assert len(made.skipped_samples) == 6


def test_statistics_and_counts_exclude_skipped_images(tmp_path):
    from PIL import Image as Pil

    for split, count in (("train", 6), ("val", 2)):
        for label in ("cat", "dog"):
            for number in range(count):
                save_picture(
                    tmp_path / split / label / f"{number}.png", seed=sum(map(ord, split + label)) * 99 + number
                )
    for split in ("train", "val"):
        Pil.new("RGB", (8, 8), (255, 255, 254)).save(tmp_path / split / "cat" / "white.png")
    made = prepare(folder_data(tmp_path, leakage="skip"))
    pixels = whole(made.splits["train"]).numpy().astype(np.float64)
    assert len(pixels) == 12
    assert made.facts.mean == pytest.approx(pixels.mean((0, 2, 3)), rel=1e-9)
    assert made.facts.std == pytest.approx(pixels.std((0, 2, 3)), rel=1e-9)
    assert made.facts.class_counts == (6, 6)
    assert made.facts.counts == {"train": 12, "val": 5}


def test_an_image_under_two_labels_is_left_out_of_training_under_both(tmp_path):
    for label in ("cat", "dog"):
        for number in range(8):
            save_picture(tmp_path / "train" / label / f"{number}.png", seed=sum(map(ord, label)) * 99 + number)
            save_picture(tmp_path / "val" / label / f"{number}.png", seed=sum(map(ord, label)) * 77 + 50 + number)
        save_picture(tmp_path / "train" / label / "both.png", seed=12345)
    made = prepare(folder_data(tmp_path, leakage="skip"))
    assert [Path(each["picture"]).name for each in made.skipped_samples] == ["both.png", "both.png"]
    assert len(made.splits["train"]) == 16


def test_the_fingerprint_depends_on_the_labels(tmp_path):
    for number in range(8):
        save_picture(tmp_path / "pictures" / f"{number}.png", seed=number)

    def fingerprint(labels: str) -> str:
        rows = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
        (tmp_path / "t.csv").write_text(f"path,label\n{rows}")
        source = {"table": {"path": str(tmp_path / "t.csv"), "root": str(tmp_path / "pictures")}}
        image = {"size": 8, "channels": 3}
        return prepare(
            DATA.validate_python({"source": source, "image": image, "split": {"val": 0.25}})
        ).facts.fingerprint

    assert fingerprint("aabbaabb") == fingerprint("aabbaabb") != fingerprint("abbbaaba")


def test_near_duplicates_differ_little_in_grey_and_relative_to_the_lower_contrast():
    """Thumbnails of noise around grey, in pairs of known difference and known contrast."""
    draw = np.random.default_rng(0)

    def thumb(contrast: float) -> np.ndarray:
        return 128 + contrast * draw.choice([-1.0, 1.0], 256)

    def apart(one: np.ndarray, gap: float) -> np.ndarray:
        return one + gap * draw.choice([-1.0, 1.0], 256)

    for contrast, gap, is_near in ((100, 3, True), (100, 6, False), (20, 3, False), (20, 1, True), (60, 4.4, False)):
        one = thumb(contrast)
        pair = np.stack([one, apart(one, gap), thumb(100), thumb(90)]).clip(0, 255).round().astype(np.uint8)
        found, through = find_near_duplicates(pair)
        assert through
        assert found.tolist() == ([[0, 1]] if is_near else [])
    # For a strong and a faint version of one image, the fainter one's contrast counts.
    way = draw.choice([-1.0, 1.0], 256)
    faint, strong = 128 + 45 * way, 128 + 48 * way
    assert MAX_RELATIVE_DIFFERENCE * 45 < 3 < MAX_RELATIVE_DIFFERENCE * 48
    assert find_near_duplicates(np.stack([faint, strong, thumb(100)]).round().astype(np.uint8))[0].tolist() == []


def test_the_fingerprint_depends_on_the_image_files(picture_folder):
    first = prepare(folder_data(picture_folder)).facts.fingerprint
    assert prepare(folder_data(picture_folder)).facts.fingerprint == first
    save_picture(picture_folder / "dog" / "3.png", seed=1234)
    assert prepare(folder_data(picture_folder)).facts.fingerprint != first


def test_an_empty_split_is_refused(tmp_path):
    for name in ("a", "b"):
        save_picture(tmp_path / name / "1.png")
    with pytest.raises(DataError, match="the val split is empty"):
        index_source(folder_data(tmp_path))


def test_array_samples_are_named_by_source_and_row():
    split = Split(np.zeros((3, 2, 2, 1), np.uint8), {"labels": torch.zeros(3)}, "digits")
    rows = torch.tensor([2, 0])
    examples = Examples(MemoryStore(np.zeros((3, 1, 2, 2), np.uint8)), rows, {}, split, rows)
    assert examples.sample_name(0) == "digits[2]"


@pytest.mark.parametrize("kind", union_members(Source), ids=lambda kind: kind.kind)
def test_every_source_has_a_description(kind):
    assert kind.__doc__
    assert kind.image_shape is None or len(kind.image_shape) == 3


def test_given_statistics_are_used_and_measured_ones_are_saved_in_the_run(trained_run, tiny):
    from cnnrun.experiment import config_file

    given = Data.model_validate({"source": "digits", "image": {"mean": [100.0], "std": [50.0]}})
    assert (prepare(given).facts.mean, prepare(given).facts.std) == ((100.0,), (50.0,))
    written = config_file.read_config(trained_run / "config.yaml")
    measured = prepare(config_file.read_config(tiny).data).facts
    assert (tuple(written.data.image.mean), tuple(written.data.image.std)) == (measured.mean, measured.std)
    assert prepare(written.data).facts == measured
