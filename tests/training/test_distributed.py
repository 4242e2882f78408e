"""Several ranks train like one process: the same order and evaluation, and weights equal up to rounding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cnnrun.base.errors import ConfigError, DataError, InterruptionError, NonFiniteError, OtherRankError, ResourceError
from cnnrun.base.ranks import Ranks, has_gpu_of_its_own, join_ranks
from cnnrun.data import decode
from cnnrun.data.dataset import Examples
from cnnrun.data.training_batches import TrainingBatches, compute_share
from cnnrun.experiment import assemble, open_run
from cnnrun.results.studies.train_run import train_run
from cnnrun.training import checkpoints
from cnnrun.training.evaluation import measure_split
from cnnrun.training.learner import Learner
from tests.support.configs import TINY, tiny_experiment
from tests.support.forked_processes import fork, free_port, outcome, rank_environment, run_on_ranks, wait_for
from tests.support.forked_python import ForkedPython
from tests.support.images import save_picture

CPU = torch.device("cpu")
PLAIN = "model=[{conv: {out_channels: 4, activation: relu}}, max_pool, flatten, {linear: {out_features: 16}}]"
NORMED = "model=[{conv: {out_channels: 4, norm: batch, activation: relu}}, {conv: 4}, batch_norm, flatten]"
STEPS = ["train.epochs=4", "train.batch=60", "data.augment={shift: 0.2, rotate: 8, mixup: 0.3}"]


class SilentRank(Ranks):
    """A rank that never communicates with the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.world_size = rank, size


def train_on_ranks(
    root: Path, size: int, *overrides: str, resume: bool = False, extend: Path | None = None
) -> list[object]:
    """Train on `size` ranks and return what each rank returned or raised."""

    def run(rank: int) -> object:
        return train_run(tiny_experiment(*overrides), root, CPU, resume, extend=extend)

    return [run(0)] if size == 1 else run_on_ranks(size, run)


def newest_checkpoint(root: Path) -> checkpoints.Checkpoint:
    found = checkpoints.load_newest(root / "tiny" / "1" / "checkpoints", "latest", pytest.fail)
    assert found is not None
    return found


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 6), st.sampled_from([0, 1, 3]))
def test_shares_are_a_partition_of_each_micro_batch(whole, parts, size, partners):
    shares = [compute_share(whole, parts, SilentRank(rank, size), partners) for rank in range(size)]
    assert sorted(torch.cat([each.needed_indices[each.own_indices] for each in shares]).tolist()) == list(range(whole))
    for each in shares:
        assert sum(each.micro_sizes) == len(each.own_indices)
        places = each.needed_indices[each.own_indices]
        expected = (places[:, None] + torch.arange(1, partners + 1)) % whole
        assert torch.equal(each.needed_indices[each.partner_indices[each.own_indices]], expected)
    if size == 1:
        assert torch.equal(shares[0].needed_indices, torch.arange(whole))


