"""Time and memory of models beside GPT-NeoX of the same width: what is measured, how, and what came out."""
