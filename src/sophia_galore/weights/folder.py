"""Names of the files in a model's folder that hold its weights."""

from __future__ import annotations

import json
from pathlib import Path

from sophia_galore.errors import ModelError
from sophia_galore.records.files import INT8_FILE, INT8_INDEX, MODEL, weights_entry
from sophia_galore.weights.manifest import repair_hint

HEAD = "lm_head.weight"
"""Name of the head's weight in files, if it is not tied to the embedding."""

INVERSE_FREQUENCIES = "rotary_emb.inv_freq"
"""End of the names of buffers in older files; they follow from the configuration, so they are ignored."""


def is_int8(folder: Path) -> bool:
    """Return whether a folder holds weights in eight bits of this project."""
    entry = weights_entry(folder)
    return entry is not None and entry.name in (INT8_FILE, INT8_INDEX)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights by Hugging Face's convention; other files are ignored."""
    entry = weights_entry(folder)
    if entry is None:
        raise ModelError(f"{folder} holds neither {MODEL} nor an index of shards.", repair_hint(folder))
    if entry.suffix == ".safetensors":
        return [entry]
    try:
        found = json.loads(entry.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(found))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{entry} is damaged: {error!r}", repair_hint(folder)) from error