@pytest.mark.parametrize("augment", ["{shift: 0.2, flip: horizontal}", "{rotate: 9, mixup: 0.4, cutmix: 0.6}"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_read_the_batches_of_one_process(augment, accumulate, size):
    made = tiny_experiment(f"data.augment={augment}", "train.batch=49", "train.drop_last=false")
    setup = assemble.build_setup(made, assemble.prepare_dataset(made), None, CPU)
    alone = setup.batches(accumulate)
    others = [setup_of(setup, SilentRank(rank, size)).batches(accumulate) for rank in range(size)]
    for step in (0, 1, 20, 22, 23, 47):
        whole, shares = alone.at(step), [each.at(step) for each in others]
        for number, micro in enumerate(whole.micro_batches()):
            ours = [each.micro_batches()[number] for each in shares]
            assert torch.equal(torch.cat([part.index_B for part in ours]), micro.index_B)
            assert torch.equal(torch.cat([part.images for part in ours]), micro.images)
            assert torch.equal(torch.cat([part.targets["labels"] for part in ours]), micro.targets["labels"])


def setup_of(setup, ranks):
    return replace(setup, ranks=ranks)


def _select_first(examples: Examples, count: int) -> Examples:
    kept = torch.zeros(len(examples), dtype=torch.bool)
    kept[:count] = True
    return examples.select(kept)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_evaluation_by_ranks_equals_that_of_one_process(trained_run, size):
    """99 cases per number of ranks: 1 to 33 samples in batches of 1, 4 and 7."""
    made, given_ = open_run.open_trained(trained_run, trained_run.parent.parent, CPU)
    examples = assemble.prepare_dataset(made).splits["val"]
    cases = [(count, batch) for count in range(1, 34) for batch in (1, 4, 7)]

    def measure_cases(ranks: Ranks) -> list[object]:
        found = []
        for count, batch in cases:
            part = _select_first(examples, count)
            found.append(measure_split(given_.to_measure(), part, batch, ranks))
        return found

    def run(rank: int) -> list[object]:
        with join_ranks(CPU, 60) as ranks:
            return measure_cases(ranks)

    alone = measure_cases(Ranks())
    assert len(alone) == 99
    assert sum(alone[-1].matrices["confusion"][0]) > 0
    for found in run_on_ranks(size, run):
        assert found == alone


@pytest.mark.parametrize("model", [[PLAIN], [NORMED, "train.sync_batch_norm=true"]], ids=["plain", "sync"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_weights_trained_by_ranks_equal_those_of_one_process_up_to_rounding(tmp_path, model, accumulate):
    """Compare the largest difference of each tensor after 76 steps, relative to its largest value.

    Two threads in one process differ as much: batch norm and ReLU amplify rounding, at higher learning rates without
    bound (benchmarks/reliability.md).
    """
    settings = [*model, *STEPS, f"train.accumulate={accumulate}", "train.ema={decay: 0.9}"]
    settings += ["train.optimizer={sgd: {lr: 0.02, momentum: 0.9}}"]
    for size in (1, 2, 4):
        for result in train_on_ranks(tmp_path / str(size), size, *settings):
            assert isinstance(result, dict), result
            assert result["steps"] > 60
    one = newest_checkpoint(tmp_path / "1")
    for size in (2, 4):
        other = newest_checkpoint(tmp_path / str(size))
        for part in ("model", "ema"):
            for name, value in one.parts[part].items():
                gap = float((other.parts[part][name] - value).abs().max()) / float(value.abs().max())
                assert gap <= 1e-5, (size, part, name, gap)
    if "sync_batch_norm" not in model[-1]:
        return
    # Negative control: separate batch norm on each rank gives different weights.
    for result in train_on_ranks(tmp_path / "apart", 2, *settings, "train.sync_batch_norm=false"):
        assert isinstance(result, dict), result
    other = newest_checkpoint(tmp_path / "apart").parts["model"]
    assert max(float((other[name] - value).abs().max()) for name, value in one.parts["model"].items()) > 1e-3


def test_batch_norm_statistics_of_the_ranks_are_averaged():
    made = tiny_experiment(NORMED, "train.batch=40")
    learner = Learner(assemble.build_setup(made, assemble.prepare_dataset(made), None, CPU))
    measured = [[torch.rand_like(value) for value in learner.batch_norm_statistics] for _ in range(3)]
    expected = [torch.stack(of_all).mean(0) for of_all in zip(*measured, strict=True)]

    class Three(SilentRank):
        """The first of three ranks, which receives what the other two measured."""

        def all_reduce_sum(self, tensors):
            for tensor, *others in zip(tensors, *measured[1:], strict=False):
                tensor.add_(others[0]).add_(others[1])

    for value, own in zip(learner.batch_norm_statistics, measured[0], strict=True):
        value.copy_(own)
    made_of = replace(assemble.build_setup(made, assemble.prepare_dataset(made), None, CPU), ranks=Three(0, 3))
    learner.setup = made_of
    learner.all_reduce_gradients(torch.zeros(()))
    assert len(expected) == 4  # mean and variance of both batch norms
    for value, mean in zip(learner.batch_norm_statistics, expected, strict=True):
        torch.testing.assert_close(value, mean)


def digest(root: Path) -> tuple[object, ...]:
    found = newest_checkpoint(root)
    tensors = {part: {name: value.tolist() for name, value in of.items()} for part, of in found.parts.items()}
    return tensors, found.state["training"], (root / "tiny" / "1" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("size", "more"), [(2, ["train.freeze=conv1", "train.freeze_epochs=1"]), (3, [])], ids=["frozen first", "3 ranks"]
)
def test_training_by_ranks_repeats_and_resumes_bit_for_bit(tmp_path, monkeypatch, size, more):
    """With separate batch norm on each rank, dropout and EMA; stopped by a signal to one rank.

    With three ranks the result depends on the order of a sum (benchmarks/ddp_resume.py).
    """
    settings = ["train.epochs=3", "train.ema={decay: 0.9}", "data.augment={shift: 0.2}", *more]
    for name in ("a", "b"):
        assert all(isinstance(each, dict) for each in train_on_ranks(tmp_path / name, size, *settings))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    real = Learner.backward

    def stepping(self, batch, step):
        if step == 20 and self.setup.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, step)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "backward", stepping)
        for stopped in train_on_ranks(tmp_path / "c", size, *settings, resume=True):
            assert isinstance(stopped, InterruptionError), stopped
            assert "stopped at step 21 " in stopped.lines[0]
    assert all(isinstance(each, dict) for each in train_on_ranks(tmp_path / "c", size, *settings, resume=True))
    assert digest(tmp_path / "c") == digest(tmp_path / "a")


def test_a_run_of_two_ranks_is_extended_by_two_ranks_to_the_same_bits(tmp_path):
    stable = ("train.schedule={warmup_stable_decay: {decay: 0.5}}", "train.precision=float32")
    train_on_ranks(tmp_path / "short", 2, *stable, "train.epochs=2")
    short = tmp_path / "short" / "tiny" / "1"
    extended = train_on_ranks(tmp_path / "more", 2, *stable, "train.epochs=3", extend=short)
    assert {result["run"] for result in extended} == {str(tmp_path / "more" / "tiny" / "1")}
    train_on_ranks(tmp_path / "whole", 2, *stable, "train.epochs=3")
    assert digest(tmp_path / "more") == digest(tmp_path / "whole")


def test_resuming_with_another_number_of_ranks_is_reported_and_keeps_the_order(tmp_path, monkeypatch, capfd):
    real = Learner.backward

    def stop(self, batch, step):
        if step == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, step)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "backward", stop)
        assert isinstance(train_on_ranks(tmp_path / "cut", 2, PLAIN, *STEPS)[0], InterruptionError)
    capfd.readouterr()
    train_on_ranks(tmp_path / "cut", 1, PLAIN, *STEPS, resume=True)
    assert "ranks was 2, is 1: the result may differ" in capfd.readouterr().err
    train_on_ranks(tmp_path / "whole", 1, PLAIN, *STEPS)
    one, other = (newest_checkpoint(tmp_path / name).parts["model"] for name in ("whole", "cut"))
    for name, value in one.items():
        assert torch.allclose(other[name], value, rtol=0, atol=1e-5 * float(value.abs().max()))


