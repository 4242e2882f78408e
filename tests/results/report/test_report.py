"""The HTML report: one file, rendered by a real browser, safe from hostile names, and reproducible."""

from __future__ import annotations

import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cnnrun.base.errors import ConfigError, StorageError
from cnnrun.contracts.figure import MAX_POINTS, Plot, Series
from cnnrun.experiment.config_file import parse_config
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.report import charts
from cnnrun.results.report import html as page
from cnnrun.results.report import writer as reporting
from cnnrun.results.report.content import training_curves
from cnnrun.results.studies.train_run import train_run
from cnnrun.training.run_records import read_result
from tests.support.browser import open_page
from tests.support.configs import TINY
from tests.support.images import save_picture
from tests.support.small_runs import TASKS

CPU = torch.device("cpu")
MOST_BYTES = 6 << 20
HOSTILE = ("<script>document.title='owned'</script>", '"><img src=x onerror=alert(1)>', "{{ 7*7 }} & '${1}' </style>")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory) -> Path:
    """A run whose class and file names contain HTML and scripts."""
    root = tmp_path_factory.mktemp("hostile")
    for label, name in enumerate(HOSTILE):
        for number in range(12):
            folder = root / "data" / name.replace("/", "\u2215")
            save_picture(folder / f"<b onmouseover=alert({number})>.png", seed=100 * label + number, mode="L")
    text = f"""
task: classify
name: hostile
data: {{source: {{folder: {json.dumps(str(root / "data"))}}}, image: {{size: 8, channels: 1}}, split: {{val: 0.4}}}}
model: [{{conv: {{out_channels: 4, activation: relu}}}}, global_avg_pool]
train: {{epochs: 2, batch: 8}}
"""
    done = train_run(parse_config(text, "hostile.yaml"), root / "runs", CPU, resume=False)
    reporting.write_report([Path(done["run"])], root / "runs", CPU)
    return Path(done["run"])


@pytest.fixture
def odd_names_config(tmp_path) -> Path:
    """Config of a folder with a file name that is not UTF-8 and with long and oddly spaced class names."""
    for label, name in enumerate(("a  b", "x" * 120, "c")):
        for number in range(9):
            save_picture(tmp_path / "data" / name / f"{number}.png", seed=100 * label + number, size=(8, 8), mode="L")
    (tmp_path / "data" / "c" / "0.png").rename(tmp_path / "data" / "c" / os.fsdecode(b"\xff0.png"))
    text = f"""
task: classify
name: notext
data: {{source: {{folder: {tmp_path / "data"}}}, image: {{size: 8, channels: 1}}, split: {{val: 0.6}}}}
model: [{{conv: {{out_channels: 4, activation: relu}}}}, global_avg_pool]
train: {{epochs: 1, batch: 8}}
"""
    (tmp_path / "notext.yaml").write_text(text)
    return tmp_path / "notext.yaml"


def write_page(run: Path, tmp_path: Path, **settings) -> Path:
    return Path(reporting.write_report([run], tmp_path, CPU, out=tmp_path / "page.html", **settings)["path"])


def test_each_run_has_its_name_as_heading_and_no_template_syntax_is_left(trained_run, tmp_path):
    def headings(runs: list[Path]) -> list[tuple[str, str]]:
        page = reporting.write_report(runs, tmp_path, CPU, out=tmp_path / f"{len(runs)}.html")["path"]
        text = Path(page).read_text()
        body = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.S)
        assert not re.search(r"\{%|%\}|\{\{|\}\}|endif|endfor", body)
        return re.findall(r'<article[^>]*>\s*<h2 id="[^"]*"([^>]*)>([^<]*)</h2>', text)

    name = str(trained_run)
    assert headings([trained_run]) == [(' class="visually-hidden"', name)]
    assert headings([trained_run, trained_run]) == [("", name), ("", name)]


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_report_opens_offline_with_its_charts_drawn(width, scheme, trained_run, tmp_path):
    path = write_page(trained_run, tmp_path)
    assert path.stat().st_size <= MOST_BYTES
    with open_page(path, width=width, scheme=scheme) as visit:
        assert visit.console == []
        assert [url for url in visit.requests if not url.startswith("data:")] == [path.resolve().as_uri()]
        charts_ = visit.page.locator(".vega")
        assert charts_.count() >= 4
        for number in range(charts_.count()):
            assert charts_.nth(number).locator("svg.marks").count() == 1
            assert charts_.nth(number).locator("svg path").count() > 3
        broken = "[...document.images].filter(each => !(each.complete && each.naturalWidth > 0)).length"
        assert visit.page.evaluate(broken) == 0
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width  # nothing is cut off at the side
        background = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_images_are_filtered_by_class(trained_run, tmp_path):
    with open_page(write_page(trained_run, tmp_path)) as visit:
        items = visit.page.locator(".images li")
        assert items.count() == 24
        true = items.nth(0).get_attribute("data-target")
        choose = visit.page.locator("select.choose")
        choose.focus()
        choose.select_option(true)
        shown = [items.nth(number) for number in range(24) if items.nth(number).is_visible()]
        assert 0 < len(shown) < 24
        assert {each.get_attribute("data-target") for each in shown} == {true}
        assert visit.page.locator(".count").inner_text() == f"{len(shown)} of 24 images"
        choose.select_option("")
        assert all(items.nth(number).is_visible() for number in range(24))


