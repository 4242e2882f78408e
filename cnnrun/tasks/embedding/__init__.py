"""Who is who: embeddings, losses with margins, pairs and galleries in numbers."""
