"""All inputs whose verdict is known: see `three_commands.Verdict`."""

from __future__ import annotations

import verdict_boxes
import verdict_others
import verdict_tables
from three_commands import Verdict

PARTS = (verdict_tables.INPUTS, verdict_boxes.INPUTS, verdict_others.INPUTS)
INPUTS: dict[str, Verdict] = {name: verdict for part in PARTS for name, verdict in part.items()}
