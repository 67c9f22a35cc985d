"""Floor 2: `anchor report`: a run folder read, and drawn as one HTML page."""
