"""Weights files: reading and writing them, and loading their tensors into a network.

A weights file is a safetensors file. Its metadata holds a `WeightsDescription` and the data facts, so `cnnrun predict`
needs no other file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError

from cnnrun.base.atomic_files import make_folder, write_file
from cnnrun.base.bounded_files import open_file
from cnnrun.base.errors import CheckpointError, UserError
from cnnrun.config import yaml_reader, zoo
from cnnrun.config.spec import Kinds, Spec
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.stored_facts import parse_stored_facts
from cnnrun.contracts.task import Task
from cnnrun.data.image_settings import ImageSettings
from cnnrun.model import untrusted_pickle
from cnnrun.model.network import Network
from cnnrun.model.structures import Model
from cnnrun.model.tensor_matching import MatchRule, StateDict, is_batch_norm_counter, match_tensors
from cnnrun.tasks import TaskUnion


class WeightsDescription(Spec):
    """Description in a weights file: the parts of a config that are needed to use the network."""

    task: Annotated[TaskUnion, Kinds()]
    image: ImageSettings
    model: Model


@dataclass(frozen=True)
class Weights:
    """Tensors by name in the file's order; `match_rule` says whether they are matched by name or by order."""

    tensors: StateDict
    match_rule: MatchRule
    description: WeightsDescription | None = None
    facts: DataFacts | None = None
    digest: str = ""
    """SHA-256 of the file, or of the checkpoint's manifest."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """What the file's metadata says of where the weights come from, such as source and licence."""


def read_weights_file(path: Path) -> Weights:
    """Read a safetensors file, or a PyTorch state dict through the guarded reader. Raises CheckpointError."""
    if path.name.endswith((".pth", ".pt", ".bin", ".pth.tar")):
        return Weights(untrusted_pickle.read_state_dict(path), "order", digest=file_digest(path))
    try:
        with safetensors.safe_open(path, "pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise CheckpointError(f"{path}: not a safetensors file, a .pth file or a run ({reason})") from None
    for name, value in tensors.items():
        if not (value.is_floating_point() or is_batch_norm_counter(name)) or not value.float().isfinite().all():
            raise CheckpointError(f"{path}: {name} is not made of finite real numbers")
    origin = {key: value for key, value in metadata.items() if not key.startswith("cnnrun.")}
    return Weights(tensors, "name", *_read_metadata(path, metadata), file_digest(path), origin)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises CheckpointError."""
    with open_file(path, CheckpointError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_description(text: str, where: str) -> WeightsDescription:
    """Parse the description in `text` and expand a zoo network. `where` names it in messages. Raises ValueError."""
    tree, problems = yaml_reader.parse_yaml(text, where)
    if problems := problems + zoo.expand_model(tree, ()):
        raise ValueError(str(problems[0]))
    return WeightsDescription.model_validate(tree)


def write_weights_file(
    path: Path,
    tensors: StateDict,
    description: WeightsDescription,
    facts: DataFacts,
    origin: Mapping[str, str] | None = None,
) -> None:
    """Write a weights file with its metadata, completely or not at all. Raises StorageError.

    `origin` adds to the metadata where the weights come from: source, licence, paper.
    """
    config = yaml_reader.dump_yaml(description.model_dump(mode="json", by_alias=True, exclude_none=True))
    metadata = {"cnnrun.config": config, "cnnrun.facts": json.dumps(facts.to_json()), **(origin or {})}
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    make_folder(path.parent)
    write_file(path, safetensors.torch.save(contiguous, metadata))


def match_weights(network: Network, weights: Weights, until: str | None, task: Task) -> dict[str, str]:
    """Match the network's layers up to `until` (all layers without it) to tensors of the weights.

    Without `until`, the head is matched too if the weights were trained for the same task on the same classes or
    numbers. Returns the weights' tensor name for each tensor name of the network. Raises TensorMismatchError.
    """
    has_head = until is None and _has_same_targets(weights, task)
    prefixes = ("layers.", "head.") if has_head else ("layers.",)
    state = {name: value for name, value in network.state_dict().items() if name.startswith(prefixes)}
    state = {name: value for name, value in state.items() if _is_within(network, name, until)}
    return match_tensors(state, weights.tensors, weights.match_rule, use_all=False)


def load_weights(network: Network, weights: Weights, matches: dict[str, str]) -> list[str]:
    """Copy the matched tensors into the network. Returns the names of those that keep their random weights."""
    state = network.state_dict()
    with torch.no_grad():
        for name, source_name in matches.items():
            state[name].copy_(weights.tensors[source_name])
    return [
        name
        for name in state
        if name not in matches and not name.startswith("normalize.") and not is_batch_norm_counter(name)
    ]


def _has_same_targets(weights: Weights, task: Task) -> bool:
    """Return whether the weights were trained for this task on these classes or numbers.

    The task of a checkpoint outside of its run is not known; then the data alone decide.
    """
    if weights.facts is None or weights.facts.classes != task.facts.classes:
        return False
    spec = weights.description.task if weights.description else task.spec
    return spec.bind(weights.facts).is_comparable_with(task)


def _is_within(network: Network, name: str, until: str | None) -> bool:
    """Tell whether a tensor belongs to the head or to the layers up to `until`."""
    keys = [key for key, _ in network.layers.named_children()]
    return until is None or name.startswith("head.") or keys.index(name.split(".")[1]) <= keys.index(until)


def _read_metadata(path: Path, metadata: dict[str, str]) -> tuple[WeightsDescription | None, DataFacts | None]:
    if "cnnrun.config" not in metadata:
        return None, None
    try:
        description = parse_description(metadata["cnnrun.config"], str(path))
        facts = parse_stored_facts(json.loads(metadata["cnnrun.facts"]))[0]
        channels, *size = facts.image_shape
        measured = ImageSettings(size=(size[0], size[1]), channels=channels, mean=list(facts.mean), std=list(facts.std))
        image = description.image
        if image.size not in (None, measured.size) or image.channels not in (None, measured.channels):
            raise ValueError("two image sizes")
        return description, facts
    except (UserError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise CheckpointError(f"{path}: its description is damaged or of another version of cnnrun") from None
