"""Exported code needs only torch, is formatted and gives exactly the network's outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from cnnrun.base.errors import ParityError
from cnnrun.config import zoo
from cnnrun.config.spec import union_members
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.task import Task
from cnnrun.contracts.task_parts import Criterion
from cnnrun.data.image_settings import ImageSettings
from cnnrun.experiment import open_run
from cnnrun.export.python_file import Code, generate_code
from cnnrun.export.python_source import SourceCollector, constructor_call
from cnnrun.export.writer import artefact_metadata
from cnnrun.model.layers import Leaf
from cnnrun.model.network import Network
from cnnrun.model.structures import Node
from cnnrun.model.trained_network import ExportedNetwork, TrainedNetwork
from cnnrun.results.export_run import export_run
from cnnrun.tasks.classification import Classify

CPU = torch.device("cpu")
NODE = TypeAdapter(Node)


@pytest.fixture(scope="module")
def exported_code(trained_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "digits-net.py"
    report = export_run(Code(), trained_run, trained_run.parent.parent, None, path)
    return path, report


def test_exported_code_passes_the_parity_check_without_any_difference(exported_code):
    path, report = exported_code
    assert report["passed"] is True
    assert report["largest_difference"] == 0
    assert report["metrics"]["network"] == report["metrics"]["artefact"]
    assert {file.name for file in path.parent.iterdir()} == {
        "digits-net.py",
        "digits-net.safetensors",
        "parity-code.json",
    }


def test_exported_code_runs_with_torch_alone(exported_code, trained_run, tmp_path):
    """In a process that cannot import cnnrun or its other dependencies."""
    path, _ = exported_code
    _, trained = open_run.open_trained(trained_run, trained_run.parent.parent, CPU)
    pixels = torch.randint(0, 17, (7, 8, 8, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    code = f"""
import sys, importlib.util
class Closed:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cnnrun", "safetensors", "pydantic", "yaml", "torchvision", "onnx"):
            raise ImportError(name)
sys.meta_path.insert(0, Closed())
import numpy, torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("net", {str(path)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
network = module.load()
with torch.inference_mode():
    out = network(torch.from_numpy(numpy.load({str(tmp_path / "pixels.npy")!r})))["probabilities"]
numpy.save({str(tmp_path / "out.npy")!r}, out.numpy())
print(network.classes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == str(list("0123456789"))
    with torch.inference_mode():
        (expected,) = ExportedNetwork(trained).eval()(pixels)
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected.numpy())


def format_with_ruff(text: str) -> str:
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "120", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def test_exported_code_is_formatted_and_contains_no_local_paths(exported_code):
    path, _ = exported_code
    text = path.read_text()
    assert format_with_ruff(text) == text
    assert "cnnrun." not in text
    assert str(Path(__file__).parents[2]) not in text


def wrap_trained(network: Network, task: Task) -> TrainedNetwork:
    return TrainedNetwork(network, Criterion(), task, Choices(), ImageSettings(), Path("run"), 0, CPU)


def build_trained_from_zoo(name: str) -> TrainedNetwork:
    from cnnrun.contracts.facts import DataFacts
    from cnnrun.model.network import materialize
    from tests.support.networks import build_from_zoo, zoo_experiment

    entry = zoo.read_entry(name)
    image = entry.image
    task = zoo_experiment(name, image).task
    network = materialize(build_from_zoo(name, image, 10).network, 0).to(memory_format=torch.channels_last).eval()
    facts = DataFacts(tuple("abcdefghij"), image, (0.0,) * image[0], (1.0,) * image[0])
    return wrap_trained(network, task.bind(facts))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in zoo.network_names() if not name.startswith(("vgg", "wide", "alex", "zf"))]
)
def test_a_zoo_network_exported_as_code_gives_identical_outputs(name, tmp_path):
    trained = build_trained_from_zoo(name)
    module = ExportedNetwork(trained).eval()
    Code().write(module, torch.empty(0), ["probabilities"], artefact_metadata(trained), tmp_path / "net.py")
    pixels = torch.randint(0, 256, (2, *trained.facts.image_shape[1:], trained.facts.image_shape[0]), dtype=torch.uint8)
    (theirs,) = Code().reload(tmp_path / "net.py")(pixels.numpy())
    with torch.inference_mode():
        assert torch.equal(module(pixels)[0], torch.from_numpy(theirs))
    text = (tmp_path / "net.py").read_text()
    assert format_with_ruff(text) == text


