"""Optimizers, with PyTorch's settings and defaults, and their state as named tensors."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cnnrun.config.spec import Kind, Spec

Beta = Annotated[float, Field(ge=0, lt=1)]


class ParameterGroup(Spec):
    """Parameters with settings of their own."""

    params: str = Field(min_length=1)
    """A part as `cnnrun summary` names it (`head`, `layers.stage4`), or a pattern such as `*.bias`."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate of these parameters; by default the optimizer's."""
    weight_decay: float | None = Field(None, ge=0)
    """Weight decay of these parameters; by default the optimizer's."""

    @model_validator(mode="after")
    def _sets_something(self) -> Self:
        if self.lr is None and self.weight_decay is None:
            raise ValueError(f"the group {self.params!r} needs lr, weight_decay or both")
        return self

    def has_parameter(self, name: str) -> bool:
        """Return whether the parameter `name` belongs to this group."""
        return name.startswith(f"{self.params}.") or fnmatchcase(name, self.params)


class OptimizerSpec(Kind):
    """One of torch's optimizers with torch's own settings and defaults."""

    main = "lr"
    torch_class: ClassVar[type[torch.optim.Optimizer]]
    has_fused_kernel: ClassVar[bool] = False  # whether torch has a fused kernel for CPU and CUDA

    lr: float = Field(1e-3, gt=0)
    """The peak learning rate; the schedule multiplies it."""
    weight_decay: float = Field(0.0, ge=0)
    groups: list[ParameterGroup] = []
    """Parameters with settings of their own; each takes those of the first group that names it."""

    def parameter_groups(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Parameter groups for torch; parameters that no group names come last, with the optimizer's own settings.

        Each group also has the `names` of its parameters and `peak`, the learning rate that the schedule scales.
        """
        rest = ParameterGroup(params="*", lr=self.lr)
        members: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in named:
            index = next(
                (index for index, group in enumerate(self.groups) if group.has_parameter(name)), len(self.groups)
            )
            members.setdefault(index, []).append((name, parameter))
        return [
            {
                "names": [name for name, _ in group_members],
                "params": [parameter for _, parameter in group_members],
                "peak": self.lr if group.lr is None else group.lr,
                "weight_decay": self.weight_decay if group.weight_decay is None else group.weight_decay,
            }
            for index, group in enumerate([*self.groups, rest])
            if (group_members := members.get(index))
        ]

    def unused_groups(self, names: Iterable[str]) -> list[ParameterGroup]:
        """Groups that get none of the parameters `names`, because no name matches or earlier groups match first."""
        used = {
            next((index for index, group in enumerate(self.groups) if group.has_parameter(name)), None)
            for name in names
        }
        return [group for index, group in enumerate(self.groups) if index not in used]

    def build(self, parameters: Iterable[nn.Parameter] | list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the optimizer of parameters or groups of them, with a fused kernel if torch has one."""
        settings: dict[str, Any] = self.model_dump(exclude={"groups"})
        if self.has_fused_kernel:
            settings["fused"] = True
        return self.torch_class(parameters, **settings)


class Sgd(OptimizerSpec):
    """Stochastic gradient descent, with optional momentum."""

    kind = "sgd"
    torch_class = torch.optim.SGD
    has_fused_kernel = True
    momentum: float = Field(0.0, ge=0, lt=1)
    nesterov: bool = False
    dampening: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov: true needs a momentum, such as 0.9, and no dampening")
        return self


class _Adaptive(OptimizerSpec):
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), strict=False)
    eps: float = Field(1e-8, gt=0)


class Adam(_Adaptive):
    """Adam (Kingma and Ba 2015)."""

    kind = "adam"
    torch_class = torch.optim.Adam
    has_fused_kernel = True
    amsgrad: bool = False


class AdamW(_Adaptive):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    kind = "adamw"
    torch_class = torch.optim.AdamW
    has_fused_kernel = True
    amsgrad: bool = False
    weight_decay: float = Field(1e-2, ge=0)


class NAdam(_Adaptive):
    """Adam with Nesterov momentum (Dozat 2016)."""

    kind = "nadam"
    torch_class = torch.optim.NAdam
    lr: float = Field(2e-3, gt=0)


class RAdam(_Adaptive):
    """Adam with a rectified variance at the start (Liu et al. 2020)."""

    kind = "radam"
    torch_class = torch.optim.RAdam


class RMSprop(OptimizerSpec):
    """RMSprop (Tieleman and Hinton 2012)."""

    kind = "rmsprop"
    torch_class = torch.optim.RMSprop
    lr: float = Field(1e-2, gt=0)
    alpha: float = Field(0.99, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    centered: bool = False


class Adagrad(OptimizerSpec):
    """Adagrad (Duchi et al. 2011)."""

    kind = "adagrad"
    torch_class = torch.optim.Adagrad
    lr: float = Field(1e-2, gt=0)
    lr_decay: float = Field(0.0, ge=0)
    eps: float = Field(1e-10, gt=0)


Optimizer = Sgd | Adam | AdamW | NAdam | RAdam | RMSprop | Adagrad


def state_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, `momentum_buffer:layers.conv1.weight`; `names` in parameter order."""
    state = optimizer.state_dict()["state"]
    return {
        f"{key}:{names[index]}": torch.as_tensor(value)
        for index, entries in state.items()
        for key, value in entries.items()
        if value is not None
    }


def check_state_tensors(spec: OptimizerSpec, tensors: dict[str, Tensor], step: int) -> None:
    """Raise ValueError if `tensors` are not the state that this optimizer has after `step`.

    The expected state of a parameter is that of a single-element parameter after one step.
    """
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = spec.build([parameter])
    optimizer.step()
    expected = {key for key, value in optimizer.state[parameter].items() if value is not None}
    keys_of: dict[str, set[str]] = {}
    for entry in tensors:
        key, _, name = entry.partition(":")
        keys_of.setdefault(name, set()).add(key)
    if wrong := [name for name, keys in keys_of.items() if keys != expected]:
        raise ValueError(f"the optimizer's tensors of {wrong[0]} are not those of {spec.kind}")
    if step and expected and not keys_of:
        raise ValueError(f"the optimizer has no tensors after step {step:,}")


def load_state_tensors(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Load the output of `state_tensors` into the optimizer. `names` are in parameter order.

    Tensors of a parameter's shape take its memory layout, which fused kernels need. Raises KeyError for an unknown
    parameter, ValueError for a tensor of another type or shape than expected.
    """
    pairs = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    parameters = dict(zip(names, pairs, strict=True))
    for entry, value in tensors.items():
        key, name = entry.split(":", 1)
        parameter, group = parameters[name]
        if value.dtype != torch.float32:
            raise ValueError(f"{entry} is {value.dtype}, not torch.float32")
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter).copy_(value)
        elif value.dim():
            raise ValueError(f"{entry} has shape {list(value.shape)}, its parameter {list(parameter.shape)}")
        # As in torch's own loading, step counts are on the CPU, except for fused kernels.
        on_cpu = value.dim() == 0 and not group.get("fused")
        optimizer.state[parameter][key] = value.clone() if on_cpu else value.to(parameter.device)
