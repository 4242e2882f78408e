"""Two pictures in one: mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019), each picture with its own part."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from cnnrun.colour import rectangles
from cnnrun.draws import Draws

_LEVELS = 4096


@cache
def _beta_quantiles(alpha: float) -> Tensor:
    """The quantiles of Beta(alpha, alpha) at the middles of _LEVELS equal parts of [0, 1]."""
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, (torch.arange(_LEVELS).double() + 0.5).numpy() / _LEVELS)).float()


def beta(alpha: float, uniform_B: Tensor) -> Tensor:
    """Beta(alpha, alpha) variables out of uniform ones, to 1 in 4096."""
    return _beta_quantiles(alpha).to(uniform_B.device)[(uniform_B * _LEVELS).long()]


def mixed(pictures: Tensor, partner_B: Tensor, draws: Draws, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Each picture with a part of another of the batch, and how much of it is its own: float32 [B].

    Where both are asked for, each picture is mixed in one of the two ways, half of them in each.
    """
    others = pictures[partner_B]
    height, width = pictures.shape[2:]
    cut_B = draws["mix"] < (0.5 if mixup and cutmix else float(bool(cutmix)))
    own_B = torch.ones_like(draws["mix"])
    weight = own_B[:, None, None, None]
    if mixup:
        own_B = beta(mixup, draws["mix_part"])
        weight = own_B[:, None, None, None]
    if cutmix:
        area = (1 - beta(cutmix, draws["mix_part"])) * height * width
        square = torch.full_like(area, height / width)
        patch = rectangles(area, square, draws["mix_y"], draws["mix_x"], height, width)
        # The labels follow the pixels that were really pasted, after rounding.
        own_B = torch.where(cut_B, 1 - patch.float().mean((1, 2)), own_B)
        pasted = (~patch).float()[:, None]
        weight = torch.where(cut_B[:, None, None, None], pasted, weight)
    return torch.lerp(others, pictures, weight.expand_as(pictures)), own_B
