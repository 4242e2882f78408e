"""What flows between layers while a network is built: its shape, and how it lies over the picture."""

from __future__ import annotations

from dataclasses import dataclass

from cnnrun.contracts import Pair, Shape, Window


@dataclass(frozen=True)
class Signal:
    """What flows between layers: a shape, and how its cells lie over the picture (what they see, stride in pixels)."""

    shape: Shape
    field: Pair = (1, 1)
    stride: tuple[float, float] = (1.0, 1.0)
    whole: bool = False


def seen_through(window: Window, sources: list[Signal], shape: Shape) -> Signal:
    """How the output's cells lie over the picture: the recursion of Araujo et al. 2019 (eq. 2), per direction."""
    whole = window.whole or any(source.whole for source in sources) or len(shape) != 3
    fields, strides = [], []
    for d in (0, 1):
        step = max(source.stride[d] for source in sources)
        fields.append(max(source.field[d] for source in sources) + round((window.kernel[d] - 1) * step))
        strides.append(step * window.stride[d] / window.scale[d])
    return Signal(shape, (fields[0], fields[1]), (strides[0], strides[1]), whole)
