"""Floor 2: processes of a run: launcher, signals, watchdog, logs, ranks."""
