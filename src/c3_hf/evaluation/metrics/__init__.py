"""One metric a file: a function of the file's own name, and `INFO` beside it."""
