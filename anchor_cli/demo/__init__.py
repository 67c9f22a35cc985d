"""Floor 6: `anchor demo`: the whole path on a laptop CPU, on a world it makes itself."""
