"""Object detection: the task, its dense head, the assignment of cells to objects, box losses and average precision."""

__all__ = ["task"]
