"""Sophia&GaLore: full-parameter fine-tuning of language models on small cards."""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__"]
