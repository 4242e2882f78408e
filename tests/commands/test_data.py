"""The commands `data check`, `data show` and `data split`."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pil

from cnnrun.base.progress import progress_bar
from cnnrun.data.index import index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.experiment import config_file

CONFIG = """
task: classify
data:
  source: {{folder: {root}}}
  image: {{size: 16, channels: 3}}
  split: {{val: 0.25}}
model: [flatten]
train:
  batch: 8
"""


def photo(path: Path, seed: int, size: int = 48) -> Path:
    """A smooth image like a photograph, because noise would not survive JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rough = Pil.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8))
    rough.resize((size, size), Pil.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        for number in range(10):
            photo(tmp_path / "pets" / name / f"{number}.png", abs(hash(name)) % 997 * 100 + number)
    return tmp_path / "pets"


@pytest.fixture
def config(root, tmp_path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG.format(root=root))
    return path


def findings(run_cli, config, *words) -> tuple[int, dict[str, dict]]:
    code, out, _ = run_cli("data", "check", config, "--json", *words)
    return code, {each["what"]: each for each in json.loads(out)["findings"]}


def test_valid_data_passes_with_its_statistics(run_cli, config):
    code, out, err = run_cli("data", "check", config, "--json")
    found = json.loads(out)
    assert (code, err, found["findings"]) == (0, "", [])
    assert found["pictures"] == {"train": 20, "val": 20}
    assert found["classes"]["train"] == {"cat": 10, "dog": 10}
    assert found["sizes"] == {"smallest": [48, 48], "median": [48, 48], "largest": [48, 48], "distinct": 1}
    assert found["formats"] == {"PNG": 40}
    train = config_file.read_config(config)
    made = json.loads(run_cli("check", config, "--json", "train.batch=8")[1])
    assert made["counts"] == found["pictures"]
    assert train.data.leakage == "error"
    code, out, _ = run_cli("data", "check", config)
    assert "no problems found" in out


def test_data_check_reports_everything_that_training_would_refuse(run_cli, config, root):
    (root / "train/cat/bad.jpg").write_bytes(b"")
    (root / "val/dog/copy.png").write_bytes((root / "train/dog/1.png").read_bytes())
    Pil.open(root / "train/dog/2.png").save(root / "val/dog/again.bmp")
    Pil.open(root / "train/dog/3.png").save(root / "val/dog/near.jpg", quality=80)
    (root / "train/dog/twin.png").write_bytes((root / "train/cat/5.png").read_bytes())
    code, found = findings(run_cli, config)
    assert code == 8
    assert {what: (each["level"], each["count"]) for what, each in found.items()} == {
        "cannot be used": ("error", 1),
        "the same image in several splits, byte for byte": ("error", 1),
        "the same image in several splits, pixel for pixel": ("error", 1),
        "the same image under several labels": ("error", 1),
        "nearly the same image in several splits": ("warning", 1),
        "the same image again in one split, byte for byte": ("note", 1),
    }
    pair = found["the same image in several splits, byte for byte"]["examples"][0]
    assert pair == [f"{root}/train/dog/1.png (train, dog)", f"{root}/val/dog/copy.png (val, dog)"]
    code, _, err = run_cli("train", config, "--runs", root.parent / "runs")
    assert code == 8
    assert "bad.jpg: empty file" in err
    code, _, err = run_cli("train", config, "--runs", root.parent / "runs", "data.bad_files=skip")
    assert code == 8
    assert "2 images in more than one split, such as" in err
    assert "1 image under more than one label" in err
    assert not (root.parent / "runs").exists()


def test_images_skipped_by_the_config_are_left_out_and_listed(run_cli, config, root, tmp_path):
    (root / "train/cat/bad.jpg").write_bytes(b"")
    (root / "val/dog/copy.png").write_bytes((root / "train/dog/1.png").read_bytes())
    settings = ("data.bad_files=skip", "data.leakage=skip", "train.epochs=1", "train.batch=8")
    code, _, err = run_cli("train", config, "--runs", tmp_path / "runs", *settings)
    assert code == 0, err
    assert "left out because of this (data.leakage: skip)" in err
    lines = [json.loads(line) for line in (tmp_path / "runs/c/1/skipped.jsonl").read_text().splitlines()]
    assert {(each["split"], Path(each["picture"]).name) for each in lines} == {("train", "bad.jpg"), ("train", "1.png")}
    code, found = findings(run_cli, config, *settings[:2])
    assert code == 0
    assert all(each["level"] != "error" for each in found.values())


def test_training_is_refused_when_skipping_leaks_leaves_no_image(run_cli, config, root, tmp_path):
    for path in (root / "train").rglob("*.png"):
        (root / "val" / path.relative_to(root / "train")).write_bytes(path.read_bytes())
    code, _, err = run_cli("train", config, "data.leakage=skip", "train.batch=4", "--runs", tmp_path / "runs")
    assert code == 8
    assert "every training image is part of a leak, so none would be left" in err


def test_unusual_files_are_reported(run_cli, config, root):
    (root / "train/cat/0.png").rename(root / "train/cat/0.jpg")
    exif = Pil.Exif()
    exif[0x0112] = 6
    Pil.open(root / "train/cat/1.png").save(root / "train/cat/turned.jpg", exif=exif)
    Pil.new("RGB", (20, 20), (9, 9, 9)).save(root / "train/dog/flat.png")
    photo(root / "train/dog/A.png", 5000)
    photo(root / "train/dog/a.PNG", 5001)
    code, found = findings(run_cli, config)
    assert code == 0
    assert found["files that are not what their name says"]["examples"] == [[f"{root}/train/cat/0.jpg (train, cat)"]]
    assert found["images that EXIF rotates"]["count"] == 1
    assert found["images of one single colour"]["examples"] == [[f"{root}/train/dog/flat.png (train, dog)"]]
    assert found["file names that differ only in case or Unicode form"]["count"] == 2


def test_classes_missing_in_a_split_are_reported(run_cli, config, root):
    for path in (root / "val/dog").iterdir():
        path.unlink()
    code, found = findings(run_cli, config)
    assert (code, found["classes without an image in val"]["examples"]) == (0, [["dog"]])
    code, _, err = run_cli("train", config, "--runs", root / "runs", "train.epochs=1", "train.batch=8")
    assert code == 0
    assert "no image of dog in val" in err


def test_a_manifest_finds_changed_missing_and_new_files(run_cli, config, root, tmp_path):
    manifest = tmp_path / "sums"
    assert run_cli("data", "check", config, "--write-manifest", manifest)[0] == 0
    assert run_cli("data", "check", config, "--verify", manifest)[0] == 0
    common = root  # the folder that all files are in
    subprocess.run(["sha256sum", "--check", "--quiet", manifest], cwd=common, check=True)
    picture = root / "val/cat/3.png"
    pixels = bytearray(picture.read_bytes())
    pixels[len(pixels) // 2] ^= 1
    picture.write_bytes(pixels)
    (root / "val/cat/4.png").unlink()
    photo(root / "val/cat/new.png", 9999)
    code, out, _ = run_cli("data", "check", config, "--verify", manifest, "--json", "data.bad_files=skip")
    assert code == 8
    assert json.loads(out)["differences"] == {
        "changed": ["val/cat/3.png"],
        "missing": ["val/cat/4.png"],
        "new": ["val/cat/new.png"],
    }
    manifest.write_text("no manifest\n")
    code, _, err = run_cli("data", "check", config, "--verify", manifest)
    assert (code, "sums:1: not a line of a manifest" in err) == (8, True)


def test_data_check_covers_a_source_in_memory(run_cli, tiny):
    code, out, _ = run_cli("data", "check", tiny, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["sizes"]["median"] == [8, 8]
    assert not any(
        "same image in several" in each["what"] and "nearly" not in each["what"] for each in found["findings"]
    )


def read_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_data_split_writes_a_table_that_trains(run_cli, picture_folder, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.format(root=picture_folder))
    out = tmp_path / "split.csv"
    code, text, _ = run_cli("data", "split", config, "--val", "0.25", "--test", "0.25", "--out", out)
    assert code == 0
    assert f"source: {{table: {{path: {out}, root: {picture_folder}}}}}" in text
    counts = {(row["label"], row["split"]): 0 for row in read_rows(out)}
    for row in read_rows(out):
        counts[row["label"], row["split"]] += 1
    assert counts == {(name, part): n for name in ("cat", "dog") for part, n in (("train", 7), ("val", 2), ("test", 3))}
    table = f"data.source={{table: {{path: {out}, root: {picture_folder}}}}}"
    assert index_source(config_file.read_config(config, [table]).data).counts == {"train": 14, "val": 4, "test": 6}
    # The same parts as data.split with the same seed.
    held = config_file.read_config(config, ["data.split={val: 0.25, test: 0.25}"])
    names = {
        name: {split.sample_name(int(row)) for row in part}
        for name, (split, part) in index_source(held.data).splits.items()
    }
    for row in read_rows(out):
        assert str(picture_folder / row["path"]) in names[row["split"]]


def test_folds_keep_groups_together(run_cli, picture_folder, tmp_path):
    config, out = tmp_path / "c.yaml", tmp_path / "folds.csv"
    config.write_text(CONFIG.format(root=picture_folder))
    code, text, _ = run_cli(
        "data", "split", config, "--folds", "3", "--test", "0", "--group-by", r"(\d)\d?\.png", "--out", out
    )
    assert (code, "split: fold_1" in text) == (0, True)
    made = read_rows(out)
    for fold in ("fold_1", "fold_2", "fold_3"):
        sides: dict[str, set[str]] = {}
        for row in made:
            sides.setdefault(row["group"], set()).add(row[fold])
        assert all(len(side) == 1 for side in sides.values())
    assert all([row[f"fold_{k}"] for k in (1, 2, 3)].count("val") == 1 for row in made)
    table = f"data.source={{table: {{path: {out}, root: {picture_folder}, split: fold_2}}}}"
    data = config_file.read_config(config, [table]).data
    assert index_source(data).contents.splits["train"].groups is not None
    assert run_cli("train", config, table, "train.epochs=1", "train.batch=4", "--runs", tmp_path / "runs")[0] == 0
    out.unlink()
    for words in (["--folds", "1"], ["--val", "0.6", "--test", "0.5"], ["--group-by", "("]):
        assert run_cli("data", "split", config, *words, "--out", out)[0] == 2
    for words in (["--group-by", "nothing"], ["--folds", "30"]):
        assert run_cli("data", "split", config, *words, "--out", out)[0] == 8
    assert not out.exists()


def test_a_group_in_two_splits_is_refused_as_a_leak(run_cli, picture_folder, tmp_path):
    table, config = tmp_path / "t.csv", tmp_path / "c.yaml"
    lines = [
        f"{name}/{number}.png,{name},{'val' if number > 8 else 'train'},{name}{number % 5}"
        for name in ("cat", "dog")
        for number in range(12)
    ]
    table.write_text("path,label,split,group\n" + "\n".join(lines) + "\n")
    config.write_text(
        CONFIG.replace("folder: {root}", "table: {{path: {table}, root: {root}}}").format(
            root=picture_folder, table=table
        )
    )
    code, _, err = run_cli("train", config, "--runs", tmp_path / "runs")
    assert code == 8
    assert "6 groups in more than one split" in err
    code, found = findings(run_cli, config)
    assert (code, found["groups in several splits"]["count"]) == (8, 6)


def test_data_show_writes_a_sheet_of_augmented_images(run_cli, config, tmp_path):
    out, board = tmp_path / "s.png", tmp_path / "board"
    words = ["data.augment={flip: horizontal, mixup: 0.5}", "--images", "3", "--epochs", "2"]
    assert run_cli("data", "show", config, *words, "--out", out, "--tensorboard", board)[0] == 0
    sheet = np.asarray(Pil.open(out))
    assert sheet.shape[2] == 3
    assert sheet.shape[1] > 3 * 112
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board)).Reload()
    (image,) = events.Images("data/sheet")
    assert np.array_equal(np.asarray(Pil.open(io.BytesIO(image.encoded_image_string))), sheet)
    assert run_cli("data", "show", config, "--out", tmp_path)[0] == 2
    photo(tmp_path / "mine.png", 3)
    for words in (["show", config, "--out", tmp_path / "mine.png"], ["split", config, "--out", config]):
        code, _, err = run_cli("data", *words)
        assert (code, "already exists" in err) == (2, True)
    assert run_cli("data", "check", config, "--write-manifest", config)[0] == 2
    before = out.read_bytes()
    run_cli("data", "show", config, *words, "--out", out)
    assert out.read_bytes() == before


WIDE = CONFIG.replace("channels: 3", "channels: 1") + "  epochs: 1\n"


@pytest.mark.parametrize(("peak", "levels"), [(4095, 16), (16383, 64), (65535, None)])
def test_sixteen_bit_images_with_few_used_levels_are_reported_by_every_command(run_cli, tmp_path, peak, levels):
    for number in range(20):
        path = tmp_path / "p" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, peak, (12, 12), dtype=np.uint16)
        pixels[0, 0] = peak
        Pil.fromarray(pixels).save(path)
    config = tmp_path / "c.yaml"
    config.write_text(WIDE.format(root=tmp_path / "p"))
    words = f"have no value above {peak:,} of 65,535, which leaves {levels} of 256 grey levels"
    for command in (["check"], ["data", "check"], ["train", "--no-report", "--runs", tmp_path / "runs"]):
        code, out, err = run_cli(*command, config)
        assert code == 0, err
        assert (words in out + err) == (levels is not None)


