"""Printed tables per class and confusion matrices: in full up to 30 classes, else the most notable rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cnnrun.base.console import Output, build_table
from cnnrun.contracts.results import RankedRows

MAX_PRINTED_CLASSES = 30  # tables and matrices of more classes are not printed in full
_MAX_PAIRS = 20  # most confused pairs of classes printed instead of a larger matrix
_ROWS_PER_END = 10  # worst rows, and as many best rows, printed of a longer table

Row = dict[str, Any]


def show_rows(out: Output, name: str, rows: Sequence[Row]) -> None:
    """Print a table in full, or its worst and best rows with a note on how many are left out."""
    selected, note = select_rows(rows)
    if selected:
        cells = [[format_cell(value) for value in row.values()] for row in selected]
        out.print(build_table(list(selected[0]), cells))
    if note:
        out.print(f"{name}: {note}")


def select_rows(rows: Sequence[Row]) -> tuple[Sequence[Row], str]:
    """Select the rows to print; returns them with a note on the others, empty if there are none.

    A long table without a ranking, such as the points of a curve, is not printed.
    """
    if len(rows) <= MAX_PRINTED_CLASSES:
        return rows, ""
    if not isinstance(rows, RankedRows):
        return [], f"{len(rows):,} rows (--json has them all)"
    metric, count_column = rows.rank_column, rows.count_column
    with_samples = [row for row in rows if row[metric] is not None and (count_column is None or row[count_column])]
    ranked = sorted(with_samples, key=lambda row: float(row[metric]))
    selected = ranked if len(ranked) <= 2 * _ROWS_PER_END else [*ranked[:_ROWS_PER_END], *ranked[-_ROWS_PER_END:]]
    ends = f"the {_ROWS_PER_END} worst and the {_ROWS_PER_END} best"
    description = ends if len(selected) < len(ranked) else f"the {len(selected)} with samples"
    return (
        selected,
        f"{description} of {len(rows):,}, by {metric}; {len(rows) - len(selected):,} more (--json has them all)",
    )


def show_matrix(out: Output, name: str, matrix: Sequence[Sequence[int]], per_class: Sequence[Row]) -> None:
    """Print a confusion matrix in full, or the pairs of classes that are confused most."""
    labels = [str(index) for index in range(len(matrix))]
    if len(matrix) <= MAX_PRINTED_CLASSES:
        out.print(f"{name} (rows: true, columns: predicted)")
        out.print(build_table(["", *labels], [[labels[i], *map(str, row)] for i, row in enumerate(matrix)]))
        return
    from cnnrun.tasks.classification_metrics import largest_confusions  # needs numpy: not for other output

    names = [str(row["class"]) for row in per_class] if len(per_class) == len(matrix) else labels
    pairs, pair_count = largest_confusions(matrix, _MAX_PAIRS)
    rows = [[names[true], names[predicted], f"{count:,}", f"{total:,}"] for true, predicted, count, total in pairs]
    if rows:
        out.print(build_table(["true", "predicted", "times", "of"], rows, text_columns=2))
    summary = f"the {len(rows)} most confused of {pair_count:,} pairs" if rows else "no class was confused with another"
    out.print(f"{name} of {len(matrix):,} classes: {summary}; --json has the whole matrix")


def format_cell(value: object) -> str:
    """Format a value of a table; an undefined one, such as the AP of a class without objects, is n/a."""
    return "n/a" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
