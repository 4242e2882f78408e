from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cnnrun.base.errors import DataError
from cnnrun.base.user_paths import path_checker
from cnnrun.data.class_names import sort_class_names
from cnnrun.data.sources.table import Table
from cnnrun.data.sources.table_files import read_rows
from cnnrun.data.targets import float32_problem
from tests.support.images import save_picture


def write(path: Path, rows: list[list[str]], header=("path", "label"), **how) -> Path:
    with path.open("w", newline="", encoding=how.pop("encoding", "utf-8")) as file:
        csv.writer(file, **how).writerows([list(header), *rows])
    return path


def six(root: Path) -> list[list[str]]:
    return [[str(save_picture(root / f"{i}.png", seed=i).relative_to(root)), "ab"[i % 2]] for i in range(6)]


def test_a_table_is_read_row_by_row(tmp_path):
    rows = six(tmp_path)
    indexed = Table(path=str(write(tmp_path / "t.csv", rows))).read()
    assert indexed.classes == ("a", "b")
    split = indexed.splits["train"]
    assert [p.name for p in split.images] == [row[0] for row in rows]
    assert split.targets["labels"].tolist() == [0, 1, 0, 1, 0, 1]
    assert split.groups is None


def test_renamed_columns_splits_and_groups_are_read(tmp_path):
    rows = [
        [*row, where, who]
        for row, where, who in zip(six(tmp_path), ["train", "Valid", "TEST"] * 2, "xxyyzz", strict=True)
    ]
    path = write(tmp_path / "t.csv", rows, ("file", "kind", "fold", "patient"))
    table = Table(path=str(path), image="file", label="kind", split="fold", group="patient", classes=["b", "a"])
    indexed = table.read()
    assert {name: len(split) for name, split in indexed.splits.items()} == {"train": 2, "val": 2, "test": 2}
    assert indexed.splits["train"].targets["labels"].tolist() == [1, 0]
    assert indexed.splits["train"].groups.tolist() == [0, 1]
    assert indexed.splits["val"].groups.tolist() == [0, 2]


def test_tsv_bom_crlf_and_quotes_are_read(tmp_path):
    rows = [[row[0], f'say "{row[1]}", twice'] for row in six(tmp_path)]
    path = write(tmp_path / "t.tsv", rows, delimiter="\t", encoding="utf-8-sig", lineterminator="\r\n")
    assert Table(path=str(path)).read().classes == ('say "a", twice', 'say "b", twice')


def test_a_column_per_class_gives_the_label(tmp_path):
    rows = [[row[0], "1.0" if row[1] == "a" else "0", str(int(row[1] == "b"))] for row in six(tmp_path)]
    path = write(tmp_path / "t.csv", rows, ("path", "b", "a"))
    indexed = Table(path=str(path), label=["b", "a"]).read()
    assert indexed.classes == ("b", "a")
    assert indexed.splits["train"].targets["labels"].tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("cell", ["", "N/A", "inf", "nan", "0,5", "2", "=1", "yes"])
def test_an_invalid_class_cell_is_named_by_row_and_column(tmp_path, cell):
    rows = [[row[0], "1", "0"] for row in six(tmp_path)]
    rows[3][2] = cell
    path = write(tmp_path / "t.csv", rows, ("path", "a", "b"))
    with pytest.raises(DataError, match=r"t\.csv:5: b is"):
        Table(path=str(path), label=["a", "b"]).read()


def test_two_labels_in_a_row_are_refused(tmp_path):
    rows = [[row[0], "1", "1"] for row in six(tmp_path)]
    with pytest.raises(DataError, match="2 of the label columns are 1"):
        Table(path=str(write(tmp_path / "t.csv", rows, ("path", "a", "b"))), label=["a", "b"]).read()


