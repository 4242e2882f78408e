from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import batched_nms, box_iou

from cnnrun.base import boxes as boxes_module
from cnnrun.base.boxes import intersection_over_union, non_maximum_suppression, pad_to


def boxes(seed: int, pictures: int, count: int, spread: float = 100.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(pictures, count, 2, generator=generator) * spread
    return torch.cat([corner, corner + 1 + 60 * torch.rand(pictures, count, 2, generator=generator)], 2)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 120), st.sampled_from([0.1, 0.45, 0.6, 0.9]))
@settings(max_examples=50, deadline=None)
def test_suppression_equals_torchvisions_image_by_image(seed, pictures, count, most):
    found = boxes(seed, pictures, count)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(pictures, count, generator=generator).sort(1, descending=True).values
    labels = torch.randint(0, 3, (pictures, count), generator=generator)
    kept = non_maximum_suppression(found, scores, labels, most)
    with pytest.MonkeyPatch.context() as without:
        without.setattr(boxes_module.torch, "ops", SimpleNamespace(torchvision=object()))
        assert torch.equal(
            non_maximum_suppression(found, scores, labels, most), kept
        )  # the fallback where torchvision's operators are missing
    for row in range(pictures):
        theirs = torch.zeros(count, dtype=torch.bool)
        theirs[batched_nms(found[row].double(), scores[row].double(), labels[row], most)] = True
        assert torch.equal(kept[row], theirs)


def test_a_chain_of_overlapping_boxes_keeps_every_second_one(monkeypatch):
    left = torch.arange(200.0)
    chain = torch.stack([left * 4, left * 0, left * 4 + 10, left * 0 + 10], 1)[None]
    monkeypatch.setattr(boxes_module.torch, "ops", SimpleNamespace(torchvision=object()))
    kept = non_maximum_suppression(
        chain, torch.linspace(1, 0.1, 200)[None], torch.zeros(1, 200, dtype=torch.int64), 0.4
    )
    assert kept[0].tolist() == [number % 2 == 0 for number in range(200)]


def test_iou_equals_torchvisions_and_is_0_for_boxes_without_area():
    ones, others = boxes(1, 2, 30), boxes(2, 2, 20)
    for row in range(2):
        assert torch.allclose(intersection_over_union(ones, others)[row], box_iou(ones[row], others[row]), atol=1e-6)
    nothing = torch.zeros(1, 2, 4)
    assert intersection_over_union(nothing, nothing).abs().max() == 0


def test_padding_fills_up_to_the_length_and_never_cuts():
    assert pad_to(torch.ones(2, 3), 5, -1.0)[0].tolist() == [1, 1, 1, -1, -1]
    assert pad_to(torch.ones(2, 3, 4), 2, 0.0).shape == (2, 3, 4)
