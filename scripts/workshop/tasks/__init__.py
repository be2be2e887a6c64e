"""Synthetic tasks with published definitions: rows drawn by a seed, training, right answers (docs/experiments.md)."""
