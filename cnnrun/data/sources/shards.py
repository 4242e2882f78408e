"""Tar shards in WebDataset's layout: a sample is consecutive members that share a name up to the first dot.

Local shards are read in place. The offset of every image in its tar is indexed, so that samples can be read in any
order. The order of an epoch is therefore a function of (seed, epoch), as for every source: for any number of workers
and ranks, and after a resume. Remote shards are copied to a local folder once.
"""

from __future__ import annotations

import http.client
import io
import os
import re
import tarfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any

import torch
from pydantic import Field

from cnnrun.base.atomic_files import Folder, storage_errors
from cnnrun.base.bounded_files import open_file
from cnnrun.base.error_lines import check_problems
from cnnrun.base.errors import DataError, StorageError, escape
from cnnrun.base.extras import require_package
from cnnrun.base.file_sequences import Members, is_hidden_or_system_name
from cnnrun.base.ownership import check_ownership
from cnnrun.base.progress import say
from cnnrun.contracts.source import ClassNames, SourceContents, SourceSpec, Split
from cnnrun.data import cache
from cnnrun.data.class_names import clean_cell, missing_value_problem, sort_class_names
from cnnrun.data.image_names import SUFFIX_LIST, choose_images

_FETCH_VARIABLE = "CNNRUN_FETCH"  # if it is 1, configs may fetch URLs and run commands; `--fetch` sets it
_PIPES_VARIABLE = "CNNRUN_PIPES"  # the deprecated name, which allows commands but not URLs
_URL = re.compile(r"(https?|s3|gs|ftps?|sftp|hf|ais)://[A-Za-z0-9._~:/?#@!&+,;=%-]+")
_MAX_LABEL_BYTES, _MAX_SHARDS = 4096, 100_000
_MAX_HEADER_BYTES = 16 << 20  # of a tar's extended headers, which tarfile reads in one piece
_TIMEOUT_SECONDS = 30

ShardAddresses = str | Annotated[list[str], Field(min_length=1)]


class Shards(SourceSpec):
    """Tar files such as `train-{0000..0009}.tar`; with `cnnrun --fetch` also URLs, and `pipe:` with a command."""

    kind = "shards"
    main = "train"

    train: ShardAddresses
    """The training shards, one or a list; {0000..0009} stands for a range of numbers."""
    val: ShardAddresses | None = None
    """The validation shards."""
    test: ShardAddresses | None = None
    """The test shards."""
    label: str = "cls"
    """The extension of the member that holds the label: a whole number or a name."""
    classes: ClassNames | None = None
    """The classes in the order of their labels; by default the labels sorted."""
    copies: str | None = None
    """The folder for copies of remote shards; by default cnnrun's folder under the user's cache folder."""

    def read(self, *, has_disjoint_classes: bool = False) -> SourceContents:
        samples = {
            split: self._list_samples(urls) for split in ("train", "val", "test") if (urls := getattr(self, split))
        }
        all_labels = [label for _, labels in samples.values() for label in labels]
        classes = self.classes or sort_class_names(all_labels if has_disjoint_classes else samples["train"][1])
        if not self.classes:
            check_problems(
                f"{members[i]}: its label {escape(label)!r} {problem}"
                for members, labels in samples.values()
                for i, label in enumerate(labels)
                if (problem := missing_value_problem(label))
            )
        if self._are_class_indices(all_labels):
            if not self.classes:  # a number that no training sample has is a class too
                classes = [str(i) for i in range(1 + max(map(int, all_labels)))]
            label_index = {label: int(label) for label in set(all_labels) if int(label) < len(classes)}
        else:
            label_index = {name: i for i, name in enumerate(classes)}
        check_problems(
            f"{members[i]}: its label {escape(label)!r} is not a class"
            for members, labels in samples.values()
            for i, label in enumerate(labels)
            if label not in label_index
        )
        splits = {
            split: Split(members, {"labels": torch.tensor([label_index[label] for label in labels])}, "shards")
            for split, (members, labels) in samples.items()
        }
        return SourceContents(tuple(classes), splits)

    def _are_class_indices(self, labels: list[str]) -> bool:
        """Return whether all labels are whole numbers and, unless `classes` names them, few numbers are left out."""
        if not all(re.fullmatch("[0-9]{1,9}", label) for label in labels):
            return False
        return bool(self.classes) or max(map(int, labels)) < 2 * len(set(labels)) + 10

    def _list_samples(self, urls: ShardAddresses) -> tuple[Members, list[str]]:
        """The images in these shards, and their labels as they are written. Raises DataError if there are none."""
        shards = [self._local_path(url) for url in _expand_braces([urls] if isinstance(urls, str) else urls)]
        locations: list[tuple[int, str, int, int]] = []
        labels: list[str] = []
        for shard_index, shard in enumerate(shards):
            for name, offset, size, label in _index_shard(shard, self.label.lower()):
                locations.append((shard_index, name, offset, size))
                labels.append(label)
        if not locations:
            raise DataError(f"{shards[0]}: no sample with an image and a .{self.label} member")
        return Members(shards, locations), labels

    def _local_path(self, url: str) -> Path:
        """The path of a shard on this machine; a remote shard is fetched if it is not here yet.

        Raises DataError if the command line does not allow fetching, StorageError if there is no folder for copies.
        """
        is_command = url.startswith("pipe:")
        if not is_command and "://" not in url:
            return Path(url)
        if not is_command and not _URL.fullmatch(url):
            raise DataError(f"{escape(url)}: not a URL that shards can be fetched from")
        home = cache.user_cache_folder()
        if self.copies is None and home is None:
            raise StorageError("shards: there is no cache folder (HOME is not set); give data.source.shards.copies")
        folder = Path(self.copies or f"{home}/{cache.SHARD_FOLDER}")
        path = folder / f"{sha256(url.encode()).hexdigest()[:32]}.tar"
        check_ownership(path, "give data.source.shards.copies a folder of your own")
        if not path.exists():
            _check_permission(url, is_command)
            say(f"fetching {escape(url)} into {path}")
            _fetch(url, path)
        return path


