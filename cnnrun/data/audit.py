"""Audit of a whole data set: its sizes and class counts, and everything that looks wrong with it."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.errors import escape
from cnnrun.base.extras import missing_package
from cnnrun.base.machine_load import processor_count
from cnnrun.data import duplicates
from cnnrun.data.cache import ProgressBar, images_per_block
from cnnrun.data.class_names import implausible_class_names, quote_names, similar_names
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.decode import Decoder, start_threads
from cnnrun.data.duplicates import SampleTable
from cnnrun.data.image_records import record_dtype
from cnnrun.data.image_statistics import describe_dark_images, narrow_peak, training_mean_std
from cnnrun.data.index import many_classes_warning
from cnnrun.data.leakage import build_sample_table, describe_sample, find_differing_boxes
from cnnrun.data.prepare import constant_numbers
from cnnrun.data.settings import Data
from cnnrun.data.targets import count_classes

UNUSABLE = "cannot be used"  # kind of the finding about images that `data.bad_files` decides on
MAX_EXAMPLES = 10  # samples named for each finding
_MAX_IMBALANCE = 10  # a class this many times smaller than the largest is reported

Level = Literal["error", "warning", "note"]
_LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Finding:
    """One kind of problem: how often it occurs, and examples, each a list of the images concerned."""

    level: Level
    what: str
    count: int
    examples: list[list[str]]


def _count_classes(examples: Examples, classes: Sequence[str]) -> dict[str, int]:
    """The samples or objects of each class; empty for targets that are not counted, such as numbers and masks."""
    counts = count_classes(examples.all_targets(), len(classes))
    return dict(zip(classes, counts, strict=True)) if counts else {}


def audit_dataset(data: Data, dataset: Dataset, progress: ProgressBar) -> dict[str, Any]:
    """Audit a decoded data set; returns its figures and, under `findings`, its problems, the worst first."""
    table = build_sample_table(dataset)
    samples = _SampleNames(dataset, table)
    records = _collect_records(data, dataset, progress)
    classes = dataset.facts.classes
    class_counts = {split: _count_classes(dataset.splits[split], classes) for split in table.splits}
    sample_noun = "an object" if dataset.splits["train"].objects is not None else "an image"
    sides = np.stack([records["height"], records["width"]], 1)
    mean, std = training_mean_std(dataset)
    findings = [
        *_unusable_findings(data, dataset),
        *_box_findings(data, dataset),
        *_class_count_findings(class_counts, sample_noun, data.split.by == "label"),
        *_many_classes_findings(data, dataset, class_counts["train"]),
        *_constant_target_findings(dataset),
        *_leak_findings(data, dataset, table, samples, records),
        *_near_duplicate_findings(table, samples, records),
        *_file_findings(samples, records),
        *_class_name_findings(classes),
        *(() if data.image.pixel_format.is_deep else _grey_level_findings(samples, records)),
    ]
    return {
        "pictures": {split: len(examples) for split, examples in dataset.splits.items()},
        "classes": class_counts,
        "sizes": {
            "smallest": sides[sides.prod(1).argmin()].tolist(),
            "median": np.median(sides, 0).astype(int).tolist(),
            "largest": sides[sides.prod(1).argmax()].tolist(),
            "distinct": len(np.unique(sides, axis=0)),
        },
        "mean": list(mean),
        "std": list(std),
        "formats": _count_values(records["format"]),
        "modes": _count_values(records["mode"]),
        "findings": [asdict(finding) for finding in sorted(findings, key=lambda finding: _LEVELS.index(finding.level))],
    }


def _count_values(values: NDArray[Any]) -> dict[str, int]:
    counts = Counter(values.tolist())
    return {value.decode() or "pixels": count for value, count in counts.most_common()}


class _SampleNames:
    """Names of samples for findings, by their index in the sample table."""

    def __init__(self, dataset: Dataset, table: SampleTable) -> None:
        self._dataset, self._table = dataset, table

    def name_with_label(self, sample: int) -> str:
        """The file (or index in the source), split and class of a sample."""
        return describe_sample(self._dataset, self._table, sample)

    def path(self, sample: int) -> str:
        split, index = self._table.locate(sample)
        return self._dataset.splits[split].sample_name(index)

    def name_groups(self, groups: Sequence[NDArray[np.int64]]) -> list[list[str]]:
        return [self._name_group(group) for group in groups[:MAX_EXAMPLES]]

    def _name_group(self, group: NDArray[np.int64], max_names: int = 4) -> list[str]:
        rest = [f"{len(group) - max_names:,} more"] if len(group) > max_names else []
        return [*(self.name_with_label(int(sample)) for sample in group[:max_names]), *rest]


def _collect_records(data: Data, dataset: Dataset, progress: ProgressBar) -> NDArray[Any]:
    """The records of all samples, in the order of the sample table. Decodes images that have no records yet."""
    parts = []
    for name, examples in dataset.splits.items():
        stored = dataset.stored_splits[name]
        rows = examples.rows.numpy()
        if stored.records is not None:
            parts.append(np.array(stored.records()[rows]))
            continue
        decoder = Decoder(examples.source, dataset.facts.image_shape, data.image, None)
        records = np.zeros(len(rows), record_dtype(dataset.facts.image_shape[0]))
        with start_threads(processor_count()) as parallel_map, progress(f"looking at {name}", len(rows)) as advance:
            block_size = images_per_block(int(np.prod(dataset.facts.image_shape)))
            for first in range(0, len(rows), block_size):
                block = decoder.decode_block(rows[first : first + block_size], parallel_map)
                records[first : first + block_size] = block.records
                advance(len(block.records))
        parts.append(records)
    return np.concatenate(parts)


def _unusable_findings(data: Data, dataset: Dataset) -> list[Finding]:
    if not dataset.skipped_samples:
        return []
    level: Level = "error" if data.bad_files == "error" else "warning"
    examples = [[escape(sample["reason"])] for sample in dataset.skipped_samples[:MAX_EXAMPLES]]
    return [Finding(level, UNUSABLE, len(dataset.skipped_samples), examples)]


def _box_findings(data: Data, dataset: Dataset) -> list[Finding]:
    """A finding for each kind of bad box, with the first boxes of the kind as examples."""
    kinds: dict[tuple[str, bool], list[str]] = {}
    for box in dataset.bad_boxes:
        kinds.setdefault((box.kind, box.is_used), []).append(f"{box.name}: {box.problem} ({box.split})")
    unused_level: Level = "error" if data.bad_boxes == "error" else "warning"
    return [
        Finding(
            "note" if is_used else unused_level,
            f"boxes: {kind}",
            len(names),
            [[name] for name in names[:MAX_EXAMPLES]],
        )
        for (kind, is_used), names in kinds.items()
    ]


def _class_count_findings(
    class_counts: dict[str, dict[str, int]], sample_noun: str, has_disjoint_classes: bool
) -> list[Finding]:
    """Classes that a split lacks, unless each class is meant to be in one split only, and rare training classes."""
    findings = []
    for split, counts in () if has_disjoint_classes else class_counts.items():
        if missing := [name for name, count in counts.items() if not count]:
            examples = [[escape(name)] for name in missing[:MAX_EXAMPLES]]
            findings.append(Finding("warning", f"classes without {sample_noun} in {split}", len(missing), examples))
    train = {name: count for name, count in class_counts["train"].items() if count}
    rare = [name for name, count in train.items() if count * _MAX_IMBALANCE <= max(train.values())]
    if rare:
        examples = [[f"{escape(name)}: {train[name]:,}"] for name in rare[:MAX_EXAMPLES]]
        kind = f"classes at most 1/{_MAX_IMBALANCE} the size of the largest"
        findings.append(Finding("note", kind, len(rare), examples))
    return findings


def _many_classes_findings(data: Data, dataset: Dataset, counts: dict[str, int]) -> list[Finding]:
    has_labels = "labels" in dataset.splits["train"].targets and data.split.by != "label"
    warning = many_classes_warning(list(counts.values())) if has_labels else None
    return [Finding("warning", warning, len(counts), [])] if warning else []


def _constant_target_findings(dataset: Dataset) -> list[Finding]:
    """Regression targets that have the same value in all images of a split."""
    lines = [
        f"{name} is {value:g} in every image of {split}"
        for split in dataset.splits
        for name, value in constant_numbers(dataset, split)
    ]
    if not lines:
        return []
    return [
        Finding(
            "warning", "regression targets that have a single value in a split", len(lines), [[line] for line in lines]
        )
    ]


def _leak_findings(
    data: Data, dataset: Dataset, table: SampleTable, samples: _SampleNames, records: NDArray[Any]
) -> list[Finding]:
    """Duplicates, contradicting labels and boxes, and groups or classes that are in several splits."""
    level: Level = "error" if data.leakage == "error" else "warning"
    file_hash_N = records["file_hash"]
    same_bytes = [group for group in duplicates.group_by_value(file_hash_N) if file_hash_N[group[0]]]
    # Only groups whose files differ in bytes: the others are reported as equal byte for byte.
    same_pixels = [
        group
        for group in duplicates.group_by_value(records["pixel_hash"])
        if (file_hash_N[group] == 0).any() or len(set(file_hash_N[group])) > 1
    ]
    findings = []
    for groups, precision in ((same_bytes, "byte for byte"), (same_pixels, "pixel for pixel")):
        across = duplicates.mixed_groups(groups, table.split_N)
        within = [group for group in groups if (table.split_N[group] == table.split_N[group[0]]).all()]
        findings += [
            *_group_finding(level, f"the same image in several splits, {precision}", across, samples),
            *_group_finding("note", f"the same image again in one split, {precision}", within, samples),
        ]
    leaks = duplicates.find_leaks(table, data.split.by == "label")
    differing_boxes = find_differing_boxes(dataset, table)
    return [
        *findings,
        *_group_finding(level, "the same image under several labels", leaks.label_conflicts, samples),
        *_group_finding("warning", "the same image with other boxes", differing_boxes, samples),
        *_group_finding(level, "groups in several splits", leaks.groups_across_splits, samples),
        *_group_finding(level, "classes, such as people, in several splits", leaks.classes_across_splits, samples),
    ]


def _group_finding(
    level: Level, kind: str, groups: Sequence[NDArray[np.int64]], samples: _SampleNames
) -> list[Finding]:
    return [Finding(level, kind, len(groups), samples.name_groups(groups))] if groups else []


def _near_duplicate_findings(table: SampleTable, samples: _SampleNames, records: NDArray[Any]) -> list[Finding]:
    """Re-encoded or resized copies of an image. Only the first of several identical images is compared."""
    _, first = np.unique(records["pixel_hash"], return_index=True)
    if problem := missing_package("scipy", "stats", "the search for nearly the same images"):
        return [Finding("note", problem, len(first), [])]
    pairs_of_first, is_exhaustive = duplicates.find_near_duplicates(np.ascontiguousarray(records["thumbnail"][first]))
    pairs = first[pairs_of_first]
    is_across = table.split_N[pairs[:, 0]] != table.split_N[pairs[:, 1]]
    findings = [
        *_group_finding("warning", "nearly the same image in several splits", list(pairs[is_across]), samples),
        *_group_finding("note", "nearly the same image in one split", list(pairs[~is_across]), samples),
    ]
    if not is_exhaustive:
        kind = "the search for near duplicates stopped early: too many similar images"
        findings.append(Finding("note", kind, len(first), []))
    return findings


def _file_findings(samples: _SampleNames, records: NDArray[Any]) -> list[Finding]:
    """Files that are doubtful by themselves, a finding for each kind."""
    kinds: list[tuple[Level, str, NDArray[np.int64]]] = [
        ("warning", "images of one single colour", np.flatnonzero(records["is_single_colour"])),
        ("note", "images that EXIF rotates", np.flatnonzero(records["orientation"] > 1)),
        ("warning", "images whose EXIF cannot be read", np.flatnonzero(records["orientation"] == 0)),
        ("warning", "files that are not what their name says", np.flatnonzero(records["misnamed"])),
        ("warning", "file names that differ only in case or Unicode form", _similar_file_names(samples, records)),
    ]
    return [
        Finding(level, kind, len(rows), [[samples.name_with_label(int(row))] for row in rows[:MAX_EXAMPLES]])
        for level, kind, rows in kinds
        if len(rows)
    ]


def _class_name_findings(classes: Sequence[str]) -> list[Finding]:
    """Class names that may mean the same class, or no class."""
    alike, odd = similar_names(classes), implausible_class_names(classes)
    kinds = (
        ("class names that differ only in spelling", [quote_names(group) for group in alike]),
        ("class names that are numbers far from the others: are these labels?", [[name] for name in odd]),
    )
    return [Finding("warning", kind, len(names), names[:MAX_EXAMPLES]) for kind, names in kinds if names]


def _grey_level_findings(samples: _SampleNames, records: NDArray[Any]) -> list[Finding]:
    """16-bit images that are nearly black once scaled to 8 bits."""
    if (peak := narrow_peak(records["peak"])) is None:
        return []
    rows = np.flatnonzero(records["peak"])
    examples = [[samples.name_with_label(int(row))] for row in rows[:MAX_EXAMPLES]]
    return [Finding("warning", f"images of 16 bits that {describe_dark_images(peak)}", len(rows), examples)]


def _similar_file_names(samples: _SampleNames, records: NDArray[Any]) -> NDArray[np.int64]:
    """The samples whose file has another path than a second one, but only in case or Unicode form."""
    samples_by_path: dict[str, list[int]] = {}
    for sample in np.flatnonzero(records["format"] != b"").tolist():
        folded_path = unicodedata.normalize("NFC", samples.path(sample)).casefold()
        samples_by_path.setdefault(folded_path, []).append(sample)
    groups = [group for group in samples_by_path.values() if len({samples.path(sample) for sample in group}) > 1]
    return np.array([sample for group in groups for sample in group], np.int64)
