"""Names of the files in a model's folder that hold its weights."""

from __future__ import annotations

import json
from pathlib import Path

from sophia_galore.errors import ModelError
from sophia_galore.records.files import MODEL, MODEL_INDEX
from sophia_galore.weights.manifest import repair_hint

HEAD = "lm_head.weight"
"""Name of the head's weight in files, if it is not tied to the embedding."""

INVERSE_FREQUENCIES = "rotary_emb.inv_freq"
"""End of the names of buffers in older files; they follow from the configuration, so they are ignored."""

INT8_FILE = "model.int8.safetensors"
"""File of the weights if some of them are in eight bits."""


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights by Hugging Face's convention; other files are ignored."""
    for name in (MODEL, INT8_FILE):
        if (folder / name).is_file():
            return [folder / name]
    index = folder / MODEL_INDEX
    if not index.is_file():
        raise ModelError(f"{folder} holds neither {MODEL} nor an index of shards.", repair_hint(folder))
    try:
        return [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: {error!r}", repair_hint(folder)) from error
