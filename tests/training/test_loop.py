"""Identities of training: resumed equals uninterrupted, accumulated equals whole, repeated equals the first."""

from __future__ import annotations

import itertools
import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cnnrun.base.atomic_files import Folder
from cnnrun.base.errors import CheckpointError, ConfigError, NonFiniteError, StorageError, UserError
from cnnrun.base.ranks import Ranks
from cnnrun.contracts.choices import Choices
from cnnrun.data.training_batches import BatchPlan, BatchReading, batches_in_order
from cnnrun.experiment import assemble
from cnnrun.experiment.checks import check
from cnnrun.model.trained_network import MeasuredNetwork
from cnnrun.results.studies.train_run import train_run
from cnnrun.training import checkpoint_pointers, checkpoints
from cnnrun.training.evaluation import measure_split
from cnnrun.training.learner import Learner
from cnnrun.training.metrics_log import MetricsLog
from cnnrun.training.run_folder import hold_run
from cnnrun.training.settings import Train
from cnnrun.training.setup import TrainingSetup
from tests.support.configs import TINY, tiny_experiment
from tests.support.forked_python import ForkedPython
from tests.support.images import save_class_folders
from tests.support.interrupted_trainings import digest, stop_at
from tests.support.small_runs import train_tiny

CPU = torch.device("cpu")
RICH = ["train.ema={decay: 0.9}", "data.augment={shift: 0.2, rotate: 8}", "train.accumulate=2", "train.clip=1.0"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_repeated_training_is_identical_and_another_seed_or_precision_differs(tmp_path, precision):
    settings = [*RICH, f"train.precision={precision}"]
    first, second = train_tiny(tmp_path / "a", *settings), train_tiny(tmp_path / "b", *settings)
    assert digest(first) == digest(second)
    assert digest(train_tiny(tmp_path / "c", *settings, "seed=1")) != digest(first)
    other = "bfloat16" if precision == "float32" else "float32"
    assert digest(train_tiny(tmp_path / "d", *RICH, f"train.precision={other}")) != digest(first)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", [0, 5, 16, 17, 25])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(tmp_path, step, precision):
    """17 steps an epoch: stopped at the start, within an epoch, at its end, within the last."""
    settings = [*RICH, f"train.precision={precision}"]
    expected = digest(train_tiny(tmp_path / "whole", *settings))
    with stop_at(step):
        train_run(tiny_experiment(*settings), tmp_path / "cut", CPU, resume=True)
    run = tmp_path / "cut" / "tiny" / "1"
    assert not (run / "result.json").exists()
    resumed = train_run(tiny_experiment(*settings), tmp_path / "cut", CPU, resume=True)
    assert resumed["run"] == str(run)
    assert digest(run) == expected


def test_a_training_resumed_many_times_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    expected = digest(train_tiny(tmp_path / "whole", *RICH))
    for step in (3, 4, 12, 20, 30):
        with stop_at(step):
            train_run(tiny_experiment(*RICH), tmp_path / "cut", CPU, resume=True)
    train_run(tiny_experiment(*RICH), tmp_path / "cut", CPU, resume=True)
    assert digest(tmp_path / "cut" / "tiny" / "1") == expected


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    """Without batch norm, micro-batches change nothing but rounding."""
    model = "model=[{conv: {out_channels: 4, activation: relu}}, flatten, {linear: 8}]"
    grads = []
    for accumulate in (1, 3):
        made = tiny_experiment(model, f"train.accumulate={accumulate}", "train.batch=50")
        data = assemble.prepare_dataset(made)
        setup = assemble.build_setup(made, data, None, CPU)
        learning = Learner(setup)
        setup.network.double()
        from cnnrun.data.training_batches import TrainingBatches

        plan = BatchPlan(50, 20, 0, None, accumulate)
        batch = TrainingBatches(data.splits["train"], setup.augment, plan, BatchReading(CPU)).at(0)
        batch = replace(batch, images=batch.images.double())
        learning.backward(batch, 0)
        grads.append([parameter.grad.clone() for parameter in setup.network.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_clipped_step_has_the_clip_norm_at_any_loss_scale(scale):
    """Plain SGD moves the weights by the learning rate times the gradient, whose norm is clipped to `train.clip`."""
    made = tiny_experiment("train.precision=float16", "train.clip=0.01", "train.optimizer={sgd: {lr: 0.5}}")
    setup = assemble.build_setup(made, assemble.prepare_dataset(made), None, CPU)
    learning = Learner(setup)
    learning.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    batch = setup.batches(1).at(0)
    before = torch.cat([parameter.detach().flatten().double() for parameter in learning.parameters])
    learning.backward(batch, 0)
    learning.update_weights(0, 0.8)
    after = torch.cat([parameter.detach().flatten().double() for parameter in learning.parameters])
    assert float((after - before).norm()) == pytest.approx(0.8 * 0.5 * 0.01, rel=1e-3)


def learner_of(*overrides: str) -> tuple[Learner, TrainingSetup]:
    made = tiny_experiment(*overrides)
    setup = assemble.build_setup(made, assemble.prepare_dataset(made), None, CPU)
    return Learner(setup), setup


def gradients(learning: Learner, setup: TrainingSetup, step: int, rank: int = 0) -> torch.Tensor:
    """The gradients of the first batch, with the dropout of the given step and rank."""
    ranks = Ranks()
    ranks.rank = rank
    learning.optimizer.zero_grad()
    learning.setup = replace(setup, ranks=ranks)
    learning.backward(setup.batches(1).at(0), step)
    return torch.cat([parameter.grad.flatten().clone() for parameter in learning.parameters])


def test_dropout_depends_only_on_the_step_and_the_rank():
    learning, setup = learner_of("model=[flatten, {dropout: 0.5}]")
    first = gradients(learning, setup, 3, 1)
    assert not torch.equal(gradients(learning, setup, 4, 1), first)
    assert not torch.equal(gradients(learning, setup, 3, 2), first)
    assert torch.equal(gradients(learning, setup, 3, 1), first)


def test_the_loss_of_a_batch_is_the_mean_over_its_images_for_any_micro_batches():
    losses = []
    for parts in (1, 3):
        learning, setup = learner_of("model=[flatten]", "train.batch=50")
        batch = setup.batches(parts).at(0)
        outputs = learning.network(batch.images)
        expected = float(F.cross_entropy(outputs.detach().double(), batch.targets["labels"]))
        losses.append(float(learning.backward(batch, 0)))
        assert losses[-1] == pytest.approx(expected, rel=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_ema_weights_follow_the_decay_formula_and_are_the_ones_evaluated():
    learning, setup = learner_of("train.ema={decay: 0.9}")
    name = "layers.linear1.linear.weight"
    expected, batches = learning.network.state_dict()[name].double(), setup.batches(1)
    for step in range(4):
        learning.backward(batches.at(step), step)
        learning.update_weights(step, 1.0)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * learning.network.state_dict()[name].double()
    torch.testing.assert_close(learning.ema.average[name].double(), expected, rtol=1e-5, atol=1e-7)
    measured = learning.evaluate("val", 64).metrics
    learning.network.load_state_dict(learning.ema.average)
    (whole,) = batches_in_order(setup.dataset.splits["val"], 10_000, CPU)
    with torch.no_grad():
        outputs = learning.network.eval()(whole.images).double()
    assert measured["loss"] == pytest.approx(float(F.cross_entropy(outputs, whole.targets["labels"])), rel=1e-5)
    assert measured["accuracy"] == pytest.approx(float((outputs.argmax(1) == whole.targets["labels"]).double().mean()))


@pytest.mark.parametrize("size", [5, 64, 1000])
def test_the_loss_of_a_split_is_the_criterions_sum_with_each_sample_counted_once(size):
    learning, setup = learner_of("model=[flatten]")
    examples = setup.dataset.splits["val"]

    class Two(torch.nn.Module):
        def forward(self, outputs, targets):
            return {"one": F.cross_entropy(outputs, targets["labels"]), "other": outputs.square().mean()}

    found = measure_split(MeasuredNetwork(learning.network.eval(), Two(), setup.task, Choices(), CPU), examples, size)
    (whole,) = batches_in_order(examples, len(examples), CPU)
    with torch.no_grad():
        expected = sum(Two()(learning.network(whole.images), whole.targets).values())
    assert len(examples) % 5
    assert found.metrics["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_each_step_uses_the_schedule_factor_of_its_number(tmp_path, monkeypatch):
    seen = []

    real = Learner.update_weights

    def watched(self, step, factor):
        real(self, step, factor)
        seen.append((step, factor, self.optimizer.param_groups[0]["lr"]))

    monkeypatch.setattr(Learner, "update_weights", watched)
    spec = tiny_experiment().train
    train_tiny(tmp_path)
    factors = [spec.schedule.factor(step, 34) for step in range(34)]
    assert seen == [(step, factor, spec.optimizer.lr * factor) for step, factor in enumerate(factors)]


@pytest.mark.parametrize(("pictures", "steps", "smallest"), [(96, 3, 32), (97, 4, 1), (127, 4, 31)])
def test_steps_per_epoch_follow_the_image_count_and_drop_last(pictures, steps, smallest):
    whole, parts = Train(batch=32), Train(batch=32, drop_last=False)
    assert (whole.steps_per_epoch(pictures), whole.smallest_batch(pictures)) == (3, 32)
    sizes = [len(part) for part in torch.arange(pictures).split(32)]
    assert (
        (parts.steps_per_epoch(pictures), parts.smallest_batch(pictures))
        == (len(sizes), sizes[-1])
        == (steps, smallest)
    )


def test_a_finished_run_is_not_trained_again_when_resumed(tmp_path, capfd):
    run = train_tiny(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = train_run(tiny_experiment(), tmp_path, CPU, resume=True)
    assert again == {"run": str(run), "already_finished": True, **json.loads((run / "result.json").read_text())}
    assert f"{run} of this config is finished: there is nothing left to train" in capfd.readouterr().err
    assert train_run(tiny_experiment("seed=1"), tmp_path, CPU, resume=True)["run"] == str(run.with_name("2"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_resume_starts_a_new_run_if_settings_differ_and_names_them(tmp_path, monkeypatch, capfd):
    with stop_at(3):
        train_run(tiny_experiment(), tmp_path, CPU, resume=False)
    run = Path(train_run(tiny_experiment("train.batch=32"), tmp_path, CPU, resume=True)["run"])
    assert run.name == "2"
    assert "is unfinished, but train.batch was 64, is 32 now" in capfd.readouterr().err


def test_two_processes_cannot_train_one_run(tmp_path):
    with hold_run(tmp_path), pytest.raises(StorageError, match="another process"), hold_run(tmp_path):
        pass
    with hold_run(tmp_path):
        pass


def script_accuracies(monkeypatch, accuracies: list[float]) -> None:
    """Make successive evaluations report these accuracies."""
    values = iter(accuracies)
    real = Learner.evaluate

    def scripted(self, split, batch, *rest):
        measured = real(self, split, batch, *rest)
        measured.metrics["accuracy"] = next(values)
        return measured

    monkeypatch.setattr(Learner, "evaluate", scripted)


def test_best_checkpoint_early_stop_and_keep_work_together(tmp_path, monkeypatch):
    script_accuracies(monkeypatch, [0.5, 0.7, 0.6, 0.6, 0.9])
    made = tiny_experiment("train.epochs=9", "train.early_stop.patience=2", "train.keep=1")
    result = train_run(made, tmp_path, CPU, resume=False)
    assert (result["steps"], result["best_step"], result["best"]) == (4 * 17, 2 * 17, {"val/accuracy": 0.7})
    folder = Path(result["run"]) / "checkpoints"
    assert [path.name for path in checkpoints.list_checkpoints(folder)] == ["step-00000034", "step-00000068"]
    assert checkpoint_pointers.read_pointer(folder, "best") == "step-00000034"


def test_nan_stops_training_names_images_and_layer_and_is_not_saved(tmp_path, monkeypatch):
    real = Learner.backward

    def poisoned(self, batch, step):
        if step == 20:
            with torch.no_grad():
                self.network.get_parameter("layers.linear1.linear.weight")[0, 0] = float("nan")
        return real(self, batch, step)

    monkeypatch.setattr(Learner, "backward", poisoned)
    with pytest.raises(NonFiniteError) as stopped:
        train_run(tiny_experiment(), tmp_path, CPU, resume=False)
    text = "\n".join(stopped.value.lines)
    assert stopped.value.exit_code == 4
    assert "at step 20" in text
    assert "layers.linear1.linear" in text
    assert "digits[" in text
    (saved,) = checkpoints.list_checkpoints(tmp_path / "tiny" / "1" / "checkpoints")
    assert saved.name == "step-00000017"


def test_a_batch_of_one_with_batch_norm_is_refused_before_training(tmp_path):
    count = len(assemble.prepare_dataset(tiny_experiment()).splits["train"])
    for overrides in (
        ["train.batch=1"],
        ["train.batch=64", "train.accumulate=64"],
        [f"train.batch={count - 1}", "train.drop_last=false"],
    ):
        with pytest.raises(ConfigError, match="batch norm needs"):
            train_run(tiny_experiment(*overrides), tmp_path, CPU, resume=False)
    with pytest.raises(ConfigError, match="more than the .* training images"):
        train_run(tiny_experiment("train.batch=5000"), tmp_path, CPU, resume=False)
    assert not list(tmp_path.rglob("checkpoints"))


def test_training_learns_the_digits_above_90_percent_accuracy(trained_run):
    result = json.loads((trained_run / "result.json").read_text())
    assert result["best"]["val/accuracy"] > 0.9
    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert lines[0]["train/loss"] == pytest.approx(2.3, abs=0.5)  # ln 10 at the start


def test_a_network_can_overfit_eight_images(tmp_path):
    made = tiny_experiment("train.batch=8", "train.epochs=1", "train.optimizer={adam: 0.01}")
    data = assemble.prepare_dataset(made)
    setup = assemble.build_setup(made, data, None, CPU)
    learning = Learner(setup)
    from cnnrun.data.training_batches import TrainingBatches

    batch = TrainingBatches(data.splits["train"], setup.augment, BatchPlan(8, 1, 0), BatchReading(CPU)).at(0)
    losses = []
    for step in range(150):
        losses.append(float(learning.backward(batch, step)))
        learning.update_weights(step, 1.0)
    assert losses[-1] < 0.05 < losses[0]


def test_tensorboard_has_curves_images_and_the_confusion_matrix(trained_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained_run), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert {"val/accuracy", "train/loss", "train/lr", "time/images_per_second"} <= set(events.Tags()["scalars"])
    assert {"train/images", "val/confusion"} <= set(events.Tags()["images"])
    assert len(events.Scalars("val/accuracy")) == 12


def test_tensorboard_keeps_the_points_of_the_step_from_which_a_run_resumes(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seconds = itertools.count(1_000_000_000)  # files are read in the order of their time, in whole seconds
    monkeypatch.setattr("cnnrun.training.event_file.time", SimpleNamespace(time=lambda: next(seconds)))
    first = MetricsLog(Folder(tmp_path))
    for step in (1, 2, 3):
        first.record(step, {"train/loss": float(step)})
    first.close()
    resumed = MetricsLog(Folder(tmp_path), 2)
    resumed.record(3, {"train/loss": 33.0})
    resumed.close()
    points = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 2.0), (3, 33.0)]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_to_a_training_process_saves_and_sets_the_exit_code(tmp_path, number, code):
    (tmp_path / "tiny.yaml").write_text(TINY.replace("epochs: 2", "epochs: 5000"))
    process = ForkedPython(["-m", "cnnrun", "train", "tiny.yaml", "--resume"], tmp_path)
    metrics = tmp_path / "runs" / "tiny" / "1" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "saved; continue with --resume" in err
    assert "Traceback" not in err
    saved = checkpoints.load_newest(tmp_path / "runs" / "tiny" / "1" / "checkpoints", "latest", pytest.fail)
    assert f"stopped at step {saved.state['training']['step']} " in err


def interrupt_at_step(root: Path, monkeypatch, step: int, *overrides: str) -> Path:
    with stop_at(step):
        train_run(tiny_experiment(*overrides), root, CPU, resume=True)
    return root / "tiny" / "1"


def write_class_folders(root: Path, *classes: str) -> str:
    save_class_folders(root, classes, count=12)
    return f"data={{source: {{folder: '{root}'}}, image: {{size: 8, channels: 1}}, split: {{val: 0.2}}}}"


def test_resuming_with_changed_data_is_refused(tmp_path, monkeypatch):
    data = [write_class_folders(tmp_path / "pets", "cat", "dog"), "train.batch=4"]
    run = interrupt_at_step(tmp_path, monkeypatch, 2, *data)
    before = (run / "checkpoints" / "latest").read_text()
    write_class_folders(tmp_path / "pets", "cat", "dog", "elk")
    with pytest.raises(CheckpointError, match="has changed .*24 images in 2 classes then, 36 images in 3 classes now"):
        train_run(tiny_experiment(*data), tmp_path, CPU, resume=True)
    assert (run / "checkpoints" / "latest").read_text() == before


def test_resuming_computes_in_as_many_threads_as_the_run_began_with(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    expected = digest(train_tiny(tmp_path / "whole", *RICH))
    with stop_at(5):
        train_run(tiny_experiment(*RICH), tmp_path / "cut", CPU, resume=True)
    torch.set_num_threads(2)
    try:
        resumed = train_run(tiny_experiment(*RICH), tmp_path / "cut", CPU, resume=True)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert digest(Path(resumed["run"])) == expected
    assert "computing in 1 thread, as when the run began" in capfd.readouterr().err


def test_another_thread_count_that_the_user_sets_is_reported(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    interrupt_at_step(tmp_path, monkeypatch, 2)
    torch.set_num_threads(2)
    try:
        train_run(tiny_experiment(), tmp_path, CPU, resume=True)
    finally:
        torch.set_num_threads(1)
    assert "threads was 1, is 2: the result may differ" in capfd.readouterr().err


def test_an_untrainable_config_leaves_no_run_folder(tmp_path):
    for override in ("train.batch=1", "train.batch=5000", "data.split.val=0"):
        with pytest.raises(UserError):
            train_run(tiny_experiment(override), tmp_path, CPU, resume=False)
        with pytest.raises(UserError):
            check(tiny_experiment(override))
    assert not list(tmp_path.iterdir())


def test_the_best_checkpoint_does_not_depend_on_min_delta(tmp_path, monkeypatch):
    script_accuracies(monkeypatch, [0.90, 0.915, 0.919, 0.918])
    early = "train.early_stop={patience: 3, min_delta: 0.02}"
    result = train_run(tiny_experiment("train.epochs=9", early), tmp_path, CPU, resume=False)
    assert result["best"] == {"val/accuracy": 0.919}
    assert (result["best_step"], result["steps"]) == (3 * 17, 4 * 17)


def test_an_equally_good_evaluation_is_not_progress(tmp_path, monkeypatch):
    script_accuracies(monkeypatch, [0.5, 0.5, 0.5, 0.9])
    result = train_run(tiny_experiment("train.epochs=9", "train.early_stop.patience=2"), tmp_path, CPU, resume=False)
    assert (result["best_step"], result["steps"]) == (17, 3 * 17)


def test_a_loss_above_that_of_guessing_is_said_once(tmp_path, capfd):
    wild = ("train.optimizer={sgd: 3.0}", "train.schedule=constant", "train.clip=1.0", "train.epochs=6")
    train_run(tiny_experiment(*wild), tmp_path / "wild", CPU, resume=False)
    said = capfd.readouterr().err
    assert said.count("that of a network that knows nothing: a lower train.optimizer") == 1
    train_run(tiny_experiment("train.epochs=4"), tmp_path / "calm", CPU, resume=False)
    assert "knows nothing" not in capfd.readouterr().err