def test_parquet_equals_csv(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [[*row, ["train", "val"][i // 3]] for i, row in enumerate(six(tmp_path))]
    write(tmp_path / "t.csv", rows, ("path", "label", "split"))
    columns = dict(zip(("path", "label", "split"), map(list, zip(*rows, strict=True)), strict=True))
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    ours, theirs = (Table(path=str(tmp_path / name)).read() for name in ("t.parquet", "t.csv"))
    assert ours.classes == theirs.classes
    for name, split in theirs.splits.items():
        assert list(ours.splits[name].images) == list(split.images)
        assert ours.splits[name].targets["labels"].tolist() == split.targets["labels"].tolist()
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read"):
        Table(path=str(tmp_path / "t.parquet")).read()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[2].__setitem__(1, ""), "t.csv:4: label is empty"),
        (lambda rows: rows[3].__setitem__(0, rows[0][0]), "t.csv:5: '0.png' is already in line 2"),
        (lambda rows: rows[2].append("more"), "t.csv:4: 3 cells; the first line has 2"),
        (lambda rows: rows.clear(), "no rows"),
        (lambda rows: rows[1].__setitem__(0, "../../etc/passwd"), "t.csv:3: '../../etc/passwd' leaves the root"),
        (lambda rows: rows[1].__setitem__(0, "/etc/passwd"), "is absolute"),
        (lambda rows: rows[1].__setitem__(0, "C:\\pets\\1.png"), "is a URL|is absolute"),
        (lambda rows: rows[1].__setitem__(0, "\\\\server\\1.png"), "is absolute"),
        (lambda rows: rows[1].__setitem__(0, "https://example.org/1.png"), "is a URL"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path, change, words):
    rows = six(tmp_path)
    change(rows)
    with pytest.raises(DataError, match=words):
        Table(path=str(write(tmp_path / "t.csv", rows))).read()


def test_a_colon_in_a_file_name_is_no_url(tmp_path):
    rows = six(tmp_path)
    rows.append([save_picture(tmp_path / "at 12:30.png", seed=9).name, "a"])
    assert len(Table(path=str(write(tmp_path / "t.csv", rows))).read().splits["train"]) == 7


def test_every_mistake_is_listed_up_to_a_limit(tmp_path):
    rows = [[row[0], ""] for row in six(tmp_path)]
    with pytest.raises(DataError) as refused:
        Table(path=str(write(tmp_path / "t.csv", rows))).read()
    assert len(refused.value.lines) == 6
    many = [[f"{i}.png", ""] for i in range(100)]
    with pytest.raises(DataError, match="and 80 more mistakes"):
        Table(path=str(write(tmp_path / "t.csv", many))).read()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "empty"),
        (b"path|label\na|b\n", "has no column 'path'"),
        (b"path,path\na,b\n", "appears twice"),
        (b"\xff\xfep\x00", "no rows"),
        (b"\xff\xfep", "not UTF-16"),
        (b"p\xff", "not UTF-8"),
        (b'path,label\n"a.png,b\n', "not a table"),
        (b"path,class\na.png,b\n", r"has no column 'label' \(columns: path, class\)"),
    ],
)
def test_files_that_are_not_tables_are_refused(tmp_path, text, words):
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(DataError, match=words):
        Table(path=str(tmp_path / "t.csv")).read()


@pytest.mark.parametrize("setting", ["label", "labels"])
def test_a_label_that_is_not_among_the_declared_classes_is_refused(tmp_path, setting):
    path = write(tmp_path / "t.csv", six(tmp_path))
    with pytest.raises(DataError, match=r"t\.csv:\d: 'b' is not in data\.source\.table\.classes"):
        Table(path=str(path), classes=["a", "z"], **{setting: "label"}).read()


