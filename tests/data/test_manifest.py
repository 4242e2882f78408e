from __future__ import annotations

import subprocess

import pytest

from cnnrun.base.errors import DataError
from cnnrun.data import manifest


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "data" / name for name in ("one.png", "*two.png")]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


@pytest.mark.parametrize("mode", ["--text", "--binary"])
def test_manifests_of_both_modes_of_sha256sum_are_read(files, tmp_path, mode):
    root = files[0].parent
    sums = tmp_path / "sums"
    command = ["sha256sum", mode, "--", *(path.name for path in files)]
    sums.write_bytes(subprocess.run(command, cwd=root, check=True, capture_output=True).stdout)
    assert manifest.compare_with_manifest(sums, files, root) == {"changed": [], "missing": [], "new": []}
    files[1].write_bytes(b"changed")
    assert manifest.compare_with_manifest(sums, files, root)["changed"] == ["*two.png"]


@pytest.mark.parametrize("line", ["x" * 64 + "  a.png", "0" * 64 + " a.png", "0" * 63 + "  a.png", "0" * 64 + "  "])
def test_other_lines_are_refused(tmp_path, line):
    sums = tmp_path / "sums"
    sums.write_text(f"{line}\n")
    with pytest.raises(DataError, match="sums:1: not a line of a manifest"):
        manifest.compare_with_manifest(sums, [], tmp_path)
