"""Damaged files on purpose: what becomes of a checkpoint, a run or a store of lines when a file of it is not whole."""
