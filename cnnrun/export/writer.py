"""Export of a network: write a file, load it again, compare it with the network, and keep it only if they agree."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cnnrun import __version__
from cnnrun.base.atomic_files import Folder, json_bytes, make_folder, storage_errors, write_json
from cnnrun.base.errors import ConfigError, ParityError
from cnnrun.data.image_settings import ImageSettings
from cnnrun.export import Format
from cnnrun.export.parity import Artefact, pixel_shape
from cnnrun.model.trained_network import ExportedNetwork, TrainedNetwork


def export_network(
    export_format: Format, trained: TrainedNetwork, path: Path, measure: Callable[[Artefact], dict[str, Any]]
) -> dict[str, Any]:
    """Write the artefact to `path` and the record of its parity check beside it; return the record.

    `measure` compares the artefact with the network. Raises ParityError and writes no artefact if its results differ.
    """
    make_folder(path.parent)
    module = ExportedNetwork(trained).eval()
    names = list(trained.task.predicting.result_shapes())
    example = trained.image.pixel_format.to_file(torch.zeros(2, *pixel_shape(trained))).to(trained.device)
    record_path = path.with_name(export_format.record)
    # In a temporary folder, so that a process that is killed leaves nothing beside `path`.
    with TemporaryDirectory(prefix="cnnrun-export-") as folder:
        temporary = Path(folder) / path.name
        with storage_errors(temporary, 0):
            export_format.write(module, example, names, artefact_metadata(trained), temporary)
        record = measure(export_format.reload(temporary)) | {"file": path.name}
        if not record["passed"]:
            # Under a name of its own: an earlier artefact keeps its record.
            write_json(record_path.with_stem(record_path.stem + "-failed"), record)
            raise ParityError(f"{path}: not kept, its results differ from the network's: {record['reason']}")
        files = {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}
    _replace_export(path, record_path, files, record)
    return record


def _replace_export(path: Path, record_path: Path, files: dict[str, bytes], record: dict[str, Any]) -> None:
    """Write the files of an export, in place of an earlier one, so that a record is always that of its files."""
    for name in files:
        if (sibling := path.with_name(name)).exists() and not path.exists():
            raise ConfigError(f"{sibling}: exists, but is not part of an earlier export; choose another --out")
    record["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    with storage_errors(path, sum(map(len, files.values()))):
        folder = Folder(path.parent)
        folder.remove_abandoned()
        folder.replace_together(files, (record_path.name, json_bytes(record)))


def artefact_metadata(trained: TrainedNetwork) -> dict[str, Any]:
    """Metadata of an artefact: its task, classes and input, and the version and step that it comes from."""
    channels, height, width = trained.facts.image_shape
    image, channel_names = trained.image, {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    pixel_format = image.pixel_format
    levels = f", {pixel_format.black:,} to {pixel_format.white:,}, others clipped" if pixel_format.is_deep else ""
    return {
        "task": trained.task.kind,
        "classes": list(trained.facts.classes),
        "input": f"{pixel_format.file_dtype} [batch, {height}, {width}, {channels}], {channel_names}{levels}",
        "resize": f"{_describe_fit(image)}, bilinear with antialiasing (Pillow), background {image.background}",
        "cnnrun": __version__,
        "step": trained.step,
        **trained.task.predicting.metadata(trained.choices),
    }


def _describe_fit(image: ImageSettings) -> str:
    return f"crop of the middle {image.crop_pct:g}" if image.fit == "crop" else image.fit
