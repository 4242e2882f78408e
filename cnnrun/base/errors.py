"""What can go wrong by the user's hand or the machine's, and the exit code of each.

    UserError
    |- ConfigError        2   the YAML file or the command line
    |- CheckpointError    3   a checkpoint or model file
    |- NonFiniteError     4   NaN or infinity while training
    |- StorageError       5   a full, read-only or failing disk; a run in use
    |- ResourceError      6   memory, device
    |  |- Lost            6   a rank or a reading thread that no longer answers
    |  `- Elsewhere       6   another rank failed and says so itself
    |- ParityError        7   an export that is not the model
    |- DataError          8   pictures, labels, splits
    |  `- Unreadable      8   a file that the system does not give now
    |- SelftestError      9   a check of `cnnrun selftest` that failed
    `- Interrupted  128 + n   SIGINT 130, SIGTERM 143, SIGUSR1 138: saved, then left

Anything else that reaches the command line is a bug of ours: exit 1, with a traceback.
"""

from __future__ import annotations

import re
import unicodedata

_FORMULA = ("=", "+", "-", "@")  # what spreadsheets take for the beginning of a formula
_LONGEST = 1000  # characters of a line of a message
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class UserError(Exception):
    """One line a mistake; the command line prints the lines and leaves with `exit_code`, without a traceback."""

    exit_code = 2

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class ConfigError(UserError):
    exit_code = 2


class CheckpointError(UserError):
    exit_code = 3


class NonFiniteError(UserError):
    exit_code = 4


class StorageError(UserError):
    exit_code = 5


class ResourceError(UserError):
    exit_code = 6


class NoAnswerError(ResourceError):
    """A rank or a thread that no longer answers: the process leaves without waiting for it."""


class OtherRankError(ResourceError):
    """Another rank failed, and says so itself."""


class ParityError(UserError):
    exit_code = 7


class DataError(UserError):
    exit_code = 8


class UnreadableFileError(DataError):
    """A file that the system does not give now, and may give later: never remembered as a bad one."""


class SelftestError(UserError):
    exit_code = 9


class InterruptionError(UserError):
    """A signal asked to stop. Exit code as the shell expects it: 128 + signal number."""

    def __init__(self, signal_number: int, *lines: str) -> None:
        super().__init__(*lines)
        self.exit_code = 128 + signal_number


def is_encodable(text: str) -> bool:
    """Return whether `text` can be written as UTF-8. The name of a file that is no UTF-8, as Python has it, cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def escape_cell(text: str) -> str:
    """`text` as a cell of a table that spreadsheets open: `escape`, and never the beginning of a formula."""
    shown = escape(text)
    return f"'{shown}" if shown.startswith(_FORMULA) and not _NUMBER.fullmatch(shown) else shown


def unescape_cell(cell: str) -> str:
    """The text that `escape_cell` made a cell of, but for control characters."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell


def shorten(line: str) -> str:
    """A line for people: of one that is very long, as what files hold may be, the beginning."""
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}... ({len(line) - _LONGEST:,} more characters)"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, printable; the name of its type where it says nothing."""
    text = str(error).strip()
    return escape(text.splitlines()[0] if text else type(error).__name__)


def escape(text: str) -> str:
    """`text` with control characters and direction marks escaped, so that a file's name cannot drive the terminal."""
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _is_harmless(letter: str) -> bool:
    """Return whether a letter is visible, a space of any script, or a joiner, as in emoji and Persian."""
    return letter.isprintable() or letter in "\u200c\u200d" or unicodedata.category(letter) == "Zs"
