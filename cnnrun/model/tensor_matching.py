"""Which tensor of a file belongs to which tensor of a network: by name or by order, all or none."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

MatchRule = Literal["name", "order"]


StateDict = dict[str, Tensor]


_SHOWN = 10  # rows of a table of misfits


class TensorMismatchError(Exception):
    """Weights that are not the network's; carries a row for each tensor that does not fit."""

    def __init__(self, rows: list[str]) -> None:
        super().__init__("; ".join(rows))
        self.rows = rows

    def table(self, head: str) -> list[str]:
        """The rows as lines for the user, the first ones where there are many."""
        more = [f"  and {len(self.rows) - _SHOWN} more"] if len(self.rows) > _SHOWN else []
        return [f"{head} ({len(self.rows)} tensors differ):", *(f"  {row}" for row in self.rows[:_SHOWN]), *more]


def match_tensors(ours: StateDict, theirs: StateDict, how: MatchRule, use_all: bool) -> dict[str, str]:
    """Which tensor of `theirs` is each of `ours`; `whole`: none of theirs may be left. Raises Misfit."""
    return match_by_name(ours, theirs, use_all) if how == "name" else match_in_order(ours, theirs, use_all)


def match_by_name(ours: StateDict, theirs: StateDict, use_all: bool = True) -> dict[str, str]:
    """Each tensor is the one of the same name; counters of batch norm may be missing."""
    rows = [_row(name, ours, name, theirs) for name in ours if not is_batch_norm_counter(name) or name in theirs]
    rows += [_row("", ours, name, theirs) for name in theirs if use_all and name not in ours]
    return _fitting({name: name for name in ours if name in theirs}, rows)


def check_exact_match(ours: StateDict, theirs: StateDict) -> None:
    """Raises Misfit unless names, shapes and types of numbers are the same, as those of a checkpoint are."""
    match_by_name(ours, theirs)
    rows = [
        f"network: {name} {ours[name].dtype}   file: {theirs[name].dtype}"
        for name in ours
        if name in theirs and ours[name].dtype != theirs[name].dtype
    ]
    _fitting({}, list(rows))


def match_in_order(ours: StateDict, theirs: StateDict, use_all: bool = True) -> dict[str, str]:
    """The first is the first, and so on, as long as shapes and roles (weight, bias, running_mean) agree.

    Tensors of three dimensions are ordered among themselves: they are parameters of a whole block, such as ConvNeXt's
    layer scale, which PyTorch lists before the block's layers. Counters of batch norm may be missing.
    """
    counted = any(map(is_batch_norm_counter, theirs))
    found, rows = {}, []
    for apart in (False, True):
        mine = [
            n for n, value in ours.items() if (value.dim() == 3) == apart and (counted or not is_batch_norm_counter(n))
        ]
        other = [n for n, value in theirs.items() if (value.dim() == 3) == apart]
        other = other if use_all else other[: len(mine)]
        count = max(len(mine), len(other))
        for name, given in zip(mine + [""] * (count - len(mine)), other + [""] * (count - len(other)), strict=True):
            rows.append(_row(name, ours, given, theirs))
            found[name] = given
    return _fitting(found, rows)


def _fitting(found: dict[str, str], rows: list[str | None]) -> dict[str, str]:
    if bad := [row for row in rows if row is not None]:
        raise TensorMismatchError(bad)
    return found


def _row(name: str, ours: StateDict, given: str, theirs: StateDict) -> str | None:
    """Why tensor `given` cannot be `name`, as a row of a table; None when it can."""
    mine, other = ours.get(name), theirs.get(given)
    same_role = mine is not None and (mine.dim() == 3 or _role(name) == _role(given))
    if mine is not None and other is not None and mine.shape == other.shape and same_role:
        return None
    shown = [f"{n} {_shape(value)}" if value is not None else "nothing" for n, value in ((name, mine), (given, other))]
    return f"network: {shown[0]}   file: {shown[1]}"


def _role(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def is_batch_norm_counter(name: str) -> bool:
    return _role(name) == "num_batches_tracked"


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "one number"
