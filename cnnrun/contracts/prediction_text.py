"""A prediction in words: a row of `cnnrun predict` for people."""

from __future__ import annotations

from typing import Any


def describe_prediction(row: dict[str, Any]) -> str:
    """Return an image's prediction in a line."""
    if "objects" in row:
        found = [(f"{each['label']} {each['score']:.2f}", each["bbox"]) for each in row["objects"]]
        return "  ".join(f"{what} at {x:.0f},{y:.0f} {w:.0f}x{h:.0f}" for what, (x, y, w, h) in found) or "nothing"
    if "embedding" in row:
        return f"an embedding of {len(row['embedding'])} numbers (--json and --csv give them)"
    if "values" in row:
        return "  ".join(f"{name} {value:.4g}" for name, value in named_values(row).items())
    if "probabilities" in row:
        present = [f"{name} {row['probabilities'][name]:.3f}" for name in row["labels"]]
        return "  ".join(present) or "none"
    if "matches" in row:
        near = "  ".join(f"{entry['person']} {entry['similarity']:.3f}" for entry in row["matches"])
        return f"{row['person'] or 'unknown'}   ({near})"
    return "  ".join(f"{entry['label']} {entry['probability']:.3f}" for entry in row["top"])


def named_values(row: dict[str, Any]) -> dict[str, float]:
    """Return each predicted number by its name, with its deviation and quantiles where there are any."""
    deviations = {f"{name} deviation": value for name, value in row.get("deviations", {}).items()}
    quantiles = {
        f"{name} {part}": value for name, of_name in row.get("quantiles", {}).items() for part, value in of_name.items()
    }
    made: dict[str, float] = {**row["values"], **deviations, **quantiles}
    return made
