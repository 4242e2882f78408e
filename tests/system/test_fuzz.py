"""Fuzz tests of all parsers: a valid file that is changed at random gives a result or an error for the user.

CNNRUN_FUZZ_EXAMPLES sets the examples of each parser (default 40; 2,000 took ten minutes when this was written).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, composite

from cnnrun.base.errors import UserError
from cnnrun.contracts.choices import Choices, OperatingPoint
from cnnrun.data import manifest
from cnnrun.data.sources import lfw_pairs
from cnnrun.data.sources.arrays import Arrays
from cnnrun.data.sources.coco import Coco
from cnnrun.data.sources.idx import Idx
from cnnrun.data.sources.shards import Shards
from cnnrun.data.sources.table import Table
from cnnrun.data.sources.voc import Voc
from cnnrun.experiment import config_file
from cnnrun.experiment.weights_source import checkpoint_weights, read_weights
from cnnrun.results.people import gallery_file
from cnnrun.results.people.gallery_file import GalleryMaker
from cnnrun.training import checkpoints, run_records

EXAMPLES = int(os.environ.get("CNNRUN_FUZZ_EXAMPLES", "40"))
SPECIAL = [
    b"",
    b"\0",
    b"\xff" * 8,
    b"\x80" + bytes(7),
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"[" * 2000,
    b'"',
    b"\n",
    b"/../",
    b"\xed\xa0\x80",
]


@composite
def changed_bytes(draw: DrawFn, data: bytes) -> bytes:
    """Replace, repeat or remove up to six pieces of the data."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(made)))
        end = min(len(made), start + draw(st.sampled_from([0, 1, 1, 2, 4, 8, 64, 10_000])))
        piece = draw(st.sampled_from(SPECIAL) | st.binary(max_size=12) | st.just(bytes(made[start:end]) * 3))
        made[start:end] = piece
    return bytes(made)


def png() -> bytes:
    from PIL import Image

    made = io.BytesIO()
    Image.new("L", (8, 8), 7).save(made, "PNG")
    return made.getvalue()


def tar() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(3):
            for name, data in ((f"{number}.png", png()), (f"{number}.cls", str(number).encode())):
                info = tarfile.TarInfo(name)
                info.size, info.pax_headers = len(data), {"comment": "é"}
                archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


def npz() -> bytes:
    made = io.BytesIO()
    np.savez_compressed(made, x=np.zeros((4, 8, 8), np.uint8), y=np.arange(4))
    return made.getvalue()


def coco() -> bytes:
    images = [{"id": n, "file_name": f"{n}.png", "width": 8, "height": 8} for n in range(3)]
    boxes = [
        {"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0} for n in range(3)
    ]
    return json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}).encode()


def voc() -> bytes:
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
    size = "<size><width>8</width><height>8</height><depth>1</depth></size>"
    return f"<annotation><filename>0.png</filename>{size}<object><name>a</name>{box}</object></annotation>".encode()


def idx_of(what: int, *shape: int) -> bytes:
    return what.to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in shape) + bytes(int(np.prod(shape)))


def gallery_bytes(folder: Path) -> bytes:
    made = gallery_file.build_gallery(
        GalleryMaker("0" * 64), {"ann": np.eye(2, 4, dtype=np.float32), "bob": np.eye(1, 4, dtype=np.float32)}
    )
    gallery_file.write_gallery(folder / "g.safetensors", made)
    return (folder / "g.safetensors").read_bytes()


def folder_of(root: Path) -> None:
    """Write the files that the sources below need beside the changed file."""
    for name in ("Annotations", "JPEGImages"):
        (root / name).mkdir(parents=True)
    for number in range(3):
        (root / f"{number}.png").write_bytes(png())
    (root / "JPEGImages" / "0.png").write_bytes(png())
    (root / "train-labels-idx1-ubyte").write_bytes(idx_of(0x801, 4))


