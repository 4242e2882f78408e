"""A pytest plugin that prints a line of JSON for each test as it ends. Loaded with `-p pytest_results`.

A test that takes a third of the step's time is ended by a signal and fails, so that a hanging test is not the last one.
"""

from __future__ import annotations

import json
import math
import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

_LINES = 15
_STDOUT = os.dup(1)  # duplicated before pytest captures the output of tests
_SECONDS = float(os.environ.get("CNNRUN_GPU_CHECK_SECONDS", "inf")) / 3
_counts: Counter[str] = Counter()


def _print(line: str) -> None:
    os.write(_STDOUT, f"\n{line}\n".encode())


def pytest_runtest_logstart(nodeid: str) -> None:
    """Print the name of the test that begins, so that a hanging test is known."""
    _print(f"begun: {nodeid}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Raise TimeoutError in a test that takes too long."""

    def leave(number: int, frame: object) -> None:
        raise TimeoutError(f"{item.nodeid}: not done after {_SECONDS:.0f} s")

    before = signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS if math.isfinite(_SECONDS) else 0)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print how a test ended; for set-up and teardown only failures."""
    if report.when != "call" and report.passed:
        return
    result: dict[str, Any] = {"what": "test", "nodeid": report.nodeid, "outcome": report.outcome}
    result["took"] = round(report.duration, 2)
    if report.when != "call" and not report.skipped:
        result["outcome"] = f"{report.outcome} in {report.when}"
    if report.skipped and isinstance(report.longrepr, tuple):
        result["skipped"] = report.longrepr[2]
    if report.failed:
        lines = report.longreprtext.splitlines()
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = (crash.message if crash else lines[-1] if lines else "").partition("\n")[0]
        result |= {"ok": False, "reason": reason, "lines": lines[-_LINES:]}
    _print(json.dumps(result))


def pytest_warning_recorded(warning_message: warnings.WarningMessage, nodeid: str) -> None:
    """Print the first warning of each kind."""
    kind = warning_message.category.__name__
    _counts[kind] += 1
    if _counts[kind] == 1:
        text = " ".join(str(warning_message.message).split())[:300]
        _print(json.dumps({"what": "warning", "kind": kind, "nodeid": nodeid, "text": text}))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Print the number of tests and of warnings of each kind."""
    totals = {"what": "session", "collected": session.testscollected, "failed": session.testsfailed}
    _print(json.dumps({**totals, "exit": int(exitstatus), "warnings": dict(_counts)}))
