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
from cnnrun.base.errors import CheckpointError, escape
from cnnrun.model.builder import Builder
from cnnrun.model.receptive_field import LayerOutput
from cnnrun.model.sliced_pooling import replace_max_pools
from cnnrun.model.tensor_matching import TensorMismatchError, match_by_name
from cnnrun.model.weights_file import parse_description, read_weights_file
from cnnrun.results.people.face_finder import CascadeNetworks, FaceFinder

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


def read_finder_file(path: Path, device: torch.device) -> FaceFinder:
    """Read a face finder from a file. Raises CheckpointError if the file is not a valid one."""
    weights = read_weights_file(path)
    networks = []
    for name in NETWORKS:
        network, prefix = build_cascade_network(name), f"{name}."
        state = {key.removeprefix(prefix): value for key, value in weights.tensors.items() if key.startswith(prefix)}
        try:
            match_by_name(network.state_dict(), state)
        except TensorMismatchError:
            line = f"{escape(str(path))}: not a face finder (`scripts/get_data face-models` writes one)"
            raise CheckpointError(line) from None
        network.to_empty(device=device).load_state_dict(state)
        replace_max_pools(network)
        networks.append(network.to(memory_format=torch.channels_last))
    return FaceFinder(CascadeNetworks(*networks), weights.digest, device)
