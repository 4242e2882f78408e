from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnrun.base.errors import ConfigError
from cnnrun.config.spec import union_members
from cnnrun.contracts.facts import DataFacts
from cnnrun.data.settings import Data
from cnnrun.experiment import config_file
from cnnrun.experiment.schema import Experiment
from cnnrun.model.layers import Leaf
from cnnrun.model.network import build_network
from cnnrun.tasks.classification import Classify
from tests.support.configs import TINY

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def errors(text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as refused:
        config_file.parse_config(text, "f", overrides)
    return refused.value.lines


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_round_trip_through_yaml(path):
    once = config_file.read_config(path)
    assert once.name == path.stem
    assert config_file.parse_config(once.to_yaml(), "again") == once


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.epochs=7", lambda e: e.train.epochs == 7),
        ("train.optimizer.sgd.lr=1e-2", lambda e: e.train.optimizer.lr == 0.01),
        ("train.optimizer={adamw: {lr: 0.1}}", lambda e: e.train.optimizer.kind == "adamw"),
        ("train.ema={decay: 0.9}", lambda e: e.train.ema.decay == 0.9),
        ("train.ema.decay=0.9", lambda e: e.train.ema.decay == 0.9),
        ("task.classify.label_smoothing=0.1", lambda e: e.task.label_smoothing == 0.1),
        ("model[0].conv.out_channels=9", lambda e: e.model.layers[0].out_channels == 9),
        ("model.3.dropout=0.3", lambda e: e.model.layers[3].p == 0.3),
        ("model[1].max_pool.kernel_size=4", lambda e: e.model.layers[1].kernel_size == (4, 4)),
        ("data.augment.shift=0", lambda e: e.data.augment.shift == 0),
        ("name=other", lambda e: e.name == "other"),
    ],
)
def test_an_override_sets_its_value(override, value):
    assert value(config_file.parse_config(TINY, "f", [override]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", "argument 'train.epoch=3': train.epoch: unknown key; did you mean 'epochs'?"),
        ("train.epochs=0", "argument 'train.epochs=0': train.epochs: must be at least 1; got 0"),
        ("train.epochs", "write an override as key.path=value"),
        ("=3", "write an override as key.path=value"),
        ("model[9].conv=3", "model[9]: no such setting"),
        ("train.epochs=010", "train.epochs: '010'"),
        ("train.epochs=[1", "argument 'train.epochs=[1'"),
        ("train.optimizer.sgd.lr=fast", "expected a number; got 'fast'"),
        ("task.classify.x.y=1", "unknown key"),
    ],
)
def test_a_wrong_override_is_reported_with_its_argument(override, words):
    (line,) = errors(TINY, override)
    assert words in line
    assert line.startswith("argument '")


def test_overrides_that_name_two_optimizers_are_refused_with_the_fix():
    (line,) = errors(TINY, "train.optimizer=sgd", "train.optimizer.adamw.lr=0.1")
    assert "found sgd, adamw; keep one" in line
    assert "give the whole value" in line


def test_blocks_are_expanded_with_parameters_and_defaults():
    tried = config_file.parse_config(
        """
        task: classify
        data: {source: digits}
        blocks:
          unit:
            parameters: {width, norm: batch}
            layers: [{conv: {out_channels: $width, norm: $norm}}, relu]
          pair:
            parameters: {width}
            layers: [{unit: {width: $width}}, {unit: {width: $width, norm: {group: 2}}}]
        model:
          - unit: 4
          - pair: {width: 6, name: p}
          - concat: [p, p]
          - flatten
        """,
        "f",
    )
    first, pair = tried.model.layers[0], tried.model.layers[1]
    assert (first.layers[0].out_channels, first.layers[0].norm.kind) == (4, "batch_norm")
    assert (pair.name, pair.layers[0].layers[0].out_channels) == ("p", 6)
    assert pair.layers[1].layers[0].norm.num_groups == 2
    assert config_file.parse_config(tried.to_yaml(), "again") == tried


