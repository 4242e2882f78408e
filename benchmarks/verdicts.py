"""What `check`, `data check` and `train` say of every input of tests/support/verdicts. Results: benchmarks/verdicts.md.

python benchmarks/verdicts.py            the table as Markdown: input, exit code, words, and whether the three agree
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.verdicts import INPUTS, three_commands
from tests.support.verdicts.three_commands import Said, Verdict

_LONGEST = 160  # characters of the words that are shown


def main() -> None:
    torch.set_num_threads(1)
    print("| input | exit code | words | agree |\n|---|---|---|---|")
    agree = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for number, (name, verdict) in enumerate(INPUTS.items()):
            said = three_commands.run_commands(verdict.build, Path(folder) / str(number))
            is_fine = not three_commands.disagreements(verdict, said)
            agree += is_fine
            codes = ", ".join(map(str, sorted({each.code for each in said.values()})))
            cells = (name, codes, words(verdict, said), "yes" if is_fine else "**no**")
            print("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |", flush=True)
    print(f"\n{agree} of {len(INPUTS)} agree.")


def words(verdict: Verdict, said: dict[str, Said]) -> str:
    """The line that the expected words stand in, as the first command that is to say them has it."""
    command = next((name for name in said if verdict.expected(name)), "check")
    wanted, spoken = verdict.expected(command), said[command].err + said[command].out
    line = next((line for line in spoken.splitlines() if wanted in line), wanted)
    silent = f" ({command} alone)" if wanted and not verdict.code and verdict.by == ("data check",) else ""
    return (line[:_LONGEST] or "nothing") + silent


if __name__ == "__main__":
    main()
