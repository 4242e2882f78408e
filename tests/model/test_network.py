from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from cnnrun.model.builder import BuildError
from cnnrun.model.network import flops, materialize
from tests.support.networks import build_from_text

LENET = """
- conv: {out_channels: 6, kernel_size: 5, activation: relu}
- max_pool
- conv: {out_channels: 16, kernel_size: 5, padding: 0, activation: relu}
- max_pool
- flatten
- linear: {out_features: 120, activation: relu}
- linear: {out_features: 84, activation: relu}
"""


def problem(text: str, *shape: int) -> tuple[tuple, str]:
    with pytest.raises(BuildError) as refused:
        build_from_text(text, *shape)
    found = refused.value.problems[0]
    return found.path, found.message


def test_lenet_has_61706_parameters():
    made = build_from_text(LENET, 1, 28, 28)
    assert made.parameter_count == 61_706
    assert sum(row.parameters for row in made.rows) == 61_706
    assert [row.out_shape for row in made.rows[:4]] == [(6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 5, 5)]
    # The published receptive fields of LeNet-5's layers.
    assert [row.receptive_field for row in made.rows[:4]] == [(5, 5), (6, 6), (14, 14), (16, 16)]
    counts = flops(made)
    assert counts[0] == 2 * 6 * 28 * 28 * 5 * 5
    assert counts[2] == 2 * 16 * 10 * 10 * 6 * 5 * 5
    assert counts[-1] == 2 * 84 * 10
    assert counts[1] == 0


def test_initial_weights_equal_pytorchs_in_construction_order():
    network = materialize(build_from_text(LENET, 1, 28, 28).network, seed=5)
    torch.manual_seed(5)
    plain = [nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)]
    expected = [tensor for module in plain for tensor in module.state_dict().values()]
    given = [value for name, value in network.state_dict().items() if not name.startswith("normalize")]
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_names_in_the_state_dict_are_readable():
    network = build_from_text(
        "- conv: {out_channels: 2, norm: batch, name: stem}\n- conv: 3\n- global_avg_pool", 1, 4, 4
    ).network
    names = [name for name in network.state_dict() if name.startswith(("layers", "head"))]
    assert names[0] == "layers.stem.conv.weight"
    assert "layers.conv1.weight" in names
    assert names[-1] == "head.bias"


def test_linked_layers_equal_the_network_written_by_hand():
    network = materialize(
        build_from_text(
            """
            - conv: {out_channels: 4, name: a}
            - conv: {out_channels: 4, stride: 2}
            - upsample: {scale_factor: 2, name: up}
            - concat: [up, a]
            - conv: {out_channels: 4, name: b}
            - add: {from: [a, b]}
            - residual: {layers: [{conv: 4}, {multiply: [a, b]}]}
            - global_avg_pool
            """,
            1,
            8,
            8,
        ).network,
        seed=0,
    )
    layers = network.layers
    x = torch.randn(2, 1, 8, 8)
    a = layers.a(x)
    up = layers.up(layers.conv1(a))
    b = layers.b(torch.cat([up, a], 1))
    y = a + b
    y = a * b + y  # the last layer of the residual takes its inputs by link and ignores the conv
    expected = network.head(y.mean((2, 3)))
    assert torch.equal(network(x), expected)


@pytest.mark.parametrize(("stride", "channels", "shape"), [(1, 4, (4, 8, 8)), (2, 6, (6, 4, 4)), (1, 6, (6, 8, 8))])
def test_a_residual_shortcut_is_adapted_to_the_output_shape(stride, channels, shape):
    made = build_from_text(
        f"""
        - conv: 4
        - residual:
            norm: batch
            activation: relu
            layers: [{{conv: {{out_channels: {channels}, stride: {stride}, norm: batch}}}}]
        - global_avg_pool
        """,
        1,
        8,
        8,
    )
    network = materialize(made.network, 0)
    block = network.layers.residual1
    x = torch.randn(2, 4, 8, 8)
    out = block(x)
    assert tuple(out.shape[1:]) == shape
    assert torch.equal(out, torch.relu(block.layers(x) + block.shortcut(x)))
    assert isinstance(block.shortcut, nn.Identity) == (shape == (4, 8, 8))
    assert sum(row.parameters for row in made.rows) == made.parameter_count