def test_rows_of_a_table_are_filtered(tmp_path):
    """A table of many classes has a field that keeps only the rows with the typed text."""
    for label in range(14):
        for number in range(4):
            save_picture(tmp_path / "data" / f"kind{label:02d}" / f"{number}.png", 10 * label + number, (8, 8), "L")
    text = f"""
task: classify
name: many
data: {{source: {{folder: {tmp_path / "data"}}}, image: {{size: 8, channels: 1}}, split: {{val: 0.5}}}}
model: [{{conv: {{out_channels: 4, activation: relu}}}}, global_avg_pool]
train: {{epochs: 1, batch: 14}}
"""
    done = train_run(parse_config(text, "many.yaml"), tmp_path, CPU, resume=False)
    with open_page(write_page(Path(done["run"]), tmp_path)) as visit:
        visit.page.locator("summary", has_text="per class").click()
        field = visit.page.locator("input.filter").first
        field.fill("KIND07")
        rows = visit.page.locator("#run1-per_class tbody tr")
        assert [row.inner_text().split()[0] for row in rows.all() if row.is_visible()] == ["kind07"]


def test_hostile_names_are_shown_as_text(hostile):
    with open_page(hostile / "report.html") as visit:
        assert visit.console == []
        assert visit.page.title() == str(hostile)
        assert [url for url in visit.requests if not url.startswith(("data:", "file:"))] == []
        assert visit.page.evaluate("document.querySelectorAll('img:not([src^=\"data:\"]), [onmouseover]').length") == 0
        text = visit.page.locator("body").inner_text()
        for name in HOSTILE:
            assert name.replace("/", "\u2215") in text
        assert "<b onmouseover=alert(" in text


def test_a_report_shows_undecodable_long_and_oddly_spaced_names(odd_names_config, tmp_path, run_cli):
    code, _, err = run_cli("train", odd_names_config, "--runs", tmp_path / "runs")
    assert code == 0
    assert "was not written" not in err
    with open_page(tmp_path / "runs" / "notext" / "1" / "report.html", width=390) as visit:
        assert visit.console == []
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
        for name in ("a  b", "x" * 120):
            visit.page.locator("select.choose").select_option(name)
            assert int(visit.page.locator(".count").inner_text().split()[0]) > 0


def test_the_report_is_accessible(trained_run, tmp_path):
    """One main landmark, ordered headings, names for every image, table and field, and a skip link for the keyboard."""
    with open_page(write_page(trained_run, tmp_path)) as visit:
        page_ = visit.page
        assert page_.evaluate("document.documentElement.lang") == "en"
        assert page_.locator("main").count() == page_.locator("h1").count() == 1
        levels = page_.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(each => +each.tagName[1])")
        assert all(after <= before + 1 for before, after in pairwise(levels))
        assert page_.evaluate("[...document.images].every(each => each.alt)")
        assert page_.evaluate("[...document.querySelectorAll('table')].every(each => each.caption.textContent.trim())")
        assert page_.evaluate("[...document.querySelectorAll('select,input')].every(each => each.labels.length)")
        assert page_.evaluate("[...document.querySelectorAll('.vega svg')].every(each => each.ariaLabel || "
                              "each.querySelector('[aria-label]'))")  # fmt: skip
        page_.keyboard.press("Tab")
        assert page_.evaluate("document.activeElement.className") == "skip"
        ids = page_.evaluate("[...document.querySelectorAll('[id]')].map(each => each.id)")
        assert len(ids) == len(set(ids))


def test_the_report_prints_black_on_white(trained_run, tmp_path):
    with open_page(write_page(trained_run, tmp_path), scheme="dark") as visit:
        visit.page.emulate_media(media="print", color_scheme="dark")
        assert visit.page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        assert visit.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        pdf = visit.page.pdf()
        assert pdf.startswith(b"%PDF")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_report(task, of_each_task, tmp_path):
    path = write_page(of_each_task[task], tmp_path)
    assert path.stat().st_size <= MOST_BYTES
    with open_page(path) as visit:
        assert visit.console == []
        assert visit.page.locator(".vega svg").count() == visit.page.locator(".vega").count()
        own = {"classify": "confusion", "detect": "recall", "verify": "FAR", "regress": "true", "multilabel": "recall"}
        own["segment"] = "confusion"
        labels = " ".join(visit.page.locator(".vega svg text").all_text_contents())
        assert own[task] in labels
        assert visit.page.locator(".explanation img").count() >= 2


