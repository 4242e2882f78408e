"""Names of the modules in a chain, with which the names of its weights begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from cnnrun.contracts.layer import LayerSpec
from cnnrun.model.structures import LinkedChain


class InvalidNameError(Exception):
    """A `name` or `from` that cannot be used; `setting` says which of the two."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(message)
        self.setting = setting


# A layer is an attribute of its chain, so it cannot have the name of an existing attribute.
_RESERVED_NAMES = {*dir(nn.Sequential()), *dir(LinkedChain({}, {}, []))}


class LayerKeys:
    """Module names in a chain: the layer's own name, or its kind (or block) and a number (conv1, conv2)."""

    def __init__(self, nodes: Sequence[Any]) -> None:
        self._user_names = {node.name for node in nodes}
        self._counts: dict[str, int] = {}
        self._used_names: set[str] = set()

    def assign_name(self, node: LayerSpec) -> str:
        """Choose the module name of the next layer, and remember it. Raises InvalidNameError."""
        if node.name is not None:
            if node.name in self._used_names or node.name in _RESERVED_NAMES:
                is_used = node.name in self._used_names
                reason = "appears twice in this list" if is_used else "is an attribute of PyTorch's modules"
                raise InvalidNameError("name", f"the name {node.name!r} {reason}; choose another")
            self._used_names.add(node.name)
            return node.name
        kind = getattr(node, "block", None) or node.kind
        while True:
            self._counts[kind] = self._counts.get(kind, 0) + 1
            key = f"{kind}{self._counts[kind]}"
            if key not in self._user_names:  # the user may have named a layer conv2
                return key
