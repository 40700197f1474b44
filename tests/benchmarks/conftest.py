"""The benchmarks are a package at the repository's root, which is not on the path of every way to start pytest."""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[2]))