def test_a_batch_too_small_for_the_ranks_is_refused_before_training(tmp_path):
    for result in train_on_ranks(tmp_path, 4, PLAIN, "train.batch=3"):
        assert isinstance(result, ConfigError)
        assert "each rank needs an image of each micro-batch" in str(result)
    for result in train_on_ranks(tmp_path, 2, "train.batch=3"):
        assert isinstance(result, ConfigError)
        assert "batch norm needs" in str(result)
    assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.parametrize("model", [[PLAIN], [NORMED, "train.sync_batch_norm=true"]], ids=["plain", "sync"])
def test_a_non_finite_value_on_one_rank_stops_all_and_names_its_image(tmp_path, monkeypatch, model):
    real = TrainingBatches.at

    def poisoned(self, step):
        batch = real(self, step)
        if step == 5 and self._ranks.rank == 1:
            batch.images[3, 0, 0, 0] = float("nan")
            monkeypatch.setattr(TrainingBatches, "at", lambda self, step: batch)
        return batch

    monkeypatch.setattr(TrainingBatches, "at", poisoned)
    results = train_on_ranks(tmp_path, 2, *model, "data.augment={rotate: 5}")
    assert all(isinstance(each, NonFiniteError) for each in results), results
    assert results[0].lines == results[1].lines
    assert "the loss became nan at step 5" in results[0].lines[0]
    assert "the image digits[" in results[0].lines[1]
    assert not list(tmp_path.rglob("step-*"))


