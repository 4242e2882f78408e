"""Export of a network, from a run or a weights file, into a file for other programs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnrun.base.errors import ConfigError, escape
from cnnrun.data.image_files import load_with_view, to_network_batch
from cnnrun.data.image_paths import list_images
from cnnrun.experiment.open_run import open_network, open_trained, prepare_eval_data
from cnnrun.export import Format
from cnnrun.export.parity import MIN_SAMPLES, measure_image_parity, measure_parity
from cnnrun.export.writer import export_network
from cnnrun.model.trained_network import TrainedNetwork
from cnnrun.training.run_records import EXPORTS


def export_run(
    export_format: Format,
    run: Path | None,
    runs: Path,
    split: str | None,
    out: Path | None,
    images: Sequence[Path] = (),
) -> dict[str, Any]:
    """Write the network of a run or a weights file in a format, by default into the run's folder, or beside the file.

    It is compared with the network on the run's split, or on `images`. Returns the file's path and how its outputs
    compare with the network's. Raises ConfigError if `out` does not fit
    the format.
    """
    if run is not None and run.suffix == ".safetensors":
        if split:
            raise ConfigError("--split is for runs; a weights file has no data, and is compared on --images")
        return _export_weights(export_format, run, images, out)
    if images:
        raise ConfigError("--images is for weights files; a run is compared on its own data (--split)")
    experiment, trained = open_trained(run, runs, torch.device("cpu"))
    split_name, data = prepare_eval_data(experiment, trained, split, min_images=MIN_SAMPLES)
    path = out or trained.run / EXPORTS / f"model{export_format.suffix}"
    _check_suffix(path, export_format)
    names = [split_name, *(name for name in data.splits if name != split_name)]
    splits, batch = {name: data.splits[name] for name in names}, experiment.train.batch
    record = export_network(
        export_format, trained, path, lambda artefact: measure_parity(artefact, trained, splits, batch)
    )
    return {"path": str(path), **record}


def _export_weights(export_format: Format, weights: Path, paths: Sequence[Path], out: Path | None) -> dict[str, Any]:
    # Not the weights' own name: an export may write a safetensors file beside its code.
    path = out or weights.with_name(f"{weights.stem}_exported{export_format.suffix}")
    _check_suffix(path, export_format)
    if not paths:
        raise ConfigError(f"{escape(str(weights))}: a weights file has no data; give --images to compare results on")
    trained = open_network(weights, Path(), torch.device("cpu"))
    images = _load_images(trained, paths)
    record = export_network(
        export_format, trained, path, lambda artefact: measure_image_parity(artefact, trained, images)
    )
    return {"path": str(path), **record}


def _check_suffix(path: Path, export_format: Format) -> None:
    if path.suffix != export_format.suffix or path.is_dir():
        raise ConfigError(f"--out {path}: give a file that ends in {export_format.suffix}")


def _load_images(trained: TrainedNetwork, paths: Sequence[Path]) -> Tensor:
    """The first MIN_SAMPLES images at the paths, fitted to the network's input: [N, C, H, W]. Raises DataError."""
    channels, height, width = trained.facts.image_shape
    files = itertools.islice(list_images(paths), MIN_SAMPLES)
    images = [load_with_view(path, (height, width), channels, trained.image)[0] for path in files]
    return to_network_batch(images, trained.image, torch.device("cpu"))
