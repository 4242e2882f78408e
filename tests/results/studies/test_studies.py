"""Studies of a run or a config: calibrate, train --seeds, compare, sweep, find-lr, plan."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import time
import weakref
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image as Pil

from cnnrun.base.errors import CheckpointError, ConfigError, DataError
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts, NumberStatistics
from cnnrun.contracts.figure import Plot, Series
from cnnrun.contracts.stored_facts import parse_choices, parse_stored_facts
from cnnrun.data.decode import Decoder
from cnnrun.data.image_stores import MemoryStore
from cnnrun.data.training_batches import batches_in_order
from cnnrun.experiment import assemble, config_file, open_run, schema
from cnnrun.explain.figures.png import write_plots
from cnnrun.export.onnx import Onnx
from cnnrun.results import calibrate, compare
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.export_run import export_run
from cnnrun.results.studies import find_lr, plan, seeds, sweep, training_series
from cnnrun.results.studies.train_run import train_run
from cnnrun.tasks.classification import Classify
from cnnrun.tasks.regression.losses import Gaussian
from cnnrun.tasks.regression.task import Regress
from cnnrun.tasks.temperature import fit_temperature
from cnnrun.training.learner import Learner
from tests.support.configs import TINY, tiny_experiment
from tests.support.forked_processes import fork, outcome
from tests.support.images import save_picture
from tests.support.interrupted_trainings import digest, stop_at

CPU = torch.device("cpu")


def one_epoch_config(*overrides: str) -> schema.Experiment:
    return tiny_experiment("train.epochs=1", *overrides)


@pytest.fixture
def run_copy(trained_run, tmp_path) -> Path:
    """A copy of the trained run that a test may change."""
    return Path(shutil.copytree(trained_run, tmp_path / "runs" / "tiny" / "1"))


# --- calibrate --------------------------------------------------------------------------------------------------------


def test_calibration_recovers_a_known_temperature():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 5, generator=draw) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]
    calibration = Classify().bind(DataFacts(tuple("abcde"), (1, 8, 8))).calibration
    for heat in (0.3, 1.0, 4.0):
        found = fit_temperature(
            lambda t, heat=heat: calibration.negative_log_likelihood(logits * heat, {"labels": labels}, t)
        )
        assert found == pytest.approx(heat, rel=0.03)


@pytest.mark.parametrize("best", [0.273, 1.2345, 7.77])
def test_the_fitted_temperature_has_the_highest_likelihood(best):
    """The function best / t + log t has its minimum at t = best."""
    assert fit_temperature(lambda t: best / t + math.log(t)) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("nll", [lambda t: t, lambda t: 1 / t, lambda t: 0.0, lambda t: max(t - 1, 0.0)])
def test_a_likelihood_without_a_maximum_has_no_temperature(nll):
    assert fit_temperature(nll) is None


def test_a_density_may_have_a_negative_log_likelihood_below_zero():
    """Numbers that vary by a tenth of the predicted deviation: the fitted temperature is a tenth."""
    task = Regress(columns=["length"], loss=Gaussian())
    facts = DataFacts((), (1, 8, 8), numbers=(NumberStatistics("length", 0.0, 1.0, -1.0, 1.0),))
    values = 0.1 * torch.randn(5000, 1, generator=torch.Generator().manual_seed(0))
    raw = torch.tensor([[0.0, math.log(math.e - 1)]]).expand(5000, 2)  # mean 0, deviation 1
    nll = partial(task.bind(facts).calibration.negative_log_likelihood, raw, {"numbers": values})
    assert fit_temperature(nll) == pytest.approx(0.1, rel=0.03)
    assert nll(0.1) < -0.5


def test_calibration_keeps_few_batches_of_images(run_copy, tmp_path, monkeypatch):
    images, counts = [], []

    def count_images(examples, batch_size, device):
        for batch in batches_in_order(examples, 8, device):
            images.append(weakref.ref(batch.images))
            counts.append(sum(image() is not None for image in images))
            yield batch

    monkeypatch.setattr(calibrate, "batches_in_order", count_images)
    calibrate.calibrate_run(run_copy, tmp_path, CPU)
    assert len(counts) > 9
    assert max(counts) <= 3


def test_a_calibrated_temperature_is_used_everywhere(run_copy, tmp_path):
    before = evaluate_run(run_copy, tmp_path, CPU, "val")
    made = calibrate.calibrate_run(run_copy, tmp_path, CPU)
    after = evaluate_run(run_copy, tmp_path, CPU, "val")
    assert made["split"] == "val"
    assert made["nll"][1] < made["nll"][0]
    assert made["ece"] == [before["numbers"]["ece"], after["numbers"]["ece"]]
    assert after["numbers"]["accuracy"] == before["numbers"]["accuracy"]
    assert after["numbers"]["ece"] != before["numbers"]["ece"]
    given = open_run.open_trained(run_copy, tmp_path, CPU)[1]
    assert given.choices == Choices(temperature=made["temperature"])
    report = export_run(Onnx(), run_copy, tmp_path, None, None)
    assert report["passed"]
    import onnx

    said = {entry.key: entry.value for entry in onnx.load(run_copy / "exports" / "model.onnx").metadata_props}
    assert float(said["temperature"]) == made["temperature"]
    # Fitted anew from what the network gives, not on top of what was fitted before.
    assert calibrate.calibrate_run(run_copy, tmp_path, CPU) == made


def test_no_nearby_temperature_has_a_lower_loss_on_val(run_copy, tmp_path):
    made = calibrate.calibrate_run(run_copy, tmp_path, CPU)
    stored = json.loads((run_copy / "calibration.json").read_text()).popitem()[1]["choices"]
    assert parse_choices(stored) == Choices(temperature=made["temperature"])
    given = open_run.open_trained(run_copy, tmp_path, CPU)[1]
    (batch,) = batches_in_order(assemble.prepare_dataset(one_epoch_config()).splits["val"], 10_000, CPU)
    with torch.inference_mode():
        logits, outputs = given.network(batch.images).double(), given.results(batch.images)["probabilities"]
    heat = made["temperature"]
    near = [float(F.cross_entropy(logits / t, batch.targets["labels"])) for t in (heat / 1.01, heat, heat * 1.01)]
    assert min(near) == near[1] == pytest.approx(made["nll"][1], rel=1e-6)
    torch.testing.assert_close(outputs.double(), (logits / heat).softmax(1), rtol=1e-4, atol=1e-6)


def test_a_temperature_of_other_weights_is_ignored_with_a_warning(run_copy, tmp_path, capsys):
    calibrate.calibrate_run(run_copy, tmp_path, CPU)
    path = run_copy / "calibration.json"
    path.write_text(re.sub('"[0-9a-f]{64}"', f'"{"0" * 64}"', path.read_text()))
    assert open_run.open_trained(run_copy, tmp_path, CPU)[1].choices == Choices()
    assert "has no calibration of the weights of step" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"DIGEST": 3}', '{"DIGEST": {"chosen": {"temperature": "x"}}}',
               '{"DIGEST": {"chosen": {"temperature": NaN}}}', '{"DIGEST": {"chosen": {"temperature": -1}}}',
               '{"DIGEST": {"choices": {"temperature": "x"}}}', '{"DIGEST": {"choices": {"temperature": NaN}}}',
               '{"DIGEST": {"choices": {"temperature": 0}}}', '{"DIGEST": {}}']
)  # fmt: skip
def test_a_damaged_calibration_is_refused(run_copy, tmp_path, damage, run_cli):
    digest_of = open_run.open_trained(run_copy, tmp_path, CPU)[1].digest
    (run_copy / "calibration.json").write_text(damage.replace("DIGEST", digest_of))
    code, _, err = run_cli("eval", run_copy)
    assert code == 3
    assert "calibration.json" in err
    assert "calibrate` again" in err
    assert len(err.splitlines()) == 1


def test_calibration_is_refused_when_every_prediction_is_correct(run_copy, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "_outputs", lambda *_: (torch.eye(10) * 9, {"labels": torch.arange(10)}))
    with pytest.raises(
        DataError, match="no maximum at temperatures from 0.05 to 20 .for a classifier: nearly all are right"
    ):
        calibrate.calibrate_run(run_copy, tmp_path, CPU)
    assert not (run_copy / "calibration.json").exists()


def test_every_checkpoint_has_its_own_calibration(tmp_path):
    run = Path(train_run(one_epoch_config("train.epochs=3", "train.keep=3"), tmp_path, CPU, resume=False)["run"])
    best = calibrate.calibrate_run(run, tmp_path, CPU)["temperature"]
    other = run / "checkpoints" / "step-00000017"
    assert calibrate.calibrate_run(other, tmp_path, CPU)["temperature"] != best
    assert open_run.open_trained(run, tmp_path, CPU)[1].choices == Choices(temperature=best)


def test_a_task_without_probabilities_is_not_calibrated(tmp_path, run_cli):
    path = tmp_path / "s.yaml"
    path.write_text(
        "task: regress\ndata: {source: {digit_scenes: {train: 40, held_out: 20, give: counts}}}\n"
        "model: [{conv: {out_channels: 2, stride: 8}}, global_avg_pool]\ntrain: {epochs: 1, batch: 8}\n"
    )
    assert run_cli("train", path, "--runs", tmp_path / "runs")[0] == 0
    code, _, err = run_cli("calibrate", "--runs", tmp_path / "runs")
    assert code == 2
    assert "regress: this network gives no probabilities" in err


def test_the_reliability_diagram_is_drawn(trained_run, tmp_path, run_cli):
    code, out, _ = run_cli("eval", trained_run, "--plots", tmp_path / "figures")
    assert code == 0
    path = tmp_path / "figures" / "reliability.png"
    assert str(path) in out
    with Pil.open(path) as picture:
        assert min(picture.size) > 300
    code, out, _ = run_cli("eval", trained_run, "--json")
    found = json.loads(out)
    rows = found["tables"]["reliability"]
    assert sum(row["pictures"] for row in rows) == found["samples"]
    gap = sum(row["pictures"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / found["samples"]
    assert found["numbers"]["ece"] == pytest.approx(gap)
    low, high = found["intervals"]["accuracy"]
    assert low < found["numbers"]["accuracy"] < high


def test_figures_accept_any_name(tmp_path):
    series = Series("$x_{$", [1.0, 2.0], [3.0, 1.0], "spans", [0.5, 1.5], [1.5, 2.5])
    hostile = Plot(
        "../../<b>$\\frac{$ \x1b[31m", "a$", "$b", (series, Series("p", [1.0], [1.0], "points")), ticks=("$", "c")
    )
    (path,) = write_plots([hostile], tmp_path / "figures")
    assert Path(path).parent == tmp_path / "figures"
    alike = [replace(hostile, title=title) for title in ("x+", "x-", "длина", "ширина")]
    assert len(set(write_plots(alike, tmp_path / "figures"))) == 4


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_seeds_equal_runs_trained_one_by_one(tmp_path):
    made = seeds.train_seeds(one_epoch_config(), 3, training_series.RunSettings(tmp_path / "runs", CPU, False))
    assert made["seeds"] == [0, 1, 2]
    for row in made["runs"]:
        alone = train_run(one_epoch_config(f"seed={row['seed']}"), tmp_path / "alone", CPU, resume=False)["run"]
        assert digest(Path(alone)) == digest(Path(row["run"]))
    values = [evaluate_run(Path(row["run"]), tmp_path, CPU, None)["numbers"]["accuracy"] for row in made["runs"]]
    from scipy import stats

    summary = made["summary"]["accuracy"]
    ends = stats.t.interval(0.95, 2, loc=summary["mean"], scale=stats.sem(values))
    assert (summary["from"], summary["to"]) == pytest.approx(ends)
    assert json.loads((tmp_path / "runs" / "tiny" / "seeds-0-2.json").read_text())["summary"] == made["summary"]


def test_interrupted_seeds_are_resumed(tmp_path):
    whole = seeds.train_seeds(one_epoch_config(), 2, training_series.RunSettings(tmp_path / "whole", CPU, True))
    train_run(one_epoch_config(), tmp_path / "cut", CPU, resume=False)
    with stop_at(7):
        train_run(one_epoch_config("seed=1"), tmp_path / "cut", CPU, resume=False)
    part = seeds.train_seeds(one_epoch_config(), 2, training_series.RunSettings(tmp_path / "cut", CPU, True))
    assert [Path(row["run"]).name for row in part["runs"]] == ["1", "2"]
    for one, other in zip(whole["runs"], part["runs"], strict=True):
        assert digest(Path(one["run"])) == digest(Path(other["run"]))
    again = seeds.train_seeds(one_epoch_config(), 2, training_series.RunSettings(tmp_path / "cut", CPU, True))
    assert again["runs"] == part["runs"]


def test_seeds_trained_on_different_data_are_refused(tmp_path):
    seeds.train_seeds(one_epoch_config(), 1, training_series.RunSettings(tmp_path, CPU, False))
    facts = tmp_path / "tiny" / "1" / "facts.json"
    facts.write_text(re.sub(r'"fingerprint": "..', '"fingerprint": "zz', facts.read_text()))
    with pytest.raises(CheckpointError, match="the data has changed since"):
        seeds.train_seeds(one_epoch_config(), 2, training_series.RunSettings(tmp_path, CPU, True))
    other = Path(train_run(one_epoch_config("seed=1"), tmp_path, CPU, resume=False)["run"])
    with pytest.raises(DataError, match="were trained on different data"):
        training_series._refuse_different_data([tmp_path / "tiny" / "1", other], "seed")


def test_a_seed_out_of_range_is_refused_before_training(config, tmp_path, run_cli):
    code, _, err = run_cli("train", config, f"seed={2**63 - 1}", "--seeds", 2, "--runs", tmp_path / "runs")
    assert code == 2
    assert "--seeds 2" in err
    assert not (tmp_path / "runs").exists()


def test_one_seed_has_no_interval():
    assert training_series.mean_with_interval([0.5], "accuracy") == {"mean": 0.5}


# --- compare ----------------------------------------------------------------------------------------------------------


def test_a_run_is_not_distinguishable_from_itself(trained_run, tmp_path, run_cli):
    code, out, _ = run_cli("compare", trained_run, trained_run, "--plots", tmp_path)
    assert code == 0
    assert "the configs are the same" in out
    assert "not distinguishable on these images" in out
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_compare_reports_differences_of_configs_and_results(trained_run, tmp_path, run_cli):
    worse = train_run(one_epoch_config("model[0].conv.out_channels=2"), tmp_path, CPU, resume=False)["run"]
    code, out, _ = run_cli("compare", trained_run, worse)
    assert code == 0
    assert f"train.epochs: 12 in {trained_run}, 1 in {worse}" in out
    assert "out_channels: 4 in" in out
    assert "distinguishable by accuracy" in out
    found = compare.compare_runs([trained_run, Path(worse)], tmp_path, CPU, None)
    (pair,) = found["pairs"]
    assert not pair["same_config"]
    assert "accuracy" in pair["distinguishable"]
    row = next(row for row in pair["tests"] if row["number"] == "accuracy")
    assert row["test"] == "McNemar"
    assert row["from"] <= row["difference"] <= row["to"] < 0


def test_compare_reports_that_only_one_run_is_calibrated(run_copy, trained_run, tmp_path):
    calibrate.calibrate_run(run_copy, tmp_path, CPU)
    (pair,) = compare.compare_runs([trained_run, run_copy], tmp_path, CPU, None)["pairs"]
    assert any(line.startswith("calibrated: no and ") for line in pair["config"])
    assert pair["same_config"]


def test_too_few_people_are_reported_as_not_tested(tmp_path, run_cli):
    path = tmp_path / "v.yaml"
    path.write_text(
        "task: {verify: {dimension: 4}}\n"
        "data: {source: digits, split: {by: label, val: ['5', '6'], test: ['7', '8']}}\n"
        "model: [{conv: {out_channels: 2, stride: 4}}, flatten]\ntrain: {epochs: 1, batch: 64, monitor: val/eer}\n"
    )
    for seed in (0, 1):
        assert run_cli("train", path, f"seed={seed}", "--runs", tmp_path / "runs")[0] == 0
    code, out, _ = run_cli("compare", tmp_path / "runs/v/1", tmp_path / "runs/v/2")
    assert code == 0
    assert "not tested: " in out
    assert "not distinguishable" not in out


def test_runs_measured_on_different_images_are_not_tested(trained_run, tmp_path):
    other = train_run(one_epoch_config("data.split.seed=5"), tmp_path, CPU, resume=False)["run"]
    (pair,) = compare.compare_runs([trained_run, Path(other)], tmp_path, CPU, None)["pairs"]
    assert pair["tests"] == []
    assert "image" in pair["unpaired"]
    with pytest.raises(ConfigError, match="two or more"):
        compare.compare_runs([trained_run], tmp_path, CPU, None)


# --- sweep ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


SPACE = [
    "train.optimizer.sgd.lr=log:0.001..0.5",
    "train.batch=32|64",
    "model[0].conv.out_channels=2..4",
    "train.epochs=1",
]


def run_trials(config: Path, root: Path, trials: int, *words: str) -> dict:
    return sweep.run_sweep(config, [*SPACE, *words], trials, root, CPU, None)


def settings_and_values(result: dict) -> list:
    return [(row["settings"], row["value"]) for row in result["trials"]]


def test_a_sweep_is_reproducible_resumes_and_writes_its_best_config(config, tmp_path):
    whole = run_trials(config, tmp_path / "a", 4)
    run_trials(config, tmp_path / "b", 2)
    part = run_trials(config, tmp_path / "b", 4)
    assert settings_and_values(whole) == settings_and_values(part)
    best = min(whole["trials"], key=lambda row: -row["value"])
    assert whole["best"]["value"] == best["value"]
    made = config_file.read_config(Path(whole["best"]["config"]))
    assert made.name == "tiny"
    assert made.train.optimizer.lr == pytest.approx(best["settings"]["train.optimizer.sgd.lr"])
    again = train_run(made, tmp_path / "c", CPU, resume=False)
    assert again["best"]["val/accuracy"] == best["value"]
    assert run_trials(config, tmp_path / "b", 4)["trials"] == part["trials"]


def test_a_trial_whose_process_was_killed_is_resumed(config, tmp_path):
    whole = run_trials(config, tmp_path / "whole", 2, "train.epochs=3")
    root = tmp_path / "cut"

    def killed() -> None:

        real = Learner.backward

        def stepping(self, batch, number):
            if number == 40 and "trial-1" in str(self.setup.run.path):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, batch, number)

        Learner.backward = stepping
        run_trials(config, root, 2, "train.epochs=3")

    pid, pipe = fork(killed)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    os.close(pipe)
    part = run_trials(config, root, 2, "train.epochs=3")
    assert settings_and_values(whole) == settings_and_values(part)
    # The trial in the place of the one that was killed goes on with its run.
    assert sorted(str(path.relative_to(root)) for path in root.glob("*/*/*") if path.is_dir()) == [
        "tiny-sweep/trial-0/1",
        "tiny-sweep/trial-1/1",
    ]
    assert not list((root / "tiny-sweep").glob("trial-*.lock"))


def test_two_processes_share_a_study(config, tmp_path):
    children = [fork(lambda: len(run_trials(config, tmp_path, 6)["trials"])) for _ in range(2)]
    assert all(outcome(*child) >= 5 for child in children)
    found = run_trials(config, tmp_path, 6)["trials"]
    assert len(found) == 6
    assert all(row["state"] == "complete" for row in found)
    assert len({row["run"] for row in found}) == 6


def test_bad_trials_are_pruned(config, tmp_path):
    rates = "train.optimizer.sgd.lr=0.000001|0.1|0.2|0.05|0.08|0.15"
    result = sweep.run_sweep(config, [rates, "train.epochs=5"], 12, tmp_path, CPU, None)
    assert {row["state"] for row in result["trials"]} <= {"complete", "pruned"}
    pruned = [row for row in result["trials"] if row["state"] == "pruned"]
    assert pruned
    for row in pruned:
        assert len((Path(row["run"]) / "metrics.jsonl").read_text().splitlines()) < 5
        assert (Path(row["run"]) / "result.json").exists()


def test_a_trial_that_cannot_be_trained_is_recorded_as_failed(config, tmp_path, capsys):
    result = sweep.run_sweep(
        config, ["train.optimizer.sgd.lr=1e20|0.1", "train.epochs=1", "train.schedule=constant"], 6, tmp_path, CPU, None
    )
    failed = [row for row in result["trials"] if row["state"] == "fail"]
    assert failed
    assert all("became" in row["why"] for row in failed)
    assert result["best"]["settings"] == {"train.optimizer.sgd.lr": "0.1"}


def test_a_trial_that_ends_before_its_lock_is_taken_is_not_requeued(config, tmp_path, monkeypatch):
    """A trial's own process may finish it after another process saw it running and before that one has its lock."""
    run_trials(config, tmp_path, 1)
    folder = tmp_path / "tiny-sweep"
    space, plain = sweep.parse_search_space(SPACE)
    study = sweep._open_study(config_file.read_config(config, plain), folder, None, space)
    trial = study.ask()
    real = sweep.hold_lock

    def ending_first(path, *wait):
        if path.name == f"trial-{trial.number}.lock":
            study.tell(trial.number, 0.5)
        return real(path, *wait)

    monkeypatch.setattr(sweep, "hold_lock", ending_first)
    sweep._requeue_orphans(study, folder)
    assert [each.state.name for each in study.trials] == ["COMPLETE", "COMPLETE"]


