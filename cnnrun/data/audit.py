"""A data set looked through as a whole: what is in it, and what is wrong with it."""

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
from cnnrun.data import duplicates
from cnnrun.data.cache import Progress, images_per_block
from cnnrun.data.class_names import alike_names, questionable_numbers, quote_names
from cnnrun.data.dataset import Dataset
from cnnrun.data.decode import Decoder, processor_count, start_threads
from cnnrun.data.duplicates import SampleTable
from cnnrun.data.image_records import RECORD
from cnnrun.data.index import many_classes_warning
from cnnrun.data.leakage import build_sample_table, find_differing_boxes
from cnnrun.data.prepare import constant_numbers, describe_dark_images, narrow_peak, training_mean_std
from cnnrun.data.settings import Data
from cnnrun.data.targets import count_classes

MAX_EXAMPLES = 10  # of each finding that are named
_RARE = 10  # a class that has so many times fewer pictures than another is said

Level = Literal["error", "warning", "note"]
_LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Finding:
    """One kind of trouble: how much of it there is, and examples, each a list of the pictures concerned."""

    level: Level
    what: str
    count: int
    examples: list[list[str]]


def audit_dataset(data: Data, dataset: Dataset, progress: Progress) -> dict[str, Any]:
    """Everything there is to say about a decoded data set: figures, and `findings`."""
    table = build_sample_table(dataset)
    names = _Names(dataset, table)
    records = _records(data, dataset, progress)
    labels = dataset.facts.classes
    per_class = {
        name: dict(zip(labels, count_classes(dataset.splits[name].all_targets(), len(labels)), strict=True))
        for name in table.splits
    }
    what = "an object" if dataset.splits["train"].objects is not None else "a picture"
    sides = np.stack([records["height"], records["width"]], 1)
    mean, std = training_mean_std(dataset)
    findings = [
        *_bad(data, dataset),
        *_boxes(data, dataset),
        *_classes(per_class, what, data.split.by == "label"),
        *_many_classes(data, dataset, per_class["train"]),
        *_constant(dataset),
        *_leaks(data, dataset, table, names, records),
        *_near(table, names, records),
        *_files(table, names, records),
        *_names(labels),
        *_levels(names, records),
    ]
    return {
        "pictures": {name: len(each) for name, each in dataset.splits.items()},
        "classes": per_class,
        "sizes": {
            "smallest": sides[sides.prod(1).argmin()].tolist(),
            "median": np.median(sides, 0).astype(int).tolist(),
            "largest": sides[sides.prod(1).argmax()].tolist(),
            "distinct": len(np.unique(sides, axis=0)),
        },
        "mean": list(mean),
        "std": list(std),
        "formats": _counted(records["format"]),
        "modes": _counted(records["mode"]),
        "findings": [asdict(each) for each in sorted(findings, key=lambda each: _LEVELS.index(each.level))],
    }


def _counted(values: NDArray[Any]) -> dict[str, int]:
    found = Counter(values.tolist())
    return {key.decode() or "pixels": count for key, count in found.most_common()}


class _Names:
    """What to call samples in findings."""

    def __init__(self, dataset: Dataset, table: SampleTable) -> None:
        self._dataset, self._table = dataset, table

    def __call__(self, sample: int) -> str:
        split, number = self._table.locate(sample)
        examples, label = self._dataset.splits[split], int(self._table.label_N[sample])
        known = f", {self._dataset.facts.classes[label]}" if "labels" in examples.targets else ""
        return escape(f"{examples.sample_name(number)} ({split}{known})")

    def path(self, sample: int) -> str:
        split, number = self._table.locate(sample)
        return self._dataset.splits[split].sample_name(number)

    def sets(self, groups: Sequence[NDArray[np.int64]]) -> list[list[str]]:
        return [self._some(group) for group in groups[:MAX_EXAMPLES]]

    def _some(self, group: NDArray[np.int64], most: int = 4) -> list[str]:
        more = [f"{len(group) - most:,} more"] if len(group) > most else []
        return [*(self(int(sample)) for sample in group[:most]), *more]


