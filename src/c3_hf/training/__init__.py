"""Training C3 with transformers' Trainer. Needs the extra `train`."""
