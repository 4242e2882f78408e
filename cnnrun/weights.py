"""Weights from elsewhere."""

from __future__ import annotations

from torch import Tensor


class Misfit(Exception):
    """Weights that are not the network's; carries a row for each tensor that does not fit."""

    def __init__(self, rows: list[str]) -> None:
        super().__init__("; ".join(rows))
        self.rows = rows


def in_order(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, str]:
    """Which tensor of `theirs` is each of `ours` when both list them in the same order. Raises Misfit.

    Tensors of three dimensions are ordered among themselves: they are parameters of a whole block, such as ConvNeXt's
    layer scale, which PyTorch lists before the block's layers.
    """
    made: dict[str, str] = {}
    rows = []
    for apart in (False, True):
        mine = [name for name, value in ours.items() if (value.dim() == 3) == apart]
        other = [name for name, value in theirs.items() if (value.dim() == 3) == apart]
        for place in range(max(len(mine), len(other))):
            name, given = mine[place : place + 1], other[place : place + 1]
            if name and given and ours[name[0]].shape == theirs[given[0]].shape:
                made[name[0]] = given[0]
            else:
                rows.append(f"{name} {given}")
    if rows:
        raise Misfit(rows)
    return made
