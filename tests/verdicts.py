"""All inputs whose verdict is known: see `three_commands.Verdict`."""

from __future__ import annotations

import verdict_arrays
import verdict_coco
import verdict_folders
import verdict_tables
import verdict_voc
from three_commands import Verdict

PARTS = tuple(module.INPUTS for module in (verdict_tables, verdict_coco, verdict_voc, verdict_folders, verdict_arrays))
INPUTS: dict[str, Verdict] = {name: verdict for part in PARTS for name, verdict in part.items()}