@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize("norm", ["", "norm: batch, "])
def test_a_shortcut_conv_has_the_stride_of_its_layers_and_no_bias_before_a_norm(size, norm):
    layers = "[{conv: {out_channels: 4, stride: 2}}, {conv: 4}]"
    made = build_from_text(f"- residual: {{{norm}layers: {layers}}}\n- global_avg_pool", 2, size, size)
    shortcut = materialize(made.network, 0).layers.residual1.shortcut
    (conv,) = [module for module in shortcut.modules() if isinstance(module, nn.Conv2d)]
    assert conv.stride == (2, 2)
    assert (conv.bias is None) == bool(norm)
    assert made.layers["layers.residual1"].out_shape == (4, -(-size // 2), -(-size // 2))


def test_links_inside_a_shortcut_equal_the_network_written_by_hand():
    text = """
    - conv: {out_channels: 4, name: a}
    - conv: {out_channels: 4}
    - residual: {layers: [{conv: 4}], shortcut: [{conv: 4}, {multiply: [a]}]}
    - global_avg_pool
    """
    text = text.replace("{multiply: [a]}", "{conv: {out_channels: 4, name: b}}, {multiply: [a, b]}")
    network = materialize(build_from_text(text, 1, 8, 8).network, 0)
    layers, x = network.layers, torch.randn(2, 1, 8, 8)
    a = layers.a(x)
    inner = layers.conv1(a)
    block = layers.residual1
    b = block.shortcut.b(block.shortcut.conv1(inner))
    expected = network.head((block.layers(inner) + a * b).mean((2, 3)))
    torch.testing.assert_close(network(x), expected)


def test_each_repetition_has_its_own_weights():
    network = build_from_text(
        "- conv: 4\n- repeat: {times: 3, layers: [{conv: 4}]}\n- global_avg_pool", 1, 8, 8
    ).network
    assert [name for name in network.state_dict() if "repeat" in name and "weight" in name] == [
        f"layers.repeat1.{n}.conv1.weight" for n in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    "structure",
    [
        "sequential: [LAYERS]",
        "repeat: {times: 2, layers: [LAYERS]}",
        "residual: {layers: [LAYERS]}",
        "residual: {layers: [{conv: 2}], shortcut: [LAYERS]}",
        "parallel: {branches: [[LAYERS], []]}",
    ],
)
def test_a_layer_name_is_visible_only_later_in_its_own_list(structure):
    inside = structure.replace("LAYERS", "{conv: {out_channels: 2, name: here}}, {add: [here, outside]}")
    before = "- conv: {out_channels: 2, name: outside}"
    assert build_from_text(f"{before}\n- {inside}\n- global_avg_pool", 1, 8, 8).parameter_count
    where, message = problem(f"{before}\n- {inside}\n- conv: {{from: [here]}}\n- global_avg_pool", 1, 8, 8)
    assert where == ("model", 2, "conv", "from")
    assert "no earlier layer is named 'here'; earlier names: outside" in message


def test_branches_cannot_link_to_each_others_layers():
    branches = "[[{conv: {out_channels: 2, name: here}}], [{conv: {out_channels: 2, from: [here]}}]]"
    where, message = problem(f"- parallel: {{branches: {branches}}}\n- global_avg_pool", 1, 8, 8)
    assert where == ("model", 0, "parallel", "branches", 1, 0, "conv", "from")
    assert "no earlier layer is named 'here'" in message


def test_parallel_branches_are_concatenated_added_or_multiplied():
    for merge, channels in (("concat", 7), ("add", 3), ("multiply", 3)):
        second = 4 if merge == "concat" else 3
        made = build_from_text(
            f"- parallel: {{merge: {merge}, branches: [[{{conv: 3}}], [{{conv: {second}}}]]}}\n- global_avg_pool",
            1,
            8,
            8,
        )
        block = materialize(made.network, 0).layers.parallel1
        x = torch.randn(2, 1, 8, 8)
        a, b = block.branch1(x), block.branch2(x)
        expected = {"concat": lambda: torch.cat([a, b], 1), "add": lambda: a + b, "multiply": lambda: a * b}[merge]()
        assert torch.equal(block(x), expected)
        assert made.rows[-1].in_shape == (channels,)


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("- linear: 3", ("model", 0, "linear"), "(1, 8, 8): linear needs a vector (features,); add `flatten`"),
        ("- max_pool: 16\n- flatten", ("model", 0, "max_pool"), "a window of 16x16 does not fit a map of 8x8"),
        ("- conv: {kernel_size: 9, padding: 0}", ("model", 0, "conv"), "a window of 9x9 does not fit a map of 8x8"),
        ("- conv: {kernel_size: 2}", ("model", 0, "conv"), "even kernel; give padding"),
        (
            "- conv: {out_channels: 4, groups: 3}",
            ("model", 0, "conv"),
            "1 input channels do not divide into 3 groups",
        ),
        ("- flatten\n- conv: 3", ("model", 1, "conv"), "(64,): conv needs feature maps"),
        ("- conv: 3", ("model",), "the task's head (classify) cannot take (3, 8, 8)"),
        (
            "- concat: [a, b]",
            ("model", 0, "concat", "from"),
            "no earlier layer is named 'a'; no earlier layer has a name",
        ),
        ("- conv: {out_channels: 2, name: a}\n- add: [b]", ("model", 1, "add", "from"), "earlier names: a"),
        (
            "- conv: {out_channels: 2, name: a}\n- conv: {out_channels: 2, name: a}",
            ("model", 1, "conv", "name"),
            "'a' appears twice",
        ),
        ("- conv: {out_channels: 2, name: forward}", ("model", 0, "conv", "name"), "an attribute of PyTorch's modules"),
        (
            "- conv: {out_channels: 2, name: a}\n- conv: {out_channels: 3, name: b}\n- add: [a, b]",
            ("model", 2, "add"),
            "(2, 8, 8) and (3, 8, 8) are not one shape",
        ),
        ("- conv: {out_channels: 2, name: a}\n- conv: {from: [a, a]}", ("model", 1, "conv"), "takes one input"),
        (
            "- residual: {shortcut: identity, layers: [{conv: 2}]}",
            ("model", 0, "residual"),
            "its layers give (2, 8, 8), the identity (1, 8, 8)",
        ),
        (
            "- parallel: {branches: [[{conv: 2}], [{max_pool: 2}]]}",
            ("model", 0, "parallel"),
            "its branches give (2, 8, 8) and (1, 4, 4), which do not concat",
        ),
        (
            "- repeat: {times: 4, layers: [{max_pool: 2}]}",
            ("model", 0, "repeat", "layers", 0, "max_pool"),
            "a window of 2x2 does not fit a map of 1x1",
        ),
        ("- pad: {padding: 9, mode: reflect}", ("model", 0, "pad"), "must be smaller than the feature map"),
        ("- group_norm: 3", ("model", 0, "group_norm"), "1 channels do not divide into 3 groups"),
    ],
)
def test_an_invalid_layer_is_reported_with_shape_cause_and_fix(text, path, words):
    where, message = problem(text, 1, 8, 8)
    assert where == path
    assert words in message
    assert "; " in message


