"""Floor 5: `anchor mine`: hard negatives for Stage II by exact search, resumable, with flat memory."""
