"""Floor 3: templates, tokens, prepared pairs, the batch plan. No torch.distributed."""