def test_mistakes_in_two_branches_are_both_reported():
    with pytest.raises(BuildError) as refused:
        build_from_text("- parallel: {branches: [[{max_pool: 9}], [{linear: 2}]]}", 1, 8, 8)
    assert len(refused.value.problems) == 2


def test_the_summary_has_the_shapes_of_the_built_network():
    made = build_from_text(LENET, 1, 28, 28)
    network = materialize(made.network, 0)
    shapes = []
    for module in network.layers:
        module.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape[1:])))
    network(torch.zeros(1, 1, 28, 28))
    assert [row.out_shape for row in made.rows[:-1]] == shapes
    assert [network.get_submodule(row.module) is not None for row in made.rows]


@pytest.mark.slow
def test_structures_and_links_exported_to_onnx_give_the_networks_outputs(tmp_path):
    import numpy as np
    import onnxruntime

    from cnnrun.export.onnx import silence_exporter

    network = materialize(
        build_from_text(
            """
            - conv: {out_channels: 4, name: a, activation: relu}
            - repeat:
                times: 2
                layers: [{residual: {norm: batch, activation: relu, layers: [{conv: {out_channels: 4, norm: batch}}]}}]
            - parallel: {branches: [[{conv: 3}], [{max_pool: {kernel_size: 3, stride: 1, padding: 1}}], []]}
            - conv: {out_channels: 4, stride: 2}
            - upsample: {scale_factor: 2, name: up}
            - concat: [up, a]
            - repeat: {times: 2, layers: [{conv: {out_channels: 8, name: here}}, {add: [here, here]}]}
            - global_avg_pool
            """,
            1,
            8,
            8,
        ).network,
        seed=0,
    ).eval()
    example = torch.randn(2, 1, 8, 8)
    with silence_exporter():
        torch.onnx.export(
            network,
            (example,),
            tmp_path / "m.onnx",
            input_names=["x"],
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = torch.randn(batch, 1, 8, 8)
        with torch.no_grad():
            np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], network(x).numpy(), atol=1e-5)


