"""Floor 1: errors, console, files, the text contract, metric names, run folders. No torch, no numpy."""
