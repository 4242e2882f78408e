"""How a command ends that did not end well: its lines on stderr, and its exit code."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from cnnrun.base import torchrun
from cnnrun.base.errors import InterruptionError, NoAnswerError, UserError, escape, first_line, shorten

_BUG = "this is a bug of cnnrun: please report it with these lines"


def of_a_bug(error: Exception) -> tuple[Sequence[str], int]:
    """The lines and the exit code of an error that is not the user's."""
    if isinstance(error, RuntimeError | MemoryError | OSError):
        from cnnrun.base.device import is_gpu_broken, is_out_of_memory

        if is_out_of_memory(error):
            return ["out of memory; train.accumulate: 2 (or more) or a smaller batch needs less"], 6
        if is_gpu_broken(error):
            line = (
                f"the GPU or its driver failed ({first_line(error)}); `nvidia-smi` says more, --device cpu needs none"
            )
            return [line], 6
    return [*"".join(traceback.format_exception(error)).splitlines(), _BUG], 1


def leave(error: Exception, lines: Sequence[str], code: int) -> NoReturn:
    """Print and go. Without waiting for threads where these may never end."""
    rank = torchrun.rank()
    for line in lines:
        print(shorten(escape(f"rank {rank}: {line}" if rank else line)), file=sys.stderr, flush=True)  # noqa: T201
    reading = any(thread.name.startswith("decode") for thread in threading.enumerate())
    hung = isinstance(error, NoAnswerError) or (isinstance(error, InterruptionError) and reading)
    if torchrun.world_size() == 1 and not hung:
        sys.exit(code)
    if rank:
        time.sleep(1)  # torchrun ends all once one has ended: what the first has to say comes before
    with contextlib.suppress(UserError):
        sys.stdout.flush()
    os._exit(code)