def _records(data: Data, dataset: Dataset, progress: Progress) -> NDArray[Any]:
    """The records of all samples, in the order of the columns; pictures that were never decoded are looked at now."""
    parts = []
    for name, examples in dataset.splits.items():
        kept = dataset.stored_splits[name]
        rows = examples.rows.numpy()
        if kept.records is not None:
            parts.append(np.array(kept.records()[rows]))
            continue
        decoder = Decoder(examples.source, dataset.facts.image, data.image, None)
        made = np.zeros(len(rows), RECORD)
        with start_threads(processor_count()) as run, progress(f"looking at {name}", len(rows)) as advance:
            each = images_per_block(int(np.prod(dataset.facts.image)))
            for first in range(0, len(rows), each):
                block = decoder.decode_block(rows[first : first + each], run)
                made[first : first + each] = block.records
                advance(len(block.records))
        parts.append(made)
    return np.concatenate(parts)


def _bad(data: Data, dataset: Dataset) -> list[Finding]:
    if not dataset.skipped_samples:
        return []
    level: Level = "error" if data.bad_files == "error" else "warning"
    examples = [[escape(each["reason"])] for each in dataset.skipped_samples[:MAX_EXAMPLES]]
    return [Finding(level, "cannot be decoded", len(dataset.skipped_samples), examples)]


def _boxes(data: Data, dataset: Dataset) -> list[Finding]:
    """Boxes that are not as they should be, each kind with the files and ids of the first."""
    kinds: dict[tuple[str, bool], list[str]] = {}
    for each in dataset.bad_boxes:
        kinds.setdefault((each.kind, each.is_used), []).append(f"{each.name}: {each.problem} ({each.split})")
    left_out: Level = "error" if data.bad_boxes == "error" else "warning"
    return [
        Finding("note" if used else left_out, f"boxes: {what}", len(names), [[name] for name in names[:MAX_EXAMPLES]])
        for (what, used), names in kinds.items()
    ]


def _classes(per_class: dict[str, dict[str, int]], what: str, apart: bool) -> list[Finding]:
    found = []
    for split, counts in () if apart else per_class.items():
        if missing := [name for name, count in counts.items() if not count]:
            examples = [[escape(name)] for name in missing[:MAX_EXAMPLES]]
            found.append(Finding("warning", f"classes without {what} in {split}", len(missing), examples))
    train = {name: count for name, count in per_class["train"].items() if count}
    rare = [name for name, count in train.items() if count * _RARE <= max(train.values())]
    if rare:
        examples = [[f"{escape(name)}: {train[name]:,}"] for name in rare[:MAX_EXAMPLES]]
        found.append(Finding("note", f"classes with a {_RARE}th of the largest or less", len(rare), examples))
    return found


def _many_classes(data: Data, dataset: Dataset, counts: dict[str, int]) -> list[Finding]:
    has_labels = "labels" in dataset.splits["train"].targets and data.split.by != "label"
    lines = many_classes_warning(dataset.facts.classes, list(counts.values())) if has_labels else []
    return [Finding("warning", line.partition(" ")[2], len(counts), []) for line in lines]


def _constant(dataset: Dataset) -> list[Finding]:
    """Numbers that are one value in all pictures of a split."""
    found = [
        f"{name} is {value:g} in every picture of {split}"
        for split in dataset.splits
        for name, value in constant_numbers(dataset, split)
    ]
    if not found:
        return []
    return [Finding("warning", "numbers that are one value in a split", len(found), [[each] for each in found])]


def _leaks(data: Data, dataset: Dataset, table: SampleTable, names: _Names, records: NDArray[Any]) -> list[Finding]:
    level: Level = "error" if data.leakage == "error" else "warning"
    by_bytes = records["file"] * (records["file"] > 0)
    bytes_groups = [group for group in duplicates.group_by_value(by_bytes) if by_bytes[group[0]]]
    # Those of other bytes; what is of the same bytes is told as that.
    pixel_groups = [
        group
        for group in duplicates.group_by_value(records["pixels"])
        if (by_bytes[group] == 0).any() or len(set(by_bytes[group])) > 1
    ]
    found = []
    for groups, how in ((bytes_groups, "byte for byte"), (pixel_groups, "pixel for pixel")):
        across = duplicates.mixed_groups(groups, table.split_N)
        within = [group for group in groups if (table.split_N[group] == table.split_N[group[0]]).all()]
        if across:
            found.append(Finding(level, f"the same picture in several splits, {how}", len(across), names.sets(across)))
        if within:
            found.append(
                Finding("note", f"the same picture again in one split, {how}", len(within), names.sets(within))
            )
    leaks = duplicates.find_leaks(table, data.split.by == "label")
    if leaks.label_conflicts:
        conflicts = leaks.label_conflicts
        found.append(Finding(level, "the same picture under several labels", len(conflicts), names.sets(conflicts)))
    if differing := find_differing_boxes(dataset, table):
        what = "the same picture with other boxes"
        found.append(Finding("warning", what, len(differing), names.sets(differing)))
    if leaks.groups_across_splits:
        found.append(
            Finding(
                level,
                "groups in several splits",
                len(leaks.groups_across_splits),
                names.sets(leaks.groups_across_splits),
            )
        )
    if leaks.classes_across_splits:
        what = "classes, such as people, in several splits"
        found.append(Finding(level, what, len(leaks.classes_across_splits), names.sets(leaks.classes_across_splits)))
    return found


