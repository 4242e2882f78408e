"""`cnnrun summary`: print the network as a table."""

from __future__ import annotations

from typing import Any

from cnnrun.base.console import Output, build_table
from cnnrun.commands.options import Config, Json, Overrides, show
from cnnrun.commands.tables import shape_text


def summary(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print a table of the layers: shapes, parameters, FLOPs. Example: cnnrun summary c.yaml"""
    from cnnrun.experiment.config_file import read_config

    experiment = read_config(config, overrides or [])
    from cnnrun.experiment import checks

    show(checks.summarize(experiment), as_json, _print_summary)


def _print_summary(data: dict[str, Any], out: Output) -> None:
    """Print a row for each layer."""
    columns = ["layer", "name in weights", "output", "parameters", "MFLOPs", "KiB", "receptive field", "stride"]
    rows = [
        [
            row["path"],
            row["module"],
            shape_text(row["out_shape"]),
            f"{row['parameters']:,}",
            f"{row['flops'] / 1e6:,.2f}",
            f"{row['activation_bytes'] / 1024:,.1f}",
            "all" if row["receptive_field"] is None else "x".join(map(str, row["receptive_field"])),
            "" if row["stride"] is None else "x".join(f"{step:g}" for step in row["stride"]),
        ]
        for row in data["layers"]
    ]
    out.print(f"input {shape_text(data['image'])}")
    out.print(build_table(columns, rows, text_columns=2))
    total = data["total"]
    out.print(
        f"{total['parameters']:,} parameters ({total['parameters'] * 4 / 2**20:,.2f} MiB), "
        f"{total['flops'] / 1e6:,.2f} MFLOPs per image, {total['activation_bytes'] / 2**20:,.2f} MiB of activations"
    )