def test_text_of_a_parquet_file_is_measured_in_bytes(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from cnnrun.base import bounded_files

    monkeypatch.setattr(bounded_files, "_MAX_EXPANSION", 1)
    monkeypatch.setattr(bounded_files, "_ALWAYS_ALLOWED_BYTES", 150_000)
    for letter, is_refused in (("e", False), ("é", True)):  # 100,000 characters: as many bytes, and twice as many
        columns = {"path": [letter * 100] * 1000, "label": ["a"] * 1000}
        parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
        if is_refused:
            with pytest.raises(DataError, match="would unpack to"):
                read_rows(tmp_path / "t.parquet")
        else:
            assert len(read_rows(tmp_path / "t.parquet")) == 1000


def test_a_class_only_in_val_is_refused(tmp_path):
    rows = [[*row, "train"] for row in six(tmp_path)]
    rows[5] = [rows[5][0], "c", "val"]
    with pytest.raises(DataError, match="t.csv:7: 'c' is not a class of the training rows"):
        Table(path=str(write(tmp_path / "t.csv", rows, ("path", "label", "split")))).read()
    rows[5][2] = "dev"
    with pytest.raises(DataError, match="split is 'dev'; use train, val or test"):
        Table(path=str(write(tmp_path / "t.csv", rows, ("path", "label", "split")))).read()


def test_links_out_of_the_root_are_refused(tmp_path):
    save_picture(tmp_path / "elsewhere" / "o.png")
    root = tmp_path / "root"
    rows = six(root)
    os.symlink(tmp_path / "elsewhere", root / "folder")
    os.symlink(tmp_path / "elsewhere" / "o.png", root / "file.png")
    for name in ("folder/o.png", "file.png"):
        with pytest.raises(DataError, match="is a link to outside"):
            Table(path=str(write(root / "t.csv", [*rows, [name, "a"]]))).read()


def test_numeric_classes_are_sorted_by_value():
    assert sort_class_names(["10", "9", "10", "-1"]) == ["-1", "9", "10"]
    assert sort_class_names(["10", "9", "x"]) == ["10", "9", "x"]


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_accepted_paths_lie_inside_the_root(written):
    root = Path("/srv/pictures")
    if path_checker(root)(written) is None:
        assert Path(os.path.normpath(root / written)).is_relative_to(root)


def test_spaces_around_a_label_do_not_make_another_class(tmp_path):
    rows = [[row[0], f"{' ' * (i % 3)}{row[1]} "] for i, row in enumerate(six(tmp_path))]
    assert Table(path=str(write(tmp_path / "t.csv", rows))).read().classes == ("a", "b")


# --- numbers and label sets -------------------------------------------------------------------------------------------


def with_columns(root: Path, header: tuple[str, ...], *columns: list[str]) -> Path:
    rows = [[row[0], *cells] for row, cells in zip(six(root), zip(*columns, strict=True), strict=True)]
    return write(root / "t.csv", rows, ("path", *header))


@given(st.lists(st.floats(-1e20, 1e20), min_size=6, max_size=6))
@settings(max_examples=20, deadline=None)
def test_numeric_targets_are_read_as_written(tmp_path_factory, values):
    assume(float32_problem("a", values) is None)
    root = tmp_path_factory.mktemp("t")
    path = with_columns(root, ("a", "b"), [repr(value) for value in values], [f" {value:.3e}" for value in values])
    indexed = Table(path=str(path), numbers=["a", "b"]).read()
    assert indexed.number_names == ("a", "b")
    assert indexed.classes == ()
    found = indexed.splits["train"].targets["numbers"]
    assert found[:, 0].tolist() == pytest.approx(values, rel=1e-6)
    assert found[:, 1].tolist() == pytest.approx(values, rel=2e-3)


@pytest.mark.parametrize(
    "cell",
    [
        "",
        "N/A",
        "nan",
        "inf",
        "-Infinity",
        "1,5",
        "1_000",
        "=1+1",
        "0x10",
        "1e400",
        "1e39",
        "१२",
        "1 2",
        "--1",
        "1.2.3",
    ],
)
def test_an_invalid_number_is_named_by_line_and_column(tmp_path, cell):
    path = with_columns(tmp_path, ("level",), ["1", "2", cell, "4", "-5.5", "+.5e1"])
    with pytest.raises(DataError) as refused:
        Table(path=str(path), numbers="level").read()
    (line,) = refused.value.lines
    assert line.startswith(f"{path}:4: level is ")
    assert ("is empty" in line) if not cell else ("expected a number" in line)


def test_target_columns_are_not_used_as_group_or_split(tmp_path):
    path = with_columns(tmp_path, ("group", "split"), ["1", "2", "3", "1", "2", "3"], ["0"] * 6)
    split = Table(path=str(path), numbers=["group", "split"]).read().splits["train"]
    assert split.groups is None
    assert split.targets["numbers"][:, 0].tolist() == [1, 2, 3, 1, 2, 3]


def test_label_sets_are_read_from_a_list_or_from_columns(tmp_path):
    path = with_columns(tmp_path, ("marks",), ["b;a", " a ", "", "b", "c ; a;", "c"])
    indexed = Table(path=str(path), labels="marks").read()
    assert indexed.classes == ("a", "b", "c")
    expected = [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 1]]
    assert indexed.splits["train"].targets["present"].int().tolist() == expected
    columns = [[str(row[k]) for row in expected] for k in range(3)]
    path = with_columns(tmp_path, ("x", "y", "z"), *columns)
    indexed = Table(path=str(path), labels=["z", "x", "y"]).read()
    assert indexed.classes == ("z", "x", "y")
    assert indexed.splits["train"].targets["present"].int().tolist() == [[r[2], r[0], r[1]] for r in expected]