def test_an_unfinished_sweep_names_the_state_of_each_trial(config, tmp_path):
    """All trials may be running in other processes: they have failed for no reason yet."""
    space, plain = sweep.parse_search_space(SPACE)
    experiment = config_file.read_config(config, plain)
    study = sweep._open_study(experiment, tmp_path, None, space)
    study.ask()
    with pytest.raises(ConfigError, match="trial 0: running"):
        sweep._summarize_study(study, experiment, config, plain, tmp_path)


def test_trials_with_equal_settings_have_separate_runs(config, tmp_path):
    found = sweep.run_sweep(config, ["train.batch=64|32", "train.epochs=1"], 4, tmp_path, CPU, None)["trials"]
    assert len({row["run"] for row in found}) == 4
    assert len({str(row["settings"]) for row in found}) == 2


def test_a_sweep_with_missing_data_or_unusable_storage_is_refused(config, tmp_path, run_cli, monkeypatch):
    gone = tmp_path / "gone.yaml"
    gone.write_text(TINY.replace("source: digits", "source: {folder: nowhere}, image: {size: 8, channels: 1}"))
    code, _, err = run_cli("sweep", gone, "train.batch=8|16", "--runs", tmp_path / "runs")
    assert code == 8
    assert "nowhere" in err
    junk = tmp_path / "junk"
    junk.write_text("no journal\n")
    for storage in (junk, "foo://x", f"sqlite:///{tmp_path}/no/such/x.db"):
        code, _, err = run_cli("sweep", config, "train.batch=8|16", "--runs", tmp_path / "r", "--storage", storage)
        assert code == 5
        assert "a study cannot be stored there" in err

    def short(*arguments, **settings):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sweep, "train_run", short)
    code, _, err = run_cli("sweep", config, "train.batch=8|16", "--runs", tmp_path / "runs", "--trials", 2)
    assert code == 2
    assert "no trial finished\ntrial 0: memory ran out\ntrial 1: memory ran out\n" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.epochs=3"], "nothing to search"),
        (["train.monitor=val/accuracy|val/loss"], "all trials need the same"),
        (["seed=0..3"], "all trials need the same"),
        (["train.batch=8..16", "train.batch=32..64"], "is already searched"),
        (["train.optimizer.sgd.lr=0.3..0.1"], "must be below the second"),
        (["train.optimizer.sgd.lr=log:0..0.1"], "must be above 0"),
        (["train.batch=32|32"], "different values"),
        (["train.btach=8..64"], "did you mean 'batch'"),
        (["train.optimizer.sgd.lr=-1..0.1"], "must be more than 0"),
        (["model[0].conv.out_channels=1..4", "model[0].conv.kernel_size=3|x"], "kernel_size"),
    ],
)
def test_an_invalid_search_space_is_refused_before_training(config, tmp_path, run_cli, words, said):
    code, _, err = run_cli("sweep", config, *words, "--runs", tmp_path / "runs")
    assert code == 2
    assert said in err
    assert not list((tmp_path / "runs").glob("*/1"))


