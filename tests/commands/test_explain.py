"""Every explanation method as a command: for networks with links and branches, for every task, with clear errors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
from PIL import Image as Pil
from pydantic import Field
from torch import nn

from cnnrun.base.errors import DataError
from cnnrun.config.spec import union_members
from cnnrun.experiment.config_file import parse_config, read_config
from cnnrun.explain import methods, run_method
from cnnrun.explain.aim import choose_direction
from cnnrun.explain.method_base import ImageCount, ImageMethod, Layers
from cnnrun.explain.methods import Assign, Detections, Embed, Invariance, Method, Top
from cnnrun.explain.methods.gradients import input_gradients
from cnnrun.explain.methods.worst_images import find_worst_images
from cnnrun.explain.run import OpenRun, Selection
from cnnrun.explain.subject import Explanation, compute_class_scores
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.studies import ablate
from cnnrun.results.studies.train_run import train_run
from tests.support.images import save_picture
from tests.support.small_runs import TASKS, explain_run, open_run

CPU = torch.device("cpu")
COMMANDS = [method.kind for method in union_members(Method) if method not in (Detections, Assign)]
WITH_A_LAYER = [name for name in COMMANDS if name != "saliency"]


@pytest.fixture
def run(linked_run) -> Path:
    return linked_run


# --- layers by name ---------------------------------------------------------------------------------------------------


def test_layers_are_found_by_path_by_name_and_by_module_name(run):
    subject = open_run(run).subject
    for words, module in (
        (["model[0].conv", "model[0]", "layers.stem", "stem"], "layers.stem"),
        (["model[3].residual", "model[3]", "residual1"], "layers.residual1"),
        (["model[2].parallel.branches[1][0].conv", "parallel1.branch2.conv1"], "layers.parallel1.branch2.conv1"),
        (["repeat1.2.conv1", "layers.repeat1.2.conv1"], "layers.repeat1.2.conv1"),
        ([None, "last", "model[7].conv"], "layers.last"),
    ):
        for word in words:
            assert subject.find_feature_map_layer(word).module_name == module, word
    for place in subject.feature_map_layers():
        assert subject.find_feature_map_layer(place.module_name) == subject.find_feature_map_layer(place.title) == place


@pytest.mark.parametrize("command", WITH_A_LAYER)
def test_an_unknown_layer_is_refused_with_suggestions(command, run, run_cli, monkeypatch):
    def no_data(*_):
        raise AssertionError("data is read before the layer's name is")

    monkeypatch.setattr("cnnrun.explain.run.prepare_eval_data", no_data)
    code, _, err = run_cli("explain", command, run, "--layer", "stemm")
    assert code == 2
    assert err.startswith("--layer stemm: no such layer; did you mean 'stem'")
    assert "model[0].conv" in err
    assert "model[2].parallel.branches[1][0].conv" in err
    assert err.count("model[0].conv") == 1
    assert err.count("\n") == 1


def test_a_layer_that_matches_several_times_is_refused_with_its_matches(run, run_cli):
    code, _, err = run_cli("explain", "features", run, "--layer", "model[4].repeat.layers[0].conv")
    assert code == 2
    assert "matches 2 layers; give one of layers.repeat1.1.conv1, layers.repeat1.2.conv1" in err


def test_a_layer_without_feature_maps_or_kernels_is_refused(run, run_cli):
    code, _, err = run_cli("explain", "gradcam", run, "--layer", "model[8]")
    assert code == 2
    assert "--layer model[8]: its output is 12, without feature maps; layers with feature maps: model[0].conv" in err
    code, _, err = run_cli("explain", "filters", run, "--layer", "model[1]")
    assert code == 2
    assert "without kernels" in err


def test_invalid_arguments_are_refused(run, run_cli, tmp_path):
    for words, line in (
        (["features", run, "--layer", ""], "--layer : no such layer"),
        (["deconv", run, "--channel", "12"], "--channel 12: model[7].conv has 12 channels, numbered from 0"),
        (["gradcam", run, "--class", "eleven"], "--class eleven: the network has no such class"),
        (["gradcam", run, "--image", "100000"], "--image 100000: split test has"),
        (["occlude", run, "--size", "9"], "--size 9: larger than the image, 8x8"),
        (["features", run, "--file", tmp_path, "--split", "val"], "--file and --split or --image: give one of them"),
        (["embed", run, "--out", "x.csv"], "--out x.csv: give a file that ends in .npz or .parquet"),
        (["ablate", run, "--change", "seed=1"], "--change: other settings need other weights; add --retrain"),
        (["ablate", run, "--remove", "stem"], "--remove model[0].conv: its input and output have different shapes"),
        (["ablate", run, "--retrain"], "--retrain: give layers to remove"),
    ):
        code, _, err = run_cli("explain", *words)
        assert code == 2, (words, err)
        assert err.startswith(line), err
    assert run_cli("explain", "features", run, "--file", tmp_path / "no.png")[0] == 8


class Stripes(ImageMethod):
    """Draw stripes. Example: cnnrun explain stripes"""

    kind = "stripes"
    depth: Annotated[int, Field(ge=2, le=5, description="How deep.")] = 3
    fast: bool = False
    layers: Layers = ()
    images: ImageCount = 2

    def explain(self, run: OpenRun) -> Explanation:
        shown = self.load_images(run)
        told = {"settings": self.model_dump(mode="json"), "names": shown.names}
        return Explanation(np.zeros((4, 4, 3), np.uint8), "Stripes.", told)


def test_a_new_method_is_a_command_with_its_settings_as_options(run, run_cli, monkeypatch, tmp_path):
    monkeypatch.setattr(methods, "Method", methods.Method | Stripes)
    code, out, _ = run_cli("explain", "stripes", "--help")
    assert code == 0
    for words in (
        "Draw stripes.",
        "How deep.",
        "[default: 3; 2<=x<=5]",
        "--fast / --no-fast",
        "--layer ",
        "default: 2;",
    ):
        assert words in out, words
    assert out.index("--depth") < out.index("--images") < out.index("--out")
    words = ("--depth", 5, "--fast", "--layer", "a", "--layer", "b", "--split", "val", "--image", 7, "--image", 1)
    code, out, err = run_cli("explain", "stripes", run, *words, "--out", tmp_path / "s.png", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["settings"] == {
        "split": "val", "images": 2, "image_indices": [7, 1], "files": [],
        "depth": 5, "fast": True, "layers": ["a", "b"],
    }  # fmt: skip
    examples = open_run(run).load_examples("val")
    assert data["names"] == [examples.sample_name(7), examples.sample_name(1)]
    assert (tmp_path / "s.png").exists()
    for wrong in (("--depth", 6), ("--depth", 1), ("--image", -1), ("--images", 101)):
        code, _, err = run_cli("explain", "stripes", run, *wrong)
        assert (code, wrong[0] in err) == (2, True), err


# --- ablation ---------------------------------------------------------------------------------------------------------


def test_removing_a_layer_equals_the_network_without_it(run):
    data = ablate.run_ablation(open_run(run), ["model[3]"], [], retrain=False)
    as_it_is, without = data["variants"]
    numbers = evaluate_run(run, Path("runs"), CPU, "val")["numbers"]
    assert as_it_is["accuracy"] == numbers["accuracy"]
    subject = open_run(run).subject
    network = copy.deepcopy(subject.trained.network)
    network.layers.residual1 = nn.Identity()
    run_ = open_run(run)
    examples = run_.load_examples("val")
    with torch.no_grad():
        said = network(examples.load_images(torch.arange(len(examples))).float()).argmax(1)
    assert without["accuracy"] == pytest.approx(float((said == examples.targets["labels"]).double().mean()))
    gone = sum(value.numel() for value in subject.trained.network.layers.residual1.parameters())
    assert without["parameters"] == as_it_is["parameters"] - gone


def test_every_removable_layer_is_ablated_by_default(run, run_cli):
    code, out, _ = run_cli("explain", "ablate", run, "--json")
    assert code == 0
    titles = [row["variant"] for row in json.loads(out)["variants"]]
    assert titles[0] == "unchanged"
    assert "without model[3].residual" in titles
    assert not any("dropout" in title for title in titles)


def test_retrained_variants_are_separate_runs(tmp_path, tiny, run_cli):
    assert run_cli("train", tiny, "--runs", tmp_path, "--no-report")[0] == 0
    words = ["explain", "ablate", tmp_path / "tiny" / "1", "--remove", "model[4]", "--retrain", "--runs", tmp_path]
    words += ["--change", "model[0].conv.out_channels=2", "--json"]
    code, out, err = run_cli(*words)
    assert code == 0, err
    rows = json.loads(out)["variants"]
    assert [row["variant"] for row in rows] == ["unchanged", "without model[4].linear", "model[0].conv.out_channels=2"]
    for row in rows:
        assert row["parameters"] == build_of(Path(row["run"])).parameter_count
    assert {"train/accuracy", "val/accuracy"} <= set(rows[0])
    config = read_config(Path(rows[1]["run"]) / "config.yaml")
    assert [layer.kind for layer in config.model.layers] == ["conv", "max_pool", "flatten", "dropout"]
    assert read_config(Path(rows[2]["run"]) / "config.yaml").model.layers[0].out_channels == 2
    assert (Path(rows[1]["run"]) / "report.html").exists()
    again = json.loads(run_cli(*words)[1])["variants"]
    assert again == rows  # finished ones are taken
    code, _, err = run_cli("explain", "ablate", tmp_path / "tiny" / "1", "--remove", "model[2]", "--retrain")
    assert code == 2
    assert "without model[2].flatten" in err  # a vector is needed: said before anything is trained


# --- every task -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_class_scores_have_gradients_and_equal_the_predictions(task, of_each_task):
    run_ = open_run(of_each_task[task])
    given, shown = run_.subject.trained, run_.load_images(Selection("val", 5))
    pixels = shown.pixels.requires_grad_()
    said = compute_class_scores(given, pixels)
    assert said.raw_BK.shape == said.display_BK.shape
    assert len(said.raw_BK) == len(said.default_B) == 5
    if said.names:
        assert said.raw_BK.shape[1] == len(said.names)
    aim = choose_direction(said, said.names[-1] if said.names else None, shown)
    (slope,) = torch.autograd.grad(aim.scores(said.raw_BK).sum(), pixels)
    assert slope.abs().max() > 0
    results = given.results(pixels.detach())
    if task == "classify":
        assert torch.allclose(said.display_BK, results["probabilities"], atol=1e-6)
    if task == "regress":
        assert torch.allclose(said.display_BK, results["values"], atol=1e-4)
    if task == "detect":
        assert said.display_BK.detach().max() == pytest.approx(float(results["scores"].max()), abs=1e-5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("command", [*COMMANDS, "ablate"])
def test_every_command_works_for_every_task(task, command, of_each_task, run_cli, tmp_path):
    run = of_each_task[task]
    words = ["explain", command, run, "--split", "val"] if command != "filters" else ["explain", command, run]
    if command == "embed" and task in ("detect", "verify"):
        code, _, err = run_cli(*words, "--probe")
        assert code == 2
        assert "a probe " in err
    code, out, err = run_cli(*words, "--json")
    if command == "ablate" and not has_removable_layer(run):
        assert code == 2
        assert "none can be removed" in err
        return
    assert code == 0, err
    data = json.loads(out)
    assert data["caption"]
    with Pil.open(data["path"]) as picture:
        assert picture.info["Software"] == "cnnrun explain"
        assert min(picture.size) > 40


def has_removable_layer(run: Path) -> bool:
    """Is there a layer with equal input and output shapes that also acts outside training?"""
    nodes = open_run(run).subject.built_network.layers.values()
    return any(node.in_shapes == (node.out_shape,) and node.spec.kind not in ("dropout", "identity") for node in nodes)


def build_of(run: Path):
    """The network of a run, built without allocating its weights."""
    return open_run(run).subject.built_network


@pytest.mark.parametrize("task", TASKS)
def test_the_worst_images_have_the_largest_loss(task, of_each_task):
    run_ = open_run(of_each_task[task])
    examples = run_.load_examples("val")
    bad = find_worst_images(run_.subject, examples, 5, 8)
    if task == "verify":  # see test_worst_embeddings_leave_out_identities_with_one_image
        assert "another identity" in bad.measure_name
        return
    assert bad.measure_name == "loss"
    found = bad.images
    values = [each.measure for each in found]
    assert values == sorted(values, reverse=True)
    given = run_.subject.trained
    index = torch.tensor([found[0].sample])
    with torch.no_grad():
        losses = given.criterion(given.network(examples.load_images(index).float()), examples.batch_targets(index, CPU))
    assert float(sum(losses.values())) == pytest.approx(values[0], rel=1e-4)


def test_gradcam_of_a_similarity_needs_two_images(of_each_task, run_cli):
    code, _, err = run_cli("explain", "gradcam", of_each_task["verify"], "--image", "0")
    assert code == 2
    assert "give two or more images" in err
    assert run_cli("explain", "occlude", of_each_task["verify"], "--image", "0")[0] == 0
    code, _, err = run_cli("explain", "gradcam", of_each_task["verify"], "--class", "s0")
    assert code == 2
    assert "this network gives embeddings" in err


# --- as commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [*COMMANDS, "ablate"])
def test_a_command_writes_its_image_and_one_for_tensorboard(command, run, run_cli, tmp_path):
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
    assert "already exists" in err


@pytest.mark.parametrize("command", ["features", "deconv", "occlude", "gradcam", "saliency", "invariance"])
def test_commands_explain_image_files(command, run, run_cli, tmp_path):
    save_picture(tmp_path / "a <b>.png", size=(20, 14))
    save_picture(tmp_path / "c.png", 1, size=(9, 9), mode="L")
    code, out, err = run_cli("explain", command, run, "--file", tmp_path, "--json")
    assert code == 0, err
    assert "a <b>.png" in json.dumps(json.loads(out))
    if command == "features":
        assert "the first 1 of 2 files" in run_cli("explain", command, run, "--file", tmp_path, "--images", "1")[2]


def test_an_image_of_a_split_equals_the_same_image_as_a_file(run, tmp_path):
    run_ = open_run(run)
    shown = run_.load_images(Selection("val", indices=[3]))
    Pil.fromarray(shown.pixels[0, 0].byte().numpy()).save(tmp_path / "same.png")
    other = run_.load_images(Selection(files=[tmp_path / "same.png"]))
    assert torch.equal(shown.pixels, other.pixels)
    a, b = (input_gradients(run_.subject, each, "1")[0] for each in (shown, other))
    assert torch.equal(a, b)


def test_an_unreadable_image_file_is_refused_by_name(run, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="bad.png"):
        open_run(run).load_images(Selection(files=[tmp_path / "bad.png"]))


def small_run(root: Path, data: str, model: str, task: str = "classify", more: str = "") -> Path:
    """Train a run for one epoch."""
    text = f"task: {task}\nname: small\ndata: {data}\nmodel: {model}\ntrain: {{epochs: 1, batch: 16{more}}}\n"
    return Path(train_run(parse_config(text, "small.yaml"), root, CPU, resume=False)["run"])


def test_a_network_without_convolutions_is_refused_where_they_are_needed(tmp_path, run_cli):
    run = small_run(tmp_path, "{source: digits}", "[flatten, {linear: {out_features: 8, activation: relu}}]")
    for command in ("filters", "features", "top", "deconv", "occlude", "gradcam"):
        code, _, err = run_cli("explain", command, run)
        assert code == 2
        assert "this network has no layer with" in err
    for command in ("saliency", "invariance", "embed"):
        assert run_cli("explain", command, run)[0] == 0
    code, _, err = run_cli("report", run)
    assert code == 0, err
    assert "No filters: this network has no layer with kernels" in (run / "report.html").read_text()


def arrays(path: Path, labels: list[int]) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8), dtype=np.uint8)
    np.savez(path, x_train=pixels, y_train=np.array(labels))
    return f"{{source: {{arrays: {path}}}, image: {{size: 8, channels: 1}}, split: {{val: 0.3}}}}"


def test_a_probe_is_fitted_on_a_subset_that_may_lack_a_class(tmp_path, monkeypatch):
    from cnnrun.explain.methods import embed as module

    monkeypatch.setattr(module, "_MAX_PROBED", 20)
    data = arrays(tmp_path / "a.npz", [0, 1] * 60 + [2] * 4)
    run = small_run(tmp_path, data, "[{conv: {out_channels: 4, activation: relu}}, global_avg_pool]")
    found = explain_run(Embed(split="val", probe=True), run, root=tmp_path)
    assert 0 <= found["layers"][0]["accuracy"] <= 1
    assert "fitted on 20 images of train and measured on 20" in found["caption"]


def test_a_probe_without_varying_labels_is_refused(of_each_task, run_cli, monkeypatch):
    from cnnrun.explain.methods import embed as module

    monkeypatch.setattr(module, "_varying_labels", lambda *_: np.zeros(2, bool))
    code, _, err = run_cli("explain", "embed", of_each_task["multilabel"], "--probe")
    assert code == 2
    assert "no label is present in some images and absent in others" in err
    code, out, _ = run_cli("explain", "embed", of_each_task["multilabel"])
    assert code == 0
    assert "No probe: no label is present" in out


def test_embeddings_of_two_images_are_written_without_a_map(run, tmp_path):
    run_ = open_run(run)
    two = run_.load_examples("val").select(torch.arange(len(run_.load_examples("val"))) < 2)
    from cnnrun.explain.methods.embed import EmbedOptions, embed

    found = embed(run_.subject, {"val": two}, "val", EmbedOptions(["last"], "tsne", False), 8)
    assert found.arrays["features"].shape == (2, 12)
    assert "too few for a map" in found.caption


def test_file_names_that_are_not_utf8_are_written_to_parquet(run, tmp_path):
    packed = run_method._encode_arrays({"features": np.zeros((1, 2)), "picture": np.array(["a\udcff.png"])}, ".parquet")
    assert packed[:4] == b"PAR1"


def test_a_repeated_channel_is_drawn_once(run):
    data = explain_run(Top(split="val", layer="stem", channels=(3, 3, 1)), run)
    assert [each["channel"] for each in data["channels"]] == [3, 1]


def test_invariance_accepts_layers_without_feature_maps(run):
    data = explain_run(Invariance(images=1, layers=("model[8]",)), run)
    assert data["layers"] == ["model[8].global_avg_pool"]


def test_a_backward_rule_without_effect_is_reported(tmp_path, run_cli):
    run = small_run(tmp_path, "{source: digits}", "[{conv: {out_channels: 4, activation: silu}}, global_avg_pool]")
    for rule, said in (("guided", True), ("deconv", True), ("plain", False)):
        _, out, _ = run_cli("explain", "saliency", run, "--rule", rule)
        assert ("No activation is a ReLU" in out) == said


def test_occlusion_of_values_in_different_units_names_no_winning_class(tmp_path, run_cli):
    save = [save_picture(tmp_path / f"{n}.png", n, (8, 8), "L").name for n in range(30)]
    lines = ["path,u,v", *(f"{name},{n / 30},{1000 + n}" for n, name in enumerate(save))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    data = f"{{source: {{table: {{path: {tmp_path / 't.csv'}, numbers: [u, v]}}}}, image: {{size: 8, channels: 1}}}}"
    run = small_run(tmp_path, data, "[{conv: {out_channels: 4, activation: relu}}, global_avg_pool]", "regress")
    code, out, err = run_cli("explain", "occlude", run, "--json")
    assert code == 0, err
    assert "said" not in json.loads(out)["pictures"][0]
    assert "winning class" not in json.loads(out)["caption"]


def test_a_retrained_ablation_removes_a_layer_from_every_repeat(run, run_cli, tmp_path):
    code, _, err = run_cli("explain", "ablate", run, "--remove", "repeat1.2.conv1", "--retrain", "--runs", tmp_path)
    assert code == 2
    assert err.startswith("--remove repeat1.2.conv1: no such layer")
    run_ = open_run(run)
    known = [place for place in run_.subject.places if place.module_name != "head"]
    variant = ablate._parse_removal(ablate._merge_repeated(known), "model[4].repeat.layers[0].conv")
    assert variant.title == "without model[4].repeat.layers[0].conv"
    code, _, err = run_cli("explain", "ablate", run, "--remove", "model[3]", "--retrain", "--split", "val")
    assert code == 2
    assert err.startswith("--split: retrained variants")


def test_a_removed_layer_inside_a_removed_block_is_counted_once(run):
    data = ablate.run_ablation(open_run(run), ["model[3],model[3].residual.layers[0]"], [], False)
    whole, without = (row["parameters"] for row in data["variants"])
    inside = open_run(run).subject.trained.network.layers.residual1
    assert without == whole - sum(value.numel() for value in inside.parameters())


def test_a_file_named_explain_prevents_only_the_tensorboard_output(run, run_cli, tmp_path):
    import shutil

    other = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("explain"))
    (other / "explain").write_text("mine")
    code, _, err = run_cli("explain", "filters", other, "--out", tmp_path / "f.png")
    assert code == 0
    assert "nothing written for TensorBoard" in err
    code, _, err = run_cli("explain", "filters", other)
    assert code == 3
    assert (other / "explain").read_text() == "mine"
