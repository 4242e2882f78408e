"""Export: write, reload, compare, and keep the file only if it is the model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cnnrun import __version__
from cnnrun.base.atomic_files import Folder, json_bytes, make_folder, storage_errors, write_json
from cnnrun.base.errors import ConfigError, ParityError
from cnnrun.data.dataset import Examples
from cnnrun.data.image_files import ImageSettings
from cnnrun.export import Format
from cnnrun.export.parity import measure_parity, pixel_shape
from cnnrun.model.trained_network import ExportedNetwork, TrainedNetwork


def export_network(
    form: Format, trained: TrainedNetwork, splits: dict[str, Examples], path: Path, batch: int
) -> dict[str, Any]:
    """Write `path`, and the record of its parity beside it; returns the latter.

    Raises ParityError, leaving no file behind. The metric is measured on the first of `splits`; the others add pictures
    to compare where it has too few.
    """
    make_folder(path.parent)
    module = ExportedNetwork(trained).eval()
    names = list(trained.task.result_shapes(trained.facts))
    example = torch.zeros(2, *pixel_shape(trained), dtype=torch.uint8, device=trained.device)
    record = path.with_name(form.record)
    # Made elsewhere: whatever ends this process leaves nothing in the folder.
    with TemporaryDirectory(prefix="cnnrun-export-") as folder:
        made = Path(folder) / path.name
        with storage_errors(made, 0):
            form.write(module, example, names, artefact_metadata(trained), made)
        report = measure_parity(form.reload(made), trained, splits, batch) | {"file": path.name}
        if not report["passed"]:
            # Beside the record of an earlier file, which stays with that file.
            write_json(record.with_stem(record.stem + "-failed"), report)
            raise ParityError(f"{path}: not kept, it is not the model: {report['reason']}")
        files = {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}
    _put_in_place(path, record, files, report)
    return report


def _put_in_place(path: Path, record: Path, files: dict[str, bytes], report: dict[str, Any]) -> None:
    """Replace the files of an earlier export; a record that is there is always that of the files beside it."""
    for name in files:
        if (there := path.with_name(name)).exists() and not path.exists():
            raise ConfigError(f"{there}: is there, and not of an earlier export; choose another --out")
    report["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    with storage_errors(path, sum(map(len, files.values()))):
        folder = Folder(path.parent)
        folder.remove_abandoned()
        folder.replace_together(files, (record.name, json_bytes(report)))


def artefact_metadata(trained: TrainedNetwork) -> dict[str, Any]:
    """What a user of the file needs to know, and what it came from."""
    channels, height, width = trained.facts.image
    return {
        "task": trained.task.kind,
        "classes": list(trained.facts.classes),
        "input": f"uint8 [batch, {height}, {width}, {channels}], {'grey' if channels == 1 else 'RGB'}",
        "resize": f"{_fit(trained.image)}, bilinear with antialiasing (Pillow), background {trained.image.background}",
        "cnnrun": __version__,
        "step": trained.step,
        **trained.task.metadata(trained.facts),
    }


def _fit(image: ImageSettings) -> str:
    return f"crop of the middle {image.crop_pct:g}" if image.fit == "crop" else image.fit
