"""Stage I of Anchor Embedding: train embedding language models by bidirectional reconstruction."""

__version__ = "0.1.0"
