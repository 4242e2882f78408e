"""Regression of numbers and angles: the task, its losses and decoders, and the metrics of its residuals."""

__all__ = ["losses", "task"]
