"""Reports and figures of runs, made from their files; no model is loaded."""

from __future__ import annotations
