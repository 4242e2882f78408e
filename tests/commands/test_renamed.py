"""Options and commands under their old names work and print a notice with the new name."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cnnrun.commands import renamed


@pytest.fixture
def run(linked_run):
    return linked_run


def test_old_options_work_and_print_their_new_names(run, run_cli):
    for old, new, lines in (
        (
            ["--picture", "3", "--target", "1"],
            ["--image", "3", "--class", "1"],
            ("picture", "image", "target", "class"),
        ),
        (["--pictures=2"], ["--images=2"], ("pictures", "images")),
        (["--picture", "3", "--image", "4"], ["--image", "3", "--image", "4"], ("picture", "image")),
    ):
        expected = run_cli("explain", "gradcam", run, *new, "--json")
        assert expected[0] == 0, expected
        code, out, err = run_cli("explain", "gradcam", run, *old, "--json")
        assert (code, json.loads(out)) == (0, json.loads(expected[1]))
        said = [f"--{a} is now called --{b}" for a, b in zip(lines[::2], lines[1::2], strict=True)]
        assert err.splitlines() == [*said, *expected[2].splitlines()]


def test_the_old_name_of_a_command_runs_the_command(of_each_task, run_cli):
    run = of_each_task["detect"]
    expected = run_cli("explain", "detections", run, "--json")
    code, out, err = run_cli("explain", "found", run, "--json")
    assert (code, out) == (0, expected[1])
    assert err.splitlines() == ["found is now called detections", *expected[2].splitlines()]


def test_old_options_of_other_commands_work(tiny, tmp_path, run_cli):
    words = ("data", "show", tiny, "--out", tmp_path / "sheet.png", "--json")
    expected = run_cli(*words, "--images", "2")
    code, out, err = run_cli(*words, "--pictures", "2")
    assert (code, out) == (0, expected[1])
    assert json.loads(out)["pictures"] == 2
    assert "--pictures is now called --images" in err.splitlines()
    code, _, err = run_cli("import", tmp_path / "none.pth", "--like", "resnet18", "--map", "name")
    assert code in (2, 3)
    assert err.splitlines()[0] == "--map is now called --match"


def test_help_shows_only_the_new_names(run_cli):
    code, out, err = run_cli("explain", "--help")
    assert (code, err) == (0, "")
    assert "detections" in out
    assert " found " not in out
    for command in ("gradcam", "detections", "assign", "features"):
        _, out, _ = run_cli("explain", command, "--help")
        assert "--image " in out
        assert "--picture" not in out
        assert "--target" not in out
    assert "--map" not in run_cli("import", "--help")[1]


def test_an_old_name_is_replaced_only_where_the_new_one_exists(run, run_cli):
    code, _, err = run_cli("eval", run, "--picture", "3")
    assert (code, "No such option: --picture" in err) == (2, True)
    code, _, err = run_cli("explain", "embed", run, "--map", "pca", "--no-probe", "--json")
    assert (code, "is now called" in err) == (0, False)
    code, _, err = run_cli("explain", "foundd", run)
    assert (code, "No such command" in err) == (2, True)


def test_words_after_two_dashes_are_not_options():
    assert renamed._replace_old_options(["--picture", "--", "--picture"], {"--image"}) == ["--image", "--", "--picture"]


def test_help_of_every_explain_command_needs_no_torch():
    """Run in another process, because this one has imported torch already."""
    program = (
        "import sys\n"
        "from cnnrun.commands import app as cli\n"
        "from cnnrun.config.spec import union_members\n"
        "from cnnrun.explain.methods import Method\n"
        "for name in [*(method.kind for method in union_members(Method)), 'ablate']:\n"
        "    sys.argv = ['cnnrun', 'explain', name, '--help']\n"
        "    try: cli.main()\n"
        "    except SystemExit as left: assert not left.code, name\n"
        "heavy = {'torch', 'numpy', 'sklearn', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
