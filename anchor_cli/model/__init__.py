"""Floor 3: encoder, packed attention, output layer, objectives."""