def test_copies_of_an_image_are_in_one_split(run_cli, tmp_path):
    for number in range(40):
        photo(tmp_path / "p" / "ab"[number % 2] / f"{number:02}.png", number // 8 * 2 + number % 2)  # four copies each
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.format(root=tmp_path / "p"))
    code, out, err = run_cli("check", config, "train.batch=2", "data.split.test=0.2")
    assert code == 0, err
    assert "moved within data.split, so that all copies of an image are in one split" in out
    made = config_file.read_config(config, ["train.batch=2", "data.split.test=0.2"])
    data = build_dataset(made.data, index_source(made.data), progress_bar)
    sides = {}
    for name, split in data.splits.items():
        for number in range(len(split)):
            sides.setdefault(Path(split.sample_name(number)).read_bytes(), set()).add(name)
    assert len(sides) == 10
    assert all(len(names) == 1 for names in sides.values())
    assert sum(data.facts.counts.values()) == 40
    alone = build_dataset(made.data, index_source(made.data), progress_bar, ["val"])
    assert [alone.splits["val"].sample_name(n) for n in range(len(alone.splits["val"]))] == [
        data.splits["val"].sample_name(n) for n in range(len(data.splits["val"]))
    ]
    run_cli("data", "split", config, "--out", tmp_path / "s.csv", "--val", "0.3", "--test", "0")
    by_bytes = {}
    for row in read_rows(tmp_path / "s.csv"):
        by_bytes.setdefault((tmp_path / "p" / row["path"]).read_bytes(), set()).add(row["split"])
    assert {len(names) for names in by_bytes.values()} == {1}
    assert {name for names in by_bytes.values() for name in names} == {"train", "val"}


