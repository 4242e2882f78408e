"""Weights from elsewhere: from a file or a run into a network, by name or by order, all or none.

A weights file is safetensors. Its metadata (`WeightsDescription`) says what it is for: `cnnrun predict` needs nothing
else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import safetensors
import safetensors.torch
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError

from cnnrun.base.atomic_files import make_folder, write_file
from cnnrun.base.bounded_files import open_file
from cnnrun.base.errors import CheckpointError, UserError
from cnnrun.config import yaml_reader, zoo
from cnnrun.config.spec import Kinds, Spec
from cnnrun.contracts.facts import Facts
from cnnrun.data.image_files import ImageSettings
from cnnrun.model import untrusted_pickle
from cnnrun.model.network import Network
from cnnrun.model.structures import Model
from cnnrun.model.tensor_matching import MatchRule, StateDict, is_batch_norm_counter, match_tensors
from cnnrun.tasks import Task


class WeightsDescription(Spec):
    """What a weights file is for: the parts of a config that using the network needs."""

    task: Annotated[Task, Kinds()]
    image: ImageSettings
    model: Model


@dataclass(frozen=True)
class Weights:
    """Tensors by name in the file's order; `how` their names or their order tell whose they are."""

    tensors: StateDict
    match_rule: MatchRule
    description: WeightsDescription | None = None
    facts: Facts | None = None
    digest: str = ""
    """SHA-256 of the file, or of the checkpoint's manifest."""


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
    return Weights(tensors, "name", *_described(path, metadata), file_digest(path))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises CheckpointError."""
    with open_file(path, CheckpointError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_description(text: str, where: str) -> WeightsDescription:
    """The description written in `text`, a zoo network put in. Raises ValueError."""
    tree, problems = yaml_reader.parse_yaml(text, where)
    if problems := problems + zoo.expand_model(tree, ()):
        raise ValueError(str(problems[0]))
    return WeightsDescription.model_validate(tree)


def write_weights(path: Path, tensors: StateDict, about: WeightsDescription, facts: Facts) -> None:
    """A weights file with its metadata, whole or not there. Raises StorageError."""
    written = yaml_reader.dump_yaml(about.model_dump(mode="json", by_alias=True, exclude_none=True))
    metadata = {"cnnrun.config": written, "cnnrun.facts": json.dumps(facts.to_json())}
    plain = {name: value.contiguous() for name, value in tensors.items()}
    make_folder(path.parent)
    write_file(path, safetensors.torch.save(plain, metadata))


def match_weights(network: Network, given: Weights, until: str | None, facts: Facts) -> dict[str, str]:
    """Which tensor of the file starts each of the network's: the layers up to `until`, all without.

    The task's head is among them where the file says that it knows the same classes. Raises Misfit.
    """
    head = until is None and given.facts is not None and given.facts.classes == facts.classes
    parts = ("layers.", "head.") if head else ("layers.",)
    mine = {name: value for name, value in network.state_dict().items() if name.startswith(parts)}
    wanted = {name: value for name, value in mine.items() if _within(network, name, until)}
    return match_tensors(wanted, given.tensors, given.match_rule, use_all=False)


def load_weights(network: Network, given: Weights, found: dict[str, str]) -> list[str]:
    """Put the file's tensors into the network's, as `found` says; returns the names of those that start anew."""
    mine = network.state_dict()
    with torch.no_grad():
        for name, other in found.items():
            mine[name].copy_(given.tensors[other])
    return [
        name
        for name in mine
        if name not in found and not name.startswith("normalize.") and not is_batch_norm_counter(name)
    ]


def _within(network: Network, name: str, until: str | None) -> bool:
    """Whether a tensor belongs to the layers up to `until`."""
    keys = [key for key, _ in network.layers.named_children()]
    return until is None or name.startswith("head.") or keys.index(name.split(".")[1]) <= keys.index(until)


def _described(path: Path, metadata: dict[str, str]) -> tuple[WeightsDescription | None, Facts | None]:
    if "cnnrun.config" not in metadata:
        return None, None
    try:
        made = parse_description(metadata["cnnrun.config"], str(path))
        facts = TypeAdapter(Facts).validate_json(metadata["cnnrun.facts"], strict=True)
        channels, *size = facts.image
        shape = ImageSettings(size=(size[0], size[1]), channels=channels, mean=list(facts.mean), std=list(facts.std))  # type: ignore[arg-type]
        if made.image.size not in (None, shape.size) or made.image.channels not in (None, shape.channels):
            raise ValueError("two picture sizes")
        return made, facts
    except (UserError, ValueError, TypeError, KeyError, IndexError):
        raise CheckpointError(f"{path}: its description is damaged or of another version of cnnrun") from None
