"""Floor 6: `anchor doctor`: is this host fit to train."""
