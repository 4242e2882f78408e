"""The promises of docs/security.md, with a test for each row (S1 to S10) of its table."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import onnx
import pytest
import torch

from cnnrun.base.errors import CheckpointError, UserError
from tests.support.configs import TINY
from tests.support.forked_processes import fork, outcome
from tests.support.images import save_picture

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "cnnrun").rglob("*.py"))

# --- S1: data files are data ------------------------------------------------------------------------------------------

CODE = {"eval", "exec", "compile", "__import__", "execfile"}
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "subprocess", "code", "runpy"}
ATTRIBUTES = {("os", "system"), ("os", "popen"), ("yaml", "load"), ("yaml", "full_load"), ("yaml", "unsafe_load")}
# What these are for: reading foreign pickles in a process apart; running the code that was generated a moment before.
ALLOWED = {
    ("model/untrusted_pickle.py", "pickle"),
    ("model/untrusted_pickle.py", "subprocess"),
    ("model/untrusted_pickle.py", "torch.load"),
    ("export/python_file.py", "exec_module"),
}


def findings(path: Path, root: Path = ROOT / "cnnrun") -> set[tuple[str, str]]:
    name = path.relative_to(root).as_posix()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [each.name for each in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found |= {(name, each) for each in modules if each.split(".")[0] in MODULES}
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in CODE or called == "torch.load" or called.endswith(".exec_module"):
            found.add((name, called.split(".")[-1] if called.endswith("exec_module") else called))
        if tuple(called.split(".")[-2:]) in ATTRIBUTES:
            found.add((name, called))
        if called.endswith("import_module") and not isinstance(node.args[0], ast.Constant):
            found.add((name, "import_module of a name that is computed"))
        if any(word.arg == "shell" for word in node.keywords):
            found.add((name, "shell="))
        if called.endswith("np.load") and not any(
            word.arg == "allow_pickle" and ast.unparse(word.value) == "False" for word in node.keywords
        ):
            found.add((name, "np.load that may unpickle"))
    return found


def test_s1_no_module_runs_code_from_files():
    assert set().union(*map(findings, SOURCES)) == ALLOWED


def test_s1_the_lint_finds_planted_calls(tmp_path):
    bad = "import pickle\nimport numpy as np\neval('1')\nos.system('x')\nyaml.load(x)\nf(shell=True)\nnp.load('x')\n"
    (tmp_path / "planted.py").write_text(bad)
    assert len(findings(tmp_path / "planted.py", tmp_path)) == 6


@pytest.mark.parametrize(
    "text", ["__import__('os').system('touch pwned')", "!!python/object/apply:os.system [x]", "{{7*7}}"]
)
@pytest.mark.parametrize("place", ["task", "activation", "source", "optimizer", "name"])
def test_s1_strings_of_a_config_are_never_executed(tmp_path, run_cli, text, place):
    places = {
        "task": TINY.replace("task: classify", f"task: {text}"),
        "activation": TINY.replace("activation: relu}", f"activation: {text}" + "}", 1),
        "source": TINY.replace("source: digits", f"source: {text}"),
        "optimizer": TINY.replace("epochs: 2", f"epochs: 2, optimizer: {text}"),
        "name": f'name: "{text}"\n{TINY}',
    }
    path = tmp_path / "c.yaml"
    path.write_text(places[place])
    code, _, err = run_cli("check", path)
    assert code == 2
    assert err.startswith(f"{path}:")
    assert not Path("pwned").exists()


# --- S2: model files --------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("environment", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
def test_s2_a_weights_file_never_runs_code(tmp_path, run_cli, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    canary = tmp_path / "canary"
    torch.save({"w": Evil(canary)}, tmp_path / "w.pth")
    for words in (["import", tmp_path / "w.pth", "--like", "lenet"], ["predict", ".", "--run", tmp_path / "w.pth"]):
        code, _, err = run_cli(*words)
        assert code in (2, 3), err
        assert "Traceback" not in err
    assert not canary.exists()


def test_s2_a_run_contains_no_pickle(trained_run):
    files = [path for path in trained_run.rglob("*") if path.is_file()]
    assert {path.suffix for path in (trained_run / "checkpoints").rglob("*.*")} <= {".safetensors", ".json"}
    assert not [path for path in files if path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"PK")]


# --- S3: YAML ---------------------------------------------------------------------------------------------------------


NEXT = list(pairwise("abcdefghi"))
YAML = {
    "aliases of aliases": "a: &a [x]\n" + "\n".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]" for p, c in NEXT),
    "an alias of itself": "a: &a [*a]",
    "a tag": "a: !!python/object/apply:os.system ['touch pwned']",
    "depth": "[" * 100_000,
    "size": "a: " + "x" * (2 << 20),
    "two documents": "a: 1\n---\nb: 2",
    "values": "a: [" + "1," * 60_000 + "1]",
}  # fmt: skip


@pytest.mark.parametrize("what", YAML)
def test_s3_excessive_yaml_is_refused(tmp_path, run_cli, what):
    path = tmp_path / "c.yaml"
    path.write_text(YAML[what])
    code, _, err = run_cli("check", path)
    assert (code, len(err.splitlines())) == (2, 1)


# --- S4: ONNX ---------------------------------------------------------------------------------------------------------


def test_s4_an_onnx_file_reads_no_other_file(tmp_path):
    from cnnrun.export.onnx import Onnx

    (tmp_path / "secret").write_bytes(bytes(4000))
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1000], data_location=onnx.TensorProto.EXTERNAL)
    for location in ("secret", "../secret", str(tmp_path / "secret"), "/etc/passwd"):
        del tensor.external_data[:]
        tensor.external_data.add(key="location", value=location)
        node = onnx.helper.make_node("Identity", ["w"], ["y"])
        value = onnx.helper.make_tensor_value_info("y", 1, [1000])
        model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [value], [tensor]))
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(CheckpointError, match="ONNX Runtime cannot load it"):
            Onnx().reload(tmp_path / "m.onnx")


# --- S5, S6: images, paths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"%!PS-Adobe", b"<svg/>", b"\x89PNG\r\n\x1a\n" + bytes(100), b"\xff\xd8\xff"]
)
def test_s5_an_invalid_image_is_refused_by_name(tmp_path, data):
    from cnnrun.data.image_files import load_with_view
    from cnnrun.data.image_settings import ImageSettings

    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(UserError, match="a.png") as refused:
        load_with_view(tmp_path / "a.png", (8, 8), 1, ImageSettings())
    assert refused.value.exit_code == 8


PATHS = [
    "../secret.png",
    "/etc/passwd",
    "C:\\x.png",
    "\\\\host\\x.png",
    "https://host/x.png",
    "a/../../secret.png",
    "link.png",
]


@pytest.mark.parametrize("written", PATHS)
@pytest.mark.parametrize("source", ["table", "coco", "voc"])
def test_s6_paths_stay_inside_their_folder(tmp_path, run_cli, source, written):
    root = tmp_path / "data"
    secret = save_picture(tmp_path / "secret.png", size=(8, 8))
    for name in ("Annotations", "JPEGImages"):
        (root / name).mkdir(parents=True)
    (root / "link.png").symlink_to(secret)
    (root / "JPEGImages" / "link.png").symlink_to(secret)
    (root / "t.csv").write_text(f"path,label\n{written},a\n{written}2,b\n")
    image = {"id": 1, "file_name": written, "width": 8, "height": 8}
    (root / "t.json").write_text(
        json.dumps({"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]})
    )
    (root / "Annotations" / "0.xml").write_text(f"<annotation><filename>{written}</filename></annotation>")
    kind = {"table": f"{{table: {root}/t.csv}}", "coco": f"{{coco: {root}/t.json}}", "voc": f"{{voc: {root}}}"}[source]
    task, layers = (
        ("classify", "[flatten]") if source == "table" else ("detect", "[{conv: {out_channels: 4, stride: 8}}]")
    )
    data = f"{{source: {kind}, image: {{size: 8, channels: 1}}, split: {{val: 0.2}}}}"
    (tmp_path / "c.yaml").write_text(f"task: {task}\ndata: {data}\nmodel: {layers}\n")
    code, _, err = run_cli("check", tmp_path / "c.yaml")
    assert code == 8, err
    assert "Traceback" not in err


# --- S7: network ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_s7_no_command_opens_a_connection(tmp_path):
    """Every main command runs in one process under a hook that records each socket and each started program."""
    (tmp_path / "tiny.yaml").write_text(TINY)

    def everything() -> list[str]:
        from cnnrun.commands import app

        seen: list[str] = []
        watched = (
            "socket.connect",
            "socket.bind",
            "socket.getaddrinfo",
            "urllib.Request",
            "subprocess.Popen",
            "os.system",
        )
        sys.addaudithook(
            lambda event, arguments: seen.append(f"{event} {arguments}"[:200]) if event in watched else None
        )
        os.chdir(tmp_path)
        run = "runs/tiny/1"
        on_run = ("eval", "export code", "export onnx", "report", "calibrate", "explain filters")
        commands = (
            "check tiny.yaml",
            "train tiny.yaml",
            *(f"{each} {run}" for each in on_run),
            "train tiny.yaml --resume",
        )
        for words in commands:
            sys.argv = ["cnnrun", *words.split()]
            try:
                app.main()
            except SystemExit as left:
                assert not left.code, words
        return seen

    # Vega and torch look for programs of the system; none of them may be a connection.
    found = outcome(*fork(everything))
    assert isinstance(found, list), found
    assert not [each for each in found if not each.startswith("subprocess.Popen")]
    assert not [each for each in found if "curl" in each or "wget" in each]


# --- S8: what is installed is what is in git --------------------------------------------------------------------------


@pytest.mark.slow
def test_s8_a_wheel_equals_the_files_in_git(tmp_path):
    listed = subprocess.run(["git", "ls-files", "cnnrun"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    wheels = []
    for number in range(2):
        tree = tmp_path / str(number)
        for name in [*listed.stdout.split(), "pyproject.toml", "README.md", "LICENSE"]:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tree / "dist"), str(tree)]
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
        built = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
        if built.returncode:
            pytest.skip("the tools that build wheels cannot be fetched here")
        wheels += list((tree / "dist").glob("*.whl"))
    assert len({hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels}) == 1, "two builds differ"
    with zipfile.ZipFile(wheels[0]) as wheel:
        inside = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    assert set(inside) == set(listed.stdout.split())
    assert all(data == (ROOT / name).read_bytes() for name, data in inside.items())


# --- S9, S10: what leaks, what drives a terminal ----------------------------------------------------------------------


# Runs the commands that are its arguments in one process, until one fails.
RUN_COMMANDS = """
import sys
from cnnrun.commands import app
for words in sys.argv[1:]:
    sys.argv = ["cnnrun", *words.split()]
    try:
        app.main()
    except SystemExit as left:
        if left.code:
            raise
