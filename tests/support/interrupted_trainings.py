"""Trainings that a signal stops at a step, and the digest that must be equal after they are resumed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cnnrun.base.errors import InterruptionError
from cnnrun.training import checkpoints
from cnnrun.training.learner import Learner


def digest(run: Path) -> str:
    """Digest of everything that must repeat: the last checkpoint, metrics.jsonl and the name of the best checkpoint."""
    saved = checkpoints.load_newest(run / "checkpoints", "latest", pytest.fail)
    assert saved is not None
    found = hashlib.sha256(json.dumps(saved.state, sort_keys=True).encode())
    for part, tensors in sorted(saved.parts.items()):
        for name, value in sorted(tensors.items()):
            found.update(f"{part}.{name}{value.dtype}{tuple(value.shape)}".encode() + value.numpy().tobytes())
    found.update((run / "metrics.jsonl").read_bytes())
    found.update((run / "checkpoints" / "best").read_bytes())
    return found.hexdigest()


@contextmanager
def stop_at(step: int) -> Iterator[None]:
    """Send SIGTERM during optimizer step `step` of the training in this context, which ends by it."""
    real = Learner.backward

    def backward_with_signal(self, batch, number):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, number)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Learner, "backward", backward_with_signal)
        with pytest.raises(InterruptionError) as stopped:
            yield
    assert stopped.value.exit_code == 128 + signal.SIGTERM
