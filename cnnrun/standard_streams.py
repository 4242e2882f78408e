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

from cnnrun.errors import StorageError, UserError


class ReaderLeft(UserError):
    """Whoever read standard output has seen enough, as `head` has: the command ends, and nothing is wrong."""

    exit_code = 0


class _Output(io.RawIOBase):
    """The bytes of standard output, whose failures are ReaderLeft or StorageError."""

    def __init__(self, stream: Any) -> None:
        self._buffer = stream.buffer

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
            return int(self._buffer.write(data))

    def flush(self) -> None:
        with self._failures():
            self._buffer.flush()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._discard()
            raise ReaderLeft from None
        except OSError as error:
            self._discard()
            raise StorageError(f"standard output: cannot be written ({error.strerror})") from None

    def _discard(self) -> None:
        """Send what is left in the buffer nowhere, or the interpreter would fail once more as it ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def _standard_output(stream: Any) -> Any:
    """Standard output with failures of ours, and escapes for what it cannot encode; a stream without bytes as it is."""
    if not hasattr(stream, "buffer"):
        return stream
    return io.TextIOWrapper(_Output(stream), stream.encoding, "backslashreplace", write_through=True)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Tell failures of standard output apart, write closed streams to nowhere, print libraries' warnings as ours."""
    output, error = sys.stdout, sys.stderr
    with Path(os.devnull).open("w") as nowhere, warnings.catch_warnings():
        sys.stdout, sys.stderr = _standard_output(output or nowhere), error or nowhere
        warnings.showwarning = _say_warning
        try:
            yield
            sys.stdout.flush()
        except SystemExit:
            sys.stdout.flush()
            raise
        finally:
            sys.stdout, sys.stderr = output, error


def _say_warning(message: Warning | str, category: type[Warning], *place: object, **rest: object) -> None:
    from cnnrun.progress import say  # rich, which --help does not need

    say(f"warning: {' '.join(str(message).split())}")
