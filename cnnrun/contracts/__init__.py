"""Interfaces of layers, data sources and tasks, and the plain data that passes between packages.

Read this package before you write a layer, a source or a task. It imports `config` and `base`.
"""

__all__ = [
    "batch",
    "choices",
    "drawn_masks",
    "facts",
    "figure",
    "layer",
    "objects",
    "pixels",
    "prediction",
    "results",
    "source",
    "stored_facts",
    "target_kind",
    "task",
    "task_parts",
]
