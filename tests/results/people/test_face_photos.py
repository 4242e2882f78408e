"""Faces in photos: found, judged, written, verified, enrolled and identified."""

from __future__ import annotations

import csv
import io
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pil
from PIL import ImageFilter

from cnnrun.base.errors import DataError
from cnnrun.base.similarity import EUCLIDEAN
from cnnrun.results.people.embeddings import IdentityOptions
from cnnrun.results.people.enrolment import enroll_people
from cnnrun.results.people.face_crops import CropOptions, cut_faces
from cnnrun.results.people.face_finder import LANDMARKS
from cnnrun.results.people.face_photos import PhotoFace, PhotoSettings, choose_single_face, measure_sharpness
from cnnrun.results.people.gallery_file import GalleryMaker, build_gallery, read_gallery, write_gallery
from cnnrun.tasks.embedding.pair_metrics import RankedPairs, all_pairs
from tests.support.face_data import EMBEDDER, FINDER, ORL, PHOTOS, needs_models, needs_photos

CPU = torch.device("cpu")
ONE_MAN = ("obama", "obama2", "obama3", "obama_partial_face", "obama_partial_face2")


def photo(name: str) -> Path:
    (path,) = PHOTOS.glob(f"{name}.*")
    return path


def paste_photos(path: Path, names: tuple[str, ...]) -> Path:
    """A group photo, with the photos beside each other."""
    group = Pil.new("RGB", (500 * len(names), 600), (90, 120, 150))
    for index, name in enumerate(names):
        part = Pil.open(photo(name)).convert("RGB")
        part.thumbnail((480, 580))
        group.paste(part, (500 * index + 10, 10))
    group.save(path, quality=95)
    return path


def read_size(path: Path | str) -> tuple[int, int]:
    with Pil.open(path) as image:
        return image.size


def example_face(problem: str = "", x1: float = 10.0) -> PhotoFace:
    return PhotoFace((x1, 20.0, 60.0, 80.0), [(20.0, 30.0)] * 5, 0.9, np.zeros((150, 150, 3), np.uint8), problem)


@needs_photos
def test_every_pair_of_one_man_is_accepted_and_every_pair_of_two_men_refused():
    embedder = IdentityOptions(EMBEDDER, Path("runs"), CPU).open_embedder()
    threshold = IdentityOptions(EMBEDDER, Path("runs"), CPU).choose_threshold(embedder).value
    assert EUCLIDEAN.to_display(threshold) == 0.6
    names = (*ONE_MAN, "biden", "astronaut")
    embeddings = np.array([image.embedding for image in embedder.embed_images([photo(name) for name in names], 8)])
    similarities = EUCLIDEAN.compare_all(embeddings, embeddings)
    for (i, first), (j, second) in itertools.combinations(enumerate(names), 2):
        is_one_man = first in ONE_MAN and second in ONE_MAN
        assert (similarities[i, j] >= threshold) == is_one_man, (first, second, similarities[i, j])


@needs_photos
def test_verify_takes_photos(run_cli):
    words = ("--run", EMBEDDER, "--json")
    code, out, _ = run_cli("verify", photo("obama"), photo("obama2"), *words)
    answer = json.loads(out)
    assert (code, answer["same"], answer["threshold"], answer["far"]) == (0, True, 0.6, None)
    assert [set(face["landmarks"]) for face in answer["faces"]] == [set(LANDMARKS)] * 2
    assert not json.loads(run_cli("verify", photo("obama"), photo("biden"), *words)[1])["same"]