@pytest.mark.parametrize(
    ("block", "written"),
    [
        ("[{conv: {out_channels: $w}}]", "conv: {out_channels: 3, "),
        ("[{conv: {out_channels: $w}}, relu]", "sequential: {layers: [{conv: {out_channels: 3}}, relu], block: unit, "),
        ("[{residual: [{conv: {out_channels: $w}}]}]", "residual: {layers: [{conv: {out_channels: 3}}], "),
    ],
)
def test_name_and_from_of_a_block_apply_to_its_expansion(block, written):
    def layers(second: str) -> list:
        text = f"""
        task: classify
        data: {{source: digits}}
        blocks: {{unit: {{parameters: {{w}}, layers: {block}}}}}
        model:
          - conv: {{out_channels: 4, name: first}}
          - conv: {{out_channels: 5}}
          - {second}
          - add: [second, second]
          - flatten
        """
        return config_file.parse_config(text, "f").model.layers

    used, expected = (
        layers("unit: {w: 3, name: second, from: [first]}"),
        layers(f"{written}name: second, from: [first]}}"),
    )
    assert used == expected
    assert (used[2].name, used[2].input_names()) == ("second", ["first"])
    network = build_network(used, Classify().bind(DataFacts(("a", "b"), (1, 8, 8)))).network
    assert {name.split(".")[1] for name in network.state_dict() if name.startswith("layers.")} == {
        "first", "conv1", "second",
    }  # fmt: skip


def test_a_mistake_in_a_block_is_reported_once_at_its_definition():
    (line,) = errors(
        """task: classify
data: {source: digits}
blocks:
  unit:
    layers: [{conv: {out_chanels: 3}}]
model: [unit, unit, flatten]
"""
    )
    assert line.startswith("f:5:22: model[0].unit.conv.out_chanels: unknown key")


def test_the_json_schema_contains_every_layer_kind():
    schema = Experiment.model_json_schema()
    text = str(schema)
    assert all(f"'{kind.kind}'" in text for kind in union_members(Leaf))
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Conv"]["properties"]["padding"]["description"].startswith("Zeros around the feature map")
    assert schema["$defs"]["Relu"]["properties"]["from"]["description"]


keys = st.sampled_from(["task", "data", "model", "train", "conv", "source", "digits", "flatten", "x", "layers", "from"])
leaves = (
    keys | st.integers(-3, 40) | st.booleans() | st.none() | st.floats(0, 1) | st.sampled_from(["relu", "val/loss"])
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))


@given(st.dictionaries(keys, values, max_size=4), st.lists(values, max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_yaml_tree_is_valid_or_refused_with_positions(tree, model):
    import yaml

    tree |= {"task": "classify", "data": {"source": "digits"}, "model": model}
    try:
        config_file.parse_config(yaml.safe_dump(tree), "f")
    except ConfigError as error:
        assert all(line.startswith("f:") for line in error.lines)


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["1e5", "12e03", ".5e3", "0o17", "010", "yes", "~", "1:30", "null", "N", "- a", "a: b", "#x", " a ", "1e3"]
)


@given(st.lists(names, min_size=2, max_size=4, unique=True))
@settings(max_examples=200, deadline=None)
def test_any_class_names_round_trip_through_yaml(classes):
    tried = config_file.parse_config(TINY, "f")
    source = {"folder": {"root": classes[0], "classes": classes}}
    data = Data.model_validate({"source": source, "image": {"size": 8, "channels": 1}})
    tried = tried.model_copy(update={"data": data})
    assert config_file.parse_config(tried.to_yaml(), "again") == tried


def test_a_layer_may_have_the_name_of_a_block():
    tried = config_file.parse_config(
        """
        task: classify
        data: {source: digits}
        blocks: {stem: {parameters: {w}, layers: [{conv: $w}]}}
        model: [{stem: {w: 4, name: stem}}, {conv: {out_channels: 4, name: two}}, {add: [stem, two]}, flatten]
        """,
        "f",
    )
    assert tried.model.layers[2].input_names() == ["stem", "two"]


def test_an_override_with_a_superscript_index_is_refused():
    (line,) = errors(TINY, "model[²]=3")
    assert "no such setting" in line


def test_the_json_schema_allows_blocks():
    from cnnrun.commands.kinds import json_schema

    schema = json_schema()
    assert "blocks" in schema["properties"]
    assert "maxProperties" in str(schema["properties"]["model"])
