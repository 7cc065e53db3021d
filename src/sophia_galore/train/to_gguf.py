"""Export a model as a GGUF file, with a Modelfile that tells Ollama its prompt format and stop tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sophia_galore.errors import ModelError
from sophia_galore.model.cache import Say
from sophia_galore.model.card import write_card
from sophia_galore.model.export import convert_model, read_generation_config
from sophia_galore.model.llama_cpp import GgufType, convert_to_gguf, find_converter
from sophia_galore.model.ollama import find_format, modelfile
from sophia_galore.model.skeleton import load_tokenizer
from sophia_galore.numerics.row_blocks import row_blocks
from sophia_galore.train.atomic_folder import refuse_output, write_atomically
from sophia_galore.train.card import folder_card
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.saved import saved_weights


def export_gguf(source: Path, output: Path, kind: GgufType, *, title: str, converter: str | None, say: Say) -> str:
    """Write a GGUF file, a Modelfile and a model card into a folder.

    Args:
        source: A whole model folder, a run's folder or a checkpoint.
        output: The folder to write; it is complete or not there.
        kind: The format of the weights.
        title: The model's name, for the file.
        converter: llama.cpp's converter; None: it is looked for.
        say: Takes lines for the user.

    Returns:
        What was written, and how to use it.

    Raises:
        EnvironmentProblem: The output exists, can't be written, or the converter is not there.
        ModelError: The source is no whole model, does not fit into the format, or the converter can't read it.
    """
    output = output.absolute()
    refuse_output(output)
    command = find_converter(converter)
    file = f"{title}-{kind.upper()}.gguf"

    def write(beside: Path) -> Path:
        # The converter uses the folder's name as the model's name if it finds no other.
        plain, made = beside / title, beside / "made"
        plain.mkdir()
        made.mkdir()
        files = convert_model(source, plain, None)
        if kind == "f16":
            _refuse_overflow(plain)
        say(f"Converting to {file} by {command[-1]} ...")
        convert_to_gguf(command, plain, made / file, kind)
        tokenizer = load_tokenizer(plain)
        (made / "Modelfile").write_text(_modelfile(file, plain, tokenizer), encoding="utf-8")
        done = f"The weights are in {kind.upper()}, as a GGUF file."
        write_card(made, folder_card(title, source, files.origin, done))
        return made

    write_atomically(output, write)
    return (
        f"{output / file}\n"
        f"llama.cpp: llama-cli -m {output / file}\n"
        f"Ollama: ollama create {title.lower()} -f {output / 'Modelfile'}"
    )


def _refuse_overflow(folder: Path) -> None:
    for saved in saved_weights(folder):
        blocks = (saved.opened()[rows].values(torch.float16) for rows in row_blocks(saved.kind.shape))
        if not all(PlainWeight(block).is_finite() for block in blocks):
            raise ModelError(f"{saved.name} holds values that are too large for f16.", "Take --type bf16 or q8_0.")


def _modelfile(file: str, folder: Path, tokenizer: Any) -> str:
    stops = _stops(folder, tokenizer)

    def render(turns: Sequence[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    has_template = bool(tokenizer.chat_template)
    # llama.cpp adds this token itself if the tokenizer does.
    first = tokenizer("?")["input_ids"][:1]
    begin = tokenizer.bos_token if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else ""
    found = find_format(render, begin=begin, ends=stops) if has_template else None
    return modelfile(file, found, has_template=has_template, stops=stops)


def _stops(folder: Path, tokenizer: Any) -> list[str]:
    """Return the stop tokens of the generation settings and of the tokenizer, as text."""
    settings = read_generation_config(folder)
    given = getattr(settings, "eos_token_id", None)
    ids = [*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id]
    known = [token for token in dict.fromkeys(ids) if token is not None and 0 <= token < len(tokenizer)]
    return [str(token) for token in tokenizer.convert_ids_to_tokens(known)]
