"""Downloads that go on where they were cut, and are checked before they get their name."""

from __future__ import annotations

import hashlib
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO

from cnnrun.base.atomic_files import describe_failure, make_folder, storage_errors
from cnnrun.base.errors import DownloadError, StorageError, escape
from cnnrun.base.locks import hold_lock
from cnnrun.base.progress import say

_ATTEMPTS = 3
_PARTIAL, _RANGE_REFUSED = 206, 416  # HTTP status codes
_CHUNK_BYTES = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")

ProgressBar = Callable[[str, int], Any]


class _CutError(Exception):
    """The connection ended before the file did."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server: its address, the first digits of its SHA-256, and the bytes that it has at most."""

    url: str
    digest_prefix: str
    max_bytes: int


def download(file: RemoteFile, path: Path, progress: ProgressBar, timeout: float = 30.0) -> None:
    """Fetch `file` into `path`, unless a file of this SHA-256 is there already.

    What arrived before a cut is kept in `<path>.part`, and the next attempt, now or in another process, asks for the
    rest. Raises DownloadError if the server cannot be reached, refuses, or sends another file, and StorageError.
    """
    name = escape(file.url)
    if not file.url.startswith(("https://", "http://")):
        raise DownloadError(f"{name}: only https and http are fetched")
    make_folder(path.parent)
    part, lock = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.lock")
    with storage_errors(part, file.max_bytes), hold_lock(lock, lambda: say(f"{path}: another process is fetching it")):
        if path.exists() and has_digest(path, file.digest_prefix):
            return
        if not (part.exists() and has_digest(part, file.digest_prefix)):
            _fetch(file, part, progress, timeout)
        if not has_digest(part, file.digest_prefix):
            digests = f"its SHA-256 begins with {file_sha256(part)[:16]}, not with {file.digest_prefix}"
            part.unlink()
            raise DownloadError(f"{name}: not the published file ({digests}); what was fetched is removed")
        part.replace(path)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_digest(path: Path, digest_prefix: str) -> bool:
    """Return whether the file's SHA-256 begins with `digest_prefix`."""
    return file_sha256(path).startswith(digest_prefix)


def _fetch(file: RemoteFile, part: Path, progress: ProgressBar, timeout: float) -> None:
    """Fetch what `part` lacks, in up to three attempts."""
    name = escape(file.url)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _fetch_rest(file, part, progress, timeout)
            return
        except _CutError as error:
            if attempt == _ATTEMPTS:
                raise DownloadError(f"{name}: {error}; the same command goes on from there") from None
            say(f"{error}; trying again")
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != _RANGE_REFUSED or not part.exists():
                reason = f"{error.code} {escape(str(error.reason))}"
                raise DownloadError(f"{name}: the server refused ({reason})") from None
            part.unlink()  # it is as long as the file, or longer: start again
        except (urllib.error.URLError, ValueError) as error:
            raise DownloadError(f"{name}: cannot be reached ({_reason(error)})") from None
    raise DownloadError(f"{name}: the server sends no part of it")


def _reason(error: Exception) -> str:
    """The reason of a URLError, which holds another error, in a few words."""
    reason = getattr(error, "reason", error)
    return escape(getattr(reason, "strerror", None) or str(reason))


def _fetch_rest(file: RemoteFile, part: Path, progress: ProgressBar, timeout: float) -> None:
    """Ask for the bytes after those in `part` and append them. Raises _CutError if the connection ends early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310
    received = have
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:  # noqa: S310
            start, total = _parse_answer(response, have)
            limit = file.max_bytes if total is None else min(total, file.max_bytes)
            with part.open("r+b" if start else "wb") as out, progress("downloading", limit) as advance:
                out.seek(start)
                advance(start)
                received = start
                while received <= limit and (chunk := response.read1(_CHUNK_BYTES)):
                    _write(out, chunk)
                    received += len(chunk)
                    advance(len(chunk))
    except (TimeoutError, ConnectionError, HTTPException, ssl.SSLError) as error:
        raise _CutError(f"the connection ended after {received / 1e6:.1f} MB ({_reason(error)})") from None
    if received > limit:
        part.unlink()
        raise DownloadError(f"{escape(file.url)}: more than the {limit / 1e6:.1f} MB of the published file; removed")
    if total is not None and received < total:
        raise _CutError(f"the connection ended after {received / 1e6:.1f} of {total / 1e6:.1f} MB")


def _parse_answer(response: Any, have: int) -> tuple[int, int | None]:
    """The position that the answer begins at, and the file's size in bytes, None if the server does not say it."""
    if response.status == _PARTIAL:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match and int(match[1]) == have:
            return have, int(match[2])
        raise DownloadError(f"{escape(response.url)}: the server sends another part than it was asked for")
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _write(out: BinaryIO, chunk: bytes) -> None:
    try:
        out.write(chunk)
    except OSError as error:  # a disk's error, not a connection's, which would be tried again
        raise StorageError(describe_failure(Path(out.name), len(chunk), error)) from None
