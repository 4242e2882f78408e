from __future__ import annotations

from typing import Annotated

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from cnnrun.config.spec import Kinds, union_members
from cnnrun.training.ema import Ema
from cnnrun.training.optimizers import Optimizer, ParameterGroup, check_state_tensors, load_state_tensors, state_tensors
from cnnrun.training.schedules import Schedule

OPTIMIZERS = union_members(Optimizer)
SCHEDULES = union_members(Schedule)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(memory_format=torch.channels_last)


def take_steps(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        net(torch.randn(5, 3, 4, 4, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.kind)
def test_each_optimizer_updates_like_pytorchs(kind):
    spec = kind(lr=0.01)
    ours, plain = network(), network()
    take_steps(ours, spec.build(ours.parameters()), range(4))
    take_steps(plain, kind.torch_class(plain.parameters(), lr=0.01), range(4))
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.kind)
def test_omitted_optimizer_settings_are_pytorchs_defaults(kind):
    theirs = kind.torch_class([nn.Parameter(torch.zeros(1))]).defaults
    ours = kind().build([nn.Parameter(torch.zeros(1))]).defaults
    assert {name: ours[name] for name in theirs if name != "fused"} == {
        name: value for name, value in theirs.items() if name != "fused"
    }


def test_a_parameter_group_matches_a_whole_name_or_a_pattern():
    assert ParameterGroup(params="layers.conv1", lr=1).has_parameter("layers.conv1.norm.weight")
    assert not ParameterGroup(params="layers.conv1", lr=1).has_parameter("layers.conv10.norm.weight")
    assert ParameterGroup(params="layers.conv*", lr=1).has_parameter("layers.conv10.norm.weight")
    assert not ParameterGroup(params="*.bias", lr=1).has_parameter("layers.conv1.weight")


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind.kind != "sgd"], ids=lambda kind: kind.kind)
def test_an_optimizer_state_with_missing_or_extra_tensors_is_refused(kind):
    net, spec = network(), kind()
    optimizer = spec.build(net.parameters())
    take_steps(net, optimizer, range(2))
    tensors = state_tensors(optimizer, [name for name, _ in net.named_parameters()])
    check_state_tensors(spec, tensors, 2)
    for name in tensors:
        with pytest.raises(ValueError, match=f"are not those of {kind.kind}"):
            check_state_tensors(spec, {key: value for key, value in tensors.items() if key != name}, 2)
    with pytest.raises(ValueError, match=f"are not those of {kind.kind}"):
        check_state_tensors(spec, tensors | {"other:0.weight": torch.zeros(1)}, 2)
    with pytest.raises(ValueError, match="no tensors after step 2"):
        check_state_tensors(spec, {}, 2)


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.kind)
def test_optimizer_state_restored_from_safetensors_continues_bit_for_bit(kind):
    import safetensors.torch

    settings = {"momentum": 0.9} if "momentum" in kind.model_fields else {}
    spec = kind(**settings)
    whole = network()
    take_steps(whole, spec.build(whole.parameters()), range(6))
    first = network()
    optimizer = spec.build(first.parameters())
    take_steps(first, optimizer, range(3))
    names = [name for name, _ in first.named_parameters()]
    written = {name: value.contiguous() for name, value in state_tensors(optimizer, names).items()}
    read = safetensors.torch.load(safetensors.torch.save(written))
    second = network()
    second.load_state_dict({name: value.contiguous() for name, value in first.state_dict().items()})
    again = spec.build(second.parameters())
    load_state_tensors(again, names, read)
    take_steps(second, again, range(3, 6))
    for a, b in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_moving_average_equals_the_formula():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    ema = Ema(net, 0.5)
    expected = net[0].weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            net[0].weight.add_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)).double())
            net[1].num_batches_tracked.fill_(step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net[0].weight
        assert torch.allclose(ema.average["0.weight"], expected, rtol=1e-12)
        assert int(ema.average["1.num_batches_tracked"]) == step


@pytest.mark.parametrize("kind", SCHEDULES, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_schedules_are_bounded_functions_of_the_step(kind, warmup):
    spec = kind(warmup=warmup) if "warmup" in kind.model_fields else kind(warmup_steps=round(100 * warmup))
    factors = [spec.factor(step, 100) for step in range(100)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) == pytest.approx(1, abs=1e-9)
    assert factors == [spec.factor(step, 100) for step in range(100)]
    if warmup:
        assert factors[0] == pytest.approx(spec.start)
        assert factors[:30] == sorted(factors[:30])
        assert factors[30] == pytest.approx(1)


@pytest.mark.parametrize("kind", SCHEDULES, ids=lambda kind: kind.kind)
def test_factors_before_the_decay_do_not_depend_on_the_length(kind):
    spec = kind()
    if (decay_start := spec.decay_start(100)) is None:
        return
    assert 0 < decay_start < spec.decay_start(150)
    for step in range(decay_start):
        assert spec.factor(step, 100) == spec.factor(step, 150)
    assert spec.factor(decay_start + 1, 100) < spec.factor(decay_start + 1, 150)


def test_schedules_have_known_values():
    read = TypeAdapter(Annotated[Schedule, Kinds()]).validate_python
    cosine = read({"cosine": {"end": 0.1}})
    assert cosine.factor(0, 10) == 1
    assert cosine.factor(5, 10) == pytest.approx(0.55)
    one = read({"one_cycle": {"warmup": 0.5, "start": 0.0, "end": 0.0, "anneal": "linear"}})
    assert [one.factor(step, 8) for step in range(8)] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25])
    stable = read({"warmup_stable_decay": {"decay": 0.5, "warmup_steps": 2, "start": 0.0, "end": 0.2}})
    assert [stable.factor(step, 8) for step in range(8)] == pytest.approx([0, 0.5, 1, 1, 1, 0.8, 0.6, 0.4])
    root = read({"warmup_stable_decay": {"decay": 0.5, "anneal": "sqrt"}})
    assert [root.factor(step, 8) for step in (3, 4, 5)] == pytest.approx([1, 1, 0.5])
    step = read({"step": [0.5, 0.75]})
    assert [step.factor(s, 8) for s in (0, 3, 4, 5, 6, 7)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_one_cycle_decays_like_pytorchs():
    from torch.optim.lr_scheduler import OneCycleLR

    spec = TypeAdapter(Annotated[Schedule, Kinds()]).validate_python({"one_cycle": {"end": 4e-7}})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    total, ours, theirs = 1000, [], []
    scheduler = OneCycleLR(optimizer, 1.0, total, cycle_momentum=False)
    for step in range(total):
        theirs.append(optimizer.param_groups[0]["lr"])
        ours.append(spec.factor(step, total))
        optimizer.step()
        scheduler.step()
    # The warmup differs from PyTorch's (ours is linear); the decay is the same curve.
    assert ours[300:] == pytest.approx(theirs[300:], abs=3e-3)
