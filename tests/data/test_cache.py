"""The cache decodes once; its pixels equal freshly decoded ones after kills, waits and damage."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cnnrun.base.errors import DataError, StorageError
from cnnrun.base.progress import progress_bar
from cnnrun.data import cache, cached_split
from cnnrun.data.block_hashes import HASH_BYTES
from cnnrun.data.cached_split import CacheEntry
from cnnrun.data.decode import Decoder, start_threads
from cnnrun.data.file_listing import list_files
from cnnrun.data.image_records import digest
from cnnrun.data.image_stores import DiskStore
from cnnrun.data.index import index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.data.settings import Data
from cnnrun.data.storage import store_split
from tests.support.images import save_picture

IMAGE = {"size": 8, "channels": 3}


def data_of(root: Path, **more) -> Data:
    return Data.model_validate({"source": {"folder": str(root)}, "image": IMAGE, **more})


def decoder_of(data: Data) -> Decoder:
    split = index_source(data).contents.splits["train"]
    return Decoder(split, (3, 8, 8), data.image, list_files(split, False, 0))


def everything(data: Data) -> torch.Tensor:
    made = build_dataset(data, index_source(data), progress_bar)
    return torch.cat([each.load_images(torch.arange(len(each))) for each in made.splits.values()])


@pytest.mark.parametrize("kind", ["disk", "memory", "none"])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_cache_kind_gives_the_same_bytes(picture_folder, cache_folder, kind, workers):
    expected = decoder_of(data_of(picture_folder))
    rows = (
        build_dataset(data_of(picture_folder), index_source(data_of(picture_folder)), progress_bar).splits["train"].rows
    )
    data = data_of(picture_folder, cache=kind, workers=workers, cache_dir=str(cache_folder))
    made = build_dataset(data, index_source(data), progress_bar)
    train = made.splits["train"]
    assert torch.equal(train.rows, rows)
    for place, row in enumerate(rows.tolist()):
        assert np.array_equal(train.load_images(torch.tensor([place]))[0].numpy(), expected.decode_one(row))
    assert (
        made.facts == build_dataset(data_of(picture_folder), index_source(data_of(picture_folder)), progress_bar).facts
    )


def test_cached_pixels_are_reused_only_for_equal_files_and_settings(picture_folder, cache_folder, monkeypatch):
    data = data_of(picture_folder, cache="disk", cache_dir=str(cache_folder))
    first = everything(data)

    def never(*_):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "decode_block", never)
        assert torch.equal(everything(data), first)
        given = data.image.model_copy(update={"mean": [1.0] * 3, "std": [2.0] * 3})
        everything(data.model_copy(update={"image": given}))  # statistics change no pixel
    save_picture(picture_folder / "cat" / "0.png", seed=999)
    assert not torch.equal(everything(data), first)
    fitted = data.image.model_copy(update={"fit": "crop", "crop_pct": 0.8})
    assert not torch.equal(everything(data.model_copy(update={"image": fitted})), first)
    assert len(cache.list_entries(cache_folder)) == 3


def test_content_fingerprints_ignore_times_and_notice_changed_bytes(picture_folder, cache_folder):
    def key(**how) -> str:
        return build_dataset(data := data_of(picture_folder, **how), index_source(data), progress_bar).facts.fingerprint

    path = picture_folder / "cat" / "0.png"
    by_times, by_content = key(), key(fingerprint="content")
    os.utime(path, ns=(1, 1))
    assert key() != by_times
    assert key(fingerprint="content") == by_content
    pixels = bytearray(path.read_bytes())
    by_times = key()
    pixels[-20] ^= 1  # the chunk's checksum: Pillow could not decode it, so the file is only hashed here
    path.write_bytes(pixels)
    os.utime(path, ns=(1, 1))
    split = index_source(data_of(picture_folder)).contents.splits["train"]
    from cnnrun.data.file_listing import content_digest

    assert content_digest(split, list_files(split, True, 0)) != by_content


@pytest.mark.parametrize("victim", ["pixels.u8", "records"])
@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes()[:-10]), lambda p: p.unlink()])
def test_a_truncated_or_missing_cache_file_is_rebuilt(picture_folder, cache_folder, victim, damage):
    data = data_of(picture_folder, cache="disk", cache_dir=str(cache_folder))
    first = everything(data)
    (entry,) = cache_folder.iterdir()
    damage(entry / victim)
    assert torch.equal(everything(data), first)


def _build(path: Path, data: Data, seconds: float) -> None:
    """Build slowly in blocks of two images, each synced to disk before the next."""
    cache.BLOCK_IMAGES, cached_split.SYNC_BYTES = 2, 1
    decoder = decoder_of(data)
    block = decoder.decode_block

    def slow(numbers, run):
        time.sleep(seconds)
        return block(numbers, run)

    decoder.decode_block = slow  # type: ignore[method-assign]
    with start_threads(0) as run:
        CacheEntry(path, len(decoder), (3, 8, 8), keep_pixels=True).build(decoder, {"source": "s"}, run, progress_bar)


def test_a_killed_build_continues_and_gives_the_same_bytes(picture_folder, cache_folder, monkeypatch):
    data = data_of(picture_folder)
    decoder = decoder_of(data)
    expected = np.stack([decoder.decode_one(i) for i in range(len(decoder))])
    monkeypatch.setattr(cache, "BLOCK_IMAGES", 2)
    path, rng = cache_folder / "k", np.random.default_rng(0)
    context = multiprocessing.get_context("fork")
    for _ in range(6):
        process = context.Process(target=_build, args=(path, data, 0.03))
        process.start()
        time.sleep(float(rng.uniform(0.02, 0.2)))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    noted = np.fromfile(path / "progress", np.uint8) if (path / "progress").exists() else np.zeros(0, np.uint8)
    done = int(noted.reshape(-1, HASH_BYTES).any(1).sum())
    decoded = []
    block = decoder.decode_block
    monkeypatch.setattr(decoder, "decode_block", lambda numbers, run: decoded.append(numbers) or block(numbers, run))
    entry = CacheEntry(path, len(decoder), (3, 8, 8), keep_pixels=True)
    with start_threads(0) as run:
        entry.build(decoder, {"source": "s"}, run, progress_bar)
    assert done > 0
    assert len(decoded) == 12 - done
    made = np.fromfile(path / "pixels.u8", np.uint8).reshape(expected.shape)
    assert np.array_equal(made, expected)
    fresh = CacheEntry(cache_folder / "fresh", len(decoder), (3, 8, 8), keep_pixels=True)
    with start_threads(0) as run:
        fresh.build(decoder, {"source": "s"}, run, progress_bar)
    assert (path / "records").read_bytes() == (cache_folder / "fresh" / "records").read_bytes()


def test_a_second_process_waits_and_decodes_nothing(picture_folder, cache_folder, capfd):
    data = data_of(picture_folder)
    context = multiprocessing.get_context("fork")
    first = context.Process(target=_build, args=(cache_folder / "k", data, 0.05))
    first.start()
    while not (cache_folder / "k" / "plan.json").exists():
        assert first.is_alive()
        time.sleep(0.005)
    decoder = decoder_of(data)
    decoder.decode_block = None  # type: ignore[method-assign, assignment]
    with start_threads(0) as run:
        CacheEntry(cache_folder / "k", len(decoder), (3, 8, 8), keep_pixels=True).build(
            decoder, {"source": "s"}, run, progress_bar
        )
    first.join()
    assert first.exitcode == 0
    assert "waiting for it" in capfd.readouterr().err


def test_bad_files_are_remembered_with_their_reasons(picture_folder, cache_folder):
    (picture_folder / "cat" / "bad.png").write_bytes(b"no picture")
    data = data_of(picture_folder, cache="disk", cache_dir=str(cache_folder), bad_files="skip")
    for _ in range(2):  # first decoded, then read from the cache
        made = build_dataset(data, index_source(data), progress_bar)
        assert [each["picture"] for each in made.skipped_samples] == [str(picture_folder / "cat" / "bad.png")]
        assert sum(made.facts.counts.values()) == 24
    (entry,) = cache_folder.iterdir()
    with (entry / "problems.jsonl").open("a") as file:
        file.write('[1, "torn')  # a kill in the middle of a line
    (entry / "complete.json").unlink()
    (entry / "progress").write_bytes(bytes(HASH_BYTES))
    assert len(build_dataset(data, index_source(data), progress_bar).skipped_samples) == 1


def test_a_full_disk_is_reported_with_the_space_needed(picture_folder, cache_folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    data = data_of(picture_folder, cache="disk", cache_dir=str(cache_folder))
    with pytest.raises(StorageError, match=r"No space left on device.* KiB are needed, .* free .data.cache_dir"):
        everything(data)
    monkeypatch.undo()
    assert len(everything(data)) == 24


def test_image_storage_is_chosen_by_size_and_reported(picture_folder, cache_folder, capfd):
    def kind(**how) -> str:
        data = data_of(picture_folder, cache_dir=str(cache_folder), **how)
        split = index_source(data).contents.splits["train"]
        return type(
            store_split(split, (3, 8, 8), data.image, data, list_files(split, False, 0), progress_bar).images
        ).__name__

    assert kind(disk_gib=1e-9) == "MemoryStore"
    assert "kept in memory and not for the next run" in capfd.readouterr().err
    assert kind(disk_gib=1e-9, memory_gib=1e-9) == "DecodingStore"
    assert "decoded again at each use" in capfd.readouterr().err
    assert kind(memory_gib=1e-9) == "DiskStore"
    assert kind(disk_gib=1e-9) == "MemoryStore"  # the entry exists already, so there is no warning
    assert capfd.readouterr().err == ""


def test_a_file_above_the_memory_limit_is_read_in_pieces(tmp_path, picture_folder, cache_folder):
    pixels = np.random.default_rng(0).integers(0, 256, (4000, 3, 32, 32), dtype=np.uint8)
    pixels.tofile(tmp_path / "p")
    hashes = np.array([digest(picture.tobytes()) for picture in pixels], np.uint64)
    pictures = DiskStore(tmp_path / "p", pixels.shape, hashes, lambda: None)
    rows = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(pictures.take(rows).numpy(), pixels[rows.numpy()])
    assert str(tmp_path / "p") not in Path("/proc/self/maps").read_text()
    assert (len(pictures), pictures.shape, len(pictures.take(rows[:0]))) == (4000, (3, 32, 32), 0)
    os.truncate(tmp_path / "p", pixels.nbytes - 1)
    with pytest.raises(StorageError, match="image 3,999 is cut off"):
        pictures.take(torch.tensor([3999]))
    small = data_of(picture_folder, cache="disk", cache_dir=str(cache_folder), memory_gib=1e-9)
    assert torch.equal(everything(small), everything(data_of(picture_folder, cache="memory")))


def test_a_file_that_changes_after_listing_is_named(picture_folder, cache_folder):
    data = data_of(picture_folder, cache="none", cache_dir=str(cache_folder))
    train = build_dataset(data, index_source(data), progress_bar).splits["train"]
    path = Path(train.sample_name(3))
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DataError, match=f"{path}: changed since it was listed"):
        train.load_images(torch.arange(len(train)))
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: .*No such file"):
        train.load_images(torch.arange(len(train)))


def test_cache_list_and_clear_report_the_entries(picture_folder, cache_folder, run_cli, tiny):
    everything(data_of(picture_folder, cache="disk", cache_dir=str(cache_folder)))
    code, out, _ = run_cli("cache", "list", "--dir", cache_folder, "--json")
    (entry,) = json.loads(out)["entries"]
    assert (code, entry["count"], entry["shape"], entry["complete"]) == (0, 24, [3, 8, 8], True)
    assert run_cli("cache", "clear", "--dir", cache_folder)[0] == 2
    assert run_cli("cache", "clear", "nothing", "--dir", cache_folder)[0] == 2
    code, out, _ = run_cli("cache", "clear", entry["key"][:6], "--dir", cache_folder)
    assert (code, list(cache_folder.iterdir())) == (0, [])
    assert "1 data set removed" in out
    assert run_cli("cache", "list", "--dir", cache_folder)[0] == 0


def test_without_a_home_folder_training_goes_on_without_a_cache(picture_folder, monkeypatch, capfd):
    monkeypatch.setattr(cache, "user_cache_folder", lambda: None)
    assert len(everything(data_of(picture_folder))) == 24
    assert "HOME is not set" in capfd.readouterr().err
    with pytest.raises(StorageError, match="give data.cache_dir"):
        everything(data_of(picture_folder, cache="disk"))


def test_clearing_removes_only_cache_entries(tmp_path, run_cli):
    for path in ("shards/train-0.tar", "tf/plan.json", "0" * 32 + "/plan.json", "0" * 32 + "/mine.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("{}")
    code, out, _ = run_cli("cache", "clear", "--all", "--dir", tmp_path)
    assert (code, "0 data sets removed" in out) == (0, True)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4


def test_a_temporarily_unreadable_file_is_not_remembered_as_bad(picture_folder, cache_folder, monkeypatch):
    from cnnrun.data import image_files as pictures

    real = pictures._read_once

    def forbidden(item, listed):
        if str(item).endswith("cat/3.png"):
            raise PermissionError(13, "Permission denied")
        return real(item, listed)

    for policy in ("error", "skip"):
        data = data_of(picture_folder, cache="disk", cache_dir=str(cache_folder), bad_files=policy)
        with monkeypatch.context() as patched:
            patched.setattr(pictures, "_read_once", forbidden)
            with pytest.raises(DataError, match=r"cat/3\.png: cannot be read: Permission denied"):
                everything(data)
    assert len(everything(data)) == 24


def test_records_and_images_survive_a_clear_while_in_use(picture_folder, cache_folder):
    data = data_of(picture_folder, cache="disk", cache_dir=str(cache_folder))
    split = index_source(data).contents.splits["train"]
    kept = store_split(split, (3, 8, 8), data.image, data, list_files(split, False, 0), progress_bar)
    expected = np.array(kept.records())
    cache.remove_entries(cache_folder, [path.name for path in cache_folder.iterdir()])
    assert np.array_equal(kept.records(), expected)
    assert len(kept.images.take(torch.arange(3))) == 3


def test_different_cache_kinds_have_separate_entries(picture_folder, cache_folder):
    for kind in ("disk", "none"):
        everything(data_of(picture_folder, cache=kind, cache_dir=str(cache_folder)))
    assert len(cache.list_entries(cache_folder)) == 2


def test_the_disk_budget_holds_for_an_explicit_disk_cache(picture_folder, cache_folder):
    with pytest.raises(StorageError, match="would take more than data.disk_gib"):
        everything(data_of(picture_folder, cache="disk", cache_dir=str(cache_folder), disk_gib=1e-9))


def test_two_beginnings_of_one_key_remove_it_once(picture_folder, cache_folder):
    everything(data_of(picture_folder, cache="disk", cache_dir=str(cache_folder)))
    (entry,) = cache.list_entries(cache_folder)
    cleared = cache.clear_cache(str(cache_folder), [entry["key"][:4], entry["key"]], everything=False)
    assert (cleared["removed"], cleared["bytes"]) == ([entry["key"]], entry["bytes"])
    assert list(cache_folder.iterdir()) == []


def test_a_user_without_a_cache_folder_is_told_to_name_one(monkeypatch):
    monkeypatch.setattr(cache, "user_cache_folder", lambda: None)
    for command in (lambda: cache.list_cache(None), lambda: cache.clear_cache(None, [], everything=True)):
        with pytest.raises(StorageError, match=r"there is no cache folder \(HOME is not set\); give --dir"):
            command()
