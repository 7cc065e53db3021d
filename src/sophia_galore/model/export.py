"""Write a model as an ordinary Hugging Face folder, which other programs and versions of transformers can open."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sophia_galore.errors import ModelError, short
from sophia_galore.model import compatible_json
from sophia_galore.model.folder_layout import FolderLayout, find_layout
from sophia_galore.model.skeleton import build_skeleton, load_model_config
from sophia_galore.model.source_files import (
    CONFIG,
    GENERATION,
    SOURCE_TENSORS,
    TEMPLATE,
    TOKENIZER,
    WHOLE_TOKENIZER,
    SourceFiles,
    read_source_files,
)
from sophia_galore.weights.files import save_in_layout, save_weights
from sophia_galore.weights.folder import HEAD
from sophia_galore.weights.int8 import Int8Format
from sophia_galore.weights.saved import SavedWeight, matching_weights
from sophia_galore.weights.store import WeightStore
from sophia_galore.weights.tensor_stream import SHARD_BYTES, FinishedFile
from sophia_galore.weights.weight import Weight

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def read_generation_config(folder: Path) -> Any:
    """Return a model folder's generation settings; None if it has none.

    Raises:
        ModelError: They can't be read.
    """
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder / 'generation_config.json'} can't be read: {short(error)}.",
            "Mend or remove that file: it only says how answers are generated.",
        ) from error


def write_model(
    folder: Path,
    *,
    store: WeightStore,
    dtype: torch.dtype | None,
    source: SourceFiles,
    layout: FolderLayout | None = None,
    beside: Path | None = None,
    as_source: bool = True,
    chat_template: str | None = None,
    eos_token_ids: Sequence[int] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the weights and the other files of the source model, changed only where training changed something.

    Where the source's tensors have other names and shapes than the skeleton's, plain weights have those of the source.

    Args:
        folder: An existing folder. If this fails, files in it are half written.
        store: The weights.
        dtype: Precision of the weights in the file; None: exactly as stored, also in eight bits.
        source: Files of the model that was trained.
        layout: What the tensors of its folder are; None: the skeleton's weights under the same names.
        beside: A folder with the tensors that are written as they are: the source's, or a checkpoint.
        as_source: Whether that is wanted: a checkpoint keeps the skeleton's names, and lists the source's.
        chat_template: Text of a new chat template; None: the source's.
        eos_token_ids: Ids of new tokens that end an answer; None: the source's.
        shard_bytes: Most bytes of weights in a file.

    Raises:
        ModelError: A weight is not finite in that precision, or the source's settings can't be read.
    """
    carried = layout.carried(beside) if layout and beside else None
    is_plain = dtype is not None or not any(weight.is_packed for _, weight in store.items())
    if layout and not layout.is_own and as_source and is_plain:

        @contextmanager
        def lend(name: str) -> Iterator[Callable[[], Weight]]:
            with store.borrow(name) as borrowed:
                yield lambda: borrowed[name]

        save_in_layout(
            folder,
            layout.writing,
            store,
            lend,
            lambda weight: dtype or weight.dtype,
            carried=carried,
            shard_bytes=shard_bytes,
        )
    else:
        save_weights(folder, store, lambda weight: dtype, carried=carried, shard_bytes=shard_bytes)
        _write_record(folder, layout)
    untied = any(name == HEAD for name, _ in store.items())
    settings = _settings(
        source, dtype or store.plain_dtype(), untied=untied, chat_template=chat_template, stops=eos_token_ids
    )
    _write_files(folder, source, settings)


def _write_record(folder: Path, layout: FolderLayout | None) -> None:
    if layout and (record := layout.record()) is not None:
        (folder / SOURCE_TENSORS).write_bytes(record)


def _write_files(folder: Path, source: SourceFiles, settings: Mapping[str, bytes]) -> None:
    for name, content in {**source.files, **settings}.items():
        (folder / name).write_bytes(content)


