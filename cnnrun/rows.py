"""Predictions as they come, a row a picture: as text, CSV or JSON lines on stdout."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from cnnrun.errors import printable

_LABEL, _BOX = ["label", "probability", "top"], ["label", "score", "x", "y", "width", "height"]
_PERSON = ["person", "similarity", "matches"]


def row_writer(form: str) -> Callable[[dict[str, Any]], None]:
    """A function that writes one prediction as `text`, `csv` or `json` (one object a line)."""
    if form == "json":
        return lambda row: print(json.dumps(row), flush=True)  # noqa: T201
    if form == "text":
        return _text_row
    writer, headed = csv.writer(sys.stdout), list[list[str]]()

    def write(row: dict[str, Any]) -> None:
        if not headed:
            headed.append(_columns(row))
            writer.writerow(["path", *headed[0], "error"])
        for cells in _cells(row):
            blank = [""] * (len(headed[0]) - len(cells))
            writer.writerow([row["path"], *cells, *blank, row.get("error", "")])

    return write


def _columns(row: dict[str, Any]) -> list[str]:
    if "embedding" in row:
        return [f"e{number}" for number in range(len(row["embedding"]))]
    return _BOX if "objects" in row else _PERSON if "matches" in row else _LABEL


def _cells(row: dict[str, Any]) -> Iterator[list[Any]]:
    """What stands between the path and the error, a line each."""
    if row.get("objects"):
        yield from ([each["label"], each["score"], *each["bbox"]] for each in row["objects"])
    elif "embedding" in row:
        yield row["embedding"]
    elif "matches" in row:
        yield [row["person"] or "", row["similarity"], _listed(row["matches"], "person", "similarity")]
    elif "top" in row:
        yield [row["label"], row["probability"], _listed(row["top"], "label", "probability")]
    else:
        yield []


def _listed(entries: list[dict[str, Any]], name: str, number: str) -> str:
    return ";".join(f"{entry[name]}={entry[number]:.6f}" for entry in entries)


def _text_row(row: dict[str, Any]) -> None:
    if "error" in row:
        print(printable(row["error"]), file=sys.stderr)  # noqa: T201
        return
    print(f"{printable(row['path'])}: {printable(_shown(row))}", flush=True)  # noqa: T201


def _shown(row: dict[str, Any]) -> str:
    if "objects" in row:
        found = [(f"{each['label']} {each['score']:.2f}", each["bbox"]) for each in row["objects"]]
        return "  ".join(f"{what} at {x:.0f},{y:.0f} {w:.0f}x{h:.0f}" for what, (x, y, w, h) in found) or "nothing"
    if "embedding" in row:
        return f"an embedding of {len(row['embedding'])} numbers (--json and --csv give them)"
    if "matches" in row:
        near = "  ".join(f"{entry['person']} {entry['similarity']:.3f}" for entry in row["matches"])
        return f"{row['person'] or 'unknown'}   ({near})"
    return "  ".join(f"{entry['label']} {entry['probability']:.3f}" for entry in row["top"])
