"""Check whether the head in a model's files equals the embedding that it should be tied to.

`tie_word_embeddings: true` says that the head is the embedding, but some files contain both. If they differ, as after a
fine-tuning with untied weights, ignoring the head would change the logits. transformers 5 leaves such a head untied;
4.x ignores it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sophia_galore.numerics.row_blocks import row_blocks
from sophia_galore.weights.folder import HEAD, weight_files

# A model that does more than language has longer names.
_EMBEDDING = "embed_tokens.weight"


def head_differs(folder: Path) -> bool:
    """Return whether a folder has a head that differs from its embedding; only some rows are loaded at a time.

    Args:
        folder: A model's folder.

    Raises:
        ModelError: It has no weights.
    """
    from safetensors import SafetensorError, safe_open

    try:
        places: dict[str, Path] = {}
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                places |= {name: path for name in file.keys() if name.endswith((HEAD, _EMBEDDING))}  # noqa: SIM118
        heads, embeddings = ([name for name in places if name.endswith(end)] for end in (HEAD, _EMBEDDING))
        if not heads or not embeddings:
            return False
        head, embedding = min(heads, key=len), min(embeddings, key=len)  # those of further heads have longer names
        with safe_open(places[head], framework="pt") as first, safe_open(places[embedding], framework="pt") as second:
            shape = first.get_slice(head).get_shape()
            if shape != second.get_slice(embedding).get_shape():
                return True

        def read(name: str, rows: slice) -> Tensor:
            # Opened again for each block: pages of a mapped file stay resident until it is closed.
            with safe_open(places[name], framework="pt") as file:
                tensor: Tensor = file.get_slice(name)[rows]
            return tensor.float()

        return not all(torch.equal(read(head, rows), read(embedding, rows)) for rows in row_blocks(shape))
    except (SafetensorError, OSError):
        return False  # the loading of the weights reports the error
