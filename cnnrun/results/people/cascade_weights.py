"""A face finder file: the weights of the MTCNN cascade's three networks, as safetensors.

`scripts/get_data face-models` writes one. The names of its tensors are those of the zoo's networks `mtcnn_pnet`,
`mtcnn_rnet` and `mtcnn_onet`, each after the network's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from cnnrun.base.atomic_files import make_folder, write_file
from cnnrun.base.errors import CheckpointError, ConfigError, escape
from cnnrun.experiment.zoo_weights import FACE_MODELS
from cnnrun.model.builder import Builder
from cnnrun.model.inference_layers import replace_slow_layers
from cnnrun.model.receptive_field import LayerOutput
from cnnrun.model.tensor_matching import TensorMismatchError, match_by_name
from cnnrun.model.weights_file import file_digest, parse_description, read_weights_file
from cnnrun.results.people.face_finder import CascadeNetworks, FaceFinder

_FILE_NAME = "face-finder.safetensors"
_FACE, _BOX, _LANDMARKS = "face", "box", "landmarks"
# Each network of the cascade, with the side of its input in pixels and the layers whose outputs it gives.
NETWORKS: Mapping[str, tuple[int, Sequence[str]]] = {
    "mtcnn_pnet": (12, (_FACE, _BOX)),
    "mtcnn_rnet": (24, (_FACE, _BOX)),
    "mtcnn_onet": (48, (_FACE, _BOX, _LANDMARKS)),
}


def build_cascade_network(name: str) -> nn.Module:
    """Build a network of the cascade, without weights, on the meta device: normalized pixels -> its outputs."""
    side, outputs = NETWORKS[name]
    description = parse_description(
        f"task: classify\nmodel: {{zoo: {name}, until: {outputs[-1]}}}\nimage: {{size: {side}, channels: 3}}\n", name
    )
    with torch.device("meta"):
        layers, _ = Builder().build_body(description.model.layers, LayerOutput((3, side, side)), outputs)
    return layers.eval()


def write_finder_file(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], origin: Mapping[str, str]) -> None:
    """Write the tensors of each network, with `origin` (source, licence, version) as metadata. Raises StorageError."""
    named = {f"{network}.{name}": value for network, state in tensors.items() for name, value in state.items()}
    make_folder(path.parent)
    write_file(path, safetensors.torch.save({name: value.contiguous() for name, value in named.items()}, {**origin}))


def find_finder_file(path: Path | None, run: Path | None) -> Path:
    """Find the face finder's file: `path`, or beside `run` if that is a weights file, or in data/face-models.

    Raises ConfigError if there is none.
    """
    folders = [run.parent] if run and run.suffix == ".safetensors" else []
    candidates = [path] if path else [folder / _FILE_NAME for folder in (*folders, FACE_MODELS)]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        places = " or ".join(escape(str(candidate)) for candidate in candidates)
        raise ConfigError(f"no face finder at {places}; `scripts/get_data face-models` fetches one, or give --finder")
    return found


def read_finder_file(path: Path, device: torch.device) -> FaceFinder:
    """Read a face finder from a file. Raises CheckpointError if the file is not a valid one."""
    networks = read_cascade_networks(path)
    for network in networks.values():
        replace_slow_layers(network.to(device).to(memory_format=torch.channels_last))
    return FaceFinder(CascadeNetworks(*networks.values()), file_digest(path), device)


def read_cascade_networks(path: Path) -> dict[str, nn.Module]:
    """Read the networks of a face finder, by name, on the CPU. Raises CheckpointError if the file is no valid one."""
    weights = read_weights_file(path)
    networks = {}
    for name in NETWORKS:
        network, prefix = build_cascade_network(name), f"{name}."
        state = {key.removeprefix(prefix): value for key, value in weights.tensors.items() if key.startswith(prefix)}
        try:
            match_by_name(network.state_dict(), state)
        except TensorMismatchError:
            line = f"{escape(str(path))}: not a face finder (`scripts/get_data face-models` writes one)"
            raise CheckpointError(line) from None
        network.to_empty(device="cpu").load_state_dict(state)
        networks[name] = network
    return networks
