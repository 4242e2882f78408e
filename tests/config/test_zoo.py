"""The zoo's networks equal torchvision's, or the paper's where torchvision has none."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnnrun.config import yaml_reader, zoo
from cnnrun.model.layers.dropout import DropSample
from cnnrun.model.network import Network, flops, materialize
from cnnrun.model.tensor_matching import match_in_order
from tests.support.networks import build_from_zoo, zoo_experiment

BIG = {"vgg11", "vgg16_bn", "alexnet", "zfnet", "wide_resnet50_2", "unet"}
WITHOUT_AUX = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}


class LeNet5(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(
                nn.Conv2d(1, 6, 5, padding=2),
                nn.Tanh(),
                nn.AvgPool2d(2),
                nn.Conv2d(6, 16, 5),
                nn.Tanh(),
                nn.AvgPool2d(2),
            ),
            *(nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
        )


class ZFNet(nn.Sequential):
    def __init__(self) -> None:
        norm = [nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)]
        super().__init__(
            *(
                nn.Conv2d(3, 96, 7, 2, 1),
                *norm,
                nn.Conv2d(96, 256, 5, 2),
                *norm,
                nn.Conv2d(256, 384, 3, padding=1),
                nn.ReLU(),
            ),
            *(
                nn.Conv2d(384, 384, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(384, 256, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(3, 2),
            ),
            *(
                nn.Flatten(),
                nn.Linear(9216, 4096),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(4096, 4096),
                nn.ReLU(),
                nn.Dropout(),
            ),
            nn.Linear(4096, 1000),
        )


class BasicA(nn.Module):
    """A block of ResNet-20 with the paper's option A, as He et al. 2016 describe it."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.stride, self.more = stride, width - channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        half = self.more // 2
        return F.relu(out + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half)))


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [(16, 16)] * 3 + [(16, 32)] + [(32, 32)] * 2 + [(32, 64)] + [(64, 64)] * 2
        self.blocks = nn.Sequential(*[BasicA(a, b, b // a) for a, b in widths])
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


class UNet(nn.Module):
    """Ronneberger et al. 2015, figure 1, with padding and batch norm; then the mean, as a backbone."""

    def __init__(self) -> None:
        super().__init__()
        widths = [64, 128, 256, 512, 1024]
        self.down = nn.ModuleList(self.two(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList()
        for width in reversed(widths[:-1]):
            self.up.append(nn.ConvTranspose2d(2 * width, width, 2, 2))
            self.up.append(self.two(2 * width, width))
        self.fc = nn.Linear(64, 10)

    @staticmethod
    def two(a: int, b: int) -> nn.Sequential:
        def unit(channels: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

        return nn.Sequential(*unit(a), *unit(b))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.down:
            x = stage(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        skips.pop()
        for enlarge, merge in zip(self.up[::2], self.up[1::2], strict=True):
            x = merge(torch.cat([skips.pop(), enlarge(x)], 1))
        return self.fc(x.mean((2, 3)))


class PyramidMeans(nn.Module):
    """torchvision's ResNet-18 with FeaturePyramidNetwork, and the concatenated means of its levels."""

    def __init__(self) -> None:
        from torchvision.models import resnet18
        from torchvision.ops import FeaturePyramidNetwork

        super().__init__()
        self.body = resnet18()
        self.fpn = FeaturePyramidNetwork([64, 128, 256, 512], 256)
        self.fc = nn.Linear(1024, 1000)
        del self.body.fc

    def forward(self, x: Tensor) -> Tensor:
        body, levels = self.body, {}
        x = body.maxpool(body.relu(body.bn1(body.conv1(x))))
        for number in (1, 2, 3, 4):
            x = levels[str(number)] = getattr(body, f"layer{number}")(x)
        return self.fc(torch.cat([level.mean((2, 3)) for level in self.fpn(levels).values()], 1))

    def in_order_of_use(self) -> dict[str, Tensor]:
        """The state dict in the order of the data flow: pyramid levels from coarsest to finest, then the outputs."""
        state = self.state_dict()
        inner = [key for number in (3, 2, 1, 0) for key in state if key.startswith(f"fpn.inner_blocks.{number}")]
        rest = [key for key in state if key.startswith("fpn.layer_blocks")]
        body = [key for key in state if key.startswith("body.")]
        return {key: state[key] for key in [*body, *inner, *rest, "fc.weight", "fc.bias"]}


class Cascade(nn.Module):
    """A network of MTCNN, as Zhang et al. 2016 describe it (figure 2), with the layers' weights in order of use."""

    def __init__(self, layers: list[nn.Module], features: int, outputs: list[int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.is_fully_convolutional = features == 32
        join = (
            (lambda count: nn.Conv2d(features, count, 1))
            if self.is_fully_convolutional
            else (lambda count: nn.Linear(features, count))
        )
        self.outputs = nn.ModuleList(map(join, outputs))
        self.fc = nn.Linear(sum(outputs), 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            # The authors' framework flattens with the columns first.
            x = layer(x.permute(0, 3, 2, 1).flatten(1) if isinstance(layer, nn.Linear) and x.dim() == 4 else x)
        face, *others = (output(x) for output in self.outputs)
        joined = torch.cat([face.softmax(1), *others], 1)
        return self.fc(joined.mean((2, 3)) if self.is_fully_convolutional else joined)


def convolutions(*widths: int, kernels: str, pools: str) -> list[nn.Module]:
    """Convolutions with PReLU; after each a max pool with this window, or none for 0."""
    layers: list[nn.Module] = []
    for (channels, width), kernel, pool in zip(itertools.pairwise(widths), kernels, pools, strict=True):
        layers += [nn.Conv2d(channels, width, int(kernel)), nn.PReLU(width)]
        layers += [nn.MaxPool2d(int(pool), 2, ceil_mode=True)] if int(pool) else []
    return layers


def proposal_network() -> nn.Module:
    return Cascade(convolutions(3, 10, 16, 32, kernels="333", pools="200"), 32, [2, 4])


def refinement_network() -> nn.Module:
    layers = convolutions(3, 28, 48, 64, kernels="332", pools="330")
    return Cascade([*layers, nn.Linear(576, 128), nn.PReLU(128)], 128, [2, 4])


def output_network() -> nn.Module:
    layers = convolutions(3, 32, 64, 64, 128, kernels="3332", pools="3320")
    return Cascade([*layers, nn.Linear(1152, 256), nn.PReLU(256)], 256, [2, 4, 10])


class FaceUnit(nn.Module):
    """A residual unit of dlib's face network; one that changes the width halves the size and pads with zeros."""

    def __init__(self, channels: int, width: int, is_down: bool) -> None:
        super().__init__()
        self.is_down = is_down
        self.conv1 = nn.Conv2d(channels, width, 3, 2 if is_down else 1, 0 if is_down else 1)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.conv1(x)))
        if self.is_down:
            x = F.avg_pool2d(x, 2)
            out = F.pad(out, (0, x.shape[3] - out.shape[3], 0, x.shape[2] - out.shape[2]))
            x = F.pad(x, (0, 0, 0, 0, 0, out.shape[1] - x.shape[1]))
        return F.relu(out + x)


class FaceResNet29(nn.Module):
    """dlib's `face_recognition_resnet_model_v1` with its scales and offsets in the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 7, 2)
        widths = [(32, False)] * 3 + [(64, True)] + [(64, False)] * 3 + [(128, True)] + [(128, False)] * 2
        widths += [(256, True), (256, False), (256, False), (256, True)]
        channels = [32, *(width for width, _ in widths)]
        self.units = nn.Sequential(*[FaceUnit(c, w, down) for c, (w, down) in zip(channels, widths, strict=False)])
        self.fc = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.units(F.max_pool2d(F.relu(self.stem(x)), 3, 2)).mean((2, 3)))


FACES = {
    "mtcnn_pnet": proposal_network,
    "mtcnn_rnet": refinement_network,
    "mtcnn_onet": output_network,
    "face_resnet29": FaceResNet29,
}
OWN = FACES | {"lenet5": LeNet5, "zfnet": ZFNet, "resnet20": ResNet20, "unet": UNet, "resnet18_fpn": PyramidMeans}


def reference(name: str) -> nn.Module:
    """The reference implementation, with random weights and batch-norm statistics other than 0 and 1."""
    import torchvision

    torch.manual_seed(0)
    if name in OWN:
        network = OWN[name]()
    else:
        network = torchvision.models.get_model(name, weights=None, **WITHOUT_AUX.get(name, {}))
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
            ):
                nn.init.uniform_(value, low, high, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 2.0, generator=generator)
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith("layer_scale"):  # the initial 1e-6 would hide the branch
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return network


def state_of(theirs: nn.Module) -> dict[str, Tensor]:
    return theirs.in_order_of_use() if isinstance(theirs, PyramidMeans) else theirs.state_dict()


def pair(name: str, image: tuple[int, int, int]) -> tuple[Network, nn.Module, dict[str, str]]:
    """Our network with the reference's weights, the reference, and the map from our tensor names to its names."""
    theirs = reference(name)
    classes = zoo.read_entry(name).classes
    ours = materialize(build_from_zoo(name, image, classes).network, 0)
    given = state_of(theirs)
    mapping = match_in_order(
        {key: value for key, value in ours.state_dict().items() if not key.startswith("normalize.")}, given
    )
    ours.load_state_dict({key: given[other] for key, other in mapping.items()}, strict=False)
    return ours, theirs, mapping


def mark_slow(names: list[str], slow: set[str]) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.parametrize("name", mark_slow(zoo.network_names(), BIG))
def test_outputs_equal_the_reference_bit_for_bit(name):
    entry = zoo.read_entry(name)
    ours, theirs, mapping = pair(name, entry.image)
    assert len(mapping) == len(theirs.state_dict())
    pictures = torch.randn(2, *entry.image, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(ours.eval()(pictures), theirs.eval()(pictures))


def without_chance(network: nn.Module) -> nn.Module:
    from torchvision.ops import StochasticDepth

    for module in network.modules():
        if isinstance(module, nn.Dropout | StochasticDepth | DropSample):
            module.p = 0.0
    return network.double().train()


@pytest.mark.parametrize(
    "name", mark_slow(zoo.network_names(), BIG | {"inception_v3", "densenet121", "resnext50_32x4d", "convnext_tiny"})
)
def test_training_gradients_equal_the_references(name):
    image = zoo.read_entry(name).image
    side = {"inception_v3": 128, "zfnet": 224, "unet": 32, "face_resnet29": 150}.get(name, min(96, image[1]))
    ours, theirs, mapping = pair(name, (image[0], side, side))
    pictures = torch.randn(3, image[0], side, side, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for network in (ours, theirs):
        out = without_chance(network)(pictures)
        (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        expected = gradients[mapping[key]]
        assert parameter.grad.shape == expected.shape, key
        scale = float(torch.linalg.vector_norm(expected, torch.inf))
        # In parts, because a gigabyte for each intermediate result costs more than the computation.
        for ours_part, theirs_part in zip(parameter.grad.split(64), expected.split(64), strict=True):
            assert torch.allclose(ours_part, theirs_part, rtol=1e-10, atol=1e-12 * scale), key


@pytest.mark.parametrize("name", zoo.network_names())
def test_an_entrys_parameter_and_mac_counts_equal_the_built_networks(name):
    entry = zoo.read_entry(name)
    made = build_from_zoo(name, entry.image, entry.classes)
    assert made.parameter_count == entry.parameters
    macs = sum(flops(made)) / 2
    assert float(f"{macs:.3g}") == float(f"{entry.macs:.3g}")
    assert "arXiv:" in entry.paper or name == "lenet5"
    assert len(zoo.network_yaml(name).splitlines()) <= 90


@pytest.mark.parametrize("name", [name for name in zoo.network_names() if name not in OWN])
def test_parameter_and_mac_counts_equal_torchvisions(name):
    import torchvision

    published = torchvision.models.get_model_weights(name).DEFAULT.meta
    entry = zoo.read_entry(name)
    if name not in WITHOUT_AUX:  # torchvision counts the auxiliary heads' parameters
        assert entry.parameters == published["num_params"]
    # torchvision publishes three decimals, for its evaluation size
    assert round(entry.macs / 1e9, 3) == pytest.approx(published["_ops"], abs=0.0011)


@pytest.mark.parametrize("name", zoo.network_names())
def test_every_top_level_layer_with_weights_has_a_name(name):
    made = build_from_zoo(name, zoo.read_entry(name).image, 10)
    given = {layer.name for layer in zoo_experiment(name, zoo.read_entry(name).image).model.layers}
    for key, module in made.network.layers.named_children():
        assert key in given or not module.state_dict(), key


@pytest.mark.parametrize("name", zoo.network_names())
def test_a_small_grey_image_works_or_the_layer_that_fails_is_named(name):
    from cnnrun.base.errors import ConfigError

    try:
        network = materialize(build_from_zoo(name, (1, 28, 28), 10).network, 0).eval()
    except ConfigError as refused:
        for line in refused.lines:
            assert line.startswith(f"f:2:8: zoo/{name}.yaml:"), line
            shrunk = ("give a larger data.image.size", "differ beyond the channels", "are not one shape")
            assert any(words in line for words in shrunk), line
    else:
        with torch.no_grad():
            assert network(torch.rand(2, 1, 28, 28) * 255).shape == (2, 10)


def test_the_settings_of_a_zoo_network_keep_their_order():
    keys = ["weights", *"hgfedcba"]
    tree, _ = yaml_reader.parse_yaml(f"model: {{zoo: lenet5, {', '.join(f'{key}: 1' for key in keys)}}}", "f")
    zoo.expand_model(tree, ())
    assert list(tree["model"]) == ["layers", *keys]
