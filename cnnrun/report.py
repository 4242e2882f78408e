"""Results as people read them: tables and lines on stdout."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table

from cnnrun.errors import printable

_MOST_ROWS = 30
_WIDE = 10_000  # a table's width when its reader is a program or a file: nothing is cut


def _console() -> Console:
    console = Console(highlight=False, markup=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, emoji=False, width=_WIDE)


def _table(columns: list[str], rows: list[list[str]], left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(printable(cell) for cell in row))
    return table


def training(data: dict[str, Any]) -> None:
    """The end of a training."""
    console = _console()
    best = "  ".join(f"{name} {value:.4f}" for name, value in data["best"].items())
    console.print(f"best at step {data['best_step']} of {data['steps']}: {best}")
    console.print(
        f"{data['seconds']:.1f} s, {data['images_per_second']:,.0f} images/s, "
        f"waiting for data {data['data_wait_share']:.1%}"
    )
    console.print(f"run: {data['run']}")


def selftest(data: dict[str, Any]) -> None:
    """A row a check."""
    words = {True: "ok", False: "FAILED", None: "cannot tell"}
    rows = [[row["check"], words[row["passed"]], printable(row["found"])] for row in data["checks"]]
    console = _console()
    console.print(_table(["check", "verdict", "found"], rows, left=3))
    verdict = "all is well" if data["passed"] else "not as it must be"
    console.print(f"{data['name']}: {verdict}, {data['seconds']:.0f} s")


def evaluation(data: dict[str, Any]) -> None:
    """Headline numbers, then the tables."""
    console = _console()
    console.print(
        f"{data['run']}, checkpoint of step {data['step']}: split {data['split']}, {data['samples']:,} pictures"
    )
    numbers, spans = data["numbers"], data["intervals"]
    console.print("  ".join(f"{name} {value:.4f}" for name, value in numbers.items() if name not in spans))
    rows = [[name, f"{numbers[name]:.4f}", f"{low:.4f}", f"{high:.4f}"] for name, (low, high) in spans.items()]
    if rows:
        console.print(_table(["number", "value", "from", "to (95 %, bootstrap)"], rows))
    for name, rows in data["tables"].items():
        if name == "precision_recall":  # for programs: a hundred lines a class
            continue
        cells = [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
        console.print(_table(list(rows[0]), cells))
    for name, matrix in data["matrices"].items():
        console.print(f"{name} (rows: true, columns: predicted)")
        labels = [str(i) for i in range(len(matrix))]
        console.print(_table(["", *labels], [[labels[i], *map(str, row)] for i, row in enumerate(matrix)]))
    for path in data.get("plots", ()):
        console.print(printable(path))


def parity(data: dict[str, Any]) -> None:
    """What an export was compared on."""
    console = _console()
    console.print(
        f"{data['path']}: equal to the network on {data['samples_compared']} pictures of split {data['split']}"
    )
    console.print(f"largest difference {data['largest_difference']:.1e} at batch sizes {data['batch_sizes']}")
    artefact = data["metrics"]["artefact"]
    console.print("measured on the file: " + "  ".join(f"{name} {value:.4f}" for name, value in artefact.items()))


def zoo(data: dict[str, Any]) -> None:
    """A row a network."""
    columns = ["network", "input", "classes", "parameters", "GMACs", "paper"]
    rows = [
        [
            entry["name"],
            _shape(entry["image"]),
            str(entry["classes"]),
            f"{entry['parameters']:,}",
            f"{entry['macs'] / 1e9:.3g}",
            entry["paper"].split(",")[0].split(" 20")[0].split(" 19")[0],
        ]
        for entry in data["networks"]
    ]
    console = _console()
    console.print(_table(columns, rows, left=2))
    console.print(
        "a multiply-add counts once, as in torchvision's GFLOPS; `cnnrun summary` counts it as two operations"
    )
    console.print("use one: `model: resnet18` in a config; read, copy and change one: cnnrun zoo show resnet18")


def imported(data: dict[str, Any]) -> None:
    """What the weights file holds, and how it is used."""
    console = _console()
    console.print(
        f"{data['path']}: {data['parameters']:,} parameters, {data['tensors']} tensors, {len(data['classes'])} classes"
    )
    console.print(f"use it: cnnrun predict PICTURES --run {data['path']}, or model.weights={data['path']} in a config")


def checked(data: dict[str, Any]) -> None:
    """A config that is fine."""
    console = _console()
    what = ", ".join(each["name"] for each in data["numbers"]) or f"{len(data['classes'])} classes"
    console.print(f"{data['name']}: fine. {printable(what)}; pictures {_shape(data['image'])}")
    console.print("pictures: " + "  ".join(f"{name} {count:,}" for name, count in data["counts"].items()))
    console.print(
        f"{data['parameters']:,} parameters, {data['flops'] / 1e6:,.1f} MFLOPs a picture, {data['steps']:,} steps"
    )
    for line in data["remarks"]:
        console.print(line)


def summary(data: dict[str, Any]) -> None:
    """A row a layer."""
    columns = ["layer", "in weights", "output", "parameters", "MFLOPs", "KiB", "sees", "stride"]
    rows = [
        [
            row["path"],
            row["module"],
            _shape(row["out_shape"]),
            f"{row['parameters']:,}",
            f"{row['flops'] / 1e6:,.2f}",
            f"{row['activation_bytes'] / 1024:,.1f}",
            "all" if row["receptive_field"] is None else "x".join(map(str, row["receptive_field"])),
            "" if row["stride"] is None else "x".join(f"{s:g}" for s in row["stride"]),
        ]
        for row in data["layers"]
    ]
    console = _console()
    console.print(f"input {_shape(data['image'])}")
    console.print(_table(columns, rows, left=2))
    total = data["total"]
    console.print(
        f"{total['parameters']:,} parameters ({total['parameters'] * 4 / 2**20:,.2f} MiB), "
        f"{total['flops'] / 1e6:,.2f} MFLOPs a picture, {total['activation_bytes'] / 2**20:,.2f} MiB of activations"
    )


def audit(data: dict[str, Any]) -> None:
    """What a data set holds and what is wrong with it."""
    console = _console()
    splits = list(data["pictures"])
    console.print(f"{data['name']}: " + "  ".join(f"{name} {count:,}" for name, count in data["pictures"].items()))
    sizes = data["sizes"]
    shown = "  ".join(f"{name} {_width_height(sizes[name])}" for name in ("smallest", "median", "largest"))
    console.print(f"width x height: {shown}, {sizes['distinct']:,} different")
    for name in ("formats", "modes"):
        console.print(f"{name}: " + "  ".join(f"{key} {count:,}" for key, count in data[name].items()))
    for name in ("mean", "std"):
        console.print(f"{name} of train: " + " ".join(f"{value:.2f}" for value in data[name]))
    names = list(data["classes"][splits[0]])
    rows = [[name, *(f"{data['classes'][split].get(name, 0):,}" for split in splits)] for name in names[:_MOST_ROWS]]
    console.print(_table(["class", *splits], rows))
    if len(names) > _MOST_ROWS:
        console.print(f"... and {len(names) - _MOST_ROWS:,} more classes (--json has them all)")
    for what, found in data.get("differences", {}).items():
        for name in found[:_MOST_ROWS]:
            console.print(f"manifest: {what}: {name}")
    findings(data["findings"])


def findings(found: list[dict[str, Any]]) -> None:
    """A line a finding, and its examples below."""
    console = _console()
    for each in found:
        console.print(f"{each['level']}: {each['count']:,} {each['what']}")
        for example in each["examples"][:3]:
            console.print(f"    {' = '.join(example)}")
    if not found:
        console.print("nothing is wrong with it")


def sheet(data: dict[str, Any]) -> None:
    """Where the contact sheet is."""
    _console().print(f"{printable(data['path'])}: {data['pictures']} pictures, {data['times']} times augmented")


def picture(data: dict[str, Any]) -> None:
    """A drawing that was written."""
    _console().print(f"{printable(data['path'])}: {data['pictures']} pictures of split {data['split']}")


def assigned(data: dict[str, Any]) -> None:
    """A row an object: how many cells learn it, and how well the best of them fits."""
    console = _console()
    rows = [[str(each["object"]), each["label"], str(each["cells"]), f"{each['best']:.3f}"] for each in data["objects"]]
    console.print(f"{printable(data['picture'])} ({data['split']}), drawn in {printable(data['path'])}")
    console.print(_table(["object", "label", "cells", "best"], rows, left=2))


def division(data: dict[str, Any]) -> None:
    """What a table of splits says, and how a config uses it."""
    console = _console()
    for column, counts in data["columns"].items():
        console.print(f"{column}: " + "  ".join(f"{name} {count:,}" for name, count in counts.items() if count))
    if data["groups"]:
        console.print(f"{data['groups']:,} groups, each in one split")
    split = "" if "split" in data["columns"] else f", split: {next(iter(data['columns']))}"
    settings = f"path: {data['path']}, root: {data['root']}{split}"
    console.print(printable(f"use it:  source: {{table: {{{settings}}}}}"))


def cached(data: dict[str, Any]) -> None:
    """A row a data set."""
    console = _console()
    rows = [
        [
            entry["key"][:12],
            entry["source"],
            f"{entry['count']:,}",
            _shape(entry["shape"]),
            f"{entry['bytes'] / 2**20:,.1f}",
            "" if entry["complete"] else "unfinished",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["used"])),
        ]
        for entry in data["entries"]
    ]
    console.print(_table(["key", "source", "pictures", "shape", "MiB", "", "used"], rows, left=2))
    console.print(f"{printable(data['folder'])}: {data['bytes'] / 2**30:,.2f} GiB")


def cleared(data: dict[str, Any]) -> None:
    """What was removed."""
    console = _console()
    console.print(f"{len(data['removed'])} removed, {data['bytes'] / 2**30:,.2f} GiB freed")
    for key in data["in_use"]:
        console.print(f"{key}: in use, left")


def started(data: dict[str, Any]) -> None:
    """What `init` found and chose, and what to do next."""
    console = _console()
    counts = data["classes"]["train"]
    console.print("found: " + "  ".join(f"{name} {count:,}" for name, count in data["pictures"].items()))
    few, many = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    console.print(
        f"{len(counts)} classes in train: {counts[few]:,} ({printable(few)}) to {counts[many]:,} ({printable(many)})"
    )
    sizes = data["sizes"]
    console.print(f"pictures from {_width_height(sizes['smallest'])} to {_width_height(sizes['largest'])} pixels")
    findings(data["findings"])
    height, width = data["size"]
    console.print(
        f"chosen: {width}x{height}x{data['channels']}, {data['parameters']:,} parameters, batch {data['batch']}, "
        f"{data['epochs']} epochs: about {data['minutes']:g} min here ({data['images_per_second']:,} images/s measured)"
    )
    path = printable(data["path"])
    console.print(f"{path} is written; next: cnnrun train {path}")


def kinds(data: dict[str, Any]) -> None:
    """Families of kinds with what each is, or one kind with its settings."""
    console = _console()
    for family, entries in data.items():
        console.print(f"{family}:")
        for entry in entries:
            console.print(f"  {entry['kind']:<20} {entry['help']}")
            if len(entries) == 1:
                for setting in entry["settings"]:
                    default = "required" if setting["required"] else f"default {setting['default']}"
                    console.print(f"      {setting['name']:<18} {default}. {setting['help']}")


def compared(data: dict[str, Any]) -> None:
    """Whether two pictures show one person."""
    console = _console()
    verdict = "the same" if data["same"] else "not the same"
    console.print(
        f"{verdict}: similarity {data['similarity']:.4f}, threshold {data['threshold']:.4f}{_chosen_for(data)}"
    )


def _chosen_for(data: dict[str, Any]) -> str:
    return "" if data["far"] is None else f" (for FAR {data['far']:g} on val)"


def gallery(data: dict[str, Any]) -> None:
    """Who is in a gallery."""
    console = _console()
    for what in ("added", "removed"):
        if data[what]:
            console.print(f"{what}: {printable(', '.join(data[what][:_MOST_ROWS]))}")
    people = data["people"]
    shown = list(people.items())[:_MOST_ROWS]
    console.print(_table(["person", "pictures"], [[name, f"{count:,}"] for name, count in shown]))
    if len(people) > len(shown):
        console.print(f"and {len(people) - len(shown):,} more")
    console.print(f"{printable(data['path'])}: {len(people):,} people, {sum(people.values()):,} pictures")


def _width_height(size: list[int]) -> str:
    return f"{size[1]}x{size[0]}"


def _shape(shape: list[int] | tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