def _check_permission(url: str, is_command: bool) -> None:
    """Raise DataError unless `--fetch` or CNNRUN_FETCH=1 lets configs fetch URLs and run commands."""
    if is_command and os.environ.get(_PIPES_VARIABLE) == "1":
        say(f"{_PIPES_VARIABLE} is deprecated: use `cnnrun --fetch`, or {_FETCH_VARIABLE}=1")
    elif os.environ.get(_FETCH_VARIABLE) != "1":
        action = "run a command" if is_command else "fetch from the network"
        raise DataError(f"{escape(url)}: a config may not {action}; `cnnrun --fetch COMMAND ...` allows it")


def _expand_braces(urls: list[str]) -> list[str]:
    """The URLs that these stand for, with {0..9} written out. Raises DataError for 100,000 or more."""
    expanded = []
    for url in urls:
        if url.startswith("pipe:") or "{" not in url:
            expanded.append(url)
            continue
        require_package("braceexpand", "webdataset", "a list of shards in braces", DataError)
        from braceexpand import braceexpand

        try:
            expanded += islice(braceexpand(url), _MAX_SHARDS)
        except ValueError:
            raise DataError(f"{escape(url)}: a brace is not closed") from None
    if len(expanded) >= _MAX_SHARDS:
        raise DataError(f"{escape(urls[0])}: {_MAX_SHARDS:,} shards or more; give fewer")
    return expanded


def _fetch(url: str, path: Path) -> None:
    """Copy a remote shard to `path`, whole or not at all. Raises DataError if it cannot be fetched or is not a tar."""
    with storage_errors(path.parent, 0):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder, temporary = Folder(path.parent), f"{path.stem}.{os.getpid()}.tmp"
    partial = path.with_name(temporary)
    try:
        with storage_errors(path, 0), folder.open_for_append(temporary) as file, _open_url(url) as stream:
            while chunk := _read_chunk(url, stream):
                file.write(chunk)
        if not tarfile.is_tarfile(partial):
            raise DataError(f"{escape(url)}: what was fetched is not a tar")
        with storage_errors(path, 0):
            partial.chmod(partial.stat().st_mode & 0o755)  # a file that others can write would be refused
            folder.rename(temporary, path.name)
    finally:
        if folder.has(temporary):
            folder.remove(temporary)


