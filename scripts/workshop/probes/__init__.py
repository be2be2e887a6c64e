"""Probes of the core of a checkpoint: what is measured, and the tables and pictures of it."""
