"""Check that a folder holds a complete model.

A folder that this package filled has a manifest, written last, with names, sizes and SHA-256 of all files. In any other
folder, config.json and all shards of the index must exist, and every safetensors file must have the size that follows
from its header.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia_galore.errors import ModelError
from sophia_galore.records.files import PLAN, weights_entry
from sophia_galore.weights.safetensors_header import read_file_header

MANIFEST_NAME = "sophia_galore_model.json"
ADAPTER = "adapter_config.json"

# Configuration and tokenizer files are hashed at every use, weights only on request: 8 MiB take milliseconds.
_ALWAYS_HASHED_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Manifest:
    """The manifest of a folder that this package filled.

    Attributes:
        name: Hub id or file that the model came from.
        source: "hf", "modelscope", "pypi" or "gguf".
        revision: Commit, package version or digest of the origin; may be empty.
        has_code: Whether the repository's Python files are included.
        files: Name -> (size in bytes, SHA-256).
    """

    name: str
    source: str
    revision: str
    has_code: bool
    files: dict[str, tuple[int, str]]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path, *, name: str, source: str, revision: str, has_code: bool) -> None:
    """Write the manifest of a folder, as the last step of filling it.

    It has no date: the same files give the same manifest.
    """
    files = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST_NAME
    }
    record = {
        "format": 1,
        "name": name,
        "source": source,
        "revision": revision,
        "has_code": has_code,
        "files": files,
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a folder; None if it has none.

    Raises:
        ModelError: The manifest can't be read.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): (int(entry["size_bytes"]), str(entry["sha256"])) for name, entry in record["files"].items()}
        return Manifest(
            name=str(record["name"]),
            source=str(record["source"]),
            revision=str(record["revision"]),
            has_code=bool(record["has_code"]),
            files=files,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} is not a readable manifest.", f"Delete the folder {folder} and get the model again."
        ) from error


def verify(folder: Path, manifest: Manifest, *, deep: bool) -> None:
    """Compare a folder with its manifest.

    Args:
        folder: The folder.
        manifest: What it should hold.
        deep: Hash the weights too, not only the small files.

    Raises:
        ModelError: A file is missing or differs; it is named.
    """
    for name, (size_bytes, sha256) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(path, "is missing")
        found_bytes = path.stat().st_size
        if found_bytes != size_bytes:
            raise _damaged(path, f"has {found_bytes:,} bytes instead of {size_bytes:,}")
        if (deep or size_bytes <= _ALWAYS_HASHED_BYTES) and sha256_of(path) != sha256:
            raise _damaged(path, "was changed (its SHA-256 differs from the recorded one)")


def check_model_folder(folder: Path) -> None:
    """Check that a folder holds a complete model, without a manifest.

    Raises:
        ModelError: A file is missing, unreadable or truncated; it is named.
    """
    if (folder / ADAPTER).is_file():
        raise adapter_error(str(folder), _adapted_model(folder))
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds no config.json, so it is not a model folder.",
            "Give the folder that holds config.json, the *.safetensors files and the tokenizer's files.",
        )
    _read_json(folder / "config.json")
    entry = weights_entry(folder)
    if entry is not None and entry.suffix == ".json":
        _check_shards(entry, _read_json(entry))
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"{folder} holds no *.safetensors file.",
            "Weights in *.bin files are not read; load them with transformers and write them with save_pretrained."
            if any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
            else f"{repair_hint(folder)} To pre-train new weights, set model.init: random.",
        )
    for path in weights:
        _check_safetensors(path)


def _check_shards(index: Path, content: Any) -> None:
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise _damaged(index, "has no weight_map")
    for shard in sorted({str(value) for value in weight_map.values()}):
        if not (index.parent / shard).is_file():
            raise _damaged(index.parent / shard, f"is missing although {index.name} names it")


def _check_safetensors(path: Path) -> None:
    size_bytes = path.stat().st_size
    try:
        expected_bytes = read_file_header(path).file_bytes
    except ValueError as error:
        raise _damaged(path, "is cut short or no safetensors file") from error
    if size_bytes != expected_bytes:
        raise _damaged(path, f"has {size_bytes:,} bytes instead of {expected_bytes:,}")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, "is not valid JSON") from error


def adapter_error(name: str, base: str = "") -> ModelError:
    """Return the error for a LoRA adapter that is given as a model.

    Args:
        name: The name to show.
        base: The model that it adapts; "": unknown.
    """
    onto = f" of {base}" if base else ""
    return ModelError(
        f"{name} holds an adapter{onto} ({ADAPTER}), not the weights of a model.",
        "Merge it first (peft: PeftModel.from_pretrained(base, folder).merge_and_unload(), then save_pretrained into "
        f"another folder), or give the model itself. If it is merged already, remove {ADAPTER}.",
    )


def _adapted_model(folder: Path) -> str:
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return base if isinstance(base, str) else ""


def repair_hint(folder: Path) -> str:
    """Return how to repair a model's folder with missing or damaged files, which depends on who wrote it.

    Args:
        folder: A model's folder, a run's folder or a checkpoint.

    Returns:
        A sentence.
    """
    try:
        manifest = read_manifest(folder)
    except ModelError:
        return f"Delete the folder {folder} and get the model again."
    if manifest is not None:
        again = "convert the file" if manifest.source == "gguf" else "download the model"
        return f"Delete the folder {folder} and {again} again: sophia-galore download {manifest.name}."
    if (folder / PLAN).is_file():
        return "Give another checkpoint of the run, or let the run write its model again."
    return "Copy the folder again from where it came from, or write it again with save_pretrained."


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} {what}.", repair_hint(path.parent))
