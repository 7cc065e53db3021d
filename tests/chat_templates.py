"""Real chat templates, read from TRL's files, since importing TRL takes seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def shipped(name: str) -> str:
    """The text of `trl/chat_templates/NAME.jinja`."""
    found = importlib.util.find_spec("trl")
    assert found is not None and found.origin is not None
    return (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
