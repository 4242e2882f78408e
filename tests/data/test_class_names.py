"""Class names: reading cells, validating names, warning of similar names, and words for missing values."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnrun.base.errors import DataError
from cnnrun.base.file_sequences import is_hidden_or_system_name
from cnnrun.data.class_names import (
    check_class_names,
    clean_cell,
    implausible_class_names,
    missing_value_problem,
    numbered_classes,
    quote_names,
    similar_names,
)
from cnnrun.data.image_names import SUFFIXES, is_image_name

PAIRS = [
    ("Cat", "cat"),
    ("cat ", "cat"),
    ("hot dog", "hot_dog"),
    ("hot  dog", "hot-dog"),
    ('"cat"', "cat"),
    ("\u201ccat\u201d", "cat"),
    ("01", "1"),
    ("1.0", "1"),
    ("caf\u00e9", "cafe\u0301"),
    ("cat\u200b", "cat"),
    ("cat\u00ad", "cat"),
    ("cat\u00a0x", "cat x"),
    ("\ufb01n", "fin"),
    ("STRASSE", "stra\u00dfe"),
]


@pytest.mark.parametrize("pair", PAIRS)
def test_similar_names_are_quoted_distinguishably(pair):
    assert similar_names(["dog", *pair]) == [list(pair)]
    one, other = quote_names(pair)
    assert one != other
    assert all(letter.isprintable() for letter in one + other)


@pytest.mark.parametrize(
    "pair", [("1", "-1"), ("1", "10"), ("1.5", "15"), ("resume", "r\u00e9sum\u00e9"), ("a", "b"), ("c", "c++")]
)
def test_different_names_are_not_similar(pair):
    assert similar_names(pair) == []


@given(
    st.text(min_size=1),
    st.sampled_from([str.upper, str.title, lambda t: f" {t}\t", lambda t: f'"{t}"', lambda t: f"\u200b{t}"]),
)
def test_a_rewritten_name_is_similar_or_equal(name, rewrite):
    other = rewrite(name)
    groups = similar_names([name, other]) if other != name else [[name, other]]
    lossless = unicodedata.normalize("NFKC", name).casefold() == unicodedata.normalize("NFKC", other).casefold()
    assert groups or not lossless


@pytest.mark.parametrize("label", ["nan", "NaN", "None", "null", "NULL", "N/A", "NA", "n/a", "<NA>", "#N/A", "NaT"])
def test_a_word_for_a_missing_value_is_a_class_only_if_declared(label):
    assert missing_value_problem(label)
    with pytest.raises(DataError, match="stands for a missing value"):
        check_class_names(["cat", label], "data.source.folder", are_declared=False)
    check_class_names(["cat", label], "data.source.folder", are_declared=True)


@pytest.mark.parametrize("label", ["none", "na", "Nan", "nano", "unknown", "0", "-"])
def test_words_close_to_missing_values_are_names(label):
    assert missing_value_problem(label) is None


@pytest.mark.parametrize("name", ["", " ", "\u200b", "\u00a0", "\ufeff", "a\udcff"])
def test_invisible_or_undecodable_names_are_refused(name):
    with pytest.raises(DataError, match="no visible letter|not valid UTF-8"):
        check_class_names(["cat", name], "data.source.table", are_declared=True)


@pytest.mark.parametrize(
    ("cell", "text"), [(" cat ", "cat"), ("\ufeffcat", "cat"), ("\u00a0cat\u2003", "cat"), ("a b", "a b")]
)
def test_a_cell_is_read_without_surrounding_space(cell, text):
    assert clean_cell(cell) == text


@pytest.mark.parametrize("stray", [255, 999_999])
def test_a_stray_label_number_is_refused(stray):
    labels = np.array([0, 1, 2] * 10 + [stray])
    with pytest.raises(
        DataError, match=rf"only 4 different ones \(0, 1, 2, {stray}\); is {stray}, which occurs 1 time"
    ):
        numbered_classes(labels, "d.npz", "data.source.arrays.classes")


@given(st.sets(st.integers(0, 60), min_size=1))
def test_label_numbers_with_small_gaps_are_classes(used):
    labels = np.array(sorted(used))
    if max(used) < 2 * len(used) + 10:
        assert numbered_classes(labels, "d.npz", "classes") == [str(number) for number in range(max(used) + 1)]
    else:
        with pytest.raises(DataError, match=f"up to {max(used)}"):
            numbered_classes(labels, "d.npz", "classes")


def test_numeric_names_far_from_the_others_are_questionable():
    assert implausible_class_names(["0", "1", "2", "255"]) == ["255"]
    assert implausible_class_names(["-1", "0", "1"]) == ["-1"]
    assert implausible_class_names([str(number) for number in range(100)]) == []
    assert implausible_class_names(["0", "1", "cat", "255"]) == []


@pytest.mark.parametrize(
    "name", ["._a.png", ".DS_Store", "Thumbs.db", "thumbs.DB", "__MACOSX", "desktop.ini", ".ipynb_checkpoints"]
)
def test_clutter_files_are_not_images(name):
    assert is_hidden_or_system_name(name)
    assert not is_image_name(name)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_image_suffixes_match_in_any_case(suffix):
    for name in (f"a{suffix}", f"a{suffix.upper()}", f"a.b{suffix.title()}"):
        assert is_image_name(name)
    assert not is_image_name(f"a{suffix}.txt")