def test_a_read_error_on_one_rank_stops_all_after_saving(tmp_path, monkeypatch):
    real = TrainingBatches.at

    def unreadable(self, step):
        if step == 20 and self._ranks.rank == 1:
            raise DataError("x.png: gone")
        return real(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingBatches, "at", unreadable)
        first, second = train_on_ranks(tmp_path / "cut", 2)
    assert isinstance(first, OtherRankError), first
    assert isinstance(second, DataError), second
    assert newest_checkpoint(tmp_path / "cut").state["training"]["step"] == 20
    train_on_ranks(tmp_path / "cut", 2, resume=True)
    train_on_ranks(tmp_path / "whole", 2)
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_images_are_decoded_once_per_host(tmp_path, monkeypatch):
    for label, name in enumerate(("cat", "dog")):
        for number in range(40):
            save_picture(tmp_path / "pets" / name / f"{number}.png", seed=100 * label + number, size=(8, 8))
    real, log = decode.Decoder.decode_block, tmp_path / "log"

    def noted(self, numbers, run):
        with log.open("a") as file:
            file.write(f"{numbers[0]} {len(numbers)}\n")
        time.sleep(0.3)
        return real(self, numbers, run)

    monkeypatch.setattr(decode.Decoder, "decode_block", noted)
    data = (
        f"data={{source: {{folder: '{tmp_path / 'pets'}'}}, image: {{size: 8, channels: 1}}, cache_dir: '{tmp_path}'}}"
    )
    results = train_on_ranks(tmp_path / "runs", 2, data, "train.batch=8")
    assert all(isinstance(each, dict) for each in results), results
    assert log.read_text() == "0 80\n"


def test_running_out_of_memory_on_one_rank_splits_the_batches_of_all(tmp_path, monkeypatch):
    real = Learner.backward

    def short(self, batch, step):
        if self.setup.ranks.rank == 1 and max(batch.micro_sizes) > 16:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, batch, step)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "backward", short)
        results = train_on_ranks(tmp_path / "short", 2)
        assert all(isinstance(each, dict) for each in results), results
    train_on_ranks(tmp_path / "set", 2, "train.accumulate=2")
    assert newest_checkpoint(tmp_path / "short").state["training"]["accumulate"] == 2
    assert digest(tmp_path / "short") == digest(tmp_path / "set")


Torchrun = subprocess.Popen[str] | ForkedPython


def start_torchrun(folder: Path, size: int, *words: str) -> Torchrun:
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun_options(size), *words]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def torchrun_options(size: int) -> list[str]:
    return ["--nproc-per-node", str(size), f"--master-port={free_port()}"]


