"""A damaged cache never gives wrong pixels: damage is detected, then decoded again or refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from cnnrun.base.atomic_files import Folder
from cnnrun.base.errors import StorageError
from cnnrun.base.progress import progress_bar
from cnnrun.data import block_hashes, cache, cached_split, image_stores
from cnnrun.data.decode import Decoder
from cnnrun.data.index import index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.results.report import html as page
from tests.support.cached_dataset import (
    FILES,
    IN_MEMORY,
    ON_DISK,
    cache_entry,
    flip_bit,
    folder_data,
    prepared_contents,
    with_memory_gib,
)
from tests.support.images import save_picture


@contextmanager
def counted_blocks() -> Iterator[list[list[int]]]:
    """Collect the image numbers of each block that is decoded inside."""
    real, seen = Decoder.decode_block, []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            Decoder, "decode_block", lambda self, numbers, run: seen.append(list(numbers)) or real(self, numbers, run)
        )
        yield seen


@pytest.mark.parametrize("gib", [IN_MEMORY, ON_DISK])
@pytest.mark.parametrize("victim", FILES)
def test_a_flipped_bit_is_reported_and_changes_no_pixel(blocked_data, cache_folder, victim, gib, capfd):
    expected = prepared_contents(with_memory_gib(blocked_data, gib))
    entry = cache_entry(cache_folder)
    rng = np.random.default_rng(0)
    for bit in rng.integers(0, 8 * (entry / victim).stat().st_size, 12).tolist():
        written = {name: (entry / name).read_bytes() for name in FILES}
        flip_bit(entry / victim, bit)
        with counted_blocks() as decoded:
            if victim == "pixels.u8" and gib == ON_DISK and not _is_of_a_bad_picture(entry, bit):
                picture = bit // 8 // 192
                with pytest.raises(StorageError, match=f"pixels.u8: image {picture} is damaged"):
                    prepared_contents(with_memory_gib(blocked_data, gib))
                assert not decoded
            assert prepared_contents(with_memory_gib(blocked_data, gib)) == expected
        said = capfd.readouterr().err
        if victim == "pixels.u8" and gib == ON_DISK and _is_of_a_bad_picture(entry, bit):
            (entry / victim).write_bytes(written[victim])  # a bad image is never read, so its damage goes unnoticed
            continue
        assert f"{entry}: " in said
        assert "damaged" in said
        if victim == "pixels.u8":
            block = bit // 8 // 192 // 4
            assert [numbers[0] for numbers in decoded] == [4 * block]
            assert f"images {4 * block} to {min(4 * block + 3, 24)} are damaged; decoding them again" in said
        elif victim in ("records", "progress", "problems.jsonl"):
            assert len(decoded) in (0, 1, 2)  # 0: the file still means the same; 2: a line names another image
        assert {name: (entry / name).read_bytes() for name in FILES} == written


def _is_of_a_bad_picture(entry: Path, bit: int) -> bool:
    return bit // 8 // 192 in block_hashes.parse_problems((entry / "problems.jsonl").read_bytes())


@pytest.mark.parametrize("victim", ["pixels.u8", "records", "problems.jsonl", "progress"])
def test_a_build_continues_from_the_undamaged_blocks(blocked_data, cache_folder, victim):
    expected = prepared_contents(blocked_data)
    entry = cache_entry(cache_folder)
    (entry / "complete.json").unlink()
    noted = np.fromfile(entry / "progress", np.uint8).reshape(-1, block_hashes.HASH_BYTES)
    noted[5:] = 0  # as if killed at that point
    noted.tofile(entry / "progress")
    flip_bit(entry / victim, 9)
    with counted_blocks() as decoded:
        assert prepared_contents(blocked_data) == expected
    assert {5, 6} <= {numbers[0] // 4 for numbers in decoded}
    assert len(decoded) < 5


def test_an_undamaged_cache_is_decoded_once_without_messages(blocked_data, capfd):
    prepared_contents(blocked_data)
    capfd.readouterr()
    with counted_blocks() as decoded:
        for gib in (IN_MEMORY, ON_DISK):
            prepared_contents(with_memory_gib(blocked_data, gib))
    assert decoded == []
    assert "not as" not in capfd.readouterr().err


def test_every_rank_reports_blocks_it_decodes_again(blocked_data, cache_folder, monkeypatch, capfd):
    prepared_contents(blocked_data)
    flip_bit(cache_entry(cache_folder) / "pixels.u8", 0)
    monkeypatch.setattr("cnnrun.base.torchrun.rank", lambda: 1)
    prepared_contents(blocked_data)
    assert "images 0 to 3 are damaged; decoding them again" in capfd.readouterr().err


def test_an_entry_cleared_during_verification_is_decoded_again(blocked_data, cache_folder, monkeypatch):
    expected = prepared_contents(blocked_data)
    entry = cache_entry(cache_folder)
    real = cached_split.has_changed

    def cleared(pixels, hashes):
        shutil.rmtree(entry, ignore_errors=True)
        monkeypatch.setattr(cached_split, "has_changed", real)
        return real(pixels, hashes)

    monkeypatch.setattr(cached_split, "has_changed", cleared)
    one_thread = blocked_data.model_copy(update={"workers": 0})
    with counted_blocks() as decoded:
        assert prepared_contents(one_thread) == expected
    assert len(decoded) == 7


def test_images_are_hashed_on_first_read_only(blocked_data, monkeypatch):
    prepared_contents(blocked_data)
    made = build_dataset(with_memory_gib(blocked_data, ON_DISK), index_source(blocked_data), progress_bar)
    train = made.splits["train"]
    seen = []
    real = image_stores.has_changed
    monkeypatch.setattr(
        image_stores, "has_changed", lambda pixels, hashes: seen.append(len(pixels)) or real(pixels, hashes)
    )
    half = torch.arange(len(train) // 2)
    train.load_images(half)
    train.load_images(half)
    train.load_images(torch.arange(len(train)))
    train.load_images(torch.arange(len(train)))
    assert seen == [len(half), len(train) - len(half)]


@pytest.mark.parametrize("gib", [IN_MEMORY, ON_DISK])
def test_an_entry_renamed_to_another_key_is_not_used(picture_folder, cache_folder, tmp_path, gib):
    data = folder_data(picture_folder, cache_folder, memory_gib=gib)
    expected = prepared_contents(data)
    entry = cache_entry(cache_folder)
    shutil.copytree(picture_folder, tmp_path / "first")
    for number, path in enumerate(sorted(picture_folder.rglob("*.png"))):
        save_picture(path, seed=1000 + number)
    prepared_contents(data)  # other images with the same names
    (other,) = (path for path in cache_folder.iterdir() if path != entry)
    shutil.rmtree(picture_folder)
    (tmp_path / "first").rename(picture_folder)
    shutil.rmtree(entry)
    other.rename(entry)
    assert prepared_contents(data) == expected


def test_entries_of_an_older_format_are_unused_but_listed_and_cleared(blocked_data, cache_folder, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(cache, "FORMAT_VERSION", 1)
        prepared_contents(blocked_data)
    old = cache_entry(cache_folder)
    with counted_blocks() as decoded:
        prepared_contents(blocked_data)
    assert len(decoded) == 7
    assert old.name in [entry["key"] for entry in cache.list_entries(cache_folder)]
    assert cache.remove_entries(cache_folder, [old.name]) == ([old.name], [])
    assert not old.exists()


def test_a_read_only_cache_is_used_if_undamaged(blocked_data, cache_folder, monkeypatch, picture_folder):
    expected = prepared_contents(blocked_data)
    entry = cache_entry(cache_folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(cached_split, "hold_lock", None)
    assert prepared_contents(blocked_data) == expected
    flip_bit(entry / "pixels.u8", 1000)
    before = {path: path.read_bytes() for path in entry.iterdir()}
    with pytest.raises(StorageError, match=f"{entry}: damaged, and you may not write it; give"):
        prepared_contents(blocked_data)
    assert {path: path.read_bytes() for path in entry.iterdir()} == before


def test_entries_with_an_invalid_plan_are_left_out_of_the_list(blocked_data, cache_folder):
    prepared_contents(blocked_data)
    entry = cache_entry(cache_folder)
    for count in ('"many"', "[1]", "null", "1e3"):
        (entry / "plan.json").write_text(
            f'{{"source": 1, "count": {count}, "shape": [], "block": 1, "files": 1, "blocks": 1}}'
        )
        assert cache.list_entries(cache_folder) == []


def test_a_lock_made_by_another_process_during_a_clear_is_kept(blocked_data, cache_folder, monkeypatch):
    prepared_contents(blocked_data)
    entry = cache_entry(cache_folder)
    real = Folder.remove

    def remove(self: Folder, name: str) -> None:
        real(self, name)
        if name == cache.LOCK_FILE:
            (entry / cache.LOCK_FILE).write_bytes(b"another's")

    monkeypatch.setattr(Folder, "remove", remove)
    assert cache.remove_entries(cache_folder, [entry.name]) == ([entry.name], [])
    assert [path.name for path in entry.iterdir()] == [cache.LOCK_FILE]


def test_the_chart_script_is_built_once_and_rebuilt_after_damage(tmp_path, bundles, capfd):
    script = page._vega_script()
    assert (page._vega_script(), len(bundles)) == (script, 1)
    (path,) = (tmp_path / "home").iterdir()
    for number, bit in enumerate(np.random.default_rng(0).integers(0, 8 * path.stat().st_size, 12).tolist()):
        flip_bit(path, bit)
        assert (page._vega_script(), page._vega_script(), len(bundles)) == (script, script, 2 + number)
        assert capfd.readouterr().err == f"{path}: damaged, or written by another version; building it again\n"
    path.write_text(script)  # as older versions left it
    assert (page._vega_script(), len(bundles)) == (script, 14)
