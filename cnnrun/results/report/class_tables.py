"""Tables with a row for each class, and confusion matrices: as they are up to 30 classes, of more what stands out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cnnrun.base.console import Output, build_table

MAX_PRINTED_CLASSES = 30  # that are printed in full
_PAIRS = 20  # pairs of classes that are printed of a larger matrix
_ENDS = 10  # rows that are printed of a longer table, of the worst and of the best
_JUDGED_BY = ("AP", "f1", "gain")  # the number that says which classes, or targets, are worst
_COUNTS = ("support", "objects")  # of what there is of a class

Row = dict[str, Any]


def show_rows(out: Output, rows: Sequence[Row]) -> None:
    """Print a table: in full, or its worst and best rows and how many more there are."""
    shown, more = select_rows(rows)
    if shown:
        out.print(build_table(list(shown[0]), [[format_cell(value) for value in row.values()] for row in shown]))
    if more:
        out.print(more)


def select_rows(rows: Sequence[Row]) -> tuple[Sequence[Row], str]:
    """The rows that are printed, and what to say of the others."""
    if len(rows) <= MAX_PRINTED_CLASSES:
        return rows, ""
    by = next((name for name in _JUDGED_BY if name in rows[0]), None)
    if by is None:
        return rows[:MAX_PRINTED_CLASSES], f"{len(rows) - MAX_PRINTED_CLASSES:,} more: --json has them"
    ranked = sorted((row for row in rows if _is_judged(row, by)), key=lambda row: float(row[by]))
    shown = ranked if len(ranked) <= 2 * _ENDS else [*ranked[:_ENDS], *ranked[-_ENDS:]]
    which = f"the {_ENDS} worst and the {_ENDS} best" if len(shown) < len(ranked) else f"the {len(shown)} that are here"
    return shown, f"{which} of {len(rows):,}, by {by}; {len(rows) - len(shown):,} more: --json has them"


def _is_judged(row: Row, by: str) -> bool:
    """Return whether a row's number means something: there is any of its class."""
    return row[by] is not None and all(row.get(name, 1) for name in _COUNTS)


def show_matrix(out: Output, name: str, matrix: Sequence[Sequence[int]], per_class: Sequence[Row]) -> None:
    """Print a confusion matrix: in full, or the pairs of classes that are confused most."""
    labels = [str(number) for number in range(len(matrix))]
    if len(matrix) <= MAX_PRINTED_CLASSES:
        out.print(f"{name} (rows: true, columns: predicted)")
        out.print(build_table(["", *labels], [[labels[i], *map(str, row)] for i, row in enumerate(matrix)]))
        return
    from cnnrun.tasks.classification_metrics import largest_confusions  # brings numpy, which other reports do not need

    names = [str(row["class"]) for row in per_class] if len(per_class) == len(matrix) else labels
    pairs, among = largest_confusions(matrix, _PAIRS)
    rows = [[names[true], names[said], f"{count:,}", f"{of:,}"] for true, said, count, of in pairs]
    if rows:
        out.print(build_table(["true", "taken for", "times", "of"], rows, text_columns=2))
    what = f"the {len(rows)} most confused of {among:,} pairs" if rows else "no class was taken for another"
    out.print(f"{name} of {len(matrix):,} classes: {what}; --json has the whole matrix")


def format_cell(value: object) -> str:
    """A value of a table; what is not defined, such as the AP of a class that is not there, is n/a."""
    return "n/a" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
