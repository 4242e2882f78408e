"""Files built to hang the program or exhaust its memory are refused with the documented exit code in little memory."""

from __future__ import annotations

import pytest

from tests.support import hostile_inputs

# Those whose files take longer to make than the program to refuse.
SLOW = ("idx: .gz", "npz: 1 MB", "table: 12,000,000", "table: 30,000,000", "table: 9,900,000", "coco: 60 MB")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name.startswith(SLOW) else []) for name in hostile_inputs.INPUTS],
)
def test_a_hostile_input_is_refused_in_little_memory(tmp_path, name):
    if "Parquet" in name:
        pytest.importorskip("pyarrow")
    build, code = hostile_inputs.INPUTS[name]
    found = hostile_inputs.answer(build, tmp_path / "files")
    assert found.code == code, found.err
    assert "Traceback" not in found.err
    assert found.err.strip(), "it says why"
    assert all(len(line) < 1000 for line in found.err.splitlines())
    assert found.peak_mib <= hostile_inputs.MIB, found
    assert not (tmp_path / "files" / "pwned").exists()
