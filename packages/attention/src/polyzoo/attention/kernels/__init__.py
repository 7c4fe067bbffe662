"""One file per kernel. Nothing is imported here: each needs what its file names."""
