"""Networks built from the zoo or from YAML text, and single layers built from the example of their kind."""

from __future__ import annotations

import torch
from pydantic import TypeAdapter

from cnnrun.config import yaml_reader
from cnnrun.config.spec import union_members
from cnnrun.contracts.facts import DataFacts
from cnnrun.experiment import config_file
from cnnrun.model.layers import Leaf
from cnnrun.model.network import build_network
from cnnrun.model.structures import Node
from cnnrun.tasks.classification import Classify

LAYER_KINDS = union_members(Leaf)
NODE, NODES = TypeAdapter(Node), TypeAdapter(list[Node])


def zoo_experiment(name: str, image: tuple[int, int, int]):
    channels, height, width = image
    image_section = f"image: {{size: [{height}, {width}], channels: {channels}}}"
    text = f"task: classify\nmodel: {name}\ndata: {{source: {{folder: x}}, {image_section}}}"
    return config_file.parse_config(text, "f")


def build_from_zoo(name: str, image: tuple[int, int, int], classes: int):
    made = zoo_experiment(name, image)
    facts = DataFacts(tuple(map(str, range(classes))), image, (0.0,) * image[0], (1.0,) * image[0])
    return build_network(made.model.layers, made.task.bind(facts))


def facts_of_shape(*shape: int) -> DataFacts:
    zeros = (0.0,) * shape[0]
    return DataFacts(tuple("0123456789"), shape, zeros, tuple(1.0 for _ in zeros))


def build_from_text(text: str, *shape: int):
    nodes, _, problems = yaml_reader.parse_value(text, "f")
    assert not problems
    return build_network(NODES.validate_python(nodes), Classify().bind(facts_of_shape(*shape)))


def example_layer(kind):
    return NODE.validate_python({kind.kind: dict(kind.example)})


def example_shapes(kind, batch: int):
    """Shapes of a batch of the kind's example inputs. A layer of several inputs gets two."""
    return [(batch, *kind.example_shape)] * (2 if kind.has_several_inputs else 1)


def random_inputs(kind, batch=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in example_shapes(kind, batch)]
