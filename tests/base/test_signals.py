from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from cnnrun.base.signals import stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_requests_a_stop_and_the_handlers_are_restored(number, capfd):
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert stop.signal == 0
        signal.raise_signal(number)
        assert stop.signal == number
    assert signal.getsignal(number) is before
    assert "stopping after this step" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("first", "second", "code"), [("INT", "INT", 130), ("INT", "TERM", 143), ("USR1", "USR1", 138)]
)
def test_the_second_signal_exits_at_once(first, second, code):
    program = (
        "import signal\n"
        "from cnnrun.base.signals import stop_on_signals\n"
        "with stop_on_signals():\n"
        f"    signal.raise_signal(signal.SIG{first})\n"
        f"    signal.raise_signal(signal.SIG{second})\n"
    )
    assert subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL).returncode == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_outside_of_training_ends_the_command_in_one_line(number, code, tmp_path):
    """For example while images are decoded: temporary files are removed, and there is no traceback."""
    program = (
        "import sys, time, tempfile\n"
        "from cnnrun.commands import app as cli; from cnnrun.commands import kinds as vocabulary\n"
        "def slow(*_):\n"
        f"    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):\n"
        "        print('begun', flush=True)\n"
        "        time.sleep(60)\n"
        "vocabulary.json_schema = slow\n"
        "sys.argv = ['cnnrun', 'schema']\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, "stopped\n")
    assert not list(tmp_path.iterdir())


def test_an_echo_of_the_first_signal_does_not_count_as_a_second(monkeypatch):
    """torchrun forwards a signal that its processes have already received."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
    program = (
        "import signal\n"
        "from cnnrun.base import signals\n"
        "signals._REPEAT_SECONDS = 0.0\n"
        "with signals.stop_on_signals():\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL).returncode == 130
