"""Box losses equal torchvision's bit for bit."""

from __future__ import annotations

import pytest
import torch
from torchvision import ops

from cnnrun.tasks.detection.box_losses import box_loss

TORCHVISION = {
    "ciou": ops.complete_box_iou_loss,
    "diou": ops.distance_box_iou_loss,
    "giou": ops.generalized_box_iou_loss,
}


def boxes(seed: int, places: int = 12) -> torch.Tensor:
    """Boxes on a coarse grid: pairs are disjoint, nested, touching at sides or corners, or equal."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, places, (4000, 2), generator=generator)
    size = torch.randint(1, places // 2, (4000, 2), generator=generator)
    return torch.cat([corner, corner + size], 1).float().view(4, 1000, 4)


@pytest.mark.parametrize("kind", TORCHVISION)
@pytest.mark.parametrize("scale", [1.0, 7.3, 1e-3])
def test_box_losses_equal_torchvisions_bit_for_bit(kind, scale):
    mine, true = boxes(0) * scale, boxes(1) * scale
    assert torch.equal(box_loss(kind, mine, true), TORCHVISION[kind](mine, true))


@pytest.mark.parametrize("kind", TORCHVISION)
def test_box_loss_gradients_equal_torchvisions(kind):
    mine, theirs = (boxes(0).double().requires_grad_() for _ in range(2))
    true = boxes(1).double()
    loss, expected = box_loss(kind, mine, true), TORCHVISION[kind](theirs, true)
    weight = torch.rand(loss.shape, generator=torch.Generator().manual_seed(2))
    (loss * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(mine.grad, theirs.grad, rtol=1e-12, atol=1e-14)
