"""Compare `check`, `data check` and `train` on every input of tests/support/verdicts. Results: benchmarks/verdicts.md.

python benchmarks/verdicts.py            print a Markdown table: input, exit code, message, and whether the three agree
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

_MAX_CHARACTERS = 160  # of a message


def main() -> None:
    torch.set_num_threads(1)
    print("| input | exit code | words | agree |\n|---|---|---|---|")
    agree = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for number, (name, verdict) in enumerate(INPUTS.items()):
            answers = three_commands.run_commands(verdict.build, Path(folder) / str(number))
            is_fine = not three_commands.disagreements(verdict, answers)
            agree += is_fine
            codes = ", ".join(map(str, sorted({answer.code for answer in answers.values()})))
            cells = (name, codes, message(verdict, answers), "yes" if is_fine else "**no**")
            print("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |", flush=True)
    print(f"\n{agree} of {len(INPUTS)} agree.")


def message(verdict: Verdict, answers: dict[str, Said]) -> str:
    """Return the line with the expected words from the first command that should print them."""
    command = next((name for name in answers if verdict.expected(name)), "check")
    expected, output = verdict.expected(command), answers[command].err + answers[command].out
    line = next((line for line in output.splitlines() if expected in line), expected)
    suffix = f" ({command} alone)" if expected and not verdict.code and verdict.by == ("data check",) else ""
    return (line[:_MAX_CHARACTERS] or "nothing") + suffix


if __name__ == "__main__":
    main()
