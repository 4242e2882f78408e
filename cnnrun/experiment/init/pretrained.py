"""Published weights that `init` can start from: those in the user's cache, or a file that the user names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cnnrun.base.errors import ConfigError, escape
from cnnrun.experiment.zoo_weights import weights_path

# Networks whose weights are looked for, the quickest first: that with the fewest multiply-adds for its accuracy.
_NETWORKS = ("mobilenet_v2", "resnet18", "mobilenet_v3_large", "efficientnet_b0", "resnet50", "convnext_tiny")
_LAST_LAYERS = {
    "mobilenet_v2": "last",
    "mobilenet_v3_large": "last",
    "efficientnet_b0": "last",
    "resnet18": "stage4",
    "resnet50": "stage4",
    "convnext_tiny": "stage4c",
}
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
    def last_layer(self) -> str:
        """The last layer before the pooling."""
        return _LAST_LAYERS[self.network]

    @property
    def levels(self) -> tuple[str, str, str, str] | None:
        """The layers with a half, a quarter, an eighth and a sixteenth of the image's side; None if unknown."""
        return _LEVELS.get(self.network)


def find_pretrained(file: Path | None) -> Pretrained | None:
    """The weights in `file`, else the first known ones in the cache; None without any. Raises ConfigError."""
    if file is not None:
        if file.stem not in _LAST_LAYERS or file.suffix != ".safetensors" or not file.is_file():
            known = ", ".join(f"{name}.safetensors" for name in _NETWORKS)
            raise ConfigError(
                f"--weights {escape(str(file))}: give a file named {known}, as `cnnrun zoo weights` writes"
            )
        return Pretrained(file.stem, file)
    for network in _NETWORKS:
        path = weights_path(network)
        if path is not None and path.is_file():
            return Pretrained(network, path)
    return None