RESULT = b"""{"steps": 3, "best_step": 2, "best": {"val/loss": 0.5}, "seconds": 1.0, "images_per_second": 2.0,
"data_wait_share": 0.0, "peak_memory_mib": 9}"""
YAML = b"task: classify\ndata: {source: digits}\nmodel:\n  - conv: 4\n  - flatten\n"
CSV = b"path,label,split\n0.png,a,train\n1.png,b,train\n2.png,a,val\n"
CHOICES = Choices(1.5, {"ape": 0.25, "bee": 0.5}, (OperatingPoint(0.1, 0.375, 45), OperatingPoint(0.01, 0.625, 45)))
PARSERS: dict[str, tuple[str, Callable[[Path], bytes], Callable[[Path], object]]] = {
    "yaml": ("c.yaml", lambda root: YAML, lambda p: config_file.read_config(p)),
    "csv": ("t.csv", lambda root: CSV, lambda p: Table(path=str(p)).read()),
    "coco": ("t.json", lambda root: coco(), lambda p: Coco(train=str(p)).read()),
    "voc": ("Annotations/0.xml", lambda root: voc(), lambda p: Voc(root=str(p.parent.parent)).read()),
    "npz": ("a.npz", lambda root: npz(), lambda p: Arrays(path=str(p)).read()),
    "idx": ("train-images-idx3-ubyte", lambda root: idx_of(0x803, 4, 8, 8), lambda p: Idx(root=str(p.parent)).read()),
    "tar": ("t.tar", lambda root: tar(), lambda p: Shards(train=str(p)).read()),
    "pairs": (
        "p.txt",
        lambda root: b"2\t1\nann\t1\t2\nann\t1\tbob\t2\nbob\t1\t2\nbob\t2\tann\t1\n",
        lfw_pairs.read_pairs,
    ),
    "manifest": (
        "m",
        lambda root: b"a" * 64 + b"  0.png\n",
        lambda p: manifest.compare_with_manifest(p, [p.parent / "0.png"], p.parent),
    ),
    "gallery": ("g.safetensors", gallery_bytes, gallery_file.read_gallery),
    "weights": ("w.safetensors", lambda root: safetensors.torch.save({"w": torch.ones(3)}, {"a": "b"}), read_weights),
    "image": ("0.png", lambda root: png(), lambda p: _image(p)),
    "metrics": (
        "metrics.jsonl",
        lambda root: b'{"step": 1, "epoch": 1, "val/loss": 0.5}\n' * 3,
        lambda p: run_records.read_metrics(p.parent),
    ),
    "result": ("result.json", lambda root: RESULT, lambda p: run_records.read_result(p.parent)),
    "environment": (
        "environment.json",
        lambda root: b'{"torch": "2", "threads": 1, "later": [{"threads": 2}]}',
        lambda p: run_records.read_environments(p.parent),
    ),
    "calibration": (
        "calibration.json",
        lambda root: json.dumps({"0" * 64: {"choices": CHOICES.to_json()}}).encode(),
        lambda p: _calibrations(p.parent),
    ),
    "calibration of the first edition": (
        "calibration.json",
        lambda root: json.dumps({"0" * 64: {"chosen": CHOICES.by_description()}}).encode(),
        lambda p: _calibrations(p.parent),
    ),
}


def _calibrations(run: Path) -> object:
    return [run_records.parse_calibration(record, run) for record in run_records.read_calibration(run).values()]


def _image(path: Path) -> object:
    from cnnrun.data.image_files import load_with_view
    from cnnrun.data.image_settings import ImageSettings

    return load_with_view(path, (8, 8), 1, ImageSettings())[0]


@pytest.mark.parametrize("name", PARSERS)
def test_a_changed_file_gives_a_result_or_a_user_error(tmp_path, name):
    written, valid, parse = PARSERS[name]
    folder_of(tmp_path / "root")
    path = tmp_path / "root" / written
    data = valid(tmp_path / "root")
    path.write_bytes(data)
    if name not in ("manifest", "yaml"):
        parse(path)  # as it is it is valid

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changed_bytes(data))
    def fuzz(made: bytes) -> None:
        path.write_bytes(made)
        try:
            parse(path)
        except UserError as error:
            assert error.lines
            assert all("\n" not in line for line in error.lines), error.lines

    fuzz()


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "evaluation.json"])
def test_a_changed_checkpoint_gives_weights_or_a_user_error(tmp_path, trained_run, name):
    from tests.support.damaged_runs import newest_checkpoint, reseal

    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    generation = newest_checkpoint(run)
    data = (generation / name).read_bytes()
    sound = (generation / "manifest.json").read_bytes()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changed_bytes(data))
    def fuzz(made: bytes) -> None:
        (generation / "manifest.json").write_bytes(sound)
        (generation / name).write_bytes(made)
        if name != "manifest.json":
            reseal(generation)
        try:
            checkpoint_weights(checkpoints.load(generation))
        except UserError as error:
            assert error.exit_code == 3

    fuzz()
