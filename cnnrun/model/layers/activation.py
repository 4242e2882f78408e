"""Activations, under PyTorch's names. Those in `Activation` are also settings of other layers."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator
from torch import nn

from cnnrun.contracts.layer import LayerSpec, Shape


class ActivationSpec(LayerSpec):
    """An activation; its fields are the arguments of PyTorch's `module`."""

    module: ClassVar[type[nn.Module]]

    def build(self, in_shape: Shape) -> nn.Module:
        return self.module(**self.settings())

    def shape_module(self, module: nn.Module) -> nn.Module:
        return nn.Identity()

    def settings(self) -> dict[str, Any]:
        """The module's arguments: the fields of the spec, under PyTorch's names."""
        return {key: getattr(self, key) for key in type(self).model_fields if key not in ("name", "from_")}


class Relu(ActivationSpec):
    """max(0, x)."""

    kind = "relu"
    module = nn.ReLU


class Relu6(ActivationSpec):
    """min(max(0, x), 6)."""

    kind = "relu6"
    module = nn.ReLU6


class LeakyRelu(ActivationSpec):
    """x if x > 0, else negative_slope * x."""

    kind = "leaky_relu"
    main = "negative_slope"
    module = nn.LeakyReLU
    negative_slope: float = Field(0.01, ge=0)


class Prelu(ActivationSpec):
    """LeakyReLU with a learned slope per channel."""

    kind = "prelu"
    module = nn.PReLU

    def build(self, in_shape: Shape) -> nn.Module:
        return nn.PReLU(in_shape[0])


class Elu(ActivationSpec):
    """x if x > 0, else alpha * (exp(x) - 1)."""

    kind = "elu"
    main = "alpha"
    module = nn.ELU
    alpha: float = Field(1.0, gt=0)


class Celu(ActivationSpec):
    """ELU with a continuous derivative for every alpha (Barron 2017)."""

    kind = "celu"
    main = "alpha"
    module = nn.CELU
    alpha: float = Field(1.0, gt=0)


class Selu(ActivationSpec):
    """Self-normalizing ELU (Klambauer et al. 2017)."""

    kind = "selu"
    module = nn.SELU


class Gelu(ActivationSpec):
    """x times the normal distribution function of x."""

    kind = "gelu"
    module = nn.GELU


class Silu(ActivationSpec):
    """x * sigmoid(x), also called swish."""

    kind = "silu"
    module = nn.SiLU


class Mish(ActivationSpec):
    """x * tanh(softplus(x))."""

    kind = "mish"
    module = nn.Mish


class Sigmoid(ActivationSpec):
    """1 / (1 + exp(-x))."""

    kind = "sigmoid"
    module = nn.Sigmoid


class Tanh(ActivationSpec):
    """Hyperbolic tangent."""

    kind = "tanh"
    module = nn.Tanh


class Hardsigmoid(ActivationSpec):
    """Piecewise linear approximation of the sigmoid."""

    kind = "hardsigmoid"
    module = nn.Hardsigmoid


class Hardswish(ActivationSpec):
    """x * hardsigmoid(x)."""

    kind = "hardswish"
    module = nn.Hardswish


class Hardtanh(ActivationSpec):
    """x limited to [min_val, max_val]."""

    kind = "hardtanh"
    module = nn.Hardtanh
    min_val: float = -1.0
    max_val: float = 1.0

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.min_val >= self.max_val:
            raise ValueError("min_val must be less than max_val")
        return self


class Softplus(ActivationSpec):
    """log(1 + exp(x))."""

    kind = "softplus"
    module = nn.Softplus


class Softsign(ActivationSpec):
    """x / (1 + |x|)."""

    kind = "softsign"
    module = nn.Softsign


class Softmax(LayerSpec):
    """Softmax over the channels or features."""

    kind = "softmax"

    def build(self, in_shape: Shape) -> nn.Module:
        return nn.Softmax(1)


Activation = (
    Relu
    | Relu6
    | LeakyRelu
    | Prelu
    | Elu
    | Celu
    | Selu
    | Gelu
    | Silu
    | Mish
    | Sigmoid
    | Tanh
    | Hardsigmoid
    | Hardswish
    | Hardtanh
    | Softplus
    | Softsign
)


def make_in_place(module: nn.Module) -> nn.Module:
    """Let an activation overwrite its input if PyTorch can. Use it only if no other layer reads that input."""
    if isinstance(module, nn.ReLU | nn.ReLU6 | nn.LeakyReLU | nn.Hardswish | nn.SiLU):
        module.inplace = True
    return module
