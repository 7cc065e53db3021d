"""The files of a model's folder other than weights: settings, tokenizer and licence, byte for byte.

They are read when a run is prepared, since a checkpoint that is resumed may be deleted later, and written unchanged
unless training changed them. So the result does not depend on the installed version of transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia_galore.errors import ModelError, short
from sophia_galore.model.origin import UNKNOWN, Origin, read_origin

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"
WHOLE_TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
SOURCE_TENSORS = "source_tensors.json"
"""Shapes of the tensors in the folder that a model came from, if its own are others."""

# Files that transformers, llama.cpp and others read for a decoder-only model, without files of a run.
_WANTED = re.compile(
    r"(generation_)?config\.json|tokenizer[^/]*|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json"
    r"|added_tokens\.json|[^/]*\.jinja|chat_template\.json|[^/]*\.tiktoken|(spiece|sentencepiece[^/]*)\.model"
    r"|((video_)?pre)?processor_config\.json"
    r"|(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)[^/]*"
)
_CODE = re.compile(r"[^/]+\.py")


@dataclass(frozen=True)
class SourceFiles:
    """The files of a model other than weights.

    Args:
        files: Name to content.
        has_code: Whether the folder's Python files are included.
        origin: Which model this is or was derived from, and its licence.
    """

    files: Mapping[str, bytes]
    has_code: bool = False
    origin: Origin = UNKNOWN

    def json(self, name: str) -> dict[str, Any] | None:
        """Return the content of a file with a JSON object; None if there is no such file.

        Raises:
            ModelError: It can't be read.
        """
        if name not in self.files:
            return None
        try:
            read = json.loads(self.files[name])
        except ValueError as error:
            raise ModelError(f"{name} of the model is no valid JSON: {short(error)}.", "Mend or replace it.") from error
        if not isinstance(read, dict):
            raise ModelError(f"{name} of the model is not a table of keys and values.", "Mend or replace it.")
        return read


def read_source_files(folder: Path, *, with_code: bool = False) -> SourceFiles:
    """Read the files of a model other than weights.

    Args:
        folder: A model's folder, a run's folder or a checkpoint.
        with_code: Whether to read its Python files too, since the model needs them.

    Raises:
        ModelError: A file can't be read.
    """
    files: dict[str, bytes] = {}
    try:
        for path in sorted(folder.iterdir()):
            code = with_code and _CODE.fullmatch(path.name)
            if (code or _WANTED.fullmatch(path.name)) and path.is_file():
                files[path.name] = path.read_bytes()
        origin = read_origin(folder)
    except OSError as error:
        raise ModelError(f"{folder} can't be read: {error.strerror or error}.", "Check its permissions.") from error
    return SourceFiles(files, any(_CODE.fullmatch(name) for name in files), origin)
