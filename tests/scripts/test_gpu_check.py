"""`scripts/gpu_check` survives hangs and crashes of its steps and records the results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = ROOT / "benchmarks" / "gpu"
sys.path.insert(0, str(HERE))

import check  # noqa: E402
from processes import MARK, Step, run_step  # noqa: E402
from records import LARGEST, Outcome, Record, cell  # noqa: E402

sys.path.remove(str(HERE))

PRINTS = 'import json; print(json.dumps({"what": "first", "value": 0.25}), flush=True)\n'
CHILD = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
HANGS = "import time; time.sleep(600)\n"


def step(folder: Path, name: str, code: str, share: float = 1.0) -> Step:
    path = folder / f"{name}.py"
    path.write_text(code)
    return Step(name, [sys.executable, str(path)], share)


@pytest.fixture
def record(tmp_path) -> Iterator[Record]:
    with Record(tmp_path / "out", "a check") as opened:
        yield opened


@pytest.fixture
def run_steps(record) -> Callable[..., list[Outcome]]:
    """Function that runs steps within a total time and returns their outcomes."""

    def run(*steps: Step, seconds: float = 60.0) -> list[Outcome]:
        record.outcomes = []
        return check.run_steps(steps, time.monotonic() + seconds, dict(os.environ), record)

    return run


def results(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]


def processes_of(name: str) -> list[int]:
    """Living processes that a step of this test process started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={name}-{os.getpid()}-".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_a_hanging_step_is_killed_and_reported_and_the_next_one_runs(tmp_path, record, run_steps):
    hanging = step(tmp_path, "hanging", PRINTS + "print('here it hangs', flush=True)\n" + HANGS, share=4)
    after = step(tmp_path, "after", PRINTS, share=20)
    outcomes = run_steps(hanging, after, seconds=24)
    assert [each.line for each in outcomes] == ["timed out after 4 s", "ok"]
    assert [each["step"] for each in results(tmp_path) if each.get("what") == "first"] == ["hanging", "after"]
    assert "time.sleep(600)" not in record.text()
    assert "Current thread" in record.text()  # the fault handler says where
    assert "here it hangs" in record.text()
    assert processes_of("hanging") == []


def test_a_step_that_ignores_signals_is_killed_with_its_children(tmp_path, record):
    code = "import signal, subprocess, sys\nsignal.signal(signal.SIGABRT, signal.SIG_IGN)\n" + CHILD + HANGS
    outcome = run_step(step(tmp_path, "deaf", code), 1.5, dict(os.environ), record)
    assert outcome.status == "timed out after 2 s"
    assert processes_of("deaf") == []


def test_processes_that_a_step_leaves_running_are_killed(tmp_path, run_steps):
    code = "import subprocess, sys\n" + CHILD
    outcomes = run_steps(step(tmp_path, "leaving", code))
    assert outcomes[0].status == "ok"
    assert processes_of("leaving") == []  # it held the step's output open


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "failed: signal SIGSEGV"),
        ("raise SystemExit(3)", "failed: exit code 3"),
        (
            """print('{"what": "a", "ok": true}\\n{"what": "b", "ok": false, "reason": "no"}')""",
            "failed: 1 of 2 results",
        ),
    ],
)
def test_a_failing_step_is_reported_and_the_next_one_runs(tmp_path, record, run_steps, code, line):
    outcomes = run_steps(step(tmp_path, "bad", code), step(tmp_path, "after", PRINTS))
    assert [each.line for each in outcomes] == [line, "ok"]
    assert [each.is_ok for each in outcomes] == [False, True]
    assert results(tmp_path)[-3]["ended"] == line
    assert f"| bad | {line} |" in record.text()


def test_results_are_separated_from_other_output(tmp_path, run_steps):
    code = "print('plain\\n[1, 2]\\n3\\n{\"what\": \"x\"')\nimport sys; sys.stderr.write('wrong\\n')\n" + PRINTS
    run_steps(step(tmp_path, "mixed", code))
    first, ended = results(tmp_path)
    assert {"step": "mixed", "what": "first", "value": 0.25}.items() <= first.items()
    assert ended["ended"] == "ok"
    log = (tmp_path / "out" / "log.txt").read_text().splitlines()
    assert {"plain", "[1, 2]", "3", '{"what": "x"', "wrong"} <= set(log)


