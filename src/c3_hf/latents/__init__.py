"""Compressed contexts: segments of a text as latents that are stored, measured, restored and asked again.

What is done with a model goes through [`C3Pipeline`].
"""

from ..options import CompressionOptions
from .context import CompressedContext
from .restore import RestoredText


__all__ = ["CompressedContext", "CompressionOptions", "RestoredText"]
