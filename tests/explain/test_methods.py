"""Explanation methods: each equals its formula."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnnrun.base.errors import ConfigError
from cnnrun.experiment.config_file import parse_config
from cnnrun.explain.aim import choose_direction
from cnnrun.explain.backward_rules import project_to_pixels, use_backward_rule
from cnnrun.explain.layer_names import NamedLayer, capture_outputs, layer_features, list_layers
from cnnrun.explain.methods import Embed, Evolve, Invariance, Top
from cnnrun.explain.methods.gradients import class_activation_maps, input_gradients
from cnnrun.explain.methods.invariance import image_transforms
from cnnrun.explain.methods.occlude import SquareGrid, measure_occlusion
from cnnrun.explain.methods.patches import find_strongest_cells
from cnnrun.explain.methods.worst_images import find_worst_images
from cnnrun.explain.run import Selection
from cnnrun.explain.subject import ImagesToExplain, compute_class_scores
from cnnrun.model.network import build_network, materialize
from cnnrun.results.studies.train_run import train_run
from tests.support.small_runs import explain_run, open_run

CPU = torch.device("cpu")


@pytest.fixture
def run(linked_run) -> Path:
    return linked_run


def small_network(seed: int = 0) -> tuple[nn.Module, dict[str, NamedLayer]]:
    """Network of conv, ReLU, max-pool, conv, ReLU in float64, and its layers by module name."""
    made = parse_config(
        "task: classify\ndata: {source: digits}\nmodel:\n"
        "  - conv: {out_channels: 5, activation: relu}\n  - max_pool\n"
        "  - conv: {out_channels: 6, activation: relu, stride: 2}\n  - flatten\n",
        "small.yaml",
    )
    built = build_network(made.model.layers, made.task.bind(two_class_facts()))
    known = {place.module_name: place for place in list_layers(built)}
    return materialize(built.network, seed).double().eval(), known


def two_class_facts():
    from cnnrun.contracts.facts import DataFacts

    return DataFacts(("a", "b"), (1, 8, 8), mean=(0.5,), std=(2.0,))


# --- the deconvnet ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_projection_equals_an_explicit_deconvnet(seed):
    """Unpool by switches, rectify and filter with the transposed kernels (Zeiler and Fergus, section 2.1)."""
    network, known = small_network(seed)
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
    found = project_to_pixels(network, known["layers.conv2"], picture, cells)
    assert signal.abs().max() > 0
    assert torch.allclose(found, signal, atol=1e-10)
    single = project_to_pixels(network.float(), known["layers.conv2"], picture.float(), cells)
    assert (single - signal).abs().max() <= 1e-5


def test_backward_rules_equal_captum():
    """Deconvolution and guided backpropagation. Captum needs a copy without in-place activations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from captum.attr import Deconvolution, GuidedBackprop, Saliency
    network, _ = small_network()
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
        with use_backward_rule(network, rule):
            (found,) = torch.autograd.grad(network(ours)[:, 1].sum(), ours)
        assert torch.allclose(found, expected, atol=1e-12), rule
        assert found.abs().max() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Saliency(plain).attribute(picture.clone().requires_grad_(), target=1)
    (found,) = torch.autograd.grad(network(ours)[:, 1].sum(), ours)
    assert torch.allclose(found.abs(), expected, atol=1e-12)


def test_explaining_leaves_the_network_unchanged(run):
    subject = open_run(run).subject
    pictures = torch.rand(2, 1, 8, 8) * 16
    before = subject.trained.network(pictures)
    place = subject.find_feature_map_layer(None)
    project_to_pixels(subject.trained.network, place, pictures, torch.tensor([[0, 1, 1], [3, 2, 2]]))
    layer_features(subject.trained.network, place, pictures)
    assert torch.equal(subject.trained.network(pictures), before)
    assert not any(module._forward_hooks for module in subject.trained.network.modules())
    assert not any("forward" in vars(module) for module in subject.trained.network.modules())


# --- each way equals its formula --------------------------------------------------------------------------------------


