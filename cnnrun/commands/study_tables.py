"""What calibrate, compare, sweep, find-lr, plan and train --seeds print for people."""

from __future__ import annotations

from typing import Any

from cnnrun.base.console import console, table
from cnnrun.base.errors import printable
from cnnrun.results.report.classes import cell


def calibrated(data: dict[str, Any]) -> None:
    """A temperature, and what it changes on the pictures that it was fitted on."""
    out = console()
    run = printable(data["run"])
    out.print(f"temperature {data['temperature']:.4f}, kept in {run}: eval, predict and export use it")
    changes = {"negative log-likelihood": data["nll"], **({"ece": data["ece"]} if "ece" in data else {})}
    shown = "  ".join(f"{name} {before:.4f} -> {after:.4f}" for name, (before, after) in changes.items())
    out.print(f"on the {data['samples']:,} pictures of {data['split']} that it was fitted on: {shown}")


def seeds(data: dict[str, Any]) -> None:
    """A row a number: its mean over the seeds, how it varies, and the mean's interval."""
    out = console()
    count = len(data["seeds"])
    out.print(f"{data['name']}: {count} seeds, measured on {data['split']}")
    columns = ("mean", "deviation", "from", "to")
    rows = [
        [name, *(cell(of[column]) if column in of else "" for column in columns)]
        for name, of in data["summary"].items()
    ]
    out.print(table(["number", "mean", "deviation", "from", "to (95 % of the mean)"], rows))
    for row in data["runs"]:
        out.print(f"seed {row['seed']}: {printable(row['run'])}")
    out.print(printable(data["path"]))


def compared(data: dict[str, Any]) -> None:
    """For each pair: what differs in config and data, and a row a number with its test."""
    out = console()
    out.print(f"on {data['samples']:,} pictures of {data['split']}")
    for row in data["runs"]:
        if reached := row["unfinished"]:
            how_far = f"step {reached['step']:,} of {reached['steps']:,}"
            out.print(
                f"{printable(row['run'])} is unfinished ({how_far}): its checkpoint of step {row['step']:,} is compared"
            )
    for pair in data["pairs"]:
        first, other = map(printable, pair["runs"])
        out.print(f"{first} and {other}")
        for line in pair["config"] or ["the configs are the same"]:
            out.print(f"  {line}")
        for line in pair["data"]:
            out.print(f"  other data: {printable(line)}")
        if pair["unpaired"]:
            out.print(f"  not tested, they were not measured on the same: {pair['unpaired']}")
            continue
        out.print(_tests(pair["tests"]))
        out.print(_verdict(pair))
    for path in data.get("plots", ()):
        out.print(printable(path))


def _tests(tests: list[dict[str, Any]]) -> Any:
    rows = [
        [
            row["number"],
            f"{row['first']:.4f}",
            f"{row['other']:.4f}",
            f"{row['difference']:+.4f}",
            f"{row['from']:+.4f}",
            f"{row['to']:+.4f}",
            f"{row['p']:.3g}",
            row["test"],
            "differs" if row["distinguishable"] else "",
        ]
        for row in tests
    ]
    return table(["number", "first", "other", "difference", "from", "to (95 %)", "p", "test", ""], rows)


def _verdict(pair: dict[str, Any]) -> str:
    if not pair["tests"]:
        return "not tested: these pictures are too few for any number to say how far it would move"
    if not pair["distinguishable"]:
        return "not distinguishable on these pictures"
    names = ", ".join(pair["distinguishable"])
    if pair["same_config"]:
        return f"distinguishable by {names}: as trainings, for their config is the same"
    return f"distinguishable by {names}; whether by their configs, several seeds of each would tell (train --seeds)"


def swept(data: dict[str, Any]) -> None:
    """A row a trial, and the best."""
    out = console()
    rows = [
        [
            str(row["trial"]),
            row["state"],
            "" if row["value"] is None else f"{row['value']:.5g}",
            "  ".join(
                f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                for name, value in row["settings"].items()
            ),
        ]
        for row in data["trials"]
    ]
    out.print(table(["trial", "", data["monitor"], "settings"], rows, left=2))
    best = data["best"]
    out.print(f"best: trial {best['trial']}, {data['monitor']} {best['value']:.5g}: {printable(best['config'])}")


def found_lr(data: dict[str, Any]) -> None:
    """The range as some of its rows, and the rates that are usual to take."""
    out = console()
    rates = data["rates"]
    shown = rates[:: max(1, len(rates) // 15)]
    out.print(table(["lr", "loss"], [[f"{row['lr']:.3g}", f"{row['smoothed']:.4f}"] for row in shown]))
    if len(shown) < len(rates):
        out.print(f"every {len(rates) // 15}th of {len(rates):,} steps (--json has them all)")
    if "steepest" in data:
        out.print(f"the loss falls fastest at {data['steepest']:.2g}; a tenth of where it is lowest is ", end="")
        out.print(f"{data['lowest_tenth']:.2g}. The config says {data['now']:g}, and nothing was changed.")
    else:
        out.print("the loss does not fall in this range by more than its noise; nothing was changed")
    for path in data.get("plots", ()):
        out.print(printable(path))


def planned(data: dict[str, Any]) -> None:
    """What a training will take."""
    out = console()
    total, epochs = data["seconds"], data["epochs"]
    out.print(f"{data['name']}: {_time(total)} for {epochs:,} epochs, {_time(data['seconds_per_epoch'])} each")
    steps = f"{data['steps_per_epoch']:,} steps of {data['seconds_per_step'] * 1000:.1f} ms"
    out.print(f"{steps}, {data['images_per_second']:,.0f} images/s, waiting for data {data['data_wait_share']:.1%}")
    out.print(f"peak memory {data['peak_memory_mib']:,} MiB")
    if data["decode_seconds"]:
        out.print(f"before that, decoding: {_time(data['decode_seconds'])}, {data['cache_mib']:,.0f} MiB of cache")
    out.print(f"measured in {data['took']:.0f} s; the training will say how near this came")


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