def test_a_study_of_another_config_or_space_is_not_resumed(config, tmp_path):
    run_trials(config, tmp_path, 1)
    with pytest.raises(ConfigError, match="holds a study with another config"):
        run_trials(config, tmp_path, 2, "seed=3")
    with pytest.raises(ConfigError, match="holds a study with another space"):
        sweep.run_sweep(config, [*SPACE[:2], "train.epochs=1"], 2, tmp_path, CPU, None)


# --- find-lr ----------------------------------------------------------------------------------------------------------


def test_find_lr_tries_a_geometric_range_and_leaves_no_run(config, tmp_path, run_cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli("find-lr", config, "--plots", tmp_path / "figures", "--steps", 60)
    assert code == 0, err
    assert "was not changed" in out
    assert (tmp_path / "figures" / "learning-rates.png").exists()
    assert not (tmp_path / "runs").exists()
    found = find_lr.find_learning_rate(one_epoch_config(), CPU, 1e-5, 10, 60, None)
    assert find_lr.find_learning_rate(one_epoch_config(), CPU, 1e-5, 10, 60, None) == found
    rates = [row["lr"] for row in found["rates"]]
    assert rates[0] == pytest.approx(1e-5)
    assert all(b / a == pytest.approx(rates[1] / rates[0]) for a, b in pairwise(rates))
    assert 1e-4 < found["lowest_tenth"] < found["steepest"] < 1


def test_suggested_rates_lie_where_the_loss_falls():
    rows = [
        {"lr": 10.0**k, "loss": 0.0, "smoothed": s} for k, s in enumerate([3, 3, 2.9, 2.0, 1.5, 1.4, 4.0, 2.0, 9.0])
    ]
    assert find_lr.suggest_learning_rates(rows) == {"steepest": 100.0, "lowest_tenth": 1e4}
    rising = [{"lr": 10.0**k, "loss": 0.0, "smoothed": float(k)} for k in range(5)]
    assert find_lr.suggest_learning_rates(rising) == {}


def test_no_rate_is_suggested_when_the_loss_does_not_fall(config, run_cli):
    code, out, _ = run_cli("find-lr", config, "--low", 1e-12, "--high", 1e-11, "--steps", 40)
    assert code == 0
    assert "does not fall by more than its noise" in out


def test_an_invalid_range_of_rates_is_refused(config, run_cli):
    assert "with --low below --high" in run_cli("find-lr", config, "--low", 1, "--high", 0.1)[2]
    assert "with --low below --high" in run_cli("find-lr", config, "--high", "inf")[2]
    assert "give a lower --low" in run_cli("find-lr", config, "--low", 1e25, "--high", 1e30)[2]


# --- plan -------------------------------------------------------------------------------------------------------------


def test_a_plan_is_stored_and_compared_with_the_measured_training(config, tmp_path, run_cli):
    root = tmp_path / "runs"
    code, out, err = run_cli("plan", config, "--runs", root)
    assert code == 0, err
    assert "2 epochs" in out
    assert "each on an otherwise idle machine" in out
    planned = json.loads((root / "tiny" / "plan.json").read_text())
    assert planned["epochs"] == 2
    assert planned["steps_per_epoch"] == 17
    assert planned["seconds"] > 0
    code, _, err = run_cli("train", config, "--runs", root)
    assert code == 0
    assert re.search("planned .* on an otherwise idle machine; it took ", err)
    beside = json.loads((root / "tiny" / "1" / "plan.json").read_text())
    assert beside["planned"]["seconds"] == planned["seconds"]
    assert set(beside["measured"]) == {"seconds", "peak_memory_mib", "data_wait_share"}
    code, _, err = run_cli("train", config, "train.epochs=1", "--runs", root)
    assert "planned " not in err  # of another config
    assert not (root / "tiny" / "2" / "plan.json").exists()


@pytest.fixture
def pauses(monkeypatch):
    """Interrupt each step and each decoded image for 30 ms, as other programs do."""

    def pausing(function):
        def paused(*arguments):
            time.sleep(0.03)
            return function(*arguments)

        return paused

    monkeypatch.setattr(Learner, "backward", pausing(Learner.backward))
    monkeypatch.setattr(Decoder, "_decode", pausing(Decoder._decode))
    monkeypatch.setattr(plan, "_MEASURED_SECONDS", 0.2)


def test_a_plan_does_not_count_the_time_of_other_programs(tmp_path, pauses):
    for number in range(24):
        save_picture(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png", seed=number)
    text = (
        f"task: classify\ndata: {{source: {{folder: '{tmp_path / 'photos'}'}}, image: {{size: 8, channels: 3}}, "
        f"cache_dir: '{tmp_path / 'cache'}', workers: 1, split: {{val: 0.3}}}}\nmodel: [{{conv: 2}}, flatten]\n"
        "train: {epochs: 1, batch: 8, precision: float32}\n"
    )
    planned = plan.plan_training(config_file.parse_config(text, "f.yaml", ["name=f"]), CPU, tmp_path / "runs")
    assert planned["on_idle_machine"]
    assert 0 < planned["seconds_per_step"] < 0.02
    assert planned["decode_seconds"] < 24 * 0.02


def test_a_plan_for_a_device_that_is_waited_for_counts_the_time_that_passes(config, tmp_path, pauses, monkeypatch):
    experiment = config_file.read_config(config)
    monkeypatch.setattr(MemoryStore, "is_in_memory", False)  # as if images were read from the disk
    planned = plan.plan_training(experiment, CPU, tmp_path / "runs")
    assert not planned["on_idle_machine"]
    assert planned["seconds_per_step"] > 0.03


def test_a_plan_restores_the_number_of_threads(config, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_MEASURED_SECONDS", 0.2)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        plan.plan_training(config_file.read_config(config), CPU, tmp_path / "runs")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_a_plan_leaves_the_cache_unchanged_and_estimates_what_is_missing(tmp_path, monkeypatch):
    for number in range(60):
        save_picture(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png", seed=number)
    text = (
        f"task: classify\ndata: {{source: {{folder: '{tmp_path / 'photos'}'}}, image: {{size: 8, channels: 3}}, "
        f"cache_dir: '{tmp_path / 'cache'}', split: {{val: 0.3}}}}\nmodel: [{{conv: 2}}, flatten]\n"
        "train: {epochs: 1, batch: 8}\n"
    )
    made = config_file.parse_config(text, "f.yaml", ["name=f"])
    monkeypatch.setattr(plan, "_MAX_DECODED_IMAGES", 20)
    found = plan.plan_training(made, CPU, tmp_path / "runs")
    assert not (tmp_path / "cache").exists()
    assert found["cache_mib"] == pytest.approx(60 * 3 * 8 * 8 / 2**20, abs=0.05)
    assert found["steps_per_epoch"] == 42 // 8
    train_run(made, tmp_path / "runs", CPU, resume=False)
    again = plan.plan_training(made, CPU, tmp_path / "runs")
    assert again["decode_seconds"] == 0
    assert again["cache_mib"] == 0


def test_a_plan_counts_masks_as_it_counts_images(tmp_path, monkeypatch):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(60):
        save_picture(tmp_path / "images" / f"{number}.png", seed=number)
        with Pil.open(tmp_path / "images" / f"{number}.png") as image:
            Pil.new("L", image.size, number % 2).save(tmp_path / "masks" / f"{number}.png")
    text = (
        f"task: segment\ndata: {{source: {{masks: {{images: '{tmp_path / 'images'}', masks: '{tmp_path / 'masks'}', "
        "classes: [a, b]}}, image: {size: 256, channels: 1, mean: [0], std: [1]}, split: {val: 0.5}, "
        f"cache_dir: '{tmp_path / 'cache'}'}}\nmodel: [{{conv: {{out_channels: 2, stride: 8}}}}]\n"
        "train: {epochs: 1, batch: 8}\n"
    )
    made = config_file.parse_config(text, "f.yaml", ["name=f"])
    monkeypatch.setattr(plan, "_MAX_DECODED_IMAGES", 10)
    monkeypatch.setattr(plan, "_MEASURED_SECONDS", 0.5)
    monkeypatch.setattr(plan, "peak_memory_mib", lambda device: 0)
    mib = 2 * 256 * 256 / 2**20  # an image and its mask
    planned = plan.plan_training(made, CPU, tmp_path / "runs")
    assert planned["cache_mib"] == pytest.approx(60 * mib, abs=0.05)
    assert planned["peak_memory_mib"] == pytest.approx((60 - 2 * 10) * mib, abs=0.5)
    train_run(made, tmp_path / "runs", CPU, resume=False)
    assert plan.plan_training(made, CPU, tmp_path / "runs")["decode_seconds"] == 0
    os.utime(tmp_path / "masks" / "0.png", (1, 1))
    assert plan.plan_training(made, CPU, tmp_path / "runs")["cache_mib"] == planned["cache_mib"]


def test_a_damaged_plan_is_ignored(config, tmp_path, run_cli):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "plan.json").write_text("[3")
    code, _, err = run_cli("train", config, "--runs", tmp_path / "runs", "train.epochs=1")
    assert code == 0
    assert "planned" not in err


def test_facts_with_number_statistics_survive_json():
    facts = DataFacts((), (1, 2, 2), numbers=(NumberStatistics("a", 1.0, 2.0, 0.0, 5.0),))
    for expected in (facts, replace(facts, numbers=())):
        assert parse_stored_facts(json.loads(json.dumps(expected.to_json()))) == (expected, Choices())
