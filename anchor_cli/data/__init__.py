"""Floor 1: templates, tokens, prepared pairs, the batch plan. No torch.distributed."""
