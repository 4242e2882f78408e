from __future__ import annotations

import gc
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from cnnrun.base.errors import DataError
from cnnrun.base.progress import progress_bar
from cnnrun.data.index import index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.data.settings import Data
from cnnrun.data.sources.shards import Shards
from tests.support.images import save_picture

IMAGE = {"size": 8, "channels": 3}


def write_shard(path: Path, samples: list[dict[str, bytes]], compress: str = "") -> Path:
    """Write a tar of samples, each a mapping from extension to bytes; `__key__` names the sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, f"w:{compress}") as archive:
        for number, sample in enumerate(samples):
            for extension, data in sample.items():
                if extension != "__key__":
                    member = tarfile.TarInfo(f"{sample.get('__key__', f's/{number:04}')}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return path


def samples(folder: Path, count: int, start: int = 0) -> list[dict[str, bytes]]:
    return [
        {"cls": str(i % 3).encode(), "png": save_picture(folder / f"{i}.png", seed=i).read_bytes()}
        for i in range(start, start + count)
    ]


@pytest.fixture
def two(tmp_path) -> Path:
    for number in range(2):
        write_shard(tmp_path / f"train-{number:02}.tar", samples(tmp_path / "p", 6, 6 * number))
    return tmp_path


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_samples_equal_webdatasets(two):
    webdataset = pytest.importorskip("webdataset")
    theirs = list(webdataset.WebDataset(str(two / "train-{00..01}.tar"), shardshuffle=False).decode("rgb8"))
    gc.collect()  # the library leaves its files open
    data = Data.model_validate(
        {"source": {"shards": str(two / "train-{00..01}.tar")}, "image": {"size": [10, 12], "channels": 3}}
    )
    indexed = index_source(data)
    split = indexed.contents.splits["train"]
    assert split.targets["labels"].tolist() == [sample["cls"] for sample in theirs]
    assert [split.sample_name(i).rpartition("/s/")[2] for i in range(12)] == [f"{s['__key__'][2:]}.png" for s in theirs]
    from cnnrun.data.decode import Decoder

    decoder = Decoder(split, (3, 10, 12), data.image, None)
    for number, sample in enumerate(theirs):
        assert np.array_equal(decoder.decode_one(number).transpose(1, 2, 0), sample["png"])


def test_a_dataset_is_built_from_shards(two):
    data = Data.model_validate({"source": {"shards": str(two / "train-{00..01}.tar")}, "image": IMAGE})
    made = build_dataset(data, index_source(data), progress_bar)
    assert made.facts.classes == ("0", "1", "2")
    assert {name: len(each) for name, each in made.splits.items()} == {"train": 9, "val": 3}
    assert "train-01.tar/s/000" in made.splits["train"].sample_name(len(made.splits["train"]) - 1)


def test_text_labels_and_other_splits_are_read(tmp_path):
    def named(names):
        return [
            {"txt": name.encode(), "png": save_picture(tmp_path / "x.png", seed=i).read_bytes()}
            for i, name in enumerate(names)
        ]

    write_shard(tmp_path / "a.tar", named(["dog", "cat", "dog"]))
    write_shard(tmp_path / "b.tar", named(["cat"]))
    indexed = Shards(train=str(tmp_path / "a.tar"), val=[str(tmp_path / "b.tar")], label="txt").read()
    assert indexed.classes == ("cat", "dog")
    assert indexed.splits["train"].targets["labels"].tolist() == [1, 0, 1]
    write_shard(tmp_path / "b.tar", named(["fox"]))
    with pytest.raises(DataError, match="its label 'fox' is not a class"):
        Shards(train=str(tmp_path / "a.tar"), val=str(tmp_path / "b.tar"), label="txt").read()


def test_zero_padded_class_numbers_are_numbers(tmp_path):
    png = save_picture(tmp_path / "x.png").read_bytes()
    write_shard(tmp_path / "a.tar", [{"cls": label, "png": png} for label in (b"00", b"02", b"1", b"01")])
    for classes, expected in ((None, ("0", "1", "2")), (["a", "b", "c"], ("a", "b", "c"))):
        contents = Shards(train=str(tmp_path / "a.tar"), classes=classes).read()
        assert contents.classes == expected
        assert contents.splits["train"].targets["labels"].tolist() == [0, 2, 1, 1]
    with pytest.raises(DataError, match="its label '02' is not a class"):
        Shards(train=str(tmp_path / "a.tar"), classes=["a", "b"]).read()


def test_members_of_longer_extensions_and_arrays_beside_images_are_no_images(tmp_path):
    png, array = save_picture(tmp_path / "x.png").read_bytes(), io.BytesIO()
    np.save(array, np.zeros((4, 4, 5), np.uint8))
    extra = {"seg.png": png, "npy": array.getvalue()}
    write_shard(tmp_path / "a.tar", [{"cls": label, "png": png, **extra} for label in (b"0", b"1")])
    assert len(Shards(train=str(tmp_path / "a.tar")).read().splits["train"]) == 2
    write_shard(tmp_path / "b.tar", [{"cls": label, "npy": array.getvalue()} for label in (b"0", b"1")])
    assert len(Shards(train=str(tmp_path / "b.tar")).read().splits["train"]) == 2


def test_numbers_too_large_for_class_numbers_are_names(tmp_path):
    png = save_picture(tmp_path / "x.png").read_bytes()
    write_shard(
        tmp_path / "a.tar", [{"cls": label, "png": png} for label in (b"20240102", b"20240101", b"99999999999")]
    )
    assert Shards(train=str(tmp_path / "a.tar")).read().classes == ("20240101", "20240102", "99999999999")


def test_content_fingerprints_of_shards_ignore_times_and_notice_changed_bytes(two):
    def key(by: str) -> str:
        source = {"shards": str(two / "train-{00..01}.tar")}
        data = Data.model_validate({"source": source, "image": IMAGE, "fingerprint": by})
        return build_dataset(data, index_source(data), progress_bar).facts.fingerprint

    path, times, content = two / "train-00.tar", key("times"), key("content")
    os.utime(path, ns=(1, 1))
    assert key("times") != times
    assert key("content") == content
    data, times = bytearray(path.read_bytes()), key("times")
    data[-1] ^= 1  # in the padding after the last member: no image changes, only the file
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert key("times") == times
    assert key("content") != content


def test_a_pipe_needs_permission_and_is_fetched_once(two, monkeypatch, capfd):
    pytest.importorskip("webdataset")
    counter = two / "count"
    url = f"pipe:echo x >> {counter}; cat {two / 'train-00.tar'}"
    with pytest.raises(DataError, match="a config may not run a command; `cnnrun --fetch"):
        Shards(train=url).read()
    assert not counter.exists()
    monkeypatch.setenv("CNNRUN_FETCH", "1")
    fetched = Shards(train=url, copies=str(two / "copies")).read().splits["train"]
    plain = Shards(train=str(two / "train-00.tar")).read().splits["train"]
    assert fetched.targets["labels"].tolist() == plain.targets["labels"].tolist()
    Shards(train=url, copies=str(two / "copies")).read()
    assert counter.read_text() == "x\n"
    assert len(list((two / "copies").iterdir())) == 1
    with pytest.raises(DataError, match="what was fetched is not a tar"):
        Shards(train="pipe:echo no tar", copies=str(two / "copies")).read()
    assert len(list((two / "copies").iterdir())) == 1


@pytest.mark.parametrize(
    "url", ["http://x/$(touch pwned)", "http://x/'; touch pwned; '", "file:///etc/passwd", "-://x"]
)
def test_unsafe_urls_are_refused(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="not a URL"):
        Shards(train=url).read()
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.write_bytes(b"no tar"), "not a plain tar"),
        (lambda p: write_shard(p, [{"png": b"x"}]), r"has no \.cls member"),
        (lambda p: write_shard(p, [{"cls": b"\xff", "png": b"x"}]), "not text"),
        (lambda p: write_shard(p, [{"cls": b"1" * 5000, "png": b"x"}]), "5,000 bytes"),
        (lambda p: write_shard(p, [{"cls": b"1", "png": b"x", "jpg": b"y"}]), "2 images"),
        (lambda p: write_shard(p, [{"cls": b"1"}]), r"s/0000\.cls: its sample has no image"),
        (lambda p: write_shard(p, [{"txt": b"1"}]), "no sample with an image"),
        (lambda p: write_shard(p, [{"cls": b"1", "png": b"x"}], "gz"), "a compressed one must be unpacked"),
        (lambda p: write_shard(p, [{"__key__": "a", "cls": b"1", "png": b"x"}] * 2), "is in its sample twice"),
    ],
)
def test_damaged_shards_are_named(tmp_path, make, words):
    make(tmp_path / "a.tar")
    with pytest.raises(DataError, match=words):
        Shards(train=str(tmp_path / "a.tar")).read()


@pytest.fixture
def shard_server(two):
    """The address of a server of the shards' folder, and the paths requested from it."""
    import functools
    import http.server
    import threading

    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(two)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_fetched_copies_are_not_group_writable_under_a_lax_umask(two, monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.setenv("CNNRUN_FETCH", "1")
    url = f"pipe:cat {two / 'train-00.tar'}"
    before = os.umask(0o002)
    try:
        for copies in (two / "new", two / "there"):
            (two / "there").mkdir(mode=0o755, exist_ok=True)
            first, again = (Shards(train=url, copies=str(copies)).read().splits["train"] for _ in range(2))
            assert len(first) == len(again) > 0
    finally:
        os.umask(before)


def test_a_url_needs_permission_and_is_fetched_once(two, shard_server, monkeypatch):
    """A former fault: a URL in a config ran curl, with 30 retries."""
    address, asked = shard_server
    url, copies = f"{address}/train-00.tar", str(two / "copies")
    with pytest.raises(DataError, match="a config may not fetch from the network; `cnnrun --fetch"):
        Shards(train=url, copies=copies).read()
    assert not asked
    monkeypatch.setenv("CNNRUN_FETCH", "1")
    fetched = Shards(train=url, copies=copies).read().splits["train"]
    plain = Shards(train=str(two / "train-00.tar")).read().splits["train"]
    assert fetched.targets["labels"].tolist() == plain.targets["labels"].tolist()
    monkeypatch.delenv("CNNRUN_FETCH")
    Shards(train=url, copies=copies).read()  # a fetched copy needs neither permission nor network
    assert asked == ["/train-00.tar"]


@pytest.mark.parametrize("path", ["/none.tar", "/notes.txt"])
def test_a_failed_fetch_is_one_line_and_leaves_no_file(two, shard_server, monkeypatch, path):
    monkeypatch.setenv("CNNRUN_FETCH", "1")
    (two / "notes.txt").write_text("no tar")
    with pytest.raises(DataError, match="cannot be fetched|what was fetched is not a tar"):
        Shards(train=shard_server[0] + path, copies=str(two / "copies")).read()
    assert not list((two / "copies").iterdir())
    with pytest.raises(DataError, match="cannot be fetched"):
        Shards(train="s3://bucket/a.tar", copies=str(two / "copies")).read()


def test_the_fetch_option_permits_fetching_for_one_command(two, shard_server, run_cli, monkeypatch):
    monkeypatch.setenv("CNNRUN_FETCH", "0")
    (two / "c.yaml").write_text(
        f"task: classify\ndata: {{source: {{shards: {{train: '{shard_server[0]}/train-00.tar', "
        f"copies: '{two}/copies'}}}}, "
        "image: {size: 8, channels: 1}, split: {val: 0.3}}\nmodel: [flatten]\ntrain: {batch: 2}\n"
    )
    code, _, err = run_cli("check", two / "c.yaml")
    assert (code, len(err.splitlines())) == (8, 1)
    code, _, err = run_cli("--fetch", "check", two / "c.yaml")
    assert code == 0, err
    assert os.environ["CNNRUN_FETCH"] == "0", "leave is given for one command"
