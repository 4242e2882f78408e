"""A small data set and its entry in a separate cache, for tests that change or damage the entry."""

from __future__ import annotations

from pathlib import Path

import torch

from cnnrun.base.progress import progress_bar
from cnnrun.data import cache
from cnnrun.data.index import index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.data.settings import Data
from cnnrun.results.report import html as page

FILES = ["pixels.u8", "records", "problems.jsonl", "progress", "plan.json", "complete.json"]
IN_MEMORY, ON_DISK = 4.0, 1e-9  # data.memory_gib


def data_in_blocks(pictures: Path, folder: Path, monkeypatch) -> Data:
    """Settings of 24 valid images and one invalid image, cached in blocks of four."""
    monkeypatch.setattr(cache, "BLOCK_IMAGES", 4)
    (pictures / "cat" / "bad.png").write_bytes(b"no picture")
    return folder_data(pictures, folder)


def folder_data(pictures: Path, folder: Path, **more) -> Data:
    image = {"size": 8, "channels": 3}
    settings = {"cache": "disk", "cache_dir": str(folder), "bad_files": "skip"}
    return Data.model_validate({"source": {"folder": str(pictures)}, "image": image} | settings | more)


def prepared_contents(data: Data) -> tuple:
    """Everything that a training receives: pixels of each split, records, problems and facts."""
    made = build_dataset(data, index_source(data), progress_bar)
    pixels = [each.load_images(torch.arange(len(each))).tolist() for each in made.splits.values()]
    return pixels, made.stored_splits["train"].records().tobytes(), made.skipped_samples, made.facts


def with_memory_gib(data: Data, gib: float) -> Data:
    return data.model_copy(update={"memory_gib": gib})


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def cache_entry(folder: Path) -> Path:
    (entry,) = (path for path in folder.iterdir() if path.is_dir())
    return entry


def record_bundles(home: Path, monkeypatch) -> list[str]:
    """Return a list that gets one item per build of the chart script, which is cached in `home`."""
    import vl_convert

    made: list[str] = []
    monkeypatch.setattr(page, "user_cache_folder", lambda: home)
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda text: made.append(text) or "draw(1);\r\n draw(2);\n")
    return made
