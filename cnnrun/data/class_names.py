"""Class names: how sources write them, which names are refused, and which ones are similar."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.counts import format_count
from cnnrun.base.error_lines import check_problems, join_names
from cnnrun.base.errors import DataError, escape, is_encodable

# What pandas and spreadsheets write for a missing value: such a label means that there is no label.
_MISSING = re.compile(
    r"-?nan|-?NaN|null|NULL|None|NA|N/A|n/a|<NA>|#N/A( N/A)?|#NA|NaT|nil|\(null\)|\(blank\)|-?1\.#(IND|QNAN)|"
    r"#(NULL|REF|VALUE|NUM|CALC|SPILL)!|#DIV/0!|#NAME\?|#ERROR!|Err:\d{3}"
)
_INVISIBLE = {"Cc", "Cf", "Zl", "Zp"}  # Unicode categories of invisible characters
_QUOTES = "\"'`\u2018\u2019\u201c\u201d"


def clean_cell(text: str) -> str:
    """Strip blanks and byte order marks from a table's cell or a label file's text."""
    return text.strip().strip("\ufeff").strip()


def sort_class_names(labels: Iterable[str]) -> list[str]:
    """Sort the distinct labels: as numbers if all are whole numbers, else as torchvision sorts folders."""
    names = sorted(set(labels))
    return sorted(names, key=int) if all(re.fullmatch(r"-?\d{1,18}", name) for name in names) else names


def check_class_names(names: Sequence[str], origin: str, *, are_declared: bool) -> None:
    """Raise DataError for names that no class can have.

    Names are written to configs, figures, reports and exported files, which fails for names that are not valid text.
    A word for a missing value, such as NaN, is refused unless the config declares the classes (`are_declared`).
    """
    check_problems(
        f"{origin}: class '{escape(name)}': {problem}"
        for name in names
        if (problem := _unusable_name_problem(name) or (None if are_declared else missing_value_problem(name)))
    )


def missing_value_problem(label: str) -> str | None:
    """Reason that a label means a missing value, or None."""
    if not _MISSING.fullmatch(label):
        return None
    return "stands for a missing value; fix or remove these samples, or list it in `classes` if it is a class"


def _unusable_name_problem(name: str) -> str | None:
    if not is_encodable(name):
        return "its name is not valid UTF-8; rename its folder or label"
    if not any(unicodedata.category(letter) not in _INVISIBLE and not letter.isspace() for letter in name):
        return "its name has no visible letter; rename its folder or label"
    return None


def numbered_classes(labels_N: NDArray[np.integer[Any]], origin: str, setting: str) -> list[str]:
    """Names for the labels 0, 1, ... of arrays.

    Raises DataError if the highest label is so large that most classes would be empty.
    """
    used, counts = np.unique(labels_N, return_counts=True)
    highest = int(used[-1])
    if highest >= _max_class_count(len(used)):
        rarest = int(used[np.flatnonzero(counts == counts.min())[-1]])
        used_names = join_names([f"{int(label)}" for label in used])
        raise DataError(
            f"{origin}: has labels up to {highest:,}, but only {len(used)} different ones ({used_names}); is {rarest}, "
            f"which occurs {format_count(int(counts.min()), 'time')}, a label? If so, "
            f"give all {highest + 1:,} classes a name in {setting}"
        )
    return [str(label) for label in range(highest + 1)]


def _max_class_count(used: int) -> int:
    """The largest number of classes that is plausible for `used` different labels: some may have no image yet."""
    return 2 * used + 10


def implausible_class_names(names: Sequence[str]) -> list[str]:
    """Names that are negative numbers or far larger than the others. Some tools write these for a missing label."""
    if not names or not all(re.fullmatch(r"-?\d{1,18}", name) for name in names):
        return []
    limit = _max_class_count(len(names))
    return [name for name in names if not 0 <= int(name) < limit]


def similar_names(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ only in case, blanks, quotes, leading zeros or invisible letters."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_fold_name(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _fold_name(name: str) -> str:
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    text = "".join(letter for letter in text if unicodedata.category(letter) not in _INVISIBLE).strip().strip(_QUOTES)
    if number := re.fullmatch(r"([+-]?)0*(\d+)(\.0*)?", text):
        return "".join(number.group(1, 2))
    return re.sub(r"[\s_-]+", " ", text).strip()


def quote_names(names: Sequence[str]) -> list[str]:
    """The names in quotes for a message, as ASCII with escapes if they would look the same otherwise."""
    visible = [escape(unicodedata.normalize("NFC", name)) for name in names]
    if len(set(visible)) == len(visible) and not any(map(_has_invisible, names)):
        return [f"'{escape(name)}'" for name in names]
    return [ascii(name) for name in names]


def _has_invisible(name: str) -> bool:
    is_invisible = (
        unicodedata.category(letter) in _INVISIBLE or (letter.isspace() and letter != " ") for letter in name
    )
    return any(is_invisible) or name != name.strip()
