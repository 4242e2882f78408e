"""The text of a config that `init` writes, with a comment for each choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnnrun.base.counts import format_count
from cnnrun.base.error_lines import join_names
from cnnrun.config import yaml_reader
from cnnrun.data.audit import UNUSABLE
from cnnrun.data.dataset import Dataset
from cnnrun.experiment.init.choice import Choice, train_section
from cnnrun.experiment.init.pretrained import SUGGESTED
from cnnrun.experiment.init.reading import Reading
from cnnrun.experiment.init.recipes import is_imbalanced


def format_config(
    reading: Reading, choice: Choice, dataset: Dataset, findings: dict[str, Any], minutes: float, path: Path
) -> str:
    """Format the config; `findings` are those of the audit."""
    recipe = choice.recipe
    counts = dataset.facts.class_counts
    task = recipe.task(counts)
    if is_imbalanced(counts) and "{" in task and "class_weights" in task:
        task += "    # rare classes count as much as frequent ones"
    lines = [
        f"# Written by `cnnrun init`: {_describe_data(dataset, findings)}.",
        f"# {reading.describe()[0].upper()}{reading.describe()[1:]}.",
        f"# Train: cnnrun train {path}    Look at the data: cnnrun data check {path}, cnnrun data show {path}",
        *_speed_lines(choice, minutes),
        f"task: {task}",
        *_data_section(choice, findings),
        *recipe.model(choice.size).rstrip().splitlines(),
        *train_section(choice, recipe.monitor(dataset)),
    ]
    return "\n".join(lines) + "\n"


def _describe_data(dataset: Dataset, findings: dict[str, Any]) -> str:
    images = format_count(sum(findings["pictures"].values()), "image")
    facts = dataset.facts
    if facts.numbers:
        ranges = [f"{number.name} from {number.minimum:.4g} to {number.maximum:.4g}" for number in facts.numbers]
        return f"{images}, {join_names(ranges)}"
    classes = format_count(len(facts.classes), "class", "classes")
    counts = [count for count in facts.class_counts if count]
    noun = "objects" if dataset.splits["train"].objects is not None else "training images"
    return f"{images}, {classes}" + (f" of {min(counts):,} to {max(counts):,} {noun}" if counts else "")


def _speed_lines(choice: Choice, minutes: float) -> list[str]:
    pretrained = choice.recipe.pretrained
    if pretrained and choice.recipe.computes_features_once:
        speed = f"{choice.images_per_second:,.0f} images/s here"
        return [f"# The features of {pretrained.network} are computed once, at about {speed}."]
    if pretrained:
        speed = f"a training step was measured at {choice.images_per_second:,.0f} images/s here"
        return [f"# It starts from the weights of {pretrained.network}; {speed}; the epochs fit {minutes:g} minutes."]
    lines = [
        f"# A training step was measured at {choice.images_per_second:,.0f} images/s here; "
        f"the epochs fit {minutes:g} minutes."
    ]
    if choice.recipe.can_use_features and choice.channels in (1, 3):
        lines.append(
            f"# From published weights a few hundred images of photos reach a better score in less time: "
            f"`cnnrun zoo weights {SUGGESTED}`, then init again."
        )
    return lines


def _data_section(choice: Choice, findings: dict[str, Any]) -> list[str]:
    """Lines of the section `data`; files, boxes and images that the audit reports as errors are skipped."""
    errors = {finding["what"]: finding for finding in findings["findings"] if finding["level"] == "error"}
    damaged = errors.pop(UNUSABLE, None)
    boxes = findings["bad_boxes"]
    leaks = [finding for finding in errors.values() if not finding["what"].startswith("box")]
    survey = choice.recipe.survey
    lines = ["data:", *_indent(yaml_reader.dump_yaml({"source": survey.source}), 2)]
    if image := choice.image_section():
        height, width = survey.median
        lines.append(f"  image: {yaml_reader.dump_flow(image)}    # the median image has {width}x{height} pixels")
    settings, note = choice.recipe.augment()
    lines.append(f"  # {note}")
    if settings:
        lines.append(f"  augment: {yaml_reader.dump_flow(settings)}")
    if split := choice.recipe.split():
        purpose = "val selects the checkpoint, test is for the final metrics"
        purpose = (
            f"held out of train: {purpose}" if {"val", "test"} & set(split) else f"classes of their own: {purpose}"
        )
        lines.append(f"  split: {yaml_reader.dump_flow(split)}    # {purpose}")
    if damaged:
        lines.append(f"  bad_files: skip    # {damaged['count']:,} {UNUSABLE}; `cnnrun data check` names them")
    if boxes:
        lines.append(f"  bad_boxes: skip    # {format_count(boxes, 'box', 'boxes')} cannot be learned")
    if leaks:
        lines.append(f"  leakage: skip    # {leaks[0]['count']:,}: {leaks[0]['what']}; training leaves them out")
    return lines


def _indent(text: str, width: int) -> list[str]:
    return [" " * width + line for line in text.rstrip().splitlines()]
