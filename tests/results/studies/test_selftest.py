"""`selftest` passes for a correct training, and each of its checks fails for the fault it looks for."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from cnnrun.base.errors import SelftestError
from cnnrun.data.training_batches import TrainingBatches
from cnnrun.experiment import config_file, preparation
from cnnrun.results.studies import selftest
from cnnrun.tasks.classification import CrossEntropy
from cnnrun.training import checkpoints
from cnnrun.training.learner import Learner
from cnnrun.training.optimizers import AdamW
from tests.support.configs import TINY

CPU = torch.device("cpu")


def check_verdicts(*overrides: str) -> dict[str, bool | None]:
    result = selftest.run_selftest(config_file.parse_config(TINY, "tiny.yaml", ["name=tiny", *overrides]), CPU)
    return {row["check"]: row["passed"] for row in result["checks"]}


ALL = [
    "a repeated run is the same",
    "a resumed run is the same",
    "reading threads change no bit",
    "the first loss equals that of a random guess",
    "one batch can be overfitted",
    "nothing is learned from shuffled labels",
    "no channel is dead",
    "gradients reach every weight",
    "an image gives the same output alone and in a batch",
]


def test_all_checks_pass_and_no_file_is_left_behind(run_cli, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli("selftest", tiny, "train.accumulate=2", "train.ema={decay: 0.9}", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert [row["check"] for row in result["checks"]] == ALL
    assert {row["passed"] for row in result["checks"]} == {True}
    assert result["passed"]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    code, out, _ = run_cli("selftest", tiny)
    assert code == 0
    assert "tiny: all checks passed" in out


def test_no_loss_is_computed_of_more_than_a_batch(monkeypatch):
    """The outputs of a large segmentation network on all of val would not fit into memory."""
    real, sizes = CrossEntropy.forward, set()

    def watch(self, outputs, targets):
        sizes.add(len(outputs))
        return real(self, outputs, targets)

    monkeypatch.setattr(CrossEntropy, "forward", watch)
    assert check_verdicts("train.batch=32")[ALL[5]]
    assert max(sizes) == 32


def assert_fails(*names: str, also: tuple[str, ...] = ()) -> None:
    found = {name for name, passed in check_verdicts().items() if passed is False}
    assert set(names) <= found <= {*names, *also}


def test_batches_that_change_between_runs_fail(monkeypatch):
    real, calls = TrainingBatches.at, []

    def other_each_time(self, step):
        calls.append(step)
        batch = real(self, step)
        batch.images.view(-1)[0] = len(calls) % 251
        return batch

    monkeypatch.setattr(TrainingBatches, "at", other_each_time)
    assert_fails(*ALL[:3])


def test_a_resume_that_restores_weights_alone_fails(monkeypatch):
    real = checkpoints.load
    monkeypatch.setattr(
        Learner, "restore", lambda self, saved, *rest: self.network.load_state_dict(real(saved.path).parts["model"])
    )
    assert_fails(ALL[1])


def test_images_that_depend_on_the_workers_fail(monkeypatch):
    from cnnrun.data.image_stores import DecodingStore

    real = DecodingStore.take
    monkeypatch.setattr(DecodingStore, "take", lambda self, rows: real(self, rows.flip(0)))
    assert_fails(ALL[2])


def test_a_first_loss_unlike_a_guess_fails(monkeypatch):
    real = CrossEntropy.forward
    monkeypatch.setattr(CrossEntropy, "forward", lambda self, outputs, targets: real(self, outputs * 60, targets))
    assert_fails(ALL[3], also=tuple(ALL[4:7]))


def test_a_network_that_cannot_learn_fails(monkeypatch):
    monkeypatch.setattr(selftest, "GENTLE_OPTIMIZER", AdamW(lr=1e-12, weight_decay=0.0))
    assert_fails(ALL[4])


def test_learning_from_shuffled_labels_fails(monkeypatch):
    """Without the shuffle, the network learns the labels that the check expects it not to learn."""
    monkeypatch.setattr(selftest, "_shuffle_labels", lambda examples: examples)
    assert_fails(ALL[5])


def test_dead_units_and_weights_without_gradients_fail(monkeypatch):
    real = preparation.build_setup

    def dying(*arguments):
        setup = real(*arguments)
        with torch.no_grad():
            setup.network.layers.conv1.conv.weight.fill_(0)
            setup.network.layers.conv1.norm.bias.fill_(-9)
        return setup

    monkeypatch.setattr(preparation, "build_setup", dying)
    found = {name for name, passed in check_verdicts().items() if passed is False}
    assert {ALL[6], ALL[7]} <= found


def test_an_output_that_depends_on_its_batch_fails(monkeypatch):
    class Together(nn.Module):
        def forward(self, features):
            return features - features.mean(0)

    real = preparation.build_setup

    def mixing(*arguments):
        setup = real(*arguments)
        setup.network.head = nn.Sequential(setup.network.head, Together())
        return setup

    monkeypatch.setattr(preparation, "build_setup", mixing)
    found = {name for name, passed in check_verdicts().items() if passed is False}
    assert ALL[8] in found


def test_a_failed_check_exits_with_9(run_cli, tiny, monkeypatch):
    monkeypatch.setattr(selftest, "GENTLE_OPTIMIZER", AdamW(lr=1e-12, weight_decay=0.0))
    code, out, err = run_cli("selftest", tiny)
    assert code == 9
    assert "FAILED" in out
    assert err == "selftest: 1 of 9 checks failed: one batch can be overfitted\n"
    with pytest.raises(SelftestError):
        selftest.refuse_failed_checks({"checks": [{"check": "x", "passed": False}]})


def test_selftest_without_a_config_uses_its_own(run_cli):
    code, out, _ = run_cli("selftest")
    assert code == 0
    assert "selftest: all checks passed" in out
