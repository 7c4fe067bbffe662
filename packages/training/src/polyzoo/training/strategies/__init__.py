"""Ways to spread a model over devices; all keep the same loop and the same checkpoints."""
