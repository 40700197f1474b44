"""Compressed contexts: segments of a text as latents that are stored, verified, restored and asked again."""
