"""Find a model's configuration and size by its name, without its weights.

    folder, .gguf file ---------------------------------------> local
    alias, owner/name --> local cache --> built-in --> Hugging Face --> ModelScope

Only config.json and the headers of the weight files are downloaded. The order differs from `source.py` in one point:
for a built-in model, no hub is asked.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sophia_galore.config.schema import ModelConfig
from sophia_galore.errors import ModelError
from sophia_galore.model import gguf, hub, hub_modelscope
from sophia_galore.model.cache import Say
from sophia_galore.model.folder_layout import layout_of
from sophia_galore.model.headers import count_numbers, main_dtype, read_folder_headers
from sophia_galore.model.hub_headers import Published, read_published
from sophia_galore.model.origin import is_hub_id
from sophia_galore.model.quantised import declared_quantisation, found_quantisation, quantised_error
from sophia_galore.model.reach import Unreachable
from sophia_galore.model.skeleton import (
    build_skeleton,
    check_causal,
    count_parameters,
    make_model_config,
    read_model_config,
)
from sophia_galore.model.source import find_cached, find_local
from sophia_galore.model.specifications import SPECIFICATIONS, find_specification
from sophia_galore.weights.manifest import repair_hint

Check = Callable[[Any], None]


@dataclass(frozen=True)
class ModelShape:
    """Configuration and size of a model, for planning.

    Attributes:
        name: The requested name.
        source: Source of the information: "local", "local cache", "built-in", "hf" or "modelscope".
        config: The Hugging Face configuration.
        stored_dtype: Dtype of most of the published weights; None: unknown, or not supported by torch.
        folder: Folder of the model on this machine; None: it is not here, or must be converted first.
        num_parameters: Number of parameters; a tied head counts once.
    """

    name: str
    source: str
    config: Any
    stored_dtype: torch.dtype | None
    folder: Path | None
    num_parameters: int


def find_shape(settings: ModelConfig, say: Say, *, check: Check = check_causal) -> ModelShape:
    """Find a model's configuration and size; no weights are downloaded, and the fallback model is not used.

    Args:
        settings: Name, source, cache folder.
        say: Called with each line for the user.
        check: Raises an error if a configuration can't be trained, before a model is built from it.

    Returns:
        The model's configuration and size.

    Raises:
        ModelError: The name is unknown, no source can be reached, the architecture is not supported, or the
            configuration does not match the weights.
    """
    path = find_local(settings)
    if path is not None:
        return _of_gguf(path, settings, check) if path.is_file() else _of_folder(path, settings, "local", check)
    cached = find_cached(settings, say)
    if cached is not None:
        return _of_folder(cached.folder, settings, cached.source, check)
    return _built_in(settings, say, check) or _from_hubs(settings, say, check)


def _of_folder(folder: Path, settings: ModelConfig, source: str, check: Check) -> ModelShape:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds no config.json, so it is not a model folder.", "Give the folder that holds config.json."
        )
    config = read_model_config(folder, trust_remote_code=settings.trust_remote_code)
    check(config)
    # A folder without weights is enough for planning; if there are weights, their headers tell the dtype.
    has_weights = any(folder.glob("*.safetensors"))
    stored = main_dtype(_folder_headers(folder)) if has_weights else _declared_dtype(config)
    return ModelShape(settings.name, source, config, stored, folder, count_parameters(config))


def _folder_headers(folder: Path) -> list[Any]:
    try:
        return list(read_folder_headers(folder).values())
    except (ValueError, OSError) as error:
        raise ModelError(f"The weights in {folder} can't be read: {error}.", repair_hint(folder)) from error


def _of_gguf(path: Path, settings: ModelConfig, check: Check) -> ModelShape:
    config = gguf.read_config(path)
    check(config)
    # GGUF has its own number formats, so the dtype is None.
    return ModelShape(settings.name, "local", config, None, None, count_parameters(config))


def _built_in(settings: ModelConfig, say: Say, check: Check) -> ModelShape | None:
    known = find_specification(settings.name)
    if known is None:
        return None
    config = make_model_config(known.config, f"The built-in specification {known.name}")
    check(config)
    say(f"Model {settings.name}: by its built-in specification, without its weights.")
    if known.remark:
        say(known.remark)
    return ModelShape(settings.name, "built-in", config, _declared_dtype(config), None, known.num_parameters)


def _from_hubs(settings: ModelConfig, say: Say, check: Check) -> ModelShape:
    name = settings.name
    if not is_hub_id(name):
        raise ModelError(
            f"Unknown model {name!r}: not built in, no folder, no hub id.",
            f"{_nearest(name)}Or give a hub id (owner/name), a folder or a .gguf file.",
        )
    failures: list[str] = []
    remedies: list[str] = []
    for title, key, ask in (("Hugging Face", "hf", _ask_hugging_face), ("ModelScope", "modelscope", _ask_modelscope)):
        if settings.source not in ("auto", key):
            continue
        try:
            return ask(settings, check)
        except Unreachable as error:
            say(f"{title}: not available, {error.reason}.")
            failures.append(f"{title}: {error.reason}")
            remedies.append(error.remedy)
        except _NoSuchModel as error:
            raise ModelError(error.cause, f"{error.remedy} {_nearest(name)}".strip()) from error
    reasons = "; ".join(failures) or f"model.source is {settings.source}, so that no hub is asked"
    raise ModelError(
        f"{name!r} is not on this machine and not built in. {reasons}.",
        f"{' '.join(dict.fromkeys(filter(None, [*remedies])))} {_nearest(name)}".strip(),
    )


class _NoSuchModel(ModelError):
    """A hub does not have the model; the user may have meant a built-in one."""


def _ask_hugging_face(settings: ModelConfig, check: Check) -> ModelShape:
    name = settings.name
    hub.require_reachable()
    try:
        published = read_published(name)
    except ModelError as error:
        raise _NoSuchModel(error.cause, error.remedy) from error
    if found := found_quantisation(published.headers):
        raise quantised_error(name, declared_quantisation(published.config) or found)
    config = make_model_config(published.config, f"config.json of {name}")
    check(config)
    num_parameters = count_parameters(config)
    num_published = count_numbers(published.headers, tied=bool(config.tie_word_embeddings))
    if num_parameters != num_published:
        num_published = _count_trained(published, config)
    if num_parameters != num_published:
        raise ModelError(
            f"By its config.json {name} has {num_parameters:,} parameters, by the headers of its weights "
            f"{num_published:,}.",
            "Give the model in its plain form: weights that are packed (GPTQ, AWQ, ...) or adapted can't be planned "
            "with.",
        )
    return ModelShape(name, "hf", config, main_dtype(published.headers.values()), None, num_parameters)


def _count_trained(published: Published, config: Any) -> int:
    """Return how many numbers of published weights belong to the language model, and are not only carried along."""
    architecture = build_skeleton(copy.deepcopy(config), torch.device("cpu"))
    shapes = {name: tuple(header.shape) for name, header in published.headers.items()}
    return sum(math.prod(shapes[key]) for key in layout_of(shapes, published.config, architecture).keys)


def _ask_modelscope(settings: ModelConfig, check: Check) -> ModelShape:
    name = settings.name
    hub_modelscope.require_reachable()
    with tempfile.TemporaryDirectory() as folder:
        try:
            hub_modelscope.download_config(name, Path(folder))
        except ModelError as error:
            raise _NoSuchModel(error.cause, error.remedy) from error
        content = (Path(folder) / "config.json").read_text(encoding="utf-8")
    try:
        config = make_model_config(json.loads(content), f"config.json of {name}")
    except json.JSONDecodeError as error:
        raise ModelError(f"config.json of {name} is not valid JSON.", "Give another model.") from error
    check(config)
    return ModelShape(name, "modelscope", config, _declared_dtype(config), None, count_parameters(config))


def _declared_dtype(config: Any) -> torch.dtype | None:
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _nearest(name: str) -> str:
    names = [known.name for known in SPECIFICATIONS]
    near = difflib.get_close_matches(name.lower().rsplit("/", 1)[-1], names, n=3)
    hint = f"Built-in models with a name like that: {', '.join(near)}. " if near else ""
    return f"{hint}`sophia-galore download --list` shows short names. "
