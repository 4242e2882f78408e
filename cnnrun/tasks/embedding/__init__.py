"""Embeddings: losses with margins, pairs and galleries in numbers."""
