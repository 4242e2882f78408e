"""Every command that computes gives the same results on a GPU as on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.pretended_gpu import some_gpu
from tests.support.small_runs import TASKS

pytestmark = pytest.mark.cuda
CLOSE = {"abs": 1e-3, "rel": 1e-3}
EXPLAIN_COMMANDS = (
    "filters",
    "features",
    "top",
    "deconv",
    "occlude",
    "gradcam",
    "saliency",
    "evolve",
    "invariance",
    "embed",
)


def numbers(found: object) -> list[float]:
    """The floats of a JSON document, in order."""
    if isinstance(found, dict):
        return [value for key in sorted(found) for value in numbers(found[key])]
    if isinstance(found, list):
        return [value for each in found for value in numbers(each)]
    return [found] if isinstance(found, float) else []


@pytest.fixture(autouse=True)
def _full_float32():
    """Disable TF32. Its rounding, the default on a GPU, can change which of two close scores is larger."""
    # Not by `conv.fp32_precision`: mixed with the flag that torch.export reads, it is an error (PyTorch 2.14).
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def on_both_devices(gpu, run_cli):
    """Return a function: `on_both_devices("eval", run)` gives the command's JSON output on the CPU and on the GPU."""

    def run(*words: object) -> list[object]:
        found = []
        for device in ("cpu", "cuda"):
            code, out, err = run_cli(*words, "--device", device, "--json")
            assert code == 0, err
            found.append(json.loads(out))
        return found

    return run


def copy_run(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "runs" / "tiny" / "1")


@pytest.fixture
def tiny_run(trained_run, tmp_path) -> Path:
    return copy_run(trained_run, tmp_path)


def images_of(run: Path) -> Path:
    """The image folder that `train_each_task` trained on."""
    return run.parents[2] / "pets"


# --- every task -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_eval_measures_the_same_metrics_on_both_devices(on_both_devices, of_each_task, task):
    cpu, cuda = on_both_devices("eval", of_each_task[task])
    assert numbers(cpu["numbers"]) == pytest.approx(numbers(cuda["numbers"]), **CLOSE)
    assert cpu["samples"] == cuda["samples"]


@pytest.mark.parametrize("task", TASKS)
def test_predict_gives_the_same_predictions_on_both_devices(gpu, run_cli, of_each_task, task):
    run = of_each_task[task]
    rows = []
    for device in ("cpu", "cuda"):
        code, out, err = run_cli("predict", images_of(run) / "cat", "--run", run, "--device", device, "--json")
        assert code == 0, err
        rows.append([json.loads(line) for line in out.splitlines()])
    assert len(rows[0]) == 30
    assert numbers(rows[0]) == pytest.approx(numbers(rows[1]), **CLOSE)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_trained_on_a_gpu_can_be_exported(run_cli, of_each_task, tmp_path, task):
    config = of_each_task[task] / "config.yaml"
    words = [config, f"data.cache_dir={tmp_path / 'cache'}", "--device", "cuda", "--runs", tmp_path / "runs"]
    with some_gpu():  # files are exported and compared on the CPU
        code, out, err = run_cli("train", *words, "--no-report", "--json")
    assert code == 0, err
    run = Path(json.loads(out)["run"])
    environment = json.loads((run / "environment.json").read_text())
    assert environment["device"] == "cuda:0"
    assert environment["device_name"] != "cpu"
    assert {"cuda", "cudnn", "fp32_convolutions", "fp32_products"} <= environment.keys()
    for form in ("onnx", "code"):
        code, out, err = run_cli("export", form, run, "--json")
        assert code == 0, err
        assert json.loads(out)["largest_difference"] < 1e-3


@pytest.mark.parametrize("task", TASKS)
def test_a_report_is_written_on_a_gpu(gpu, run_cli, of_each_task, tmp_path, task):
    pytest.importorskip("vl_convert")
    code, _, err = run_cli("report", of_each_task[task], "--device", "cuda", "--out", tmp_path / "page.html")
    assert code == 0, err
    assert "<html" in (tmp_path / "page.html").read_text()


# --- explain ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", EXPLAIN_COMMANDS)
def test_explain_gives_the_same_result_on_both_devices(on_both_devices, linked_run, command):
    cpu, cuda = on_both_devices("explain", command, linked_run)
    assert numbers(cpu) == pytest.approx(numbers(cuda), **CLOSE)


def test_ablation_gives_the_same_result_on_both_devices(on_both_devices, linked_run):
    cpu, cuda = on_both_devices("explain", "ablate", linked_run, "--remove", "model[3].residual")
    assert numbers(cpu) == pytest.approx(numbers(cuda), **CLOSE)


@pytest.mark.parametrize("command", ["detections", "assign"])
def test_detections_and_assignments_are_the_same_on_both_devices(on_both_devices, of_each_task, command):
    cpu, cuda = on_both_devices("explain", command, of_each_task["detect"])
    assert numbers(cpu) == pytest.approx(numbers(cuda), **CLOSE)


# --- studies ----------------------------------------------------------------------------------------------------------


