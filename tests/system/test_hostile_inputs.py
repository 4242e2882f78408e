"""Files that want the program to hang, or to take all memory: one line, the documented code, soon, in little memory."""

from __future__ import annotations

import pytest

from tests import hostile

# Those whose files take longer to make than the program to refuse.
SLOW = ("idx: .gz", "npz: 1 MB", "table: 12,000,000", "table: 30,000,000", "table: 9,900,000", "coco: 60 MB")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.startswith(SLOW) else []) for name in hostile.INPUTS]
)
def test_it_is_refused_by_name_in_little_memory(tmp_path, name):
    if "Parquet" in name:
        pytest.importorskip("pyarrow")
    build, code = hostile.INPUTS[name]
    found = hostile.answer(build, tmp_path / "files")
    assert found.code == code, found.err
    assert "Traceback" not in found.err
    assert found.err.strip(), "it says why"
    assert all(len(line) < 1000 for line in found.err.splitlines())
    assert found.peak_mib <= hostile.MIB, found
    assert not (tmp_path / "files" / "pwned").exists()
