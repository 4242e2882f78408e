"""Convert published face models to files of cnnrun: `scripts/get_data face-models` calls this.

python scripts/face_models.py finder FOLDER OUT      # FOLDER holds pnet.pt, rnet.pt and onet.pt of facenet-pytorch
python scripts/face_models.py embedder FOLDER OUT    # FOLDER holds face_recognition_model.bin and its manifest
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnnrun.contracts.facts import DataFacts
from cnnrun.model.network import build_network
from cnnrun.model.tensor_matching import match_in_order
from cnnrun.model.untrusted_pickle import read_state_dict
from cnnrun.model.weights_file import parse_description, write_weights_file
from cnnrun.results.people.cascade_weights import NETWORKS, build_cascade_network, write_finder_file

FINDER_ORIGIN = {
    "source": "facenet-pytorch 2.6.0 (Tim Esler), after David Sandberg's conversion of the authors' networks",
    "paper": "Zhang, Zhang, Li and Qiao 2016, arXiv:1604.02878",
    "licence": "MIT",
}
EMBEDDER_ORIGIN = {
    "source": "@vladmandic/face-api 1.7.15, of dlib_face_recognition_resnet_model_v1 (Davis King 2017)",
    "licence": "CC0 (weights), MIT (their conversion to eight bits)",
}
# Pixels are taken less these means, over 256. The eyes of an aligned face are those of dlib's own alignment.
EMBEDDER = """
task:
  verify:
    dimension: 128
    similarity: euclidean
    loss: {triplet: {}}
    mirror: true
    threshold: 0.6
    landmarks: {left_eye: [47.7, 47.1], right_eye: [100.3, 47.1]}
model: face_resnet29
image: {size: 150, channels: 3, mean: [122.782, 117.001, 104.298], std: [256, 256, 256]}
"""


def convert_finder(folder: Path, out: Path) -> None:
    """Write the cascade's three state dicts as one face finder file."""
    tensors = {}
    for name in NETWORKS:
        state = read_state_dict(folder / f"{name.removeprefix('mtcnn_')}.pt")
        matches = match_in_order(build_cascade_network(name).state_dict(), state)
        tensors[name] = {ours: state[theirs] for ours, theirs in matches.items()}
    write_finder_file(out, tensors, FINDER_ORIGIN)


def read_quantized(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of TensorFlow.js's format: eight bits a number with a scale and a minimum, or float32."""
    manifest = json.loads((folder / "face_recognition_model-weights_manifest.json").read_text())
    data, offset, tensors = (folder / "face_recognition_model.bin").read_bytes(), 0, {}
    for entry in manifest[0]["weights"]:
        count, quantization = int(np.prod(entry["shape"])), entry.get("quantization")
        stored = np.frombuffer(data, np.uint8 if quantization else np.dtype("<f4"), count, offset)
        offset += stored.nbytes
        values = stored.astype(np.float64)
        if quantization:
            values = values * quantization["scale"] + quantization["min"]
        tensors[entry["name"]] = torch.from_numpy(values.reshape(entry["shape"]))
    if offset != len(data):
        raise SystemExit(f"face_models: {folder}: {len(data):,} bytes of weights, the manifest describes {offset:,}")
    return tensors


def fold_scales(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The convolutions in order, each with the scale and the offset per channel that follow it, and the head."""
    folded = {}
    for prefix in (name.removesuffix("/conv/filters") for name in tensors if name.endswith("/conv/filters")):
        scale, offset = tensors[f"{prefix}/scale/weights"], tensors[f"{prefix}/scale/biases"]
        filters_OIHW = tensors[f"{prefix}/conv/filters"].permute(3, 2, 0, 1)
        folded[f"{prefix}.weight"] = (filters_OIHW * scale[:, None, None, None]).float().contiguous()
        folded[f"{prefix}.bias"] = (tensors[f"{prefix}/conv/bias"] * scale + offset).float()
    return folded | {"head.linear.weight": tensors["fc"].T.float().contiguous()}


def convert_embedder(folder: Path, out: Path) -> None:
    """Write dlib's face network as a weights file of the task `verify`."""
    description = parse_description(EMBEDDER, str(out))
    mean, std = description.image.mean or [], description.image.std or []
    facts = DataFacts(("nobody",), (3, 150, 150), tuple(mean), tuple(std))
    network = build_network(description.model.layers, description.task.bind(facts)).network
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("normalize.")}
    folded = fold_scales(read_quantized(folder))
    tensors = {ours: folded[theirs] for ours, theirs in match_in_order(state, folded).items()}
    tensors |= {"normalize.mean": torch.tensor(mean).view(-1, 1, 1), "normalize.std": torch.tensor(std).view(-1, 1, 1)}
    write_weights_file(out, tensors, description, facts, EMBEDDER_ORIGIN)


if __name__ == "__main__":
    what, source, target = sys.argv[1:]
    {"finder": convert_finder, "embedder": convert_embedder}[what](Path(source), Path(target))