@contextmanager
def _open_url(url: str) -> Iterator[Any]:
    """Open a URL or a command for reading. Python itself reads HTTP; webdataset runs other programs for the rest."""
    try:
        if url.startswith(("http://", "https://")):
            stream = urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS)  # noqa: S310
        else:
            require_package("webdataset", "webdataset", "fetching shards other than by HTTP", DataError)
            from webdataset import gopen

            stream = gopen(url)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(f"{escape(url)}: cannot be fetched ({_reason(error)})") from None
    with stream:
        yield stream


def _read_chunk(url: str, stream: Any) -> bytes:
    try:
        chunk: bytes = stream.read(1 << 20)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(f"{escape(url)}: cannot be fetched ({_reason(error)})") from None
    return chunk


def _reason(error: Exception) -> str:
    return escape(" ".join(str(error).split())[:200] or type(error).__name__)


class _BoundedReader(io.RawIOBase):
    """A file that never reads beyond its end or more than 16 MiB at once, whatever size a tar header claims."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        remaining = max(0, self._size - self._file.tell())
        count = remaining if size < 0 else min(size, remaining)
        if count > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {count:,} bytes")
        return self._file.read(count)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _index_shard(shard: Path, label: str) -> Iterator[tuple[str, int, int, str]]:
    """Yield name, offset and size of each image in a shard, and its label as it is written.

    `label` is the extension of the member that holds the label. Raises DataError if the shard cannot be used.
    """
    if not shard.is_file():
        raise DataError(f"{escape(str(shard))}: {'not a regular file' if shard.exists() else 'no such file'}")
    size = shard.stat().st_size
    try:
        with (
            open_file(shard, DataError) as file,
            tarfile.open(fileobj=_BoundedReader(file, size), mode="r:") as archive,
        ):
            sample: dict[str, tarfile.TarInfo] = {}
            key = None
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                base, _, extension = member.name.rpartition("/")[2].partition(".")
                in_clutter = any(map(is_hidden_or_system_name, PurePosixPath(member.name).parts))
                if not member.isreg() or not base or not extension or in_clutter:
                    continue
                if member.issparse() or member.offset_data + member.size > size:
                    problem = (
                        "a sparse file, which is not read"
                        if member.issparse()
                        else f"{member.size:,} bytes, but the shard ends before"
                    )
                    raise DataError(f"{escape(f'{shard}/{member.name}')}: {problem}")
                member_key = member.name[: len(member.name) - len(extension) - 1]
                if member_key != key:
                    yield from _index_sample(shard, file, sample, label)
                    key, sample = member_key, {}
                if extension.lower() in sample:
                    raise DataError(f"{shard}/{escape(member.name)}: is in its sample twice")
                sample[extension.lower()] = member  # in lower case, as in webdataset
            yield from _index_sample(shard, file, sample, label)
    except RecursionError:  # tarfile calls itself for each extended header in a row
        raise DataError(f"{escape(str(shard))}: hundreds of extended headers in a row; create the tar again") from None
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{escape(str(shard))}: not a plain tar ({error}); a compressed one must be unpacked") from None


def _index_sample(
    shard: Path, file: IO[bytes], sample: dict[str, tarfile.TarInfo], label: str
) -> Iterator[tuple[str, int, int, str]]:
    """Yield the entry of a sample; nothing if it has neither image nor label. Raises DataError if it lacks one."""
    names = choose_images(f"image.{extension}" for extension in sample if "." not in extension)
    images = [sample[name.removeprefix("image.")] for name in names]
    if not images and label in sample:
        raise DataError(f"{escape(f'{shard}/{sample[label].name}')}: its sample has no image ({SUFFIX_LIST})")
    if not images:
        return
    name = escape(f"{shard}/{images[0].name}")
    if len(images) > 1:
        raise DataError(f"{name}: its sample has {len(images)} images; expected one")
    if label not in sample:
        raise DataError(f"{name}: its sample has no .{label} member")
    if sample[label].size > _MAX_LABEL_BYTES:
        raise DataError(f"{name}: its label has {sample[label].size:,} bytes; at most {_MAX_LABEL_BYTES:,}")
    file.seek(sample[label].offset_data)
    try:
        text = clean_cell(file.read(sample[label].size).decode())
    except UnicodeDecodeError:
        raise DataError(f"{name}: its label is not text") from None
    yield images[0].name, images[0].offset_data, images[0].size, text
