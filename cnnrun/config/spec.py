"""Base classes of all sections and kinds of the YAML.

`Spec` is a frozen pydantic model that forbids unknown keys and converts no value silently. `Kind` is a spec with
alternatives. A union of kinds annotated with `Kinds()` is their registry; YAML writes a member as a one-key mapping:

    - conv: {out_channels: 32}     # kind: {settings}
    - max_pool: 2                  # kind: value of the main setting
    - flatten                      # kind with all defaults
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, ClassVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from cnnrun.config.messages import add_suggestions, did_you_mean, format_value, invalid_value_error
from cnnrun.config.tree import INVALID, Map, update_names


class Spec(BaseModel):
    """A mapping of the YAML file: frozen, strict, without unknown keys. A field's docstring is its help text.

    The docstrings are read from the source only on request. Pydantic's own mechanism reads them for every class at
    import, which takes a quarter of the time of importing torch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    old_keys: ClassVar[dict[str, str]] = {}
    """New key for each old key. Old keys work for one more version, with a warning."""
    old_values: ClassVar[dict[str, dict[str, str]]] = {}
    """For each key, the new value for each old value. Old values work for one more version, with a warning."""

    @model_validator(mode="wrap")
    @classmethod
    def _read_mapping(cls, value: Any, handler: ModelWrapValidatorHandler[Any], info: ValidationInfo) -> Any:
        if isinstance(value, Map) and (cls.old_keys or cls.old_values):
            warnings = update_names(value, cls.old_keys, cls.old_values)
            if info.context is not None:
                info.context.setdefault("warnings", []).extend(warnings)
        try:
            return handler(value)
        except ValidationError as error:
            raise add_suggestions(error, cls.keys()) from None

    @classmethod
    def keys(cls) -> list[str]:
        """Names of the keys in YAML."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @classmethod
    def field_help(cls) -> dict[str, str]:
        """Docstrings of the fields, inherited ones included, by YAML key."""
        docstrings: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, Spec) and base is not Spec:
                docstrings |= _field_docstrings(base)
        return {field.alias or name: docstrings[name] for name, field in cls.model_fields.items() if name in docstrings}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        json_schema: dict[str, Any] = handler(schema)
        properties = handler.resolve_ref_schema(json_schema).get("properties", {})
        for key, text in cls.field_help().items():
            properties[key]["description"] = text
        return json_schema


@cache
def _field_docstrings(cls: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


class Kind(Spec):
    """One of several alternatives: `kind` is its name in YAML, `main` the setting that `kind: value` sets."""

    kind: ClassVar[str]
    main: ClassVar[str | None] = None


@dataclass(frozen=True)
class Kinds:
    """Annotation for a union of Kind classes, which reads and writes them as one-key mappings.

    `suffix` is left out of their names in YAML: with "_norm", batch_norm is written `norm: batch`.
    """

    suffix: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        members = {self.yaml_name(member): member for member in union_members(source)}
        schemas: dict[Any, CoreSchema] = {
            name: core_schema.no_info_before_validator_function(
                _settings_reader(member), handler.generate_schema(member)
            )
            for name, member in members.items()
        }
        return core_schema.no_info_before_validator_function(
            _kind_splitter(members),
            core_schema.tagged_union_schema(schemas, discriminator=lambda pair: pair[0]),
            serialization=core_schema.plain_serializer_function_ser_schema(self._to_yaml),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        choices: Any = schema["schema"]["choices"]
        mappings = [_mapping_schema(name, inner["schema"], handler) for name, inner in choices.items()]
        return {"anyOf": [{"enum": list(choices)}, *mappings]}

    def yaml_name(self, kind: type[Kind] | Kind) -> str:
        """Name of a kind in YAML, as a member of this union."""
        return kind.kind.removesuffix(self.suffix)

    def _to_yaml(self, value: Kind) -> dict[str, Any]:
        return {self.yaml_name(value): value.model_dump(mode="json", by_alias=True, exclude_none=True)}


def union_members(union: Any) -> tuple[type[Kind], ...]:
    """Classes of a union of kinds, in its order; a single class is a union of one."""
    if hasattr(union, "__metadata__"):
        return union_members(get_args(union)[0])
    return get_args(union) or (union,)


def _kind_splitter(members: dict[str, type[Kind]]) -> Callable[[Any], tuple[str, Any]]:
    """Return a function that splits a value of the YAML into the kind's name and its body."""
    names = {member: name for name, member in members.items()}

    def split_kind(value: Any) -> tuple[str, Any]:
        if isinstance(value, Kind) and type(value) in names:
            return names[type(value)], value
        if value is INVALID:
            raise invalid_value_error()
        if isinstance(value, str):
            name, body = value, None
        elif isinstance(value, dict) and len(value) == 1:
            name, body = next(iter(value.items()))
        elif isinstance(value, dict) and value:
            raise _kind_error(_several_keys_message(list(value), members))
        else:
            raise _kind_error(f"expected a kind{did_you_mean('', members)}")
        if name not in members:
            raise _kind_error(f"unknown kind {name!r}{did_you_mean(name, members)}")
        return name, body

    return split_kind


def _kind_error(text: str) -> PydanticCustomError:
    return PydanticCustomError("kind", "{text}", {"text": text})


def _several_keys_message(keys: list[str], names: Iterable[str]) -> str:
    text = f"expected one kind, found {', '.join(keys)}"
    kinds = [key for key in keys if key in names]
    if len(kinds) == 1:
        return f"{text}; indent the settings of `{kinds[0]}:` below it"
    return f"{text}; keep one (to change it on the command line, give the whole value: key='{{kind: {{...}}}}')"


def _settings_reader(member: type[Kind]) -> Callable[[tuple[str, Any]], Any]:
    """Return a function that turns a kind's body into a mapping of settings.

    The body is None for all defaults, the value of the main setting, or the mapping itself.
    """

    def read_settings(pair: tuple[str, Any]) -> Any:
        name, body = pair
        if body is None:
            return {}
        if isinstance(body, dict | Kind):
            return body
        if member.main is None:
            raise _kind_error(f"{name} takes a mapping: {', '.join(member.keys())}")
        return {member.main: body}

    return read_settings


def _mapping_schema(name: str, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
    body = {"anyOf": [handler(schema), {"type": ["number", "string", "array", "null"]}]}
    return {"type": "object", "properties": {name: body}, "required": [name], "additionalProperties": False}


@dataclass(frozen=True)
class IntPair:
    """Annotation for a (height, width), in YAML one whole number for both directions or `[height, width]`."""

    minimum: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        to_list = core_schema.plain_serializer_function_ser_schema(list)
        return core_schema.no_info_plain_validator_function(self._read_pair, serialization=to_list)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        number = {"type": "integer", "minimum": self.minimum}
        return {"anyOf": [number, {"type": "array", "items": number, "minItems": 2, "maxItems": 2}]}

    def _read_pair(self, value: Any) -> tuple[int, int]:
        if value is INVALID:
            raise invalid_value_error()
        pair = [value, value] if type(value) is int else value
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(item) is int for item in pair)
        if not is_pair or not all(self.minimum <= item <= 1_000_000 for item in pair):
            text = f"expected a whole number from {self.minimum} up, or [height, width]; got {format_value(value)}"
            raise PydanticCustomError("pair", "{text}", {"text": text})
        return pair[0], pair[1]


SizePair = Annotated[tuple[int, int], IntPair(1)]
PaddingPair = Annotated[tuple[int, int], IntPair(0)]
