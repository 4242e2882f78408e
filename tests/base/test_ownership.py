"""Files of other users: nothing that another one may have written is trained on or shown."""

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
    """Make another user the owner of a file; where only root may do so, make everything that is ours another's."""
    if os.geteuid() == 0:
        os.chown(path, STRANGER, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)


@pytest.mark.parametrize("gib", [IN_MEMORY, ON_DISK])
@pytest.mark.parametrize("victim", [".", *FILES])
def test_what_another_user_made_is_refused_by_name(blocked_data, cache_folder, victim, gib, monkeypatch):
    prepared_contents(blocked_data)
    entry = cache_entry(cache_folder)
    with monkeypatch.context() as patched:
        give_away(entry / victim, patched)
        with pytest.raises(
            StorageError, match=rf"{entry}.*: belongs to another user \(uid \d+\); give data.cache_dir a folder"
        ):
            prepared_contents(with_memory_gib(blocked_data, gib))
    if os.geteuid() == 0:
        os.chown(entry / victim, 0, -1)  # root made it: whoever does not believe root cannot believe anything
    prepared_contents(with_memory_gib(blocked_data, gib))


def test_what_others_can_write_is_refused(blocked_data, cache_folder):
    prepared_contents(blocked_data)
    entry = cache_entry(cache_folder)

    def refused(what: str) -> None:
        with pytest.raises(StorageError, match=rf"^{what} \(`chmod go-w` prevents it\); give data.cache_dir a folder"):
            prepared_contents(blocked_data)

    cache_folder.chmod(0o755)
    entry.chmod(0o775)
    refused(f"{entry}: other users can write it")
    entry.chmod(0o755)
    (entry / "records").chmod(0o602)
    refused(f"{entry}/records: other users can write it")
    entry.chmod(0o700)  # which nobody else can enter
    prepared_contents(blocked_data)
    cache_folder.chmod(0o777)
    refused(f"{cache_folder}: other users can write there")
    shutil.rmtree(entry)
    refused(f"{cache_folder}: other users can write there")  # before there is anything
    cache_folder.chmod(0o1777)  # such as /tmp: what is ours there stays ours
    prepared_contents(blocked_data)
    entry.rename(cache_folder.parent / "away")
    entry.symlink_to(cache_folder.parent / "away")
    with pytest.raises(StorageError, match=f"{entry}: is a link"):
        prepared_contents(blocked_data)
    assert cache.list_entries(cache_folder) == []


@pytest.mark.parametrize("kind", ["disk", "none"])
def test_what_we_write_is_ours_alone_where_a_group_may_write_by_default(blocked_data, cache_folder, kind):
    before = os.umask(0o002)
    try:
        deep = blocked_data.model_copy(update={"cache": kind, "cache_dir": str(cache_folder / "a" / "b")})
        assert prepared_contents(deep) == prepared_contents(deep)
    finally:
        os.umask(before)
    assert ownership_problem(cache_entry(cache_folder / "a" / "b")) is None


@contextmanager
def as_somebody_without_rights(path: Path) -> Iterator[None]:
    """Where `path` cannot be looked into; root could otherwise."""
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


def test_a_folder_that_cannot_be_looked_into_costs_no_traceback(blocked_data):
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


def test_another_users_script_goes_into_no_report(tmp_path, bundles, capfd, monkeypatch):
    script = page._vega_script()
    (path,) = (tmp_path / "home").iterdir()
    path.write_text(f"{page._hash_line('steal()')}\nsteal()")  # who can write it can write a hash that fits
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