def test_features_equal_the_outputs_of_the_layers(run):
    subject = open_run(run).subject
    pictures = torch.rand(3, 1, 8, 8) * 16
    network = subject.trained.network
    for place in subject.places:
        with capture_outputs(network, [place.module_name]) as kept, torch.no_grad():
            network(pictures)
        assert torch.equal(layer_features(network, place, pictures), kept[place.module_name])
        assert kept[place.module_name].shape[1:] == place.shape


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_top_equals_a_search_of_every_image(batch, run):
    run_ = open_run(run)
    subject, examples = run_.subject, run_.load_examples("val")
    for word in ("stem", "model[3]", "last"):
        place = subject.find_feature_map_layer(word)
        maps = layer_features(subject.trained.network, place, examples.load_images(torch.arange(len(examples))).float())
        best = maps.flatten(2).amax(2)
        found = find_strongest_cells(subject.trained, place, examples, batch)
        assert torch.allclose(found.values, best.topk(9, 0).values, atol=1e-5)
        for channel in range(place.shape[0]):
            assert len(set(found.samples[:, channel].tolist())) == 9  # of different pictures
            for value, sample, cell in zip(
                found.values[:, channel], found.samples[:, channel], found.cells[:, channel], strict=True
            ):
                assert maps[sample, channel].flatten()[cell] == pytest.approx(float(value), abs=1e-5)


def test_top_reports_the_box_of_each_patch(run, tmp_path):
    data = explain_run(Top(split="val", layer="model[1]", channels=(0, 5)), run, tmp_path / "top.png")
    assert [each["channel"] for each in data["channels"]] == [0, 5]
    for patch in data["channels"][0]["patches"]:
        (row, column), (x1, y1, x2, y2) = patch["cell"], patch["box"]
        assert (x1, y1, x2, y2) == (max(0, min(2 * column - 1, 4)), max(0, min(2 * row - 1, 4)), x1 + 4, y1 + 4)


def test_batched_occlusion_equals_occlusion_one_by_one(run):
    subject = open_run(run).subject
    given = subject.trained
    picture = torch.rand(1, 8, 8) * 16
    with torch.no_grad():
        aim = choose_direction(
            compute_class_scores(given, picture[None]), "3", ImagesToExplain(picture[None], ["a"], [""])
        )
    swept = measure_occlusion(subject, picture, aim, "layers.last", 2, SquareGrid(3, 1))
    assert swept.score.shape == (6, 6)
    assert (swept.tops, swept.lefts) == (list(range(6)), list(range(6)))
    for row, column in ((0, 0), (2, 5), (5, 1)):
        covered = picture.clone()
        covered[:, row : row + 3, column : column + 3] = given.facts.mean[0]
        with torch.no_grad(), capture_outputs(given.network, ["layers.last"]) as kept:
            probabilities = given.network(covered[None]).softmax(1)
        assert swept.score[row, column] == pytest.approx(float(probabilities[0, 3]), abs=1e-6)
        assert swept.energy[row, column] == pytest.approx(float(kept["layers.last"][0, 2].sum()), rel=1e-5)
        assert swept.winner[row, column] == probabilities[0].argmax()


def test_gradcam_equals_its_formula_and_captum(run):
    subject = open_run(run).subject
    network = subject.trained.network
    pictures = open_run(run).load_examples("val").load_images(torch.arange(5)).float()
    shown = ImagesToExplain(pictures, list("abcde"), [""] * 5)
    found, aim, scores = class_activation_maps(subject, shown, "layers.last", "last", "4")
    with capture_outputs(network, ["layers.last"]) as kept:
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


def test_gradcam_refuses_a_layer_that_no_score_depends_on(tmp_path, run_cli):
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
    done = train_run(parse_config(text, "aside.yaml"), tmp_path, CPU, resume=False)
    code, _, err = run_cli("explain", "gradcam", done["run"], "--layer", "unused")
    assert code == 2
    assert err.startswith("--layer model[1].conv: no score depends on it")