def test_calibrate_fits_the_same_temperature_on_both_devices(on_both_devices, tiny_run):
    cpu, cuda = on_both_devices("calibrate", tiny_run)
    assert numbers(cpu) == pytest.approx(numbers(cuda), **CLOSE)


def test_a_run_is_not_distinguishable_from_itself(gpu, run_cli, tiny_run):
    code, out, err = run_cli("compare", tiny_run, tiny_run, "--device", "cuda")
    assert code == 0, err
    assert "not distinguishable" in out


def test_find_lr_runs_on_a_gpu(gpu, run_cli, tiny):
    code, out, err = run_cli("find-lr", tiny, "--steps", 20, "--device", "cuda", "--json")
    assert code == 0, err
    assert len(json.loads(out)["rates"]) > 2


def test_plan_estimates_time_and_memory_on_a_gpu(gpu, run_cli, tiny, tmp_path):
    code, out, err = run_cli("plan", tiny, "--device", "cuda", "--runs", tmp_path / "runs", "--json")
    assert code == 0, err
    planned = json.loads(out)
    assert planned["seconds_per_step"] > 0
    assert planned["peak_memory_mib"] > 0


def test_several_seeds_train_on_a_gpu(gpu, run_cli, tiny, tmp_path):
    where = ["--device", "cuda", "--runs", tmp_path / "runs", "--json"]
    code, out, err = run_cli("train", tiny, "train.epochs=1", "--seeds", 2, "--no-report", *where)
    assert code == 0, err
    assert len(json.loads(out)["runs"]) == 2


def test_a_sweep_trains_on_a_gpu(gpu, run_cli, tiny, tmp_path):
    pytest.importorskip("optuna")
    where = ["--device", "cuda", "--runs", tmp_path / "runs", "--json"]
    code, _, err = run_cli("sweep", tiny, "train.epochs=1", "train.optimizer.sgd.lr=0.01|0.1", "--trials", 2, *where)
    assert code == 0, err


@pytest.mark.parametrize("task", TASKS)
def test_selftest_of_a_config_passes_on_a_gpu(gpu, run_cli, of_each_task, tmp_path, task):
    config = of_each_task[task] / "config.yaml"
    code, out, err = run_cli("selftest", config, "--device", "cuda", "--json")
    checks = {each["check"]: each for each in json.loads(out)["checks"]}
    promised = ("a repeated run is the same", "a resumed run is the same", "reading threads change no bit")
    assert all(checks[name]["passed"] for name in promised), (checks, err)
    assert code in (0, 9)  # exit code 9: such a small network may fail the learning checks


def test_selftest_without_a_config_passes_on_a_gpu(gpu, run_cli):
    code, out, err = run_cli("selftest", "--device", "cuda")
    assert code == 0, (out, err)


# --- face verification ------------------------------------------------------------------------------------------------


def test_enroll_identify_and_verify_give_the_same_on_both_devices(
    on_both_devices, gpu, run_cli, of_each_task, tmp_path
):
    run = of_each_task["verify"]
    people = images_of(run).parent / "people"
    one, other = sorted((people / "s0").glob("*.png"))[:2]
    cpu, cuda = on_both_devices("verify", one, other, "--run", run, "--threshold", "0.5")
    assert numbers(cpu) == pytest.approx(numbers(cuda), **CLOSE)
    gallery = tmp_path / "known.safetensors"
    code, _, err = run_cli("enroll", people, "--gallery", gallery, "--run", run, "--device", "cuda")
    assert code == 0, err
    found = []
    for device in ("cpu", "cuda"):  # a gallery written on a GPU can be read on the CPU
        words = [
            "identify",
            one,
            "--gallery",
            gallery,
            "--run",
            run,
            "--threshold",
            "0.5",
            "--device",
            device,
            "--json",
        ]
        code, out, err = run_cli(*words)
        assert code == 0, err
        found.append(json.loads(out.splitlines()[0]))
    assert numbers(found[0]) == pytest.approx(numbers(found[1]), **CLOSE)


# --- missing devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("cuda:64", 6, "--device cuda:64: this machine has"),
        ("cuda:x", 2, "--device cuda:x: use auto, cpu, cuda or cuda:N"),
        ("gpu", 2, "--device gpu: use auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_missing_or_malformed_device_is_refused_in_one_line(gpu, run_cli, tiny, name, code, words):
    found, _, err = run_cli("train", tiny, "--device", name)
    assert found == code
    assert err.startswith(words)
    assert len(err.splitlines()) == 1


def test_a_gpu_failure_is_reported_in_one_line(gpu, run_cli, tiny, tmp_path, monkeypatch):
    from cnnrun.tasks.classification import CrossEntropy

    def forward(self, outputs, targets):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be ...")

    monkeypatch.setattr(CrossEntropy, "forward", forward)
    code, _, err = run_cli("train", tiny, "--device", "cuda", "--runs", tmp_path / "runs")
    assert code == 6
    assert "the GPU or its driver failed (CUDA error: uncorrectable ECC error encountered)" in err
    assert "Traceback" not in err
