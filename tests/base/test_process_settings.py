"""Settings of the process: spinning is limited before torch is loaded, a user's own setting wins; the collector."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from cnnrun.base.process_settings import limit_spinning
from cnnrun.commands import app
assert "torch" not in sys.modules, "the command line has loaded torch, whose OpenMP has read its settings"
sys.argv = ["cnnrun", "--version"]
try:
    app.main()
except SystemExit:
    pass
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("KMP_BLOCKTIME"))
"""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "10000 1"),
        ({"GOMP_SPINCOUNT": "77"}, "77 1"),
        ({"KMP_BLOCKTIME": "5"}, "10000 5"),
        ({"OMP_WAIT_POLICY": "active"}, "None None"),
    ],
)
def test_the_command_line_limits_spinning_before_torch_is_loaded(settings, expected):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "KMP_", "OMP_"))}
    shown = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment | settings, capture_output=True, text=True, check=True
    ).stdout
    assert shown.splitlines()[-1] == expected


def test_once_torch_is_loaded_nothing_is_set(monkeypatch):
    import torch  # noqa: F401

    from cnnrun.base.process_settings import limit_spinning

    for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    limit_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_the_command_line_searches_for_cycles_rarely_and_not_at_the_end():
    script = """
import atexit, gc, sys
atexit.register(lambda: print(gc.get_threshold()[0], gc.get_freeze_count() > 1000, len(gc.get_objects()) < 1000))
from cnnrun.commands import app
sys.argv = ["cnnrun", "--version"]
app.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "50000 True True"
