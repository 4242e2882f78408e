"""Labels, annotations and tables as real tools write them, and the verdict expected of three commands.

`check`, `data check` and `train` give one verdict: they refuse the same data with the same lines and exit code, and
each reports what is doubtful but can be trained on. A builder writes its files and `c.yaml` into a folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.forked_processes import fork, outcome, run_main

Build = Callable[[Path], None]
COMMANDS = {"check": "check c.yaml", "data check": "data check c.yaml", "train": "train c.yaml --no-report"}
MONITORS = {"verify": "val/eer"}
MODELS = {"detect": "[{conv: {out_channels: 4, stride: 8}}]", "verify": "[global_avg_pool]"}


@dataclass(frozen=True)
class Verdict:
    """The exit code of all three commands and a part of their output.

    If the code is 0, only the commands in `by` print `words`; `data check` may print `finding` instead.
    """

    build: Build
    code: int = 0
    words: str = ""
    by: tuple[str, ...] = tuple(COMMANDS)
    finding: str = ""

    def expected(self, command: str) -> str:
        """Text that this command must print; empty if it must print nothing."""
        if self.code == 0 and command not in self.by:
            return ""
        return (self.finding if command == "data check" and self.code == 0 else "") or self.words


@dataclass(frozen=True)
class Said:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def run_commands(build: Build, folder: Path) -> dict[str, Said]:
    """Run the three commands one after the other in a forked process, so that torch is imported only once."""
    folder.mkdir(parents=True, exist_ok=True)
    build(folder)
    found = outcome(*fork(lambda: {name: Said(*run_main(words.split(), folder)) for name, words in COMMANDS.items()}))
    assert isinstance(found, dict), found
    return found


def disagreements(verdict: Verdict, said: dict[str, Said]) -> list[str]:
    """One line for each command that differs from the expected verdict or from the other commands."""
    lines = [
        f"{name} left with {each.code}, not {verdict.code}" for name, each in said.items() if each.code != verdict.code
    ]
    lines += [f"{name} ended in a traceback" for name, each in said.items() if "Traceback" in each.err]
    for name, each in said.items():
        spoken = each.err if verdict.code else each.out + each.err
        if unwrapped(verdict.expected(name)) not in unwrapped(spoken):
            lines.append(f"{name} does not say {verdict.expected(name)!r}")
    if verdict.code:
        return lines + [
            f"{name} has other lines than check" for name in said if errors(said[name]) != errors(said["check"])
        ]
    return lines + _silences(said)


def _silences(said: dict[str, Said]) -> list[str]:
    """One line for each note that one command prints and another does not."""
    noted = [line.removeprefix("data: ") for line in said["train"].err.splitlines() if line.startswith("data: ")]
    lines = [
        f"check does not say {line!r}, as train does"
        for line in noted
        if unwrapped(line) not in unwrapped(said["check"].out)
    ]
    for line in said["check"].err.splitlines():
        lines += [f"{name} does not say {line!r}, as check does" for name in said if line not in said[name].err]
    return lines


def errors(said: Said) -> list[str]:
    """Lines of stderr, without the notes that train prints about the data."""
    return [line for line in said.err.splitlines() if not line.startswith("data: ")]


def unwrapped(text: str) -> str:
    """Text with all white space as single blanks, because tables are wrapped to the width of the terminal."""
    return re.sub(r"\s+", " ", text)


# --- files ------------------------------------------------------------------------------------------------------------


def pixels(seed: int, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """Pixels unique to the seed: noise under a square in the colour of the class, with three classes in turn."""
    made = np.random.default_rng(seed).integers(0, 90, (*size, 3), dtype=np.uint8)
    made[2:8, 2:8] = [(250, 0, 0), (0, 250, 0), (0, 0, 250)][seed % 3]
    return made


def save_square(path: Path, seed: int, size: tuple[int, int] = (16, 16)) -> Path:
    """Save the image of a seed; `size` is (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, size)).save(path)
    return path


def write_config(
    folder: Path, source: str, task: str = "classify", split: str = "{val: 0.25}", monitor: str = "", **more: str
) -> None:
    """Write `c.yaml` with a source, a task, a split, a monitor and other keys of `data`."""
    data = {"source": source, "image": "{size: 8, channels: 3}", "split": split, "cache_dir": "cache"} | more
    lines = "".join(f"  {key}: {value}\n" for key, value in data.items())
    kind = re.findall(r"\w+", task)[0]
    model = MODELS.get(kind, "[flatten]")
    train = f"{{epochs: 1, batch: 4, monitor: {monitor or MONITORS.get(kind, 'val/loss')}}}"
    (folder / "c.yaml").write_text(f"task: {task}\ndata:\n{lines}model: {model}\ntrain: {train}\n")


def change_config(build: Build, old: str, new: str) -> Build:
    """The same files, with a text of the config replaced."""

    def build_anew(folder: Path) -> None:
        build(folder)
        path = folder / "c.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return build_anew
