"""Every export format writes every task's network, with its results in the network's order."""

from __future__ import annotations

import json

import pytest

from cnnrun.config.spec import union_members
from cnnrun.export import Format
from tests.support.small_runs import TASKS


@pytest.mark.parametrize("format_", union_members(Format), ids=lambda kind: kind.kind)
@pytest.mark.parametrize("task", TASKS)
def test_every_format_writes_every_task(task, format_, of_each_task, tmp_path, run_cli):
    out = tmp_path / f"network{format_.suffix}"
    code, text, error = run_cli("export", format_.kind, of_each_task[task], "--out", out, "--json")
    assert code == 0, error
    result = json.loads(text)
    assert result["passed"] is True
    assert out.is_file()
    assert (tmp_path / format_.record).is_file()
    artefact, network = (result["metrics"][side] for side in ("artefact", "network"))
    assert artefact == pytest.approx(network, abs=1e-4)