@pytest.mark.parametrize("kind", union_members(Leaf), ids=lambda kind: kind.kind)
def test_the_constructor_call_of_every_layer_rebuilds_it(kind):
    """The written call makes a module with the same state and the same output."""
    torch.manual_seed(0)
    spec = NODE.validate_python({kind.kind: dict(kind.example)})
    module = spec.build(kind.example_shape).eval()
    call = constructor_call(module).text()
    names: dict = {}
    sources = SourceCollector({"collections": {"OrderedDict"}, "torch": {"", "nn"}})
    for part in module.modules():
        if type(part).__module__.startswith("cnnrun."):
            sources.add(type(part))
    lines = ["from __future__ import annotations", *sources.import_lines(), *sources.definitions.values()]
    chain = "def chain(**layers):\n    return nn.Sequential(OrderedDict(layers))"
    exec(compile("\n".join([*lines, chain, f"made = {call}"]), "generated", "exec"), names)
    made = names["made"].eval()
    made.load_state_dict(module.state_dict())
    inputs = [torch.randn(2, *kind.example_shape)] * (2 if kind.has_several_inputs else 1)
    assert torch.equal(made(*inputs), module(*inputs))
    assert constructor_call(made).text() == call


def test_repeated_parts_are_written_once():
    trained = build_trained_from_zoo("resnet50")
    text = generate_code(ExportedNetwork(trained), ["probabilities"], artefact_metadata(trained), "net")
    assert text.count("def part") == 4  # the repeated bottleneck block of each stage
    assert len(text.splitlines()) < 400


def test_code_that_differs_from_the_network_is_not_kept(trained_run, tmp_path, monkeypatch):
    from cnnrun.export import python_file as code

    real = code.generate_code
    monkeypatch.setattr(code, "generate_code", lambda *a: real(*a).replace("outputs / self", "2 * outputs / self"))
    with pytest.raises(ParityError, match="not kept, its results differ"):
        export_run(Code(), trained_run, trained_run.parent.parent, None, tmp_path / "net.py")
    assert [file.name for file in tmp_path.iterdir()] == ["parity-code-failed.json"]
    assert json.loads((tmp_path / "parity-code-failed.json").read_text())["passed"] is False


@pytest.mark.parametrize(
    ("name", "why"), [("noext", "ends in .py"), ("net.onnx", "ends in .py"), ("folder.py", "ends in .py")]
)
def test_an_impossible_output_path_is_refused_before_exporting(trained_run, tmp_path, run_cli, name, why):
    (tmp_path / "folder.py").mkdir()
    code, _, err = run_cli("export", "code", trained_run, "--out", tmp_path / name)
    assert (code, len(err.splitlines())) == (2, 1)
    assert why in err
    assert [file.name for file in tmp_path.iterdir()] == ["folder.py"]


def test_an_unrelated_weights_file_is_not_overwritten(trained_run, tmp_path, run_cli):
    (tmp_path / "net.safetensors").write_text("precious")
    code, _, err = run_cli("export", "code", trained_run, "--out", tmp_path / "net.py")
    assert code == 2
    assert "choose another --out" in err
    assert (tmp_path / "net.safetensors").read_text() == "precious"
    (tmp_path / "net.safetensors").unlink()
    for _ in range(2):  # an earlier export of the same name is replaced
        assert run_cli("export", "code", trained_run, "--out", tmp_path / "net.py")[0] == 0


@pytest.mark.parametrize("names", [("class", "print"), ("lambda", "chain"), ("None", "load")])
def test_layers_may_have_any_name(names, tmp_path):
    from cnnrun.contracts.facts import DataFacts
    from cnnrun.model.network import materialize
    from tests.support.networks import build_from_text

    text = "".join(f"- conv: {{name: {name}, out_channels: 4, norm: batch}}\n" for name in names)
    network = materialize(build_from_text(text.replace("None", "'None'") + "- flatten", 1, 4, 4).network, 0)
    facts = DataFacts(("a\n", 'b"', "\u2028"), (1, 4, 4))
    trained = wrap_trained(network.to(memory_format=torch.channels_last).eval(), Classify().bind(facts))
    module = ExportedNetwork(trained).eval()
    Code().write(module, torch.empty(0), ["probabilities"], artefact_metadata(trained), tmp_path / "net.py")
    pixels = torch.randint(0, 256, (2, 4, 4, 1), dtype=torch.uint8)
    (theirs,) = Code().reload(tmp_path / "net.py")(pixels.numpy())
    with torch.inference_mode():
        assert torch.equal(module(pixels)[0], torch.from_numpy(theirs))
    text = (tmp_path / "net.py").read_text()
    assert format_with_ruff(text) == text
