"""Measure explanations and the report. Results: benchmarks/README.md.

    python benchmarks/explain.py top|occlude|page|ending RUN

top: the strongest patches of 10,000 images for 64 channels, compared with an evaluation of the same, interleaved.
occlude: 169 positions on one 64x64 image, for the small VGG of configs/fashion-vgg.yaml.
page: the time that a report takes to open in Chromium, and its size.
ending: the time that the report adds to a training of configs/digits.yaml.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cnnrun.contracts.choices import Choices
from cnnrun.experiment.checks import facts_before_decoding
from cnnrun.experiment.config_file import read_config
from cnnrun.experiment.open_run import open_trained, prepare_eval_data
from cnnrun.explain.methods.occlude import occlude
from cnnrun.explain.methods.patches import find_strongest_cells
from cnnrun.explain.methods.top_patches import top_patches
from cnnrun.explain.subject import ExplainedNetwork, ImagesToExplain
from cnnrun.model.network import build_network, materialize
from cnnrun.results.report import writer as reporting
from cnnrun.results.studies.train_run import train_run
from cnnrun.training.evaluation import measure_split

CPU = torch.device("cpu")
TIMES = 5


def print_medians(sides: dict[str, Callable[[], object]]) -> None:
    """Print each side's median seconds over interleaved repetitions, and its ratio to the first side by pairs."""
    seconds = {name: [] for name in sides}
    for repetition in range(TIMES + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if repetition:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds))
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[first], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name}: median {statistics.median(values):.2f} s, times {first}: {ratio}, n = {TIMES}")


def measure_top(run: Path) -> None:
    experiment, trained = open_trained(run, Path("runs"), CPU)
    name, data = prepare_eval_data(experiment, trained, None)
    examples, batch = data.splits[name], experiment.train.batch
    subject = ExplainedNetwork(trained, experiment.model.layers)
    places = [place for place in subject.feature_map_layers() if place.shape[0] == 64 and place.kind == "conv"]
    print(f"{len(examples):,} images of {name}; {places[-1].path} gives {places[-1].shape}")
    sides = {
        "evaluation": lambda: measure_split(trained.to_measure(), examples, batch),
        "top, one pass": lambda: find_strongest_cells(trained, places[-1], examples, batch),
        "top, drawn, with 576 projections": lambda: top_patches(
            subject, examples, places[-1].module_name, [], 64, batch
        ),
    }
    print_medians(sides)


def measure_occlude(_: Path) -> None:
    experiment = read_config(Path("configs/fashion-vgg.yaml"), ["data.image.size=64"])
    task = experiment.task.bind(facts_before_decoding(experiment))
    network = (
        materialize(build_network(experiment.model.layers, task).network, 0)
        .eval()
        .to(memory_format=torch.channels_last)
    )
    from cnnrun.model.trained_network import TrainedNetwork

    trained = TrainedNetwork(
        network,
        task.learning.build_criterion(),
        task,
        Choices(),
        experiment.data.image,
        Path(),
        0,
        CPU,
    )
    subject = ExplainedNetwork(trained, experiment.model.layers)
    images = ImagesToExplain(torch.rand(1, 1, 64, 64) * 255, ["a"], [""])
    explanation = occlude(subject, images, None, None, 16, 4)
    places = sum(map(len, explanation.data["pictures"][0]["scores"]))
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, 64x64, {places} places, in batches of 128")
    print_medians({"occlude": lambda: occlude(subject, images, None, None, 16, 4)})


def measure_page(run: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.support.browser import open_page

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        start = time.perf_counter()
        reporting.write_report([run], Path("runs"), CPU, out=path)
        print(f"written in {time.perf_counter() - start:.1f} s, {path.stat().st_size / 2**20:.2f} MiB")
        for width in (1280, 390):
            seconds = []
            for _ in range(TIMES):
                with open_page(path, width=width) as visit:
                    seconds.append(visit.page.evaluate("performance.now()") / 1000)
                    assert visit.console == []
            median, maximum = statistics.median(seconds), max(seconds)
            print(f"open and drawn at {width} px: median {median:.2f} s, at most {maximum:.2f}, n = {TIMES}")


def measure_ending(_: Path) -> None:
    experiment = read_config(Path("configs/digits.yaml"))
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(TIMES):
            start = time.perf_counter()
            result = train_run(experiment, Path(folder), CPU, resume=False)
            middle = time.perf_counter()
            reporting.report_after_training(Path(result["run"]), Path(folder), CPU)
            print(f"training {middle - start:.1f} s, report {time.perf_counter() - middle:.1f} s")


if __name__ == "__main__":
    what, run = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else Path("runs")
    {"top": measure_top, "occlude": measure_occlude, "page": measure_page, "ending": measure_ending}[what](run)
