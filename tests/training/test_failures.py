"""Failures while training: non-finite values, out of memory, reads that hang, files that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cnnrun.base.errors import DataError, NonFiniteError, ResourceError
from cnnrun.data import image_files
from cnnrun.data.decode import ReadTimeoutError, ThreadedMap
from cnnrun.experiment import schema
from cnnrun.results.studies.train_run import train_run
from cnnrun.tasks.classification import CrossEntropy
from cnnrun.training import checkpoints
from cnnrun.training.learner import Learner
from tests.support.configs import tiny_experiment
from tests.support.forked_processes import fork, outcome
from tests.support.forked_python import run_python
from tests.support.images import save_class_folders
from tests.support.non_finite_values import PLACES, poison_weight

CPU = torch.device("cpu")
BAD = [float("nan"), float("inf")]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", PLACES)
def test_a_non_finite_value_stops_training_in_its_step_and_is_never_saved(tmp_path, monkeypatch, place, value):
    poison, named = PLACES[place]
    poison(monkeypatch, 20, value)
    made = tiny_experiment(
        "train.ema={decay: 0.9}", "data.augment={rotate: 4}", "train.save_every=1", "train.keep=1000"
    )
    with pytest.raises(NonFiniteError) as stopped:
        train_run(made, tmp_path, CPU, resume=False)
    assert stopped.value.exit_code == 4
    lines = stopped.value.lines
    assert f"at step {19 if place == 'weight' else 20}; this step is not saved" in lines[0]
    assert named in lines[1]
    assert "digits[" in lines[2]
    found = checkpoints.list_checkpoints(tmp_path / "tiny" / "1" / "checkpoints")
    assert [int(path.name[5:]) for path in found] == list(range(1, 20 if place == "weight" else 21))
    for path in found:
        for part in checkpoints.load(path).parts.values():
            assert all(tensor.isfinite().all() for tensor in part.values())


def test_a_non_finite_weight_stops_training_before_it_is_used_again(tmp_path, monkeypatch):
    poison_weight(monkeypatch, 20, float("nan"))
    with pytest.raises(NonFiniteError, match="at step 20;.*\n.*layers.linear1.linear .its weight"):
        train_run(tiny_experiment(), tmp_path, CPU, resume=False)


def test_non_finite_momentum_is_never_saved(tmp_path, monkeypatch):
    real = Learner.update_weights

    def poisoned(self, step, factor):
        real(self, step, factor)
        if step == 16:  # the last step of an epoch
            next(iter(self.optimizer.state.values()))["momentum_buffer"].fill_(float("nan"))

    monkeypatch.setattr(Learner, "update_weights", poisoned)
    with pytest.raises(NonFiniteError, match="at step 16.*\n.*optimizer momentum_buffer:layers"):
        train_run(tiny_experiment(), tmp_path, CPU, resume=False)
    assert not checkpoints.list_checkpoints(tmp_path / "tiny" / "1" / "checkpoints")


def state(run: Path) -> tuple[object, ...]:
    saved = checkpoints.load_newest(run / "checkpoints", "latest", pytest.fail)
    tensors = {part: {name: value.tolist() for name, value in of.items()} for part, of in saved.parts.items()}
    return tensors, saved.state, (run / "metrics.jsonl").read_bytes()


RICH = ["train.ema={decay: 0.9}", "data.augment={shift: 0.2, rotate: 8, mixup: 0.2}"]


def limit_memory(monkeypatch, most: int, raised: type[Exception] = torch.OutOfMemoryError) -> None:
    """Limit memory to `most` images at a time; it runs out in the loss, after the forward pass."""
    real = CrossEntropy.forward

    def forward(self, outputs, targets):
        if torch.is_grad_enabled() and len(outputs) > most:
            raise raised("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return real(self, outputs, targets)

    monkeypatch.setattr(CrossEntropy, "forward", forward)


@pytest.mark.parametrize("raised", [torch.OutOfMemoryError, RuntimeError, MemoryError])
@pytest.mark.parametrize(("most", "given", "expected"), [(63, 1, 2), (32, 1, 2), (20, 1, 4), (10, 3, 12)])
def test_running_out_of_memory_equals_training_with_smaller_micro_batches(
    tmp_path, monkeypatch, capfd, most, given, expected, raised
):
    with monkeypatch.context() as patched:
        limit_memory(patched, most, raised)
        made = tiny_experiment(*RICH, f"train.accumulate={given}")
        short = Path(train_run(made, tmp_path / "short", CPU, resume=False)["run"])
    assert f"memory ran out at step 0: continuing with {2 * given} micro-batches" in capfd.readouterr().err
    made = tiny_experiment(*RICH, f"train.accumulate={expected}")
    asked = Path(train_run(made, tmp_path / "asked", CPU, resume=False)["run"])
    assert state(short) == state(asked)


def test_micro_batches_split_for_lack_of_memory_stay_split_on_resume(tmp_path, monkeypatch):
    """Memory runs out at step 20 in both runs; one is stopped at step 25 and resumed with enough memory."""
    real = Learner.backward

    def run(root: Path, stop: int | None) -> Path:
        with monkeypatch.context() as patched:

            def backward(self, batch, step):
                if step == stop:
                    os.kill(os.getpid(), 15)
                if step == 20 and len(batch.micro_sizes) == 1:
                    raise MemoryError
                return real(self, batch, step)

            patched.setattr(Learner, "backward", backward)
            if stop is None:
                return Path(train_run(tiny_experiment(*RICH), root, CPU, resume=True)["run"])
            with pytest.raises(BaseException, match="stopped at step 26"):
                train_run(tiny_experiment(*RICH), root, CPU, resume=True)
        return Path(train_run(tiny_experiment(*RICH), root, CPU, resume=True)["run"])

    assert state(run(tmp_path / "whole", None)) == state(run(tmp_path / "cut", 25))


def test_too_little_memory_for_the_smallest_micro_batch_is_an_error(tmp_path, monkeypatch):
    limit_memory(monkeypatch, 1)
    with pytest.raises(ResourceError, match="as small as they can be .batch norm needs"):
        train_run(tiny_experiment(), tmp_path, CPU, resume=False)
    plain = "model=[flatten]"
    limit_memory(monkeypatch, 0)
    with pytest.raises(ResourceError, match="as small as they can be .one image"):
        train_run(tiny_experiment(plain), tmp_path, CPU, resume=False)


def test_a_step_that_ran_out_of_memory_leaves_no_partial_gradient(tmp_path, monkeypatch):
    """The first of two micro-batches has its gradient before memory runs out for the second."""
    plain, real, calls = "model=[flatten, {linear: 8}]", CrossEntropy.forward, []

    def forward(self, outputs, targets):
        calls.append(len(outputs))
        if len(calls) == 2:
            raise MemoryError
        return real(self, outputs, targets)

    with monkeypatch.context() as patched:
        patched.setattr(CrossEntropy, "forward", forward)
        made = tiny_experiment(plain, "train.accumulate=2")
        short = Path(train_run(made, tmp_path / "short", CPU, resume=False)["run"])
    asked = train_run(tiny_experiment(plain, "train.accumulate=4"), tmp_path / "asked", CPU, resume=False)["run"]
    assert calls[:4] == [32, 32, 16, 16]
    assert state(short) == state(Path(asked))


def test_micro_batches_shrink_to_one_image_if_needed(tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patched:
        limit_memory(patched, 1)
        train_run(tiny_experiment("model=[flatten]", "train.epochs=1"), tmp_path, CPU, resume=False)
    assert "continuing with 64 micro-batches" in capfd.readouterr().err


def test_other_errors_of_the_network_are_not_treated_as_out_of_memory(tmp_path, monkeypatch):
    def forward(self, outputs, targets):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(CrossEntropy, "forward", forward)
    with pytest.raises(RuntimeError, match="mat1"):
        train_run(tiny_experiment(), tmp_path, CPU, resume=False)


# --- reads that hang -------------------------------------------------------------------------------------------------


def folder_experiment(root: Path, *more: str) -> schema.Experiment:
    source = f"source: {{folder: '{root}'}}, image: {{size: 8, channels: 1}}, split: {{val: 0.2}}, timeout: 0.5"
    return tiny_experiment(f"data={{{source}, cache_dir: '{root.parent / 'cache'}'}}", "train.batch=8", *more)


def hang_reading(monkeypatch, name: str, when) -> None:
    """Make reading the file hang once `when()` is true."""
    real = image_files.read_image_bytes

    def read(item, *rest):
        if str(item).endswith(name) and when():
            time.sleep(1000)
        return real(item, *rest)

    monkeypatch.setattr("cnnrun.data.decode.read_image_bytes", read)


def train_in_child(made: schema.Experiment, root: Path) -> tuple[object, float]:
    """Train in a child process; return what it returned or raised, and the seconds it took."""
    began = time.monotonic()
    found = outcome(*fork(lambda: train_run(made, root, CPU, resume=True)))
    return found, time.monotonic() - began


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_read_that_hangs_ends_the_decoding_and_is_named(tmp_path, monkeypatch, workers):
    root = save_class_folders(tmp_path / "pets")
    with monkeypatch.context() as patched:
        hang_reading(patched, "dog/7.png", lambda: True)
        found, seconds = train_in_child(folder_experiment(root, f"data.workers={workers}"), tmp_path / "runs")
    assert isinstance(found, ReadTimeoutError), found
    assert found.exit_code == 6
    assert "dog/7.png for 0.5 s; check the disk or raise data.timeout" in str(found)
    assert seconds < 15
    found, _ = train_in_child(folder_experiment(root), tmp_path / "runs")  # the next start works
    assert isinstance(found, dict), found


@pytest.mark.parametrize(("workers", "prefetch"), [(2, 2), (1, 2), (2, 0)])
def test_an_image_read_that_hangs_ends_the_training_after_saving(tmp_path, monkeypatch, workers, prefetch):
    root = save_class_folders(tmp_path / "pets")
    settings = ["data.cache=none", f"data.workers={workers}", f"data.prefetch={prefetch}", "train.epochs=40"]
    monkeypatch.setattr("cnnrun.data.training_batches.AHEAD_BYTES", 1)
    whole = folder_experiment(root, *settings, f"data.cache_dir={tmp_path / 'other'}")
    expected = Path(train_run(whole, tmp_path / "whole", CPU, resume=False)["run"])
    with monkeypatch.context() as patched:
        run = tmp_path / "runs" / "tiny" / "1"
        hang_reading(patched, "dog/7.png", (run / "checkpoints" / "latest").exists)
        found, seconds = train_in_child(folder_experiment(root, *settings), tmp_path / "runs")
    assert isinstance(found, ReadTimeoutError), found
    assert "dog/7.png for" in str(found)
    assert seconds < 20
    assert train_in_child(folder_experiment(root, *settings), tmp_path / "runs")[0]["run"] == str(run)
    assert state(run) == state(expected)


@pytest.mark.parametrize("ahead", [1, 8 << 20])
def test_a_disk_that_hangs_ends_the_training(tmp_path, monkeypatch, ahead):
    """Every read hangs, not only that of one image."""
    root = save_class_folders(tmp_path / "pets")
    monkeypatch.setattr("cnnrun.data.training_batches.AHEAD_BYTES", ahead)
    made = folder_experiment(root, "data.cache=none", "data.workers=2", "train.epochs=60")
    with monkeypatch.context() as patched:
        run = tmp_path / "runs" / "tiny" / "1"
        hang_reading(patched, ".png", (run / "checkpoints" / "latest").exists)
        found, seconds = train_in_child(made, tmp_path / "runs")
    assert isinstance(found, ReadTimeoutError), found
    assert seconds < 20
    assert "no data from" in str(found)


def test_running_out_of_memory_while_evaluating_splits_the_batches(tmp_path, monkeypatch, capfd):
    real = CrossEntropy.forward

    def forward(self, outputs, targets):
        if not torch.is_grad_enabled() and len(outputs) > 40:
            raise MemoryError
        return real(self, outputs, targets)

    monkeypatch.setattr(CrossEntropy, "forward", forward)
    train_run(tiny_experiment(), tmp_path, CPU, resume=False)
    assert "memory ran out while evaluating after step 17: continuing with 2 micro-batches" in capfd.readouterr().err


def test_an_epoch_whose_evaluation_fails_is_saved_and_evaluated_on_resume(tmp_path, monkeypatch):
    root = save_class_folders(tmp_path / "pets")
    made = folder_experiment(root, "data.cache=none", "train.epochs=3", f"data.cache_dir={tmp_path / 'one'}")
    expected = Path(train_run(made, tmp_path / "whole", CPU, resume=False)["run"])
    real, calls = Learner.evaluate, []

    def failing(self, split, batch, between):
        calls.append(split)
        if len(calls) == 2:
            raise DataError("a picture of val is gone")
        return real(self, split, batch, between)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "evaluate", failing)
        with pytest.raises(DataError):
            train_run(made, tmp_path / "cut", CPU, resume=True)
    run = tmp_path / "cut" / "tiny" / "1"
    saved = checkpoints.load_newest(run / "checkpoints", "latest", pytest.fail)
    assert saved.state["training"]["step"] == 2 * saved.state["training"]["evaluated"]
    train_run(made, tmp_path / "cut", CPU, resume=True)
    assert state(run) == state(expected)


WRITERS = [
    "cnnrun.training.metrics_log.EventFile.__init__",  # the event file cannot be created
    "cnnrun.training.metrics_log.EventFile.add_scalar",
    "cnnrun.training.metrics_log.EventFile.add_image",
    "cnnrun.training.metrics_log.EventFile.add_images",
    "cnnrun.training.metrics_log._draw_confusion_matrix",
    "cnnrun.training.loop.TrainingLoop._draw_val",
    "matplotlib.axes.Axes.set_xticks",
    "matplotlib.axes.Axes.text",
    "matplotlib.backends.backend_agg.FigureCanvasAgg.draw",
]
FAILURES = [
    OSError(28, "No space left on device"),
    PermissionError(13, "Permission denied"),
    UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"),
    RuntimeError("in FT2Font: invalid argument"),
    MemoryError(),
    ImportError("No module named tensorboard"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_failing_figure_never_fails_the_training(tmp_path, monkeypatch, capfd, writer, failure):
    def fail(*arguments, **settings):
        raise failure

    expected = state(Path(train_run(tiny_experiment(), tmp_path / "whole", CPU, resume=False)["run"]))
    capfd.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(writer, fail)
        run = Path(train_run(tiny_experiment(), tmp_path / "failing", CPU, resume=False)["run"])
    assert (run / "result.json").exists()
    assert state(run) == expected
    said = [line for line in capfd.readouterr().err.splitlines() if "TensorBoard is turned off for this run" in line]
    assert len(said) == 1, "once, in our words"
    assert "the training continues" in said[0]


def test_a_failing_report_never_fails_the_training(tmp_path, monkeypatch, run_cli, tiny):
    def fail(*arguments, **settings):
        raise ZeroDivisionError("a bug\n\x1b[31min red")

    monkeypatch.setattr("cnnrun.results.report.writer.render_page", fail)
    code, _, err = run_cli("train", tiny, "--runs", tmp_path / "runs")
    assert code == 0
    assert "report.html was not written: ZeroDivisionError: a bug\\n\\x1b[31min red; `cnnrun report" in err


def test_a_closed_standard_error_never_fails_the_training(tmp_path, tiny):
    words = ["-m", "cnnrun", "train", str(tiny), "--runs", str(tmp_path / "runs"), "--no-report"]
    command = " ".join(["exec", sys.executable, *words, "2>&-"])
    closed = subprocess.run(["bash", "-c", command], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(["true"], stdin=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None
        without_reader = run_python(words, tmp_path, stderr=reader.stdin)
    with Path("/dev/full").open("w") as full:
        results = [closed, without_reader, *(run_python(words, tmp_path, stderr=full) for _ in range(3))]
        for result in results:
            assert result.returncode == 0
            assert "best at step" in result.stdout
        for words, code in ((["train", "none.yaml"], 2), (["eval", "none"], 3)):
            assert run_python(["-m", "cnnrun", *words], tmp_path, stderr=full).returncode == code


def test_an_image_file_deleted_while_training_ends_the_run_after_saving(tmp_path, monkeypatch):
    root = save_class_folders(tmp_path / "pets")
    real = Learner.backward

    def backward(self, batch, step):
        if step == 7:
            (root / "cat" / "3.png").rename(root / "away")
        return real(self, batch, step)

    monkeypatch.setattr(Learner, "backward", backward)
    with pytest.raises(DataError, match="3.png"):
        train_run(folder_experiment(root, "data.cache=none", "train.epochs=9"), tmp_path / "runs", CPU, resume=True)
    saved = checkpoints.load_newest(tmp_path / "runs" / "tiny" / "1" / "checkpoints", "latest", pytest.fail)
    assert saved.state["training"]["step"] > 5


def test_slow_reads_do_not_time_out():
    pool = ThreadedMap(2, 0.3)
    assert pool(lambda item: time.sleep(0.2) or item, range(8)) == list(range(8))
    with pytest.raises(ReadTimeoutError):
        pool(lambda item: time.sleep(1.0) or item, range(2))


@pytest.mark.slow
def test_the_command_exits_although_a_reading_thread_hangs(tmp_path):
    root = save_class_folders(tmp_path / "pets")
    program = (
        "import sys, time\n"
        "from cnnrun.commands import app as cli; from cnnrun.data import image_files as pictures\n"
        "import cnnrun.data.decode as decoding\n"
        "real = decoding.read_image_bytes\n"
        "def read(item, *rest):\n"
        "    if str(item).endswith('dog/7.png'):\n"
        "        time.sleep(1000)\n"
        "    return real(item, *rest)\n"
        "decoding.read_image_bytes = read\n"
        f"sys.argv = ['cnnrun', 'train', '{tmp_path / 'c.yaml'}']\n"
        "cli.main()\n"
    )
    (tmp_path / "c.yaml").write_text(
        f"task: classify\ndata: {{source: {{folder: '{root}'}}, image: {{size: 8, channels: 1}}, timeout: 0.5, "
        f"cache_dir: '{tmp_path / 'cache'}', workers: 2}}\nmodel: [flatten]\n"
    )
    left = run_python(["-c", program], tmp_path, timeout=60)
    assert left.returncode == 6
    assert left.stderr.endswith("dog/7.png for 0.5 s; check the disk or raise data.timeout\n")
    assert "Traceback" not in left.stderr
