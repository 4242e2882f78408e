"""All inputs with a known verdict (see `three_commands.Verdict`)."""

from __future__ import annotations

from tests.support.verdicts import arrays, coco, folders, tables, voc
from tests.support.verdicts.three_commands import Verdict

PARTS = tuple(module.INPUTS for module in (tables, coco, voc, folders, arrays))
INPUTS: dict[str, Verdict] = {name: verdict for part in PARTS for name, verdict in part.items()}
