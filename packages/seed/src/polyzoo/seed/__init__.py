"""SEED: an image as 32 discrete codes that a language model reads and writes."""
