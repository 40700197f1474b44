"""Compressed contexts: segments of a text as latents that are stored, verified, restored and asked again."""

from .compressing import compress
from .context import CompressedContext
from .restored import RestoredText, restore
from .restoring import restore_texts
from .verification import verify


__all__ = ["CompressedContext", "RestoredText", "compress", "restore", "restore_texts", "verify"]
