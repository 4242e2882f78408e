"""What a layer and a data source promise. Read this second, after the README; a task's promises are in taskspec.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator
from torch import nn

from cnnrun.config.spec import Kind

MAX_SIDE = 65_535  # pixels, or channels

Shape = tuple[int, ...]  # of one sample, without the batch: (C, H, W) for pictures, (F,) for vectors
HeightWidth = tuple[int, int]  # (height, width)


# --- layers ---------------------------------------------------------------------------------------------------------


class ShapeError(Exception):
    """A layer cannot take what arrives: why, and what the user can do."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}; {fix}")


@dataclass(frozen=True)
class Window:
    """What a layer's output cell sees of its input, per direction: for receptive fields.

    `kernel` counts dilation in; `scale` is how much the layer enlarges; `whole` means all of the input. `start` is the
    input cell, from the first, where the first output cell's window begins: with padding it is below 0.
    """

    kernel: HeightWidth = (1, 1)
    stride: HeightWidth = (1, 1)
    scale: HeightWidth = (1, 1)
    is_global: bool = False
    start: tuple[float, float] = (0.0, 0.0)


class LayerSpec(Kind):
    """A layer of the YAML: its settings, and how to build it for the shape that arrives."""

    # What the conformance tests build: settings in YAML's words, and a shape that can pass.
    example: ClassVar[dict[str, Any]] = {}
    example_shape: ClassVar[Shape] = (8, 6, 6)
    has_several_inputs: ClassVar[bool] = False

    name: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)
    """Names this layer's output, for a later layer's `from`."""
    from_: str | Annotated[list[str], Field(min_length=1)] | None = Field(None, alias="from")
    """Takes the output of the layer of that name (or several) instead of the previous layer's."""

    @model_validator(mode="after")
    def _parts_are_unnamed(self) -> Self:
        """A norm or activation inside a layer is a part of it: a name or link there would be ignored, so is refused."""
        for value in self.__dict__.values():
            if isinstance(value, LayerSpec) and (value.name is not None or value.from_ is not None):
                raise ValueError(
                    f"{value.kind} inside {self.kind} takes neither name nor from; give it a line of its own"
                )
        return self

    def build(self, in_shape: Shape) -> nn.Module:
        """The module, for one input of `in_shape`. Raises CannotPass."""
        raise NotImplementedError

    def window(self, in_shape: Shape) -> Window:
        """What an output cell sees of the input."""
        return Window()

    def check_inputs(self, in_shapes: Sequence[Shape]) -> None:
        """Raises CannotPass when these inputs cannot be taken together."""
        if len(in_shapes) > 1:
            raise ShapeError(f"{self.kind} takes one input, here are {len(in_shapes)}", "join them with concat or add")

    def input_names(self) -> list[str]:
        """The names in `from`; empty for the previous layer."""
        return [] if self.from_ is None else [self.from_] if isinstance(self.from_, str) else self.from_


def require_maps(kind: str, in_shape: Shape) -> tuple[int, int, int]:
    """`in_shape` as (C, H, W). Raises CannotPass when a vector arrives."""
    if len(in_shape) != 3:
        fix = "move it before `flatten` or the global pool"
        raise ShapeError(f"{kind} needs feature maps (C, H, W)", fix)
    return in_shape[0], in_shape[1], in_shape[2]


def require_vector(kind: str, in_shape: Shape) -> int:
    """`in_shape` as a number of features. Raises CannotPass when feature maps arrive."""
    if len(in_shape) != 1:
        raise ShapeError(f"{kind} needs a vector (features,)", "add `flatten` or `global_avg_pool` before it")
    return in_shape[0]


# --- data -----------------------------------------------------------------------------------------------------------
