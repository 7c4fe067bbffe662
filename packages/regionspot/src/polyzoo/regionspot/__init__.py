"""RegionSpot: names for any box in any image, with SAM and CLIP frozen."""
