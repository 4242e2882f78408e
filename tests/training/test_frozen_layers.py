"""Frozen layers, their precomputed features, parameter groups, and parts of zoo networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cnnrun.base.errors import ConfigError
from cnnrun.experiment import assemble, config_file
from cnnrun.results.studies.train_run import train_run
from cnnrun.training import checkpoints, frozen_layers, learner, settings
from cnnrun.training.learner import Learner
from tests.support.configs import TINY, tiny_experiment
from tests.support.interrupted_trainings import digest, stop_at
from tests.support.small_runs import train_from_weights, train_tiny

CPU = torch.device("cpu")
FROZEN = "train.freeze=conv1"


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_newest(run / "checkpoints", "latest", pytest.fail).parts["model"]


def setup_of(made, tmp_path):
    return assemble.build_setup(made, assemble.prepare_dataset(made), None, CPU)


@pytest.mark.parametrize("augment", [None, "data.augment={shift: 0.2}"], ids=["features once", "features each step"])
def test_frozen_layers_and_their_statistics_do_not_change_and_the_rest_does(tmp_path, augment):
    settings = [FROZEN, "train.epochs=1", *([augment] if augment else [])]
    made = tiny_experiment(*settings)
    initial = setup_of(made, tmp_path / "job").network.state_dict()
    after = tensors(train_tiny(tmp_path, *settings))
    for name, value in after.items():
        frozen_one = name.startswith(("layers.conv1", "normalize"))
        assert torch.equal(value, initial[name]) == frozen_one, name


@pytest.mark.parametrize("rich", [[], ["train.ema={decay: 0.9}", "train.accumulate=2", "train.clip=1.0"]])
def test_resuming_with_precomputed_features_equals_an_uninterrupted_run(tmp_path, monkeypatch, rich):
    whole = train_tiny(tmp_path / "whole", FROZEN, *rich)
    with stop_at(13):
        train_tiny(tmp_path / "cut", FROZEN, *rich)
    resumed = train_run(tiny_experiment(FROZEN, *rich), tmp_path / "cut", CPU, resume=True)
    assert digest(Path(resumed["run"])) == digest(whole)


def test_precomputed_features_train_like_features_computed_each_step(tmp_path, monkeypatch):
    """Equal up to the rounding of a convolution over a different number of images at a time."""
    once = tensors(train_tiny(tmp_path / "once", FROZEN))
    monkeypatch.setattr(Learner, "precompute_frozen_features", lambda self: None)
    each = tensors(train_tiny(tmp_path / "each", FROZEN))
    for name, value in once.items():
        assert torch.allclose(value.double(), each[name].double(), rtol=1e-3, atol=1e-4), name


def test_frozen_features_are_computed_once(tmp_path, monkeypatch):
    passes = []
    real = frozen_layers.Trunk.forward
    monkeypatch.setattr(frozen_layers.Trunk, "forward", lambda self, x: passes.append(len(x)) or real(self, x))
    made = train_tiny(tmp_path, FROZEN, "train.epochs=3")
    data = assemble.prepare_dataset(tiny_experiment())
    assert sum(passes) == sum(len(data.splits[name]) for name in ("train", "val"))
    assert made.exists()


@pytest.mark.parametrize(
    ("setting", "why"),
    [("data.augment={flip: horizontal}", "augmentation changes"), ("data.memory_gib=0.00001", "GiB")],
)
def test_the_reason_for_not_precomputing_features_is_reported(tmp_path, capfd, setting, why):
    train_tiny(tmp_path, FROZEN, "train.epochs=1", setting)
    assert why in capfd.readouterr().err


LINKED = """
task: classify
data: {source: digits}
model:
  - conv: {name: a, out_channels: 4, activation: relu}
  - conv: {name: b, out_channels: 4, activation: relu}
  - conv: {name: c, out_channels: 4}
  - add: [SOURCE, c]
  - flatten
