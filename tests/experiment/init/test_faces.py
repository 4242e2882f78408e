"""`init` on faces that `cnnrun faces` has written: people, and the published face network where it is."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from cnnrun.base.errors import ConfigError, DataError
from cnnrun.contracts.facts import DataFacts
from cnnrun.experiment import config_file
from cnnrun.experiment.init.layouts import _FACES_COLUMNS, guess_data
from cnnrun.experiment.init.pretrained import find_pretrained
from cnnrun.experiment.init.reading import Request
from cnnrun.model.network import build_network, materialize
from cnnrun.model.weights_file import parse_description, write_weights_file
from cnnrun.results.people.face_crops import FacesInPhoto, _format_table
from tests.support.images import save_picture

DESCRIPTION = """
task: {verify: {dimension: 128, loss: {triplet: {}}}}
model: face_resnet29
image: {size: 150, channels: 3, mean: [122, 117, 104], std: [256, 256, 256]}
"""


def save_faces(root: Path, people: int = 8, side: int = 150) -> Path:
    """Folders of people, as `cnnrun faces` writes them."""
    for person in range(people):
        for number in range(4):
            save_picture(root / f"p{person}" / f"{number}.png", seed=10 * person + number, size=(side, side))
    (root / "faces.csv").write_text(_format_table([]))
    return root


def save_random_face_network(path: Path) -> Path:
    description = parse_description(DESCRIPTION, str(path))
    facts = DataFacts(("nobody",), (3, 150, 150), (122.0, 117.0, 104.0), (256.0, 256.0, 256.0))
    network = materialize(build_network(description.model.layers, description.task.bind(facts)).network, 0)
    path.parent.mkdir(parents=True)
    write_weights_file(path, network.state_dict(), description, facts)
    return path


def test_the_table_of_faces_begins_as_init_expects():
    header = next(csv.reader([_format_table([])]))
    assert ",".join(header).encode().startswith(_FACES_COLUMNS)
    assert header[1:] == FacesInPhoto((), ()).csv_columns()


def test_aligned_faces_in_folders_are_people(tmp_path):
    reading = guess_data(str(save_faces(tmp_path / "faces")), Request())
    assert (reading.task, reading.verifies_faces, reading.questions) == ("verify", True, ())
    assert reading.describe() == (
        "read as verify, because `cnnrun faces` wrote it, and its folders are people; if it is not: --task classify"
    )
    (tmp_path / "faces" / "faces.csv").write_text("name,of,something,else\n")
    assert guess_data(str(tmp_path / "faces"), Request()).task == "classify"


def test_faces_without_people_are_refused(tmp_path):
    save_picture(tmp_path / "a.png", size=(150, 150))
    (tmp_path / "faces.csv").write_text(_format_table([]))
    with pytest.raises(DataError, match="not in a folder for each person"):
        guess_data(str(tmp_path), Request())


def test_faces_start_from_the_published_network_where_it_is(tmp_path, run_cli, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_faces(Path("faces"))
    words = ("init", "faces", "--minutes", "1")
    code, _, err = run_cli(*words, "--out", "scratch.yaml")
    assert code == 0
    assert "can tell faces apart without training on yours, is not here: scripts/get_data face-models" in err
    assert "not read" not in err
    assert config_file.read_config(Path("scratch.yaml")).model.weights is None
    weights = save_random_face_network(Path("data/face-models/face_resnet29.safetensors"))
    code, out, err = run_cli(*words, "--out", "c.yaml")
    assert code == 0, err
    assert "of which only a new head learns" in out
    experiment = config_file.read_config(Path("c.yaml"))
    assert (experiment.model.weights, experiment.train.freeze) == (str(weights), "stage4_4")
    assert experiment.data.image.size == (150, 150)
    assert run_cli("check", "c.yaml")[0] == 0
    code, _, err = run_cli("train", "c.yaml", "train.epochs=1", "--no-report")
    assert code == 0, err
    run_cli(*words, "--task", "classify", "--out", "d.yaml")  # people who are known: another task, another network
    assert config_file.read_config(Path("d.yaml")).model.weights is None


@pytest.mark.parametrize(("side", "with_table"), [(112, True), (149, False)])
def test_the_face_network_is_refused_for_other_images(side, with_table, tmp_path, run_cli):
    weights = save_random_face_network(tmp_path / "models" / "face_resnet29.safetensors")
    faces = save_faces(tmp_path / "faces", side=side)
    if not with_table:
        (faces / "faces.csv").unlink()
    words = ("--task", "verify", "--weights", weights, "--minutes", "0.1")
    code, _, err = run_cli("init", faces, *words, "--out", tmp_path / "c.yaml")
    assert code == 2
    assert "starts from face_resnet29, with faces of 150x150 pixels that `cnnrun faces` has aligned" in err


def test_the_size_of_faces_that_the_network_does_not_take_is_said(tmp_path, run_cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_faces(Path("faces"), side=112)
    save_random_face_network(Path("data/face-models/face_resnet29.safetensors"))
    code, _, err = run_cli("init", "faces", "--minutes", "0.1", "--out", "c.yaml")
    assert code == 0
    assert "faces of 112x112: the published face network takes 150x150 (cnnrun faces --size 150)" in err


def test_weights_of_faces_are_found_for_faces_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = Path("data/face-models/face_resnet29.safetensors")
    path.parent.mkdir(parents=True)
    path.touch()
    assert find_pretrained(None) is None
    found = find_pretrained(None, for_faces=True)
    assert found is not None
    assert (found.path, found.embeds_faces) == (path, True)
    with pytest.raises(ConfigError, match=r"or face_resnet29\.safetensors for faces"):
        find_pretrained(Path("odd.safetensors"))
