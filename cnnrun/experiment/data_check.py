"""Check a config's data: its contents and what is wrong with it, as `cnnrun data check` prints them."""

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
from cnnrun.experiment.training_checks import check_training_possible

Audit = dict[str, Any]


def check_data(experiment: Experiment, verify: Path | None, write: Path | None) -> Audit:
    """Audit the data; compare its files with the manifest `verify`, and write their manifest to `write`, if given.

    Raises DataError.
    """
    try:
        source_index = index_source(experiment.data)
    except DataError:
        load_initial_weights(experiment)  # training reads the weights first, so it would report a mistake there
        raise
    audit: Audit = {"name": experiment.name, **_check_manifest(source_index, verify, write)}
    # Audit all of the data, even where the config's policies would stop.
    lenient = experiment.data.model_copy(update={"bad_files": "skip", "bad_boxes": "skip", "leakage": "keep"})
    decoded_splits = decode_splits(lenient, source_index, progress_bar)
    refusal = _training_refusal(experiment, source_index, decoded_splits)
    try:
        dataset = finish_dataset(lenient, source_index, decoded_splits)
    except DataError:
        check_audit_passed({"refused": refusal, "findings": []})  # training may stop earlier, for another reason
        raise
    audit |= audit_dataset(experiment.data, dataset, progress_bar)
    if decoded_splits.moved_count:
        audit["findings"].append(asdict(Finding("note", f"images {MOVED_NOTE}", decoded_splits.moved_count, [])))
    return audit | {"refused": refusal}


def _check_manifest(source_index: SourceIndex, verify: Path | None, write: Path | None) -> Audit:
    """Write and compare manifests; returns the audit's keys `manifest` and `differences`. Raises DataError."""
    if not verify and not write:
        return {}
    paths = manifest.list_unique_files(source_index.source_splits())
    if not paths:
        raise DataError("this source has no files to list")
    root, audit = manifest.common_folder(paths), Audit()
    if write:
        write_new_file(write, manifest.format_manifest(paths, root))
        audit["manifest"] = str(write)
    if verify:
        audit["differences"] = manifest.compare_with_manifest(verify, paths, root)
    return audit


def _training_refusal(
    experiment: Experiment, source_index: SourceIndex, decoded_splits: DecodedSplits
) -> dict[str, Any] | None:
    """The message and the exit code with which training would refuse the data, or None."""
    try:
        weights = load_initial_weights(experiment)
        experiment = experiment.with_statistics_of_weights(weights.facts if weights else None)
        check_training_possible(experiment, finish_dataset(experiment.data, source_index, decoded_splits), weights)
    except UserError as error:
        return {"lines": list(error.lines), "exit_code": error.exit_code}
    return None


def check_audit_passed(audit: Audit) -> None:
    """Raise DataError if training would refuse the data, or if its files differ from the manifest."""
    if refused := audit["refused"]:
        error = DataError(*refused["lines"])
        error.exit_code = refused["exit_code"]
        raise error
    if any(audit.get("differences", {}).values()) or any(finding["level"] == "error" for finding in audit["findings"]):
        raise DataError("the data has errors or differs from the manifest: see above")
