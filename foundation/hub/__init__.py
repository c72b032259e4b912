"""Weights and adapters by name: load, save, convert, push."""
