"""Synthetic tasks with published definitions: their rows, drawn by a seed, training, and what is right (docs/experiments.md)."""
