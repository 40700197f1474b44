"""One system a file: `load(settings)` builds it, or raises `SystemUnavailable` with the reason."""
