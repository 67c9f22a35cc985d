"""Floor 4: `anchor plan`: what a run will do, by arithmetic: steps, tokens, memory, time, disk."""
