"""Write a model card: the README.md of a model's folder, with metadata for hubs.

The metadata are described at https://huggingface.co/docs/hub/model-cards#model-card-metadata. A card that this package
wrote has a line that says so; a card without that line is never overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sophia_galore.config.yaml_core import dump
from sophia_galore.model.origin import CARD, WRITTEN_HERE, Origin


@dataclass(frozen=True)
class Card:
    """The content of a model card.

    Args:
        title: Its heading.
        base_model: Hub id of the model that was trained or converted; "": unknown, or not on a hub.
        origin: Origin of that model; the card states its licence.
        paragraphs: Text about what was done.
        table: Settings or results, as names and values.
    """

    title: str
    base_model: str
    origin: Origin
    paragraphs: Sequence[str]
    table: Sequence[tuple[str, str]] = ()

    def text(self) -> str:
        """Return the card as a Markdown document."""
        keys: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
        if self.base_model:
            keys["base_model"] = self.base_model
        licences = self.origin.license.split(", ")
        if self.origin.license:
            keys["license"] = licences if len(licences) > 1 else licences[0]
        for key in ("license_name", "license_link"):
            if value := getattr(self.origin, key):
                keys[key] = value
        keys["tags"] = ["sophia-galore"]
        parts = [
            f"---\n{dump(keys)}---",
            f"<!-- {WRITTEN_HERE} -->",
            f"# {self.title}",
            *self.paragraphs,
        ]
        if self.table:
            rows = "\n".join(f"| {name} | {value} |" for name, value in self.table)
            parts.append(f"| | |\n|---|---|\n{rows}")
        return "\n\n".join(parts) + "\n"


def write_card(folder: Path, card: Card) -> None:
    """Write a folder's model card, unless there is one that this package did not write.

    Args:
        folder: The folder.
        card: The card.
    """
    path = folder / CARD
    if path.exists() and WRITTEN_HERE not in path.read_text(encoding="utf-8", errors="replace"):
        return
    path.write_text(card.text(), encoding="utf-8")
