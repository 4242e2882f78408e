"""Embedding losses equal their papers' formulas in float64, in value and in gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cnnrun.config.spec import union_members
from cnnrun.tasks.embedding.losses import (
    AngularMargin,
    ArcFace,
    CosFace,
    EmbeddingLoss,
    EmbeddingLossSpec,
    NormFace,
    Triplet,
    TripletCriterion,
)

PEOPLE, DIMENSION, BATCH = 7, 5, 24


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def example(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings, labels and centres of other lengths, in float64."""
    draw = torch.Generator().manual_seed(seed)
    embeddings = unit(torch.randn(BATCH, DIMENSION, generator=draw, dtype=torch.float64))
    labels = torch.randint(PEOPLE, (BATCH,), generator=draw)
    return embeddings, labels, 3 * torch.randn(PEOPLE, DIMENSION, generator=draw, dtype=torch.float64)


def plain(kind: str, x: Tensor, labels: Tensor, centres: Tensor, scale: float, margin: float) -> Tensor:
    """The papers' formulas by angles, one sample and one class at a time."""
    losses = []
    for i, label in enumerate(labels.tolist()):
        logits = []
        for k in range(len(centres)):
            cosine = (x[i] * centres[k]).sum() / centres[k].square().sum().sqrt()
            if k == label and kind == "arcface":
                theta = torch.acos(cosine)
                turned = torch.cos(theta + margin)
                cosine = turned if theta.item() + margin < math.pi else -2 - turned
            elif k == label and kind == "cosface":
                cosine = cosine - margin
            logits.append(scale * cosine)
        losses.append(torch.logsumexp(torch.stack(logits), 0) - logits[label])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("spec", "margin"), [(ArcFace(margin=0.5, scale=30), 0.5), (CosFace(margin=0.35), 0.35), (NormFace(scale=16), 0.0)]
)
def test_margin_losses_equal_the_papers_in_value_and_gradient(spec, margin, seed):
    x, labels, centres = example(seed)
    criterion = spec.build(DIMENSION, torch.arange(PEOPLE)).double()
    criterion.set_progress(1.0)
    with torch.no_grad():
        criterion.centres.copy_(centres)
    ours_x, theirs_x, theirs_c = (each.clone().requires_grad_() for each in (x, x, centres))
    (ours,) = criterion(ours_x, {"labels": labels}).values()
    theirs = plain(spec.kind, theirs_x, labels, theirs_c, spec.scale, margin)
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-10)
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(criterion.centres.grad, theirs_c.grad, rtol=1e-8, atol=1e-10)


def test_the_true_class_gradient_includes_the_margin():
    """A well-known implementation gets this wrong: d cos(theta + m) / d cos(theta) is sin(theta + m) / sin(theta)."""
    criterion = AngularMargin(2, torch.arange(2), 30.0, 0.5)
    theta = torch.linspace(0.1, 2.5, 13, dtype=torch.float64)
    cosine = theta.cos().requires_grad_()
    criterion.apply_margin(cosine).sum().backward()
    assert torch.allclose(cosine.grad, (theta + 0.5).sin() / theta.sin(), rtol=1e-10)


@given(st.floats(0.0, 1.5), st.floats(-1, 1), st.floats(-1, 1))
def test_the_angular_margin_lowers_the_cosine_and_keeps_its_order(margin, one, other):
    criterion = AngularMargin(2, torch.arange(2), 30.0, margin)
    low, high = sorted((one, other))
    values = criterion.apply_margin(torch.tensor([low, high], dtype=torch.float64))
    assert values[0] <= values[1] + 1e-3  # sines smaller than float32 can tell from 0 are clamped
    assert (values <= torch.tensor([low, high]) + 1e-3).all()


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_an_embedding_on_its_centre_has_a_finite_gradient(value):
    criterion = ArcFace().build(2, torch.arange(2))
    criterion.set_progress(1.0)
    with torch.no_grad():
        criterion.centres.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    x = torch.tensor([[value, 0.0]], requires_grad=True)
    sum(criterion(x, {"labels": torch.tensor([0])}).values()).backward()
    assert x.grad.isfinite().all()
    assert criterion.centres.grad.isfinite().all()


