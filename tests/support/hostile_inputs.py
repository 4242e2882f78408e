"""Inputs built to make the program hang, exhaust its memory, or read and run what it must not.

Each builder writes its files into a folder and returns the command. INPUTS pairs it with the expected exit code.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.support.forked_processes import fork, outcome, run_main

Build = Callable[[Path], list[str]]
SECONDS, MIB = 30, 1536  # what an answer may take
COMMAND_MIB = 400  # of which a command holds these before it has read anything: Python and torch


@dataclass(frozen=True)
class Answer:
    """Result of a command: exit code, stderr, peak memory in MiB and seconds.

    `peak_mib` is the memory of a fresh command, without what the process that it was forked from holds:
    a test run of 2,000 tests holds twice as much as a command.
    """

    code: int
    err: str
    peak_mib: int
    seconds: float


def answer(build: Build, folder: Path) -> Answer:
    """Run the command in a forked process, so that torch is imported only once."""
    folder.mkdir(parents=True, exist_ok=True)
    words = build(folder)
    began = time.monotonic()
    found = outcome(*fork(lambda: _run(words, folder)))
    assert isinstance(found, tuple), found
    return Answer(*found, time.monotonic() - began)


def _run(words: list[str], folder: Path) -> tuple[int, str, int]:
    import torch

    from cnnrun.base.device import peak_memory_mib, reset_peak_memory

    reset_peak_memory(torch.device("cpu"))
    inherited = peak_memory_mib(torch.device("cpu"))
    code, _, err = run_main(words, folder)
    return code, err, COMMAND_MIB + peak_memory_mib(torch.device("cpu")) - inherited


def config(folder: Path, source: str, task: str = "classify") -> list[str]:
    """Write a config with the source and return its `check` command."""
    data = f"{{source: {source}, image: {{size: 8, channels: 1}}, split: {{val: 0.2}}, cache_dir: '{folder}/cache'}}"
    model = "[{conv: {out_channels: 4, stride: 8}}]" if task == "detect" else "[flatten]"
    (folder / "c.yaml").write_text(f"task: {task}\ndata: {data}\nmodel: {model}\ntrain: {{epochs: 1, batch: 4}}\n")
    return ["check", "c.yaml"]


# --- what is no file --------------------------------------------------------------------------------------------------


def _pipe(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


def _endless(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/zero")
    return path


def odd_config(make: Callable[[Path], Path]) -> Build:
    def build(folder: Path) -> list[str]:
        make(folder / "c.yaml")
        return ["check", "c.yaml"]

    return build


def odd_source(make: Callable[[Path], Path], name: str, source: str, task: str = "classify") -> Build:
    def build(folder: Path) -> list[str]:
        make(folder / name)
        return config(folder, source, task)

    return build


def odd_annotation(make: Callable[[Path], Path]) -> Build:
    def build(folder: Path) -> list[str]:
        _voc(folder)
        (folder / "d" / "Annotations" / "0.xml").unlink()
        make(folder / "d" / "Annotations" / "0.xml")
        return config(folder, "{voc: d}", "detect")

    return build


def odd_argument(make: Callable[[Path], Path], name: str, words: str) -> Build:
    def build(folder: Path) -> list[str]:
        make(folder / name)
        return words.split()

    return build


# --- what unpacks, or counts, without end -----------------------------------------------------------------------------


def packed_idx(header: bytes, unpacked: int) -> Build:
    """IDX images in a .gz of zeros behind a header."""

    def build(folder: Path) -> list[str]:
        (folder / "d").mkdir()
        with gzip.open(folder / "d" / "train-images-idx3-ubyte.gz", "wb", 9) as file:
            file.write(header)
            for _ in range(unpacked >> 24):
                file.write(bytes(1 << 24))
        labels = struct.pack(">II", 0x801, 60000) + bytes(60000)
        (folder / "d" / "train-labels-idx1-ubyte").write_bytes(labels)
        return config(folder, "{idx: d}")

    return build


def packed_npz(unpacked: int) -> Build:
    def build(folder: Path) -> list[str]:
        with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            header = io.BytesIO()
            shape = (unpacked // 64, 8, 8)
            np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
            with archive.open("x.npy", "w", force_zip64=True) as file:
                file.write(header.getvalue())
                for _ in range(unpacked >> 24):
                    file.write(bytes(1 << 24))
            labels = io.BytesIO()
            np.save(labels, np.arange(4))
            archive.writestr("y.npy", labels.getvalue())
        return config(folder, "{arrays: a.npz}")

    return build


def pickled_npz(folder: Path) -> list[str]:
    np.savez(folder / "a.npz", x=np.array([{"a": 1}], object), y=np.arange(1))
    return config(folder, "{arrays: a.npz}")


def coco_of(text: Callable[[], bytes]) -> Build:
    def build(folder: Path) -> list[str]:
        (folder / "t.json").write_bytes(text())
        return config(folder, "{coco: t.json}", "detect")

    return build


def tiny_rows(folder: Path) -> list[str]:
    (folder / "t.csv").write_bytes(b"path,label\n" + b"a,b\n" * 12_000_000)
    return config(folder, "{table: t.csv}")


def one_large_cell(folder: Path) -> list[str]:
    (folder / "t.csv").write_bytes(b'path,label\n"' + b"a" * 50_000_000 + b'",b\n')
    return config(folder, "{table: t.csv}")


def many_columns(folder: Path) -> list[str]:
    names = b",".join(b"c%d" % number for number in range(20_000))
    (folder / "t.csv").write_bytes(names + b"\n" + (b"1," * 20_000)[:-1] + b"\n")
    return config(folder, "{table: t.csv}")


def parquet_of_repeats(folder: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(30_000_000, np.int8)), pa.array(["x" * 50]))
    pq.write_table(pa.table({"path": column, "label": column}), folder / "t.parquet")
    return config(folder, "{table: t.parquet}")


def entities(folder: Path) -> list[str]:
    _voc(folder)
    bomb = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * 10}">' for n in range(9))
    text = f'<!DOCTYPE a [<!ENTITY e0 "ha">{bomb}]><annotation><filename>&e9;</filename></annotation>'
    (folder / "d" / "Annotations" / "0.xml").write_text(text)
    return config(folder, "{voc: d}", "detect")


def entities_in_utf16(folder: Path) -> list[str]:
    """A DOCTYPE that no search for ASCII bytes finds, padded so that expat's own limit does not detect the growth."""
    _voc(folder)
    head = '<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE a [<!ENTITY e "' + "e" * 60_000 + '">]>'
    body = f"<annotation><!--{'c' * 7_500_000}--><object><name>{'&e;' * 23_000}</name></object></annotation>"
    (folder / "d" / "Annotations" / "0.xml").write_bytes((head + body).encode("utf-16"))
    return config(folder, "{voc: d}", "detect")


