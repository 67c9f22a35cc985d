"""Retrieval benchmarks: BEIR folders, NanoBEIR, and which of them a name means."""
