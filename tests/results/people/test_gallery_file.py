"""Galleries: their search is exact and a damaged file is refused."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnnrun.base.errors import CheckpointError, ConfigError, DataError
from cnnrun.results.people import gallery_file
from cnnrun.results.people.gallery_file import Gallery, GalleryMaker

MODEL = "0" * 64
MAKER = GalleryMaker(MODEL)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def example_gallery(seed: int = 0, people: int = 6, dimension: int = 8) -> Gallery:
    draw = np.random.default_rng(seed)
    return gallery_file.build_gallery(
        MAKER, {f"person {n}": unit_rows(draw.normal(size=(draw.integers(1, 5), dimension))) for n in range(people)}
    )


def brute_force_search(gallery: Gallery, query: np.ndarray, most: int) -> list[tuple[str, float]]:
    best = {name: max(float(query @ row) for row in rows) for name, rows in gallery.embeddings_by_person().items()}
    return sorted(best.items(), key=lambda pair: -pair[1])[:most]


@pytest.mark.parametrize("search", ["exact", "faiss"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), people=st.integers(1, 12), most=st.integers(1, 15))
def test_the_search_equals_brute_force(search, seed, people, most):
    if search == "faiss":
        pytest.importorskip("faiss")
    gallery = example_gallery(seed, people)
    queries = unit_rows(np.random.default_rng(seed + 1).normal(size=(5, 8)))
    for query, found in zip(queries, gallery.most_similar(queries, most, search), strict=True):
        expected = brute_force_search(gallery, query, most)
        assert [name for name, _ in found] == [name for name, _ in expected]
        np.testing.assert_allclose([value for _, value in found], [value for _, value in expected], atol=1e-6)


def test_a_search_in_parts_equals_a_search_at_once(monkeypatch):
    gallery, queries = example_gallery(1, 9), unit_rows(np.random.default_rng(2).normal(size=(50, 8)))
    whole = gallery.most_similar(queries, 3)
    monkeypatch.setattr(gallery_file, "_MAX_SIMILARITY_BYTES", 300)
    parts = gallery.most_similar(queries, 3)
    assert [[name for name, _ in row] for row in parts] == [[name for name, _ in row] for row in whole]


def test_a_written_gallery_reads_back_equal(tmp_path):
    gallery = example_gallery()
    gallery_file.write_gallery(tmp_path / "g.safetensors", gallery)
    again = gallery_file.read_gallery(tmp_path / "g.safetensors")
    assert (again.maker, again.people) == (gallery.maker, gallery.people)
    np.testing.assert_array_equal(again.embeddings_ND, gallery.embeddings_ND)
    np.testing.assert_array_equal(again.person_N, gallery.person_N)


def test_people_are_added_and_removed():
    gallery = example_gallery()
    more = unit_rows(np.random.default_rng(5).normal(size=(2, 8)))
    both, again = gallery_file.add_people(gallery, MAKER, {"person 0": more[:1], "new": more[1:]})
    assert again == 0
    assert both.image_counts()["person 0"] == gallery.image_counts()["person 0"] + 1
    assert both.image_counts()["new"] == 1
    same, again = gallery_file.add_people(both, MAKER, {"new": more[1:] * np.float32(1 + 1e-7)})
    assert (same.image_counts(), again) == (both.image_counts(), 1)
    with pytest.raises(DataError, match="person 0 and new have an image with the same embedding"):
        gallery_file.add_people(both, MAKER, {"new": more[:1]})
    left = gallery_file.remove_people(both, ["new", "person 3"])
    assert set(left.people) == set(gallery.people) - {"person 3"}
    np.testing.assert_array_equal(left.embeddings_by_person()["person 1"], gallery.embeddings_by_person()["person 1"])
    with pytest.raises(ConfigError, match="nobody of that name"):
        gallery_file.remove_people(gallery, ["stranger"])


def gallery_metadata(**changes: object) -> dict[str, str]:
    return {"cnnrun.results.gallery_file": json.dumps({"format": 1, "model": MODEL, "people": ["a", "b"], **changes})}


ROWS = unit_rows(np.random.default_rng(0).normal(size=(3, 4)))
PEOPLE = np.array([0, 0, 1])
GOOD = {"embeddings": ROWS, "person": PEOPLE}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (GOOD, {}, "not a gallery"),
        ({"embeddings": ROWS}, gallery_metadata(), "not a gallery"),
        ({**GOOD, "more": ROWS}, gallery_metadata(), "not a gallery"),
        (GOOD, {"cnnrun.results.gallery_file": "{"}, "its description is damaged"),
        (GOOD, {"cnnrun.results.gallery_file": "[" * 100_000}, "its description is damaged"),
        (GOOD, {"cnnrun.results.gallery_file": "[]"}, "its description is damaged"),
        (GOOD, gallery_metadata(people=["a", "a"]), "its description is damaged"),
        (GOOD, gallery_metadata(people=["a", ""]), "its description is damaged"),
        (GOOD, gallery_metadata(people=["a", 3]), "its description is damaged"),
        (GOOD, gallery_metadata(people={"a": 1, "b": 2}), "its description is damaged"),
        (GOOD, gallery_metadata(model=7), "its description is damaged"),
        (GOOD, gallery_metadata(format=2), "another version of cnnrun (format 2"),
        (GOOD, gallery_metadata(people=["a", "b", "c"]), "do not match its people"),
        (GOOD, gallery_metadata(people=["a"]), "do not match its people"),
        ({**GOOD, "person": np.array([0, 1, 0])}, gallery_metadata(), "do not match its people"),
        ({**GOOD, "person": np.array([-1, 0, 1])}, gallery_metadata(), "do not match its people"),
        ({**GOOD, "person": np.array([0, 1])}, gallery_metadata(), "not a gallery's"),
        ({**GOOD, "person": PEOPLE.astype(np.int32)}, gallery_metadata(), "not a gallery's"),
        ({**GOOD, "embeddings": ROWS.astype(np.float64)}, gallery_metadata(), "not a gallery's"),
        ({**GOOD, "embeddings": ROWS[:, :, None]}, gallery_metadata(), "not a gallery's"),
        ({"embeddings": ROWS[:0], "person": PEOPLE[:0]}, gallery_metadata(people=[]), "not a gallery's"),
        ({**GOOD, "embeddings": ROWS * 2}, gallery_metadata(), "not of unit length"),
        ({**GOOD, "embeddings": ROWS * np.nan}, gallery_metadata(), "not of unit length"),
    ],
)
def test_an_invalid_gallery_file_is_refused(tmp_path, tensors, metadata, message, run_cli):
    path = tmp_path / "g.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors, metadata))
    code, out, err = run_cli("enroll", "--gallery", path)
    assert (code, out) == (3, "")
    assert message in err
    assert err.count("\n") == 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_gallery_is_refused_or_still_valid(tmp_path, data):
    """A truncated file is refused. A file with changed bytes is refused, or still valid if a value changed slightly."""
    path = tmp_path / "g.safetensors"
    gallery_file.write_gallery(path, example_gallery())
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(CheckpointError):
            gallery_file.read_gallery(path)
        return
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        found = gallery_file.read_gallery(path)
    except CheckpointError as error:
        assert len(error.lines) == 1
        return
    assert len(found.people) == 6
    assert np.isfinite(found.embeddings_ND).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["enroll", "--gallery", "g.pkl"], "give a file that ends in .safetensors"),
        (["enroll", "--gallery", "g.safetensors"], "no such file"),
        (["enroll", "people", "--gallery", "g.safetensors", "--add"], "no such file"),
        (["enroll", "--gallery", "there.safetensors", "--add"], "--add needs a folder"),
    ],
)
def test_invalid_enroll_arguments_are_refused(words, message, tmp_path, monkeypatch, run_cli):
    monkeypatch.chdir(tmp_path)
    Path("people").mkdir()
    gallery_file.write_gallery(Path("there.safetensors"), example_gallery())
    code, _, err = run_cli(*words)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3", "F8_E5M2"])
def test_dtypes_unknown_to_numpy_are_refused(kind, tmp_path, run_cli):
    size = 2 if kind == "BF16" else 1
    table = {"embeddings": {"dtype": kind, "shape": [2, 4], "data_offsets": [0, 8 * size]}}
    table |= {"person": {"dtype": "I64", "shape": [2], "data_offsets": [8 * size, 8 * size + 16]}}
    head = json.dumps({"__metadata__": gallery_metadata(), **table}).encode()
    path = tmp_path / "g.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(8 * size + 16))
    code, _, err = run_cli("enroll", "--gallery", path)
    assert (code, err.count("\n")) == (3, 1)


def test_embeddings_of_another_size_are_refused():
    with pytest.raises(CheckpointError, match="its embeddings have 8 values"):
        gallery_file.refuse_other_maker(example_gallery(), Path("g.safetensors"), MAKER, 16)


def test_a_pickle_is_not_a_gallery(tmp_path, run_cli):
    import pickle

    path = tmp_path / "g.safetensors"
    path.write_bytes(pickle.dumps({"embeddings": ROWS}))
    code, _, err = run_cli("enroll", "--gallery", path)
    assert code == 3
    assert "cannot be read as a gallery" in err


def test_a_kill_at_any_call_while_a_gallery_is_replaced_leaves_the_old_or_the_new_one(tmp_path):
    path, old = tmp_path / "g.safetensors", example_gallery()
    new, _ = gallery_file.add_people(old, MAKER, {"new": unit_rows(np.random.default_rng(9).normal(size=(3, 8)))})
    outcomes = []
    for fatal_call in range(1, 60):
        gallery_file.write_gallery(path, old)
        pid = os.fork()
        if pid == 0:
            try:
                _kill_at_call(fatal_call)
                gallery_file.write_gallery(path, new)
            finally:
                os._exit(0)
        status = os.waitpid(pid, 0)[1]
        found = gallery_file.read_gallery(path)
        outcomes.append((os.WIFSIGNALED(status), found.is_same(new)))
        assert found.is_same(new) or (os.WIFSIGNALED(status) and found.is_same(old))
        if not os.WIFSIGNALED(status):
            break
    assert outcomes[0] == (True, False)
    assert outcomes[-1] == (False, True)
    assert len(outcomes) > 5


def _kill_at_call(number: int) -> None:
    """Kill this process before its call of this number to a function of `os` that changes files."""
    calls = itertools.count(1)

    def count(function):
        def counted(*args, **kwargs):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    for name in ("open", "write", "fsync", "rename", "replace", "link", "unlink", "close"):
        setattr(os, name, count(getattr(os, name)))


@pytest.mark.parametrize("search", ["exact", "faiss"])
@pytest.mark.parametrize("count", [1, 40])
def test_distances_are_searched_exactly(search, count, tmp_path):
    if search == "faiss":
        pytest.importorskip("faiss")
    draw = np.random.default_rng(3)
    people = {f"p{n}": 5 * draw.normal(size=(draw.integers(1, 4), 8)).astype(np.float32) for n in range(9)}
    maker = GalleryMaker(MODEL, "f" * 64, "[150, 150]", "euclidean")
    gallery_file.write_gallery(tmp_path / "g.safetensors", gallery_file.build_gallery(maker, people))
    gallery = gallery_file.read_gallery(tmp_path / "g.safetensors")
    assert gallery.maker == maker
    queries = 5 * draw.normal(size=(count, 8)).astype(np.float32)
    for query, found in zip(queries, gallery.most_similar(queries, 4, search), strict=True):
        nearest = {name: np.linalg.norm(rows.astype(float) - query, axis=1).min() for name, rows in people.items()}
        expected = sorted(nearest.items(), key=lambda pair: pair[1])[:4]
        assert [name for name, _ in found] == [name for name, _ in expected]
        np.testing.assert_allclose([-value for _, value in found], [value for _, value in expected], rtol=1e-4)


@pytest.mark.parametrize(
    ("maker", "words"),
    [
        (GalleryMaker("1" * 64, "f", "t"), "made by another network"),
        (GalleryMaker(MODEL), "give --find"),
        (GalleryMaker(MODEL, "g", "t"), "another face finder"),
        (GalleryMaker(MODEL, "f", "u"), "aligned in another way"),
        (GalleryMaker(MODEL, "f", "t", "euclidean"), "compared by cosine similarity"),
    ],
)
def test_a_gallery_that_was_made_in_another_way_is_refused(maker, words):
    gallery = gallery_file.build_gallery(GalleryMaker(MODEL, "f", "t"), {"a": np.eye(1, 8, dtype=np.float32)})
    with pytest.raises(CheckpointError, match=words):
        gallery_file.refuse_other_maker(gallery, Path("g.safetensors"), maker, 8)
    gallery_file.refuse_other_maker(gallery, Path("g.safetensors"), GalleryMaker(MODEL, "f", "t"), 8)
