"""Python programs in processes of their own that start in a few milliseconds, forked by `tests.support.fork_server`.

For tests that need a process (for its exit code, its signals or its standard streams) but not Python's start. What is
set or imported before torch, and a stream that is closed from the start, need `subprocess` and `sys.executable`.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO

from tests.support.fork_server import Request

ROOT = Path(__file__).parents[2]
READ_AT_START = ("OMP_", "GOMP_", "KMP_", "MKL_", "PYTHON", "LD_", "MALLOC_")  # a forked process cannot change them


@cache
def _start_server() -> tuple[socket.socket, dict[str, str]]:
    """Start the server. Return the socket for requests and the server's environment."""
    requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = dict(os.environ)
    subprocess.Popen(
        [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    ).returncode = 0  # it ends when the socket is closed, and nobody waits for it
    theirs.close()
    atexit.register(requests.close)  # which ends the server
    return requests, environment


_SET_BY_LIBRARIES = {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}  # in this process, by importing scikit-learn


class ForkedPython:
    """A Python process that the server has forked, with the methods of `subprocess.Popen` that tests use.

    Standard output and error go to files, unless `stdout` or `stderr` is a file or a descriptor.
    """

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        environment: Mapping[str, str] = os.environ,
        stdout: IO[str] | int | None = None,
        stderr: IO[str] | int | None = None,
    ) -> None:
        requests, at_start = _start_server()
        for name in {*environment, *at_start} - _SET_BY_LIBRARIES:
            assert not name.startswith(READ_AT_START) or environment.get(name) == at_start.get(name), name
        self.args = arguments
        self.returncode: int | None = None
        self._outputs = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115, `communicate` closes them
        self._connection, theirs = socket.socketpair()
        request = Request(arguments, str(folder), dict(environment))
        streams = [self._outputs[0] if stdout is None else stdout, self._outputs[1] if stderr is None else stderr]
        descriptors = [stream if isinstance(stream, int) else stream.fileno() for stream in streams]
        with theirs, Path(os.devnull).open() as stdin:
            socket.send_fds(requests, [pickle.dumps(request)], [stdin.fileno(), *descriptors, theirs.fileno()])
        pid = self._connection.recv(100)
        assert pid, "no server: see how `python -m tests.support.fork_server 0` ends"
        self.pid = int(pid)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code, or the negated number of the signal that killed the process."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = os.waitstatus_to_exitcode(int(self._connection.recv(100)))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end and return what was written to standard output and error."""
        self.wait(timeout)
        for output in self._outputs:
            output.seek(0)
        out, err = (output.read() for output in self._outputs)
        for output in self._outputs:
            output.close()
        return out, err

    def send_signal(self, number: int) -> None:
        assert self.returncode is None
        os.kill(self.pid, number)


def run_python(
    arguments: list[str],
    folder: Path,
    environment: Mapping[str, str] = os.environ,
    stderr: IO[str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in a folder to its end, and return its exit code and output."""
    process = ForkedPython(arguments, folder, environment, stderr=stderr)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode is not None
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)
