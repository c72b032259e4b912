"""Pretraining: anatomies and scans in, weights out."""