"""


@pytest.mark.slow
def test_s9_runs_and_exports_contain_nothing_about_the_machine(tmp_path):
    secrets = {f"TOKEN_{number}": hashlib.sha256(bytes([number])).hexdigest() for number in range(20)}
    home = tmp_path / "home-of-somebody"
    home.mkdir()
    (home / "tiny.yaml").write_text(TINY)
    environment = os.environ | secrets | {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            RUN_COMMANDS,
            "train tiny.yaml",
            "export onnx",
            "export code",
            "explain filters",
            "calibrate",
        ],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    wanted = [*secrets.values(), str(home), os.uname().nodename * (len(os.uname().nodename) > 3)]
    for path in (home / "runs").rglob("*"):
        if path.is_file():
            data = path.read_bytes() + path.name.encode()
            assert not [each for each in wanted if each and each.encode() in data], path


NAMES = ["\x1b[31mred", "a\nb", "\u202egnp", "=1+1", "+cmd", "-2+3", "@SUM(1)", "$x$", "a" * 120, "\x9b31m", "日本"]


def test_s10_names_are_escaped_for_terminals_and_spreadsheets(tmp_path, run_cli):
    for number, name in enumerate(NAMES):
        for each in range(6):
            save_picture(tmp_path / "data" / name / f"{name[:40]}{each}.png".replace("/", ""), seed=9 * number + each)
    (tmp_path / "c.yaml").write_text(
        f"task: classify\ndata: {{source: {{folder: '{tmp_path}/data'}}, image: {{size: 8, channels: 1}}, "
        f"split: {{val: 0.3}}, cache_dir: '{tmp_path}/cache'}}\nmodel: [flatten]\ntrain: {{epochs: 1, batch: 8}}\n"
    )
    runs = ("--runs", tmp_path / "runs")
    run = tmp_path / "runs" / "c" / "1"
    commands = (
        ("data", "check", tmp_path / "c.yaml"),
        ("train", tmp_path / "c.yaml", *runs),
        ("eval", run, *runs),
        ("predict", tmp_path / "data", "--run", run),
        ("predict", tmp_path / "data", "--run", run, "--csv"),
        ("predict", tmp_path / "data", "--run", run, "--json"),
        ("data", "split", tmp_path / "c.yaml", "--out", tmp_path / "split.csv"),
    )
    for words in commands:
        code, out, err = run_cli(*words)
        assert code in (0, 8), err
        assert "Traceback" not in err
        for text in (out, err):
            assert not [letter for letter in text if letter in "\x1b\x9b\u202e"], words
        if "--csv" in words:
            import csv

            rows = list(csv.reader(out.splitlines()))
            assert len(rows) == 1 + 6 * len(NAMES)
            assert not [cell for row in rows for cell in row if cell[:1] in ("=", "@") or cell[:2] in ("+c", "-2+")]
    assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())


def test_s10_a_table_that_data_split_writes_reads_back_equal(tmp_path, run_cli):
    """A cell that starts a formula is written with an apostrophe, which reading removes. A path is written with ./."""
    import csv

    names = ["=a", "+b", "-c", "@d", "-1"]
    for number, name in enumerate(names):
        for each in range(5):
            save_picture(tmp_path / "data" / name / f"{each}.png", seed=9 * number + each)
    text = (
        "task: classify\ndata: {{source: {}, image: {{size: 8, channels: 1}}, split: {{val: 0.2}}}}\nmodel: [flatten]\n"
    )
    (tmp_path / "c.yaml").write_text(text.format(f"{{folder: '{tmp_path}/data'}}"))
    assert run_cli("data", "split", tmp_path / "c.yaml", "--out", tmp_path / "split.csv")[0] == 0
    rows = list(csv.reader((tmp_path / "split.csv").read_text().splitlines()))
    assert not [cell for row in rows[1:] for cell in row if cell.startswith(("=", "+", "@", "-c"))]
    table = f"{{table: {{path: '{tmp_path}/split.csv', root: '{tmp_path}/data'}}}}"
    (tmp_path / "t.yaml").write_text(text.format(table))
    found = [
        json.loads(run_cli("check", tmp_path / name, "train.batch=4", "--json")[1]) for name in ("c.yaml", "t.yaml")
    ]
    assert set(found[0]["classes"]) == set(found[1]["classes"]) == set(names)
