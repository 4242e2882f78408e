"""`cnnrun import`: another program's state dict as a weights file that says what it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from cnnrun.base.bounded_files import read_text
from cnnrun.base.errors import CheckpointError, ConfigError
from cnnrun.config import zoo
from cnnrun.contracts.facts import Facts
from cnnrun.experiment.config_file import read_config
from cnnrun.experiment.weights_source import read_weights
from cnnrun.model import tensor_matching, weights_file
from cnnrun.model.builder import BuildError
from cnnrun.model.network import build_network
from cnnrun.model.tensor_matching import MatchRule, StateDict
from cnnrun.model.weights_file import WeightsDescription

# What torchvision's weights were trained and are measured with, in pixel values 0..255.
_IMAGENET = "mean: [123.675, 116.28, 103.53], std: [58.395, 57.12, 57.375], fit: crop, crop_pct: 0.875"


@dataclass(frozen=True)
class Converted:
    """A state dict under the network's names, with what using it needs."""

    tensors: StateDict
    about: WeightsDescription
    facts: Facts
    parameters: int


def import_weights(
    path: Path, like: str, how: MatchRule, classes: str | None, drop: Sequence[str], out: Path | None
) -> dict[str, Any]:
    """Turn a foreign state dict into a weights file; returns what it holds."""
    target = out or Path(f"{Path(like).stem}.safetensors")
    if target.suffix != ".safetensors":
        raise ConfigError(f"--out {target}: a weights file ends in .safetensors")
    converted = convert_weights(path, like, how, classes, drop)
    weights_file.write_weights(target, converted.tensors, converted.about, converted.facts)
    return {
        "path": str(target),
        "tensors": len(converted.tensors),
        "parameters": converted.parameters,
        "classes": list(converted.facts.classes),
    }


def convert_weights(path: Path, like: str, how: MatchRule, classes: str | None, drop: Sequence[str]) -> Converted:
    """The state dict in `path` as the weights of a zoo network or a config's. Raises CheckpointError, ConfigError."""
    described = _described(like)
    read = read_weights(path)
    if how == "order" and read.match_rule == "name":
        raise ConfigError(f"{path}: safetensors keep no order; --match name pairs them by their names")
    given = {name: value for name, value in read.tensors.items() if not name.startswith("normalize.")}
    if idle := [pattern for pattern in drop if not any(fnmatchcase(name, pattern) for name in given)]:
        raise ConfigError(f"--drop {idle[0]}: no tensor of {path} is so named")
    kept = {name: value for name, value in given.items() if not any(fnmatchcase(name, pattern) for pattern in drop)}
    facts = _facts(described, _classes(classes, kept))
    try:
        built = build_network(described.model.layers, described.task, facts)
    except BuildError as error:
        raise ConfigError(*(f"--like {like}: {problem.message}" for problem in error.problems)) from None
    state = built.network.state_dict()
    ours = {name: value for name, value in state.items() if not name.startswith("normalize.")}
    try:
        found = tensor_matching.match_tensors(ours, kept, how, use_all=True)
    except tensor_matching.TensorMismatchError as misfit:
        raise CheckpointError(*misfit.table(f"{path}: not weights of {like} by {how}")) from None
    tensors = {
        name: kept[found[name]] if name in found else torch.zeros_like(value, device="cpu")
        for name, value in ours.items()
    }
    tensors["normalize.mean"] = torch.tensor(facts.mean).view(-1, 1, 1)
    tensors["normalize.std"] = torch.tensor(facts.std).view(-1, 1, 1)
    return Converted(tensors, described, facts, built.parameter_count)


def _described(like: str) -> WeightsDescription:
    """What the weights are for: a config says it outright; of a zoo network it is known how torchvision's were made."""
    if like.endswith((".yaml", ".yml")):
        experiment = read_config(Path(like))
        shape, image = experiment.data.image_shape(), experiment.data.image
        if shape is None or image.mean is None or image.std is None:
            raise ConfigError(f"{like}: data.image must give mean and std: those that the weights were trained with")
        whole = image.model_copy(update={"size": shape[1:], "channels": shape[0]})
        return WeightsDescription(
            task=experiment.task,
            image=whole,
            model=experiment.model.model_copy(update={"weights": None, "until": None}),
        )
    entry = zoo.read_entry(like)
    if entry.classes != 1000:
        raise ConfigError(f"--like {like}: give a config, whose data.image says how the pictures were prepared")
    channels, height, width = entry.image
    pictures = f"{{size: [{height}, {width}], channels: {channels}, {_IMAGENET}}}"
    return weights_file.parse_description(f"task: classify\nmodel: {like}\nimage: {pictures}\n", like)


def _classes(given: str | None, tensors: StateDict) -> tuple[str, ...]:
    """Class names: a file with one a line, `imagenet`, or numbers; as many as our head's bias, or the last one, has."""
    lengths = {name: len(value) for name, value in tensors.items() if value.dim() == 1}
    last = next(reversed(lengths.values()), 0)
    count = lengths.get("head.bias", lengths.get("head.conv.bias", last))
    if given is None:
        return tuple(map(str, range(count)))
    names = _imagenet() if given == "imagenet" else _lines(Path(given))
    if len(names) != count:
        raise ConfigError(f"--classes {given}: {len(names)} names for {count} classes")
    return tuple(names)


def _lines(path: Path) -> list[str]:
    try:
        names = read_text(path, ConfigError).splitlines()
    except ConfigError as error:
        raise ConfigError(f"--classes {error}; give a file or `imagenet`") from None
    if len(set(names)) < len(names) or "" in names:
        raise ConfigError(f"--classes {path}: a name is empty or stands twice")
    return names


def _imagenet() -> list[str]:
    """ImageNet's thousand classes in torchvision's words."""
    from torchvision.models import MobileNet_V2_Weights

    return list(MobileNet_V2_Weights.DEFAULT.meta["categories"])


def _facts(about: WeightsDescription, classes: tuple[str, ...]) -> Facts:
    image = about.image
    size, channels = image.size or (0, 0), image.channels or 0  # _described gives them all
    return Facts(classes, (channels, *size), tuple(image.mean or ()), tuple(image.std or ()))