def deep_xml(folder: Path) -> list[str]:
    _voc(folder)
    (folder / "d" / "Annotations" / "0.xml").write_bytes(b"<a>" * 5_000_000)
    return config(folder, "{voc: d}", "detect")


def list_of_blanks(folder: Path) -> list[str]:
    _voc(folder)
    (folder / "d" / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "d" / "ImageSets" / "Main" / "train.txt").write_bytes(b"0\n1\n2" + b" " * 400_000 + b"x\n")
    return config(folder, "{voc: d}", "detect")


def annotations_without_objects(folder: Path) -> list[str]:
    _voc(folder)
    for path in (folder / "d" / "Annotations").iterdir():
        path.write_text("<annotation/>")
    return config(folder, "{voc: {root: d, give: presence}}", "multilabel")


def empty_cells(folder: Path) -> list[str]:
    (folder / "t.csv").write_bytes(b"path,label\n" + b",\n" * 9_900_000)
    return config(folder, "{table: t.csv}")


def parquet_of_long_text(folder: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    label = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000, np.int32)), pa.array(["x" * 100_000]))
    table = pa.table({"path": [f"{number}.png" for number in range(20_000)], "label": label})
    pq.write_table(table, folder / "t.parquet", compression="zstd")
    return config(folder, "{table: t.parquet}")


def parquet_of(make: Callable[[], object]) -> Build:
    def build(folder: Path) -> list[str]:
        import pyarrow.parquet as pq

        pq.write_table(make(), folder / "t.parquet")
        return config(folder, "{table: t.parquet}")

    return build


def repeated_column() -> object:
    import pyarrow as pa

    return pa.Table.from_arrays([pa.array(["a.png"])] * 3, names=["path", "path", "label"])


def time_outside_the_calendar() -> object:
    import pyarrow as pa

    when = pa.array([2**62], pa.timestamp("us", tz="Mars/Phobos"))
    return pa.table({"path": ["a.png"], "label": when})


def sparse_idx(folder: Path) -> list[str]:
    (folder / "d").mkdir()
    for name, magic, shape in (("images-idx3", 0x803, (3_826_530, 28, 28)), ("labels-idx1", 0x801, (3_826_530,))):
        path = folder / "d" / f"train-{name}-ubyte"
        path.write_bytes(struct.pack(f">{1 + len(shape)}I", magic, *shape))
        os.truncate(path, 4 + 4 * len(shape) + int(np.prod(shape)))
    return config(folder, "{idx: d}")


def many_headers() -> bytes:
    body = b"20 comment=aaaaaaaaa\n".ljust(512, b"\0")
    return (tar_header(b"x", 21, b"x") + body) * 3000


