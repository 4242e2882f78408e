"""Results as people read them: tables and lines on stdout."""

from __future__ import annotations

import time
from typing import Any

from cnnrun.base.console import console, table
from cnnrun.base.errors import printable
from cnnrun.results.report import classes

_MOST_ROWS, _EXAMPLES = 30, 3


def training(data: dict[str, Any]) -> None:
    """The end of a training."""
    out = console()
    best = "  ".join(f"{name} {value:.4f}" for name, value in data["best"].items())
    out.print(f"best at step {data['best_step']} of {data['steps']}: {best}")
    out.print(
        f"{data['seconds']:.1f} s, {data['images_per_second']:,.0f} images/s, "
        f"waiting for data {data['data_wait_share']:.1%}"
    )
    out.print(f"run: {data['run']}")


def selftest(data: dict[str, Any]) -> None:
    """A row a check."""
    words = {True: "ok", False: "FAILED", None: "cannot tell"}
    rows = [[row["check"], words[row["passed"]], printable(row["found"])] for row in data["checks"]]
    out = console()
    out.print(table(["check", "verdict", "found"], rows, left=3))
    verdict = "all is well" if data["passed"] else "not as it must be"
    out.print(f"{data['name']}: {verdict}, {data['seconds']:.0f} s")


def evaluation(data: dict[str, Any]) -> None:
    """Headline numbers, then the tables."""
    out = console()
    out.print(f"{data['run']}, checkpoint of step {data['step']}: split {data['split']}, {data['samples']:,} pictures")
    numbers, spans = data["numbers"], data["intervals"]
    out.print("  ".join(f"{name} {_number(value)}" for name, value in numbers.items() if name not in spans))
    if None in numbers.values():
        out.print(f"n/a: not defined here, {data['split']} has nothing of that kind")
    rows = [[name, f"{numbers[name]:.4f}", f"{low:.4f}", f"{high:.4f}"] for name, (low, high) in spans.items()]
    if rows:
        out.print(table(["number", "value", "from", "to (95 %)"], rows))
    for name, rows in data["tables"].items():
        if name != "precision_recall":  # for programs: a hundred lines a class
            classes.show_rows(out, rows)
    for name, matrix in data["matrices"].items():
        classes.show_matrix(out, name, matrix, data["tables"].get("per_class", []))
    for path in data.get("plots", ()):
        out.print(printable(path))


def parity(data: dict[str, Any]) -> None:
    """What an export was compared on."""
    out = console()
    out.print(f"{data['path']}: equal to the network on {data['samples_compared']} pictures of split {data['split']}")
    out.print(f"largest difference {data['largest_difference']:.1e} at batch sizes {data['batch_sizes']}")
    artefact = data["metrics"]["artefact"]
    out.print("measured on the file: " + "  ".join(f"{name} {_number(value)}" for name, value in artefact.items()))


def _number(value: float | None) -> str:
    """A number; one that is not defined, such as the AP of a size that no object has, is n/a."""
    return "n/a" if value is None else f"{value:.4f}"


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
    out = console()
    out.print(table(columns, rows, left=2))
    out.print("a multiply-add counts once, as in torchvision's GFLOPS; `cnnrun summary` counts it as two operations")
    out.print("use one: `model: resnet18` in a config; read, copy and change one: cnnrun zoo show resnet18")


def imported(data: dict[str, Any]) -> None:
    """What the weights file holds, and how it is used."""
    out = console()
    out.print(
        f"{data['path']}: {data['parameters']:,} parameters, {data['tensors']} tensors, {len(data['classes'])} classes"
    )
    out.print(f"use it: cnnrun predict PICTURES --run {data['path']}, or model.weights={data['path']} in a config")


def checked(data: dict[str, Any]) -> None:
    """A config that is fine."""
    out = console()
    what = ", ".join(each["name"] for each in data["numbers"]) or f"{len(data['classes'])} classes"
    out.print(f"{data['name']}: fine. {printable(what)}; pictures {_shape(data['image'])}")
    out.print("pictures: " + "  ".join(f"{name} {count:,}" for name, count in data["counts"].items()))
    out.print(
        f"{data['parameters']:,} parameters, {data['flops'] / 1e6:,.1f} MFLOPs a picture, {data['steps']:,} steps"
    )
    for line in data["remarks"]:
        out.print(line)


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
    out = console()
    out.print(f"input {_shape(data['image'])}")
    out.print(table(columns, rows, left=2))
    total = data["total"]
    out.print(
        f"{total['parameters']:,} parameters ({total['parameters'] * 4 / 2**20:,.2f} MiB), "
        f"{total['flops'] / 1e6:,.2f} MFLOPs a picture, {total['activation_bytes'] / 2**20:,.2f} MiB of activations"
    )


def audit(data: dict[str, Any]) -> None:
    """What a data set holds and what is wrong with it."""
    out = console()
    splits = list(data["pictures"])
    out.print(f"{data['name']}: " + "  ".join(f"{name} {count:,}" for name, count in data["pictures"].items()))
    sizes = data["sizes"]
    shown = "  ".join(f"{name} {_width_height(sizes[name])}" for name in ("smallest", "median", "largest"))
    out.print(f"width x height: {shown}, {sizes['distinct']:,} different")
    for name in ("formats", "modes"):
        out.print(f"{name}: " + "  ".join(f"{key} {count:,}" for key, count in data[name].items()))
    for name in ("mean", "std"):
        out.print(f"{name} of train: " + " ".join(f"{value:.2f}" for value in data[name]))
    names = list(data["classes"][splits[0]])
    rows = [[name, *(f"{data['classes'][split].get(name, 0):,}" for split in splits)] for name in names[:_MOST_ROWS]]
    out.print(table(["class", *splits], rows))
    if len(names) > _MOST_ROWS:
        out.print(f"... and {len(names) - _MOST_ROWS:,} more classes (--json has them all)")
    for what, found in data.get("differences", {}).items():
        for name in found[:_MOST_ROWS]:
            out.print(f"manifest: {what}: {name}")
        if len(found) > _MOST_ROWS:
            out.print(f"manifest: {what}: and {len(found) - _MOST_ROWS:,} more (--json has them all)")
    if data["findings"] or not data["refused"]:  # what is refused is the error that follows
        findings(data["findings"])


