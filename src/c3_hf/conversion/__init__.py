"""Conversion of the released weights, export to other layouts, new models from any two language models."""
