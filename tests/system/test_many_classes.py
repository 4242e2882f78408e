"""With hundreds of classes, no output grows with the square of their number. With few classes everything is shown."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnrun.base.console import Output
from cnnrun.commands.enroll import print_gallery
from cnnrun.commands.evaluate import print_evaluation
from cnnrun.commands.tables import print_findings
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.results import RankedRows
from cnnrun.results import compare
from cnnrun.results.report import charts
from cnnrun.results.report import writer as reporting
from cnnrun.results.report.class_tables import select_rows
from cnnrun.tasks import classification_metrics
from cnnrun.tasks.detection.meter import _precision_recall_plot
from cnnrun.tasks.multilabel import Multilabel
from cnnrun.tasks.segmentation.overlaps import Overlaps, count_pixels

MANY = 1000
NAMES = tuple(f"class {number}" for number in range(MANY))
READABLE = 20_000  # characters: a few screens


def random_predictions(
    classes: int, count: int, seed: int = 0
) -> tuple[classification_metrics.SingleLabelPredictions, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    labels, predicted = draw.integers(0, classes, (2, count))
    predicted = np.where(draw.random(count) < 0.5, labels, predicted)
    return (
        classification_metrics.SingleLabelPredictions(
            classes, labels, predicted, draw.random(count), draw.random(count) < 0.7
        ),
        labels,
        predicted,
    )


# --- counting ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(2, 6), st.integers(1, 40), st.booleans())
@settings(max_examples=40, deadline=None)
def test_weighted_metrics_equal_those_of_the_weighted_confusion_matrix(seed, classes, count, weighted):
    found, labels, predicted = random_predictions(classes, count, seed)
    weight = np.random.default_rng(seed).integers(0, 3, count).astype(float) if weighted else np.ones(count)
    weight[0] += 1
    matrix = np.zeros((classes, classes))
    np.add.at(matrix, (labels, predicted), weight)
    numbers = found.metrics(2, weight)
    hits, said, there = matrix.diagonal(), matrix.sum(0), matrix.sum(1)

    def mean(part, whole):
        return np.mean([p / w if w else 0.0 for p, w in zip(part, whole, strict=True)])

    assert numbers["accuracy"] == hits.sum() / matrix.sum()
    assert numbers["precision"] == pytest.approx(mean(hits, said), rel=1e-12)
    assert numbers["recall"] == pytest.approx(mean(hits, there), rel=1e-12)
    assert numbers["f1"] == pytest.approx(mean(2 * hits, said + there), rel=1e-12)
    if not weighted:
        weight[0] -= 1
        assert found.metrics(2) == found.metrics(2, weight)


def test_a_bootstrap_draw_allocates_no_confusion_matrix():
    found, *_ = random_predictions(MANY, 500)
    weight = np.ones(500)
    found.metrics(5, weight)
    tracemalloc.start()
    found.metrics(5, weight)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MANY * MANY / 4  # bytes: a thirtieth of a matrix of float64


@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=4, max_size=4), st.integers(1, 20))
def test_the_most_confused_pairs_are_the_largest_cells_off_the_diagonal(matrix, most):
    pairs, among = classification_metrics.largest_confusions(matrix, most)
    cells = [(-count, a, b) for a, row in enumerate(matrix) for b, count in enumerate(row) if a != b and count]
    assert among == len(cells)
    assert pairs == [(a, b, -count, sum(matrix[a])) for count, a, b in sorted(cells)[:most]]


# --- what is printed --------------------------------------------------------------------------------------------------


def random_evaluation(classes: int) -> dict:
    found, *_ = random_predictions(classes, 4 * classes)
    names = [f"class {number}" for number in range(classes)]
    tables, matrices = {"per_class": found.per_class_rows(names)}, {"confusion": found.confusion_KK().tolist()}
    about = {"run": "runs/many/1", "step": 1, "split": "val", "samples": 4 * classes, "intervals": {}}
    return {**about, "numbers": found.metrics(5), "tables": tables, "matrices": matrices}


def test_eval_of_many_classes_prints_the_most_confused_pairs_and_the_best_and_worst_rows(capsys):
    data = random_evaluation(MANY)
    print_evaluation(data, Output())
    out = capsys.readouterr().out
    assert len(out) < READABLE
    pairs, among = classification_metrics.largest_confusions(data["matrices"]["confusion"], 20)
    lines = [line.split("  ") for line in out.splitlines()]
    shown = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    for true, said, count, of in pairs:
        assert [NAMES[true], NAMES[said], str(count), str(of)] in shown
    assert f"confusion of 1,000 classes: the 20 most confused of {among:,} pairs; --json has the whole matrix" in out
    assert "the 10 worst and the 10 best of 1,000, by f1; 980 more (--json has them all)" in out
    rows = data["tables"]["per_class"]
    there = [row["f1"] for row in rows if row["support"]]
    printed = [float(line[3]) for line in shown if len(line) == 5 and line[0].startswith("class ")]
    ends = [*sorted(there)[:10], *sorted(there)[-10:]]
    assert printed == pytest.approx(ends, abs=5e-5)


def test_up_to_thirty_classes_are_printed_in_full(capsys):
    data = random_evaluation(30)
    print_evaluation(data, Output())
    out = capsys.readouterr().out
    assert "--json" not in out
    assert "confusion (rows: true, columns: predicted)" in out
    lines = [line.split() for line in out.splitlines()]
    for number, row in enumerate(data["matrices"]["confusion"]):
        assert [str(number), *map(str, row)] in lines
    for row in data["tables"]["per_class"]:
        assert sum(line[:2] == row["class"].split() for line in lines) == 1


def test_a_diagonal_confusion_matrix_is_reported_as_no_confusion(capsys):
    print_evaluation(random_evaluation(31) | {"matrices": {"confusion": np.eye(31, dtype=int).tolist()}}, Output())
    assert "confusion of 31 classes: no class was confused with another; --json" in capsys.readouterr().out


def test_a_class_without_samples_is_neither_best_nor_worst():
    rows = [{"class": str(n), "AP": n / 100 if n % 3 else None, "objects": n % 2} for n in range(90)]
    shown, more = select_rows(RankedRows(rows, "AP", "objects"))
    known = [n / 100 for n in range(90) if n % 2 and n % 3]
    assert [row["AP"] for row in shown] == [*known[:10], *known[-10:]]
    assert more == "the 10 worst and the 10 best of 90, by AP; 70 more (--json has them all)"
    few = RankedRows((row | {"AP": None} if int(row["class"]) > 20 else row for row in rows), "AP")
    shown, more = select_rows(few)
    assert [int(row["class"]) for row in shown] == [n for n in range(21) if n % 3]
    assert more == "the 14 with samples of 90, by AP; 76 more (--json has them all)"
    assert select_rows([{"rank": n} for n in range(31)]) == ([], "31 rows (--json has them all)")
    assert select_rows(rows[:30]) == (rows[:30], "")


def test_shortened_lists_report_how_many_are_missing(capsys):
    print_findings(
        [{"level": "note", "what": "things", "count": 12, "examples": [[str(n)] for n in range(10)]}], Output()
    )
    assert capsys.readouterr().out.splitlines() == ["note: 12 things", "    0", "    1", "    2", "    and 9 more"]
    print_findings(
        [{"level": "note", "what": "things", "count": 3, "examples": [[str(n)] for n in range(3)]}], Output()
    )
    assert "more" not in capsys.readouterr().out
    people = {f"p{n}": 1 for n in range(31)}
    print_gallery({"added": list(people), "removed": ["q"], "people": people, "path": "g"}, Output())
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith("p28, p29 and 1 more")
    assert second == "removed: q"


def test_a_difference_of_class_lists_is_one_line():
    other = [*NAMES[:700], "new", *NAMES[701:]]
    said = compare._describe_key_difference(list(NAMES), other)
    assert said == "1,000 and 1,000; the first that differs is number 701: class 700 and new"
    assert compare._describe_key_difference(list(NAMES), list(NAMES[:-1])).endswith("number 1,000: class 999 and none")
    assert compare._describe_key_difference(["a"], ["b"]) == "['a'] and ['b']"


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_of_many_classes_state_which_classes_they_show():
    counts = {name: number % 500 for number, name in enumerate(NAMES)}
    rows = [{"class": name, "recall": level / 100, "precision": 0.5} for name in NAMES for level in range(101)]
    plot = _precision_recall_plot(rows, counts)
    assert plot.title == "Precision and recall of the 10 most frequent of 1,000 classes"
    assert [series.name for series in plot.series] == [f"class {n + k}" for n in range(499, 494, -1) for k in (0, 500)]
    few = _precision_recall_plot(rows, dict.fromkeys(NAMES[:30], 1))
    assert (few.title, len(few.series)) == ("Precision and recall", 30)
    meter = Multilabel().bind(DataFacts(NAMES, (1, 8, 8))).measuring.build_meter(Choices())
    draw = torch.Generator().manual_seed(0)
    present = torch.rand(15, MANY, generator=draw) < 0.1
    meter.update({"probabilities": torch.rand(15, MANY, generator=draw)}, {"present": present})
    measured = meter.compute()
    known = int(present.any(0).sum())
    assert measured.plots[0].title == f"Precision and recall of the first 10 of {known} classes"
    assert len(measured.tables["per_class"]) == MANY


def test_a_confusion_matrix_is_drawn_for_up_to_thirty_classes():
    def matrix_chart(classes: int) -> object:
        return charts.matrix_spec("m", np.eye(classes, dtype=int).tolist(), [str(n) for n in range(classes)])

    assert matrix_chart(30) is not None
    assert matrix_chart(31) is None


# --- commands on a data set of a thousand classes ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made, draw, splits = tmp_path_factory.mktemp("many"), np.random.default_rng(0), {}
    for split, each in (("train", 2), ("val", 1)):
        labels = np.repeat(np.arange(MANY), each)
        splits[f"x_{split}"] = draw.integers(0, 256, (len(labels), 6, 6), dtype=np.uint8)
        splits[f"y_{split}"] = labels
    np.savez(made / "many.npz", **splits)
    config = {
        "name": "many",
        "task": {"classify": {"class_weights": "balanced"}},
        "data": {
            "source": {"arrays": {"path": str(made / "many.npz"), "classes": list(NAMES)}},
            "image": {"size": 6, "channels": 1},
        },
        "model": ["flatten"],
        "train": {"epochs": 1, "batch": 500, "optimizer": {"sgd": {"lr": 0.01}}},
    }
    (made / "many.yaml").write_text(yaml.safe_dump(config))
    return made


def test_every_command_prints_little_for_a_thousand_classes(folder, run_cli, tmp_path):
    config, runs = folder / "many.yaml", ["--runs", tmp_path / "runs"]
    run = tmp_path / "runs" / "many" / "1"
    for words in (
        ["check", config],
        ["data", "check", config],
        ["train", config, "--no-report", *runs],
        ["train", config, "--no-report", "seed=2", *runs],
        ["eval", run, *runs],
        ["compare", run, run.parent / "2", *runs],
    ):
        code, out, err = run_cli(*words)
        assert code == 0, err
        assert len(out) + len(err) < READABLE, words
    code, out, _ = run_cli("eval", run, "--json", *runs)
    data = json.loads(out)
    assert len(data["matrices"]["confusion"]) == len(data["tables"]["per_class"]) == MANY
    page = Path(reporting.write_report([run], tmp_path, torch.device("cpu"))["path"]).read_text()
    assert "confusion of 1,000 classes: the 50 most confused of" in page
    specs = page.split('id="specs">')[1].split("</script>")[0]
    assert len(specs) < 50_000
    code, _, err = run_cli("export", "onnx", run, "--out", tmp_path / "many.onnx", *runs)
    assert code == 0, err
    about = onnxruntime.InferenceSession(tmp_path / "many.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list(NAMES)


def test_classes_of_pixels_are_ranked_by_their_overlap():
    generator = torch.Generator().manual_seed(0)
    predicted, true = (torch.randint(0, 40, (8, 16, 16), generator=generator).byte() for _ in range(2))
    counts, _ = count_pixels(predicted, true.masked_fill(true == 7, 8), 40)
    rows = Overlaps(counts.numpy().astype(float)).per_class_rows(tuple(map(str, range(40))))
    shown, more = select_rows(rows)
    overlaps = [row["iou"] for row in shown]
    assert overlaps == sorted(overlaps)
    assert "7" not in [row["class"] for row in shown]  # no true pixel
    assert "the 10 worst and the 10 best of 40, by iou" in more