def wait_for_end(process: Torchrun, seconds: float) -> tuple[str, str]:
    """Wait for a process and return its output; kill it and its ranks if it does not end in time."""
    try:
        return process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def ranks_of(process: Torchrun) -> list[int]:
    """The process ids of the ranks, in the order of ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    names = {int(child): Path(f"/proc/{child}/comm").read_text() for child in children}
    return sorted((child for child, name in names.items() if name.startswith("rank ")), key=names.__getitem__)


def start_training(tmp_path: Path, *words: str, epochs: int = 400, more: str = "") -> ForkedPython:
    """Start a training on two forked ranks and wait until it has saved its first checkpoint."""
    (tmp_path / "tiny.yaml").write_text(TINY.replace("epochs: 2", f"epochs: {epochs}{more}"))
    command = ["-m", "tests.support.forked_ranks", *torchrun_options(2), *words]
    process = ForkedPython([*command, "-m", "cnnrun", "train", "tiny.yaml", "--resume"], tmp_path)
    wait_for((tmp_path / "runs" / "tiny" / "1" / "checkpoints" / "latest").exists)
    return process


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_ends_the_job_with_the_reason(tmp_path):
    process = start_training(tmp_path)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    began = time.monotonic()
    _, err = wait_for_end(process, 60)
    assert time.monotonic() - began < 30
    assert process.returncode != 0
    assert "SIGKILL" in err  # torchrun's table says which rank and why
    assert newest_checkpoint(tmp_path / "runs").state["training"]["step"] > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hanging_rank_ends_the_job(tmp_path):
    process = start_training(tmp_path, more=", timeout: 3")
    stopped = ranks_of(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 60:
        time.sleep(0.05)
        if time.monotonic() - began > 10 and Path(f"/proc/{stopped}").exists():
            os.kill(stopped, signal.SIGCONT)  # torchrun itself waits 30 s for a stopped process
    _, err = wait_for_end(process, 60)
    assert time.monotonic() - began < 45
    assert "another rank did not answer for 3 s (train.timeout)" in err
    assert "Traceback" not in err.split("ChildFailedError")[0].split("elastic")[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_job_restarted_by_torchrun_gives_the_result_of_an_undisturbed_run(tmp_path):
    process = start_training(tmp_path, "--max-restarts", "2", epochs=25)
    os.kill(ranks_of(process)[0], signal.SIGKILL)
    out, err = wait_for_end(process, 100)
    assert process.returncode == 0, err
    assert "resuming runs/tiny/1" in err
    assert out.count("run: runs/tiny/1") == 1
    other = tmp_path / "undisturbed"
    other.mkdir()
    process = start_training(other, epochs=25)
    wait_for_end(process, 100)
    assert digest(tmp_path / "runs") == digest(other / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_to_a_job_saves_within_the_step(tmp_path, number):
    """SIGINT goes to torchrun and the ranks, as from a terminal; SIGTERM to torchrun; SIGUSR1 to one rank."""
    process = start_training(tmp_path)
    ranks = ranks_of(process)
    targets = {signal.SIGINT: [*ranks, process.pid], signal.SIGTERM: [process.pid], signal.SIGUSR1: [ranks[1]]}
    for target in targets[number]:
        os.kill(target, number)
    _, err = wait_for_end(process, 60)
    assert process.returncode != 0
    assert "saved; continue with --resume" in err
    step = newest_checkpoint(tmp_path / "runs").state["training"]["step"]
    assert f"stopped at step {step} " in err or f"measuring val after step {step}, " in err


@pytest.mark.slow
def test_eval_by_two_ranks_prints_what_one_process_prints(trained_run, run_cli):
    words = ["eval", str(trained_run), "--json"]
    expected = json.loads(run_cli(*words)[1])
    out, err = wait_for_end(start_torchrun(trained_run, 2, "-m", "cnnrun", *words), 100)
    assert json.loads(out) == expected, err


def test_an_error_on_the_first_rank_is_reported_once(tmp_path, monkeypatch):
    def run(rank: int) -> object:
        with join_ranks(CPU, 60) as ranks:

            def fail() -> None:
                raise ConfigError("no")

            return ranks.broadcast(fail)

    first, second = run_on_ranks(2, run)
    assert isinstance(first, ConfigError)
    assert isinstance(second, OtherRankError)
    assert second.lines == ()


def test_restarted_ranks_ignore_store_entries_of_earlier_attempts():
    """torchrun keeps one store through its restarts, with the entries of earlier attempts."""
    port = free_port()
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)

    def run(rank: int) -> int:
        time.sleep(0.5 * rank)  # rank 0 looks for rank 1 before it has started
        with join_ranks(CPU, 5) as ranks:
            return ranks.all_reduce_max([rank])[0]

    for attempt in range(3):
        there = [
            fork(
                lambda rank=rank: run(rank),
                rank_environment(rank, 2, port, attempt) | {"TORCHELASTIC_USE_AGENT_STORE": "True"},
            )
            for rank in range(2)
        ]
        assert [outcome(*each) for each in there] == [1, 1]
    del store


def test_ranks_that_cannot_find_each_other_report_it(monkeypatch):
    for key, value in rank_environment(1, 2, free_port()).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ResourceError, match="cannot find each other"), join_ranks(CPU, 1):
        pass


def test_all_reduce_sums_tensors_of_unequal_sizes_in_buckets(monkeypatch):
    from cnnrun.base import ranks as module

    monkeypatch.setattr(module, "_BUCKET_BYTES", 40)

    def run(rank: int) -> object:
        values = [torch.full((size,), float(rank + 1)) for size in (1, 9, 0, 30, 2)]
        values.append(torch.arange(4.0).view(2, 2).t())
        with join_ranks(CPU, 60) as ranks:
            ranks.all_reduce_sum(values)
            told = ranks.all_gather({"a": torch.arange(rank)} if rank else {})
        return [value.tolist() for value in values], [{k: v.tolist() for k, v in each.items()} for each in told]

    for sums, told in run_on_ranks(3, run):
        assert sums[:5] == [[6.0] * size for size in (1, 9, 0, 30, 2)]
        assert sums[5] == [[0.0, 6.0], [3.0, 9.0]]
        assert told == [{}, {"a": [0]}, {"a": [0, 1]}]


def test_the_environment_file_records_the_number_of_ranks(tmp_path):
    train_on_ranks(tmp_path, 2, PLAIN)
    assert json.loads((tmp_path / "tiny" / "1" / "environment.json").read_text())["ranks"] == 2


FIRST_FAILS = [
    ConfigError("a user's"),
    OSError(5, "a disk's"),
    RuntimeError("torch's"),
    ZeroDivisionError("ours"),
    KeyboardInterrupt(),
    MemoryError(),
]


@pytest.mark.parametrize("error", FIRST_FAILS, ids=lambda error: type(error).__name__)
def test_any_error_on_the_first_rank_ends_the_others_without_waiting(error):
    """Regression: only two kinds of error ended the other ranks; otherwise they waited for a day."""

    def run(rank: int) -> object:
        with join_ranks(CPU, 60) as ranks:

            def fail() -> None:
                raise error

            return ranks.broadcast(fail)

    began = time.monotonic()
    first, second = run_on_ranks(2, run)
    assert type(first) is type(error)
    assert isinstance(second, OtherRankError)
    assert time.monotonic() - began < 30


def test_a_value_that_cannot_be_broadcast_is_an_error_on_all_ranks():
    def run(rank: int) -> object:
        with join_ranks(CPU, 60) as ranks:
            return ranks.broadcast(lambda: {1, 2})

    first, second = run_on_ranks(2, run)
    assert isinstance(first, TypeError)
    assert isinstance(second, OtherRankError)


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), KeyError("ours")])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_unexpected_error_on_one_rank_ends_the_others(tmp_path, monkeypatch, error, rank):
    real = Learner.backward

    def failing(self, batch, step):
        if step == 20 and self.setup.ranks.rank == rank:
            raise error
        return real(self, batch, step)

    began = time.monotonic()
    with monkeypatch.context() as patched:
        patched.setattr(Learner, "backward", failing)
        results = train_on_ranks(tmp_path, 2, "train.timeout=10")
    assert time.monotonic() - began < 40
    assert type(results[rank]) is type(error)
    assert isinstance(results[1 - rank], ResourceError), results


def is_running(pid: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def steps_saved_when_torchrun_is_killed(root: Path) -> int:
    """Kill torchrun in the middle of a training, wait for its ranks, and return the step of their checkpoint."""
    root.mkdir()
    process = start_training(root, more=", timeout: 10")
    ranks = ranks_of(process)
    log = root / "runs" / "tiny" / "1" / "metrics.jsonl"
    wait_for(
        lambda: log.exists() and log.stat().st_size > 0
    )  # val is measured: a signal before ends at the epoch's end
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        wait_for(lambda: not any(map(is_running, ranks)), 30)
    finally:
        for rank in filter(is_running, ranks):
            os.kill(rank, signal.SIGKILL)
        process.communicate()
    return int(newest_checkpoint(root / "runs").state["training"]["step"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_save_and_exit_when_torchrun_is_killed(tmp_path):
    """Regression: the ranks trained on after torchrun was killed."""
    # One kill in 17 comes at an epoch's end by chance, where a checkpoint is written anyway.
    steps = (steps_saved_when_torchrun_is_killed(tmp_path / str(attempt)) for attempt in range(3))
    assert any(step % 17 for step in steps), "only the ends of epochs are saved, not what was reached"


BAD_ENVIRONMENTS = [
    ({"RANK": "1"}, "the environment has RANK but not WORLD_SIZE"),
    ({"WORLD_SIZE": "2"}, "but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "but not MASTER_ADDR, MASTER_PORT"),
    ({"LOCAL_RANK": "0"}, "but not RANK, WORLD_SIZE"),
    ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x', not a whole number"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1', not a whole number"),
    ({"RANK": "²", "WORLD_SIZE": "2"}, "RANK is '²', not a whole number"),
    ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK 1 is not below its WORLD_SIZE 1"),
]


@pytest.mark.parametrize(("environment", "said"), BAD_ENVIRONMENTS)
def test_an_incomplete_or_invalid_torchrun_environment_is_refused(environment, said, tiny, tmp_path):
    """Regression: RANK without WORLD_SIZE trained and printed nothing."""
    words = [sys.executable, "-m", "cnnrun", "train", str(tiny)]
    left = subprocess.run(words, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True)
    assert (left.returncode, left.stdout) == (2, "")
    assert said in left.stderr
    assert "start with torchrun" in left.stderr
    assert not (tmp_path / "runs").exists()


def test_a_world_of_one_rank_trains(tiny, tmp_path, run_cli, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    code, out, _ = run_cli("train", tiny, "--runs", tmp_path / "runs", "--no-report")
    assert code == 0
    assert "best at step" in out


# --- backend of the ranks ---------------------------------------------------------------------------------------------


class Store(dict[str, bytes]):
    """A dictionary in place of the store that ranks share before there is a process group."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self[key]


