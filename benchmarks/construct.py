"""Measure the time from YAML to a network in memory, compared with torchvision's constructor, interleaved.

    python benchmarks/construct.py [NETWORK ...] [--rounds 9]

cnnrun: a config's text is parsed, checked and built, with initial weights. torchvision: `models.NAME(weights=None)`.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable

import torch

from cnnrun.contracts.facts import DataFacts
from cnnrun.experiment import config_file
from cnnrun.model.network import build_network, materialize

CLASSES = tuple(map(str, range(1000)))
CONFIG = "task: classify\nmodel: {name}\ndata: {{source: {{folder: x}}, image: {{size: {size}, channels: 3}}}}\n"
SIZES = {"inception_v3": 299}
SETTINGS = {name: {"aux_logits": False} for name in ("inception_v3", "googlenet")}


def build_with_cnnrun(name: str) -> None:
    experiment = config_file.parse_config(CONFIG.format(name=name, size=SIZES.get(name, 224)), "f")
    shape = experiment.data.image_shape()
    assert shape is not None
    materialize(build_network(experiment.model.layers, experiment.task.bind(DataFacts(CLASSES, shape))).network, 0)


def build_with_torchvision(name: str) -> None:
    import torchvision

    torchvision.models.get_model(name, weights=None, **SETTINGS.get(name, {}))


def seconds(build: Callable[[str], None], name: str) -> float:
    gc.collect()
    began = time.perf_counter()
    build(name)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet18", "resnet50", "mobilenet_v2", "densenet121", "vgg11"])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {args.rounds} rounds")
    for name in args.networks:
        build_with_cnnrun(name)
        build_with_torchvision(name)
        pairs = [(seconds(build_with_cnnrun, name), seconds(build_with_torchvision, name)) for _ in range(args.rounds)]
        ratios = [cnnrun / torchvision for cnnrun, torchvision in pairs]
        cnnrun, torchvision = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        print(f"{name}: cnnrun {cnnrun:.3f} s, torchvision {torchvision:.3f} s, {ratio}")


if __name__ == "__main__":
    main()
