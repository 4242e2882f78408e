"""Convert another program's state dict to a weights file with a description: `cnnrun import`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from cnnrun.base.bounded_files import read_text
from cnnrun.base.counts import format_count
from cnnrun.base.errors import CheckpointError, ConfigError, escape
from cnnrun.config import zoo
from cnnrun.contracts.facts import DataFacts
from cnnrun.experiment.config_file import read_config
from cnnrun.experiment.weights_source import read_weights
from cnnrun.model import tensor_matching, weights_file
from cnnrun.model.builder import BuildError
from cnnrun.model.network import build_network
from cnnrun.model.tensor_matching import MatchRule, StateDict
from cnnrun.model.weights_file import WeightsDescription

# Mean and deviation of torchvision's weights, in pixel values 0..255. Those of two networks come from TensorFlow, and
# torchvision computes its own preprocessing back to theirs (`transform_input`).
_IMAGENET = "mean: [123.675, 116.28, 103.53], std: [58.395, 57.12, 57.375]"
_TENSORFLOW = "mean: [127.5, 127.5, 127.5], std: [127.5, 127.5, 127.5]"
_FROM_TENSORFLOW = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class ConvertedWeights:
    """A state dict under the network's names, with the description and the facts that a weights file needs."""

    tensors: StateDict
    description: WeightsDescription
    facts: DataFacts
    parameters: int


def import_weights(
    path: Path, like: str, match_rule: MatchRule, classes: str | None, drop: Sequence[str], out: Path | None
) -> dict[str, Any]:
    """Convert a state dict and write the weights file. Returns its path and its contents.

    Raises CheckpointError, ConfigError or StorageError.
    """
    out_path = out or Path(f"{Path(like).stem}.safetensors")
    if out_path.suffix != ".safetensors":
        raise ConfigError(f"--out {out_path}: give a file that ends in .safetensors")
    converted = convert_weights(path, like, match_rule, classes, drop)
    weights_file.write_weights_file(out_path, converted.tensors, converted.description, converted.facts)
    return {
        "path": str(out_path),
        "tensors": len(converted.tensors),
        "parameters": converted.parameters,
        "classes": list(converted.facts.classes),
    }


def convert_weights(
    path: Path, like: str, match_rule: MatchRule, classes: str | None, drop: Sequence[str], crop_pct: float = 0.875
) -> ConvertedWeights:
    """Convert the state dict in `path` to weights of the network `like`, the name of a zoo network or a config.

    Tensors that match a pattern in `drop` are left out. `crop_pct` is the part of each side that a zoo network was
    measured on. Raises CheckpointError or ConfigError.
    """
    description = _describe(like, crop_pct)
    weights = read_weights(path)
    if match_rule == "order" and weights.match_rule == "name":
        raise ConfigError(f"{path}: a safetensors file keeps no order of tensors; use --match name")
    tensors = {name: value for name, value in weights.tensors.items() if not name.startswith("normalize.")}
    if unused := [pattern for pattern in drop if not any(fnmatchcase(name, pattern) for name in tensors)]:
        raise ConfigError(f"--drop {unused[0]}: no tensor of {path} has such a name")
    tensors = {
        name: value for name, value in tensors.items() if not any(fnmatchcase(name, pattern) for pattern in drop)
    }
    facts = _build_facts(description, _class_names(classes, tensors))
    try:
        built_network = build_network(description.model.layers, description.task.bind(facts))
    except BuildError as error:
        raise ConfigError(*(f"--like {like}: {problem.message}" for problem in error.problems)) from None
    state = built_network.network.state_dict()
    expected = {name: value for name, value in state.items() if not name.startswith("normalize.")}
    try:
        matches = tensor_matching.match_tensors(expected, tensors, match_rule, use_all=True)
    except tensor_matching.TensorMismatchError as error:
        raise CheckpointError(*error.message_lines(f"{path}: not weights of {like} by {match_rule}")) from None
    converted = {
        name: tensors[matches[name]] if name in matches else torch.zeros_like(value, device="cpu")
        for name, value in expected.items()
    }
    converted["normalize.mean"] = torch.tensor(facts.mean).view(-1, 1, 1)
    converted["normalize.std"] = torch.tensor(facts.std).view(-1, 1, 1)
    return ConvertedWeights(converted, description, facts, built_network.parameter_count)


def _describe(like: str, crop_pct: float) -> WeightsDescription:
    """The description of weights of a config's network, or of torchvision's weights of a zoo network."""
    if like.endswith((".yaml", ".yml")):
        experiment = read_config(Path(like))
        shape, image = experiment.data.image_shape(), experiment.data.image
        if shape is None or image.mean is None or image.std is None:
            raise ConfigError(f"{like}: data.image must give the mean and std that the weights were trained with")
        image = image.model_copy(update={"size": shape[1:], "channels": shape[0]})
        return WeightsDescription(
            task=experiment.task,
            image=image,
            model=experiment.model.model_copy(update={"weights": None, "until": None}),
        )
    entry = zoo.read_entry(like)
    if entry.classes != 1000:
        problem = "the image size, mean and std of its weights are unknown"
        raise ConfigError(f"--like {like}: {problem}; give a config with data.image")
    channels, height, width = entry.image
    image_section = (
        f"{{size: [{height}, {width}], channels: {channels}, {_preprocessing(like)}, fit: crop, crop_pct: {crop_pct}}}"
    )
    return weights_file.parse_description(f"task: classify\nmodel: {like}\nimage: {image_section}\n", like)


def _preprocessing(network: str) -> str:
    return _TENSORFLOW if network in _FROM_TENSORFLOW else _IMAGENET


def _class_names(classes: str | None, tensors: StateDict) -> tuple[str, ...]:
    """The class names in the file `classes`, ImageNet's for `imagenet`, or 0, 1, 2 ... for None.

    Their count must be the length of the head's bias, or else of the last vector. Raises ConfigError.
    """
    lengths = {name: len(value) for name, value in tensors.items() if value.dim() == 1}
    last_length = next(reversed(lengths.values()), 0)
    count = lengths.get("head.bias", lengths.get("head.conv.bias", last_length))
    if classes is None:
        return tuple(map(str, range(count)))
    names = _imagenet_classes() if classes == "imagenet" else _read_classes(Path(classes))
    if len(names) != count:
        raise ConfigError(
            f"--classes {classes}: {format_count(len(names), 'name')} for {format_count(count, 'class', 'classes')}"
        )
    return tuple(names)


def _read_classes(path: Path) -> list[str]:
    try:
        names = read_text(path, ConfigError).splitlines()
    except ConfigError as error:
        raise ConfigError(f"--classes {error}; give a file or `imagenet`") from None
    if "" in names:
        raise ConfigError(f"--classes {path}: line {names.index('') + 1} is empty; give one class name per line")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"--classes {path}: {escape(repeated[0])} is listed twice")
    return names


def _imagenet_classes() -> list[str]:
    """The names of ImageNet's 1,000 classes, as torchvision has them."""
    from torchvision.models import MobileNet_V2_Weights

    return list(MobileNet_V2_Weights.DEFAULT.meta["categories"])


def _build_facts(description: WeightsDescription, classes: tuple[str, ...]) -> DataFacts:
    image = description.image
    size, channels = image.size or (0, 0), image.channels or 0  # _describe always sets them
    return DataFacts(classes, (channels, *size), tuple(image.mean or ()), tuple(image.std or ()))
