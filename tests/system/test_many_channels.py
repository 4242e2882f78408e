"""Images of five channels and 16 bits from end to end: the same results from files, the split and exported files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cnnrun.experiment.config_file import parse_config
from cnnrun.export.onnx import Onnx
from cnnrun.export.python_file import Code
from cnnrun.results.studies.train_run import train_run
from cnnrun.training.run_records import read_metrics

tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed (extra `bands`)")
WHITE = 4095
CONFIG = """
task: classify
data:
  source: {{folder: {root}}}
  image: {{size: 12, channels: 5, bits: 16, white: 4095}}
  augment: {{flip: horizontal, brightness: 0.1, contrast: 0.1, noise: 2}}
  split: {{val: 0.25, test: 0.25}}
model:
  - conv: {{out_channels: 8, norm: batch, activation: relu}}
  - max_pool: 2
  - global_avg_pool
train: {{epochs: 6, batch: 8, optimizer: {{sgd: {{lr: 0.1, momentum: 0.9}}}}, monitor: val/accuracy}}
"""


def write_bands(root: Path, count: int = 48) -> Path:
    """Two classes that differ in the fifth channel alone, by less than an eight-bit image could show."""
    chance = np.random.default_rng(0)
    for number in range(count):
        pixels = chance.integers(100, 108, (12, 12, 5)).astype(np.uint16)
        pixels[:, :, 4] += 10 * (number % 2)
        folder = root / ("low", "high")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(folder / f"{number}.tif", pixels, photometric="minisblack", planarconfig="contig")
    return root


@pytest.fixture(scope="module")
def bands(tmp_path_factory) -> Path:
    return write_bands(tmp_path_factory.mktemp("bands") / "images")


@pytest.fixture(scope="module")
def run(bands, tmp_path_factory) -> Path:
    experiment = parse_config(CONFIG.format(root=bands), "bands.yaml")
    return Path(train_run(experiment, tmp_path_factory.mktemp("runs"), torch.device("cpu"), resume=False)["run"])


def test_what_eight_bits_cannot_show_is_learned_exported_and_predicted_alike(run, bands, run_cli, tmp_path):
    evaluation = json.loads(run_cli("eval", run, "--split", "test", "--json")[1])
    assert evaluation["numbers"]["accuracy"] == 1.0
    assert max(row["val/accuracy"] for row in read_metrics(run) if "val/accuracy" in row) == 1.0
    for kind in ("onnx", "code"):
        code, out, error = run_cli("export", kind, run, "--split", "test", "--json")
        assert code == 0, error
        assert json.loads(out)["passed"]
    code, out, error = run_cli("predict", bands, "--run", run, "--json")
    assert code == 0, error
    rows = [json.loads(line) for line in out.splitlines()]
    assert all(row["label"] == Path(row["path"]).parent.name for row in rows)


def test_an_exported_file_takes_the_pixels_as_they_are_stored(run, bands, run_cli):
    import onnxruntime

    path = json.loads(run_cli("export", "onnx", run, "--json")[1])["path"]
    session = onnxruntime.InferenceSession(path)
    (taken,) = session.get_inputs()
    assert (taken.type, taken.shape[1:]) == ("tensor(uint16)", [12, 12, 5])
    words = "uint16 [batch, 12, 12, 5], 5 channels, 0 to 4,095, others clipped"
    assert session.get_modelmeta().custom_metadata_map["input"] == words
    file = sorted(bands.glob("high/*.tif"))[0]
    row = json.loads(run_cli("predict", file, "--run", run, "--json")[1])
    probabilities = session.run(["probabilities"], {"pixels": tifffile.imread(file)[None]})[0][0]
    assert float(probabilities.max()) == pytest.approx(row["probability"], abs=1e-5)


@pytest.mark.parametrize("kind", ["onnx", "code"])
def test_an_exported_file_clips_what_is_outside(kind, run, run_cli, tmp_path):
    path = tmp_path / ("model.onnx" if kind == "onnx" else "model.py")
    assert run_cli("export", kind, run, "--out", path)[0] == 0
    artefact = (Onnx() if kind == "onnx" else Code()).reload(path)
    bright = np.full((1, 12, 12, 5), 60_000, np.uint16)
    assert np.array_equal(artefact(bright)[0], artefact(bright.clip(0, WHITE))[0])


def test_brighter_pixels_than_white_are_named_before_training(bands, run_cli, tmp_path):
    (tmp_path / "bands.yaml").write_text(CONFIG.format(root=bands))
    code, _, error = run_cli("check", tmp_path / "bands.yaml", "data.image.white=256")
    assert code == 0, error
    tifffile.imwrite(tmp_path / "bright.tif", np.full((12, 12, 5), 300, np.uint16), photometric="minisblack",
                     planarconfig="contig")  # fmt: skip
    root = write_bands(tmp_path / "more")
    (tmp_path / "bright.tif").rename(root / "low" / "bright.tif")
    code, _, error = run_cli("check", tmp_path / "bands.yaml", f"data.source.folder={root}", "data.image.white=256")
    assert code == 8
    assert "bright.tif: has the value 300, above data.image.white (256)" in error


@pytest.mark.parametrize("method", [["filters"], ["features"], ["saliency"], ["occlude"]])
def test_explanations_draw_the_first_three_channels(method, run, run_cli, tmp_path):
    code, _, error = run_cli("explain", *method, run, "--out", tmp_path / "out.png")
    assert code == 0, error
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_the_report_and_the_sheet_of_augmented_images_are_drawn(run, bands, run_cli, tmp_path):
    assert run_cli("report", run)[0] == 0
    (tmp_path / "bands.yaml").write_text(CONFIG.format(root=bands))
    code, _, error = run_cli("data", "show", tmp_path / "bands.yaml", "--out", tmp_path / "sheet.png")
    assert code == 0, error


def test_init_finds_channels_bits_and_white(bands, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run_cli("init", bands, "--out", tmp_path / "new.yaml", "--minutes", "0.1")
    assert code == 0, error
    text = (tmp_path / "new.yaml").read_text()
    assert "channels: 5, bits: 16, white: 511" in text
    code, _, error = run_cli("train", tmp_path / "new.yaml", "--runs", tmp_path / "runs", "train.epochs=2")
    assert code == 0, error