"""


@pytest.mark.parametrize(("source", "cuts"), [("a", False), ("b", False), ("c", True)])
def test_a_network_is_split_only_where_a_single_output_crosses(tmp_path, source, cuts):
    made = config_file.parse_config(
        LINKED.replace("SOURCE", source), "f", ["train.freeze=b" if source != "c" else "train.freeze=a"]
    )
    network = setup_of(made, tmp_path).network.eval()
    parts = frozen_layers.separate_trunk(network, made.train.freeze)
    assert (parts is not None) == cuts
    if parts:
        trunk, tail = parts
        pictures = torch.rand(3, 1, 8, 8)
        assert torch.equal(tail(trunk(pictures)), network(pictures))


def test_parameter_groups_have_their_own_learning_rate_and_weight_decay():
    groups = "[{params: head, lr: 0.5}, {params: '*.bias', weight_decay: 0.0}, {params: layers.conv1, lr: 0.01}]"
    made = tiny_experiment(f"train.optimizer={{sgd: {{lr: 0.1, weight_decay: 0.3, groups: {groups}}}}}")
    learning = Learner(setup_of(made, Path("unused")))
    found = {}
    names = iter(learning.parameter_names)
    for group in learning.optimizer.param_groups:
        found |= {next(names): (group["peak"], group["weight_decay"]) for _ in group["params"]}
    assert found["head.weight"] == found["head.bias"] == (0.5, 0.3)  # the first group that matches counts
    assert found["layers.linear1.linear.bias"] == (0.1, 0.0)
    assert found["layers.conv1.conv.weight"] == (0.01, 0.3)
    assert found["layers.linear1.linear.weight"] == (0.1, 0.3)


def test_a_step_uses_the_learning_rate_of_each_parameter_group(tmp_path):
    """Plain SGD: the change of a weight is its group's learning rate times its gradient times the schedule's factor."""
    made = tiny_experiment("train.optimizer={sgd: {lr: 0.1, groups: [{params: head, lr: 0.5}]}}")
    setup = setup_of(made, tmp_path)
    learning = Learner(setup)
    from cnnrun.data.training_batches import BatchPlan, BatchReading, TrainingBatches

    batch = TrainingBatches(setup.dataset.splits["train"], setup.augment, BatchPlan(8, 1, 0), BatchReading(CPU)).at(0)
    learning.backward(batch, 0)
    parameters = dict(learner.trainable_parameters(learning.network_and_criterion))
    expected = {
        name: (value - (0.5 if name.startswith("head") else 0.1) * 0.25 * value.grad).detach().clone()
        for name, value in parameters.items()
    }
    learning.update_weights(0, 0.25)
    for name, value in parameters.items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-8), name


def test_resuming_with_parameter_groups_equals_an_uninterrupted_run(tmp_path, monkeypatch):
    groups = (
        "train.optimizer={adamw: {lr: 0.01, groups: [{params: head, lr: 0.05}, {params: '*.bias', weight_decay: 0}]}}"
    )
    whole = train_tiny(tmp_path / "whole", groups)
    with stop_at(7):
        train_tiny(tmp_path / "cut", groups)
    resumed = train_run(tiny_experiment(groups), tmp_path / "cut", CPU, resume=True)
    assert digest(Path(resumed["run"])) == digest(whole)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.freeze=conv9", "train.freeze: no layer 'conv9' in the model; did you mean 'conv1'?"),
        (
            "train.optimizer={sgd: {groups: [{params: layers.conv2, lr: 1}]}}",
            "train.optimizer.sgd.groups[0].params: 'layers.conv2' matches no trainable parameter",
        ),
        (
            "train.optimizer={sgd: {groups: [{params: '*', lr: 1}, {params: head, lr: 2}]}}",
            "train.optimizer.sgd.groups[1].params: 'head' matches no trainable parameter outside earlier groups",
        ),
        ("train.optimizer={sgd: {groups: [{params: head}]}}", "needs lr, weight_decay or both"),
        ("model={zoo: resnet18, until: [a]}", "model.until: no layer ['a']"),
        ("model={zoo: 5}", "model.zoo: no network 5 in the zoo (`cnnrun zoo list` shows them)"),
        ("model={layers: [flatten], until: flatten1}", "until says where"),
        ("model={layers: [flatten], weights: x, until: nope}", "model.until: no layer 'nope'"),
        ("model={zoo: resnet18, until: stage9}", "model.until: no layer 'stage9'"),
        ("model=resnet19", "model.zoo: no network 'resnet19' in the zoo; did you mean 'resnet18'?"),
        ("model={zoo: [1]}", "model.zoo: no network [1] in the zoo"),
        ("model={zoo: resnet18, layers: 3}", "model: expected a list"),
        ("model={zoo: resnet18, wieghts: x}", "unknown key; did you mean 'weights'?"),
    ],
)
def test_a_wrong_name_in_the_config_is_reported_with_its_key(override, message):
    with pytest.raises(ConfigError) as refused:
        config_file.parse_config(TINY, "tiny.yaml", [override])
    assert any(message in line for line in refused.value.lines), refused.value.lines


def test_parameter_groups_of_only_frozen_parameters_are_refused():
    with pytest.raises(ConfigError, match="matches no trainable parameter"):
        tiny_experiment(FROZEN, "train.optimizer={sgd: {groups: [{params: layers.conv1, lr: 1}]}}")


def test_a_zoo_network_can_be_truncated_and_extended():
    made = config_file.parse_config(
        """
