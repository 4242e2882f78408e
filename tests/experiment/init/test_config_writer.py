"""`cnnrun init` writes a config that passes `check` and trains, for many kinds of data."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pil
from PIL import ImageDraw

from cnnrun.base.errors import DataError
from cnnrun.experiment import config_file, schema
from cnnrun.experiment.import_weights import convert_weights
from cnnrun.experiment.init import choice
from cnnrun.experiment.init.config_writer import write_config
from cnnrun.experiment.init.layouts import guess_data
from cnnrun.experiment.init.reading import Request
from cnnrun.experiment.init.recipes import RECIPES
from cnnrun.experiment.init.survey import survey_source
from cnnrun.model import weights_file
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.studies.train_run import train_run
from tests.support.images import save_class_folders, save_picture, write_pictures


@pytest.fixture(autouse=True)
def _steady_speed(monkeypatch):
    """Fix the measured speed at 1,000 images/s of 3x32x32, in proportion for other sizes."""
    monkeypatch.setattr(choice, "estimate_images_per_second", lambda network, step: 1000 * 3072 / np.prod(step.shape))


def draw_shape(path: Path, seed: int, kind: str, size: int = 44) -> Path:
    """Save an image of a bright disc, square or ring on a dark noisy background."""
    rng = np.random.default_rng(seed)
    made = Pil.fromarray(rng.integers(0, 60, (size, size, 3), dtype=np.uint8))
    draw, colour = ImageDraw.Draw(made), tuple(map(int, rng.integers(120, 256, 3)))
    (x, y), r = rng.integers(14, size - 14, 2), int(rng.integers(7, 13))
    box = (int(x) - r, int(y) - r, int(x) + r, int(y) + r)
    if kind == "disc":
        draw.ellipse(box, fill=colour)
    elif kind == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.ellipse(box, outline=colour, width=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return path


@pytest.fixture
def messy_folder(tmp_path) -> Path:
    """A folder of shapes with uneven classes, undecodable files, duplicates and an image with two labels."""
    root = tmp_path / "shapes"
    for label, (kind, count) in enumerate((("disc", 130), ("square", 100), ("ring", 30))):
        for number in range(count):
            draw_shape(root / kind / f"{kind}{number}.png", 1000 * label + number, kind)
    (root / "disc" / "empty.png").write_bytes(b"")
    (root / "disc" / "page.jpg").write_bytes(b"<!DOCTYPE html>")
    cut = (root / "disc" / "disc0.png").read_bytes()
    (root / "disc" / "cut.png").write_bytes(cut[: len(cut) // 2])
    for number in range(12):
        (root / "disc" / f"again{number}.png").write_bytes((root / "disc" / f"disc{number}.png").read_bytes())
    (root / "square" / "wrong.png").write_bytes((root / "ring" / "ring4.png").read_bytes())
    return root


def write_and_read_config(data: object, out: Path, **how) -> tuple[dict, schema.Experiment]:
    found = write_config(str(data), Request(how.pop("task", None)), out, how.pop("minutes", 3.0), from_scratch=True)
    return found, config_file.read_config(out)


@pytest.mark.slow
def test_a_messy_folder_gives_a_config_that_trains_well(messy_folder, tmp_path):
    found, tried = write_and_read_config(messy_folder, tmp_path / "c.yaml", minutes=0.15)
    assert (tried.data.bad_files, tried.data.leakage) == ("skip", "skip")
    assert tried.task.class_weights == "balanced"
    assert tried.train.monitor == "val/f1"
    assert {each["what"]: each["count"] for each in found["findings"]}["cannot be used"] == 3
    text = (tmp_path / "c.yaml").read_text()
    assert "# 3 cannot be used" in text
    assert "training leaves them out" in text
    torch.manual_seed(0)
    run = train_run(tried, tmp_path / "runs", torch.device("cpu"), resume=False)
    measured = evaluate_run(Path(run["run"]), tmp_path / "runs", torch.device("cpu"), None)
    assert measured["split"] == "test"
    assert measured["numbers"]["accuracy"] > 0.8


def test_init_recognizes_the_columns_and_gray_images_of_a_table(tmp_path):
    root = tmp_path / "scans"
    rows = []
    for number in range(40):
        picture = save_picture(root / "img" / f"{number}.png", seed=number, size=(30, 30), mode="L")
        rows.append([number, picture.name, f"p{number // 2}", "ab"[number % 2], "test" if number > 30 else "train"])
    with (root / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "image_file", "patient_id", "dx", "subset"], *rows])
    for data in (root, root / "list.csv"):
        reading = guess_data(str(data), Request())
        table = reading.source["table"]
        expected = {"image": "image_file", "split": "subset", "group": "patient_id", "label": "dx"}
        assert {key: table[key] for key in expected} == expected
        assert table["root"] == str(root / "img")
        assert reading.name == data.stem
    _, tried = write_and_read_config(root, tmp_path / "c.yaml")
    assert tried.data.image_shape() == (1, 32, 32)
    assert (tried.data.split.test, tried.data.augment.flip) == (0.0, "none")


def test_one_column_per_class_is_recognized_and_ambiguous_tables_are_refused(tmp_path):
    for number in range(8):
        save_picture(tmp_path / f"{number}.png", seed=number)
    table = tmp_path / "t.csv"
    table.write_text("f,cat,dog\n" + "".join(f"{n}.png,{n % 2},{1 - n % 2}\n" for n in range(8)))
    assert guess_data(str(table), Request()).source["table"]["label"] == ["cat", "dog"]
    table.write_text("f,weight\n" + "".join(f"{n}.png,{n * 1.5}\n" for n in range(8)))
    assert guess_data(str(table), Request()).source["table"]["numbers"] == ["weight"]
    table.write_text("f,label\n" + "".join(f"no{n}.png,a\n" for n in range(8)))
    with pytest.raises(DataError, match="none of its first image files exists"):
        guess_data(str(table), Request())
    table.write_text("a,b\n91,92\n")
    with pytest.raises(DataError, match="no column of image files"):
        guess_data(str(table), Request())


def test_init_recognizes_arrays_shards_and_the_digits(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x_train=rng.integers(0, 256, (60, 20, 24, 3), np.uint8), y_train=np.arange(60) % 3)
    found, tried = write_and_read_config(tmp_path / "a.npz", tmp_path / "a.yaml")
    assert (tried.data.image_shape(), found["pictures"]["test"]) == ((3, 20, 24), 9)
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}-000.tar", "w") as archive:
            for number in range(24):
                png = save_picture(tmp_path / "x.png", seed=number + 100 * (part == "val")).read_bytes()
                for extension, data in (("cls", str(number % 2).encode()), ("png", png)):
                    member = tarfile.TarInfo(f"{number}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    assert guess_data(str(tmp_path), Request()).source == {
        "shards": {part: [str(tmp_path / f"{part}-000.tar")] for part in ("train", "val")}
    }
    _, tried = write_and_read_config("digits", tmp_path / "d.yaml")
    assert tried.data.image_shape() == (1, 8, 8)
    assert "image:" not in (tmp_path / "d.yaml").read_text()


def test_init_writes_a_config_for_five_images(tmp_path):
    for number in range(5):
        draw_shape(tmp_path / "few" / "ab"[number % 2] / f"{number}.png", number, "disc")
    (tmp_path / "few" / "classes.json").write_text("[]")  # not a COCO file: the folders decide
    _, tried = write_and_read_config(tmp_path / "few", tmp_path / "c.yaml")
    assert tried.train.batch == 2
    assert tried.data.split.test == 0


def test_a_slow_machine_gets_smaller_images_and_fewer_epochs(messy_folder, tmp_path):
    quick, _ = write_and_read_config(messy_folder, tmp_path / "a.yaml", minutes=100.0)
    slow, _ = write_and_read_config(messy_folder, tmp_path / "b.yaml", minutes=0.1)
    assert (quick["size"], slow["size"]) == ([32, 32], [32, 32]) or quick["size"] > slow["size"]
    assert quick["epochs"] > slow["epochs"]


def test_init_on_the_command_line_writes_a_config_that_passes_check(run_cli, messy_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_cli("init", messy_folder, "--minutes", "0.5")
    assert code == 0
    assert "left out: 3 cannot be used" in out
    assert "next: cnnrun train shapes.yaml" in out
    assert run_cli("check", "shapes.yaml")[0] == 0
    assert run_cli("data", "check", "shapes.yaml")[0] == 0  # the config skips the files with problems
    for words, expected in (
        (["init", messy_folder], "already exists"),
        (["init", "nowhere"], "no such file"),
        (["init", messy_folder, "--task", "detect", "--out", "d.yaml"], "this data serves classify, verify, because"),
        (["init", messy_folder, "--task", "dance", "--out", "d.yaml"], "init writes configs for classify, multilabel"),
    ):
        code, _, err = run_cli(*words)
        assert code in (2, 8)
        assert expected in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("task", RECIPES)
def test_the_config_of_every_task_passes_check_and_trains(task, tmp_path, run_cli, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_pictures(tmp_path / "pictures")
    parent, options = folder.parent, [] if task == "detect" else ["--task", task]
    data = {"verify": parent / "people", "detect": parent / "scenes", "segment": parent / "masks"}.get(task, folder)
    if task == "multilabel":
        data = parent / "scenes"
    if task == "regress":
        data, options = parent / "numbers.csv", [*options, "--label", "level"]
    code, _, err = run_cli("init", data, *options, "--out", tmp_path / "c.yaml", "--minutes", "0.1")
    assert code == 0, err
    experiment = config_file.read_config(tmp_path / "c.yaml")
    assert experiment.task.kind == task
    assert run_cli("check", tmp_path / "c.yaml")[0] == 0
    quick = ["train.epochs=1", "--no-report", "--runs", tmp_path / "runs"]
    code, _, err = run_cli("train", tmp_path / "c.yaml", *quick)
    assert code == 0, err


def test_published_weights_are_used_where_they_are(tmp_path, run_cli, monkeypatch):
    """A head on frozen features for few images, the whole network for many, nothing for tasks they do not serve."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "cnnrun" / "weights"
    weights = random_mobilenet(folder)
    data = save_class_folders(tmp_path / "pets")
    code, out, _ = run_cli("init", data, "--out", tmp_path / "a.yaml")
    assert code == 0
    assert "of which only a new head learns" in out
    frozen = config_file.read_config(tmp_path / "a.yaml")
    assert (frozen.train.freeze, frozen.model.weights) == ("pooled", str(weights))
    assert run_cli("train", tmp_path / "a.yaml", "train.epochs=1", "--no-report", "--runs", tmp_path / "runs")[0] == 0
    monkeypatch.setattr(RECIPES["classify"], "min_images_to_tune", 2)
    _, out, _ = run_cli("init", data, "--out", tmp_path / "b.yaml", "--minutes", "60")
    assert "all of which learn" in out
    assert config_file.read_config(tmp_path / "b.yaml").train.freeze is None
    with monkeypatch.context() as slow:  # no time for all layers
        slow.setattr(choice, "estimate_images_per_second", lambda network, step: 1.0)
        _, out, err = run_cli("init", data, "--out", tmp_path / "b2.yaml", "--minutes", "0.1")
    assert "of which only a new head learns" in out
    assert "not from the weights" not in err
    run_cli("init", data, "--out", tmp_path / "c.yaml", "--from-scratch")
    assert config_file.read_config(tmp_path / "c.yaml").model.weights is None
    people = write_pictures(tmp_path / "pictures").parent / "people"
    code, _, err = run_cli("init", people, "--task", "verify", "--out", tmp_path / "d.yaml", "--weights", weights)
    assert code == 2
    assert "this task starts from face_resnet29, with faces of 150x150 pixels" in err
    for words, problem in (
        (["--weights", weights, "--from-scratch"], "contradict each other"),
        (["--weights", tmp_path / "other.safetensors"], r"give a file named mobilenet_v2.safetensors"),
    ):
        code, _, err = run_cli("init", data, "--out", tmp_path / "e.yaml", *words)
        assert code == 2
        assert problem in err


