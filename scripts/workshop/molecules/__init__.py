"""Molecules as SMILES: rows to train on, training, samples, and what RDKit says of them (docs/molecules.md)."""