def test_several_runs_are_shown_side_by_side(of_each_task, trained_run, tmp_path):
    made = parse_config(TINY, "t.yaml", ["name=other", "train.epochs=2", "model[0].conv.out_channels=6"])
    other = Path(train_run(made, tmp_path / "runs", CPU, resume=False)["run"])
    found = reporting.write_report([trained_run, other], tmp_path, CPU)
    assert found["path"] == str(tmp_path / "report.html")
    with open_page(Path(found["path"])) as visit:
        assert visit.console == []
        rows = visit.page.locator("#comparison table").first.locator("tbody tr")
        assert [row.locator("th").inner_text() for row in rows.all()] == [str(trained_run), str(other)]
        text = visit.page.locator("#comparison").inner_text()
        assert f"model[0].conv.out_channels: 4 in {trained_run}, 6 in {other}" in text
        assert visit.page.locator("#comparison .vega svg").count() >= 2
        ids = visit.page.evaluate("[...document.querySelectorAll('[id]')].map(each => each.id)")
        assert len(ids) == len(set(ids))
        visit.page.set_viewport_size({"width": 390, "height": 900})
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
        visit.page.locator("nav a").nth(2).click()
        assert visit.page.url.endswith("#run2")


# --- what it says -----------------------------------------------------------------------------------------------------


def test_report_metrics_equal_those_of_eval_on_val(trained_run, tmp_path):
    text = write_page(trained_run, tmp_path).read_text()
    measured = evaluate_run(trained_run, tmp_path, CPU, "val")
    found = dict(re.findall(r"<dt>(\w+)</dt><dd>([-\d.]+)", text))
    assert found == {name: f"{value:.4f}" for name, value in measured["numbers"].items()}
    low, high = measured["intervals"]["accuracy"]
    assert f"{low:.4f} to {high:.4f}" in text
    assert "They are optimistic" in text
    assert "They are optimistic" not in write_page(trained_run, tmp_path, split="test").read_text()


def test_a_report_is_reproducible_byte_for_byte(trained_run, tmp_path):
    first = write_page(trained_run, tmp_path).read_bytes()
    assert write_page(trained_run, tmp_path).read_bytes() == first


def test_the_report_loads_nothing_from_outside(trained_run, tmp_path):
    text = write_page(trained_run, tmp_path).read_text()
    vega = page._vega_script()
    own = text.replace(vega.replace("</script", "<\\/script"), "")
    assert len(own) < len(text) / 2
    assert re.findall(r"(?:src|href)=[\"'](?!data:|#)[^\"']*", own) == []
    assert "default-src 'none'" in own


def test_a_file_that_is_no_report_is_never_overwritten(trained_run, tmp_path):
    (tmp_path / "page.html").write_text("<html>mine</html>")
    with pytest.raises(ConfigError, match="already exists"):
        write_page(trained_run, tmp_path)


def test_training_writes_the_report_at_the_end(tiny, tmp_path, run_cli):
    code, out, err = run_cli("train", tiny, "--runs", tmp_path)
    assert code == 0, err
    assert (tmp_path / "tiny" / "1" / "report.html").stat().st_size > 800_000
    assert run_cli("train", tiny, "--runs", tmp_path, "--no-report")[0] == 0
    assert not (tmp_path / "tiny" / "2" / "report.html").exists()
    assert run_cli("train", tiny, "--runs", tmp_path, "--seeds", "2")[0] == 0
    assert (tmp_path / "tiny" / "4" / "report.html").exists()
    code, out, _ = run_cli("report", tmp_path / "tiny" / "2", "--json")
    assert code == 0
    assert json.loads(out)["path"] == str(tmp_path / "tiny" / "2" / "report.html")


def test_a_report_that_cannot_be_written_never_fails_the_training(tiny, tmp_path, run_cli, monkeypatch):
    def fails(*_, **__):
        raise StorageError("no space left")

    monkeypatch.setattr(reporting, "write_new_file", fails)
    code, out, err = run_cli("train", tiny, "--runs", tmp_path)
    assert code == 0
    assert "report.html was not written: no space left" in err
    assert "best at step" in out
    assert read_result(tmp_path / "tiny" / "1")


