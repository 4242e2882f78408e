"""Optimizers, under PyTorch's names, and the moving average of the weights."""

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
    """Their peak learning rate; by default the optimizer's."""
    weight_decay: float | None = Field(None, ge=0)
    """By default the optimizer's."""

    @model_validator(mode="after")
    def _sets_something(self) -> Self:
        if self.lr is None and self.weight_decay is None:
            raise ValueError(f"the group {self.params!r} gives neither lr nor weight_decay")
        return self

    def has_parameter(self, name: str) -> bool:
        """Whether the parameter of that name is one of the group's."""
        return name.startswith(f"{self.params}.") or fnmatchcase(name, self.params)


class OptimizerSpec(Kind):
    """One of torch's optimizers with torch's own settings and defaults."""

    main = "lr"
    torch_class: ClassVar[type[torch.optim.Optimizer]]
    has_fused_kernel: ClassVar[bool] = False  # whether torch has it in one kernel on CPU and CUDA

    lr: float = Field(1e-3, gt=0)
    """The peak learning rate; the schedule multiplies it."""
    weight_decay: float = Field(0.0, ge=0)
    groups: list[ParameterGroup] = []
    """Parameters with settings of their own; each takes those of the first group that names it."""

    def parameter_groups(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """torch's parameter groups, the optimizer's own last; `names` beside `params`, `peak` is the rate to scale."""
        given = list(named)
        rest = ParameterGroup(params="*", lr=self.lr)
        members: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in given:
            place = next(
                (place for place, group in enumerate(self.groups) if group.has_parameter(name)), len(self.groups)
            )
            members.setdefault(place, []).append((name, parameter))
        return [
            {
                "names": [name for name, _ in inside],
                "params": [parameter for _, parameter in inside],
                "peak": self.lr if group.lr is None else group.lr,
                "weight_decay": self.weight_decay if group.weight_decay is None else group.weight_decay,
            }
            for place, group in enumerate([*self.groups, rest])
            if (inside := members.get(place))
        ]

    def unused_groups(self, names: Iterable[str]) -> list[ParameterGroup]:
        """The groups that get no parameter of these: none is so named, or earlier groups take them all."""
        first = {
            next((place for place, group in enumerate(self.groups) if group.has_parameter(name)), None)
            for name in names
        }
        return [group for place, group in enumerate(self.groups) if place not in first]

    def build(self, parameters: Iterable[nn.Parameter] | list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over parameters or groups of them, fused where torch can."""
        settings: dict[str, Any] = self.model_dump(exclude={"groups"})
        if self.has_fused_kernel:
            settings["fused"] = True
        return self.torch_class(parameters, **settings)


class Sgd(OptimizerSpec):
    """Stochastic gradient descent, with momentum where given."""

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
    """Adam with weight decay apart from the gradient (Loshchilov and Hutter 2019)."""

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
        f"{key}:{names[number]}": torch.as_tensor(value)
        for number, entries in state.items()
        for key, value in entries.items()
        if value is not None
    }


def check_state_tensors(spec: OptimizerSpec, tensors: dict[str, Tensor], step: int) -> None:
    """Raises ValueError where these are not the tensors that such an optimizer has for a parameter after `step`.

    What it has is what it has for a parameter of one number after one step.
    """
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = spec.build([parameter])
    optimizer.step()
    expected = {key for key, value in optimizer.state[parameter].items() if value is not None}
    found: dict[str, set[str]] = {}
    for entry in tensors:
        key, _, name = entry.partition(":")
        found.setdefault(name, set()).add(key)
    if wrong := [name for name, keys in found.items() if keys != expected]:
        raise ValueError(f"the optimizer's tensors of {wrong[0]} are not those of {spec.kind}")
    if step and expected and not found:
        raise ValueError(f"the optimizer has no tensors after step {step}")


def load_state_tensors(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """The inverse of `state_tensors`. Tensors of a parameter's shape take its memory layout, as fused kernels need.

    Raises KeyError for a parameter that there is not, ValueError for a tensor that is not of its shape.
    """
    groups = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    parameters = dict(zip(names, groups, strict=True))
    for entry, value in tensors.items():
        key, name = entry.split(":", 1)
        parameter, group = parameters[name]
        if value.dtype != torch.float32:
            raise ValueError(f"{entry} is of {value.dtype}")
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter).copy_(value)
        elif value.dim():
            raise ValueError(f"{entry} is {list(value.shape)}, its parameter {list(parameter.shape)}")
        # A step count lives on the CPU, but beside the parameter for fused kernels: as torch's own loading has it.
        on_cpu = value.dim() == 0 and not group.get("fused")
        optimizer.state[parameter][key] = value.clone() if on_cpu else value.to(parameter.device)