task: classify
data: {source: digits, image: {size: 64, channels: 3}}
model: {zoo: resnet18, until: stage2, layers: [{conv: {name: mine, out_channels: 8}}, global_avg_pool]}
""",
        "f",
    )
    assert [layer.name for layer in made.model.layers][-3:] == ["stage2", "mine", None]
    assert made.model.until is None  # without weights `until` has no further use
    assert config_file.parse_config(made.to_yaml(), "again") == made
    linked = config_file.parse_config(
        made.to_yaml(),
        "f",
        ["model={zoo: resnet18, layers: [{conv: {from: stage3, out_channels: 8}}, global_avg_pool]}"],
    )
    assert linked.model.layers[-2].input_names() == ["stage3"]


def test_weights_are_loaded_up_to_the_last_layer_of_the_zoo_network():
    made = config_file.parse_config(
        """
task: classify
data: {source: digits, image: {size: 64, channels: 3}}
model: {zoo: resnet18, weights: some.safetensors, layers: [{linear: {name: mine, out_features: 8}}]}
""",
        "f",
    )
    assert (made.model.until, made.model.weights) == ("stage4", "some.safetensors")
    assert config_file.parse_config(made.to_yaml(), "again") == made


def test_overrides_extend_a_network_given_by_name():
    text = "task: classify\ndata: {source: digits, image: {size: 64, channels: 3}}\nmodel: resnet18\n"
    made = config_file.parse_config(
        text, "f", ["model.weights=x.safetensors", "model.until=stage3", "model.layers=[global_avg_pool]"]
    )
    assert (made.model.weights, made.model.until) == ("x.safetensors", "stage3")
    assert json.loads(json.dumps(made.model_dump(mode="json")))["model"]["weights"] == "x.safetensors"


def test_the_zoo_classifier_is_used_unless_the_config_sets_one():
    text = "task: TASK\ndata: {source: digits, image: {size: 64, channels: 3}}\nmodel: squeezenet1_1\n"
    for task, expected in (("classify", "conv"), ("{classify: {top_k: 3}}", "conv")):
        assert config_file.parse_config(text.replace("TASK", task), "f").task.classifier == expected
    with pytest.raises(ConfigError, match="needs a vector"):
        config_file.parse_config(text.replace("TASK", "{classify: {classifier: linear}}"), "f")


ZOO = """
task: classify
data: {source: digits, image: {size: 64, channels: 3}}
model: {zoo: resnet18, weights: x.safetensors}
"""


def test_several_overrides_of_a_zoo_network_combine():
    assert config_file.parse_config(ZOO, "f", ["model.weights=null"]).model.weights is None
    made = config_file.parse_config(
        TINY, "f", ["model=resnet18", "model.until=stage1", "model.layers=[global_avg_pool]", "data.image.size=64"]
    )
    assert made.model.layers[-2].name == "stage1"


def test_a_whole_zoo_network_with_weights_has_no_until():
    assert config_file.parse_config(ZOO, "f").model.until is None


def test_a_zoo_classifier_is_not_inherited_by_a_part_of_its_network():
    text = "task: classify\ndata: {source: digits, image: {size: 64, channels: 3}}\n"
    made = config_file.parse_config(
        text + "model: {zoo: squeezenet1_1, until: fire4, layers: [global_avg_pool]}\n", "f"
    )
    assert made.task.classifier == "linear"
    whole = config_file.parse_config(text.replace("classify", "{classify: null}") + "model: squeezenet1_1\n", "f")
    assert whole.task.classifier == "conv"


def test_frozen_batch_norms_allow_a_batch_of_one():
    setup = setup_of(tiny_experiment(FROZEN), Path("unused"))
    spec = tiny_experiment(FROZEN, "train.batch=1").train
    settings.check_batch_size(spec, 100, setup.network)
    with pytest.raises(ConfigError, match="two images"):
        settings.check_batch_size(tiny_experiment("train.batch=1").train, 100, setup.network)


def test_non_finite_features_of_frozen_layers_are_reported_with_the_image(tmp_path):
    from cnnrun.base.errors import NonFiniteError

    setup = setup_of(tiny_experiment(FROZEN), tmp_path)
    with torch.no_grad():
        setup.network.layers.conv1[0].weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="features of digits"):
        Learner(setup).precompute_frozen_features()


def test_freezing_layers_with_random_weights_is_reported(trained_run, tmp_path, capfd):
    train_from_weights(trained_run, tmp_path, "model.until=conv1", "train.freeze=linear1")
    assert "they keep their random weights" in capfd.readouterr().err


# --- freeze_epochs ----------------------------------------------------------------------------------------------------

THAWED = [FROZEN, "train.freeze_epochs=1", "train.epochs=2", "train.keep=9", "train.schedule=constant"]
STEPS = 17  # of an epoch of TINY
OPTIMIZERS = [
    "{sgd: {lr: 0.05, momentum: 0.9, nesterov: true}}",
    "{sgd: 0.05}",
    "{adam: 0.01}",
    "{adamw: 0.01}",
    "rmsprop",
]


def tensors_after(run: Path, step: int) -> dict[str, torch.Tensor]:
    (path,) = [path for path in checkpoints.list_checkpoints(run / "checkpoints") if int(path.name[5:]) == step]
    return checkpoints.load(path).parts["model"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_layers_learn_after_their_frozen_epochs_and_not_before(tmp_path, optimizer):
    settings = [*THAWED, f"train.optimizer={optimizer}", f"train.save_every={(STEPS + 1) // 2}"]
    initial = setup_of(tiny_experiment(*settings), tmp_path / "job").network.state_dict()
    run = train_tiny(tmp_path, *settings)
    before, first, after = (tensors_after(run, step) for step in (STEPS, STEPS + 1, 2 * STEPS))
    for name, value in before.items():
        is_frozen = name.startswith(("layers.conv1", "normalize"))
        assert torch.equal(value, initial[name]) == is_frozen, name
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith("normalize"), name
        assert torch.equal(first[name], before[name]) == name.startswith("normalize"), name


def test_the_frozen_epochs_are_those_of_a_frozen_training(tmp_path):
    augment = "data.augment={shift: 0.1}"  # without it the features are computed once, which rounds differently
    thawed = train_tiny(tmp_path / "thawed", *THAWED, augment)
    frozen = train_tiny(tmp_path / "frozen", FROZEN, "train.epochs=1", "train.schedule=constant", augment)
    expected = tensors(frozen)
    for name, value in tensors_after(thawed, STEPS).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("rich", [["train.optimizer={adamw: 0.01}", "train.ema={decay: 0.9}", "train.clip=1.0"], []])
def test_a_resume_on_either_side_of_the_change_has_the_same_bits(tmp_path, rich):
    whole = train_tiny(tmp_path / "whole", *THAWED, *rich)
    for step in (STEPS - 3, STEPS - 1, STEPS, STEPS + 4):
        with stop_at(step):
            train_tiny(tmp_path / str(step), *THAWED, *rich)
        resumed = train_run(tiny_experiment(*THAWED, *rich), tmp_path / str(step), CPU, resume=True)
        assert digest(Path(resumed["run"])) == digest(whole), step


def test_groups_may_name_layers_that_learn_later(tmp_path):
    group = "train.optimizer={sgd: {lr: 0.05, groups: [{params: 'layers.conv1*', lr: 0.0001}]}}"
    run = train_tiny(tmp_path, *THAWED, group)
    before, after = tensors_after(run, STEPS), tensors_after(run, 2 * STEPS)
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before if name.endswith("weight")}
    assert 0 < moved["layers.conv1.conv.weight"] < 0.05 * moved["layers.linear1.linear.weight"]
    with pytest.raises(ConfigError, match="matches no trainable parameter"):
        tiny_experiment(FROZEN, group)


def test_frozen_epochs_without_frozen_layers_are_refused():
    with pytest.raises(ConfigError, match=r"freeze_epochs says how long `freeze` holds; add `freeze` or remove it"):
        tiny_experiment("train.freeze_epochs=2")
    with pytest.raises(ConfigError, match="freeze_epochs: 5 leaves none of 2 epochs; remove it"):
        tiny_experiment(FROZEN, "train.freeze_epochs=5")


def test_batches_of_one_are_refused_where_batch_norms_learn_later(tmp_path):
    tiny_experiment(FROZEN, "train.batch=1")
    with pytest.raises(ConfigError, match="batch norm needs"):
        train_tiny(tmp_path, *THAWED, "train.batch=1")
