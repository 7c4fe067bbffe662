"""Checkpoints that can be trusted, and read by any later strategy and number of processes."""
