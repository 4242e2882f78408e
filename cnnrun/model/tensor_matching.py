"""Match the tensors of a file to the tensors of a network, by name or by order. Either all match or none."""

from __future__ import annotations

from itertools import zip_longest
from typing import Literal

from torch import Tensor

MatchRule = Literal["name", "order"]
StateDict = dict[str, Tensor]

_MAX_ROWS = 10  # of a table of tensors that do not match


class TensorMismatchError(Exception):
    """The file's tensors do not match the network's; `rows` has a line for each tensor that differs."""

    def __init__(self, rows: list[str]) -> None:
        super().__init__("; ".join(rows))
        self.rows = rows

    def message_lines(self, title: str) -> list[str]:
        """The message for the user: a title and at most 10 rows."""
        more = [f"  and {len(self.rows) - _MAX_ROWS} more"] if len(self.rows) > _MAX_ROWS else []
        return [f"{title} ({len(self.rows)} tensors differ):", *(f"  {row}" for row in self.rows[:_MAX_ROWS]), *more]


def match_tensors(network_state: StateDict, file_state: StateDict, rule: MatchRule, use_all: bool) -> dict[str, str]:
    """Map each tensor name of the network to a tensor name of the file, by name or by order.

    With `use_all`, every tensor of the file must be used. Raises TensorMismatchError.
    """
    match = match_by_name if rule == "name" else match_in_order
    return match(network_state, file_state, use_all)


def match_by_name(network_state: StateDict, file_state: StateDict, use_all: bool = True) -> dict[str, str]:
    """Match tensors that have the same name. The file may lack batch norm counters. Raises TensorMismatchError."""
    rows = [
        _mismatch(name, network_state, name, file_state)
        for name in network_state
        if not is_batch_norm_counter(name) or name in file_state
    ]
    rows += [
        _mismatch("", network_state, name, file_state) for name in file_state if use_all and name not in network_state
    ]
    _refuse_mismatches(rows)
    return {name: name for name in network_state if name in file_state}


def check_exact_match(network_state: StateDict, file_state: StateDict) -> None:
    """Raise TensorMismatchError unless names, shapes and dtypes are equal, as they are in a checkpoint."""
    match_by_name(network_state, file_state)
    rows: list[str | None] = [
        f"network: {name} {network_state[name].dtype}   file: {file_state[name].dtype}"
        for name in network_state
        if name in file_state and network_state[name].dtype != file_state[name].dtype
    ]
    _refuse_mismatches(rows)


def match_in_order(network_state: StateDict, file_state: StateDict, use_all: bool = True) -> dict[str, str]:
    """Match the first tensor to the first, and so on; shapes and roles (weight, bias, running_mean) must agree.

    Tensors of three dimensions are matched separately: they are parameters of a whole block, such as ConvNeXt's layer
    scale, which PyTorch lists before the block's layers. The file may lack batch norm counters. Raises
    TensorMismatchError.
    """
    has_counters = any(map(is_batch_norm_counter, file_state))
    matches, rows = {}, []
    for is_block_parameter in (False, True):
        names = [
            name
            for name, value in network_state.items()
            if (value.dim() == 3) == is_block_parameter and (has_counters or not is_batch_norm_counter(name))
        ]
        file_names = [name for name, value in file_state.items() if (value.dim() == 3) == is_block_parameter]
        file_names = file_names if use_all else file_names[: len(names)]
        for name, file_name in zip_longest(names, file_names, fillvalue=""):
            rows.append(_mismatch(name, network_state, file_name, file_state))
            matches[name] = file_name
    _refuse_mismatches(rows)
    return matches


def _refuse_mismatches(rows: list[str | None]) -> None:
    if mismatches := [row for row in rows if row is not None]:
        raise TensorMismatchError(mismatches)


def _mismatch(name: str, network_state: StateDict, file_name: str, file_state: StateDict) -> str | None:
    """Reason that the file's tensor `file_name` cannot be the network's `name`, as a row of a table, or None."""
    expected, actual = network_state.get(name), file_state.get(file_name)
    same_role = expected is not None and (expected.dim() == 3 or _role(name) == _role(file_name))
    if expected is not None and actual is not None and expected.shape == actual.shape and same_role:
        return None
    sides = [
        f"{key} {_format_tensor_shape(value)}" if value is not None else "nothing"
        for key, value in ((name, expected), (file_name, actual))
    ]
    return f"network: {sides[0]}   file: {sides[1]}"


def _role(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def is_batch_norm_counter(name: str) -> bool:
    """Tell whether a tensor is batch norm's count of batches."""
    return _role(name) == "num_batches_tracked"


def _format_tensor_shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "one number"
