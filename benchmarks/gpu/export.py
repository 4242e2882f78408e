"""Train on the device and export: check that the file is the model, and that eval agrees between CPU and GPU.

python benchmarks/gpu/export.py --device cuda
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RICH, ROOT, Options, attempt, emit, parse_options

from cnnrun.experiment import config_file
from cnnrun.export.onnx import Onnx
from cnnrun.export.python_file import Code
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.export_run import export_run
from cnnrun.results.studies.train_run import train_run

CLOSE = 1e-3  # largest difference of metrics on two devices, both in full float32
SCENES = ["data.source={digit_scenes: {train: 160, held_out: 32}}", "train.batch=16", "train.epochs=2"]


def main() -> None:
    """Train, export, measure: a classifier, then a detector."""
    options = parse_options(__doc__)
    torch.backends.cudnn.allow_tf32 = False  # in TF32, scores that are close change their order
    scenes = (ROOT / "configs" / "digit-scenes.yaml").read_text()
    configs = {"rich": config_file.parse_config(RICH, "rich", ["name=rich"])}
    configs["scenes"] = config_file.parse_config(scenes, "scenes", ["name=scenes", *SCENES])
    with tempfile.TemporaryDirectory(prefix="cnnrun-export-") as folder:
        for name, experiment in configs.items():
            with attempt("train", seconds=options.seconds_left, case=name):
                run = Path(train_run(experiment, Path(folder), options.device, resume=False)["run"])
                emit("train", case=name, device=str(options.device))
                check_run(name, run, options)


def check_run(name: str, run: Path, options: Options) -> None:
    """Emit how the exported files and the metrics of a run agree."""
    for form in (Onnx(), Code()):
        kind = type(form).__name__.lower()
        with attempt("export", seconds=options.seconds_left, case=name, format=kind):
            emit_parity(name, kind, export_run(form, run, run.parents[1], None, None))
    with attempt("eval", seconds=options.seconds_left, case=name):
        compare_devices(name, run, options)


def emit_parity(name: str, kind: str, report: dict[str, Any]) -> None:
    """Emit how an exported file compares with the network, as the command reports it."""
    figures = {key: report[key] for key in ("samples_compared", "largest_difference")}
    network, artefact = report["metrics"]["network"], report["metrics"]["artefact"]
    figures["metrics_differ"] = max(abs(value - artefact[key]) for key, value in network.items() if value is not None)
    emit("export", case=name, format=kind, ok=report["passed"], reason=report["reason"], **figures)


def compare_devices(name: str, run: Path, options: Options) -> None:
    """Emit the largest difference between the metrics on the CPU and on the device."""
    on_cpu, on_device = (
        evaluate_run(run, run.parents[1], device, None)["numbers"] for device in (torch.device("cpu"), options.device)
    )
    gaps = {key: abs(value - on_device[key]) for key, value in on_cpu.items() if isinstance(value, float)}
    worst = max(gaps, key=lambda key: gaps[key])
    reason = f"{worst}: {on_cpu[worst]:.6f} on the CPU, {on_device[worst]:.6f} on {options.device}"
    figures = {"numbers": len(gaps), "largest_difference": gaps[worst], "of": worst, "allowed": CLOSE}
    emit("eval", case=name, ok=gaps[worst] <= CLOSE, reason=reason, **figures)


if __name__ == "__main__":
    main()
