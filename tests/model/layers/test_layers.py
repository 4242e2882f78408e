"""Every layer kind of the union `Leaf`; the tests take the kinds from the union, not from a list."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cnnrun.config.spec import union_members
from cnnrun.model.layers import Leaf
from cnnrun.model.layers.activation import Activation
from cnnrun.model.layers.norm import Norm
from cnnrun.model.network import materialize
from tests.support.networks import LAYER_KINDS, NODE, build_from_text, example_layer, example_shapes, random_inputs


def build_example(kind, device="cpu"):
    with torch.device(device):
        return example_layer(kind).build(kind.example_shape)


@pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda kind: kind.kind)
def test_the_output_shape_on_the_meta_device_equals_the_real_one(kind):
    real = build_example(kind)(*random_inputs(kind))
    meta = build_example(kind, "meta")(*[torch.empty(shape, device="meta") for shape in example_shapes(kind, 3)])
    assert meta.shape == real.shape


@pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda kind: kind.kind)
def test_the_part_that_is_run_for_the_shape_gives_the_shape_of_the_whole_layer(kind):
    layer = example_layer(kind)
    module, inputs = layer.build(kind.example_shape).eval(), random_inputs(kind)
    with torch.no_grad():
        assert layer.shape_module(module)(*inputs).shape == module(*inputs).shape


PARTS = [f"norm: {kind.kind.removesuffix('_norm')}" for kind in union_members(Norm)] + [
    f"activation: {kind.kind}" for kind in union_members(Activation)
]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "layer",
    [
        "conv: {out_channels: 8, stride: 2",
        "conv_transpose: {out_channels: 8",
        "linear: {out_features: 8, each_position: true",
    ],
)
def test_norms_and_activations_keep_the_shape_of_the_layer_before_them(layer, part):
    built = build_from_text("[{" + f"{layer}, {part}" + "}}, flatten]", 3, 12, 12)
    first = materialize(built.network, 0).eval().layers[0]
    with torch.no_grad():
        assert tuple(first(torch.rand(2, 3, 12, 12)).shape[1:]) == built.rows[0].out_shape


@pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda kind: kind.kind)
def test_every_parameter_and_input_gets_a_gradient(kind):
    torch.manual_seed(0)
    module = build_example(kind).double()
    inputs = [tensor.requires_grad_() for tensor in random_inputs(kind, dtype=torch.float64)]
    out = module(*inputs)
    (out * torch.randn_like(out)).sum().backward()
    for name, tensor in [*module.named_parameters(), *((f"input {i}", t) for i, t in enumerate(inputs))]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda kind: kind.kind)
def test_reset_parameters_gives_the_weights_of_the_constructor(kind):
    """Built on the meta device and then reset equals built directly, for the same seed: nothing stays uninitialised."""
    torch.manual_seed(3)
    expected = build_example(kind).state_dict()
    late = build_example(kind, "meta").to_empty(device="cpu")
    torch.manual_seed(3)
    for module in late.modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            module.reset_parameters()
    assert late.state_dict().keys() == expected.keys()
    for name, value in late.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda kind: kind.kind)
def test_a_layer_spec_is_equal_after_dumping_and_validating(kind):
    once = example_layer(kind)
    assert NODE.validate_python(NODE.dump_python(once)) == once


@pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda kind: kind.kind)
def test_batched_equals_one_by_one_in_eval_mode(kind):
    module = build_example(kind).double().eval()
    inputs = random_inputs(kind, dtype=torch.float64)
    singles = [module(*[tensor[i : i + 1] for tensor in inputs]) for i in range(3)]
    assert torch.allclose(module(*inputs), torch.cat(singles), rtol=1e-10, atol=1e-12)


class SideBySide(nn.Module):
    """All layers side by side in one graph: one export of them all takes as long as that of a single layer."""

    def __init__(self, modules: dict[str, nn.Module], several: dict[str, int]) -> None:
        super().__init__()
        self.leaves = nn.ModuleDict({f"leaf_{name}": module for name, module in modules.items()})
        self.several = several

    def forward(self, *inputs):
        taken, outputs = iter(inputs), []
        for name, module in self.leaves.items():
            outputs.append(module(*[next(taken) for _ in range(self.several[name])]))
        return tuple(outputs)


@pytest.mark.slow
def test_every_layer_exported_to_onnx_matches_at_two_batch_sizes(tmp_path):
    import onnxruntime

    from cnnrun.export.onnx import silence_exporter

    torch.manual_seed(0)
    module = SideBySide(
        {kind.kind: build_example(kind) for kind in LAYER_KINDS},
        {f"leaf_{k.kind}": 1 + k.has_several_inputs for k in LAYER_KINDS},
    )
    for parameter in module.parameters():  # zeros and ones would hide a swapped weight
        nn.init.normal_(parameter, std=0.5)
    module.eval()
    inputs = [tensor for kind in LAYER_KINDS for tensor in random_inputs(kind, 3)]
    dims = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    with silence_exporter():
        torch.onnx.export(module, tuple(inputs), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=(dims,))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch in (3, 1):
        inputs = [tensor for kind in LAYER_KINDS for tensor in random_inputs(kind, batch)]
        fed = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), inputs, strict=True)}
        with torch.no_grad():
            expected = module(*inputs)
        for kind, ours, theirs in zip(LAYER_KINDS, expected, session.run(None, fed), strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-4, atol=1e-5, err_msg=kind.kind)


@pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda kind: kind.kind)
def test_every_layer_kind_has_a_docstring_of_its_own(kind):
    assert kind.__doc__
    assert kind.__doc__ != union_members(Leaf)[0].__base__.__doc__
    for field in kind.model_fields.values():
        assert field.annotation is not None
