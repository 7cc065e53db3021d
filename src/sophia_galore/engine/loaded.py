"""A model folder, loaded to answer: whatever its weights are in, in the format that was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sophia_galore.engine.generate import Answer, Message, Settings, Stream, generate, prompt_tokens
from sophia_galore.engine.whole import whole_model
from sophia_galore.errors import ModelError
from sophia_galore.model.export import read_generation_config
from sophia_galore.model.headers import main_dtype, read_folder_headers
from sophia_galore.model.skeleton import build_skeleton, load_model_config, load_tokenizer
from sophia_galore.weights.files import load_store
from sophia_galore.weights.folder import HEAD
from sophia_galore.weights.plain import DTYPES
from sophia_galore.weights.row_int8 import ABSMAX
from sophia_galore.weights.safetensors_header import TensorHeader

Held = Literal["auto", "int8", "bf16", "fp16", "fp32"]
"""How weights are held while answering; auto: as they lie in the folder."""


@dataclass(frozen=True)
class Loaded:
    """A model that answers.

    Args:
        title: What the user knows it as.
        model: The whole Hugging Face model.
        tokenizer: Its tokenizer.
        generation_config: Its generation settings, or None.
        device: Where it is.
        num_positions: Most tokens of a conversation, question and answer, that it can read.
    """

    title: str
    model: Any
    tokenizer: Any
    generation_config: Any
    device: torch.device
    num_positions: int

    @property
    def has_chat_template(self) -> bool:
        """Whether it was made for conversations."""
        return bool(self.tokenizer.chat_template)

    def prompt(self, messages: Sequence[Message]) -> torch.Tensor:
        """(1, T) token ids of a conversation, up to where the next answer begins.

        Raises:
            ModelError: There is nothing in it, or the chat template refuses it.
        """
        tokens = prompt_tokens(self.tokenizer, messages)
        if not tokens.shape[1] or not messages[-1][1].strip():
            raise ModelError("The question is empty.", "Ask something.")
        return tokens.to(self.device)

    def refuse_too_long(self, prompt: torch.Tensor) -> None:
        """Refuse (1, T) token ids that leave no position for an answer."""
        if prompt.shape[1] >= self.num_positions:
            raise ModelError(
                f"The question is {prompt.shape[1]} tokens long, and {self.title} reads {self.num_positions} at most, "
                "its answer included.",
                "Ask something shorter.",
            )

    def answer(self, prompt: torch.Tensor, settings: Settings, stream: Stream) -> Answer:
        """Answer once.

        Args:
            prompt: (1, T), from `prompt`.
            settings: How the answer is drawn; where fewer positions are left than it allows tokens, so many.
            stream: Takes the answer as it comes.
        """
        left = min(settings.max_new_tokens, self.num_positions - prompt.shape[1])
        return generate(
            self.model,
            prompt,
            Settings(left, settings.temperature, settings.top_p, settings.seed),
            stream,
            tokenizer=self.tokenizer,
            generation_config=self.generation_config,
        )


@contextmanager
def loaded(folder: Path, held: Held, device: torch.device, *, title: str = "") -> Iterator[Loaded]:
    """Load a model folder for the time of a context; each weight is converted as it is read.

    Args:
        folder: A model folder or a checkpoint.
        held: The format of its weights. What is in eight bits is decoded one matrix at a time, as it works.
        device: Where it answers.
        title: What the user knows it as; "": the folder.

    Raises:
        ModelError: It is no whole model of a supported architecture, or can't be held in that format.
    """
    config = load_model_config(folder)
    tokenizer, generation_config = load_tokenizer(folder), read_generation_config(folder)
    headers = read_folder_headers(folder)
    _refuse_frozen(folder, headers, held)
    architecture = build_skeleton(config, device)
    shapes = architecture.parameter_shapes()
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    store = load_store(
        folder,
        shapes,
        tied_head=HEAD if architecture.tied else None,
        dtype=DTYPES[held] if held in DTYPES else _own_dtype(headers, shapes),
        device=device,
        int8=matrices if held == "int8" else (),
        as_packed=held in ("auto", "int8"),
    )
    positions = getattr(config, "max_position_embeddings", None)
    with whole_model(architecture, store) as model:
        yield Loaded(
            title or str(folder),
            model,
            tokenizer,
            generation_config,
            device,
            int(positions) if positions else int(tokenizer.model_max_length),
        )


def _refuse_frozen(folder: Path, headers: Mapping[str, TensorHeader], held: Held) -> None:
    """Refuse to hold what bitsandbytes made in another format: answers would not be those of the run."""
    if held == "auto" or not any(name.endswith(ABSMAX) for name in headers):
        return
    target = "bf16" if held == "int8" else held
    raise ModelError(
        f"--format {held}: {folder} holds weights in eight bits of bitsandbytes, which answer as they are.",
        f"Leave --format out; or write them in another format first: "
        f"sophia-galore export {folder} --to {target} --output FOLDER, then answer from FOLDER.",
    )


def _own_dtype(headers: Mapping[str, TensorHeader], shapes: Mapping[str, torch.Size]) -> torch.dtype:
    """The precision of the weights that a folder holds as they are; the one of most numbers, if there are several."""
    plain = [headers[name] for name in shapes if name in headers and headers[name].dtype.startswith(("F", "BF"))]
    own = main_dtype(plain)
    return own if own is not None and own in DTYPES.values() else torch.float32
