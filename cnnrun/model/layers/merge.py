"""Layers that join several earlier outputs, named in `from`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add, mul
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from cnnrun.contracts.layer import LayerSpec, Shape, ShapeError


class Concatenation(nn.Module):
    """Tensors [B, C1, ...], [B, C2, ...] -> [B, C1 + C2, ...]."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, 1)


class Sum(nn.Module):
    """The sum of tensors of one shape."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return reduce(add, inputs)


class Product(nn.Module):
    """The product of tensors of one shape, or of [B, C, H, W] with a gate [B, C, 1, 1]."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return reduce(mul, inputs)


class _Merge(LayerSpec):
    module: ClassVar[type[nn.Module]]
    has_several_inputs = True
    main = "from"
    example = {"from": ["a", "b"]}
    from_: str | Annotated[list[str], Field(min_length=1)] = Field(alias="from")
    """The names of the outputs to join."""

    def build(self, in_shape: Shape) -> nn.Module:
        return self.module()


class Concat(_Merge):
    """Concatenates the channels of several outputs. Their heights and widths must agree."""

    kind = "concat"
    module = Concatenation

    def check_inputs(self, in_shapes: Sequence[Shape]) -> None:
        if len({shape[1:] for shape in in_shapes}) > 1:
            raise ShapeError(
                f"{join_shapes(in_shapes)} differ beyond the channels", "bring them to one height and width"
            )


class Add(_Merge):
    """The sum of several outputs of one shape."""

    kind = "add"
    module = Sum

    def check_inputs(self, in_shapes: Sequence[Shape]) -> None:
        if len(set(in_shapes)) > 1:
            raise ShapeError(
                f"{join_shapes(in_shapes)} are not one shape", "bring them to one, with a 1x1 conv or a stride"
            )


class Multiply(_Merge):
    """The product of several outputs of one shape, or of (C, H, W) with a gate (C, 1, 1)."""

    kind = "multiply"
    module = Product

    def check_inputs(self, in_shapes: Sequence[Shape]) -> None:
        full_shapes = {shape for shape in in_shapes if shape[1:] != (1, 1)}
        if len(full_shapes) > 1 or len({shape[0] for shape in in_shapes}) > 1:
            raise ShapeError(f"{join_shapes(in_shapes)} do not multiply", "use one shape, or (C, H, W) and (C, 1, 1)")


def join_shapes(shapes: Sequence[Shape]) -> str:
    """Join shapes for a message."""
    return " and ".join(str(shape) for shape in shapes)
