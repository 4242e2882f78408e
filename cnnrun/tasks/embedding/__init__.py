"""Embeddings: the verify task, its losses with margins, and its metrics over pairs and against a gallery."""

__all__ = ["losses", "task"]
