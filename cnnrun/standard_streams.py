"""Standard output and error as a command uses them: what fails there is told apart from every other error."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cnnrun.errors import StorageError, UserError
from cnnrun.progress import say


class ReaderLeft(UserError):
    """Whoever read standard output has seen enough, as `head` has: the command ends, and nothing is wrong."""

    exit_code = 0


class StandardOutput:
    """A text stream whose failures are ReaderLeft or StorageError. What it cannot encode is escaped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with self._failures():
            return int(self._stream.write(text))

    def flush(self) -> None:
        with self._failures():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

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
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Use StandardOutput, write closed streams to nowhere, and print the warnings of libraries as lines of ours."""
    output, error = sys.stdout, sys.stderr
    with Path(os.devnull).open("w") as nowhere, warnings.catch_warnings():
        sys.stdout, sys.stderr = StandardOutput(output or nowhere), error or nowhere
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
    say(f"warning: {' '.join(str(message).split())}")
