"""Text of one prediction: a line of `cnnrun predict`."""

from __future__ import annotations

from typing import Any


def describe_prediction(row: dict[str, Any]) -> str:
    """Describe an image's prediction in one line."""
    if "objects" in row:
        return "  ".join(map(_describe_object, row["objects"])) or "nothing"
    if "embedding" in row:
        return f"an embedding of {len(row['embedding'])} numbers (--json and --csv give them)"
    if "values" in row:
        return "  ".join(f"{name} {value:.4g}" for name, value in named_values(row).items())
    if "probabilities" in row:
        present = [f"{name} {row['probabilities'][name]:.3f}" for name in row["labels"]]
        return "  ".join(present) or "none"
    if "matches" in row:
        matches = "  ".join(f"{match['person']} {match['similarity']:.3f}" for match in row["matches"])
        return f"{row['person'] or 'unknown'}   ({matches})"
    return "  ".join(f"{entry['label']} {entry['probability']:.3f}" for entry in row["top"])


def _describe_object(entry: dict[str, Any]) -> str:
    x, y, width, height = entry["bbox"]
    return f"{entry['label']} {entry['score']:.2f} at {x:.0f},{y:.0f} {width:.0f}x{height:.0f}"


def named_values(row: dict[str, Any]) -> dict[str, float]:
    """Predicted numbers by name, followed by their deviations and quantiles if there are any."""
    deviations = {f"{name} deviation": value for name, value in row.get("deviations", {}).items()}
    quantiles = {
        f"{name} {quantile}": value
        for name, by_quantile in row.get("quantiles", {}).items()
        for quantile, value in by_quantile.items()
    }
    values: dict[str, float] = {**row["values"], **deviations, **quantiles}
    return values
