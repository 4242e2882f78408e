"""Published weights are fetched from a server, here a local one: whole, cut, swapped, refused, slow, resumed."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from cnnrun.base import downloads
from cnnrun.base.downloads import RemoteFile, download
from cnnrun.base.errors import CheckpointError, ConfigError, DownloadError, StorageError
from cnnrun.base.progress import progress_bar
from cnnrun.config import zoo
from cnnrun.experiment import open_run, zoo_weights
from cnnrun.experiment.import_weights import convert_weights
from cnnrun.experiment.weights_source import read_weights
from cnnrun.experiment.zoo_weights import PublishedWeights, fetch_weights, list_published
from cnnrun.model import weights_file

pytestmark = pytest.mark.usefixtures("forked_pickle_reader")
CPU = torch.device("cpu")
PTH = Path(__file__).parents[2] / "data" / "mobilenet-v2" / "mobilenet_v2-b0353104.pth"
needs_mobilenet_weights = pytest.mark.skipif(not PTH.exists(), reason="scripts/get_data mobilenet-v2 was not run")
CONTENT = bytes(range(256)) * 40_000  # 10 MB
DIGEST = hashlib.sha256(CONTENT).hexdigest()[:8]


class Server:
    """A file server that behaves as `answer` says: it gets the handler and the first byte that is asked for."""

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler, int], None]) -> None:
        self.starts: list[int] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range", "bytes=0-")
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                server.starts.append(start)
                answer(self, start)

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/net-{DIGEST}.pth"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler, int], None]) -> Iterator[Server]:
    server = Server(answer)
    try:
        yield server
    finally:
        server.close()


def send(handler: BaseHTTPRequestHandler, start: int, content: bytes = CONTENT, up_to: int | None = None) -> None:
    """Answer with the bytes from `start`, but end the connection before byte `up_to`."""
    if start >= len(content):
        handler.send_error(416)
        return
    handler.send_response(206 if start else 200)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    handler.send_header("Content-Length", str(len(content) - start))
    handler.end_headers()
    handler.wfile.write(content[start:up_to])


def fetch(server: Server, path: Path, timeout: float = 5.0) -> None:
    download(RemoteFile(server.url, DIGEST, len(CONTENT) + 10_000), path, progress_bar, timeout)


def leftovers(path: Path) -> set[str]:
    return {entry.name for entry in path.parent.iterdir()} - {path.name, f"{path.name}.lock"}


def test_a_whole_file_is_fetched_once(tmp_path):
    with serving(send) as server:
        fetch(server, tmp_path / "w.pth")
        assert (tmp_path / "w.pth").read_bytes() == CONTENT
        fetch(server, tmp_path / "w.pth")
        assert server.starts == [0]
    assert not leftovers(tmp_path / "w.pth")


def test_a_cut_download_goes_on_in_the_same_process_and_in_another(tmp_path, capfd):
    with serving(lambda handler, start: send(handler, start, up_to=start + 3_000_000)) as server:
        with pytest.raises(
            DownloadError, match=r"the connection ended after 9\.0 of 10\.2 MB; the same command goes on"
        ):
            fetch(server, tmp_path / "w.pth")
        assert server.starts == [0, 3_000_000, 6_000_000]
        assert "trying again" in capfd.readouterr().err
        fetch(server, tmp_path / "w.pth")
        assert server.starts[3:] == [9_000_000]
    assert (tmp_path / "w.pth").read_bytes() == CONTENT
    assert not leftovers(tmp_path / "w.pth")


def test_a_server_without_ranges_sends_the_file_from_its_start(tmp_path):
    (tmp_path / "w.pth.part").write_bytes(CONTENT[:5000])
    with serving(lambda handler, start: send(handler, 0)) as server:
        fetch(server, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").read_bytes() == CONTENT


def test_another_file_is_refused_and_removed(tmp_path):
    with (
        serving(lambda handler, start: send(handler, start, CONTENT[::-1])) as server,
        pytest.raises(DownloadError, match=r"not the published file \(its SHA-256 begins with [0-9a-f]{16}, not with"),
    ):
        fetch(server, tmp_path / "w.pth")
    assert not (tmp_path / "w.pth").exists()
    assert not leftovers(tmp_path / "w.pth")


def test_a_part_of_another_file_is_found_out_and_the_next_attempt_succeeds(tmp_path):
    (tmp_path / "w.pth.part").write_bytes(b"x" * 5000)
    with serving(send) as server:
        with pytest.raises(DownloadError, match="not the published file"):
            fetch(server, tmp_path / "w.pth")
        fetch(server, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").read_bytes() == CONTENT


def test_a_part_that_is_longer_than_the_file_is_fetched_anew(tmp_path):
    (tmp_path / "w.pth.part").write_bytes(CONTENT + b"more")
    with serving(send) as server:
        fetch(server, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").read_bytes() == CONTENT


def test_an_endless_answer_is_cut(tmp_path):
    def endless(handler, start):
        handler.send_response(200)
        handler.end_headers()
        while True:
            try:
                handler.wfile.write(b"x" * 1_000_000)
            except OSError:
                return

    with (
        serving(endless) as server,
        pytest.raises(DownloadError, match=r"more than the 10\.\d MB of the published file"),
    ):
        fetch(server, tmp_path / "w.pth")
    assert not leftovers(tmp_path / "w.pth")


def test_a_refusal_and_a_server_that_is_not_there_are_one_line(tmp_path):
    with (
        serving(lambda handler, start: handler.send_error(403, "Forbidden")) as server,
        pytest.raises(DownloadError, match=r"the server refused \(403 Forbidden\)") as refused,
    ):
        fetch(server, tmp_path / "w.pth")
    with pytest.raises(DownloadError, match=r"cannot be reached \(Connection refused\)") as gone:
        fetch(server, tmp_path / "w.pth")
    assert len(refused.value.lines) == len(gone.value.lines) == 1
    with pytest.raises(DownloadError, match="only https and http"):
        download(RemoteFile("file:///etc/passwd", DIGEST, 100), tmp_path / "w.pth", progress_bar)


def test_a_silent_server_is_given_up_and_what_arrived_is_kept(tmp_path):
    def slow(handler, start):
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        handler.send_header("Content-Length", str(len(CONTENT) - start))
        handler.end_headers()
        handler.wfile.write(CONTENT[start : start + 2_097_152])
        handler.wfile.flush()
        time.sleep(1.0)

    with serving(slow) as server, pytest.raises(DownloadError, match="the same command goes on from there"):
        fetch(server, tmp_path / "w.pth", timeout=0.4)
    arrived = (tmp_path / "w.pth.part").read_bytes()
    assert 0 < len(arrived) < len(CONTENT)
    assert CONTENT.startswith(arrived)


def test_a_full_disk_is_a_storage_error_and_is_not_tried_again(tmp_path, monkeypatch):
    class FullDisk:
        name = str(tmp_path / "w.pth.part")

        def write(self, chunk):
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left on device"):
        downloads._write(FullDisk(), b"x")


# --- zoo weights ------------------------------------------------------------------------------------------------------


def test_every_network_of_torchvision_has_a_file_whose_name_carries_its_digest():
    published = {}
    for network in zoo.network_names():
        try:
            published[network] = list_published(network)
        except ConfigError as error:
            assert "torchvision publishes no weights" in str(error)
    assert len(published) >= 17
    for entries in published.values():
        for item in entries:
            assert len(item.file.digest_prefix) >= 8
            assert 1 << 20 < item.file.max_bytes < 1 << 30
            assert 0.5 < item.accuracy < 0.9
    assert [item.entry for item in published["mobilenet_v2"]] == ["IMAGENET1K_V2", "IMAGENET1K_V1"]
    assert published["mobilenet_v2"][0].crop_pct == 224 / 232


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_weights_from_tensorflow_get_their_own_mean_and_deviation(name, tmp_path):
    """torchvision turns its preprocessing back into TensorFlow's inside these networks (`transform_input`)."""
    import torchvision

    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None, init_weights=False, transform_input=True).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    drop = zoo_weights._AUXILIARY_HEADS[name]
    made = convert_weights(tmp_path / "w.pth", name, "order", "imagenet", drop)
    weights_file.write_weights_file(tmp_path / "w.safetensors", made.tensors, made.description, made.facts)
    ours = open_run.open_network(tmp_path / "w.safetensors", tmp_path, CPU).network
    side = made.facts.image_shape[1]
    pixels = torch.randint(0, 256, (2, 3, side, side)).float()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    prepared = (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), theirs(prepared), rtol=1e-4, atol=1e-4)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A registry whose one file of squeezenet1_1 is served locally; the server, its content and the cache folder."""
    import torchvision

    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "their.pth")
    content = (tmp_path / "their.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with serving(lambda handler, start: send(handler, start, content)) as server:
        url = server.url.replace(DIGEST, digest[:8])
        entry = PublishedWeights(
            "squeezenet1_1", "IMAGENET1K_V1", RemoteFile(url, digest[:8], len(content) + 100), 0.875, False, 0.58
        )
        monkeypatch.setattr(zoo_weights, "list_published", lambda network: [entry])
        yield server, content, cache


def test_fetched_weights_are_a_weights_file_in_the_cache_with_their_origin(published, run_cli, tmp_path):
    import safetensors

    server, content, cache = published
    code, out, _ = run_cli("zoo", "weights", "squeezenet1_1")
    path = cache / "cnnrun" / "weights" / "squeezenet1_1.safetensors"
    assert code == 0
    assert str(path) in out
    assert "licence: published by torchvision" in out
    assert [entry.name for entry in path.parent.iterdir() if entry.suffix not in (".lock", ".safetensors")] == []
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["source"].startswith(server.url[:20])
        assert "ImageNet" in file.metadata()["licence"]
    (tmp_path / "copy.pth").write_bytes(content)
    from_file = fetch_weights("squeezenet1_1", None, tmp_path / "copy.pth", tmp_path / "w.safetensors")
    first, second = read_weights(path), read_weights(Path(from_file["path"]))
    assert first.description == second.description
    assert all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())
    assert (tmp_path / "copy.pth").exists()


def test_weights_that_are_here_are_not_fetched_again_unless_they_are_damaged(published, capfd):
    server = published[0]
    first = fetch_weights("squeezenet1_1", None, None, None)
    requests = len(server.starts)
    assert fetch_weights("squeezenet1_1", None, None, None) == first
    assert "these weights are here already" in capfd.readouterr().err
    assert len(server.starts) == requests
    path = Path(first["path"])
    content = path.read_bytes()
    for damaged in (content[:-100], content.replace(b"IMAGENET1K_V1", b"IMAGENET1K_V0")):
        path.write_bytes(damaged)
        assert fetch_weights("squeezenet1_1", None, None, None) == first
        assert read_weights(path).origin["entry"] == "IMAGENET1K_V1"
    assert len(server.starts) == 3 * requests


def test_two_processes_fetch_the_same_weights_once(published):
    server = published[0]
    with ThreadPoolExecutor(2) as pool:  # each opens the lock file, as two processes would
        found = list(pool.map(lambda _: fetch_weights("squeezenet1_1", None, None, None), range(2)))
    assert found[0] == found[1]
    assert len(server.starts) == 1


def test_a_file_of_the_user_is_not_replaced(published, tmp_path, run_cli):
    server, content, _ = published
    own = tmp_path / "own.safetensors"
    own.write_bytes(b"mine")
    (tmp_path / "their.pth").write_bytes(content)
    for words in ([], ["--from", tmp_path / "their.pth"]):
        code, _, err = run_cli("zoo", "weights", "squeezenet1_1", "--out", own, *words)
        assert code == 2
        assert "already exists; choose another" in err
    assert own.read_bytes() == b"mine"
    assert not server.starts


def test_a_file_of_the_user_beside_the_weights_stays(published, tmp_path):
    _, content, _ = published
    own = tmp_path / zoo_weights.list_published("squeezenet1_1")[0].file_name
    own.write_bytes(content)
    fetch_weights("squeezenet1_1", None, None, tmp_path / "w.safetensors")
    assert own.read_bytes() == content
    assert {path.name for path in tmp_path.glob(".*.download")} == set()


def test_without_a_network_one_line_says_what_to_do(published, run_cli):
    server, _, cache = published
    server.close()
    code, _, errors = run_cli("zoo", "weights", "squeezenet1_1")
    assert code == 3
    assert "cannot be reached" in errors
    assert "--from net-" in errors
    assert "Traceback" not in errors
    assert not list(cache.rglob("*.safetensors"))


def test_what_is_not_published_is_refused(published, run_cli, tmp_path, monkeypatch):
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"not net-.*\.pth .*cnnrun import FILE --like squeezenet1_1"):
        fetch_weights("squeezenet1_1", None, tmp_path / "other.pth", None)
    with pytest.raises(ConfigError, match="has IMAGENET1K_V1; did you mean"):
        fetch_weights("squeezenet1_1", "IMAGENET1K_V2", None, None)
    with pytest.raises(ConfigError, match="has IMAGENET1K_V1; did you mean"):
        fetch_weights("squeezenet1_1", "IMAGENET1K_V2", tmp_path / "other.pth", None)
    with pytest.raises(ConfigError, match=r"ends in \.safetensors"):
        fetch_weights("squeezenet1_1", None, None, tmp_path / "w.pth")
    monkeypatch.undo()
    for name, problem in (("lenet5", "publishes no weights"), ("resnet81", "did you mean 'resnet18'")):
        code, _, errors = run_cli("zoo", "weights", name)
        assert code == 2
        assert problem in errors


@needs_mobilenet_weights
def test_the_published_file_of_mobilenet_v2_is_recognized_by_its_digest(tmp_path):
    written = fetch_weights("mobilenet_v2", None, PTH, tmp_path / "w.safetensors")
    assert written["entry"] == "IMAGENET1K_V1"
    assert written["parameters"] == 3_504_872
