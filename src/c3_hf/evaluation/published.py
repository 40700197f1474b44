"""Published numbers that are shown beside measured ones."""

from __future__ import annotations


# arXiv 2511.15244, Fig. 1: Fox English pages, "precision" in percent (the authors do not define the word), by page
# tokens. The DeepSeek-OCR columns are those the figure quotes. Bins hold 4 to 28 pages.
FIGURE_1_BINS = ("600-700", "700-800", "800-900", "900-1000", "1000-1100", "1100-1200", "1200-1300")
FIGURE_1 = {
    "C3, 32 latents": (99.7, 99.7, 98.8, 98.7, 98.8, 94.0, 93.3),
    "C3, 64 latents": (99.7, 99.9, 99.7, 99.9, 99.7, 98.6, 98.4),
    "C3, 100 latents": (99.9, 99.5, 99.7, 99.7, 99.5, 98.5, 97.5),
    "DeepSeek-OCR, 64 tokens": (96.5, 93.8, 83.8, 85.8, 79.3, 76.3, 59.1),
    "DeepSeek-OCR, 100 tokens": (98.5, 97.3, 96.8, 96.8, 91.5, 89.8, 87.1),
}