def choose_nccl(monkeypatch, others: list[str], device: str, uuid: str = "") -> bool:
    """Return whether the last rank chooses NCCL, when the others have already written to the store."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    store = Store({f"device-{rank}": name.encode() for rank, name in enumerate(others)})
    return has_gpu_of_its_own(store, len(others), len(others) + 1, torch.device(device))


def test_ranks_use_nccl_with_a_gpu_each_and_report_gloo_if_they_share_one(monkeypatch, capfd):
    assert choose_nccl(
        monkeypatch, ["gpu-1"], "cuda:0", "gpu-2"
    )  # the same device number on two hosts or in two containers
    assert not choose_nccl(monkeypatch, ["cpu"], "cpu")
    assert capfd.readouterr().err == ""
    assert not choose_nccl(monkeypatch, ["gpu-1", "gpu-2"], "cuda:0", "gpu-1")
    assert "ranks share a GPU: they communicate by gloo" in capfd.readouterr().err


@pytest.mark.parametrize(("others", "device"), [(["cpu"], "cuda:0"), (["gpu-1"], "cpu")])
def test_a_mix_of_ranks_on_cpus_and_gpus_is_refused(monkeypatch, others, device):
    with pytest.raises(ConfigError, match="1 of 2 ranks are on CPUs, the others on GPUs: give --device"):
        choose_nccl(monkeypatch, others, device, "gpu-2")
