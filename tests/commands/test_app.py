from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image as Pil

from cnnrun import __version__
from cnnrun.base.errors import DataError, StorageError
from cnnrun.commands import prediction_output
from cnnrun.results.people.identification import Identification
from cnnrun.results.predict import PredictedFile
from cnnrun.tasks.classification import LabelPrediction
from cnnrun.tasks.multilabel import LabelSetPrediction
from tests.support.forked_python import run_python
from tests.support.images import save_picture


def test_train_eval_predict_and_export_run_in_sequence(tiny, tmp_path, monkeypatch, run_cli):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli("train", tiny, "train.epochs=3", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["run"] == "runs/tiny/1"
    assert err.count("\nepoch ") == 3
    assert (tmp_path / "runs/tiny/1/config.yaml").exists()

    code, out, _ = run_cli("eval", "--json")
    measured = json.loads(out)
    assert (code, measured["split"], measured["samples"]) == (0, "test", 359)
    assert measured["numbers"]["accuracy"] > 0.5

    picture = save_picture(tmp_path / "photos" / "1.png", mode="L", size=(8, 8))
    code, out, _ = run_cli("predict", picture, "--json")
    row = json.loads(out)
    assert code == 0
    assert row["path"] == str(picture)
    assert row["label"] in "0123456789"
    assert sum(entry["probability"] for entry in row["top"]) <= 1 + 1e-6

    code, out, _ = run_cli("export", "onnx", "--json")
    parity = json.loads(out)
    assert (code, parity["passed"]) == (0, True)
    assert Path(parity["path"]).exists()
    assert parity["metrics"]["artefact"]["accuracy"] == measured["numbers"]["accuracy"]


def test_commands_print_readable_text(trained_run, run_cli):
    runs = trained_run.parent.parent
    code, out, _ = run_cli("eval", trained_run)
    assert code == 0
    assert "split test, 359 images" in out
    assert "confusion" in out
    code, out, _ = run_cli("eval", "--runs", runs, "--split", "val")
    assert "split val" in out
    code, out, _ = run_cli("summary", trained_run / "config.yaml")
    assert "model[0].conv" in out
    assert "parameters" in out
    code, out, _ = run_cli("check", trained_run / "config.yaml")
    assert (code, "tiny: no problems. 10 classes" in out) == (0, True)


def test_eval_accepts_a_checkpoint_and_refuses_a_folder_without_a_run(trained_run, run_cli):
    checkpoint = trained_run / "checkpoints" / (trained_run / "checkpoints" / "latest").read_text()
    code, out, _ = run_cli("eval", checkpoint, "--json")
    assert (code, json.loads(out)["step"]) == (0, 12 * 17)
    code, _, err = run_cli("eval", trained_run.parent)
    assert (code, err.splitlines()) == (3, [f"{trained_run.parent}: neither a run folder, a checkpoint nor a config"])


def test_predict_prints_the_same_as_text_csv_and_json(trained_run, tmp_path, run_cli):
    for number in range(5):
        save_picture(tmp_path / "in" / f"{number}.png", seed=number)
    code, out, _ = run_cli("predict", tmp_path / "in", "--run", trained_run, "--csv", "--batch", 2)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert [Path(row["path"]).name for row in rows] == [f"{i}.png" for i in range(5)]
    _, out, _ = run_cli("predict", tmp_path / "in", "--run", trained_run, "--json", "--batch", 3)
    told = [json.loads(line) for line in out.splitlines()]
    labels = [row["label"] for row in told]
    assert labels == [row["label"] for row in rows]
    for row, of in zip(rows, told, strict=True):
        ranks = ["", *(f" {rank}" for rank in range(2, 6))]
        cells = [(row[f"label{rank}"], float(row[f"probability{rank}"])) for rank in ranks]
        assert [label for label, _ in cells] == [each["label"] for each in of["top"]]
        assert [value for _, value in cells] == pytest.approx([each["probability"] for each in of["top"]], abs=1e-6)
    _, out, _ = run_cli("predict", tmp_path / "in" / "0.png", "--run", trained_run)
    assert out.startswith(f"{tmp_path}/in/0.png: {labels[0]} ")


def test_csv_has_one_value_per_cell_whatever_the_class_names(capsys):
    names = ["a;b=1", "a", "present a"]
    ranked, probabilities = [(name, 0.5) for name in names], dict.fromkeys(names, 0.25)
    for prediction, columns, expected in (
        (LabelPrediction(ranked), ["label", "label 2", "label 3"], names),
        (LabelSetPrediction(names[1:], probabilities), [f"present {name}" for name in names], ["0", "1", "1"]),
        (Identification(ranked, 0.6), ["person", *(f"person {rank}" for rank in (1, 2, 3))], ["", *names]),
    ):
        table = write_csv([PredictedFile(Path("p"), prediction)], capsys)
        assert len(table) == 2
        assert len(table[0]) == len(set(table[0])) == len(table[1])
        row = dict(zip(*table, strict=True))
        assert [row[column] for column in columns] == expected


def write_csv(files: list[PredictedFile], capsys) -> list[list[str]]:
    """Write predictions as CSV; returns the cells."""
    with suppress(DataError):  # at the end, if images could not be read
        prediction_output.write_all(files, as_json=False, as_csv=True)
    return list(csv.reader(io.StringIO(capsys.readouterr().out)))


@pytest.mark.parametrize("unreadable_json", [{}, {"objects": []}], ids=["classify", "detect"])
def test_csv_of_unreadable_images_waits_for_the_columns(unreadable_json, capsys):
    """As `predict` streams: an error before the first prediction is printed after the header."""
    broken = [PredictedFile(Path(name), None, "no picture", unreadable_json) for name in ("a", "b")]
    printed = []

    def files() -> Iterator[PredictedFile]:
        yield broken[0]
        printed.append(capsys.readouterr().out)
        yield PredictedFile(Path("c"), LabelPrediction([("ape", 0.5)]))
        printed.append(capsys.readouterr().out)
        yield broken[1]

    with pytest.raises(DataError, match=r"2 files could not be read"):
        prediction_output.write_all(files(), as_json=False, as_csv=True)
    assert printed == ["", "path,label,probability,error\r\na,,,no picture\r\nc,ape,0.5,\r\n"]
    assert capsys.readouterr().out == "b,,,no picture\r\n"
    assert write_csv(broken, capsys) == [["path", "error"], ["a", "no picture"], ["b", "no picture"]]


def test_predict_reports_unreadable_files_continues_and_exits_with_8(trained_run, tmp_path, run_cli):
    good = save_picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"nothing")
    code, out, err = run_cli("predict", tmp_path / "b.png", good, "--run", trained_run, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 8
    assert "not an image" in rows[0]["error"]
    assert "label" in rows[1]
    assert "1 file could not be read" in err
    code, _, err = run_cli("predict", tmp_path / "none.png", "--run", trained_run)
    assert (code, err) == (8, f"{tmp_path}/none.png: no such file\n")


def test_predict_on_saved_images_agrees_with_their_labels(trained_run, tmp_path, run_cli):
    """Most images of the training split, saved as files, are predicted with their own label."""
    from cnnrun.data.sources.digits import Digits

    split = Digits().read().splits["train"]
    for number in range(20):
        Pil.fromarray(split.images[number, :, :, 0]).save(tmp_path / f"{number:02d}.png")
    _, out, _ = run_cli("predict", tmp_path, "--run", trained_run, "--json")
    labels = [int(json.loads(line)["label"]) for line in out.splitlines()]
    truth = split.targets["labels"][:20].tolist()
    assert sum(a == b for a, b in zip(labels, truth, strict=True)) >= 17


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--version"], 0, f"cnnrun {__version__}"),
        (["--help"], 0, "cnnrun train configs/digits.yaml"),
        (["train", "--help"], 0, "Example: cnnrun train"),
        (["kinds"], 0, "max_pool"),
        (["kinds", "conv"], 0, "out_channels"),
        (["kinds", "train"], 0, "epochs"),
        (["kinds", "convv"], 2, "did you mean 'conv'?"),
        (["schema"], 0, '"additionalProperties"'),
        (["train"], 2, "Missing argument"),
        (["trian", "x"], 2, "No such command"),
        (["train", "none.yaml"], 2, "none.yaml: cannot be read (No such file or directory)"),
        (
            ["eval", "--runs", "nowhere"],
            3,
            "nowhere: no run with a checkpoint here; start one with `cnnrun train CONFIG`",
        ),
        (["eval", "--device", "gpu"], 2, "use auto, cpu, cuda or cuda:N"),
        (["eval", "--device", "cuda:77"], 6, "CUDA devices; use --device cpu"),
    ],
)
def test_each_command_line_has_its_exit_code_and_text(words, code, text, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got, out, err = run_cli(*words)
    assert got == code, err
    assert text in out + err
    assert "Traceback" not in err


def test_a_data_error_exits_with_8(tiny, run_cli):
    code, _, err = run_cli("check", tiny, "data={source: {folder: nowhere}, image: {size: 8, channels: 1}}")
    assert (code, err) == (8, "nowhere: no such folder\n")


def test_control_characters_in_an_error_are_escaped(run_cli):
    code, _, err = run_cli("train", "\x1b[31mred\n.yaml")
    assert code == 2
    assert "\x1b" not in err
    assert len(err.splitlines()) == 1


def test_help_needs_no_torch():
    """Run in another process, because this one has imported torch already."""
    program = (
        "import sys; sys.argv = ['cnnrun', '--help']\n"
        "from cnnrun.commands import app as cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'sklearn', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_a_bug_exits_with_1_and_a_traceback(tiny, tmp_path):
    program = (
        "import sys; sys.argv = ['cnnrun', 'check', sys.argv[1]]\n"
        "from cnnrun.commands import app as cli; from cnnrun.experiment import checks\n"
        "checks.check = None\n"
        "cli.main()"
    )
    done = run_python(["-c", program, str(tiny)], tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_config_named_config_and_a_checkpoint_pointer_resolve_to_their_run(tmp_path, monkeypatch, run_cli, tiny):
    monkeypatch.chdir(tmp_path)
    tiny.rename(tmp_path / "config.yaml")
    assert run_cli("train", "config.yaml")[0] == 0
    for target in ("config.yaml", "runs/config/1/config.yaml", "runs/config/1/checkpoints/best", "runs/config/1"):
        code, out, err = run_cli("eval", target, "--json")
        assert code == 0, err
        assert json.loads(out)["run"].endswith("runs/config/1")


def test_a_run_name_that_looks_like_a_number_is_kept(tmp_path, monkeypatch, run_cli, tiny):
    monkeypatch.chdir(tmp_path)
    tiny.rename(tmp_path / "1e3.yaml")
    assert run_cli("train", "1e3.yaml")[0] == 0
    assert run_cli("eval")[0] == 0


def test_a_missing_path_is_refused_before_anything_is_predicted(trained_run, tmp_path, run_cli):
    good = save_picture(tmp_path / "a.png")
    code, out, err = run_cli("predict", good, tmp_path / "none.png", good, "--run", trained_run)
    assert (code, out, err) == (8, "", f"{tmp_path}/none.png: no such file\n")


def test_hidden_files_and_folders_named_like_images_are_left_out(trained_run, tmp_path, run_cli):
    save_picture(tmp_path / "in" / "a.png")
    save_picture(tmp_path / "in" / ".ipynb_checkpoints" / "h.png")
    (tmp_path / "in" / "dir.png").mkdir()
    code, out, _ = run_cli("predict", tmp_path / "in", "--run", trained_run, "--json")
    assert (code, len(out.splitlines())) == (0, 1)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 6),
        (MemoryError(), 6),
        (OSError(12, "Cannot allocate memory"), 6),
        (StorageError("runs/x: cannot write (No space left on device)"), 5),
    ],
)
def test_memory_and_disk_errors_are_one_line(error, code, tiny, run_cli, monkeypatch):
    from cnnrun.experiment import checks

    def trouble(*args):
        raise error

    monkeypatch.setattr(checks, "check", trouble)
    got, _, err = run_cli("check", tiny)
    assert (got, len(err.splitlines())) == (code, 1)


OWN = [OSError(28, "No space left on device", "runs/x"), FileNotFoundError(2, "no such file"), KeyError("\x1b[31m")]


@pytest.mark.parametrize("error", OWN)
def test_an_unexpected_error_is_reported_as_a_bug_with_its_traceback(error, tiny, run_cli, monkeypatch):
    """Only an error that the module for writing files raises is reported as a storage error."""
    from cnnrun.experiment import checks

    def trouble(*args):
        raise error

    monkeypatch.setattr(checks, "check", trouble)
    code, _, err = run_cli("check", tiny)
    assert code == 1
    assert err.startswith("Traceback")
    assert err.splitlines()[-1] == "this is a bug in cnnrun; please report it with these lines"
    assert "\x1b" not in err
