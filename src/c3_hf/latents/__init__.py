"""Compressed contexts: segments of a text as latents that are stored, verified, restored and asked again."""

from .compressing import compress
from .context import CompressedContext
from .restored import RestoredText, iter_restored, restore
from .restoring import restore_texts
from .verification import verify


__all__ = ["CompressedContext", "RestoredText", "compress", "iter_restored", "restore", "restore_texts", "verify"]
