"""Training data: the record schema, tasks made from plain text, mixtures, and the collator."""
