"""Scores of masks against references, and reports of them."""
