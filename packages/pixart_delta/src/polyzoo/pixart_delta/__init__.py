"""PIXART-delta: images in 2-4 steps, controlled, from 8 GB up."""
