"""Tables as pandas, spreadsheets, Kaggle and labelling tools write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.verdicts.three_commands import Build, Verdict, save_square, write_config

COUNT = 24
NAMES = ("cat", "dog", "eel")
Row = Callable[[int], str]
REGRESS, MULTILABEL = "regress", "multilabel"


def name(i: int) -> str:
    return NAMES[i % 3]


def table(
    row: Row,
    header: str = "path,label",
    source: str = "{table: t.csv}",
    task: str = "classify",
    *,
    write: Callable[[str], bytes] = str.encode,
    file: Row = lambda i: f"p/{i:02}.png",
    count: int = COUNT,
    copies: bool = False,
) -> Build:
    """A CSV of 24 rows for images `p/00.png` to `p/23.png` or other names. With `copies` each image occurs twice."""

    def build(folder: Path) -> None:
        for i in range(count):
            save_square(folder / file(i), i % 12 if copies else i)
        text = "\n".join([header, *map(row, range(count))]) + "\n"
        name = "t.tsv" if "t.tsv" in source else "t.csv"
        (folder / name).write_bytes(write(text))
        write_config(folder, source, task)

    return build


def label_table(cell: Row, **how: object) -> Build:
    """A table of paths and labels."""
    return table(lambda i: f"p/{i:02}.png,{cell(i)}", **how)  # type: ignore[arg-type]


def sets(cell: Row, more: str = "", header: str = "path,tags") -> Build:
    """A table of label sets."""
    return label_table(cell, header=header, source=f"{{table: {{path: t.csv, labels: tags{more}}}}}", task=MULTILABEL)


def numbers(cell: Row, columns: str = "weight", header: str = "path,weight") -> Build:
    """A table of numbers."""
    return label_table(cell, header=header, source=f"{{table: {{path: t.csv, numbers: {columns}}}}}", task=REGRESS)


def encode_as(encoding: str) -> Callable[[str], bytes]:
    return lambda text: text.encode(encoding)


def with_line_ends(end: str) -> Callable[[str], bytes]:
    return lambda text: text.replace("\n", end).encode()


def paired_row(i: int) -> str:
    """Row `i`, except that row 4 has the image of row 3 and another label."""
    return f"p/{3 if i == 4 else i:02}.png,{name(i)}"


LABELS = {
    "pandas: index column": Verdict(
        table(lambda i: f"{i},p/{i:02}.png,{name(i)}", ",path,label"), 0, "3 classes", ("check",)
    ),
    "pandas: NaN as an empty cell": Verdict(
        label_table(lambda i: "" if i == 5 else name(i)), 8, "t.csv:7: label is empty"
    ),
    "pandas: na_rep='NaN'": Verdict(
        label_table(lambda i: "NaN" if i == 5 else name(i)), 8, "stands for a missing value"
    ),
    "pandas: float labels 1.0, 2.0": Verdict(label_table(lambda i: f"{i % 3}.0"), 0, "3 classes", ("check",)),
    "pandas: 1.0 and 1 of two files joined": Verdict(
        label_table(lambda i: f"{i % 3}.0" if i % 2 else f"{i % 3}"), 0, "differ only in spelling"
    ),
    "pandas: bool labels": Verdict(label_table(lambda i: str(i % 3 == 0)), 0, "2 classes", ("check",)),
    "True and TRUE": Verdict(label_table(lambda i: ("True", "TRUE", "False")[i % 3]), 0, "differ only in spelling"),
    "pandas: dates as labels": Verdict(label_table(lambda i: f"2024-01-{i + 1:02}"), 8, "the val split is empty"),
    "pandas: quoted paths with commas": Verdict(
        table(lambda i: f'"p/a, {i:02}.png",{name(i)}', file=lambda i: f"p/a, {i:02}.png"), 0, "3 classes", ("check",)
    ),
    "Excel: semicolons": Verdict(
        table(lambda i: f"p/{i:02}.png;{name(i)}", "path;label"), 0, "separated by semicolons", ("check",)
    ),
    "Excel: UTF-16": Verdict(label_table(name, write=encode_as("utf-16")), 0, "3 classes", ("check",)),
    "Excel: Windows-1252": Verdict(
        label_table(lambda i: "Bär" if i % 2 else "cat", write=encode_as("cp1252")), 8, "not UTF-8"
    ),
    "Excel: BOM and CRLF": Verdict(
        label_table(name, write=lambda text: text.replace("\n", "\r\n").encode("utf-8-sig")), 0, "3 classes", ("check",)
    ),
    "old Mac: CR": Verdict(label_table(name, write=with_line_ends("\r")), 0, "3 classes", ("check",)),
    "Excel: sep=, first": Verdict(label_table(name, header="sep=,\npath,label"), 8, "sep="),
    "LibreOffice: empty rows at the end": Verdict(label_table(name, write=lambda text: (text + "\n\n\n").encode()), 0),
    "Excel: rows of commas at the end": Verdict(
        label_table(name, write=lambda text: (text + ",\n,\n").encode()), 8, "is empty"
    ),
    "a comma at the end of each row": Verdict(label_table(lambda i: f"{name(i)},"), 8, "3 cells; the first line has 2"),
    "a comma at the end of each line": Verdict(
        label_table(lambda i: f"{name(i)},", header="path,label,"), 0, "3 classes", ("check",)
    ),
    "the same row twice": Verdict(
        label_table(name, write=lambda text: (text + "p/23.png,eel\n").encode()), 8, "already"
    ),
    "the same picture in two rows with two labels": Verdict(table(paired_row), 8, "is already in line 5"),
    "Windows: backslashes": Verdict(table(lambda i: f"p\\{i:02}.png,{name(i)}"), 8, "backslash"),
    "absolute paths": Verdict(table(lambda i: f"/data/p/{i:02}.png,{name(i)}"), 8, "is absolute"),
    "Windows: absolute paths": Verdict(table(lambda i: f"C:\\p\\{i:02}.png,{name(i)}"), 8, "is absolute"),
    "URLs": Verdict(table(lambda i: f"https://x.org/p/{i:02}.png,{name(i)}"), 8, "is a URL"),
    "Kaggle: id without suffix": Verdict(
        table(lambda i: f"{i:02},{name(i)}", "id,label", "{table: {path: t.csv, root: p, image: id}}"), 8, "suffix"
    ),
    "Kaggle: one-hot columns": Verdict(
        table(
            lambda i: f"p/{i:02}.png," + ",".join(str(int(name(i) == each)) for each in NAMES),
            "path,cat,dog,eel",
            "{table: {path: t.csv, label: [cat, dog, eel]}}",
        ),
        0,
        "3 classes",
        ("check",),
    ),
    "Kaggle: one-hot columns, a row of zeros": Verdict(
        table(
            lambda i: f"p/{i:02}.png," + ",".join(str(int(name(i) == each and i != 7)) for each in NAMES),
            "path,cat,dog,eel",
            "{table: {path: t.csv, label: [cat, dog, eel]}}",
        ),
        8,
        "0 of the label columns are 1",
    ),
    "columns of other names": Verdict(
        table(lambda i: f"p/{i:02}.png,{name(i)}", "filename,class"),
        8,
        "has no column 'path' (columns: filename, class)",
    ),
    "Google Sheets: #N/A": Verdict(
        label_table(lambda i: "#N/A" if i == 5 else name(i)), 8, "stands for a missing value"
    ),
    "Excel: #REF!": Verdict(label_table(lambda i: "#REF!" if i == 5 else name(i)), 8, "stands for a missing value"),
    "Google Sheets: class none among others": Verdict(label_table(lambda i: "none" if i % 3 == 0 else name(i))),
    "blanks around labels": Verdict(
        label_table(lambda i: f" {name(i)}" if i % 2 else f"{name(i)} "), 0, "3 classes", ("check",)
    ),
    "cat and Cat": Verdict(
        label_table(lambda i: "Cat" if i == 3 else name(i)),
        0,
        "'Cat' and 'cat' differ only in spelling",
        finding="'Cat' = 'cat'",
    ),
    "TSV called .csv": Verdict(
        table(lambda i: f"p/{i:02}.png\t{name(i)}", "path\tlabel"), 0, "separated by tabs", ("check",)
    ),
    "CSV called .tsv": Verdict(
        table(lambda i: f"p/{i:02}.png,{name(i)}", source="{table: t.tsv}"), 8, "separate columns by"
    ),
    "header missing": Verdict(label_table(name, header="p/99.png,cat"), 8, "has no column 'path'"),
    "a file missing": Verdict(
        table(lambda i: f"p/{90 if i == 3 else i}.png,{name(i)}", file=lambda i: f"p/{i}.png"), 8, "No such file"
    ),
    "split column: Train, Valid": Verdict(
        label_table(lambda i: f"{name(i)},{'Valid' if i > 17 else 'Train'}", header="path,label,split"),
        0,
        "train 18 val 6",
        ("check",),
    ),
    "split column: dev": Verdict(
        label_table(lambda i: f"{name(i)},{'dev' if i > 17 else 'train'}", header="path,label,split"),
        8,
        "use train, val or test",
    ),
    "split column: a class in val alone": Verdict(
        label_table(
            lambda i: f"{'fox' if i == 20 else name(i)},{'val' if i > 17 else 'train'}", header="path,label,split"
        ),
        8,
        "'fox' is not a class of the training rows",
    ),
    "split column: a class in train alone": Verdict(
        label_table(
            lambda i: f"{'cat' if i > 17 else name(i)},{'val' if i > 17 else 'train'}", header="path,label,split"
        ),
        0,
        "no image of dog, eel in val",
        finding="without an image in val",
    ),
    "a column Split, unread": Verdict(
        label_table(lambda i: f"{name(i)},{'val' if i > 17 else 'train'}", header="path,label,Split"),
        0,
        "column 'Split' is not read",
    ),
    "a column of splits by another name": Verdict(
        label_table(lambda i: f"{name(i)},{'valid' if i > 17 else 'train'}", header="path,label,subset"),
        0,
        "column 'subset' is not read",
    ),
    "a name for each picture": Verdict(
        table(
            lambda i: f"p/{i:02}.png,{f'x{i}' if i < COUNT * 2 else 'x1'},{'train' if i < COUNT * 2 else 'val'}",
            "path,label,split",
            count=60,
        ),
        0,
        "is the label a number",
    ),
    "copies that data.split would part": Verdict(
        label_table(name, copies=True), 0, "moved within data.split, so that all copies"
    ),
    "one class alone": Verdict(label_table(lambda i: "cat"), 8, "needs two or more classes; the data has 1"),
}

SETS = {
    "labels: cat|dog": Verdict(sets(lambda i: "cat|dog" if i % 2 else "cat"), 8, "is a list"),
    "labels: cat|dog, and told so": Verdict(
        sets(lambda i: "cat|dog" if i % 2 else "cat", ", separator: '|'"), 0, "2 classes", ("check",)
    ),
    "labels: cat, dog": Verdict(sets(lambda i: '"cat, dog"' if i % 2 else "cat"), 8, "is a list"),
    "labels: \"['cat', 'dog']\"": Verdict(sets(lambda i: "\"['cat', 'dog']\"" if i % 2 else "['cat']"), 8, "is a list"),
    "labels: JSON list": Verdict(sets(lambda i: '"[""cat"", ""dog""]"' if i % 2 else '"[""cat""]"'), 8, "is a list"),
    "labels: blank-separated": Verdict(
        sets(lambda i: "cat dog" if i % 2 else ("cat", "dog")[i // 2 % 2]), 0, "look like lists of others"
    ),
    "labels: cat+dog": Verdict(
        sets(lambda i: "cat+dog" if i % 2 else ("cat" if i % 4 else "dog")), 0, "look like lists of others"
    ),
    "labels: empty cells": Verdict(
        sets(lambda i: "" if i % 3 == 0 else "cat;dog" if i % 3 == 1 else "dog"), 0, "2 classes", ("check",)
    ),
    "labels: nan among them": Verdict(
        sets(lambda i: "nan" if i == 3 else "cat;dog" if i % 2 else "dog"), 8, "missing value"
    ),
    "labels: a class that nobody has": Verdict(
        sets(lambda i: "cat" if i % 2 else "dog", ", classes: [cat, dog, eel]"),
        0,
        "no image of eel in train",
        finding="without an image in train",
    ),
    "labels: no label anywhere": Verdict(sets(lambda i: ""), 8, "no training row has a label"),
    "labels: val without any": Verdict(
        sets(lambda i: f"{'' if i > 17 else name(i)},{'val' if i > 17 else 'train'}", header="path,tags,split"),
        8,
        "no image has a label",
    ),
    "labels: columns of True and False": Verdict(
        label_table(
            lambda i: f"{i % 2 == 0},{i % 3 == 0}",
            header="path,cat,dog",
            source="{table: {path: t.csv, labels: [cat, dog]}}",
            task=MULTILABEL,
        ),
        0,
        "2 classes",
        ("check",),
    ),
    "labels: -1 for unknown, as CheXpert": Verdict(
        label_table(
            lambda i: f"{(1.0, 0.0, -1.0)[i % 3]},{i % 2}.0",
            header="path,cat,dog",
            source="{table: {path: t.csv, labels: [cat, dog]}}",
            task=MULTILABEL,
        ),
        8,
        "expected 0 or 1",
    ),
}

NUMBERS = {
    "numbers: decimal commas": Verdict(numbers(lambda i: f'"{i},5"'), 8, "is '0,5'; expected a number"),
    "numbers: thousands separators": Verdict(numbers(lambda i: f'"1,{i:03}"'), 8, "expected a number"),
    "numbers: units": Verdict(numbers(lambda i: f"{i} kg"), 8, "expected a number"),
    "numbers: nan": Verdict(numbers(lambda i: "nan" if i == 5 else f"{i}.5"), 8, "expected a number"),
    "numbers: an empty cell": Verdict(numbers(lambda i: "" if i == 5 else f"{i}.5"), 8, "weight is empty"),
    "numbers: a constant column": Verdict(numbers(lambda i: "5"), 8, "weight is 5 in every training image"),
    "numbers: so fine that they are one in float32": Verdict(
        numbers(lambda i: f"{1e9 + i}"), 8, "too finely for float32"
    ),
    "numbers: nearly too fine for float32": Verdict(numbers(lambda i: f"{16777216 + i}"), 8, "too little for float32"),
    "numbers: one value in val": Verdict(
        label_table(
            lambda i: f"{5 if i > 17 else i},{'val' if i > 17 else 'train'}",
            header="path,weight,split",
            source="{table: {path: t.csv, numbers: weight}}",
            task=REGRESS,
        ),
        0,
        "weight is 5 in every image of val",
    ),
    "numbers: dates": Verdict(numbers(lambda i: f"2024-01-{i + 1:02}"), 8, "expected a number"),
}

INPUTS = LABELS | SETS | NUMBERS