def _near(table: SampleTable, names: _Names, records: NDArray[Any]) -> list[Finding]:
    """Pictures that are nearly the same: re-encoded or resized. Of identical ones the first stands for all."""
    _, first = np.unique(records["pixels"], return_index=True)
    if problem := missing_package("scipy", "stats", "the search for nearly the same images"):
        return [Finding("note", problem, len(first), [])]
    found_pairs, through = duplicates.find_near_duplicates(np.ascontiguousarray(records["thumb"][first]))
    pairs = first[found_pairs]
    across = table.split_N[pairs[:, 0]] != table.split_N[pairs[:, 1]]
    found = []
    for part, where, level in ((across, "in several splits", "warning"), (~across, "in one split", "note")):
        if part.any():
            examples = names.sets(list(pairs[part]))
            found.append(Finding(level, f"nearly the same picture {where}", int(part.sum()), examples))  # type: ignore[arg-type]
    if not through:
        what = "pictures so much alike that the search for nearly the same ended early"
        found.append(Finding("note", what, len(first), []))
    return found


def _files(table: SampleTable, names: _Names, records: NDArray[Any]) -> list[Finding]:
    """What single files are remarkable for."""
    kinds: list[tuple[Level, str, NDArray[np.int64]]] = [
        ("warning", "pictures of one single colour", np.flatnonzero(records["flat"])),
        ("note", "pictures that EXIF turns", np.flatnonzero(records["orientation"] > 1)),
        ("warning", "pictures whose EXIF cannot be read", np.flatnonzero(records["orientation"] == 0)),
        ("warning", "files that are not what their name says", np.flatnonzero(records["misnamed"])),
        ("warning", "file names that differ in case or in Unicode's form alone", _name_twins(names, records)),
    ]
    return [
        Finding(level, what, len(samples), [[names(int(sample))] for sample in samples[:MAX_EXAMPLES]])
        for level, what, samples in kinds
        if len(samples)
    ]


def _names(classes: Sequence[str]) -> list[Finding]:
    """Names of classes that may be one class, or none."""
    alike, odd = alike_names(classes), questionable_numbers(classes)
    kinds = (
        ("names of classes that differ in writing alone", [quote_names(group) for group in alike]),
        ("classes that are numbers far from the others: labels, or none?", [[name] for name in odd]),
    )
    return [Finding("warning", what, len(found), found[:MAX_EXAMPLES]) for what, found in kinds if found]


def _levels(names: _Names, records: NDArray[Any]) -> list[Finding]:
    if (peak := narrow_peak(records["peak"])) is None:
        return []
    wide = np.flatnonzero(records["peak"])
    examples = [[names(int(sample))] for sample in wide[:MAX_EXAMPLES]]
    return [Finding("warning", f"pictures of 16 bits that {describe_dark_images(peak)}", len(wide), examples)]


def _name_twins(names: _Names, records: NDArray[Any]) -> NDArray[np.int64]:
    folded: dict[str, list[int]] = {}
    for sample in np.flatnonzero(records["format"] != b"").tolist():
        folded.setdefault(unicodedata.normalize("NFC", names.path(sample)).casefold(), []).append(sample)
    apart = [group for group in folded.values() if len({names.path(sample) for sample in group}) > 1]
    return np.array([sample for group in apart for sample in group], np.int64)
