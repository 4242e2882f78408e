"""What a network sees: each way of looking equals its formula, and is a command on networks with links and branches."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import save_picture
from explained import TASKS, linked, one_of_each
from PIL import Image as Pil
from torch import nn

from cnnrun import ablating, commands, explaining
from cnnrun.errors import ConfigError, DataError
from cnnrun.experiment import load, parse
from cnnrun.explain import Shown, aimed, said_of
from cnnrun.explain.invariance import changes
from cnnrun.explain.occlude import sweep
from cnnrun.explain.slopes import cams, slopes_of
from cnnrun.explain.top import strongest
from cnnrun.explain.worst import worst
from cnnrun.network import build, materialize
from cnnrun.seeing import Place, captured, features, passing_back, places, projected

CPU = torch.device("cpu")
COMMANDS = ("filters", "features", "top", "deconv", "occlude", "gradcam", "saliency", "evolve", "invariance", "embed")
WITH_A_LAYER = [name for name in COMMANDS if name != "saliency"]


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    return linked(tmp_path_factory.mktemp("linked"))


@pytest.fixture(scope="session")
def of_each_task(tmp_path_factory) -> dict[str, Path]:
    return one_of_each(tmp_path_factory.mktemp("tasks"))


def opened(run: Path, **asked) -> explaining.Opened:
    return explaining.opened(explaining.Asked(run, Path("runs"), CPU, **asked))


def small(seed: int = 0) -> tuple[nn.Module, dict[str, Place]]:
    """conv, ReLU, max-pool, conv, ReLU, in float64, and its layers by their short names."""
    made = parse(
        "task: classify\ndata: {source: digits}\nmodel:\n"
        "  - conv: {out_channels: 5, activation: relu}\n  - max_pool\n"
        "  - conv: {out_channels: 6, activation: relu, stride: 2}\n  - flatten\n",
        "small.yaml",
    )
    built = build(made.model.layers, made.task, explaining_facts())
    known = {place.module: place for place in places(built)}
    return materialize(built.network, seed).double().eval(), known


def explaining_facts():
    from cnnrun.contracts import Facts

    return Facts(("a", "b"), (1, 8, 8), mean=(0.5,), std=(2.0,))


# --- the deconvnet ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_projection_equals_the_deconvnet_written_plainly(seed):
    """Unpooling by switches, rectifying, filtering with the transposed kernels: Zeiler and Fergus, section 2.1."""
    network, known = small(seed)
    first, second = network.layers.conv1.conv, network.layers.conv2.conv
    torch.manual_seed(seed)
    picture = torch.rand(3, 1, 8, 8, dtype=torch.float64) * 9
    x = (picture - 0.5) / 2.0
    one = F.relu(F.conv2d(x, first.weight, first.bias, padding=1))
    pooled, switches = F.max_pool2d(one, 2, return_indices=True)
    two = F.relu(F.conv2d(pooled, second.weight, second.bias, stride=2, padding=1))
    channels, at = torch.tensor([0, 3, 5]), two.flatten(2).argmax(2)
    cells = torch.stack([channels, at[range(3), channels] // 2, at[range(3), channels] % 2], 1)
    signal = torch.zeros_like(two)
    for n, (channel, row, column) in enumerate(cells.tolist()):
        signal[n, channel, row, column] = two[n, channel, row, column]
    signal = F.conv_transpose2d(F.relu(signal), second.weight, stride=2, padding=1, output_padding=1)
    signal = F.max_unpool2d(signal, switches, 2)
    signal = F.conv_transpose2d(F.relu(signal), first.weight, padding=1)
    found = projected(network, known["layers.conv2"], picture, cells)
    assert signal.abs().max() > 0
    assert torch.allclose(found, signal, atol=1e-10)
    single = projected(network.float(), known["layers.conv2"], picture.float(), cells)
    assert (single - signal).abs().max() <= 1e-5


def test_the_rules_of_handing_back_are_captums():
    """Deconvolution and guided backpropagation, on a copy whose activations write no input over, as Captum needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from captum.attr import Deconvolution, GuidedBackprop, Saliency
    network, _ = small()
    plain = copy.deepcopy(network)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    picture = torch.rand(4, 1, 8, 8, dtype=torch.float64) * 9
    for rule, theirs in (("deconv", Deconvolution(plain)), ("guided", GuidedBackprop(plain))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = theirs.attribute(picture.clone().requires_grad_(), target=1)
        ours = picture.clone().requires_grad_()
        with passing_back(network, rule):
            (found,) = torch.autograd.grad(network(ours)[:, 1].sum(), ours)
        assert torch.allclose(found, expected, atol=1e-12), rule
        assert found.abs().max() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Saliency(plain).attribute(picture.clone().requires_grad_(), target=1)
    (found,) = torch.autograd.grad(network(ours)[:, 1].sum(), ours)
    assert torch.allclose(found.abs(), expected, atol=1e-12)


def test_the_network_is_as_it_was_after_looking(run):
    subject = opened(run).subject
    pictures = torch.rand(2, 1, 8, 8) * 16
    before = subject.given.network(pictures)
    place = subject.maps(None)
    projected(subject.given.network, place, pictures, torch.tensor([[0, 1, 1], [3, 2, 2]]))
    features(subject.given.network, place, pictures)
    assert torch.equal(subject.given.network(pictures), before)
    assert not any(module._forward_hooks for module in subject.given.network.modules())
    assert not any("forward" in vars(module) for module in subject.given.network.modules())


# --- layers by name ---------------------------------------------------------------------------------------------------


def test_layers_go_by_path_by_name_and_by_their_name_in_the_weights(run):
    subject = opened(run).subject
    for words, module in (
        (["model[0].conv", "model[0]", "layers.stem", "stem"], "layers.stem"),
        (["model[3].residual", "model[3]", "residual1"], "layers.residual1"),
        (["model[2].parallel.branches[1][0].conv", "parallel1.branch2.conv1"], "layers.parallel1.branch2.conv1"),
        (["repeat1.2.conv1", "layers.repeat1.2.conv1"], "layers.repeat1.2.conv1"),
        ([None, "last", "model[7].conv"], "layers.last"),
    ):
        for word in words:
            assert subject.maps(word).module == module, word
    for place in subject.with_maps():
        assert subject.maps(place.module) == subject.maps(place.title) == place


@pytest.mark.parametrize("command", WITH_A_LAYER)
def test_a_layer_that_is_not_there_is_named_with_its_alternatives(command, run, run_cli, monkeypatch):
    def no_data(*_):
        raise AssertionError("data is read before the layer's name is")

    if command not in ("filters", "embed"):
        monkeypatch.setattr(explaining, "eval_data", no_data)
    code, _, err = run_cli("explain", command, run, "--layer", "stemm")
    assert code == 2
    assert err.startswith("--layer stemm: no such layer; did you mean 'stem'")
    assert "model[0].conv" in err
    assert "model[2].parallel.branches[1][0].conv" in err
    assert err.count("\n") == 1


def test_a_layer_that_stands_several_times_asks_which(run, run_cli):
    code, _, err = run_cli("explain", "features", run, "--layer", "model[4].repeat.layers[0].conv")
    assert code == 2
    assert "stands 2 times in the network; say which: layers.repeat1.1.conv1, layers.repeat1.2.conv1" in err


def test_a_layer_without_maps_is_told_from_one_that_is_not_there(run, run_cli):
    code, _, err = run_cli("explain", "gradcam", run, "--layer", "model[8]")
    assert code == 2
    assert "--layer model[8]: gives 12, without feature maps; such layers are: model[0].conv" in err
    code, _, err = run_cli("explain", "filters", run, "--layer", "model[1]")
    assert code == 2
    assert "without kernels" in err


def test_other_wrong_words_are_named(run, run_cli, tmp_path):
    for words, line in (
        (["deconv", run, "--channel", "12"], "--channel 12: model[7].conv has 12 channels, from 0"),
        (["gradcam", run, "--target", "eleven"], "--target eleven: the network says nothing of it"),
        (["gradcam", run, "--picture", "100000"], "--picture 100000: split test has"),
        (["occlude", run, "--size", "9"], "--size 9: larger than the picture, 8x8"),
        (["features", run, "--file", tmp_path, "--split", "val"], "--file and --split or --picture: give one of them"),
        (["embed", run, "--out", "x.csv"], "--out x.csv: give a file that ends in .npz or .parquet"),
        (["ablate", run, "--change", "seed=1"], "--change: other sizes have other weights; add --retrain"),
        (["ablate", run, "--remove", "stem"], "--remove model[0].conv: what comes in has another shape"),
        (["ablate", run, "--retrain"], "--retrain: say what to leave out"),
    ):
        code, _, err = run_cli("explain", *words)
        assert code == 2, (words, err)
        assert err.startswith(line), err
    assert run_cli("explain", "features", run, "--file", tmp_path / "no.png")[0] == 8


# --- each way equals its formula --------------------------------------------------------------------------------------


def test_features_are_what_the_layers_give(run):
    subject = opened(run).subject
    pictures = torch.rand(3, 1, 8, 8) * 16
    network = subject.given.network
    for place in subject.places:
        with captured(network, [place.module]) as kept, torch.no_grad():
            network(pictures)
        assert torch.equal(features(network, place, pictures), kept[place.module])
        assert kept[place.module].shape[1:] == place.shape


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_top_is_what_looking_at_every_picture_finds(batch, run):
    run_ = opened(run, split="val")
    subject, examples = run_.subject, run_.examples()
    for word in ("stem", "model[3]", "last"):
        place = subject.maps(word)
        maps = features(subject.given.network, place, examples.take(torch.arange(len(examples))).float())
        best = maps.flatten(2).amax(2)
        found = strongest(subject.given, place, examples, batch)
        assert torch.allclose(found.values, best.topk(9, 0).values, atol=1e-5)
        for channel in range(place.shape[0]):
            assert len(set(found.samples[:, channel].tolist())) == 9  # of different pictures
            for value, sample, cell in zip(
                found.values[:, channel], found.samples[:, channel], found.cells[:, channel], strict=True
            ):
                assert maps[sample, channel].flatten()[cell] == pytest.approx(float(value), abs=1e-5)


def test_top_tells_where_each_patch_lies(run, tmp_path):
    asked = explaining.Asked(run, Path("runs"), CPU, tmp_path / "top.png", "val")
    data = explaining.top(asked, "model[1]", [0, 5], 1)
    assert [each["channel"] for each in data["channels"]] == [0, 5]
    for patch in data["channels"][0]["patches"]:
        (row, column), (x1, y1, x2, y2) = patch["cell"], patch["box"]
        assert (x1, y1, x2, y2) == (max(0, min(2 * column - 1, 4)), max(0, min(2 * row - 1, 4)), x1 + 4, y1 + 4)


def test_occlusion_in_batches_is_occlusion_one_by_one(run):
    subject = opened(run).subject
    given = subject.given
    picture = torch.rand(1, 8, 8) * 16
    with torch.no_grad():
        aim = aimed(said_of(given, picture[None]), "3", Shown(picture[None], ["a"], [""]))
    swept = sweep(subject, picture, aim, "layers.last", 2, 3, 1)
    assert swept.score.shape == (6, 6)
    assert (swept.tops, swept.lefts) == (list(range(6)), list(range(6)))
    for row, column in ((0, 0), (2, 5), (5, 1)):
        covered = picture.clone()
        covered[:, row : row + 3, column : column + 3] = given.facts.mean[0]
        with torch.no_grad(), captured(given.network, ["layers.last"]) as kept:
            probabilities = given.network(covered[None]).softmax(1)
        assert swept.score[row, column] == pytest.approx(float(probabilities[0, 3]), abs=1e-6)
        assert swept.energy[row, column] == pytest.approx(float(kept["layers.last"][0, 2].sum()), rel=1e-5)
        assert swept.said[row, column] == probabilities[0].argmax()


def test_gradcam_is_its_formula_and_captums(run):
    subject = opened(run).subject
    network = subject.given.network
    pictures = opened(run, split="val").examples().take(torch.arange(5)).float()
    shown = Shown(pictures, list("abcde"), [""] * 5)
    found, aim, scores = cams(subject, shown, "layers.last", "last", "4")
    with captured(network, ["layers.last"]) as kept:
        logits = network(pictures)
        (slope,) = torch.autograd.grad(logits[:, 4].sum(), kept["layers.last"])
    expected = (slope.mean((2, 3), keepdim=True) * kept["layers.last"]).sum(1).clamp(min=0)
    assert torch.allclose(found, expected, atol=1e-6)
    assert found.max() > 0
    assert aim.names == ["4"] * 5
    assert scores == pytest.approx(logits.softmax(1)[:, 4].tolist(), abs=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from captum.attr import LayerGradCam

        theirs = LayerGradCam(network, network.layers.last).attribute(pictures, 4, relu_attributions=True)
    assert torch.allclose(found, theirs[:, 0], atol=1e-6)


def test_a_layer_that_leads_nowhere_explains_nothing(tmp_path, run_cli):
    text = """
task: classify
name: aside
data: {source: digits}
model:
  - conv: {out_channels: 4, activation: relu, name: a}
  - conv: {out_channels: 4, name: unused}
  - global_avg_pool: {from: a}
train: {epochs: 1, batch: 256}
"""
    done = commands.train(parse(text, "aside.yaml"), tmp_path, CPU, resume=False)
    code, _, err = run_cli("explain", "gradcam", done["run"], "--layer", "unused")
    assert code == 2
    assert err.startswith("--layer model[1].conv: nothing that the network says comes from it")


def test_a_change_of_nothing_moves_nothing(run):
    subject = opened(run).subject
    for change in changes((1, 8, 8), CPU):
        identity = change.matrix_S23[0 if "shift" not in change.name else len(change.amounts) // 2]
        assert torch.allclose(identity, torch.eye(2, 3), atol=1e-6), change.name
    data = explaining.invariance(explaining.Asked(run, Path("runs"), CPU, count=2), ["stem", "model[3]"], None)
    assert data["layers"] == ["model[0].conv", "model[3].residual"]
    assert len(data["curves"]) == 6
    for curve in data["curves"]:
        still = curve["amounts"].index(1.0 if "enlarged" in curve["change"] else 0.0)
        assert curve["model[0].conv"][still] == pytest.approx(0, abs=1e-4)
        assert max(curve["model[3].residual"]) > 0.05
        assert len(curve["score"]) == len(curve["amounts"])
    turned = [curve for curve in data["curves"] if "turned" in curve["change"]]
    assert all(curve["model[0].conv"][-1] == pytest.approx(0, abs=1e-3) for curve in turned)  # all the way round
    assert subject.given.network.training is False


def test_evolve_shows_each_checkpoint_and_ends_where_top_is(run):
    asked = explaining.Asked(run, Path("runs"), CPU, split="val")
    data = explaining.evolve(asked, "last", [1, 2], 1)
    steps = list(dict.fromkeys(each["step"] for each in data["patches"]))
    assert len(steps) == 4
    assert steps == sorted(steps)
    opened_ = opened(run / "checkpoints" / f"step-{steps[-1]:08d}", split="val")
    found = strongest(opened_.subject.given, opened_.subject.maps("last"), opened_.examples(), 64)
    last = [each for each in data["patches"] if each["step"] == steps[-1]]
    assert [each["value"] for each in last] == pytest.approx(found.values[0, [1, 2]].tolist(), rel=1e-5)


def test_evolve_needs_two_checkpoints(trained_run, run_cli, tmp_path):
    import shutil

    alone = shutil.copytree(trained_run, tmp_path / "alone")
    kept = (alone / "checkpoints" / "best").read_text().strip()
    for path in (alone / "checkpoints").glob("step-*"):
        if path.name != kept:
            shutil.rmtree(path)
    code, _, err = run_cli("explain", "evolve", alone)
    assert code == 2
    assert "one checkpoint is kept; train with train.keep=100" in err


def test_embeddings_are_the_layers_means_and_a_probe_reads_them(run, tmp_path):
    path = tmp_path / "vectors.npz"
    asked = explaining.Asked(run, Path("runs"), CPU, path, "val")
    data = explaining.embed(asked, ["stem", "last"], "pca", True)
    kept = np.load(path)
    run_ = opened(run, split="val")
    examples = run_.examples()
    place = run_.subject.maps("last")
    maps = features(run_.subject.given.network, place, examples.take(torch.arange(len(examples))).float())
    assert np.allclose(kept["features"], maps.mean((2, 3)).numpy(), atol=1e-5)
    assert np.array_equal(kept["labels"], examples.targets["labels"].numpy())
    assert kept["picture"][0] == examples.name(0)
    rows = {row["layer"]: row["accuracy"] for row in data["layers"]}
    assert list(rows) == ["model[0].conv", "model[7].conv"]
    assert rows["model[7].conv"] > 0.3  # ten classes
    assert (tmp_path / "vectors.png").exists()
    with pytest.raises(ConfigError, match="is there already"):
        explaining.embed(asked, ["last"], "pca", False)


def test_embeddings_as_parquet_and_a_map_by_tsne(run, tmp_path):
    from pyarrow.parquet import read_table

    asked = explaining.Asked(run, Path("runs"), CPU, tmp_path / "v.parquet", "val")
    explaining.embed(asked, ["model[8]"], "tsne", False)
    table = read_table(tmp_path / "v.parquet")
    assert table.column_names == ["features", "picture", "map", "labels"]
    assert len(table["features"][0]) == 12
    assert all(len(point) == 2 for point in table["map"].to_pylist())


# --- ablation ---------------------------------------------------------------------------------------------------------


def test_leaving_out_is_the_network_without(run):
    asked = explaining.Asked(run, Path("runs"), CPU)
    data = ablating.ablate(asked, ["model[3]"], [], retrain=False)
    as_it_is, without = data["variants"]
    numbers = commands.evaluate(run, Path("runs"), CPU, "val")["numbers"]
    assert as_it_is["accuracy"] == numbers["accuracy"]
    subject = opened(run).subject
    network = copy.deepcopy(subject.given.network)
    network.layers.residual1 = nn.Identity()
    run_ = opened(run, split="val")
    examples = run_.examples()
    with torch.no_grad():
        said = network(examples.take(torch.arange(len(examples))).float()).argmax(1)
    assert without["accuracy"] == pytest.approx(float((said == examples.targets["labels"]).double().mean()))
    gone = sum(value.numel() for value in subject.given.network.layers.residual1.parameters())
    assert without["parameters"] == as_it_is["parameters"] - gone


def test_every_layer_that_can_go_is_left_out_where_none_is_named(run, run_cli):
    code, out, _ = run_cli("explain", "ablate", run, "--json")
    assert code == 0
    titles = [row["variant"] for row in json.loads(out)["variants"]]
    assert titles[0] == "as it is"
    assert "without model[3].residual" in titles
    assert not any("dropout" in title for title in titles)


def test_variants_are_trained_as_runs_of_their_own(tmp_path, tiny, run_cli):
    assert run_cli("train", tiny, "--runs", tmp_path, "--no-report")[0] == 0
    words = ["explain", "ablate", tmp_path / "tiny" / "1", "--remove", "model[4]", "--retrain", "--runs", tmp_path]
    words += ["--change", "model[0].conv.out_channels=2", "--json"]
    code, out, err = run_cli(*words)
    assert code == 0, err
    rows = json.loads(out)["variants"]
    assert [row["variant"] for row in rows] == ["as it is", "without model[4]", "model[0].conv.out_channels=2"]
    assert rows[0]["parameters"] > rows[1]["parameters"] > rows[2]["parameters"] or rows[2]["parameters"] > 0
    assert {"train/accuracy", "val/accuracy"} <= set(rows[0])
    config = load(Path(rows[1]["run"]) / "config.yaml")
    assert [layer.kind for layer in config.model.layers] == ["conv", "max_pool", "flatten", "dropout"]
    assert load(Path(rows[2]["run"]) / "config.yaml").model.layers[0].out_channels == 2
    again = json.loads(run_cli(*words)[1])["variants"]
    assert again == rows  # finished ones are taken
    code, _, err = run_cli("explain", "ablate", tmp_path / "tiny" / "1", "--remove", "model[2]", "--retrain")
    assert code == 2
    assert "without model[2]" in err  # a vector is needed: said before anything is trained


# --- every task -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_what_is_said_has_slopes_and_meaning(task, of_each_task):
    run_ = opened(of_each_task[task], count=5, split="val")
    given, shown = run_.subject.given, run_.shown()
    pixels = shown.pixels.requires_grad_()
    said = said_of(given, pixels)
    assert said.raw_BK.shape == said.shown_BK.shape
    assert len(said.raw_BK) == len(said.meant_B) == 5
    if said.names:
        assert said.raw_BK.shape[1] == len(said.names)
    aim = aimed(said, said.names[-1] if said.names else None, shown)
    (slope,) = torch.autograd.grad(aim.of(said.raw_BK).sum(), pixels)
    assert slope.abs().max() > 0
    results = given.results(pixels.detach())
    if task == "classify":
        assert torch.allclose(said.shown_BK, results["probabilities"], atol=1e-6)
    if task == "regress":
        assert torch.allclose(said.shown_BK, results["values"], atol=1e-4)
    if task == "detect":
        assert said.shown_BK.detach().max() == pytest.approx(float(results["scores"].max()), abs=1e-5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("command", [*COMMANDS, "ablate"])
def test_every_command_does_every_task(task, command, of_each_task, run_cli, tmp_path):
    run = of_each_task[task]
    words = ["explain", command, run, "--split", "val"] if command != "filters" else ["explain", command, run]
    if command == "embed" and task in ("detect", "verify"):
        code, _, err = run_cli(*words)
        assert code == 2
        assert "--no-probe" in err
        words.append("--no-probe")
    code, out, err = run_cli(*words, "--json")
    if command == "ablate" and code == 2:
        assert "none can be left out as trained" in err
        return
    assert code == 0, err
    data = json.loads(out)
    assert data["caption"]
    with Pil.open(data["path"]) as picture:
        assert picture.info["Software"] == "cnnrun explain"
        assert min(picture.size) > 40


@pytest.mark.parametrize("task", TASKS)
def test_the_worst_are_those_of_the_largest_loss(task, of_each_task):
    run_ = opened(of_each_task[task], split="val")
    examples = run_.examples()
    found, by = worst(run_.subject, examples, 5, 8)
    if task == "verify":
        assert by == "likeness to another's picture"
        return
    assert by == "loss"
    values = [each.badness for each in found]
    assert values == sorted(values, reverse=True)
    given = run_.subject.given
    index = torch.tensor([found[0].sample])
    with torch.no_grad():
        losses = given.criterion(given.network(examples.take(index).float()), examples.targets_of(index, CPU))
    assert float(sum(losses.values())) == pytest.approx(values[0], rel=1e-4)


def test_likeness_needs_two_pictures(of_each_task, run_cli):
    code, _, err = run_cli("explain", "gradcam", of_each_task["verify"], "--picture", "0")
    assert code == 2
    assert "show two or more pictures" in err
    assert run_cli("explain", "occlude", of_each_task["verify"], "--picture", "0")[0] == 0
    code, _, err = run_cli("explain", "gradcam", of_each_task["verify"], "--target", "s0")
    assert code == 2
    assert "this network gives embeddings" in err


# --- as commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [*COMMANDS, "ablate"])
def test_a_command_writes_a_picture_with_its_line_and_one_for_tensorboard(command, run, run_cli, tmp_path):
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != "lock"}
    code, out, err = run_cli("explain", command, run)
    assert code == 0, err
    path = Path(out.strip().splitlines()[-2 if command == "embed" else -1])
    assert path.parent == run / "explain"
    assert list((run / "explain").glob("events.out.tfevents.*"))
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != "lock"}
    first = path.read_bytes()
    assert run_cli("explain", command, run)[0] == 0  # again: ours is replaced, and is the same
    assert path.read_bytes() == first
    if command == "embed":
        return
    mine = save_picture(tmp_path / "mine.png")
    code, _, err = run_cli("explain", command, run, "--out", mine)
    assert code == 2
    assert "is there already" in err


@pytest.mark.parametrize("command", ["features", "deconv", "occlude", "gradcam", "saliency", "invariance"])
def test_pictures_of_ones_own(command, run, run_cli, tmp_path):
    save_picture(tmp_path / "a <b>.png", size=(20, 14))
    save_picture(tmp_path / "c.png", 1, size=(9, 9), mode="L")
    code, out, err = run_cli("explain", command, run, "--file", tmp_path, "--json")
    assert code == 0, err
    assert "a <b>.png" in json.dumps(json.loads(out))


def test_the_picture_of_a_split_is_the_picture_as_a_file(run, tmp_path):
    run_ = opened(run, split="val", numbers=[3])
    shown = run_.shown()
    Pil.fromarray(shown.pixels[0, 0].byte().numpy()).save(tmp_path / "same.png")
    other = opened(run, files=[tmp_path / "same.png"]).shown()
    assert torch.equal(shown.pixels, other.pixels)
    a, b = (slopes_of(run_.subject, each, "1")[0] for each in (shown, other))
    assert torch.equal(a, b)


def test_a_bad_file_is_named(run, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="bad.png"):
        opened(run, files=[tmp_path / "bad.png"]).shown()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_it_is_the_same(run):
    device = torch.device("cuda")
    for way in (explaining.deconv, explaining.features):
        ours = way(
            explaining.Asked(run, Path("runs"), CPU, split="val"), None, *([[]] if way == explaining.deconv else [])
        )
        theirs = way(
            explaining.Asked(run, Path("runs"), device, split="val"), None, *([[]] if way == explaining.deconv else [])
        )
        assert ours["path"] == theirs["path"]
    place = opened(run).subject.maps(None)
    cpu = opened(run, split="val")
    cuda = explaining.opened(explaining.Asked(run, Path("runs"), device, split="val"))
    one, other = (strongest(each.subject.given, place, each.examples(), 64) for each in (cpu, cuda))
    assert torch.allclose(one.values, other.values, atol=1e-3)
