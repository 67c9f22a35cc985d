"""Floor 2: encoder, attention, reconstruction loss, retrieval metrics."""
