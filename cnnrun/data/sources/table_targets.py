"""Targets in the cells of a table: one-hot labels, booleans and numbers."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from cnnrun.base.error_lines import check_problems
from cnnrun.base.errors import escape
from cnnrun.data.sources.table_files import Rows
from cnnrun.data.targets import float32_problem

_MAX_NUMBER = 1e30
_BOOLEAN_WORDS = {"true": True, "false": False}  # in any case, as pandas writes them


def read_one_hot(rows: Rows, columns: list[str]) -> list[str]:
    """The label of each row: the column that is 1. Raises DataError for rows without exactly one 1."""
    labels, problems = [], []
    for i, cells in enumerate(zip(*(rows.columns[column] for column in columns), strict=True)):
        row_labels = []
        for column, cell in zip(columns, cells, strict=True):
            value = _parse_boolean(cell)
            if value is None:
                problems.append(f"{rows.location(i)}: {escape(column)} is {escape(cell)!r}; expected 0 or 1")
            row_labels += [column] if value else []
        if len(row_labels) != 1:
            problems.append(f"{rows.location(i)}: {len(row_labels)} of the label columns are 1; expected exactly one")
        labels += row_labels[:1] or [""]
    check_problems(problems)
    return labels


def read_booleans(rows: Rows, columns: list[str]) -> Tensor:
    """The cells 0 and 1 as bool [N, K]. Raises DataError for any other cell."""
    values = [[_parse_boolean(cell) for cell in rows.columns[column]] for column in columns]
    check_problems(
        f"{rows.location(i)}: {escape(column)} is {escape(rows.columns[column][i])!r}; expected 0 or 1"
        for column, column_values in zip(columns, values, strict=True)
        for i, value in enumerate(column_values)
        if value is None
    )
    return torch.tensor(values, dtype=torch.bool).T.contiguous()


def read_numbers(rows: Rows, columns: list[str]) -> Tensor:
    """The cells as float32 [N, T]. Raises DataError for cells that are not numbers, or too fine for float32."""
    values = [[_parse_cell_number(cell) for cell in rows.columns[column]] for column in columns]
    check_problems(
        f"{rows.location(i)}: {escape(column)} is {escape(rows.columns[column][i])!r}; expected a number, such as "
        "-1.5 or 2e3"
        for column, column_values in zip(columns, values, strict=True)
        for i, value in enumerate(column_values)
        if value is None
    )
    check_problems(
        f"{rows.path}: {problem}"
        for column, column_values in zip(columns, values, strict=True)
        if (problem := float32_problem(column, column_values))
    )
    return torch.tensor(values, dtype=torch.float32).T.contiguous()


def _parse_cell_number(cell: str) -> float | None:
    """A decimal number below 1e30, or None. Python's own `float` would accept 1_000 and nan."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", cell, re.ASCII):
        return None
    return value if abs(value := float(cell)) < _MAX_NUMBER else None


def _parse_boolean(cell: str) -> bool | None:
    if cell.casefold() in _BOOLEAN_WORDS:
        return _BOOLEAN_WORDS[cell.casefold()]
    try:
        return {0.0: False, 1.0: True}.get(float(cell))
    except ValueError:
        return None
