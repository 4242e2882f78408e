"""Errors that a user or a machine can cause, and their exit codes.

    UserError
    |- ConfigError        2   the YAML file or the command line
    |- CheckpointError    3   a checkpoint or model file
    |  `- DownloadError   3   a model file that cannot be fetched
    |- NonFiniteError     4   NaN or infinity while training
    |- StorageError       5   a full, read-only or failing disk; a run in use
    |- ResourceError      6   memory, device
    |  |- NoAnswerError   6   a rank or a reading thread that no longer answers
    |  `- OtherRankError  6   another rank failed and reports its own error
    |- ParityError        7   an exported file whose results differ from the network's
    |- DataError          8   images, labels, splits
    |  `- UnreadableFileError
    |                     8   a file that the system cannot read now
    |- SelftestError      9   a failed check of `cnnrun selftest`
    `- InterruptionError  128 + n   SIGINT 130, SIGTERM 143, SIGUSR1 138: stopped after saving

Any other error that reaches the command line is a bug of cnnrun: exit code 1, with a traceback.
"""

from __future__ import annotations

import re
import unicodedata

_FORMULA_STARTS = ("=", "+", "-", "@")  # a spreadsheet evaluates a cell that begins with one of these
_MAX_LINE_CHARACTERS = 1000
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class UserError(Exception):
    """One line per mistake. The command line prints the lines and exits with `exit_code`, without a traceback."""

    exit_code = 2

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class ConfigError(UserError):
    exit_code = 2


class CheckpointError(UserError):
    exit_code = 3


class DownloadError(CheckpointError):
    """A model file that cannot be fetched, or that is not the one that was asked for."""


class NonFiniteError(UserError):
    exit_code = 4


class StorageError(UserError):
    exit_code = 5


class ResourceError(UserError):
    exit_code = 6


class NoAnswerError(ResourceError):
    """A rank or a thread that no longer answers: the process exits without waiting for it."""


class OtherRankError(ResourceError):
    """Another rank failed and reports its own error, so this one stays silent."""


class ParityError(UserError):
    exit_code = 7


class DataError(UserError):
    exit_code = 8


class UnreadableFileError(DataError):
    """A file that the system cannot read now but may read later, so it is never recorded as damaged."""


class SelftestError(UserError):
    exit_code = 9


class InterruptionError(UserError):
    """A signal asked the process to stop. The exit code is 128 + the signal's number, as shells expect."""

    def __init__(self, signal_number: int, *lines: str) -> None:
        super().__init__(*lines)
        self.exit_code = 128 + signal_number


def is_encodable(text: str) -> bool:
    """Return whether `text` can be written as UTF-8. Python's form of a file name that is not UTF-8 cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def escape_cell(text: str) -> str:
    """Escape `text` for a table cell that a spreadsheet may open, so that it is never read as a formula."""
    shown = escape(text)
    return f"'{shown}" if shown.startswith(_FORMULA_STARTS) and not _NUMBER.fullmatch(shown) else shown


def unescape_cell(cell: str) -> str:
    """Undo `escape_cell`, except for escaped control characters."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA_STARTS) else cell


def shorten(line: str) -> str:
    """Cut a very long line, such as one that quotes a file, after its first 1,000 characters."""
    left_out = len(line) - _MAX_LINE_CHARACTERS
    return line if left_out <= 0 else f"{line[:_MAX_LINE_CHARACTERS]}... ({left_out:,} more characters)"


def first_line(error: BaseException) -> str:
    """First line of an error's message, escaped; the name of its type if the message is empty."""
    text = str(error).strip()
    return escape(text.splitlines()[0] if text else type(error).__name__)


def escape(text: str) -> str:
    """Escape control characters and direction marks, so that a file's name cannot control the terminal."""
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _is_harmless(character: str) -> bool:
    """Return whether a character is visible, a space of any script, or a joiner as in emoji and Persian."""
    return character.isprintable() or character in "\u200c\u200d" or unicodedata.category(character) == "Zs"
