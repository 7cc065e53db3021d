"""Load a model folder for generation, from any weight format, in the requested format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sophia_galore.engine.generate import Answer, Message, Settings, Stream, generate, prompt_tokens
from sophia_galore.engine.whole import whole_model
from sophia_galore.errors import ModelError
from sophia_galore.model.export import read_generation_config
from sophia_galore.model.folder_layout import find_layout, load_buffers
from sophia_galore.model.headers import main_dtype, read_folder_headers
from sophia_galore.model.skeleton import build_skeleton, load_model_config, load_tokenizer
from sophia_galore.weights.file_store import FileStore
from sophia_galore.weights.files import load_store
from sophia_galore.weights.folder import HEAD
from sophia_galore.weights.plain import DTYPES
from sophia_galore.weights.row_int8 import ABSMAX
from sophia_galore.weights.safetensors_header import TensorHeader
from sophia_galore.weights.store import WeightStore

Held = Literal["auto", "int8", "bf16", "fp16", "fp32", "file"]
"""Format of the weights in memory; auto: the same as in the folder; file: they stay there, and are read when used."""


@dataclass(frozen=True)
class Loaded:
    """A loaded model that can generate answers.

    Args:
        title: Its name in messages.
        model: The whole Hugging Face model.
        tokenizer: Its tokenizer.
        generation_config: Its generation settings, or None.
        device: Its device.
        num_positions: Its context length: the most tokens of prompt and answer together.
    """

    title: str
    model: Any
    tokenizer: Any
    generation_config: Any
    device: torch.device
    num_positions: int

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    def prompt(self, messages: Sequence[Message]) -> torch.Tensor:
        """Return the token ids of a conversation, (1, T), up to where the next answer begins.

        Raises:
            ModelError: The last message is empty, or the chat template refuses the conversation.
        """
        tokens = prompt_tokens(self.tokenizer, messages)
        if not tokens.shape[1] or not messages[-1][1].strip():
            raise ModelError("The question is empty.", "Ask something.")
        return tokens.to(self.device)

    def refuse_too_long(self, prompt: torch.Tensor) -> None:
        """Refuse a prompt, (1, T), that leaves no position for an answer."""
        if prompt.shape[1] >= self.num_positions:
            raise ModelError(
                f"The question is {prompt.shape[1]} tokens long, and {self.title} reads {self.num_positions} at most, "
                "its answer included.",
                "Ask something shorter.",
            )

    def answer(self, prompt: torch.Tensor, settings: Settings, stream: Stream) -> Answer:
        """Generate one answer.

        Args:
            prompt: (1, T), from `prompt`.
            settings: Sampling settings; the answer also ends at the last position of the context.
            stream: Receives the tokens as they are generated.
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
    """Load a model folder for the duration of a context; each weight is converted as it is read.

    Args:
        folder: A model folder or a checkpoint.
        held: Format of the weights in memory. 8-bit matrices are decoded one at a time, when they are used; with `file`
            matrices are read one layer at a time.
        device: The compute device.
        title: Name of the model in messages; "": the folder.

    Raises:
        ModelError: The folder holds no complete model of a supported architecture, or its weights can't be converted.
    """
    config = load_model_config(folder)
    tokenizer, generation_config = load_tokenizer(folder), read_generation_config(folder)
    headers = read_folder_headers(folder)
    _refuse_frozen(folder, headers, held)
    architecture = build_skeleton(config, device)
    shapes = architecture.parameter_shapes()
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    tied_head = HEAD if architecture.tied else None
    layout = find_layout(folder, architecture)
    load_buffers(folder, layout, architecture)
    store: WeightStore
    if held == "file":
        store = FileStore.of(folder, shapes, tied_head=tied_head, device=device, layout=layout.reading)
    else:
        store = load_store(
            folder,
            shapes,
            tied_head=tied_head,
            dtype=DTYPES[held] if held in DTYPES else _own_dtype(headers, layout.reading.keys),
            device=device,
            int8=matrices if held == "int8" else (),
            as_packed=held in ("auto", "int8"),
            layout=layout.reading,
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
    """Refuse to convert bitsandbytes weights: the answers would differ from those of the trained model."""
    if held in ("auto", "file") or not any(name.endswith(ABSMAX) for name in headers):
        return
    target = "bf16" if held == "int8" else held
    raise ModelError(
        f"--format {held}: {folder} holds weights in eight bits of bitsandbytes, which answer as they are.",
        f"Leave --format out; or write them in another format first: "
        f"sophia-galore export {folder} --to {target} --output FOLDER, then answer from FOLDER.",
    )


def _own_dtype(headers: Mapping[str, TensorHeader], keys: Iterable[str]) -> torch.dtype:
    """Return the precision of the folder's plain weights; of several, the one with the most elements."""
    plain = [headers[name] for name in keys if name in headers and headers[name].dtype.startswith(("F", "BF"))]
    own = main_dtype(plain)
    return own if own is not None and own in DTYPES.values() else torch.float32