def npz_of(members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Build:
    def build(folder: Path) -> list[str]:
        with zipfile.ZipFile(folder / "a.npz", "w", how) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return config(folder, "{arrays: a.npz}")

    return build


def npy(array: object) -> bytes:
    made = io.BytesIO()
    np.save(made, np.asarray(array))
    return made.getvalue()


def npy_claiming(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({shape})}}\n".encode()
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text


IMAGES, LABELS = npy(np.zeros((4, 8, 8), np.uint8)), npy(np.arange(4))


def damaged_lzma(folder: Path) -> list[str]:
    words = npz_of({"x.npy": IMAGES + bytes(5000), "y.npy": LABELS}, zipfile.ZIP_LZMA)(folder)
    data = bytearray((folder / "a.npz").read_bytes())
    data[60:110] = bytes(range(50))
    (folder / "a.npz").write_bytes(data)
    return words


def _voc(folder: Path) -> None:
    from PIL import Image

    for name in ("Annotations", "JPEGImages"):
        (folder / "d" / name).mkdir(parents=True)
    for number in range(4):
        Image.new("L", (16, 16), number).save(folder / "d" / "JPEGImages" / f"{number}.png")
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        text = f"<annotation><filename>{number}.png</filename><object><name>a</name>{box}</object></annotation>"
        (folder / "d" / "Annotations" / f"{number}.xml").write_text(text)


# --- tar shards -------------------------------------------------------------------------------------------------------


def tar_header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """A tar header with its size in base 256, as GNU tar writes large sizes."""
    field = b"\x80" + size.to_bytes(11, "big")
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" * 3 + field + b"0" * 12 + b" " * 8 + kind + bytes(100))
    block = block.ljust(257, b"\0") + b"ustar\x0000"
    block = bytearray(block.ljust(512, b"\0"))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def shard_of(data: Callable[[], bytes]) -> Build:
    def build(folder: Path) -> list[str]:
        (folder / "t.tar").write_bytes(data())
        return config(folder, "{shards: t.tar}")

    return build


def sparse_shard(folder: Path) -> list[str]:
    """A sparse file of 40 GiB whose first header claims a name of 30 GiB."""
    path = folder / "t.tar"
    path.write_bytes(tar_header(b"././@LongLink", 30 << 30, b"L"))
    os.truncate(path, 40 << 30)
    return config(folder, "{shards: t.tar}")


def gnu_sparse() -> bytes:
    block = bytearray(tar_header(b"a.png", 512, b"S"))
    block[386:410] = b"00000000000\x0000000001000\x00"
    block[483:495] = b"77777777777\x00"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512) + tar_header(b"a.cls", 1) + b"1".ljust(512, b"\0") + bytes(1024)


# --- images, models, names --------------------------------------------------------------------------------------------


def image_bomb(folder: Path) -> list[str]:
    from PIL import Image

    for name in ("a", "b"):
        (folder / "d" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (16, 16), number * 9 + ord(name)).save(folder / "d" / name / f"{number}.png")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1 << 20), 9)) + chunk(b"IEND", b"")
    (folder / "d" / "a" / "bomb.png").write_bytes(data)
    config(folder, "{folder: d}")
    return ["train", "c.yaml"]


def image_pipe(folder: Path) -> list[str]:
    words = image_bomb(folder)
    (folder / "d" / "a" / "bomb.png").unlink()
    _pipe(folder / "d" / "a" / "bomb.png")
    return words


def class_name_not_utf8(folder: Path) -> list[str]:
    words = image_bomb(folder)
    (folder / "d" / "a" / "bomb.png").unlink()
    (folder / "d" / "a").rename(os.fsdecode(os.fsencode(folder / "d") + b"/caf\xe9"))
    return words


