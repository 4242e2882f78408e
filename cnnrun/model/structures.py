"""Structures: layers that contain other layers, and the modules that they build."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn

from cnnrun.config.spec import Kinds, Spec
from cnnrun.contracts.layer import LayerSpec
from cnnrun.model.layers import Leaf
from cnnrun.model.layers.activation import Activation
from cnnrun.model.layers.norm import Norm


class Structure(LayerSpec):
    """A layer that contains other layers."""


class Sequential(Structure):
    """Layers one after the other. Each use of a block from `blocks:` becomes one of these."""

    kind = "sequential"
    main = "layers"
    layers: list[Node] = Field(min_length=1)
    block: str | None = None
    """The name of the block that these layers came from; the names of its weights begin with it."""


class Repeat(Structure):
    """The same layers several times, each time with their own weights."""

    kind = "repeat"
    times: int = Field(ge=1, le=1000)
    layers: list[Node] = Field(min_length=1)


class Residual(Structure):
    """layers(x) + shortcut(x), then the activation (He et al. 2016)."""

    kind = "residual"
    main = "layers"
    layers: list[Node] = Field(min_length=1)
    shortcut: Literal["auto", "identity", "conv"] | list[Node] = "auto"
    """`auto`: identity where the shapes agree, otherwise a 1x1 conv with the stride that makes them agree."""
    norm: Annotated[Norm, Kinds("_norm")] | None = None
    """The norm after the shortcut's 1x1 conv, if it has one."""
    activation: Annotated[Activation, Kinds()] | None = None


class Parallel(Structure):
    """Several branches of layers over the same input, merged."""

    kind = "parallel"
    main = "branches"
    branches: list[list[Node]] = Field(min_length=2)
    """An empty branch passes its input on."""
    merge: Literal["concat", "add", "multiply"] = "concat"


Node = Annotated[Leaf | Sequential | Repeat | Residual | Parallel, Kinds()]
for _structure in (Sequential, Repeat, Residual, Parallel):
    _structure.model_rebuild()


class Model(Spec):
    """The network: its layers, or the name of a zoo network. A bare list means `layers`, a bare name means `zoo`."""

    layers: list[Node] = Field(min_length=1)
    """The layers in order; with `zoo`, the layers that follow the zoo network's."""
    zoo: str | None = None
    """A network of `cnnrun zoo list`. Its layers replace the name when the file is read."""
    until: str | None = None
    """The last layer to use from `zoo` and `weights`; by default all layers but the task's head."""
    weights: str | None = Field(None, min_length=1)
    """Initial weights of the layers: a safetensors file, a run, or a PyTorch state dict (.pth)."""

    @model_validator(mode="after")
    def _check_until(self) -> Self:
        if self.until is not None and self.weights is None:
            raise ValueError("until says where `zoo` or `weights` end; give one of them")
        return self

    @model_serializer(mode="wrap")
    def _dump_bare_list(self, dump: SerializerFunctionWrapHandler) -> Any:
        fields = dump(self)
        return fields["layers"] if self.weights is None else fields


class LinkedChain(nn.Module):
    """A chain in which some layers take earlier outputs by name.

    `inputs` maps a layer to the names of its inputs. `kept` are the layers whose outputs are kept for use by name. With
    `outputs` the result is the tuple of these layers' outputs instead of the last layer's output. `forward` takes the
    named outputs of the enclosing chains in `outer`.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        inputs: dict[str, list[str]],
        kept: list[str],
        outputs: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for key, module in layers.items():
            self.add_module(key, module)
        self.inputs, self.kept, self.outputs = inputs, kept, outputs

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The layers by name, in order."""
        return dict(self.named_children())

    def forward(self, x: Tensor, outer: dict[str, Tensor] | None = None) -> Tensor | tuple[Tensor, ...]:
        """Run the layers in order, each on its named inputs or on the output of the layer before it."""
        named = dict(outer or {})
        for key, module in self.named_children():
            inputs = [named[source] for source in self.inputs.get(key, ())] or [x]
            x = (
                module(*inputs, named)
                if isinstance(module, LinkedChain | SumOfBranches | Branches)
                else module(*inputs)
            )
            if key in self.kept:
                named[key] = x
        return tuple(named[key] for key in self.outputs) if self.outputs else x


class SumOfBranches(nn.Module):
    """layers(x) + shortcut(x), then the activation."""

    def __init__(self, layers: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.layers, self.shortcut, self.activation = layers, shortcut, activation

    def forward(self, x: Tensor, outer: dict[str, Tensor] | None = None) -> Tensor:
        out: Tensor = self.activation(_run(self.layers, x, outer) + _run(self.shortcut, x, outer))
        return out


class Branches(nn.Module):
    """Branches over the same input, merged."""

    def __init__(self, branches: list[nn.Module], merge: nn.Module) -> None:
        super().__init__()
        for number, branch in enumerate(branches, 1):
            self.add_module(f"branch{number}", branch)
        self.count, self.merge = len(branches), merge

    @property
    def branches(self) -> list[nn.Module]:
        """The branches in order."""
        return [self.get_submodule(f"branch{number}") for number in range(1, self.count + 1)]

    def forward(self, x: Tensor, outer: dict[str, Tensor] | None = None) -> Tensor:
        out: Tensor = self.merge(*[_run(branch, x, outer) for branch in self.branches])
        return out


def _run(module: nn.Module, x: Tensor, outer: dict[str, Tensor] | None) -> Tensor:
    out: Tensor = module(x, outer) if isinstance(module, LinkedChain | SumOfBranches | Branches) else module(x)
    return out


def link_names(nodes: Sequence[Any]) -> list[str]:
    """Every name in `from` of the layers in this list, nested layers included."""
    return [name for node in _walk_layers(nodes) for name in node.input_names()]


def _walk_layers(nodes: Sequence[Any]) -> Iterator[LayerSpec]:
    """Yield every layer of a list, nested layers included, depth first."""
    for node in nodes:
        yield node
        for child_nodes in _child_lists(node):
            yield from _walk_layers(child_nodes)


def _child_lists(node: LayerSpec) -> list[Sequence[Any]]:
    if isinstance(node, Parallel):
        return list(node.branches)
    if isinstance(node, Residual):
        return [node.layers, node.shortcut if isinstance(node.shortcut, list) else []]
    return [node.layers] if isinstance(node, Sequential | Repeat) else []
