"""Run a step as a process in its own session: read its lines as they come, end it in time, leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from records import Outcome, Record

MARK = "CNNRUN_GPU_CHECK_STEP"  # in the environment of every process that a step starts
LIMIT = "CNNRUN_GPU_CHECK_SECONDS"  # the time limit of a step, so that the step can finish by itself
_DUMP_SECONDS, _KILL_SECONDS = 2.0, 5.0


@dataclass(frozen=True)
class Step:
    """The command of a step and its share of the time."""

    name: str
    command: Sequence[str]
    share: float
    folder: Path = Path()


def run_step(step: Step, limit: float, environment: Mapping[str, str], record: Record) -> Outcome:
    """Run a step to its end or for `limit` seconds; results are recorded as they come.

    An exception in the caller (from a signal) ends the step too.
    """
    outcome = Outcome(step.name)
    record.outcomes.append(outcome)
    record.log(f"== {step.name}: at most {limit:.0f} s: {' '.join(step.command)}")
    mark = f"{step.name}-{os.getpid()}-{time.monotonic_ns()}"
    own = {**environment, MARK: mark, LIMIT: f"{limit:.1f}", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    began = time.monotonic()
    outcome.status = "stopped"
    try:
        process = subprocess.Popen(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=own,
            cwd=step.folder,
            start_new_session=True,
        )
    except OSError as error:
        outcome.status = f"failed: cannot be started ({error})"
        record.end(outcome)
        return outcome
    reader = Thread(target=_read, args=(process, outcome, record, began), daemon=True)
    reader.start()
    try:
        outcome.status = _status(process.wait(limit))
    except subprocess.TimeoutExpired:
        outcome.status = f"timed out after {limit:.0f} s"
        _dump_stacks(process)
    finally:
        if not _end(process, mark):
            outcome.status += "; it cannot be killed"
        reader.join(_DUMP_SECONDS)
        if process.stdout and not reader.is_alive():
            process.stdout.close()
        outcome.seconds = time.monotonic() - began
        record.end(outcome)
    return outcome


def _read(process: subprocess.Popen[bytes], outcome: Outcome, record: Record, began: float) -> None:
    assert process.stdout
    for line in process.stdout:
        if text := line.decode(errors="replace").rstrip():
            record.add(outcome, time.monotonic() - began, text)


def _status(code: int) -> str:
    if code >= 0:
        return f"failed: exit code {code}" if code else "ok"
    with suppress(ValueError):
        return f"failed: signal {signal.Signals(-code).name}"
    return f"failed: signal {-code}"


def _dump_stacks(process: subprocess.Popen[bytes]) -> None:
    """Have Python's fault handler write where each process of the step hangs."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGABRT)
        process.wait(_DUMP_SECONDS)


def _end(process: subprocess.Popen[bytes], mark: str) -> bool:
    """Kill the step's group and everything else that it started, in other sessions too; returns success."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + _KILL_SECONDS
    while (left := _marked(mark)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    with suppress(subprocess.TimeoutExpired):
        process.wait(max(0.1, deadline - time.monotonic()))
    return process.returncode is not None and not left


def _marked(mark: str) -> list[int]:
    """Return the processes that have the step's mark in their environment."""
    entry_bytes, pids = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if entry_bytes in (entry / "environ").read_bytes().split(b"\0"):
                pids.append(int(entry.name))
    return pids