def findings(found: list[dict[str, Any]]) -> None:
    """A line a finding, and its examples below."""
    out = console()
    for each in found:
        out.print(f"{each['level']}: {each['count']:,} {each['what']}")
        for example in each["examples"][:_EXAMPLES]:
            out.print(f"    {' = '.join(example)}")
        if len(each["examples"]) > _EXAMPLES:
            out.print(f"    and {each['count'] - _EXAMPLES:,} more")
    if not found:
        out.print("nothing is wrong with it")


def sheet(data: dict[str, Any]) -> None:
    """Where the contact sheet is."""
    console().print(f"{printable(data['path'])}: {data['pictures']} pictures, {data['times']} times augmented")


def page(data: dict[str, Any]) -> None:
    """Where a page is."""
    out = console()
    count = f"{len(data['runs'])} runs" if len(data["runs"]) > 1 else data["runs"][0]
    out.print(printable(f"{data['path']}: {count}, measured on {data['split']}, {data['bytes'] / 2**20:.1f} MiB"))


def division(data: dict[str, Any]) -> None:
    """What a table of splits says, and how a config uses it."""
    out = console()
    for column, counts in data["columns"].items():
        out.print(f"{column}: " + "  ".join(f"{name} {count:,}" for name, count in counts.items() if count))
    if data["groups"]:
        out.print(f"{data['groups']:,} groups, each in one split")
    split = "" if "split" in data["columns"] else f", split: {next(iter(data['columns']))}"
    settings = f"path: {data['path']}, root: {data['root']}{split}"
    out.print(printable(f"use it:  source: {{table: {{{settings}}}}}"))


def cached(data: dict[str, Any]) -> None:
    """A row a data set."""
    out = console()
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
    out.print(table(["key", "source", "pictures", "shape", "MiB", "", "used"], rows, left=2))
    out.print(f"{printable(data['folder'])}: {data['bytes'] / 2**30:,.2f} GiB")


def cleared(data: dict[str, Any]) -> None:
    """What was removed."""
    out = console()
    out.print(f"{len(data['removed'])} removed, {data['bytes'] / 2**30:,.2f} GiB freed")
    for key in data["in_use"]:
        out.print(f"{key}: in use, left")


def started(data: dict[str, Any]) -> None:
    """What `init` found and chose, and what to do next."""
    out = console()
    counts = data["classes"]["train"]
    out.print("found: " + "  ".join(f"{name} {count:,}" for name, count in data["pictures"].items()))
    few, many = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    out.print(
        f"{len(counts)} classes in train: {counts[few]:,} ({printable(few)}) to {counts[many]:,} ({printable(many)})"
    )
    sizes = data["sizes"]
    out.print(f"pictures from {_width_height(sizes['smallest'])} to {_width_height(sizes['largest'])} pixels")
    findings(data["findings"])
    height, width = data["size"]
    out.print(
        f"chosen: {width}x{height}x{data['channels']}, {data['parameters']:,} parameters, batch {data['batch']}, "
        f"{data['epochs']} epochs: about {data['minutes']:g} min here ({data['images_per_second']:,} images/s measured)"
    )
    path = printable(data["path"])
    out.print(f"{path} is written; next: cnnrun train {path}")


def kinds(data: dict[str, Any]) -> None:
    """Families of kinds with what each is, or one kind with its settings."""
    out = console()
    for family, entries in data.items():
        out.print(f"{family}:")
        for entry in entries:
            out.print(f"  {entry['kind']:<20} {entry['help']}")
            if len(entries) == 1:
                for setting in entry["settings"]:
                    default = "required" if setting["required"] else f"default {setting['default']}"
                    out.print(f"      {setting['name']:<18} {default}. {setting['help']}")


def compared(data: dict[str, Any]) -> None:
    """Whether two pictures show one person."""
    out = console()
    verdict = "the same" if data["same"] else "not the same"
    out.print(f"{verdict}: similarity {data['similarity']:.4f}, threshold {data['threshold']:.4f}{_chosen_for(data)}")


def _chosen_for(data: dict[str, Any]) -> str:
    return "" if data["far"] is None else f" (for FAR {data['far']:g} on val)"


def gallery(data: dict[str, Any]) -> None:
    """Who is in a gallery."""
    out = console()
    for what in ("added", "removed"):
        if names := data[what]:
            more = f" and {len(names) - _MOST_ROWS:,} more" if len(names) > _MOST_ROWS else ""
            out.print(f"{what}: {printable(', '.join(names[:_MOST_ROWS]))}{more}")
    people = data["people"]
    shown = list(people.items())[:_MOST_ROWS]
    out.print(table(["person", "pictures"], [[name, f"{count:,}"] for name, count in shown]))
    if len(people) > len(shown):
        out.print(f"and {len(people) - len(shown):,} more")
    out.print(f"{printable(data['path'])}: {len(people):,} people, {sum(people.values()):,} pictures")


def _width_height(size: list[int]) -> str:
    return f"{size[1]}x{size[0]}"


def _shape(shape: list[int] | tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
