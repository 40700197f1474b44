"""Benchmarks: `python -m benchmarks.run --suite cpu` from the repository's root. See docs/performance.md."""
