"""Functions run in forked processes, alone or as ranks, so that torch is imported only once."""

from __future__ import annotations

import io
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def rank_environment(rank: int, size: int, port: int, restarts: int = 0) -> dict[str, str]:
    """Environment variables that torchrun sets."""
    places = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1",
    }
    return {key: str(value) for key, value in places.items()} | {"TORCHELASTIC_RESTART_COUNT": str(restarts)}


def fork(function: Callable[[], Any], environment: dict[str, str] | None = None) -> tuple[int, int]:
    """Run a function in a child process. Return the child's pid and the pipe that `outcome` reads."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return pid, ours
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(100)  # a child that hangs does not outlive the test
        os.environ.update(environment or {})
        torch.set_num_threads(1)
        try:
            told = ("returned", function())
        except BaseException as error:
            told = ("raised", (type(error), error.args, getattr(error, "lines", (traceback.format_exc(),))))
        with os.fdopen(theirs, "wb") as pipe:
            pickle.dump(told, pipe)
        status = 0
    finally:
        os._exit(status)


def outcome(pid: int, pipe: int) -> Any:
    """Return value of a child, the exception that it raised, or the negated number of the signal that killed it."""
    with os.fdopen(pipe, "rb") as told:
        data = told.read()
    status = os.waitpid(pid, 0)[1]
    if not data:
        return -os.WTERMSIG(status)
    how, told = pickle.loads(data)
    if how == "returned":
        return told
    kind, arguments, lines = told
    error = kind.__new__(kind, *arguments)  # past __init__, which may want other things
    error.args, error.lines = arguments, lines
    return error


def run_main(words: list[str], folder: Path) -> tuple[int, str, str]:
    """Run a command in a folder and return its exit code, stdout and stderr. Call it only in a child of `fork`."""
    from cnnrun.commands import app

    os.chdir(folder)
    sys.argv, sys.stderr, sys.stdout, code = ["cnnrun", *words], io.StringIO(), io.StringIO(), 0
    try:
        app.main()
    except SystemExit as left:
        code = int(left.code or 0)
    return code, sys.stdout.getvalue(), sys.stderr.getvalue()


def run_on_ranks(size: int, function: Callable[[int], Any]) -> list[Any]:
    """Run `function(rank)` on `size` ranks and return what each returned or raised."""
    port = free_port()
    children = [fork(lambda rank=rank: function(rank), rank_environment(rank, size, port)) for rank in range(size)]
    return [outcome(*child) for child in children]


def wait_for(there: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
