"""What Stage I and Stage II each are to the loop: batches, one step, metrics."""
