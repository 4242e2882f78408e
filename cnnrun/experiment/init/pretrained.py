"""Published weights that `init` can start from: those in the user's cache, or a file that the user names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cnnrun.base.errors import ConfigError, escape
from cnnrun.experiment.zoo_weights import FACE_MODELS, weights_path

# Networks whose weights are looked for, the quickest first: that with the fewest multiply-adds for its accuracy.
_NETWORKS = ("mobilenet_v2", "resnet18", "mobilenet_v3_large", "efficientnet_b0", "resnet50", "convnext_tiny")
_LAST_LAYERS = {
    "mobilenet_v2": "last",
    "mobilenet_v3_large": "last",
    "efficientnet_b0": "last",
    "resnet18": "stage4",
    "resnet50": "stage4",
    "convnext_tiny": "stage4c",
    "face_resnet29": "stage4_4",
}
_FACE_NETWORK = "face_resnet29"
_LEVELS = {
    "mobilenet_v2": ("stage1", "stage2", "stage3", "stage5"),
    "resnet18": ("stem", "stage1", "stage2", "stage3"),
    "resnet50": ("stem", "stage1", "stage2", "stage3"),
}
SUGGESTED = "mobilenet_v2"


@dataclass(frozen=True)
class Pretrained:
    """A zoo network with published weights: its name and their file."""

    network: str
    path: Path

    @property
    def embeds_faces(self) -> bool:
        """True if the network was trained to tell aligned faces apart, else it was trained to classify photos."""
        return self.network == _FACE_NETWORK

    @property
    def last_layer(self) -> str:
        """The last layer before the pooling."""
        return _LAST_LAYERS[self.network]

    @property
    def levels(self) -> tuple[str, str, str, str] | None:
        """The layers with a half, a quarter, an eighth and a sixteenth of the image's side; None if unknown."""
        return _LEVELS.get(self.network)


def find_pretrained(file: Path | None, for_faces: bool = False) -> Pretrained | None:
    """The weights in `file`, else the first known ones in their usual places; None without any. Raises ConfigError.

    `for_faces` says that the images are aligned faces, whose network is another.
    """
    if file is not None:
        if file.stem not in (*_NETWORKS, _FACE_NETWORK) or file.suffix != ".safetensors" or not file.is_file():
            known = ", ".join(f"{name}.safetensors" for name in _NETWORKS)
            raise ConfigError(
                f"--weights {escape(str(file))}: give a file named {known}, as `cnnrun zoo weights` writes, "
                f"or {_FACE_NETWORK}.safetensors for faces"
            )
        return Pretrained(file.stem, file)
    networks = [_FACE_NETWORK] if for_faces else _NETWORKS
    places = [(network, path) for network in networks for path in (weights_path(network), _face_path(network)) if path]
    return next((Pretrained(network, path) for network, path in places if path.is_file()), None)


def _face_path(network: str) -> Path | None:
    return FACE_MODELS / f"{network}.safetensors" if network == _FACE_NETWORK else None