def test_unused_time_goes_to_later_steps_and_steps_beyond_the_limit_are_not_run(tmp_path, run_steps):
    limits = "import os, json; print(json.dumps({'limit': float(os.environ['CNNRUN_GPU_CHECK_SECONDS'])}))"
    steps = [step(tmp_path, name, limits, share) for name, share in (("quick", 30), ("next", 10))]
    outcomes = run_steps(*steps, seconds=80)
    quick, after = (each.results[0]["limit"] for each in outcomes)
    assert quick == pytest.approx(60, abs=1)
    assert after == pytest.approx(80 - outcomes[0].seconds, abs=1)
    outcomes = run_steps(*steps, seconds=0)
    assert [each.status for each in outcomes] == ["not run: time was up"] * 2
    assert not any(each.is_ok for each in outcomes)


RUNNER = """
import sys, time
sys.path.append({here!r})
import check, os
from pathlib import Path
from processes import Step
from records import Record
steps = [Step(name, [sys.executable, name + ".py"], 1.0, Path({folder!r})) for name in ("hanging", "after")]
found = check.run_steps(steps, time.monotonic() + 600, dict(os.environ), Record(Path({folder!r}) / "out", "a check"))
sys.exit(0 if all(each.is_ok for each in found) else 1)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_runner_keeps_the_results_so_far(tmp_path, number):
    code = PRINTS + "import os; print(json.dumps({'what': 'second', 'pid': os.getpid()}), flush=True)\n" + HANGS
    step(tmp_path, "hanging", code)
    step(tmp_path, "after", PRINTS)
    runner = subprocess.Popen([sys.executable, "-c", RUNNER.format(here=str(HERE), folder=str(tmp_path))])
    wanted, deadline = tmp_path / "out" / "results.jsonl", time.monotonic() + 60
    while not wanted.exists() or b"second" not in wanted.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    runner.send_signal(number)
    code = runner.wait(30)
    found = results(tmp_path)
    assert [each["what"] for each in found[:2]] == ["first", "second"]
    if number == signal.SIGKILL:
        assert len(found) == 2
        os.kill(found[1]["pid"], signal.SIGKILL)
        return
    assert code == 1
    assert [each["ended"] for each in found[2:]] == ["stopped", "not run: stopped by SIGTERM"]
    assert not Path(f"/proc/{found[1]['pid']}").exists()
    assert "| after | not run: stopped by SIGTERM | 0 |" in (tmp_path / "out" / "summary.md").read_text()


def test_result_files_stay_below_the_size_limit(tmp_path, record):
    for _ in range(40):
        record.log("x" * (1 << 20))
        record.add(Outcome("many"), 0.0, json.dumps({"what": "y" * (1 << 20)}))
    assert all(path.stat().st_size < LARGEST + (2 << 20) for path in (tmp_path / "out").iterdir())


def test_the_summary_of_many_results_shows_failures_and_skips(record):
    many = [{"what": "test", "name": f"number {place}"} for place in range(50)]
    many[7] |= {"ok": False, "reason": "wrong"}
    many[9] |= {"skipped": "no device"}
    record.outcomes = [Outcome("tests", "ok", 1.0, many)]
    text = record.text()
    assert "48 of 50 results of **test** are in results.jsonl alone." in text
    assert [place for place in range(50) if f"| number {place} |" in text] == [7, 9]
    record.outcomes = [Outcome("tests", "ok", 1.0, many[10:] + many[10:12])]
    assert record.text().splitlines()[-1] == "42 of 42 results of **test** are in results.jsonl alone."
    record.outcomes = [Outcome("tests", "ok", 1.0, many[:40])]
    assert "| number 39 |" in record.text()


def test_the_summary_lists_steps_then_results_then_failures(tmp_path, record):
    record.note("missing: nothing")
    speeds = [{"what": "speed", "net": net, "images": 12345.6, "ok": True} for net in ("lenet", "a|b")]
    bad = {"what": "bits", "ok": False, "reason": "3 tensors differ", "lines": ["one", "two"], "case": "rich"}
    record.outcomes = [
        Outcome("speed", "ok", 12.4, [*speeds, {"what": "device", "name": "none"}]),
        Outcome("bits", "ok", 3.0, [bad]),
        Outcome("late", "failed: exit code 7", 1.0, [], ["last line"]),
    ]
    record.write_summary()
    text = (tmp_path / "out" / "summary.md").read_text()
    assert text == record.text()
    ordered = [
        "# a check", "- missing: nothing", "| step | outcome | seconds |", "| speed | ok | 12 |",
        "| bits | failed: 1 of 1 results | 3 |", "| late | failed: exit code 7 | 1 |",
        "## speed", "| net | images | ok |", "| lenet | 12,346 | yes |",
        "| a\\|b | 12,346 | yes |", "- **device**: name none",
        "## bits", "## Failures", "- bits, bits (case rich): 3 tensors differ", "one\ntwo",
        "- late failed: exit code 7; its last lines:", "last line",
    ]  # fmt: skip
    places = [text.index(each) for each in ordered]
    assert places == sorted(places)
    assert [cell(value) for value in (True, None, 0.123456, 7, [1, "a"], "a\nb")] == [
        "yes",
        "",
        "0.1235",
        "7",
        '[1, "a"]',
        "a b",
    ]


SUITE = """
import time, warnings
import pytest

