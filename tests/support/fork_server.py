"""Server that imports torch and cnnrun once, and forks for each Python program that a test starts.

A forked program needs no seconds for imports. It runs at the top level of this file, so it also ends like any other:
with its exit code or traceback, its exit handlers and a last flush of its output. `tests.support.forked_python` starts
this file and sends it requests over a socket.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import runpy
import select
import signal
import socket
import sys
import types
from dataclasses import dataclass
from pathlib import Path

MAX_REQUEST = 100_000  # bytes
# What `cnnrun train` imports. Packages of extras (scipy, optuna, ...) are left out, because tests run without them.
LIBRARIES = (
    *("torch", "torchvision.transforms.v2", "torch.utils.tensorboard", "matplotlib.backends.backend_agg", "jinja2"),
    *("cnnrun.commands.app", "cnnrun.results.studies.train_run", "cnnrun.results.report", "cnnrun.explain.methods"),
)


@dataclass
class Request:
    """A program to run: arguments as `python` takes them, where it runs, and its environment variables."""

    arguments: list[str]
    folder: str
    environment: dict[str, str]


def import_libraries() -> None:
    """Import what most commands need, torch after the settings that `cnnrun` makes before it."""
    from cnnrun.base.process_settings import limit_spinning

    limit_spinning()
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # else a child spends a second at its end on collecting what it shares with the server


def serve(requests: socket.socket) -> Request | None:
    """Fork for each request. Return the request in the child, and None in the server when no more can come.

    A request comes with four descriptors: the child's standard streams and a socket, which is told the child's process
    id and, when it has ended, its wait status.
    """
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ended, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno())
    children: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([requests, ended], [], [])
        if ended in ready:
            ended.recv(1000)
            report_ended(children)
        if requests not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(requests, MAX_REQUEST, 4)
        if not message:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            return None
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for connection in (requests, ended, wakeup, *children.values()):
                connection.close()
            return prepare_child(pickle.loads(message), descriptors)
        children[pid] = socket.socket(fileno=descriptors.pop())
        children[pid].send(str(pid).encode())
        for descriptor in descriptors:
            os.close(descriptor)


def report_ended(children: dict[int, socket.socket]) -> None:
    """Tell the starters of ended children their wait status."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with children.pop(pid) as connection:
            connection.send(str(status).encode())


def prepare_child(request: Request, descriptors: list[int]) -> Request:
    """Give this process the standard streams, the working directory and the environment of the request."""
    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
    for descriptor in descriptors:
        os.close(descriptor)
    os.setsid()
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    return request


def run_program(arguments: list[str]) -> None:
    """Run `-c CODE ARGUMENTS`, `-m MODULE ARGUMENTS` or `-P -m MODULE ARGUMENTS`."""
    del sys.path[0]  # where the server was started
    if arguments[0] == "-P":
        arguments = arguments[1:]
    else:
        sys.path.insert(0, "" if arguments[0] == "-c" else str(Path.cwd()))
    option, program, *words = arguments
    sys.argv = [option, *words]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))


if __name__ == "__main__":
    import_libraries()
    if (received := serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        run_program(received.arguments)