def test_data_check_exits_as_training_would(run_cli, tmp_path):
    for number in range(12):
        photo(tmp_path / f"{number}.png", number)
    lines = [f"{number}.png,{16777216 + number}" for number in range(12)]
    (tmp_path / "t.csv").write_text("path,y\n" + "\n".join(lines) + "\n")
    config = tmp_path / "c.yaml"
    config.write_text(
        f"task: regress\ndata: {{source: {{table: {{path: {tmp_path}/t.csv, numbers: y}}}}, "
        "image: {size: 16, channels: 3}, split: {val: 0.25}}\nmodel: [flatten]\ntrain: {batch: 2}\n"
    )
    answers = [run_cli(*words, config)[::2] for words in (["check"], ["data", "check"], ["train", "--no-report"])]
    assert {code for code, _ in answers} == {8}
    told = [[line for line in err.splitlines() if "too finely for float32" in line] for _, err in answers]
    assert told[0] == told[1] == told[2] != []
    found = json.loads(run_cli("data", "check", config, "--json")[1])
    assert found["refused"] == {"lines": told[0], "exit_code": 8}


def test_one_file_in_two_splits_is_not_reported_as_two_similar_names(run_cli, tmp_path):
    entry = {"width": 48, "height": 48}
    images = [{"id": n, "file_name": f"{n}.png", **entry} for n in range(8)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [4, 4, 9, 9]} for n in range(8)]
    for number in range(8):
        photo(tmp_path / f"{number}.png", number)
    (tmp_path / "train.json").write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]})
    )
    config = tmp_path / "c.yaml"
    config.write_text(
        f"task: detect\ndata: {{source: {{coco: {{train: {tmp_path}/train.json, val: {tmp_path}/train.json}}}}, "
        "image: {size: 24, channels: 3}, leakage: keep}\n"
        "model: [{conv: {out_channels: 4, stride: 8}}]\ntrain: {batch: 2}\n"
    )
    _, found = findings(run_cli, config)
    assert "the same image in several splits, byte for byte" in found
    assert "file names that differ only in case or Unicode form" not in found