def test_a_label_that_is_listed_twice_counts_once_and_is_said(tmp_path, capfd):
    path = with_columns(tmp_path, ("marks",), ["a", "b", "a;b;a", "a", "b", "a"])
    contents = Table(path=str(path), labels="marks").read()
    assert contents.splits["train"].targets["present"][2].tolist() == [True, True]
    assert "t.csv:4: 1 row lists a label twice, which counts once" in capfd.readouterr().err


def test_rows_that_repeat_earlier_ones_are_left_out_and_said(tmp_path, capfd):
    rows = six(tmp_path)
    expected = Table(path=str(write(tmp_path / "t.csv", rows))).read().splits["train"]
    for repeats in ([(6, 0)], [(2, 0), (2, 1)], [(1, 0), (4, 0), (8, 5)]):
        longer = [list(row) for row in rows]
        for position, row in repeats:
            longer.insert(position, list(rows[row]))
        found = Table(path=str(write(tmp_path / "t.csv", longer))).read().splits["train"]
        assert sorted(map(str, found.images)) == sorted(map(str, expected.images))
        said = capfd.readouterr().err
        count = len(repeats)
        assert f"{count} row{'s are' if count > 1 else ' is'} left out" in said


def test_a_table_of_ids_gets_the_suffix_of_its_files(tmp_path):
    rows = [[name.removesuffix(".png"), label] for name, label in six(tmp_path)]
    path = write(tmp_path / "t.csv", rows)
    with pytest.raises(DataError, match=r"has no suffix.*such as `suffix: \.png`"):
        Table(path=str(path)).read()
    split = Table(path=str(path), suffix=".png").read().splits["train"]
    assert [Path(str(split.images[row])).name for row in range(6)] == [f"{row[0]}.png" for row in rows]


