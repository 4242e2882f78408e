"""Standard output and error as a command uses them: what fails there is told apart from every other error."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cnnrun.base.errors import StorageError, UserError


class OutputClosedError(UserError):
    """Whoever read standard output has seen enough, as `head` has: the command ends, and nothing is wrong."""

    exit_code = 0


class _Bytes(io.RawIOBase):
    """The bytes of a standard stream. Failures are ReaderLeft or StorageError; those of a `quiet` one are ignored."""

    def __init__(self, stream: Any, quiet: bool) -> None:
        self._buffer, self._quiet = stream.buffer, quiet

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._buffer.fileno())

    def isatty(self) -> bool:
        return bool(self._buffer.isatty())

    def write(self, data: Any) -> int:
        if not len(data):  # which is how click finds out what a stream takes
            return 0
        with self._failures():
            self._buffer.write(data)
        return len(data)

    def flush(self) -> None:
        with self._failures():
            self._buffer.flush()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._discard()
            if self._quiet:
                return
            if isinstance(error, BrokenPipeError):
                raise OutputClosedError from None
            raise StorageError(f"standard output: cannot be written ({error.strerror})") from None

    def _discard(self) -> None:
        """Send what is left in the buffer nowhere, or the interpreter would fail once more as it ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def _safe(stream: Any, *, quiet: bool) -> Any:
    """A standard stream with failures of ours, and escapes for what it cannot encode; one without bytes as it is."""
    if not hasattr(stream, "buffer"):
        return stream
    raw = _Bytes(stream, quiet)
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=quiet, write_through=True)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Tell failures of standard output apart, ignore those of standard error, print libraries' warnings as ours.

    Streams that are closed lead nowhere.
    """
    output, error = sys.stdout, sys.stderr
    with Path(os.devnull).open("w") as nowhere, warnings.catch_warnings():
        sys.stdout, sys.stderr = _safe(output or nowhere, quiet=False), _safe(error or nowhere, quiet=True)
        warnings.showwarning = _say_warning
        try:
            yield
        finally:
            sys.stdout, sys.stderr = output, error


def _say_warning(message: Warning | str, category: type[Warning], *place: object, **rest: object) -> None:
    from cnnrun.base.progress import say  # rich, which --help does not need

    say(f"warning: {' '.join(str(message).split())}")
