"""All inputs whose verdict is known: see `three_commands.Verdict`."""

from __future__ import annotations

from tests import verdict_arrays, verdict_coco, verdict_folders, verdict_tables, verdict_voc
from tests.three_commands import Verdict

PARTS = tuple(module.INPUTS for module in (verdict_tables, verdict_coco, verdict_voc, verdict_folders, verdict_arrays))
INPUTS: dict[str, Verdict] = {name: verdict for part in PARTS for name, verdict in part.items()}