def _settings(
    source: SourceFiles,
    dtype: torch.dtype,
    *,
    untied: bool,
    chat_template: str | None = None,
    stops: Sequence[int] | None = None,
) -> dict[str, bytes]:
    """Return the settings files that differ from the source's."""
    config = source.json(CONFIG)
    if config is None:
        raise ModelError("The model has no config.json.", "Give a folder of a Hugging Face causal language model.")
    keeps_code, name = source.has_code, _DTYPE_NAMES[dtype]
    written = {CONFIG: compatible_json.model_config(config, dtype=name, untied=untied, keeps_code=keeps_code)}
    tokenizer = source.json(TOKENIZER)
    if tokenizer is not None or chat_template is not None:
        whole = WHOLE_TOKENIZER in source.files
        written[TOKENIZER] = compatible_json.tokenizer_config(
            tokenizer or {}, chat_template=chat_template, whole=whole, keeps_code=keeps_code
        )
    if stops is not None:
        written[GENERATION] = compatible_json.generation_config(source.json(GENERATION), config, stops)
    changed = {
        name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        for name, content in written.items()
        if content != source.json(name)
    }
    if chat_template is not None:
        # Newer programs read this file, older ones the key in tokenizer_config.json.
        changed[TEMPLATE] = chat_template.encode()
    return changed


def convert_model(
    source: Path, folder: Path, target: torch.dtype | Int8Format | None, *, shard_bytes: int = SHARD_BYTES
) -> SourceFiles:
    """Write a model folder with its weights in another format; only some rows of one are in memory at a time.

    Args:
        source: A model folder, a run's folder or a checkpoint.
        folder: An existing, empty folder. If this fails, files in it are half written.
        target: The new format. Eight bits apply to matrices only. None: the format stays, but eight bits become
            float32.
        shard_bytes: Most bytes of weights in a file.

    Returns:
        The source's files other than weights.

    Raises:
        ModelError: The source is not a whole model of a supported architecture, or not finite in that format.
    """
    # This also checks the architecture, and whether the head is really tied.
    architecture = build_skeleton(load_model_config(source), torch.device("cpu"))
    layout = find_layout(source, architecture)

    def form_of(weight: Weight) -> torch.dtype | Int8Format:
        if target is None or (isinstance(target, Int8Format) and len(weight.shape) != 2):
            return weight.dtype
        return target

    shapes = architecture.parameter_shapes()
    saved = {one.name: one for one in matching_weights(source, shapes, None, layout.reading.read)}
    weights = _Listed(saved)
    forms = {name: form_of(weight) for name, weight in weights.items()}
    files = read_source_files(source)
    dtype = next(form for form in forms.values() if not isinstance(form, Int8Format))
    settings = _settings(files, dtype, untied=HEAD in forms)
    plain = {name: form for name, form in forms.items() if not isinstance(form, Int8Format)}
    if layout.is_own or len(plain) < len(forms):
        save_weights(folder, weights, form_of, carried=layout.carried(source), shard_bytes=shard_bytes)
        _write_record(folder, layout)
    else:
        save_in_layout(
            folder,
            layout.writing,
            weights,
            lambda name: nullcontext(saved[name].opened),
            lambda weight: target if isinstance(target, torch.dtype) else weight.dtype,
            carried=layout.carried(source),
            shard_bytes=shard_bytes,
        )
    _write_files(folder, files, settings)
    return files


@dataclass(frozen=True)
class _Listed:
    """The weights of a folder."""

    saved: Mapping[str, SavedWeight]

    def items(self) -> Iterator[tuple[str, Weight]]:
        return ((name, one.kind) for name, one in self.saved.items())

    def finished(self) -> Sequence[FinishedFile]:
        return ()

    def opened(self) -> Iterator[tuple[str, Callable[[], Weight]]]:
        return ((name, one.opened) for name, one in self.saved.items())
