"""Floor 4: `anchor eval`: embeddings, exact search, retrieval metrics, comparison of models."""
