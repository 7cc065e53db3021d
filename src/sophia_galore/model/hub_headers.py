"""Read config.json and the safetensors headers of a model on Hugging Face, without its weights.

`get_safetensors_metadata` of the library is not used: it always downloads the first 100 kB of every file, downloads
whole files from a mirror that does not support ranges, and writes the index to the library's cache.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia_galore.errors import ModelError
from sophia_galore.model import hub
from sophia_galore.records.files import MODEL, MODEL_INDEX
from sophia_galore.weights.safetensors_header import TensorHeader, read_header


@dataclass(frozen=True)
class Published:
    """Configuration and headers of a model on the hub.

    Attributes:
        config: The content of its config.json.
        headers: The headers of its tensors by name.
    """

    config: dict[str, Any]
    headers: dict[str, TensorHeader]


def read_published(model_id: str) -> Published:
    """Read the configuration and the headers of a model; call `hub.require_reachable` first.

    Args:
        model_id: "owner/name".

    Returns:
        Its configuration and the headers of its weights; no weights are downloaded.

    Raises:
        ModelError: No such model, no access, no safetensors weights, or files that can't be read.
        Unreachable: The hub's answer is not valid.
    """
    with hub.hub_problems(model_id, Path(), listing=True):
        commit, files = hub.list_files(model_id, with_code=False)
        sizes = {file.name: file.size_bytes for file in files}
        config = _read_json(model_id, commit, "config.json", sizes)
        headers: dict[str, TensorHeader] = {}
        for name in _weight_files(model_id, commit, sizes):
            headers |= _headers_of(model_id, commit, name)
    return Published(config, headers)


def _weight_files(model_id: str, commit: str, sizes: dict[str, int]) -> list[str]:
    if MODEL in sizes:
        return [MODEL]
    if MODEL_INDEX not in sizes:
        raise ModelError(
            f"The repository {model_id} holds neither {MODEL} nor an index of shards.",
            "Give the id of a transformers model whose weights are in the safetensors format.",
        )
    try:
        return sorted({str(name) for name in _read_json(model_id, commit, MODEL_INDEX, sizes)["weight_map"].values()})
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(model_id, MODEL_INDEX, "it has no weight_map") from error


def _headers_of(model_id: str, commit: str, name: str) -> dict[str, TensorHeader]:
    try:
        return read_header(lambda start, stop: _fetch(model_id, commit, name, start, stop)).tensors
    except ValueError as error:
        raise _damaged(model_id, name, str(error)) from error


def _read_json(model_id: str, commit: str, name: str, sizes: dict[str, int]) -> dict[str, Any]:
    try:
        content = json.loads(_fetch(model_id, commit, name, 0, sizes[name]))
    except ValueError as error:
        raise _damaged(model_id, name, "it is not valid JSON") from error
    if not isinstance(content, dict):
        raise _damaged(model_id, name, "it is not a table of keys and values")
    return content


def _damaged(model_id: str, name: str, reason: str) -> ModelError:
    return ModelError(f"{name} of {model_id} can't be read: {reason}.", "Give another model, or download this one.")


def _fetch(model_id: str, commit: str, name: str, start: int, stop: int) -> bytes:
    """Return the bytes of a file from `start` up to, not including, `stop`; no more are downloaded."""
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(model_id, name, revision=commit, endpoint=constants.ENDPOINT)
    # With compressed transfer, the byte counts would be wrong.
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    content = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=hub.LIST_TIMEOUT_S, follow_redirects=True) as answer:
        hf_raise_for_status(answer)
        # A server that does not support ranges sends the file from its beginning.
        before = 0 if answer.status_code == 206 else start
        for chunk in answer.iter_bytes():
            content += chunk
            if len(content) >= before + stop - start:
                break
    found = bytes(content[before : before + stop - start])
    if len(found) < stop - start:
        raise ConnectionError(f"{name} ended early")
    return found
