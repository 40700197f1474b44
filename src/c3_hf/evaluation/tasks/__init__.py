"""One task a file: `load(data_dir, meter)` gives its items; the first line of the docstring is its description."""
