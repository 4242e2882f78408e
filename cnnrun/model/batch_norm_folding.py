"""Folding of batch norms into the convolutions before them, for networks that only predict."""

from __future__ import annotations

import copy
import itertools
from typing import TypeVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Net = TypeVar("Net", bound=nn.Module)


def fold_batch_norms(network: Net) -> Net:
    """Return a copy of a network in eval mode whose batch norms are part of the convolutions that they follow.

    Outputs are equal up to rounding. A batch norm stays where another layer may take the convolution's output.
    """
    folded = copy.deepcopy(network)
    for chain in folded.modules():
        if isinstance(chain, nn.Sequential):
            _fold_in_chain(chain)
    return folded


def _fold_in_chain(chain: nn.Sequential) -> None:
    for (conv_name, conv), (norm_name, norm) in itertools.pairwise(list(chain.named_children())):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            setattr(chain, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(chain, norm_name, nn.Identity())
