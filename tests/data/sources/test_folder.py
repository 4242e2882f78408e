from __future__ import annotations

import os

import pytest
from torchvision.datasets import ImageFolder

from cnnrun.base.errors import DataError
from cnnrun.data.sources.folder import Folder
from tests.support.images import save_picture


def test_folder_orders_classes_as_torchvision(tmp_path):
    for name in ("10", "1", "100", "11", "Zebra", "apple"):
        for number in range(2):
            save_picture(tmp_path / name / f"{number}.png")
    theirs = ImageFolder(str(tmp_path))
    ours = Folder(root=str(tmp_path)).read()
    assert list(ours.classes) == theirs.classes
    assert [
        (str(p), t)
        for p, t in zip(ours.splits["train"].images, ours.splits["train"].targets["labels"].tolist(), strict=True)
    ] == theirs.samples


def test_folder_reads_split_subfolders(tmp_path):
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            save_picture(tmp_path / split / name / "1.png")
    assert set(Folder(root=str(tmp_path)).read().splits) == {"train", "val", "test"}
    listed = Folder(root=str(tmp_path), classes=["b", "a"]).read()
    assert listed.classes == ("b", "a")
    assert [p.parent.name for p in listed.splits["train"].images] == ["b", "a"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda r: None, "no such folder"),
        (lambda r: save_picture(r / "only" / "1.png"), "two or more classes"),
        (lambda r: [save_picture(r / "a" / "1.png"), (r / "b").mkdir()], "b: no images"),
        (lambda r: [save_picture(r / "val" / "a" / "1.png")], "no train folder"),
        (
            lambda r: [save_picture(r / s / c / "1.png") for s, c in (("train", "a"), ("train", "b"), ("val", "c"))],
            "folder 'c' is not a class of the training split",
        ),
    ],
)
def test_folder_mistakes_are_named(tmp_path, make, words):
    root = tmp_path / "root"
    make(root)
    with pytest.raises(DataError, match=words):
        Folder(root=str(root)).read()


def test_a_folder_that_is_not_among_the_declared_classes_is_refused(tmp_path):
    for name in ("a", "b", "c"):
        save_picture(tmp_path / "root" / name / "1.png")
    with pytest.raises(DataError, match=r"folder 'c' is not in data\.source\.folder\.classes"):
        Folder(root=str(tmp_path / "root"), classes=["a", "b"]).read()


def test_folder_ignores_clutter_and_visits_link_loops_once(tmp_path):
    for name in ("a", "b"):
        save_picture(tmp_path / name / "1.png")
        os.symlink(tmp_path / name, tmp_path / name / "loop")
    for clutter in (".ipynb_checkpoints", "__MACOSX"):
        save_picture(tmp_path / clutter / "1.png")
    (tmp_path / "a" / "Thumbs.db").write_text("x")
    (tmp_path / "a" / ".hidden.png").write_text("x")
    indexed = Folder(root=str(tmp_path)).read()
    assert indexed.classes == ("a", "b")
    assert len(indexed.splits["train"].images) == 2


def test_folder_refuses_links_to_outside(tmp_path):
    outside = save_picture(tmp_path / "outside.png")
    for name in ("a", "b"):
        save_picture(tmp_path / "root" / name / "1.png")
    os.symlink(outside, tmp_path / "root" / "a" / "2.png")
    with pytest.raises(DataError, match="a link to outside"):
        Folder(root=str(tmp_path / "root")).read()


def test_folder_refuses_linked_folders_and_reports_ignored_files(tmp_path, capfd):
    save_picture(tmp_path / "elsewhere" / "o.png")
    for name in ("a", "b"):
        save_picture(tmp_path / "root" / name / "1.png")
    (tmp_path / "root" / "a" / "x.psd").write_bytes(b"8BPS")
    assert len(Folder(root=str(tmp_path / "root")).read().splits["train"].images) == 2
    assert "left out 1 file of other kinds, such as 'x.psd'" in capfd.readouterr().err
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "a" / "link")
    with pytest.raises(DataError, match="a link to outside"):
        Folder(root=str(tmp_path / "root")).read()


def test_folder_recognises_usual_split_names_in_any_case(tmp_path):
    for split in ("Training", "VALID", "Test"):
        for name in ("a", "b"):
            save_picture(tmp_path / split / name / "1.png", seed=len(split))
    indexed = Folder(root=str(tmp_path)).read()
    assert (set(indexed.splits), indexed.classes) == ({"train", "val", "test"}, ("a", "b"))
    save_picture(tmp_path / "validation" / "a" / "1.png")
    with pytest.raises(DataError, match="both VALID and validation are val folders"):
        Folder(root=str(tmp_path)).read()


def test_folder_reports_images_outside_the_class_folders(tmp_path, capfd):
    for name in ("a", "b"):
        save_picture(tmp_path / name / "1.png")
    save_picture(tmp_path / "loose.png")
    Folder(root=str(tmp_path)).read()
    assert "left out 1 image outside the class folders, such as 'loose.png'" in capfd.readouterr().err


def test_folder_names_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    for name in ("a", "b"):
        save_picture(tmp_path / name / "1.png")
    real = os.scandir

    def forbidden(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (tmp_path / "a" / "deep").mkdir()
    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(DataError, match="deep: cannot be read"):
        Folder(root=str(tmp_path)).read()
