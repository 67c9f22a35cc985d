"""Floor 0: the words everything else is said in. No torch, no transformers, no numpy."""