def test_a_table_without_a_line_of_names_is_read_with_the_names_of_the_config(tmp_path):
    rows = six(tmp_path)
    named = Table(path=str(write(tmp_path / "a.csv", rows))).read()
    (tmp_path / "b.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    found = Table(path=str(tmp_path / "b.csv"), columns=["path", "label"]).read()
    assert found.classes == named.classes
    assert list(map(str, found.splits["train"].images)) == list(map(str, named.splits["train"].images))
    (tmp_path / "c.csv").write_text("0,1,0\n0,1,1\n")
    with pytest.raises(DataError, match="column '0' appears twice; the first line must name the columns"):
        Table(path=str(tmp_path / "c.csv")).read()


def test_invalid_label_sets_are_named(tmp_path):
    path = with_columns(tmp_path, ("marks",), ["a", "b", "a", "a", "a", "a"])
    with pytest.raises(DataError, match=r"t\.csv:3: 'b' is not in data\.source\.table\.classes"):
        Table(path=str(path), labels="marks", classes=["a"]).read()
    path = with_columns(tmp_path, ("x",), ["1", "0", "yes", "1", "0", "1"])
    with pytest.raises(DataError, match=r"t\.csv:4: x is 'yes'; expected 0 or 1"):
        Table(path=str(path), labels=["x"]).read()


def test_exactly_one_kind_of_target_is_accepted(tmp_path):
    for more in ({"labels": "a", "numbers": "b"}, {"label": "c", "numbers": "b"}, {"label": "c", "labels": ["a", "b"]}):
        with pytest.raises(ValueError, match="one of label, labels and numbers"):
            Table(path="t.csv", **more)
    for more, said in (
        ({"numbers": ["a", "a"]}, "'a' is listed twice"),
        (
            {"labels": ["a", "b"], "classes": ["b", "a"]},
            "classes does not go with numbers, or with one column per class",
        ),
        ({"numbers": "a", "classes": ["b"]}, "classes does not go with numbers"),
        ({"labels": ["a"], "separator": ","}, "separator is for a column"),
    ):
        with pytest.raises(ValueError, match=said):
            Table(path="t.csv", **more)
    assert Table(path="t.csv").target_kind == "labels"
    assert Table(path="t.csv", labels="a").target_kind == "label sets"
    assert Table(path="t.csv", numbers="a").target_kind == "numbers"


def table_of_labels(tmp_path, cells: list[str], column="label", **settings) -> Table:
    rows = [[path, label] for (path, _), label in zip(six(tmp_path), cells, strict=False)]
    return Table(path=str(write(tmp_path / "t.csv", rows, ("path", column))), **settings)


def test_quotes_after_a_space_are_not_part_of_a_label(tmp_path):
    paths = [row[0] for row in six(tmp_path)]
    lines = [
        f'{path}, "{name}"' if i % 2 else f"{path},{name}"
        for i, (path, name) in enumerate(zip(paths, "aabbcc", strict=True))
    ]
    (tmp_path / "t.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    assert Table(path=str(tmp_path / "t.csv")).read().classes == ("a", "b", "c")


@pytest.mark.parametrize("word", ["nan", "None", "NA", "<NA>"])
def test_a_missing_label_is_named_by_line_unless_declared_a_class(tmp_path, word):
    labels = ["a", "b", word, "a", "b", word]
    with pytest.raises(DataError) as refused:
        table_of_labels(tmp_path, labels).read()
    assert [line.split(": ")[0].rpartition("/")[2] for line in refused.value.lines] == ["t.csv:4", "t.csv:7"]
    assert (
        table_of_labels(tmp_path, labels, classes=["a", "b", word]).read().splits["train"].targets["labels"].tolist()
        == [0, 1, 2] * 2
    )


def test_a_missing_group_is_named(tmp_path):
    rows = [[*row, "nan" if number == 4 else "p"] for number, row in enumerate(six(tmp_path))]
    path = write(tmp_path / "t.csv", rows, ("path", "label", "group"))
    with pytest.raises(DataError, match=r"t.csv:6: group is 'nan', which stands for a missing value"):
        Table(path=str(path)).read()


@pytest.mark.parametrize(
    "cells",
    [["a,b", "a", "b"], ["a|b", "b|c", "c|a"], ["a/b", "a/c", "b"], ["['a', 'b']", "['a']", "[]"], ['["a"]', "a", "b"]],
)
def test_label_lists_with_another_separator_are_refused(tmp_path, cells):
    with pytest.raises(DataError, match=r"t.csv:2: .* is a list, and labels are separated by ';' here"):
        table_of_labels(tmp_path, cells * 2, "tags", labels="tags").read()
    classes = sorted(set(cells))
    assert table_of_labels(tmp_path, cells * 2, "tags", labels="tags", classes=classes).read().classes == tuple(classes)


def test_label_names_can_contain_commas(tmp_path):
    read = table_of_labels(
        tmp_path, ["Smith, John; Doe, Jane", "Doe, Jane", "Smith, John"] * 2, "tags", labels="tags"
    ).read()
    assert read.classes == ("Doe, Jane", "Smith, John")


@pytest.mark.parametrize(
    ("values", "is_refused"),
    [
        ([1e9 + i for i in range(6)], True),
        ([1.7e9 + 1e-3 * i for i in range(6)], True),  # times within one second, in seconds since 1970
        ([1e9] * 6, False),  # a constant: the task reports that there is nothing to learn
        ([0.1] * 6, False),
        ([20_240_101 + i for i in range(6)], False),
        ([1000.5 + i for i in range(6)], False),
    ],
)
def test_numbers_indistinguishable_in_float32_are_refused(tmp_path, values, is_refused):
    path = with_columns(tmp_path, ("a",), [repr(value) for value in values])
    table = Table(path=str(path), numbers="a")
    if not is_refused:
        assert table.read().splits["train"].targets["numbers"][:, 0].tolist() == pytest.approx(values, rel=1e-6)
        return
    with pytest.raises(DataError, match=r"t\.csv: a varies by .*, too finely for float32; subtract the mean from it"):
        table.read()


def test_true_and_false_are_one_and_zero(tmp_path):
    path = with_columns(tmp_path, ("x", "y"), ["True", "False"] * 3, ["FALSE", "true", "0", "1", "1.0", "0.0"])
    present = Table(path=str(path), labels=["x", "y"]).read().splits["train"].targets["present"]
    assert present.tolist() == [
        [True, False],
        [False, True],
        [True, False],
        [False, True],
        [True, True],
        [False, False],
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize(("delimiter", "word"), [(",", ""), (";", "semicolons"), ("\t", "tabs")])
def test_what_spreadsheets_save_is_read(tmp_path, capfd, encoding, delimiter, word):
    """UTF-16 and other delimiters than commas, as spreadsheets write them for some languages."""
    rows = [["path", "label"], *six(tmp_path)]
    text = "\r\n".join(delimiter.join(f'"{cell}"' if cell == "a" else cell for cell in row) for row in rows)
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    (tmp_path / "t.csv").write_bytes((mark + text).encode(encoding))
    found = Table(path=str(tmp_path / "t.csv")).read()
    assert found.classes == ("a", "b")
    assert len(found.splits["train"]) == 6
    assert (f"columns are separated by {word}" in capfd.readouterr().err) == bool(word)


@pytest.mark.parametrize("name", ["filename", "File_Name", "file", "image", "image_path"])
def test_a_usual_name_of_the_image_column_is_taken_and_said(tmp_path, capfd, name):
    rows = six(tmp_path)
    (tmp_path / "t.csv").write_text("\n".join(",".join(row) for row in [[name, "label"], *rows]))
    assert len(Table(path=str(tmp_path / "t.csv")).read().splits["train"]) == 6
    assert f"the images are those of the column {name!r}" in capfd.readouterr().err
    with pytest.raises(DataError, match="has no column 'path'"):  # what the config says is never replaced
        Table(path=str(tmp_path / "t.csv"), image="path").read()
    two = [["image", "filename", "label"], *[[row[0], *row] for row in rows]]
    (tmp_path / "t.csv").write_text("\n".join(map(",".join, two)))
    with pytest.raises(DataError, match="has no column 'path'"):
        Table(path=str(tmp_path / "t.csv")).read()


def test_absolute_paths_are_read_below_the_root_of_the_disk(tmp_path):
    pictures = [save_picture(tmp_path / "elsewhere" / f"{number}.png", seed=number) for number in range(4)]
    table = tmp_path / "t.csv"
    table.write_text("path,label\n" + "".join(f"{path},{'ab'[n % 2]}\n" for n, path in enumerate(pictures)))
    with pytest.raises(DataError, match="is absolute; give a path relative to the root, or `root: /`"):
        Table(path=str(table)).read()
    split = Table(path=str(table), root="/").read().splits["train"]
    assert [str(split.images[row]) for row in range(4)] == [str(path) for path in pictures]
    table.write_text("path,label\n/etc/../etc/hostname.png,a\n")
    with pytest.raises(DataError, match=r"leaves the root with '\.\.'"):
        Table(path=str(table), root="/").read()
