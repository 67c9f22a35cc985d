"""Floor 5: `anchor train`: start-up, training loop, checkpoints, metrics."""
