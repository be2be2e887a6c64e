"""Experiments: models x seeds x budget from YAML, their runs, and the reports on what came out."""
