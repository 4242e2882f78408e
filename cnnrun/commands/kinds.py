"""The kinds and settings of the YAML, read from the config's types, for `cnnrun kinds`, the schema and the docs."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticUndefined

from cnnrun.base.errors import ConfigError
from cnnrun.config import zoo
from cnnrun.config.messages import did_you_mean
from cnnrun.config.spec import Kind, Spec, union_members
from cnnrun.data.augment.settings import Augment, Crop, TrivialAugment
from cnnrun.data.epoch_order import Sampler
from cnnrun.data.image_settings import ImageSettings
from cnnrun.data.settings import Data, HoldOut
from cnnrun.data.sources import Source
from cnnrun.experiment.schema import Experiment
from cnnrun.export import Format
from cnnrun.model.structures import Model, Node
from cnnrun.tasks import TaskUnion
from cnnrun.tasks.embedding.losses import EmbeddingLoss
from cnnrun.tasks.multilabel_losses import MultilabelLoss
from cnnrun.tasks.regression.losses import RegressionLoss
from cnnrun.training.ema import EmaSpec
from cnnrun.training.optimizers import Optimizer, ParameterGroup
from cnnrun.training.schedules import Schedule
from cnnrun.training.settings import EarlyStop, Train

FAMILIES: dict[str, tuple[type[Kind], ...]] = {
    "layers": union_members(Node),
    "tasks": union_members(TaskUnion),
    "sources": union_members(Source),
    "policies": (TrivialAugment,),
    "optimizers": union_members(Optimizer),
    "schedules": union_members(Schedule),
    "samplers": union_members(Sampler),
    "losses": (*union_members(MultilabelLoss), *union_members(RegressionLoss), *union_members(EmbeddingLoss)),
    "formats": union_members(Format),
}
SECTIONS: dict[str, type[Spec]] = {
    "(top)": Experiment,
    "data": Data,
    "data.image": ImageSettings,
    "data.split": HoldOut,
    "data.augment": Augment,
    "data.augment.crop": Crop,
    "model": Model,
    "train": Train,
    "train.optimizer.groups": ParameterGroup,
    "train.ema": EmaSpec,
    "train.early_stop": EarlyStop,
}


def describe_word(word: str | None) -> dict[str, Any]:
    """Describe all families (`word` is None), one family, one section or one kind, with help and settings.

    Raises ConfigError for an unknown word.
    """
    if word is None or word in FAMILIES:
        families = FAMILIES if word is None else {word: FAMILIES[word]}
        return {family: [describe_kind(kind, kind.kind) for kind in kinds] for family, kinds in families.items()}
    if word in SECTIONS:
        return {"sections": [describe_kind(SECTIONS[word], word)]}
    for family, kinds in FAMILIES.items():
        for kind in kinds:
            if kind.kind == word:
                return {family: [describe_kind(kind, word)]}
    known = [*FAMILIES, *SECTIONS, *(kind.kind for kinds in FAMILIES.values() for kind in kinds)]
    raise ConfigError(f"{word!r} is not a kind, a family or a section{did_you_mean(word, known)}")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, in which blocks may be used wherever layers may."""
    schema = Experiment.model_json_schema()
    block = {
        "type": "object",
        "properties": {"parameters": {"type": "object"}, "layers": {"type": "array"}},
        "required": ["layers"],
        "additionalProperties": False,
    }
    schema["properties"]["blocks"] = {"type": "object", "additionalProperties": block}
    model = schema["$defs"]["Model"]
    model.pop("required")  # a zoo network has its own layers
    layer_list = model["properties"]["layers"]
    schema["properties"]["model"] = {"anyOf": [{"enum": zoo.network_names()}, layer_list, {"$ref": "#/$defs/Model"}]}
    layers = {kind.kind for kind in FAMILIES["layers"]}
    _allow_blocks(schema, layers)
    return schema


def _allow_blocks(node: Any, layers: set[str]) -> None:
    """Allow a block, as a word or a mapping with one key, wherever any layer is allowed."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        _allow_blocks(child, layers)
    if isinstance(node, dict) and "anyOf" in node and set(node["anyOf"][0].get("enum", ())) == layers:
        block_word = {"type": "string", "not": {"enum": sorted(layers)}}
        block_use = {"type": "object", "maxProperties": 1, "propertyNames": block_word}
        node["anyOf"] += [block_word, block_use]


def describe_kind(spec: type[Spec], word: str) -> dict[str, Any]:
    """Describe one kind or section: its help, its main setting, and all settings."""
    help_texts = spec.field_help()
    return {
        "kind": word,
        "main": getattr(spec, "main", None),
        "help": " ".join((spec.__doc__ or "").split()),
        "settings": [
            {
                "name": field.alias or name,
                "required": field.is_required(),
                "default": _default(field),
                "help": help_texts.get(field.alias or name, ""),
            }
            for name, field in spec.model_fields.items()
        ],
    }


def _default(field: Any) -> Any:
    """The default of a pydantic field as JSON data; None if there is none."""
    value = field.default
    if value is PydanticUndefined or value is None:
        return None
    if isinstance(value, Kind):
        settings = value.model_dump(mode="json", exclude_defaults=True)
        return {value.kind: settings} if settings else value.kind
    if isinstance(value, Spec):
        return value.model_dump(mode="json", exclude_defaults=True)
    return list(value) if isinstance(value, tuple) else value