def test_a_name_that_equals_an_automatic_one_loses_no_layer():
    """Regression: a layer named conv2 once replaced the second unnamed conv."""
    for text in (
        "- conv: {out_channels: 8, name: conv2}\n- conv: 8\n- conv: 8",
        "- conv: 8\n- conv: {out_channels: 8, name: conv1}\n- conv: 8",
    ):
        made = build_from_text(f"{text}\n- global_avg_pool", 1, 8, 8)
        assert sum(row.parameters for row in made.rows) == made.parameter_count
        assert len(made.network.layers) == 4
        materialize(made.network, 0)(torch.zeros(2, 1, 8, 8))


def test_a_residual_row_includes_its_activation_and_the_receptive_field_of_its_shortcut():
    made = build_from_text(
        """
        - residual:
            activation: prelu
            layers: [{conv: {kernel_size: 1}}]
            shortcut: [{conv: {kernel_size: 5}}]
        - conv: {kernel_size: 1}
        - global_avg_pool
        """,
        1,
        8,
        8,
    )
    assert sum(row.parameters for row in made.rows) == made.parameter_count
    assert made.rows[-3].receptive_field == (5, 5)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("- max_pool: {kernel_size: 2, padding: 1, dilation: 2}\n- flatten", "in the padding alone"),
        (
            "- conv_transpose: {out_channels: 2, kernel_size: 3, stride: 1, output_padding: 1}\n- flatten",
            "not less than",
        ),
    ],
)
def test_layers_that_only_the_meta_device_accepts_are_refused(text, why):
    """Found by random networks: minus infinity from a pool, a traceback from a transposed convolution."""
    assert why in problem(text, 1, 1, 1)[1]


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("ceil_mode", [True, False])
def test_a_max_pool_is_refused_exactly_where_a_window_holds_only_padding(size, ceil_mode):
    from cnnrun.contracts.layer import ShapeError
    from cnnrun.model.layers.pool import MaxPool

    for kernel, stride, padding, dilation in itertools.product((1, 2, 3, 4), (1, 2, 3), (0, 1, 2), (1, 2, 3)):
        settings = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        try:
            plain = nn.MaxPool2d(**settings, ceil_mode=ceil_mode)
            finite = bool(plain(torch.zeros(1, 1, size, size)).isfinite().all())
        except RuntimeError:
            continue  # refused by PyTorch itself
        try:
            MaxPool(**settings, ceil_mode=ceil_mode).build((1, size, size))
            refused = False
        except ShapeError:
            refused = True
        assert refused != finite, settings


@pytest.mark.parametrize(
    "then", ["activation: prelu", "activation: gelu", "norm: batch", "norm: layer, activation: prelu"]
)
def test_a_linear_layer_at_each_position_equals_a_1x1_convolution(then):
    made = {}
    for kind, body in (("linear", "out_features: 5, each_position: true"), ("conv", "out_channels: 5, kernel_size: 1")):
        network = materialize(build_from_text(f"- {kind}: {{{body}, {then}}}\n- flatten", 3, 4, 6).network, 0)
        made[kind] = network.double().eval()
    weights = [value.reshape(-1) for value in made["linear"].state_dict().values()]
    for value, given in zip(made["conv"].state_dict().values(), weights, strict=True):
        value.copy_(given.view_as(value))
    pictures = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert torch.allclose(made["linear"](pictures), made["conv"](pictures), rtol=1e-12)


def test_a_conv_may_be_depthwise():
    made = build_from_text("- conv: {groups: depthwise}\n- flatten", 3, 4, 4)
    assert made.network.layers.conv1.groups == 3


@pytest.mark.parametrize("name", ["training", "append", "forward", "_modules", "inputs", "kept", "layers", "weight_"])
@pytest.mark.parametrize("link", ["", "- add: {from: [NAME]}\n"])
def test_a_layer_name_that_a_module_already_has_is_refused(name, link):
    text = f"- conv: {{name: {name}, out_channels: 2}}\n{link.replace('NAME', name)}- flatten"
    if name == "weight_":
        assert build_from_text(text, 1, 4, 4).parameter_count
    else:
        assert "is an attribute of PyTorch's modules" in problem(text, 1, 4, 4)[1]


def test_image_shape_and_flops_are_right_when_a_parallel_comes_first():
    made = build_from_text("- parallel: [[], []]\n- conv: 8\n- flatten", 1, 4, 4)
    assert made.image_shape == (1, 4, 4)
    assert flops(made)[0] == 2 * 8 * 16 * 2 * 9
