"""What is in a config's data and what is wrong with it, as `cnnrun data check` reports it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cnnrun.base.atomic_files import write_new_file
from cnnrun.base.errors import DataError, UserError
from cnnrun.base.progress import progress_bar
from cnnrun.data import manifest
from cnnrun.data.audit import Finding, audit_dataset
from cnnrun.data.index import SourceIndex, index_source
from cnnrun.data.prepare import MOVED_NOTE, DecodedSplits, decode_splits, finish_dataset
from cnnrun.experiment.assemble import load_initial_weights
from cnnrun.experiment.schema import Experiment
from cnnrun.experiment.training_checks import refuse_unlearnable

Report = dict[str, Any]


def check_data(experiment: Experiment, verify: Path | None, write: Path | None) -> Report:
    """Look through the data; compare its files with the manifest `verify` and list them in `write` if given.

    Raises DataError.
    """
    try:
        indexed = index_source(experiment.data)
    except DataError:
        load_initial_weights(experiment)  # training looks at the weights first, and says what is wrong with them alone
        raise
    report: Report = {"name": experiment.name, **_manifest_part(indexed, verify, write)}
    # Everything is looked at, whatever the config would stop for.
    lenient = experiment.data.model_copy(update={"bad_files": "skip", "bad_boxes": "skip", "leakage": "keep"})
    decoded = decode_splits(lenient, indexed, progress_bar)
    refusal = _refusal(experiment, indexed, decoded)
    try:
        dataset = finish_dataset(lenient, indexed, decoded)
    except DataError:
        refuse_unfit({"refused": refusal, "findings": []})  # in training's words, which may stop for another reason
        raise
    report |= audit_dataset(experiment.data, dataset, progress_bar)
    if decoded.moved_count:
        report["findings"].append(asdict(Finding("note", f"pictures {MOVED_NOTE}", decoded.moved_count, [])))
    return report | {"refused": refusal}


def _manifest_part(indexed: SourceIndex, verify: Path | None, write: Path | None) -> Report:
    """The report's part about manifests: where one is written, how the files differ from another."""
    if not verify and not write:
        return {}
    paths = manifest.list_unique_files(indexed.source_splits())
    if not paths:
        raise DataError("this source has no files to list")
    root, report = manifest.common_folder(paths), Report()
    if write:
        write_new_file(write, manifest.format_manifest(paths, root))
        report["manifest"] = str(write)
    if verify:
        report["differences"] = manifest.differences(verify, paths, root)
    return report


def _refusal(experiment: Experiment, indexed: SourceIndex, decoded: DecodedSplits) -> dict[str, Any] | None:
    """What training would say and leave with, if it would not begin; None where it would."""
    try:
        weights = load_initial_weights(experiment)
        experiment = experiment.with_statistics_of_weights(weights.facts if weights else None)
        refuse_unlearnable(experiment, finish_dataset(experiment.data, indexed, decoded), weights)
    except UserError as error:
        return {"lines": list(error.lines), "exit_code": error.exit_code}
    return None


def refuse_unfit(report: dict[str, Any]) -> None:
    """Raise DataError for a report with what training would refuse, or with files that are not the manifest's."""
    if refused := report["refused"]:
        error = DataError(*refused["lines"])
        error.exit_code = refused["exit_code"]
        raise error
    if any(report.get("differences", {}).values()) or any(
        finding["level"] == "error" for finding in report["findings"]
    ):
        raise DataError("the data is not fit as it is: see above")
