"""Training: data, configuration, optimisers, checkpoints and the loop."""