@needs_photos
def test_a_photo_without_exactly_one_good_face_is_named_with_the_reason(tmp_path, run_cli):
    good = Pil.open(photo("obama2")).convert("RGB")
    good.filter(ImageFilter.GaussianBlur(12)).save(tmp_path / "blurred.png")
    good.resize((good.width // 12, good.height // 12)).save(tmp_path / "tiny.png")
    Pil.new("RGB", (300, 300), (10, 200, 30)).save(tmp_path / "empty.png")
    paste_photos(tmp_path / "two.jpg", ("obama2", "biden"))
    reasons = {
        "blurred.png": "too blurred (sharpness",
        "tiny.png": "too small (",
        "empty.png": "no face found",
        "two.jpg": "2 faces, but one is expected",
    }
    for name, reason in reasons.items():
        code, _, err = run_cli("verify", photo("obama2"), tmp_path / name, "--run", EMBEDDER)
        assert code == 8
        assert f"{name}: " in err
        assert reason in err
        assert err.count("\n") == 1


@needs_photos
def test_people_are_enrolled_from_photos_and_found_in_a_group_photo(tmp_path, run_cli):
    for person, names in {"Barack Obama": ("obama", "obama3"), "Joe Biden": ("biden",)}.items():
        for name in names:
            path = tmp_path / "people" / person / photo(name).name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.hardlink_to(photo(name))
    gallery = tmp_path / "g.safetensors"
    code, out, _ = run_cli("enroll", tmp_path / "people", "--gallery", gallery, "--run", EMBEDDER, "--json")
    enrolled = json.loads(out)
    assert (code, enrolled["people"]) == (0, {"Barack Obama": 2, "Joe Biden": 1})
    assert len(enrolled["finder"]) == 64
    group = paste_photos(tmp_path / "group.jpg", ("biden", "astronaut", "obama2"))
    words = ("identify", group, "--gallery", gallery, "--run", EMBEDDER)
    code, out, _ = run_cli(*words, "--json", "--draw", tmp_path / "drawn")
    faces = sorted(json.loads(out)["faces"], key=lambda face: face["box"][0])
    assert code == 0
    assert [face["person"] for face in faces] == ["Joe Biden", None, "Barack Obama"]
    assert [len(face["matches"]) for face in faces] == [2, 2, 2]
    drawn, plain = (np.asarray(Pil.open(path).convert("RGB"), int) for path in (tmp_path / "drawn/group.png", group))
    assert drawn.shape == plain.shape
    assert (np.abs(drawn - plain).max(2) > 60).any()
    rows = list(csv.DictReader(io.StringIO(run_cli(*words, "--csv")[1])))
    assert sorted(row["person"] for row in rows) == ["", "Barack Obama", "Joe Biden"]
    assert {row["face"] for row in rows} == {"1", "2", "3"}
    text = run_cli(*words)[1]
    assert "3 faces: " in text
    assert "unknown" in text


@needs_photos
def test_a_gallery_is_bound_to_its_finder(tmp_path, run_cli):
    people, gallery = tmp_path / "people", tmp_path / "g.safetensors"
    (people / "a").mkdir(parents=True)
    (people / "a" / "a.jpg").hardlink_to(photo("obama2"))
    words = ("--gallery", gallery, "--run", EMBEDDER)
    assert run_cli("enroll", people, *words)[0] == 0
    code, _, err = run_cli("identify", photo("obama"), *words, "--no-find")
    assert code == 3
    assert "made from faces that were found in photos; give --find" in err
    gallery.unlink()
    assert run_cli("enroll", people, *words, "--no-find")[0] == 0
    code, _, err = run_cli("identify", photo("obama"), *words)
    assert code == 3
    assert "made from images without looking for faces; give --no-find" in err
    code, _, err = run_cli("identify", photo("obama"), *words, "--no-find", "--draw", tmp_path / "drawn")
    assert code == 2
    assert "give --find" in err


@needs_photos
def test_faces_are_written_aligned_with_a_table(tmp_path, run_cli):
    photos, out = tmp_path / "photos", tmp_path / "faces"
    (photos / "trip").mkdir(parents=True)
    paste_photos(photos / "group.jpg", ("biden", "obama2"))
    (photos / "trip" / "group.jpg").hardlink_to(photo("astronaut"))
    Pil.new("RGB", (200, 200)).save(photos / "nobody.png")
    (photos / "cut.jpg").write_bytes(photo("obama").read_bytes()[:5_000])
    words = ("faces", photos, "--out", out, "--finder", FINDER)
    code, text, err = run_cli(*words, "--draw", tmp_path / "drawn")
    assert code == 8
    assert "cut.jpg: cannot be decoded" in err
    assert "nobody.png: no face found" in text
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    assert files == ["group-2.png", "group.png", "trip/group.png"]
    assert {read_size(out / file) for file in files} == {(150, 150)}
    with (out / "faces.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["file"] for row in rows) == ["", *files]
    assert all(float(row["left_eye_x"]) < float(row["right_eye_x"]) for row in rows if row["file"])
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["group-2.png", "group.png", "nobody.png"]
    code, _, err = run_cli(*words)
    assert code == 2
    assert "is not empty; give a new folder" in err
    code, _, err = run_cli("faces", photos, "--out", tmp_path / "a", "--draw", tmp_path / "a", "--finder", FINDER)
    assert code == 2
    assert "give two folders" in err


@needs_photos
def test_what_cannot_be_recognised_is_in_the_table_alone(tmp_path, run_cli):
    out = tmp_path / "faces"
    code, text, _ = run_cli("faces", photo("obama"), "--out", out, "--finder", FINDER)
    assert code == 0
    assert "left out: perhaps not a face (score 0.8" in text
    assert [path.name for path in out.glob("*.png")] == ["obama.png"]
    with (out / "faces.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["file"] for row in rows) == ["", "obama.png"]
    assert [row["problem"][:18] for row in rows if not row["file"]] == ["perhaps not a face"]


@needs_photos
def test_the_table_is_written_when_the_command_is_stopped(tmp_path):
    reader = CropOptions(None, Path("runs"), CPU, None, FINDER, PhotoSettings()).open_reader()
    predicted = cut_faces(reader, [photo("obama2"), photo("biden")], tmp_path / "faces", None)
    next(predicted)
    predicted.close()
    with (tmp_path / "faces" / "faces.csv").open(newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["obama2.png"]


@needs_photos
def test_a_face_too_small_in_the_photo_stays_too_small_when_it_is_enlarged(tmp_path, run_cli):
    with Pil.open(photo("biden")) as image:
        image.resize((image.width // 14, image.height // 14)).save(tmp_path / "tiny.png")
    for words in (("--enlarge", "4"), ("--size", "40")):
        code, text, _ = run_cli(
            "faces", tmp_path / "tiny.png", "--out", tmp_path / words[1], "--finder", FINDER, *words
        )
        assert code == 0
        assert "too small (" in text


@needs_photos
def test_another_face_in_an_enrolment_photo_is_said(tmp_path, run_cli):
    group = Pil.open(paste_photos(tmp_path / "group.png", ("obama2", "biden"))).convert("RGB")
    group.paste(group.crop((500, 0, 1000, 600)).filter(ImageFilter.GaussianBlur(6)), (500, 0))
    (tmp_path / "people" / "a").mkdir(parents=True)
    group.save(tmp_path / "people" / "a" / "1.png")
    words = ("--gallery", tmp_path / "g.safetensors", "--run", EMBEDDER)
    code, _, err = run_cli("enroll", tmp_path / "people", *words)
    assert code == 0
    assert "1.png: another face is left out: " in err


@needs_photos
def test_a_gallery_is_bound_to_the_faces_template(tmp_path, run_cli):
    from cnnrun.results.people import alignment

    (tmp_path / "people" / "a").mkdir(parents=True)
    (tmp_path / "people" / "a" / "a.jpg").hardlink_to(photo("obama2"))
    words = ("--gallery", tmp_path / "g.safetensors", "--run", EMBEDDER)
    assert run_cli("enroll", tmp_path / "people", *words)[0] == 0
    moved = {"left_eye": (40.0, 60.0), "right_eye": (110.0, 60.0)}
    with pytest.MonkeyPatch.context() as patched:
        template = classmethod(lambda cls, task: cls(moved, (150, 150)))
        patched.setattr(alignment.FaceTemplate, "of_task", template)
        code, _, err = run_cli("identify", photo("obama"), *words)
    assert code == 3
    assert "aligned in another way" in err


@needs_photos
def test_two_enrolments_at_once_lose_nobody(tmp_path):
    for person in ("ann", "bob", "cia"):
        path = tmp_path / person / person / "1.jpg"
        path.parent.mkdir(parents=True)
        path.hardlink_to(photo({"ann": "astronaut", "bob": "biden", "cia": "obama2"}[person]))
    gallery = tmp_path / "g.safetensors"
    options = IdentityOptions(EMBEDDER, Path("runs"), CPU)
    enroll_people(options, tmp_path / "ann", gallery, False, [], 8)
    with ThreadPoolExecutor(2) as pool:
        for task in [
            pool.submit(enroll_people, options, tmp_path / person, gallery, True, [], 8) for person in ("bob", "cia")
        ]:
            task.result()
    assert set(read_gallery(gallery).people) == {"ann", "bob", "cia"}


def test_people_are_removed_without_the_network(tmp_path, run_cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = np.eye(3, 8, dtype=np.float32)
    people = {"ann": rows[:1], "bob": rows[1:]}
    write_gallery(Path("g.safetensors"), build_gallery(GalleryMaker("0" * 64), people))
    assert run_cli("enroll", "--gallery", "g.safetensors", "--remove", "bob")[0] == 0
    assert read_gallery(Path("g.safetensors")).people == ("ann",)
    code, _, err = run_cli("enroll", "--gallery", "g.safetensors", "--remove", "ann")
    assert code == 2
    assert "nobody would be left" in err


@needs_models
def test_options_without_effect_are_refused(tmp_path, run_cli):
    Pil.new("RGB", (64, 64)).save(tmp_path / "a.png")
    image = tmp_path / "a.png"
    for words, message in (
        (("verify", image, image, "--run", EMBEDDER, "--no-find", "--finder", FINDER), "no faces are looked for"),
        (("faces", image, "--out", tmp_path / "f", "--run", EMBEDDER, "--size", "64"), "--size and --run"),
        (("export", "onnx", EMBEDDER, "--images", image, "--split", "test"), "--split is for runs"),
        (("export", "onnx", EMBEDDER), "give --images"),
    ):
        code, _, err = run_cli(*words)
        assert code == 2, words
        assert message in err
    code, _, err = run_cli("export", "finder", image.with_name("none.png"), "--finder", FINDER)
    assert code == 8
    Pil.new("RGB", (30, 300)).save(image)
    code, _, err = run_cli("export", "finder", image, "--finder", FINDER, "--out", tmp_path / "o")
    assert code == 8
    assert "no photo of 48 pixels a side" in err


@needs_photos
@pytest.mark.slow
def test_the_networks_are_exported_and_equal_on_photos(tmp_path, run_cli):
    code, out, _ = run_cli("export", "finder", PHOTOS, "--finder", FINDER, "--out", tmp_path / "finder", "--json")
    assert code == 0
    assert all(network["largest_difference"] < 1e-4 for network in json.loads(out)["networks"])
    assert len(list((tmp_path / "finder").glob("mtcnn_*.onnx"))) == 3
    assert run_cli("faces", PHOTOS, "--out", tmp_path / "faces", "--finder", FINDER)[0] == 0
    embedder = tmp_path / "e.safetensors"
    embedder.hardlink_to(EMBEDDER)
    for kind, suffix in (("onnx", "onnx"), ("code", "py")):
        code, out, _ = run_cli("export", kind, embedder, "--images", tmp_path / "faces", "--json")
        assert code == 0
        assert json.loads(out)["passed"]
        assert (tmp_path / f"e_exported.{suffix}").exists()


@needs_photos
def test_the_network_decides_the_size_and_the_largest_face_can_be_chosen(tmp_path, run_cli):
    group = paste_photos(tmp_path / "group.jpg", ("obama_partial_face", "astronaut"))
    words = ("faces", group, "--finder", FINDER, "--json")
    faces = json.loads(run_cli(*words, "--out", tmp_path / "a", "--size", "64")[1])["faces"]
    assert len(faces) >= 2
    assert read_size(faces[0]["file"]) == (64, 64)
    areas = [(face["box"][2] - face["box"][0]) * (face["box"][3] - face["box"][1]) for face in faces]
    (largest,) = json.loads(run_cli(*words, "--out", tmp_path / "b", "--largest", "--run", EMBEDDER)[1])["faces"]
    assert largest["box"] == faces[int(np.argmax(areas))]["box"]
    assert read_size(largest["file"]) == (150, 150)


@needs_photos
def test_boxes_of_an_enlarged_photo_with_a_margin_are_those_of_the_photo(tmp_path, run_cli):
    words = ("faces", photo("astronaut"), "--finder", FINDER, "--json", "--out")
    (plain,) = json.loads(run_cli(*words, tmp_path / "a")[1])["faces"]
    (changed,) = json.loads(run_cli(*words, tmp_path / "b", "--enlarge", "2", "--margin", "0.3")[1])["faces"]
    width = plain["box"][2] - plain["box"][0]
    np.testing.assert_allclose(plain["box"], changed["box"], atol=0.08 * width)
    for name in LANDMARKS:
        np.testing.assert_allclose(plain["landmarks"][name], changed["landmarks"][name], atol=0.04 * width)
    code, out, _ = run_cli(*words, tmp_path / "c", "--enlarge", "8", "--margin", "2")
    assert code == 8
    assert "more than 50,000,000 pixels" in out


@needs_models
@pytest.mark.slow
@pytest.mark.skipif(not ORL.exists(), reason="needs the ORL faces (scripts/get_data orl-faces)")
def test_people_never_seen_are_told_apart(tmp_path, run_cli):
    """The EER over all 79,800 pairs of the 400 ORL images, without any training: at most 0.5 %."""
    words = ("--enlarge", "3", "--margin", "0.5", "--largest", "--finder", FINDER)
    assert run_cli("faces", ORL, "--out", tmp_path / "faces", *words)[0] == 0
    paths = sorted((tmp_path / "faces").glob("*/*.png"))
    assert len(paths) == 400
    embedder = IdentityOptions(EMBEDDER, Path("runs"), CPU).open_embedder()
    embedder.reader = None
    embeddings = np.array([image.embedding for image in embedder.embed_images(paths, 50)])
    pairs = all_pairs(np.unique([path.parent.name for path in paths], return_inverse=True)[1])
    scores = pairs.similarities(embeddings, EUCLIDEAN)
    assert len(scores) == 79_800
    assert RankedPairs(scores, pairs.same_M, EUCLIDEAN.largest).roc_curve().eer() <= 0.005


@needs_photos
def test_a_missing_or_wrong_finder_is_one_line(tmp_path, run_cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embedder = tmp_path / "models" / "e.safetensors"
    embedder.parent.mkdir()
    embedder.hardlink_to(EMBEDDER)
    words = ("verify", photo("obama"), photo("obama2"), "--run", embedder)
    code, _, err = run_cli(*words)
    assert code == 2
    assert "no face finder at" in err
    assert "scripts/get_data face-models" in err
    code, _, err = run_cli(*words, "--finder", EMBEDDER)
    assert code == 3
    assert "not a face finder" in err
    (embedder.parent / "face-finder.safetensors").hardlink_to(FINDER)
    assert run_cli(*words)[0] == 0


def test_the_one_good_face_of_a_photo_is_chosen():
    good, bad = example_face(), example_face("too small (8 pixels between the eyes, at least 13)")
    assert choose_single_face(Path("a.jpg"), [bad, good]) is good
    for faces, reason in (
        ([], "no face found"),
        ([good, good], "2 faces, but one"),
        ([bad], "no face that can be recognised: too small"),
    ):
        with pytest.raises(DataError, match=f"a.jpg: {reason}"):
            choose_single_face(Path("a.jpg"), faces)


def test_blurring_lowers_sharpness():
    noise = Pil.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8))
    values = [measure_sharpness(np.asarray(noise.filter(ImageFilter.GaussianBlur(radius)))) for radius in (0, 1, 2, 4)]
    assert sorted(values, reverse=True) == values
    assert measure_sharpness(np.full((80, 80, 3), 7, np.uint8)) == 0
