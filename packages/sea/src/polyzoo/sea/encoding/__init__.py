"""Tokenizers and encoders: packed, fused, in NumPy, cut out of larger ones."""
