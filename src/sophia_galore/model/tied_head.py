"""Check whether the head in a model's files equals the embedding that it should be tied to.

`tie_word_embeddings: true` says that the head is the embedding, but some files contain both. If they differ, as after a
fine-tuning with untied weights, ignoring the head would change the logits. transformers 5 leaves such a head untied;
4.x ignores it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sophia_galore.weights.folder import HEAD, weight_files

EMBEDDING = "model.embed_tokens.weight"
_ROWS = 8192


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
                places |= {name: path for name in (HEAD, EMBEDDING) if name in file.keys()}  # noqa: SIM118
        if len(places) < 2:
            return False
        with safe_open(places[HEAD], framework="pt") as first, safe_open(places[EMBEDDING], framework="pt") as second:
            head, embedding = first.get_slice(HEAD), second.get_slice(EMBEDDING)
            if head.get_shape() != embedding.get_shape():
                return True
            rows = head.get_shape()[0]
            return not all(
                torch.equal(head[start : start + _ROWS].float(), embedding[start : start + _ROWS].float())
                for start in range(0, rows, _ROWS)
            )
    except (SafetensorError, OSError):
        return False  # the loading of the weights reports the error
