"""Export of the face finder's networks as ONNX, each compared with the original on parts of photos."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cnnrun.base.atomic_files import make_folder, write_file
from cnnrun.base.errors import DataError, ParityError, escape
from cnnrun.data.image_paths import list_images
from cnnrun.data.image_settings import ImageSettings
from cnnrun.export.onnx import Onnx
from cnnrun.results.people.cascade_weights import NETWORKS, find_finder_file, read_cascade_networks
from cnnrun.results.people.face_photos import read_photo

_MAX_PHOTOS, _CROPS_PER_PHOTO, _MIN_SIDE_PX = 16, 8, 48
_TOLERANCE = 1e-4  # of scores, and of offsets as fractions of a box


class PixelNetwork(nn.Module):
    """Pixels, uint8 [B, H, W, 3] -> the outputs of a network of the cascade."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.network((pixels.permute(0, 3, 1, 2).float() - 127.5) / 128)
        return outputs


def write_finder_networks(finder: Path | None, paths: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write the three networks into a folder; returns their paths and how they compare with the originals.

    The input of the first has any size. Raises ParityError, and writes nothing, if the results of one differ.
    """
    path = find_finder_file(finder, None)
    files_of_photos = itertools.islice(list_images(paths), _MAX_PHOTOS)
    photos = [torch.from_numpy(np.array(read_photo(file, ImageSettings()), np.uint8)) for file in files_of_photos]
    photos = [photo for photo in photos if min(photo.shape[:2]) >= _MIN_SIDE_PX]
    if not photos:
        raise DataError(f"no photo of {_MIN_SIDE_PX} pixels a side or more to compare the networks on")
    files, records = dict[str, bytes](), []
    for name, network in read_cascade_networks(path).items():
        files[name], record = _export(name, PixelNetwork(network).eval(), _inputs(name, photos))
        records.append({"path": str(out / f"{name}.onnx"), **record})
    make_folder(out)
    for name, data in files.items():
        write_file(out / f"{name}.onnx", data)
    return {"finder": str(path), "networks": records}


def _inputs(name: str, photos: Sequence[Tensor]) -> list[Tensor]:
    """Batches of random crops of the photos; for the first network whole photos, which are made smaller, as well."""
    side, generator = NETWORKS[name][0], torch.Generator().manual_seed(0)
    inputs = []
    for photo in photos:
        height, width = (size - side + 1 for size in photo.shape[:2])
        tops = torch.randint(height, (_CROPS_PER_PHOTO,), generator=generator).tolist()
        lefts = torch.randint(width, (_CROPS_PER_PHOTO,), generator=generator).tolist()
        crops = [photo[top : top + side, left : left + side] for top, left in zip(tops, lefts, strict=True)]
        inputs.append(torch.stack(crops))
        if name == "mtcnn_pnet":
            inputs.append(photo[None, :: 1 + height // 200, :: 1 + width // 200])
    return inputs


def _export(name: str, module: PixelNetwork, inputs: Sequence[Tensor]) -> tuple[bytes, Mapping[str, Any]]:
    """The ONNX file of a network, and the record of its comparison. Raises ParityError."""
    side, outputs = NETWORKS[name]
    metadata = {"network": name, "input": f"uint8 [batch, {side}, {side}, 3], RGB"}
    if name == "mtcnn_pnet":
        metadata["input"] = "uint8 [batch, height, width, 3], RGB"
    with TemporaryDirectory(prefix="cnnrun-export-") as folder, torch.inference_mode():
        path = Path(folder) / f"{name}.onnx"
        is_convolutional = name == "mtcnn_pnet"
        height, width = (2 * side, 3 * side) if is_convolutional else (side, side)
        example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
        Onnx().write(module, example, list(outputs), metadata, path, has_any_size=is_convolutional)
        artefact = Onnx().reload(path)
        differences = [
            np.abs(expected.numpy() - actual).max()
            for pixels in inputs
            for expected, actual in zip(module(pixels), artefact(pixels.numpy()), strict=True)
        ]
        data = path.read_bytes()
    largest = float(np.max(differences))  # not a number if one of them is
    if not largest <= _TOLERANCE:
        raise ParityError(f"{escape(name)}: its results differ from the network's by {largest:.2e}")
    return data, {"inputs_compared": sum(map(len, inputs)), "largest_difference": largest}