def category_name_not_unicode(folder: Path) -> list[str]:
    """JSON can contain half of a surrogate pair, which is not valid Unicode."""
    data = {"images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}], "annotations": []}
    (folder / "t.json").write_text(json.dumps(data | {"categories": [{"id": 1, "name": "a\ud83d"}]}))
    return config(folder, "{coco: t.json}", "detect")


def weights_of(name: str, data: Callable[[], bytes] | None) -> Build:
    """A config whose `model.weights` is a file with the data, or a pipe if `data` is None."""

    def build(folder: Path) -> list[str]:
        _pipe(folder / name) if data is None else (folder / name).write_bytes(data())
        (folder / "c.yaml").write_text(
            f"task: classify\ndata: {{source: digits}}\nmodel: {{weights: {name}, layers: [flatten]}}\n"
        )
        return ["check", "c.yaml"]

    return build


def safetensors_of(length: int, header: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + header


INPUTS: dict[str, tuple[Build, int]] = {
    "config: a pipe": (odd_config(_pipe), 2),
    "config: /dev/zero": (odd_config(_endless), 2),
    "coco: a pipe": (odd_source(_pipe, "t.json", "{coco: t.json}", "detect"), 8),
    "coco: /dev/zero": (odd_source(_endless, "t.json", "{coco: t.json}", "detect"), 8),
    "coco: 60 MB of {}": (coco_of(lambda: b'{"images": [' + b"{}," * 20_000_000 + b"{}]}"), 8),
    "coco: 50 MB of [": (coco_of(lambda: b"[" * 50_000_000), 8),
    "coco: a category name that is not valid Unicode": (category_name_not_unicode, 8),
    "voc: a pipe": (odd_annotation(_pipe), 8),
    "voc: /dev/zero": (odd_annotation(_endless), 8),
    "voc: entities of entities": (entities, 8),
    "voc: entities in UTF-16": (entities_in_utf16, 8),
    "voc: 5,000,000 nested elements": (deep_xml, 8),
    "voc: a list with 400,000 blanks": (list_of_blanks, 8),
    "voc: nothing to count": (annotations_without_objects, 8),
    "idx: a sparse file of 3 GB": (sparse_idx, 8),
    "idx: .gz of 6 GB, as its header says": (packed_idx(struct.pack(">IIII", 0x803, 7_700_000, 28, 28), 1 << 30), 8),
    "idx: .gz, more than its header says": (packed_idx(struct.pack(">IIII", 0x803, 60_000, 28, 28), 1 << 30), 8),
    "idx: a header of 2^96 bytes": (packed_idx(struct.pack(">IIII", 0x803, *[2**32 - 1] * 3), 1 << 24), 8),
    "npz: 1 MB that is 1 GiB": (packed_npz(1 << 30), 8),
    "npz: a pipe": (odd_source(_pipe, "a.npz", "{arrays: a.npz}"), 8),
    "npz: a pickle": (pickled_npz, 8),
    "npz: a header of 6,000 minus signs": (npz_of({"x.npy": npy_claiming("-" * 6000 + "1,"), "y.npy": LABELS}), 8),
    "npz: damaged LZMA": (damaged_lzma, 8),
    "table: 9,900,000 empty rows": (empty_cells, 8),
    "table: Parquet, 2 GB of one text": (parquet_of_long_text, 8),
    "table: Parquet, a column twice": (parquet_of(repeated_column), 8),
    "table: Parquet, a time outside the calendar": (parquet_of(time_outside_the_calendar), 8),
    "table: a pipe": (odd_source(_pipe, "t.csv", "{table: t.csv}"), 8),
    "table: 12,000,000 rows in 48 MB": (tiny_rows, 8),
    "table: a cell of 50 MB": (one_large_cell, 8),
    "table: 20,000 columns": (many_columns, 8),
    "table: 30,000,000 rows of Parquet in a few kB": (parquet_of_repeats, 8),
    "shards: a pipe": (odd_source(_pipe, "t.tar", "{shards: t.tar}"), 8),
    "shards: a member of 2^50 bytes": (shard_of(lambda: tar_header(b"a.png", 2**50) + bytes(1024)), 8),
    "shards: a name of 2^50 bytes": (shard_of(lambda: tar_header(b"././@LongLink", 2**50, b"L") + bytes(1024)), 8),
    "shards: an extended header of 2^60 bytes": (shard_of(lambda: tar_header(b"x", 2**60, b"x") + bytes(1024)), 8),
    "shards: 3,000 extended headers": (shard_of(many_headers), 8),
    "shards: a sparse member": (shard_of(gnu_sparse), 8),
    "shards: a sparse file of 40 GiB": (sparse_shard, 8),
    "shards: s3://": (lambda folder: config(folder, "{shards: 's3://bucket/a.tar'}"), 8),
    "shards: http://": (lambda folder: config(folder, "{shards: 'http://127.0.0.1:9/a.tar'}"), 8),
    "shards: pipe:": (lambda folder: config(folder, "{shards: 'pipe:touch pwned'}"), 8),
    "folder: an image of 3.6 gigapixels": (image_bomb, 8),
    "folder: an image that is a pipe": (image_pipe, 8),
    "folder: a class name that is not UTF-8": (class_name_not_utf8, 8),
    "weights: .pth a pipe": (weights_of("w.pth", None), 3),
    "weights: .safetensors a pipe": (weights_of("w.safetensors", None), 3),
    "weights: a header of 2^63 bytes": (weights_of("w.safetensors", lambda: safetensors_of(2**63)), 3),
    "weights: a header of 1 GB": (weights_of("w.safetensors", lambda: safetensors_of(10**9)), 3),
    "predict: a run that is a pipe": (odd_argument(_pipe, "w.safetensors", "predict . --run w.safetensors"), 3),
    "import: a pipe": (odd_argument(_pipe, "w.pth", "import w.pth --like resnet18"), 3),
    "init: a pipe": (odd_argument(_pipe, "t.csv", "init t.csv"), 8),
}
