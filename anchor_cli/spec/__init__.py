"""Floor 2: the run spec: keys, loading, aliases of the research code, DeepSpeed configs, schedule, reference pages."""
