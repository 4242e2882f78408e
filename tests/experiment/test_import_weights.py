"""Weights from other programs: each goes to the right tensor, all or none are loaded, and their metadata is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cnnrun.base.errors import CheckpointError, ConfigError
from cnnrun.experiment import config_file, open_run
from cnnrun.experiment.import_weights import convert_weights
from cnnrun.experiment.weights_source import read_weights
from cnnrun.model import tensor_matching, weights_file
from cnnrun.results.studies.train_run import train_run
from cnnrun.training import checkpoints
from cnnrun.training.run_records import parse_facts
from tests.support.small_runs import train_from_weights

pytestmark = pytest.mark.usefixtures("forked_pickle_reader")
CPU = torch.device("cpu")


DATA = Path(__file__).parents[2] / "data" / "mobilenet-v2"
PTH = DATA / "mobilenet_v2-b0353104.pth"
needs_mobilenet_weights = pytest.mark.skipif(not PTH.exists(), reason="scripts/get_data mobilenet-v2 was not run")


def numbered_tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.full(shape, float(n)) for n, (name, shape) in enumerate(shapes.items())}


def test_matching_in_order_pairs_tensors_by_position():
    ours = numbered_tensors(conv__weight=(2, 3, 3, 3), conv__bias=(2,), head__weight=(5, 2))
    theirs = numbered_tensors(a__weight=(2, 3, 3, 3), a__bias=(2,), z__weight=(5, 2))
    assert tensor_matching.match_in_order(ours, theirs) == {
        "conv.weight": "a.weight",
        "conv.bias": "a.bias",
        "head.weight": "z.weight",
    }


def test_a_block_parameter_may_come_before_its_layers():
    ours = numbered_tensors(conv__weight=(4, 1, 7, 7), conv__bias=(4,), scale__weight=(4, 1, 1))
    theirs = numbered_tensors(layer_scale=(4, 1, 1), block__0__weight=(4, 1, 7, 7), block__0__bias=(4,))
    assert tensor_matching.match_in_order(ours, theirs)["scale.weight"] == "layer_scale"


@pytest.mark.parametrize(
    ("theirs", "row"),
    [
        (
            numbered_tensors(a__weight=(2, 3, 5, 5), a__bias=(2,)),
            "network: conv.weight 2x3x3x3   file: a.weight 2x3x5x5",
        ),
        (numbered_tensors(a__weight=(2, 3, 3, 3)), "network: conv.bias 2   file: nothing"),
        (numbered_tensors(a__weight=(2, 3, 3, 3), a__bias=(2,), b__bias=(2,)), "network: nothing   file: b.bias 2"),
        (
            numbered_tensors(a__weight=(2, 3, 3, 3), a__running_mean=(2,)),
            "network: conv.bias 2   file: a.running_mean 2",
        ),
    ],
)
def test_each_tensor_mismatch_is_a_row_of_the_error(theirs, row):
    ours = numbered_tensors(conv__weight=(2, 3, 3, 3), conv__bias=(2,))
    with pytest.raises(tensor_matching.TensorMismatchError) as misfit:
        tensor_matching.match_in_order(ours, theirs)
    assert row in misfit.value.rows


def test_files_without_batch_norm_counters_are_accepted():
    norm = nn.BatchNorm2d(3).state_dict()
    old = {name: value for name, value in norm.items() if name != "num_batches_tracked"}
    assert set(tensor_matching.match_in_order(norm, old)) == set(tensor_matching.match_by_name(norm, old)) == set(old)


def test_a_weights_file_is_read_as_it_was_written(tmp_path, trained_run):
    tried = config_file.read_config(trained_run / "config.yaml")
    saved = checkpoints.load_newest(trained_run / "checkpoints", "best", pytest.fail)

    facts = parse_facts(saved.state, "here")[0]
    about = weights_file.WeightsDescription(task=tried.task, image=tried.data.image, model=tried.model)
    weights_file.write_weights_file(tmp_path / "w.safetensors", saved.parts["model"], about, facts)
    read = read_weights(tmp_path / "w.safetensors")
    assert (read.description, read.facts, read.match_rule) == (about, facts, "name")
    assert all(torch.equal(read.tensors[name], value) for name, value in saved.parts["model"].items())
    used = open_run.open_network(tmp_path / "w.safetensors", tmp_path, CPU)
    _, trained = open_run.open_trained(trained_run, tmp_path, CPU)
    pictures = torch.rand(4, 1, 8, 8) * 255
    assert torch.equal(used.results(pictures)["probabilities"], trained.results(pictures)["probabilities"])


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path, run_cli, trained_run):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    tensors = tmp_path / "bare.safetensors"
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.ones(2)}, tensors)
    damaged = tmp_path / "damaged.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, damaged, {"cnnrun.config": "task: [", "cnnrun.facts": "{}"})
    for path, why in (
        (tmp_path / "x.safetensors", "not a safetensors file"),
        (tensors, "bare tensors"),
        (damaged, "damaged"),
    ):
        code, _, err = run_cli("predict", tmp_path, "--run", path)
        assert (code, len(err.splitlines())) == (3, 1)
        assert why in err
    code, _, err = run_cli("eval", tensors)
    assert (code, len(err.splitlines())) == (3, 1)
    assert "a weights file has no config and data" in err


def test_training_starts_from_a_runs_weights_and_statistics(trained_run, tmp_path, capfd):
    before = checkpoints.load_newest(trained_run / "checkpoints", "best", pytest.fail).parts["model"]
    _, after = train_from_weights(trained_run, tmp_path, "train.optimizer={sgd: 1e-12}", "train.freeze=max_pool1")
    for name, value in before.items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.allclose(after[name], value, atol=1e-6), name
    assert (
        "randomly initialised: none" in capfd.readouterr().err
    )  # the head is loaded too, because the classes are the same


def test_layers_after_until_keep_their_initial_weights(trained_run, tmp_path, capfd):
    _, after = train_from_weights(
        trained_run, tmp_path, "train.optimizer={sgd: 1e-12}", "model.until=conv1", "train.freeze=conv1"
    )
    before = checkpoints.load_newest(trained_run / "checkpoints", "best", pytest.fail).parts["model"]
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("layers.conv1"))
    assert not torch.equal(after["layers.linear1.linear.weight"], before["layers.linear1.linear.weight"])
    assert "randomly initialised: layers.linear1.linear.weight" in capfd.readouterr().err


def test_mismatched_weights_are_refused_before_a_run_folder_exists(trained_run, tmp_path):
    with pytest.raises(CheckpointError) as refused:
        train_from_weights(trained_run, tmp_path, "model.layers[0].conv.out_channels=5")
    assert "not weights of this network" in refused.value.lines[0]
    assert (
        "network: layers.conv1.conv.weight 5x1x3x3   file: layers.conv1.conv.weight 4x1x3x3" in refused.value.lines[1]
    )
    assert not any(tmp_path.iterdir())


def test_a_resumed_run_no_longer_needs_the_weights_it_started_from(trained_run, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained_run, copy)
    run, _ = train_from_weights(copy, tmp_path / "runs")
    shutil.rmtree(copy)
    (run / "result.json").unlink()  # as if the run had been killed at its end
    tried = config_file.read_config(run / "config.yaml")
    assert tried.model.weights == str(copy)
    result = train_run(tried, tmp_path / "runs", CPU, resume=True)
    assert Path(result["run"]) == run


def test_a_run_without_a_checkpoint_is_not_resumed_with_changed_weights(trained_run, tmp_path):
    import shutil

    run, _ = train_from_weights(trained_run, tmp_path)
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints")
    (run / "weights.json").write_text(json.dumps({"path": "w.safetensors", "sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="changed since"):
        train_run(config_file.read_config(run / "config.yaml"), tmp_path, CPU, resume=True)


# --- import ----------------------------------------------------------------------------------------------------------


def save_plain_network(tmp_path: Path) -> tuple[Path, nn.Module]:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).eval()
    path = tmp_path / "plain.pth"
    torch.save(network.state_dict(), path)
    return path, network


LIKE = """
task: classify
data: {source: digits, image: {mean: [1.5], std: [4.0]}}
model: [{conv: {out_channels: 4, activation: relu}}, flatten]
"""


def test_an_imported_state_dict_gives_the_original_networks_outputs(tmp_path, run_cli):
    path, network = save_plain_network(tmp_path)
    (tmp_path / "like.yaml").write_text(LIKE)
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    out = tmp_path / "w.safetensors"
    words = ["import", path, "--like", tmp_path / "like.yaml", "--classes", tmp_path / "names.txt", "--out", out]
    code, printed, _ = run_cli(*words, "--json")
    assert code == 0
    assert json.loads(printed)["parameters"] == sum(p.numel() for p in network.parameters())
    used = open_run.open_network(out, tmp_path, CPU)
    assert used.facts.classes == ("cat", "dog", "owl")
    pictures = torch.randint(0, 17, (5, 1, 8, 8)).float()
    with torch.no_grad():
        expected = network((pictures - 1.5) / 4.0).softmax(1)
    assert torch.allclose(used.results(pictures)["probabilities"], expected, atol=1e-6)


def test_import_errors_name_the_cause(tmp_path, run_cli):
    path, _ = save_plain_network(tmp_path)
    (tmp_path / "like.yaml").write_text(LIKE)
    (tmp_path / "bare.yaml").write_text(LIKE.replace("image: {mean: [1.5], std: [4.0]}", ""))
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    cases = [
        (["--like", "resnet18"], 3, "not weights of resnet18 by order"),
        (["--like", tmp_path / "like.yaml", "--match", "name"], 3, "file: nothing"),
        (["--like", "resnet99"], 2, "no network 'resnet99'"),
        (["--like", "lenet5"], 2, "give a config"),
        (["--like", tmp_path / "bare.yaml"], 2, "mean and std"),
        (["--like", tmp_path / "like.yaml", "--classes", tmp_path / "two.txt"], 2, "2 names for 3 classes"),
        (["--like", tmp_path / "like.yaml", "--classes", tmp_path / "none.txt"], 2, "cannot be read"),
    ]
    for words, expected, why in cases:
        code, _, err = run_cli("import", path, *words, "--out", tmp_path / "w.safetensors")
        assert code == expected, err
        assert why in err
        assert not (tmp_path / "w.safetensors").exists()


def test_tensors_can_be_dropped_by_pattern(tmp_path):
    path, network = save_plain_network(tmp_path)
    torch.save({"aux.weight": torch.ones(7, 7), **network.state_dict()}, path)
    (tmp_path / "like.yaml").write_text(LIKE)
    with pytest.raises(CheckpointError):
        convert_weights(path, str(tmp_path / "like.yaml"), "order", None, [])
    made = convert_weights(path, str(tmp_path / "like.yaml"), "order", None, ["aux.*"])
    assert torch.equal(made.tensors["layers.conv1.conv.weight"], network[0].weight)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "regnet_y_400mf", "convnext_tiny", "densenet121"])
def test_torchvision_state_dicts_are_imported_in_order(name, tmp_path):
    import torchvision

    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    made = convert_weights(tmp_path / "w.pth", name, "order", "imagenet", [])
    weights_file.write_weights_file(tmp_path / "w.safetensors", made.tensors, made.description, made.facts)
    used = open_run.open_network(tmp_path / "w.safetensors", tmp_path, CPU).network
    pictures = torch.randn(1, 3, 224, 224).to(memory_format=torch.channels_last)
    with torch.no_grad():
        ours = used.head(used.layers(pictures))
        assert torch.equal(ours, theirs.to(memory_format=torch.channels_last)(pictures))


@needs_mobilenet_weights
def test_mobilenet_v2_with_its_imagenet_weights_gives_torchvisions_logits_bit_for_bit(tmp_path):
    import torchvision
    from PIL import Image

    made = convert_weights(PTH, "mobilenet_v2", "order", "imagenet", [])
    weights_file.write_weights_file(tmp_path / "w.safetensors", made.tensors, made.description, made.facts)
    ours = open_run.open_network(tmp_path / "w.safetensors", tmp_path, CPU).network
    theirs = torchvision.models.mobilenet_v2().eval()
    theirs.load_state_dict(torch.load(PTH, weights_only=True))
    prepare = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    pictures = torch.stack([prepare(Image.open(path).convert("RGB")) for path in sorted((DATA / "pictures").iterdir())])
    pictures = pictures.to(memory_format=torch.channels_last)
    theirs.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(ours.head(ours.layers(pictures)), theirs(pictures))


@needs_mobilenet_weights
def test_predict_gets_18_of_20_imagenet_images_right_at_top_1_and_20_at_top_5(tmp_path, run_cli):
    """torchvision's network gets the same on foolbox's images, whose file names end in the class number."""
    out = tmp_path / "mobilenet_v2.safetensors"
    assert run_cli("import", PTH, "--like", "mobilenet_v2", "--classes", "imagenet", "--out", out)[0] == 0
    code, printed, _ = run_cli("predict", DATA / "pictures", "--run", out, "--json")
    assert code == 0
    from torchvision.models import MobileNet_V2_Weights

    names = MobileNet_V2_Weights.DEFAULT.meta["categories"]
    rows = [json.loads(line) for line in printed.splitlines()]
    truth = [names[int(Path(row["path"]).stem.split("_")[-1])] for row in rows]
    assert sum(row["label"] == name for row, name in zip(rows, truth, strict=True)) == 18
    assert sum(name in [top["label"] for top in row["top"]] for row, name in zip(rows, truth, strict=True)) == 20


def test_import_like_an_unknown_network_is_a_config_error():
    with pytest.raises(ConfigError):
        convert_weights(Path("x.pth"), "nothing", "order", None, [])


FACTS = {"classes": ["a", "b"], "image": [1, 8, 8], "mean": [0.0], "std": [1.0]}
DESCRIBED = "task: classify\nimage: {size: 8, channels: 1}\nmodel: [flatten]\n"


def write_weights_file(tmp_path: Path, described: str, facts: str, weight: torch.Tensor | None = None) -> Path:
    import safetensors.torch

    path = tmp_path / "h.safetensors"
    tensors = {"head.weight": torch.ones(2, 64) if weight is None else weight, "head.bias": torch.zeros(2)}
    tensors |= {"normalize.mean": torch.zeros(1, 1, 1), "normalize.std": torch.ones(1, 1, 1)}
    safetensors.torch.save_file(tensors, path, {"cnnrun.config": described, "cnnrun.facts": facts})
    return path


def test_a_valid_description_is_accepted(tmp_path):
    assert open_run.open_network(
        write_weights_file(tmp_path, DESCRIBED, json.dumps(FACTS)), tmp_path, CPU
    ).facts.classes == (
        "a",
        "b",
    )


@pytest.mark.parametrize(
    ("facts", "described"),
    [
        (FACTS | {"image": [1, 16]}, DESCRIBED),
        (FACTS | {"image": ["x", 1, 2]}, DESCRIBED),
        (FACTS | {"mean": "abc"}, DESCRIBED),
        (FACTS | {"classes": [1, 2]}, DESCRIBED),
        (FACTS | {"image": [3, 100_000, 100_000]}, DESCRIBED.replace("{size: 8, channels: 1}", "{}")),
        ("[" * 100_000, DESCRIBED),
        (FACTS, DESCRIBED.replace("[flatten]", "[{linear: 3}]")),
        (FACTS, DESCRIBED.replace("[flatten]", "resnet99")),
        (FACTS, DESCRIBED.replace("[flatten]", "[{max_pool: 100}, flatten]")),
        (FACTS, "[" * 1000),
    ],
)
def test_an_invalid_description_is_refused_in_one_line(tmp_path, facts, described):
    path = write_weights_file(tmp_path, described, facts if isinstance(facts, str) else json.dumps(facts))
    with pytest.raises(CheckpointError) as refused:
        open_run.open_network(path, tmp_path, CPU)
    assert len(refused.value.lines) == 1


@pytest.mark.parametrize(
    "weight", [torch.full((2, 64), float("nan")), torch.ones(2, 64, dtype=torch.complex64), torch.ones(2, 64).long()]
)
def test_weights_that_are_not_finite_real_numbers_are_refused(tmp_path, weight):
    with pytest.raises(CheckpointError, match="not made of finite real numbers"):
        read_weights(write_weights_file(tmp_path, DESCRIBED, json.dumps(FACTS), weight))


def test_pipes_and_impossible_paths_are_refused(tmp_path):
    import os

    os.mkfifo(tmp_path / "p.safetensors")
    for path in (tmp_path / "p.safetensors", tmp_path / "none.safetensors", Path("x" * 5000), tmp_path):
        with pytest.raises(CheckpointError):
            read_weights(path)


def test_a_checkpoint_pointer_is_accepted_as_a_weights_source(trained_run):
    best = read_weights(trained_run / "checkpoints" / "best")
    assert best.digest == read_weights(trained_run).digest
    assert best.digest != ""


def test_the_weights_of_a_run_bring_its_task(of_each_task, tmp_path):
    import shutil

    for kind, run in of_each_task.items():
        for path in (run, run / "checkpoints" / "best"):
            assert read_weights(path).description.task.kind == kind
    shutil.copytree(of_each_task["classify"] / "checkpoints", tmp_path / "alone")
    assert read_weights(tmp_path / "alone" / "best").description is None


def test_normalization_statistics_of_the_loaded_weights_survive_a_resume(trained_run, tmp_path, monkeypatch):
    """A network keeps the mean and std that it was trained with, also in the checkpoints of a fine-tuning run."""
    from tests.support.interrupted_trainings import stop_at

    with stop_at(5):
        train_from_weights(trained_run, tmp_path, "data.split={val: 0.4, test: 0.2}", "train.epochs=2")
    run = tmp_path / "given" / "1"
    before = checkpoints.load_newest(run / "checkpoints", "latest", pytest.fail)
    train_run(config_file.read_config(run / "config.yaml"), tmp_path, CPU, resume=True)
    after = checkpoints.load_newest(run / "checkpoints", "latest", pytest.fail)
    mine = read_weights(trained_run).facts
    for saved in (before, after):
        facts = parse_facts(saved.state, "here")[0]
        assert (facts.mean, facts.std) == (mine.mean, mine.std)
        assert torch.allclose(saved.parts["model"]["normalize.mean"].flatten(), torch.tensor(mine.mean))
    assert json.loads((run / "weights.json").read_text())["sha256"] == read_weights(trained_run).digest


def test_a_cnnrun_weights_file_is_imported_by_name(tmp_path, run_cli):
    path, _ = save_plain_network(tmp_path)
    (tmp_path / "like.yaml").write_text(LIKE)
    first, second = tmp_path / "w.safetensors", tmp_path / "again.safetensors"
    assert run_cli("import", path, "--like", tmp_path / "like.yaml", "--out", first)[0] == 0
    code, _, err = run_cli("import", first, "--like", tmp_path / "like.yaml", "--out", second)
    assert code == 2
    assert "--match name" in err
    assert run_cli("import", first, "--like", tmp_path / "like.yaml", "--match", "name", "--out", second)[0] == 0
    assert all(
        torch.equal(value, read_weights(second).tensors[name]) for name, value in read_weights(first).tensors.items()
    )


@pytest.mark.parametrize(
    ("words", "why"),
    [(["--drop", "nothing.*"], "no tensor of"), (["--out", "noext"], "ends in .safetensors")],
)
def test_import_refuses_an_unmatched_drop_pattern_and_a_wrong_suffix(tmp_path, run_cli, words, why):
    path, _ = save_plain_network(tmp_path)
    (tmp_path / "like.yaml").write_text(LIKE)
    code, _, err = run_cli("import", path, "--like", tmp_path / "like.yaml", *words)
    assert (code, len(err.splitlines())) == (2, 1)
    assert why in err
