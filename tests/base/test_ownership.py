"""Files that another user owns or can write are neither trained on nor shown."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from cnnrun.base.errors import StorageError
from cnnrun.base.ownership import ownership_problem
from cnnrun.data import cache
from cnnrun.data.cached_split import CacheEntry
from cnnrun.data.sources.shards import Shards
from cnnrun.results.report import html as page
from tests.support.cached_dataset import (
    FILES,
    IN_MEMORY,
    ON_DISK,
    cache_entry,
    prepared_contents,
    with_memory_gib,
)

STRANGER = 12345


def give_away(path: Path, monkeypatch) -> None:
    """Make another user the owner of a file; without root, make every file of ours look like another user's."""
    if os.geteuid() == 0:
        os.chown(path, STRANGER, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)


@pytest.mark.parametrize("gib", [IN_MEMORY, ON_DISK])
@pytest.mark.parametrize("victim", [".", *FILES])
def test_a_cache_file_of_another_user_is_refused_by_name(blocked_data, cache_folder, victim, gib, monkeypatch):
    prepared_contents(blocked_data)
    entry = cache_entry(cache_folder)
    with monkeypatch.context() as patched:
        give_away(entry / victim, patched)
        with pytest.raises(
            StorageError, match=rf"{entry}.*: belongs to another user \(uid \d+\); give data.cache_dir a folder"
        ):
            prepared_contents(with_memory_gib(blocked_data, gib))
    if os.geteuid() == 0:
        os.chown(entry / victim, 0, -1)  # root's own files are trusted
    prepared_contents(with_memory_gib(blocked_data, gib))


def test_a_cache_that_other_users_can_write_is_refused(blocked_data, cache_folder):
    prepared_contents(blocked_data)
    entry = cache_entry(cache_folder)

    def assert_refused(what: str) -> None:
        with pytest.raises(StorageError, match=rf"^{what} \(`chmod go-w` prevents it\); give data.cache_dir a folder"):
            prepared_contents(blocked_data)

    cache_folder.chmod(0o755)
    entry.chmod(0o775)
    assert_refused(f"{entry}: other users can write it")
    entry.chmod(0o755)
    (entry / "records").chmod(0o602)
    assert_refused(f"{entry}/records: other users can write it")
    entry.chmod(0o700)  # nobody else can enter it
    prepared_contents(blocked_data)
    cache_folder.chmod(0o777)
    assert_refused(f"{cache_folder}: other users can write there")
    shutil.rmtree(entry)
    assert_refused(f"{cache_folder}: other users can write there")  # before any entry exists
    cache_folder.chmod(0o1777)  # sticky, like /tmp: nobody else can replace our files
    prepared_contents(blocked_data)
    entry.rename(cache_folder.parent / "away")
    entry.symlink_to(cache_folder.parent / "away")
    with pytest.raises(StorageError, match=f"{entry}: is a link"):
        prepared_contents(blocked_data)
    assert cache.list_entries(cache_folder) == []


@pytest.mark.parametrize("kind", ["disk", "none"])
def test_our_cache_files_are_not_group_writable_under_a_lax_umask(blocked_data, cache_folder, kind):
    before = os.umask(0o002)
    try:
        deep = blocked_data.model_copy(update={"cache": kind, "cache_dir": str(cache_folder / "a" / "b")})
        assert prepared_contents(deep) == prepared_contents(deep)
    finally:
        os.umask(before)
    assert ownership_problem(cache_entry(cache_folder / "a" / "b")) is None


@contextmanager
def as_somebody_without_rights(path: Path) -> Iterator[None]:
    """Make `path` unreadable for this process, which needs another effective user if it is root."""
    mode, is_root = path.stat().st_mode, os.geteuid() == 0
    path.chmod(0)
    if is_root:
        os.seteuid(STRANGER)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        path.chmod(mode)


def test_an_unreadable_cache_folder_gives_no_traceback(blocked_data):
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        prepared_contents(blocked_data.model_copy(update={"cache_dir": f"{place}/cache"}))
        folder = Path(place) / "cache"
        folder.chmod(0o755)
        used = cache.bytes_used(folder)
        entry = cache_entry(folder)
        with as_somebody_without_rights(entry):
            assert cache.list_entries(folder) == []
            assert cache.bytes_used(folder) == 0 < used
            with pytest.raises(StorageError, match=r"cannot be checked \(Permission denied\); give data.cache_dir"):
                CacheEntry(entry, 25, (3, 8, 8), keep_pixels=True).is_complete()
        with as_somebody_without_rights(folder):
            with pytest.raises(StorageError, match=r"cache: cannot be read \(Permission denied\)"):
                cache.list_entries(folder)
            assert "cannot be checked (Permission denied)" in str(ownership_problem(entry))


def test_another_users_script_never_enters_a_report(tmp_path, bundles, capfd, monkeypatch):
    script = page._vega_script()
    (path,) = (tmp_path / "home").iterdir()
    path.write_text(f"{page._hash_line('steal()')}\nsteal()")  # whoever can write the file can write a matching hash
    give_away(path, monkeypatch)
    for _ in range(2):
        assert page._vega_script() == script
        assert f"{path}: belongs to another user" in capfd.readouterr().err
    assert "steal" in path.read_text()


def test_another_users_copy_of_a_shard_is_refused(tmp_path, monkeypatch):
    url = "https://example.org/a.tar"
    copies = tmp_path / "copies"
    copies.mkdir()
    path = copies / f"{sha256(url.encode()).hexdigest()[:32]}.tar"
    path.write_bytes(b"anything")
    give_away(path, monkeypatch)
    with pytest.raises(
        StorageError, match=r"belongs to another user \(uid \d+\); give data.source.shards.copies a folder"
    ):
        Shards(train=url, copies=str(copies)).read()
