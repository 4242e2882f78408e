"""Semantic segmentation: the task, its head, loss and decoder, and the overlap of predicted and true masks."""

__all__ = ["task"]