def test_label_sets_are_tuned_with_fewer_images_and_their_own_rates(tmp_path, run_cli, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random_mobilenet(tmp_path / "cache" / "cnnrun" / "weights")
    monkeypatch.setattr(RECIPES["multilabel"], "min_images_to_tune", 2)
    scenes = write_pictures(tmp_path / "pictures").parent / "scenes"
    words = ("init", scenes, "--task", "multilabel", "--out", tmp_path / "c.yaml", "--minutes", "60")
    assert run_cli(*words)[0] == 0
    train = config_file.read_config(tmp_path / "c.yaml").train
    assert (train.freeze, train.optimizer.kind, train.ema.decay) == (None, "adamw", 0.98)
    quick = ["train.epochs=1", "--no-report", "--runs", tmp_path / "runs"]
    assert run_cli("train", tmp_path / "c.yaml", *quick)[0] == 0


def random_mobilenet(folder: Path) -> Path:
    """Weights of mobilenet_v2 that nobody trained, as `cnnrun zoo weights` writes them."""
    import torchvision

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    torch.save(torchvision.models.mobilenet_v2(weights=None).state_dict(), folder / "w.pth")
    made = convert_weights(folder / "w.pth", "mobilenet_v2", "order", "imagenet", [])
    path = folder / "mobilenet_v2.safetensors"
    weights_file.write_weights_file(path, made.tensors, made.description, made.facts)
    (folder / "w.pth").unlink()
    return path


def test_a_small_data_set_gets_a_batch_of_at_least_twenty_steps(tmp_path):
    for number in range(200):
        draw_shape(tmp_path / "shapes" / "ab"[number % 2] / f"{number}.png", number, "disc" if number % 2 else "ring")
    found, tried = write_and_read_config(tmp_path / "shapes", tmp_path / "c.yaml")
    assert tried.train.steps_per_epoch(found["pictures"]["train"]) >= 20


def test_a_detector_starts_from_published_weights(tmp_path, run_cli, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random_mobilenet(tmp_path / "cache" / "cnnrun" / "weights")
    scenes = write_pictures(tmp_path / "pictures").parent / "scenes"
    code, out, err = run_cli("init", scenes, "--out", tmp_path / "c.yaml", "--minutes", "60")
    assert code == 0, err
    assert "all of which learn" in out
    assert run_cli("check", tmp_path / "c.yaml")[0] == 0
    quick = ["train.epochs=1", "--no-report", "--runs", tmp_path / "runs"]
    assert run_cli("train", tmp_path / "c.yaml", *quick)[0] == 0
    _, _, err = run_cli("init", scenes, "--out", tmp_path / "d.yaml", "--minutes", "0.1")
    assert "not from the weights of mobilenet_v2 in 0.1 minutes: 10 epochs from them take" in err
    assert config_file.read_config(tmp_path / "d.yaml").model.weights is None


def test_boxes_that_are_used_all_the_same_are_not_said_to_be_left_out(tmp_path):
    rows = []
    for number in range(12):
        save_picture(tmp_path / "boxes" / f"{number}.png", seed=number, size=(64, 48))
        rows += [
            {"id": 2 * number + k, "image_id": number, "category_id": 1 + k, "bbox": [5, 5, 20, 20]} for k in (0, 1)
        ]
    content = {
        "images": [{"id": number, "file_name": f"{number}.png", "width": 64, "height": 48} for number in range(12)],
        "annotations": rows,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (tmp_path / "boxes" / "train.json").write_text(json.dumps(content))
    found, experiment = write_and_read_config(tmp_path / "boxes", tmp_path / "c.yaml")
    assert found["bad_boxes"] == 0
    assert experiment.data.bad_boxes == "error"


def test_the_planned_time_counts_the_images_that_are_trained_on(tmp_path):
    folder = save_class_folders(tmp_path / "pets")
    found, experiment = write_and_read_config(folder, tmp_path / "c.yaml", minutes=0.1)
    survey = survey_source({"folder": str(folder)})
    recipe = RECIPES["classify"](survey)
    held_out = experiment.data.split.val + experiment.data.split.test
    assert recipe.training_images == round((1 - held_out) * survey.images)
    seconds = found["epochs"] * recipe.training_images / found["images_per_second"] / choice.STEP_TIME_SHARE
    assert found["minutes"] == pytest.approx(seconds / 60, abs=0.01)


def save_photos_with_masks(root: Path, mode: str) -> Path:
    for number in range(12):
        save_picture(root / "images" / f"{number}.jpg", seed=number, size=(80, 64), mode=mode)
        (root / "masks").mkdir(parents=True, exist_ok=True)
        mask = np.zeros((64, 80), np.uint8)
        mask[8 : 20 + number, 8:40] = 1
        Pil.fromarray(mask).save(root / "masks" / f"{number}.png")
    return root


@pytest.mark.parametrize(("mode", "uses_weights"), [("RGB", True), ("L", False)])
def test_segmentation_of_photos_starts_from_published_weights(mode, uses_weights, tmp_path, run_cli, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random_mobilenet(tmp_path / "cache" / "cnnrun" / "weights")
    photos = save_photos_with_masks(tmp_path / "photos", mode)
    code, out, err = run_cli("init", photos, "--out", tmp_path / "c.yaml", "--minutes", "60")
    assert code == 0, err
    assert ("all of which learn" in out) == uses_weights
    assert (config_file.read_config(tmp_path / "c.yaml").model.weights is not None) == uses_weights
    quick = ["train.epochs=1", "--no-report", "--runs", tmp_path / "runs"]
    assert run_cli("train", tmp_path / "c.yaml", *quick)[0] == 0
