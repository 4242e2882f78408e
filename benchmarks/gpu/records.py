"""The files that a check writes while it runs: results.jsonl, log.txt and summary.md."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGEST = 12 << 20  # bytes of a file; a device machine sends back files of at most 16 MiB
LAST_LINES = 20
MOST_ROWS = 40  # of a table; a longer one shows only failed and skipped results
HIDDEN = ("step", "seconds", "what", "lines")  # keys that are not figures


@dataclass
class Outcome:
    """A step: its status and its results so far."""

    name: str
    status: str = "under way"
    seconds: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)

    @property
    def failed_results(self) -> list[dict[str, Any]]:
        """The results that report a failure."""
        return [result for result in self.results if result.get("ok") is False]

    @property
    def is_ok(self) -> bool:
        """True if the step ended well and no result failed."""
        return self.status == "ok" and not self.failed_results

    @property
    def line(self) -> str:
        """The status in words."""
        failures = len(self.failed_results)
        if self.status == "ok" and failures:
            return f"failed: {failures} of {len(self.results)} results"
        return self.status


class Record:
    """The three files. Each line of results.jsonl is written at once, so a kill loses no earlier result."""

    def __init__(self, folder: Path, title: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.summary, self.title = folder / "summary.md", title
        self.notes: list[str] = []
        self.outcomes: list[Outcome] = []
        self._results = (folder / "results.jsonl").open("wb", buffering=0)
        self._log = (folder / "log.txt").open("wb", buffering=0)

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *error: object) -> None:
        self._results.close()
        self._log.close()

    def note(self, text: str) -> None:
        """Write a line that belongs to no step to the log and the summary."""
        self.notes.append(text)
        self.log(text)
        self.write_summary()

    def log(self, text: str) -> None:
        """Append a line to the log, while the log is small enough to be sent back."""
        if self._log.tell() < LARGEST:
            self._log.write((text + "\n").encode())

    def add(self, outcome: Outcome, seconds: float, line: str) -> None:
        """Record a line that a step printed: a JSON object is a result, other lines go to the log."""
        try:
            result = json.loads(line)
        except ValueError:
            result = None
        if not isinstance(result, dict):
            self.log(line)
            outcome.tail = [*outcome.tail, line][-LAST_LINES:]
        elif self._results.tell() < LARGEST:
            result = {"step": outcome.name, "seconds": round(seconds, 1), **result}
            self._results.write((json.dumps(result) + "\n").encode())
            outcome.results.append(result)

    def end(self, outcome: Outcome) -> None:
        """Record how a step ended."""
        ended = {"step": outcome.name, "seconds": round(outcome.seconds, 1), "ended": outcome.line}
        self._results.write((json.dumps(ended) + "\n").encode())
        self.log(f"== {outcome.name}: {outcome.line}, {outcome.seconds:.1f} s")
        self.write_summary()

    def write_summary(self) -> None:
        """Rewrite summary.md."""
        fresh = self.summary.with_suffix(".new")
        fresh.write_text(self.text())
        fresh.replace(self.summary)

    def text(self) -> str:
        """Return the current summary."""
        steps = [["step", "outcome", "seconds"]]
        steps += [[outcome.name, outcome.line, f"{outcome.seconds:.0f}"] for outcome in self.outcomes]
        parts = [f"# {self.title}", *(f"- {note}" for note in self.notes), "", table(steps)]
        for outcome in self.outcomes:
            parts += figures(outcome)
        if failures := [part for outcome in self.outcomes for part in failure(outcome)]:
            parts += ["", "## Failures", *failures]
        return "\n".join(parts) + "\n"


def figures(outcome: Outcome) -> list[str]:
    """Return a step's figures: a table for each kind of result, or a list entry for a single result."""
    if not outcome.results:
        return []
    kinds: dict[str, list[dict[str, Any]]] = {}
    for result in outcome.results:
        kinds.setdefault(str(result.get("what", "result")), []).append(result)
    parts = ["", f"## {outcome.name}"]
    for kind, results in kinds.items():
        shown = results
        if len(results) > MOST_ROWS:
            shown = [result for result in results if result.get("ok") is False or "skipped" in result]
            hidden = f"{len(results) - len(shown)} of {len(results)} results"
            parts += ["", f"{hidden} of **{kind}** are in results.jsonl alone."]
        parts += figures_of_kind(kind, shown)
    return parts


def figures_of_kind(kind: str, results: list[dict[str, Any]]) -> list[str]:
    """Return results as a table, or a single result as a line."""
    columns = [key for key in dict.fromkeys(key for result in results for key in result) if key not in HIDDEN]
    if len(results) > 1 and columns != ["ok"]:
        rows = [[cell(result.get(key, "")) for key in columns] for result in results]
        return ["", f"**{kind}**", "", table([columns, *rows])]
    lines = [", ".join(f"{key} {cell(result[key])}" for key in columns if key in result) for result in results]
    return [part for line in lines for part in ("", f"- **{kind}**: {line}")]


def failure(outcome: Outcome) -> list[str]:
    """Return the failures of a step, with the last lines of their output."""
    parts = []
    for result in outcome.failed_results:
        about = {key: value for key, value in result.items() if key not in (*HIDDEN, "ok", "reason")}
        settings = ", ".join(f"{key} {cell(value)}" for key, value in about.items())
        parts += [
            "",
            f"- {outcome.name}, {result.get('what', 'result')} ({settings}): {result.get('reason', 'not ok')}",
        ]
        parts += block(result.get("lines", []))
    if outcome.status not in ("ok", "under way") and not outcome.status.startswith("not run"):
        parts += ["", f"- {outcome.name} {outcome.status}; its last lines:", *block(outcome.tail)]
    return parts


def block(lines: list[str]) -> list[str]:
    """Return lines as a code block."""
    return ["", "```", *(str(line).replace("```", "'''") for line in lines), "```"] if lines else []


def table(rows: list[list[str]]) -> str:
    """Return rows as a Markdown table; the first row is the header."""
    header, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])


def cell(value: object) -> str:
    """Return a value for a table cell: numbers with four digits, text on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split()).replace("|", "\\|")
