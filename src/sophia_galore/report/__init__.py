"""What a run left behind, read from its files and shown; nothing here touches a model."""

from __future__ import annotations
