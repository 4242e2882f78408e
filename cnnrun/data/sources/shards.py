"""Tar shards in WebDataset's layout: a sample is consecutive members that share a name up to the first dot.

Local shards are read where they lie: every picture has its place in its tar, so that any sample can be asked for, and
the order of an epoch is a function of (seed, epoch) here as everywhere, for any number of workers and ranks and after a
resume. Shards from elsewhere are fetched once, through the webdataset library, and are then local.
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
from cnnrun.base.error_lines import refuse_problems
from cnnrun.base.errors import DataError, StorageError, escape
from cnnrun.base.extras import require_package
from cnnrun.base.file_sequences import Members, is_clutter
from cnnrun.base.ownership import check_ownership
from cnnrun.base.progress import say
from cnnrun.contracts.source import ClassNames, SourceContents, SourceSpec, Split
from cnnrun.data import cache
from cnnrun.data.class_names import clean_cell, missing_value_problem, sorted_classes
from cnnrun.data.image_files import SUFFIX_LIST, SUFFIXES

FETCH_VARIABLE = "CNNRUN_FETCH"  # 1 in the environment: configs may fetch URLs and run commands; `--fetch` sets it
_PIPES = "CNNRUN_PIPES"  # the old name, for commands alone
_URL = re.compile(r"(https?|s3|gs|ftps?|sftp|hf|ais)://[A-Za-z0-9._~:/?#@!&+,;=%-]+")
_MAX_LABEL_BYTES, _MOST_SHARDS = 4096, 100_000
_MOST_HEADER_BYTES = 16 << 20  # of a tar's own tables, which tarfile reads in one piece
_TIMEOUT_SECONDS = 30

Urls = str | Annotated[list[str], Field(min_length=1)]


class Shards(SourceSpec):
    """`train-{0000..0009}.tar`: files; with `cnnrun --fetch` also URLs, and `pipe:` with a command."""

    kind = "shards"
    main = "train"

    train: Urls
    """One or several, with {0000..0009} for a run of numbers."""
    val: Urls | None = None
    test: Urls | None = None
    label: str = "cls"
    """The extension of the member that holds the label: a whole number or a name."""
    classes: ClassNames | None = None
    """The classes in the order wanted; by default the labels sorted."""
    copies: str | None = None
    """Where shards from elsewhere are kept; by default cnnrun's folder under the user's cache folder."""

    def read(self, apart: bool = False) -> SourceContents:
        found = {name: self._samples(urls) for name in ("train", "val", "test") if (urls := getattr(self, name))}
        written = [label for _, labels in found.values() for label in labels]
        classes = self.classes or sorted_classes(written if apart else found["train"][1])
        if not self.classes:
            refuse_problems(
                f"{members[i]}: its label {escape(label)!r} {problem}"
                for members, labels in found.values()
                for i, label in enumerate(labels)
                if (problem := missing_value_problem(label))
            )
        highest = max(map(int, written)) if all(re.fullmatch("[0-9]{1,9}", label) for label in written) else None
        if not self.classes and highest is not None and highest < 2 * len(set(written)) + 10:
            # Whole numbers from 0 up are the classes' own: one that no training sample has is a class all the same.
            classes = [str(i) for i in range(1 + highest)]
        number = {name: i for i, name in enumerate(classes)}
        if self.classes and highest is not None:
            number = {str(i): i for i in range(len(classes))}
        refuse_problems(
            [
                f"{members[i]}: its label {escape(label)!r} is not a class"
                for members, labels in found.values()
                for i, label in enumerate(labels)
                if label not in number
            ]
        )
        return SourceContents(
            tuple(classes),
            {
                name: Split(members, {"labels": torch.tensor([number[label] for label in labels])}, "shards")
                for name, (members, labels) in found.items()
            },
        )

    def _samples(self, urls: Urls) -> tuple[Members, list[str]]:
        """The pictures of those shards and the label of each, as it is written."""
        shards = [self._local(url) for url in _expanded([urls] if isinstance(urls, str) else urls)]
        places: list[tuple[int, str, int, int]] = []
        labels: list[str] = []
        for number, shard in enumerate(shards):
            for name, offset, size, label in _indexed(shard, self.label.lower()):
                places.append((number, name, offset, size))
                labels.append(label)
        if not places:
            raise DataError(f"{shards[0]}: no sample with a picture and a .{self.label} member")
        return Members(shards, places), labels

    def _local(self, url: str) -> Path:
        """The shard as a file of this machine, fetched where it is not one and the command line allows that."""
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
            what = "run a command" if is_command else "fetch from the network"
            if not is_fetch_allowed(is_command):
                raise DataError(f"{escape(url)}: a config may not {what}; `cnnrun --fetch COMMAND ...` allows it")
            say(f"fetching {escape(url)} into {path}")
            _fetch(url, path)
        return path


def is_fetch_allowed(is_command: bool) -> bool:
    """Return whether the command line lets configs fetch URLs and run commands: `--fetch` sets this variable."""
    if is_command and os.environ.get(_PIPES) == "1":
        say(f"{_PIPES} is deprecated: use `cnnrun --fetch`, or {FETCH_VARIABLE}=1")
        return True
    return os.environ.get(FETCH_VARIABLE) == "1"


def _expanded(urls: list[str]) -> list[str]:
    """Each URL with its {0..9} written out."""
    made = []
    for url in urls:
        if url.startswith("pipe:") or "{" not in url:
            made.append(url)
            continue
        require_package("braceexpand", "webdataset", "a list of shards in braces", DataError)
        from braceexpand import braceexpand

        try:
            made += islice(braceexpand(url), _MOST_SHARDS)
        except ValueError:
            raise DataError(f"{escape(url)}: a brace is not closed") from None
    if len(made) >= _MOST_SHARDS:
        raise DataError(f"{escape(urls[0])}: {_MOST_SHARDS:,} shards or more")
    return made


def _fetch(url: str, path: Path) -> None:
    """Copy a shard from elsewhere, whole or not at all."""
    with storage_errors(path.parent, 0):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder, temporary = Folder(path.parent), f"{path.stem}.{os.getpid()}.tmp"
    partial = path.with_name(temporary)
    try:
        with storage_errors(path, 0), folder.open_for_append(temporary) as file, _opened_url(url) as stream:
            while part := _next_part(url, stream):
                file.write(part)
        if not tarfile.is_tarfile(partial):
            raise DataError(f"{escape(url)}: what came is not a tar")
        with storage_errors(path, 0):
            partial.chmod(partial.stat().st_mode & 0o755)  # or it would be refused as one that others can write
            folder.rename(temporary, path.name)
    finally:
        if folder.has(temporary):
            folder.remove(temporary)


@contextmanager
def _opened_url(url: str) -> Iterator[Any]:
    """The bytes behind a URL or a command: HTTP by Python itself, all else by webdataset, which runs other programs."""
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


def _next_part(url: str, stream: Any) -> bytes:
    try:
        part: bytes = stream.read(1 << 20)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(f"{escape(url)}: cannot be fetched ({_reason(error)})") from None
    return part


def _reason(error: Exception) -> str:
    return escape(" ".join(str(error).split())[:200] or type(error).__name__)


class _Bounded(io.RawIOBase):
    """A file of which no read asks for more than there is, whatever a header says."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._file.tell())
        wanted = left if size < 0 else min(size, left)
        if wanted > _MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {wanted:,} bytes")
        return self._file.read(wanted)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _indexed(shard: Path, label: str) -> Iterator[tuple[str, int, int, str]]:
    """Name, offset and size of each picture in a shard, and its label as it is written. Raises DataError."""
    if not shard.is_file():
        raise DataError(f"{escape(str(shard))}: {'not a regular file' if shard.exists() else 'no such file'}")
    size = shard.stat().st_size
    try:
        with open_file(shard, DataError) as file, tarfile.open(fileobj=_Bounded(file, size), mode="r:") as archive:
            sample: dict[str, tarfile.TarInfo] = {}
            key = None
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                base, _, extension = member.name.rpartition("/")[2].partition(".")
                clutter = any(map(is_clutter, PurePosixPath(member.name).parts))
                if not member.isreg() or not base or not extension or clutter:
                    continue
                if member.issparse() or member.offset_data + member.size > size:
                    what = "sparse" if member.issparse() else f"{member.size:,} bytes, which the shard has not"
                    raise DataError(f"{escape(f'{shard}/{member.name}')}: {what}")
                now = member.name[: len(member.name) - len(extension) - 1]
                if now != key:
                    yield from _sample(shard, file, sample, label)
                    key, sample = now, {}
                if extension.lower() in sample:
                    raise DataError(f"{shard}/{escape(member.name)}: stands twice in its sample")
                sample[extension.lower()] = member  # as webdataset has it
            yield from _sample(shard, file, sample, label)
    except RecursionError:  # tarfile reads a header that belongs to the next within the reading of that
        raise DataError(f"{escape(str(shard))}: hundreds of extended headers in a row, as no tar has") from None
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{escape(str(shard))}: not a plain tar ({error}); a compressed one must be unpacked") from None


def _sample(
    shard: Path, file: IO[bytes], sample: dict[str, tarfile.TarInfo], label: str
) -> Iterator[tuple[str, int, int, str]]:
    pictures = [member for extension, member in sample.items() if f".{extension}" in SUFFIXES]
    if not pictures and label in sample:
        raise DataError(f"{escape(f'{shard}/{sample[label].name}')}: its sample has no picture ({SUFFIX_LIST})")
    if not pictures:
        return
    name = escape(f"{shard}/{pictures[0].name}")
    if len(pictures) > 1:
        raise DataError(f"{name}: its sample has {len(pictures)} pictures")
    if label not in sample:
        raise DataError(f"{name}: its sample has no .{label} member")
    if sample[label].size > _MAX_LABEL_BYTES:
        raise DataError(f"{name}: its label has {sample[label].size:,} bytes")
    file.seek(sample[label].offset_data)
    try:
        text = clean_cell(file.read(sample[label].size).decode())
    except UnicodeDecodeError:
        raise DataError(f"{name}: its label is not text") from None
    yield pictures[0].name, pictures[0].offset_data, pictures[0].size, text
