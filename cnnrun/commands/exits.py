"""The end of a failed command: lines on stderr, and an exit code."""

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

_BUG_LINE = "this is a bug in cnnrun; please report it with these lines"


def describe_failure(error: Exception) -> tuple[Sequence[str], int]:
    """Lines and exit code for an error that is not the user's: out of memory, a broken GPU, or a bug."""
    if isinstance(error, RuntimeError | MemoryError | OSError):
        from cnnrun.base.device import is_gpu_broken, is_out_of_memory

        if is_out_of_memory(error):
            return ["out of memory; set train.accumulate to 2 or more, or use a smaller batch"], 6
        if is_gpu_broken(error):
            line = f"the GPU or its driver failed ({first_line(error)}); check `nvidia-smi`, or use --device cpu"
            return [line], 6
    return [*"".join(traceback.format_exception(error)).splitlines(), _BUG_LINE], 1


def exit_with_lines(error: Exception, lines: Sequence[str], code: int) -> NoReturn:
    """Print `lines` on stderr and exit with `code`, without waiting for threads that may never end."""
    rank = torchrun.rank()
    for line in lines:
        print(shorten(escape(f"rank {rank}: {line}" if rank else line)), file=sys.stderr, flush=True)  # noqa: T201
    is_decoding = any(thread.name.startswith("decode") for thread in threading.enumerate())
    may_hang = isinstance(error, NoAnswerError) or (isinstance(error, InterruptionError) and is_decoding)
    if torchrun.world_size() == 1 and not may_hang:
        sys.exit(code)
    if rank:
        time.sleep(1)  # torchrun kills all ranks once one has ended; rank 0 needs time to print its lines
    with contextlib.suppress(UserError):
        sys.stdout.flush()
    os._exit(code)