def test_right(): print("captured")

def test_wrong():
    warnings.warn("old", DeprecationWarning)
    warnings.warn("older", DeprecationWarning)
    assert [1] == [2]

def test_skipped(): pytest.skip("no device")

@pytest.fixture
def broken(): raise OSError("no file")

def test_broken(broken): pass

def test_waits(): time.sleep(600)

def test_last(): pass
"""


def test_each_test_is_recorded_as_it_ends(tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pytest_results", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "CNNRUN_GPU_CHECK_SECONDS": "3"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    tests = [each for each in lines if each["what"] == "test"]
    assert [each["outcome"] for each in tests] == ["passed", "failed", "skipped", "failed in setup", "failed", "passed"]
    assert [each.get("ok") for each in tests] == [None, False, None, False, False, None]
    assert "TimeoutError: test_suite.py::test_waits: not done after 1 s" in "\n".join(tests[4]["lines"])
    assert [each["reason"] for each in tests if "reason" in each] == [
        "assert [1] == [2]",
        "OSError: no file",
        "TimeoutError: test_suite.py::test_waits: not done after 1 s",
    ]
    assert "assert [1] == [2]" in "\n".join(tests[1]["lines"])
    assert tests[2]["skipped"] == "Skipped: no device"
    assert [each["text"] for each in lines if each["what"] == "warning"] == ["old"]
    assert lines[-1]["what"] == "session"
    assert lines[-1]["warnings"] == {"DeprecationWarning": 2}
    assert (lines[-1]["collected"], lines[-1]["failed"], lines[-1]["exit"]) == (6, 3, 1)
    assert "begun: test_suite.py::test_right" in done.stdout.splitlines()


def test_every_file_of_cuda_tests_is_listed():
    text = (HERE / "tests.py").read_text()
    namespace: dict[str, object] = {}
    exec(next(line for line in text.splitlines() if line.startswith("FILES")), namespace)
    marked = [
        path for path in (ROOT / "tests").rglob("test_*.py") if "\npytestmark = pytest.mark.cuda" in path.read_text()
    ]
    assert sorted(namespace["FILES"]) == sorted(str(path.relative_to(ROOT)) for path in marked)


def test_a_missing_device_is_one_line(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    command = [str(ROOT / "scripts" / "gpu_check"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (6, "")
    assert done.stderr.splitlines() == [f"gpu_check: {sys.executable} has no CUDA device; --rehearse runs on a CPU"]
    assert not (tmp_path / "out").exists()


def test_a_rehearsal_records_the_environment(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "TORCHDYNAMO_DISABLE": "1"}
    command = [str(ROOT / "scripts" / "gpu_check"), "--rehearse", "--only", "environment", "--minutes", "2"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "results.jsonl", "summary.md"]
    assert (tmp_path / "out" / "summary.md").read_text().strip() == done.stdout.strip()
    kinds = [each.get("what") for each in results(tmp_path)]
    assert kinds == ["software", "packages", "device", "copy", "matmul", "matmul", "matmul", "compile", None]
