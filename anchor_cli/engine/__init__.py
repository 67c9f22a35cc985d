"""Floor 3: training loop, checkpoints, metrics log, launch, evaluation, export."""
