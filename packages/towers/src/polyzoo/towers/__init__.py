"""Frozen pretrained towers and evaluation nets that several models share."""
