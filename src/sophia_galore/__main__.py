"""`python -m sophia_galore` is `sophia-galore`."""

from __future__ import annotations

from sophia_galore.cli.start import entry

entry()
