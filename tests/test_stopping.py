from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from cnnrun.stopping import stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_asks_and_the_handlers_are_put_back(number, capfd):
    before = signal.getsignal(number)
    with stopping() as stop:
        assert stop.signal == 0
        signal.raise_signal(number)
        assert stop.signal == number
    assert signal.getsignal(number) is before
    assert "stopping after this step" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("first", "second", "code"), [("INT", "INT", 130), ("INT", "TERM", 143), ("USR1", "USR1", 138)]
)
def test_the_second_signal_leaves_at_once(first, second, code):
    program = (
        "import signal\n"
        "from cnnrun.stopping import stopping\n"
        "with stopping():\n"
        f"    signal.raise_signal(signal.SIG{first})\n"
        f"    signal.raise_signal(signal.SIG{second})\n"
    )
    assert subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL).returncode == code


def test_an_echo_of_the_first_signal_is_no_second_one(monkeypatch):
    """torchrun passes on what the terminal sent to its processes as well."""
    with stopping(echoed=True) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
    program = (
        "import signal\n"
        "from cnnrun import stopping\n"
        "stopping._ECHO_SECONDS = 0.0\n"
        "with stopping.stopping(echoed=True):\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL).returncode == 130
