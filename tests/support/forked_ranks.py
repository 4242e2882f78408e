"""torchrun whose ranks are forked from it: `ForkedPython(["-m", "tests.support.forked_ranks", *ARGUMENTS], folder)`.

The ranks are children of torchrun in sessions of their own, as torchrun starts them, but have imported torch already.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.run import main

from cnnrun.base import torchrun
from tests.support.fork_server import run_program


class ForkedRank(subprocess.Popen[bytes]):
    """A rank in a process that is forked. Everything else (waiting, polling, signals) is `Popen`'s."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            return
        code = 1
        try:
            prepare_rank(env)
            code = run_to_exit_code(list(args[1:]))
        finally:
            os._exit(code)


def prepare_rank(environment: dict[str, str]) -> None:
    """Drop what a new process would not have of torchrun's: its handlers, open files, session and environment."""
    atexit._clear()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    torchrun._PARENT = os.getppid()
    Path("/proc/self/comm").write_text(f"rank {environment['RANK']}")  # for `ranks_of`


def run_to_exit_code(arguments: list[str]) -> int:
    """Run `-u -m MODULE ARGUMENTS` to its end, exit handlers included. Return the exit code."""
    assert arguments[0] == "-u", arguments
    sys.stdout.reconfigure(write_through=True)
    try:
        run_program(arguments[1:])
    except SystemExit as left:
        return int(left.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    subprocess_handler.Popen = ForkedRank
    main()
