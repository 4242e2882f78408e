"""Interface of a layer. Read this first, after the README; source.py and task.py hold the other interfaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator
from torch import nn

from cnnrun.config.spec import Kind

MAX_SIDE = 65_535  # the largest dimension of a shape: pixels or channels

Shape = tuple[int, ...]  # of one sample, without the batch: (C, H, W) for images, (F,) for vectors
HeightWidth = tuple[int, int]  # (height, width)


class ShapeError(Exception):
    """A layer cannot take its input; the message says why, and what the user can do."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}; {fix}")


@dataclass(frozen=True)
class Window:
    """Part of a layer's input that one output cell depends on, per direction; receptive fields are computed from it.

    `kernel` includes dilation, `scale` is the factor of upsampling, and `is_global` means the whole input. `start` is
    the index of the input cell at which the window of the first output cell begins; with padding it is negative.
    """

    kernel: HeightWidth = (1, 1)
    stride: HeightWidth = (1, 1)
    scale: HeightWidth = (1, 1)
    is_global: bool = False
    start: tuple[float, float] = (0.0, 0.0)


class LayerSpec(Kind):
    """A layer of the YAML: its settings, and a method that builds it for the shape of its input."""

    # Settings as in YAML, and a valid input shape: the conformance tests build this.
    example: ClassVar[dict[str, Any]] = {}
    example_shape: ClassVar[Shape] = (8, 6, 6)
    has_several_inputs: ClassVar[bool] = False

    name: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)
    """Names this layer's output, for a later layer's `from`."""
    from_: str | Annotated[list[str], Field(min_length=1)] | None = Field(None, alias="from")
    """Takes the output of the layer of that name (or several) instead of the previous layer's."""

    @model_validator(mode="after")
    def _refuse_named_parts(self) -> Self:
        """Refuse a name or from on a norm or activation inside a layer, where it would have no effect."""
        for value in self.__dict__.values():
            if isinstance(value, LayerSpec) and (value.name is not None or value.from_ is not None):
                raise ValueError(
                    f"{value.kind} inside {self.kind} takes neither name nor from; give it a line of its own"
                )
        return self

    def build(self, in_shape: Shape) -> nn.Module:
        """Build the module for an input of `in_shape`. Raises ShapeError."""
        raise NotImplementedError

    def shape_module(self, module: nn.Module) -> nn.Module:
        """Return the part of a built module that decides its output's shape; by default all of it."""
        return module

    def window(self, in_shape: Shape) -> Window:
        """Part of the input that one output cell depends on."""
        return Window()

    def check_inputs(self, in_shapes: Sequence[Shape]) -> None:
        """Raise ShapeError if the layer cannot take these inputs together."""
        if len(in_shapes) > 1:
            raise ShapeError(f"{self.kind} takes one input, not {len(in_shapes)}", "join them with concat or add")

    def input_names(self) -> list[str]:
        """Names in `from`; empty if the input is the previous layer's output."""
        return [] if self.from_ is None else [self.from_] if isinstance(self.from_, str) else self.from_


def require_feature_maps(kind: str, in_shape: Shape) -> tuple[int, int, int]:
    """Return `in_shape` as (C, H, W). Raises ShapeError if it is a vector."""
    if len(in_shape) != 3:
        fix = "move it before `flatten` or the global pool"
        raise ShapeError(f"{kind} needs feature maps (C, H, W)", fix)
    return in_shape[0], in_shape[1], in_shape[2]


def require_vector(kind: str, in_shape: Shape) -> int:
    """Return the number of features of `in_shape`. Raises ShapeError if it is feature maps."""
    if len(in_shape) != 1:
        raise ShapeError(f"{kind} needs a vector (features,)", "add `flatten` or `global_avg_pool` before it")
    return in_shape[0]