def test_the_report_of_an_unfinished_run_says_that_it_is_unfinished(trained_run, tmp_path):
    unfinished = shutil.copytree(trained_run, tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    assert "the training is not finished" in write_page(unfinished, tmp_path).read_text()


# --- charts -----------------------------------------------------------------------------------------------------------


def test_a_chart_leaves_out_non_finite_values():
    """Only finite values are drawn, and the specification is valid JSON."""
    plot = Plot("t", "x", "y", (Series("a", [0.0, 1.0, 2.0], [1.0, float("nan"), float("inf")]),))
    assert [row["x"] for row in charts.vega_spec(plot)["layer"][0]["data"]["values"]] == [0.0]
    json.dumps(charts.vega_spec(plot), allow_nan=False)


def test_the_spans_of_a_chart_stay_with_their_points():
    """Thinning and leaving out non-finite values selects the ends of the spans with their points."""
    x = [float(position) for position in range(2 * MAX_POINTS + 1)]
    x[2] = float("nan")
    spans = Series("a", x, [0.0] * len(x), "spans", [value - 1 for value in x], [value + 2 for value in x])
    rows = charts.vega_spec(Plot("t", "x", "y", (spans,)))["layer"][0]["data"]["values"]
    assert [row["x"] for row in rows] == [value for value in x[::2] if value == value]
    assert all((row["low"], row["high"]) == (row["x"] - 1, row["x"] + 2) for row in rows)


def test_every_style_and_empty_series_are_drawn(tmp_path):
    import vl_convert

    plots = [
        Plot(style, "x", "y", (Series("a", [0.1, 0.2], [0.0, 1.0], style, [0.0, 0.1], [0.3, 0.4]),), ticks=("p", "q"))
        for style in ("points", "line", "bars", "spans")
    ]
    plots += [Plot("same", "x", "y", (Series("a", [x, x], [1.0, 2.0], "bars"),)) for x in (0.3, float("nan"))]
    plots += [Plot("nothing", "x", "y", (Series("a", [], []),)), Plot("d", "x", "y", (), diagonal=True, log_x=False)]
    for plot in plots:
        assert vl_convert.vegalite_to_svg(charts.vega_spec(plot)).startswith("<svg")
    assert charts.matrix_spec("m", np.zeros((101, 101), int).tolist(), [str(n) for n in range(101)]) is None
    assert vl_convert.vegalite_to_svg(charts.matrix_spec("m", [[3, 1], [0, 2]], ["a", "b"])).startswith("<svg")


def test_training_curves_equal_the_rows_of_the_metrics_file(trained_run):
    rows = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    plots = {plot.title: plot for plot in training_curves([("", trained_run)])}
    assert [series.name for series in plots["loss"].series] == ["train/loss", "val/loss"]
    assert list(plots["val/accuracy"].series[0].y) == [row["val/accuracy"] for row in rows]
    assert list(plots["val/accuracy"].series[0].x) == [row["epoch"] for row in rows]
    assert training_curves([("", trained_run / "nowhere")]) == []


def test_an_incomplete_last_metrics_line_is_skipped(trained_run, tmp_path):
    lines = (trained_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    later = json.dumps({"step": 99, "epoch": 9, "val/new": 0.5}) + "\n"
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]) + later + lines[3][:20])
    plots = {plot.title: plot for plot in training_curves([("", tmp_path)])}
    assert len(plots["val/accuracy"].series[0].x) == 3
    assert list(plots["val/new"].series[0].x) == [9]


def test_every_chart_has_a_data_table(trained_run, tmp_path):
    with open_page(write_page(trained_run, tmp_path)) as visit:
        counts = "[...document.querySelectorAll('figure.chart')].map(each => each.querySelectorAll('tbody tr').length)"
        assert min(visit.page.evaluate(counts)) > 0


def test_large_images_are_scaled_down_for_the_report(tmp_path):
    wide = np.random.default_rng(0).integers(0, 256, (700, 2100, 3), dtype=np.uint8)
    assert len(page.image_data_url(wide, 900)) < 400_000
    small = np.zeros((8, 8, 3), np.uint8)
    assert page.image_data_url(small).startswith("data:image/png")


def test_a_missing_output_folder_is_refused_before_anything_is_measured(trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "measure_run", lambda *_, **__: pytest.fail("measure_run"))
    with pytest.raises(ConfigError, match=r"--runs .*nowhere: no such folder; give --out"):
        reporting.write_report([trained_run, trained_run], tmp_path / "nowhere", CPU)
    with pytest.raises(ConfigError, match=r"--out .*r\.html: no such folder: .*nowhere$"):
        reporting.write_report([trained_run], tmp_path, CPU, out=tmp_path / "nowhere" / "r.html")
