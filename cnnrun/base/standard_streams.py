"""Standard output and error whose failures raise errors of their own, distinct from every other OSError."""

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
    """The reader of standard output, such as `head`, closed it: the command ends with exit code 0."""

    exit_code = 0


class _CheckedBuffer(io.RawIOBase):
    """The bytes of a standard stream. A failure raises OutputClosedError or StorageError, or is ignored."""

    def __init__(self, stream: Any, ignore_errors: bool) -> None:
        self._buffer, self._ignore_errors = stream.buffer, ignore_errors

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._buffer.fileno())

    def isatty(self) -> bool:
        return bool(self._buffer.isatty())

    def write(self, data: Any) -> int:
        if not len(data):  # click writes nothing to find out whether a stream takes bytes
            return 0
        with self._convert_errors():
            self._buffer.write(data)
        return len(data)

    def flush(self) -> None:
        with self._convert_errors():
            self._buffer.flush()

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._discard_buffer()
            if self._ignore_errors:
                return
            if isinstance(error, BrokenPipeError):
                raise OutputClosedError from None
            raise StorageError(f"standard output: cannot be written ({error.strerror})") from None

    def _discard_buffer(self) -> None:
        """Redirect the stream to the null device, or flushing the buffer at exit would fail again."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


def _wrap_stream(stream: Any, *, is_stderr: bool) -> Any:
    """Wrap a standard stream so that it checks errors and escapes what it cannot encode.

    A stream without a byte buffer, such as a test's, is returned unchanged.
    """
    if not hasattr(stream, "buffer"):
        return stream
    raw = _CheckedBuffer(stream, ignore_errors=is_stderr)
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=is_stderr, write_through=True)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Check writes to standard output, ignore failures of standard error, and print warnings as single lines.

    What is written to a closed stream is discarded.
    """
    output, error = sys.stdout, sys.stderr
    with Path(os.devnull).open("w") as null, warnings.catch_warnings():
        sys.stdout = _wrap_stream(output or null, is_stderr=False)
        sys.stderr = _wrap_stream(error or null, is_stderr=True)
        warnings.showwarning = _say_warning
        try:
            yield
        finally:
            sys.stdout, sys.stderr = output, error


def _say_warning(message: Warning | str, category: type[Warning], *place: object, **rest: object) -> None:
    from cnnrun.base.progress import say  # here, because it imports rich, which --help does not need

    say(f"warning: {' '.join(str(message).split())}")
