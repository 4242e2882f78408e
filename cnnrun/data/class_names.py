"""Names of classes: as sources write them, what cannot be one, and those that look alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.error_lines import join_names, refuse_problems
from cnnrun.base.errors import DataError, escape, is_encodable

# What pandas and spreadsheets write where there is no value: a label of this kind is none.
_MISSING = re.compile(
    r"-?nan|-?NaN|null|NULL|None|NA|N/A|n/a|<NA>|#N/A( N/A)?|#NA|NaT|nil|\(null\)|\(blank\)|-?1\.#(IND|QNAN)|"
    r"#(NULL|REF|VALUE|NUM|CALC|SPILL)!|#DIV/0!|#NAME\?|#ERROR!|Err:\d{3}"
)
_INVISIBLE = {"Cc", "Cf", "Zl", "Zp"}  # Unicode's categories of what has no shape of its own
_QUOTES = "\"'`\u2018\u2019\u201c\u201d"


def clean_cell(written: str) -> str:
    """A cell of a table, or a label from a file, without the blanks and byte order marks around it."""
    return written.strip().strip("\ufeff").strip()


def sorted_classes(labels: Iterable[str]) -> list[str]:
    """The distinct labels sorted: as numbers where all are whole numbers, else as torchvision sorts folders."""
    names = sorted(set(labels))
    return sorted(names, key=int) if all(re.fullmatch(r"-?\d{1,18}", name) for name in names) else names


def check_class_names(names: Sequence[str], where: str, *, are_declared: bool) -> None:
    """Raises DataError for names that no class can have.

    Names stand in configs, figures, reports and exported files, and whatever writes one that is no text fails. A word
    for a missing value is a class only where the classes are declared one by one.
    """
    refuse_problems(
        f"{where}: class '{escape(name)}': {problem}"
        for name in names
        if (problem := _problem(name) or (None if are_declared else missing_value_problem(name)))
    )


def missing_value_problem(label: str) -> str | None:
    """The reason that a label stands for no label, or None."""
    if not _MISSING.fullmatch(label):
        return None
    return "stands for a missing value; mend or remove what has it, or list it in `classes` if it is a class"


def _problem(name: str) -> str | None:
    if not is_encodable(name):
        return "its name is not valid UTF-8; rename its folder or label"
    if not any(unicodedata.category(letter) not in _INVISIBLE and not letter.isspace() for letter in name):
        return "its name has no visible letter; rename its folder or label"
    return None


def numbered_classes(labels_N: NDArray[np.integer[Any]], where: str, setting: str) -> list[str]:
    """Names for the labels 0, 1, ... of arrays. Raises DataError where a stray number would make many classes."""
    used, counts = np.unique(labels_N, return_counts=True)
    highest = int(used[-1])
    if highest >= _most_numbers(len(used)):
        rarest = int(used[np.flatnonzero(counts == counts.min())[-1]])
        shown = join_names([f"{int(number)}" for number in used])
        raise DataError(
            f"{where}: has labels up to {highest:,}, but only {len(used)} different ones ({shown}); is {rarest}, "
            f"which stands there {int(counts.min()):,} time(s), a label? If so, "
            f"give all {highest + 1:,} classes a name in {setting}"
        )
    return [str(number) for number in range(highest + 1)]


def _most_numbers(used: int) -> int:
    """How many classes there may be where so many different labels are used: some may have no picture yet."""
    return 2 * used + 10


def questionable_numbers(names: Sequence[str]) -> list[str]:
    """Names that are numbers far from the others', or below 0: what some tools write where there is no label."""
    if not names or not all(re.fullmatch(r"-?\d{1,18}", name) for name in names):
        return []
    limit = _most_numbers(len(names))
    return [name for name in names if not 0 <= int(name) < limit]


def alike_names(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ in case, blanks, quotes, leading zeros or invisible letters alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_folded(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _folded(name: str) -> str:
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    text = "".join(letter for letter in text if unicodedata.category(letter) not in _INVISIBLE).strip().strip(_QUOTES)
    if number := re.fullmatch(r"([+-]?)0*(\d+)(\.0*)?", text):
        return "".join(number.group(1, 2))
    return re.sub(r"[\s_-]+", " ", text).strip()


def quote_names(names: Sequence[str]) -> list[str]:
    """The names as a message shows them: escaped where they would look the same."""
    shown = [escape(unicodedata.normalize("NFC", name)) for name in names]
    if len(set(shown)) == len(shown) and not any(map(_has_invisible, names)):
        return [f"'{escape(name)}'" for name in names]
    return [ascii(name) for name in names]


def _has_invisible(name: str) -> bool:
    odd = (unicodedata.category(letter) in _INVISIBLE or (letter.isspace() and letter != " ") for letter in name)
    return any(odd) or name != name.strip()


def float32_problem(name: str, values: Sequence[float | None] | NDArray[Any]) -> str | None:
    """What is wrong with different numbers that are all one in float32, or None. What is nearly so the task says."""
    exact = np.asarray(values, np.float64)
    spread = float(np.ptp(exact))
    if spread == 0 or np.ptp(exact.astype(np.float32)) > 0:
        return None
    text = f"{escape(name)} varies by {spread:.3g} around {exact.mean():.6g}"
    return f"{text}, too finely for float32; take the mean off it"
