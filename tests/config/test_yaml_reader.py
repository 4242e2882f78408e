from __future__ import annotations

import os
import string

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cnnrun.base.errors import ConfigError
from cnnrun.config import tree as tree_module
from cnnrun.config import yaml_reader
from cnnrun.config.tree import Map, Position, Seq


def plain(value):
    if isinstance(value, Map):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, Seq) else value


def parse_plain(text: str):
    tree, problems = yaml_reader.parse_yaml(text, "f")
    assert not problems, problems
    return plain(tree)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5.0e-4", 0.0005),
        ("-1.5", -1.5),
        (".5", 0.5),
        ("10", 10),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ('"010"', "010"),
        ("'yes'", "yes"),
        ("1.2.3", "1.2.3"),
        ("2026-01-01", "2026-01-01"),
        ("$width", "$width"),
    ],
)
def test_scalars_are_read_as_their_plain_values(text, value):
    got = parse_plain(f"a: {text}")["a"]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("010", "octal"),
        ("1:30", "base 60"),
        ("1_000", "underscore"),
        ("0x10", "decimal"),
        ("yes", "true"),
        ("off", "true"),
        ("True", "true"),
        (".inf", "finite"),
        (".nan", "finite"),
        ("1e999", "too large"),
        ("9" * 5000, "digits"),
    ],
)
def test_ambiguous_scalars_are_reported_at_their_position(text, word):
    tree, problems = yaml_reader.parse_yaml(f"a: 1\nb:\n  c: {text}\n", "f.yaml")
    assert [str(problem.position) for problem in problems] == ["f.yaml:3:6"]
    assert word in problems[0].message
    assert problems[0].path == "b.c"
    assert tree["b"]["c"] is tree_module.INVALID


def test_every_ambiguous_scalar_of_a_file_is_reported():
    _, problems = yaml_reader.parse_yaml("a: 010\nb: [yes, 1:30]\na: 2\n", "f")
    assert [problem.position.line for problem in problems] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "f:1:1: the config is empty"),
        ("# only a comment", "f:1:1: the config is empty"),
        ("[1]", "f:1:1: expected a mapping"),
        ("word", "f:1:1: expected a mapping"),
        ("a: 1\n---\nb: 2\n", "f:2:1: a second document"),
        ("a:\n\t- 1\n", "f:2:1: a tab"),
        ("a: [1, 2\nb: 3", "f:2:2"),
        ("a: !!python/object/apply:os.system [x]", "f:1:4: tag"),
        ("a: !!binary aGk=", "f:1:4: tag"),
        ("a: &a [*a]", "f:1:8: alias *a contains itself"),
        ("a: *b", "f:1:4: alias *b has no anchor"),
        ("? [1, 2]\n: 3", "f:1:3: a key must be a word"),
        ("1: a", "f:1:1: key '1' must be a word"),
        ("true: a", "f:1:1: key 'true' must be a word"),
        ("a: {<<: 3}", "f:1:5: `<<` takes a mapping"),
        ("a: b\0c", "is not allowed in YAML"),
    ],
)
def test_invalid_documents_are_refused_in_one_line(text, expected):
    with pytest.raises(ConfigError) as refused:
        yaml_reader.parse_yaml(text, "f")
    assert len(refused.value.lines) == 1
    assert expected in refused.value.lines[0]


def test_nesting_and_expanded_size_are_bounded():
    deep = "a: " + "[" * 200_000
    with pytest.raises(ConfigError, match="nested deeper than 32"):
        yaml_reader.parse_yaml(deep, "f")
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
    )
    with pytest.raises(ConfigError, match="more than 50,000 values"):
        yaml_reader.parse_yaml(bomb, "f")


def test_anchors_and_merge_keys_are_expanded():
    tree = parse_plain("base: &b {x: 1, y: 2}\nc: {<<: *b, y: 3}\nd: {<<: [*b, {z: 4}]}\n")
    assert tree["c"] == {"y": 3, "x": 1}
    assert tree["d"] == {"x": 1, "y": 2, "z": 4}


def test_only_regular_utf8_files_of_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "big").write_text("a: " + "x" * yaml_reader.MAX_BYTES)
    (tmp_path / "latin").write_bytes(b"a: \xff")
    for name, word in (
        ("fifo", "regular"),
        (".", "regular"),
        ("big", "bytes"),
        ("latin", "UTF-8"),
        ("none", "No such"),
    ):
        with pytest.raises(ConfigError, match=word):
            yaml_reader.read_yaml(tmp_path / name)
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbfa: 1")
    assert yaml_reader.read_yaml(tmp_path / "bom")[0] == {"a": 1}


def test_positions_point_at_keys_and_values():
    tree, _ = yaml_reader.parse_yaml("a:\n  - b: {c: 5}\n", "f")
    nowhere = Position("f", 9, 9)
    assert str(tree_module.find_position(tree, ("a", 0, "b", "c"), nowhere)) == "f:2:12"
    assert str(tree_module.find_position(tree, ("a", 0, "b", "c"), nowhere, at_key=True)) == "f:2:9"
    assert str(tree_module.find_position(tree, ("a", 0, "b", "unknown"), nowhere)) == "f:2:8"
    assert tree_module.path_text(tree, ("a", 0, "b", "c")) == "a[0].b.c"


def is_plain_word(text: str) -> bool:
    """Return whether cnnrun reads the word as text; PyYAML leaves some that it refuses, such as oN, without quotes."""
    return text == text.strip() and not any(pattern.fullmatch(text) for pattern, _ in yaml_reader._AMBIGUOUS)


words = st.text(string.ascii_letters + " é_-", max_size=8).filter(is_plain_word)
scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
trees = st.dictionaries(
    words.filter(bool),
    st.recursive(
        scalars | words, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)
    ),
    min_size=1,
    max_size=4,
)


@given(trees)
@example({"a": "on", "b": ["Yes", "null", "12"]})
@settings(max_examples=200, deadline=None)
def test_yaml_written_by_pyyaml_is_read_back_equal(tree):
    assert parse_plain(yaml.safe_dump(tree, allow_unicode=True)) == tree


@given(st.text(max_size=200))
@example("a: [*x]")
@example("%YAML 1.1\n---\na: 1")
@example("? ")
@example("\x85")
@settings(max_examples=500, deadline=None)
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        yaml_reader.parse_yaml(text, "f")
    except ConfigError as error:
        assert len(error.lines) == 1
        assert error.lines[0].startswith("f:")


@given(st.text(alphabet="ab:-[]{}&*!|>'\"%@`#,? \n\t0129.~<$", max_size=80))
@settings(max_examples=500, deadline=None)
def test_any_punctuation_is_read_or_refused(text):
    try:
        yaml_reader.parse_yaml(text, "f")
    except ConfigError as error:
        assert error.lines[0].startswith("f:")