def test_an_identity_transform_changes_no_feature(run):
    subject = open_run(run).subject
    for change in image_transforms((1, 8, 8), CPU):
        identity = change.matrix_S23[0 if "shift" not in change.name else len(change.amounts) // 2]
        assert torch.allclose(identity, torch.eye(2, 3), atol=1e-6), change.name
    data = explain_run(Invariance(images=2, layers=("stem", "model[3]")), run)
    assert data["layers"] == ["model[0].conv", "model[3].residual"]
    assert len(data["curves"]) == 6
    for curve in data["curves"]:
        still = curve["amounts"].index(1.0 if "enlarged" in curve["change"] else 0.0)
        assert curve["model[0].conv"][still] == pytest.approx(0, abs=1e-4)
        assert max(curve["model[3].residual"]) > 0.05
        assert len(curve["score"]) == len(curve["amounts"])
    rotated = [curve for curve in data["curves"] if "rotated" in curve["change"]]
    assert all(curve["model[0].conv"][-1] == pytest.approx(0, abs=1e-3) for curve in rotated)  # all the way round
    assert rotated
    assert subject.trained.network.training is False


def test_evolve_shows_each_checkpoint_and_its_last_equals_top(run):
    data = explain_run(Evolve(split="val", layer="last", channels=(1, 2)), run)
    steps = list(dict.fromkeys(each["step"] for each in data["patches"]))
    assert len(steps) == 4
    assert steps == sorted(steps)
    opened_ = open_run(run / "checkpoints" / f"step-{steps[-1]:08d}")
    found = find_strongest_cells(
        opened_.subject.trained, opened_.subject.find_feature_map_layer("last"), opened_.load_examples("val"), 64
    )
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
    assert "has only one checkpoint; train with train.keep=100" in err


def test_embeddings_are_means_of_feature_maps_and_train_a_probe(run, tmp_path):
    path = tmp_path / "vectors.npz"
    data = explain_run(Embed(split="val", layers=("stem", "last"), probe=True), run, path)
    kept = np.load(path)
    run_ = open_run(run)
    examples = run_.load_examples("val")
    place = run_.subject.find_feature_map_layer("last")
    maps = layer_features(
        run_.subject.trained.network, place, examples.load_images(torch.arange(len(examples))).float()
    )
    assert np.allclose(kept["features"], maps.mean((2, 3)).numpy(), atol=1e-5)
    assert np.array_equal(kept["labels"], examples.targets["labels"].numpy())
    assert kept["picture"][0] == examples.sample_name(0)
    rows = {row["layer"]: row["accuracy"] for row in data["layers"]}
    assert list(rows) == ["model[0].conv", "model[7].conv"]
    assert rows["model[7].conv"] > 0.3  # ten classes
    assert (tmp_path / "vectors.png").exists()
    with pytest.raises(ConfigError, match="already exists"):
        explain_run(Embed(split="val", layers=("last",), probe=False), run, path)


def test_embeddings_are_written_as_parquet_with_a_tsne_map(run, tmp_path):
    from pyarrow.parquet import read_table

    method = Embed(split="val", layers=("model[8]",), map="tsne", probe=False)
    explain_run(method, run, tmp_path / "v.parquet")
    table = read_table(tmp_path / "v.parquet")
    assert table.column_names == ["features", "picture", "map", "labels"]
    assert len(table["features"][0]) == 12
    assert all(len(point) == 2 for point in table["map"].to_pylist())


# --- corners ----------------------------------------------------------------------------------------------------------


def test_guided_backpropagation_blocks_the_saturated_part_of_relu6():
    x = torch.tensor([-1.0, 3.0, 7.0], requires_grad=True)
    module = nn.Sequential(nn.ReLU6(inplace=True))
    for rule, expected in (("plain", [0, 1, 0]), ("guided", [0, 1, 0]), ("deconv", [1, 1, 1])):
        with use_backward_rule(module, rule):
            (found,) = torch.autograd.grad(module(x * 1).sum(), x)
        assert found.tolist() == expected, rule


def test_occlusion_squares_reach_the_far_edges(run):
    subject = open_run(run).subject
    picture = torch.rand(1, 8, 8)
    aim = choose_direction(subject.class_scores(picture[None]), None, ImagesToExplain(picture[None], ["a"], [""]))
    swept = measure_occlusion(subject, picture, aim, "layers.last", 0, SquareGrid(3, 2))
    assert swept.tops == swept.lefts == [0, 2, 4, 5]
    assert swept.score.shape == (4, 4)


def test_each_pixel_of_an_occlusion_map_takes_the_nearest_square():
    from cnnrun.explain.methods.occlude import _nearest_squares

    assert _nearest_squares([0, 4, 8], 12, 4).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert _nearest_squares([0, 2, 4, 5], 8, 3).tolist() == [0, 0, 0, 1, 1, 2, 3, 3]  # the last one ends at the edge
    assert _nearest_squares([0, 1, 2, 3], 8, 5).tolist() == [-1, -1, 0, 1, 2, 3, -1, -1]
    assert _nearest_squares([0], 6, 6).tolist() == [0] * 6


def test_gradcam_of_a_detector_weights_each_cell_by_its_own_gradient(of_each_task):
    """For a detector's best score, gradients times feature maps highlight the cells around that detection."""
    run_ = open_run(of_each_task["detect"])
    subject, shown = run_.subject, run_.load_images(Selection("val", 6))
    found, _, _ = class_activation_maps(subject, shown, subject.find_feature_map_layer(None).module_name, "p3", None)
    network, module = subject.trained.network, subject.find_feature_map_layer(None).module_name
    for number in range(len(shown)):
        with capture_outputs(network, [module]) as kept:
            said = compute_class_scores(subject.trained, shown.pixels[number : number + 1])
            (slope,) = torch.autograd.grad(said.raw_BK.max(), kept[module])
        expected = (slope * kept[module]).sum(1).clamp(min=0)
        assert torch.allclose(found[number], expected[0], atol=1e-6)


def test_explanations_do_not_depend_on_the_batch_size(run):
    """Scores, features and gradients are equal for every batch size."""
    pixels = open_run(run).load_examples("val").load_images(torch.arange(7)).float()
    shown, found = ImagesToExplain(pixels, list("abcdefg"), [""] * 7), []
    for size in (128, 3, 1):
        subject = open_run(run).subject
        subject.__dict__["batch_size"] = size
        place = subject.find_feature_map_layer(None)
        found.append(
            [
                subject.class_scores(pixels).display_BK,
                subject.layer_features(place, pixels),
                class_activation_maps(subject, shown, place.module_name, "", None)[0],
                input_gradients(subject, shown, None, "guided")[0],
            ]
        )
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_worst_embeddings_leave_out_identities_with_one_image(of_each_task):
    """Images closest to another identity come first. An identity with one image has no pair and is left out."""
    run_ = open_run(of_each_task["verify"])
    examples = run_.load_examples("val")
    labels = examples.targets["labels"].clone()
    labels[0] = labels.max() + 1
    alone = dataclasses.replace(
        examples, targets=examples.targets | {"labels": labels % len(run_.subject.trained.facts.classes)}
    )
    given = run_.subject.trained
    said = given.results(alone.load_images(torch.arange(len(alone))).float())["embedding"].double()
    found = find_worst_images(run_.subject, alone, 4, 5)
    gaps = []
    for place in range(len(alone)):
        cosine = said @ said[place]
        same = alone.targets["labels"] == alone.targets["labels"][place]
        others = torch.arange(len(alone)) != place
        if (same & others).any():
            gaps.append((float(cosine[~same].max() - cosine[same & others].max()), place))
    expected = sorted(gaps, reverse=True)[:4]
    assert [each.measure for each in found.images] == pytest.approx([gap for gap, _ in expected], abs=1e-5)
    assert found.sample_count == len(alone)


def test_the_worst_images_report_how_many_were_searched(run, monkeypatch):
    from cnnrun.explain.methods import worst_images as module

    monkeypatch.setattr(module, "_MAX_SEARCHED", 50)
    found = find_worst_images(open_run(run).subject, open_run(run).load_examples("val"), 3, 16)
    assert found.sample_count == 50
    assert len(found.images) == 3
