"""Find out which model a folder holds or was derived from, and its licence.

A folder that this package filled has a manifest with the hub id; a model card begins with metadata for the hub
(https://huggingface.co/docs/hub/model-cards#model-card-metadata).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from sophia_galore.config.yaml_core import YAMLError, load
from sophia_galore.errors import ModelError
from sophia_galore.weights.manifest import read_manifest

CARD = "README.md"
WRITTEN_HERE = "Written by sophia-galore. Without this line, it is not written over."
"""This line is in every model card that this package writes."""

_HUBS = ("hf", "modelscope", "pypi")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Origin:
    """The origin of a model.

    Attributes:
        hub_id: Its id on a hub; "": unknown.
        base_model: Id of the model that it was derived from; "": unknown.
        license: Identifier of its licence on the hub; "": unknown.
        license_name: Name of the licence, if the identifier is "other".
        license_link: Link to the licence, if the identifier is "other".
        is_ours: Whether this package wrote its model card, so that it was trained or converted here.
    """

    hub_id: str = ""
    base_model: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    is_ours: bool = False


UNKNOWN = Origin()
"""The origin of a model whose folder has no information."""


def read_origin(folder: Path) -> Origin:
    """Read the origin of a model from its folder.

    Args:
        folder: The folder.
    """
    try:
        manifest = read_manifest(folder)
    except ModelError:
        manifest = None
    hub_id = manifest.name if manifest is not None and manifest.source in _HUBS else ""
    text = _card_text(folder / CARD)
    card = front_matter(text)
    based_on = card.get("base_model")
    bases = based_on if isinstance(based_on, list) else [based_on]
    license_, name, link = (_joined(card.get(key)) for key in ("license", "license_name", "license_link"))
    base = next((base for base in bases if is_hub_id(base)), "")
    return Origin(hub_id, base, license_, name, link, is_ours=WRITTEN_HERE in text)


def _joined(value: Any) -> str:
    """Return a value as text; a list, such as several licences, is joined by commas."""
    given = value if isinstance(value, list) else [value]
    return ", ".join(str(entry) for entry in given if entry)


def _card_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def front_matter(text: str) -> Mapping[str, Any]:
    """Return the metadata at the beginning of a model card; {} if there is none or it can't be read.

    Args:
        text: The card.
    """
    match = _FRONT_MATTER.match(text)
    try:
        read = load(match[1]) if match else None
    except YAMLError:
        return {}
    return read if isinstance(read, dict) else {}


def is_hub_id(name: Any) -> TypeGuard[str]:
    """Return whether a value could be the id of a model on a hub: owner/name."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None and not name.startswith(".")
