"""What a model is or was made from, and under which licence, as far as its folder says.

A folder that this package filled has a manifest with a hub's id; model cards begin with the hub's own keys
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
"""Stands in every model card of ours."""

_HUBS = ("hf", "modelscope", "pypi")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Attributes:
        hub_id: Its id on a hub; "": not known.
        base_model: Id of the model that it was made from; "": not known.
        license: Identifier of its licence, as the hub writes it; "": not known.
        license_name: Its name, where the identifier is "other".
        license_link: Where it stands, where the identifier is "other".
        is_ours: Whether its model card was written by this package, of a model that was trained or converted here.
    """

    hub_id: str = ""
    base_model: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    is_ours: bool = False


UNKNOWN = Origin()
"""Of a model whose folder says nothing."""


def read_origin(folder: Path) -> Origin:
    """What a model's folder says of its origin.

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
    license_, name, link = (_word(card.get(key)) for key in ("license", "license_name", "license_link"))
    base = next((base for base in bases if is_hub_id(base)), "")
    return Origin(hub_id, base, license_, name, link, is_ours=WRITTEN_HERE in text)


def _word(value: Any) -> str:
    """What a key says; several licences are given as a list."""
    given = value if isinstance(value, list) else [value]
    return ", ".join(str(entry) for entry in given if entry)


def _card_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def front_matter(text: str) -> Mapping[str, Any]:
    """Return the keys that a model card begins with; {} where there are none that can be read.

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
