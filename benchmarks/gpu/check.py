"""Run every check of cnnrun that needs a machine with a GPU, in minutes. Started by scripts/gpu_check.

Each step is a script beside this one, run as a process with its own time limit, the most valuable first. A hang or a
crash costs only its step, and each result is written at once. This file needs only Python and pip.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from packages import (
    LEFT_OUT,
    RefusedError,
    find_among,
    install,
    installed_versions,
    needed_wheels,
    read_wheels,
    requirements,
)
from processes import Step, run_step
from records import Outcome, Record

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NO_DEVICE = 6
# Seconds out of seven minutes on a GPU, and out of ten in a rehearsal. Unused time goes to later steps.
SHARES = {
    "environment": (25, 40),
    "tests": (150, 240),
    "speed": (100, 90),
    "time_to_accuracy": (35, 40),
    "same_bits": (35, 70),
    "memory": (25, 35),
    "export": (20, 40),
    "ranks": (30, 45),
}
_SHORTEST = 1.0  # seconds; a step with less time than this is not started


class StoppedError(Exception):
    """A signal asked the check to stop."""


def main() -> None:
    """Run the check that the command line asks for; exits with 0, 1, 2 or 6."""
    options = parse_options()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not options.rehearse and not has_cuda():
        sys.exit(leave(f"gpu_check: {sys.executable} has no CUDA device; --rehearse runs on a CPU", NO_DEVICE))
    deadline = time.monotonic() + options.minutes * 60
    title = "cnnrun on a CPU: a rehearsal" if options.rehearse else "cnnrun on a GPU"
    title += f" ({options.minutes:g} min, {time.strftime('%Y-%m-%d %H:%M')})"
    with Record(options.out, title) as record, tempfile.TemporaryDirectory(prefix="cnnrun-gpu-check-") as folder:
        try:
            prepare(options.wheels, Path(folder) / "site", record, deadline)
        except RefusedError as error:
            sys.exit(leave(f"gpu_check: {error}", 2))
        environment = step_environment(Path(folder), rehearse=options.rehearse)
        names = [name for name in SHARES if not options.only or name in options.only]
        steps = [Step(name, command_of(name), SHARES[name][options.rehearse], ROOT) for name in names]
        outcomes = run_steps(steps, deadline, environment, record)
        print(record.text())
    sys.exit(0 if all(outcome.is_ok for outcome in outcomes) else 1)


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, help="time for all steps together (7; 10 in a rehearsal)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install what is missing from")
    parser.add_argument("--out", type=Path, default=Path("build/gpu_check"), help="folder for what is found")
    parser.add_argument("--rehearse", action="store_true", help="the same steps on a CPU, small")
    parser.add_argument("--only", nargs="+", choices=SHARES, metavar="STEP", help=f"of {', '.join(SHARES)}")
    options = parser.parse_args()
    if options.minutes is None:
        options.minutes = 10.0 if options.rehearse else 7.0
    if not 0 < options.minutes < 1000:
        parser.error(f"--minutes {options.minutes:g}: give more than 0")
    return options


def leave(line: str, code: int) -> int:
    """Print a line on stderr; returns the exit code."""
    print(line, file=sys.stderr)
    return code


def has_cuda() -> bool:
    """Return whether torch finds a CUDA device. Tried in a separate process, which may crash or hang."""
    command = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    try:
        return subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def prepare(wheels: Path | None, site: Path, record: Record, deadline: float) -> None:
    """Install missing or outdated packages from `wheels`, and note what is still missing. Raises RefusedError."""
    available = read_wheels(wheels) if wheels else {}
    required = requirements(ROOT / "pyproject.toml")
    chosen, missing = needed_wheels(required, installed_versions(), find_among(available))
    record.note(f"Python {sys.version.split()[0]}, {sys.executable}")
    if chosen:
        problem = install(chosen, site, max(10.0, deadline - time.monotonic()))
        names = ", ".join(f"{wheel.name} {wheel.version}" for wheel in chosen)
        record.note(f"not installed ({problem}): {names}" if problem else f"installed from wheels: {names}")
    for name in missing:
        reason = next((f" (left out: {reason})" for known, reason in LEFT_OUT.items() if name.startswith(known)), "")
        record.note(f"missing: {name}{reason}")


def command_of(name: str) -> list[str]:
    """Return the command of a step."""
    return [sys.executable, str(HERE / f"{name}.py")]


def step_environment(folder: Path, *, rehearse: bool) -> dict[str, str]:
    """Return the environment of the steps: this checkout first on the path, separate caches, rehearsal settings."""
    paths = [str(ROOT), str(folder / "site"), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "XDG_CACHE_HOME": str(folder / "cache")}
    own["CNNRUN_GPU_CHECK_DEVICE"] = "cpu" if rehearse else "cuda"
    small = {"CNNRUN_GPU_CHECK_SMALL": "1", "CNNRUN_CUDA_REHEARSAL": "1"} if rehearse else {}
    return {**os.environ, **own, **small}


def run_steps(steps: Sequence[Step], deadline: float, environment: dict[str, str], record: Record) -> list[Outcome]:
    """Run the steps one after the other until the deadline or a signal; returns their outcomes."""
    began = time.monotonic()
    scale = max(0.0, deadline - began) / (sum(step.share for step in steps) or 1)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    end, reason = 0.0, ""
    try:
        for step in steps:
            end += step.share * scale
            left = began + end - time.monotonic()
            reason = reason or ("time was up" if left < _SHORTEST else "")
            if reason:
                skip(step, reason, record)
                continue
            try:
                outcome = run_step(step, left, environment, record)
                print(f"{outcome.name}: {outcome.line}, {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
            except StoppedError as error:
                reason = str(error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return record.outcomes


def skip(step: Step, reason: str, record: Record) -> None:
    """Record that a step is not run."""
    outcome = Outcome(step.name, f"not run: {reason}")
    record.outcomes.append(outcome)
    record.end(outcome)


def stop(number: int, frame: object) -> None:
    """End the running step. Raises StoppedError."""
    raise StoppedError(f"stopped by {signal.Signals(number).name}")


if __name__ == "__main__":
    main()
