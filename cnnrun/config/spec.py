"""What every section and every kind of thing in the YAML is made of.

`Spec` is a frozen pydantic model that forbids unknown keys and converts nothing silently. `Kind` is a spec that has
siblings; a union of kinds annotated with `Kinds()` is the registry, written in YAML as a one-key mapping:

    - conv: {out_channels: 32}     # kind: {settings}
    - max_pool: 2                  # kind: value of the main setting
    - flatten                      # kind, all defaults
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
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from cnnrun.config.messages import add_suggestions, did_you_mean, format_value, invalid_value_error, join_words
from cnnrun.config.tree import INVALID


class Spec(BaseModel):
    """A mapping of the YAML file: frozen, strict, closed. A field's docstring is its help.

    The docstrings are read from the source when somebody asks: pydantic's own way reads it for every class at import,
    which costs a quarter of importing torch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _suggest_keys(cls, value: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise add_suggestions(error, cls.keys()) from None

    @classmethod
    def keys(cls) -> list[str]:
        """The keys as they are written in YAML."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @classmethod
    def field_help(cls) -> dict[str, str]:
        """The docstring under each field, inherited ones included, by the key as written in YAML."""
        found: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, Spec) and base is not Spec:
                found |= _docstrings(base)
        return {field.alias or name: found[name] for name, field in cls.model_fields.items() if name in found}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(schema)
        properties = handler.resolve_ref_schema(written).get("properties", {})
        for key, text in cls.field_help().items():
            properties[key]["description"] = text
        return written


@cache
def _docstrings(cls: type) -> dict[str, str]:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


class Kind(Spec):
    """One of several: `kind` is its word in YAML, `main` the setting that `kind: value` sets."""

    kind: ClassVar[str]
    main: ClassVar[str | None] = None


@dataclass(frozen=True)
class Kinds:
    """Annotates a union of Kind classes: reads and writes them as one-key mappings.

    `suffix` is dropped from the words: with "_norm", batch_norm is written `norm: batch`.
    """

    suffix: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {self.yaml_name(member): member for member in union_members(source)}
        schemas: dict[Any, CoreSchema] = {
            word: core_schema.no_info_before_validator_function(_body_of(member), handler.generate_schema(member))
            for word, member in choices.items()
        }
        return core_schema.no_info_before_validator_function(
            _splitter(choices),
            core_schema.tagged_union_schema(schemas, discriminator=lambda pair: pair[0]),
            serialization=core_schema.plain_serializer_function_ser_schema(self._written),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        choices: Any = schema["schema"]["choices"]
        written = [_json_of(word, inner["schema"], handler) for word, inner in choices.items()]
        return {"anyOf": [{"enum": list(choices)}, *written]}

    def yaml_name(self, kind: type[Kind] | Kind) -> str:
        """The kind's word in the YAML where this union stands."""
        return kind.kind.removesuffix(self.suffix)

    def _written(self, value: Kind) -> dict[str, Any]:
        return {self.yaml_name(value): value.model_dump(mode="json", by_alias=True, exclude_none=True)}


def union_members(union: Any) -> tuple[type[Kind], ...]:
    """The classes of a union of kinds, in its own order; a single class counts as a union of one."""
    if hasattr(union, "__metadata__"):
        return union_members(get_args(union)[0])
    return get_args(union) or (union,)


def _splitter(choices: dict[str, type[Kind]]) -> Callable[[Any], tuple[str, Any]]:
    """Splits what the YAML says into (word, body)."""
    words = {member: word for word, member in choices.items()}

    def split(value: Any) -> tuple[str, Any]:
        if isinstance(value, Kind) and type(value) in words:
            return words[type(value)], value
        if value is INVALID:
            raise invalid_value_error()
        if isinstance(value, str):
            word, body = value, None
        elif isinstance(value, dict) and len(value) == 1:
            word, body = next(iter(value.items()))
        elif isinstance(value, dict) and value:
            raise PydanticCustomError("kind", "{text}", {"text": _several_keys(list(value), choices)})
        else:
            raise PydanticCustomError("kind", "{text}", {"text": f"expected a kind{did_you_mean('', choices)}"})
        if word not in choices:
            raise PydanticCustomError("kind", "{text}", {"text": f"unknown kind {word!r}{did_you_mean(word, choices)}"})
        return word, body

    return split


def _several_keys(keys: list[str], choices: Iterable[str]) -> str:
    text = f"one kind stands alone, here are {', '.join(keys)}"
    kinds = [key for key in keys if key in choices]
    if len(kinds) == 1:
        return f"{text}; indent the settings of `{kinds[0]}:` below it"
    return f"{text}; keep one (an override that changes the kind gives the whole value: key={{kind: {{...}}}})"


def _body_of(member: type[Kind]) -> Callable[[tuple[str, Any]], Any]:
    """Makes the settings mapping out of a body: nothing, the main setting alone, or the mapping itself."""

    def body_of(pair: tuple[str, Any]) -> Any:
        word, body = pair
        if body is None:
            return {}
        if isinstance(body, dict | Kind):
            return body
        if member.main is None:
            raise PydanticCustomError(
                "kind", "{text}", {"text": f"{word} takes a mapping: {join_words(member.keys())}"}
            )
        return {member.main: body}

    return body_of


def _json_of(word: str, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
    body = {"anyOf": [handler(schema), {"type": ["number", "string", "array", "null"]}]}
    return {"type": "object", "properties": {word: body}, "required": [word], "additionalProperties": False}


@dataclass(frozen=True)
class IntPair:
    """Annotates a (height, width): in YAML one whole number for both directions, or `[height, width]`."""

    at_least: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        write = core_schema.plain_serializer_function_ser_schema(list)
        return core_schema.no_info_plain_validator_function(self._read, serialization=write)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        number = {"type": "integer", "minimum": self.at_least}
        return {"anyOf": [number, {"type": "array", "items": number, "minItems": 2, "maxItems": 2}]}

    def _read(self, value: Any) -> tuple[int, int]:
        if value is INVALID:
            raise invalid_value_error()
        pair = [value, value] if type(value) is int else value
        whole = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(item) is int for item in pair)
        if not whole or not all(self.at_least <= item <= 1_000_000 for item in pair):
            text = f"expected a whole number from {self.at_least} up, or [height, width]; got {format_value(value)}"
            raise PydanticCustomError("pair", "{text}", {"text": text})
        return pair[0], pair[1]


SizePair = Annotated[tuple[int, int], IntPair(1)]
PaddingPair = Annotated[tuple[int, int], IntPair(0)]