def test_margins_warm_up():
    criterion = ArcFace(margin=0.4, warmup=0.5).build(2, torch.arange(2))
    margins = []
    for done in (0.0, 0.25, 0.5, 1.0):
        criterion.set_progress(done)
        margins.append(criterion.margin)
    assert margins == [0.0, 0.2, 0.4, 0.4]
    at_once = ArcFace(margin=0.4, warmup=0).build(2, torch.arange(2))
    at_once.set_progress(0.0)
    assert at_once.margin == 0.4


def test_classes_without_training_images_have_no_centre():
    place = torch.tensor([0, -1, 1, -1])
    criterion = NormFace().build(3, place)
    assert criterion.centres.shape == (2, 3)
    x = unit(torch.randn(4, 3))
    (loss,) = criterion(x, {"labels": torch.tensor([0, 2, 2, 0])}).values()
    dense = NormFace().build(3, torch.arange(2))
    dense.load_state_dict(criterion.state_dict())
    assert loss == dense(x, {"labels": torch.tensor([0, 1, 1, 0])})["cross_entropy"]


def plain_triplets(x: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Semi-hard triplets as FaceNet describes them, one pair at a time."""
    losses = []
    for a in range(len(x)):
        for p in range(len(x)):
            others = [n for n in range(len(x)) if labels[n] != labels[a]]
            if a == p or labels[a] != labels[p] or not others:
                continue
            near = (x[a] - x[p]).square().sum()
            far = {n: (x[a] - x[n]).square().sum() for n in others}
            further = {n: value for n, value in far.items() if value > near}
            chosen = min(further, key=lambda n: far[n]) if further else max(far, key=lambda n: far[n])
            losses.append((near - far[chosen] + margin).clamp(min=0))
    return torch.stack(losses).mean() if losses else (x * 0).sum()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([0.05, 0.2, 1.0]))
def test_triplets_are_semi_hard(seed, people, margin):
    x, labels, _ = example(seed)
    labels = labels % people
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = TripletCriterion(margin)(ours_x, {"labels": labels})["triplet"]
    theirs = plain_triplets(theirs_x, labels, margin)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9, abs=1e-12)
    ours.backward()
    theirs.backward()
    # Computing |a - b|^2 as 2 - 2 a b changes the gradient off the sphere but not along it.
    along = [g - (g * x).sum(1, keepdim=True) * x for g in (ours_x.grad, theirs_x.grad)]
    torch.testing.assert_close(*along, rtol=1e-8, atol=1e-10)


def test_a_batch_without_pairs_has_zero_loss_and_gradient():
    x = unit(torch.randn(4, 3)).requires_grad_()
    loss = Triplet().build(3, torch.arange(4))(x, {"labels": torch.arange(4)})["triplet"]
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("kind", [kind for kind in union_members(EmbeddingLoss) if kind is not Triplet])
def test_a_batch_in_parts_has_the_same_gradient(kind: type[EmbeddingLossSpec]):
    x, labels, centres = example(3)
    criterion = kind().build(DIMENSION, torch.arange(PEOPLE)).double()
    criterion.set_progress(1.0)
    with torch.no_grad():
        criterion.centres.copy_(centres)
    (whole,) = criterion(x, {"labels": labels}).values()
    whole.backward()
    expected = criterion.centres.grad.clone()
    criterion.centres.grad = None
    for part in torch.arange(BATCH).split(10):
        (loss,) = criterion(x[part], {"labels": labels[part]}).values()
        (loss * len(part) / BATCH).backward()
    torch.testing.assert_close(criterion.centres.grad, expected, rtol=1e-10, atol=1e-12)
