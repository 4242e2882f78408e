"""`cnnrun plan`: estimate the time and memory of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnnrun.base.console import Output
from cnnrun.base.counts import format_count
from cnnrun.base.durations import format_duration
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
    from cnnrun.base.device import choose_device
    from cnnrun.experiment.config_file import read_config

    experiment, torch_device = read_config(config, overrides or []), choose_device(device)
    from cnnrun.results.studies.plan import plan_training

    show(plan_training(experiment, torch_device, runs), as_json, _print_plan)


def _print_plan(data: dict[str, Any], out: Output) -> None:
    """Print the estimated time and memory of a training."""
    idle = " on an otherwise idle machine" if data["on_idle_machine"] else ""
    out.print(
        f"{data['name']}: {format_duration(data['seconds'])} for {format_count(data['epochs'], 'epoch')}, "
        f"{format_duration(data['seconds_per_epoch'])} each{idle}"
    )
    steps = format_count(data["steps_per_epoch"], "step")
    speed = f"{steps} of {data['seconds_per_step'] * 1000:.1f} ms"
    out.print(f"{speed}, {data['images_per_second']:,.0f} images/s, waiting for data {data['data_wait_share']:.1%}")
    out.print(f"peak memory {data['peak_memory_mib']:,} MiB")
    if data["decode_seconds"]:
        out.print(
            f"before that, decoding: {format_duration(data['decode_seconds'])}, {data['cache_mib']:,.0f} MiB of cache"
        )
    out.print(
        f"measured in {format_duration(data['took'])}; after the training its own time is printed beside this estimate"
    )
