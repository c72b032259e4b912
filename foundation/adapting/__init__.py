"""A model in memory gets more classes, or low-rank adapters."""