def test_an_image_with_two_annotations_and_repeated_boxes_are_reported(run_cli, tmp_path):
    entry = {"width": 48, "height": 48}
    images = [{"id": n, "file_name": f"{n}.png", **entry} for n in range(8)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [4, 4 + n, 9, 9]} for n in range(8)]
    boxes += [{**boxes[3], "id": 90}, {**boxes[4], "id": 91, "category_id": 2}]
    for number in range(8):
        photo(tmp_path / f"{number}.png", number if number != 1 else 0)
    kinds = [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}]
    (tmp_path / "train.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": kinds}))
    config = tmp_path / "c.yaml"
    config.write_text(
        f"task: detect\ndata: {{source: {{coco: {tmp_path}/train.json}}, "
        "image: {size: 24, channels: 3}, split: {val: 0.25}}\n"
        "model: [{conv: {out_channels: 4, stride: 8}}]\ntrain: {batch: 2, epochs: 1}\n"
    )
    _, found = findings(run_cli, config)
    assert found["the same image with other boxes"]["count"] == 1
    assert found["boxes: the same box and class"]["examples"][0][0].startswith(
        f"{tmp_path}/train.json: annotation 90 of 3.png"
    )
    assert "with another class as annotation 4" in found["boxes: the same box with another class"]["examples"][0][0]
    _, _, err = run_cli("train", config, "--no-report", "--runs", tmp_path / "runs")
    for words in (
        "more than once with different boxes",
        "the same box and class",
        "the same box with another class",
    ):
        assert words in err
