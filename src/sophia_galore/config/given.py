"""One value that the user gave, with the place where it stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Given:
    """One value that the user gave.

    Args:
        key: Dotted key; after translation, our own name.
        value: As YAML reads it.
        where: "run.yaml:12" or "in the override 'x=y'".
        written: The key as the user wrote it.
    """

    key: str
    value: object
    where: str
    written: str

    def name(self) -> str:
        """The key for a message: as written, with our name after it if that differs."""
        return self.key if self.written == self.key else f"{self.written} ({self.key})"
