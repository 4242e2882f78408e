"""`cnnrun plan`: estimate the time and memory of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnnrun.base.console import Output
from cnnrun.commands.options import Config, Device, Json, Overrides, Runs, refuse_ranks, show


def plan(
    config: Config,
    overrides: Overrides = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Estimate the time and memory of a training from a few steps. Example: cnnrun plan configs/digits.yaml"""
    refuse_ranks("plan")
    from cnnrun.base.device import choose_device, keep_freed_memory
    from cnnrun.experiment.config_file import read_config

    experiment, torch_device = read_config(config, overrides or []), choose_device(device)
    from cnnrun.results.studies.plan import plan_training

    keep_freed_memory()
    show(plan_training(experiment, torch_device, runs), as_json, _print_plan)


def _print_plan(data: dict[str, Any], out: Output) -> None:
    """Print the estimated time and memory of a training."""
    total, epochs = data["seconds"], data["epochs"]
    out.print(
        f"{data['name']}: {_format_time(total)} for {epochs:,} epochs, {_format_time(data['seconds_per_epoch'])} each"
    )
    steps = f"{data['steps_per_epoch']:,} steps of {data['seconds_per_step'] * 1000:.1f} ms"
    out.print(f"{steps}, {data['images_per_second']:,.0f} images/s, waiting for data {data['data_wait_share']:.1%}")
    out.print(f"peak memory {data['peak_memory_mib']:,} MiB")
    if data["decode_seconds"]:
        out.print(
            f"before that, decoding: {_format_time(data['decode_seconds'])}, {data['cache_mib']:,.0f} MiB of cache"
        )
    out.print(f"measured in {data['took']:.0f} s; the training will compare its own time with this estimate")


def _format_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
