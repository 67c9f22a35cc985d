"""Floor 5: `anchor export`: a checkpoint as a folder for other tools, with a certificate."""
