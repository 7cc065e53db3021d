"""What `gpu.py` trains: models with random weights and the shapes of well-known ones, a tokenizer, and text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from large_model import write_random_model
from sophia_galore.data.stdlib_text import prepare_corpus
from sophia_galore.doctor.tiny_model import byte_tokenizer
from sophia_galore.model.skeleton import make_model_config
from sophia_galore.model.specifications import find_specification

END = "<|endoftext|>"
# Of the text; enough for every section, and tokenised in a second.
_TEXT_BYTES = 3_000_000
# `--tiny`: the same families in a few thousand weights.
_TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_window_layers": 2,
}


@dataclass(frozen=True)
class Work:
    """Where everything is, and how much is done.

    Attributes:
        folder: Models, text and runs.
        device: cpu or cuda.
        tiny: Whether shapes and steps are so small that a CPU gets through in a minute.
    """

    folder: Path
    device: str
    tiny: bool

    @property
    def text(self) -> Path:
        """A corpus, written when it is first asked for."""
        path = self.folder / "text.txt"
        if not path.exists():
            prepare_corpus(path)
            content = path.read_bytes()[: 200_000 if self.tiny else _TEXT_BYTES]
            path.write_text(content.decode("utf-8", errors="ignore"), encoding="utf-8")
        return path

    @property
    def tokenizer(self) -> Path:
        """A folder with a tokenizer of 512 entries, made when it is first asked for."""
        folder = self.folder / "tokenizer"
        if not folder.exists():
            with self.text.open(encoding="utf-8") as lines:
                bpe = byte_tokenizer(lines, 512, [END])
            words = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)
            words.save_pretrained(folder)
        return folder

    def config(self, name: str) -> Any:
        """Return the Hugging Face configuration of a built-in specification, with our tokenizer's special tokens."""
        known = find_specification(name)
        if known is None:
            raise ValueError(f"{name} is no built-in model")
        shapes = {key: value for key, value in _TINY.items() if key in known.config or key in ("head_dim",)}
        config = make_model_config({**known.config, **(shapes if self.tiny else {})}, name)
        words = PreTrainedTokenizerFast.from_pretrained(self.tokenizer)
        config.eos_token_id, config.pad_token_id, config.bos_token_id = words.eos_token_id, words.pad_token_id, None
        return config

    def plain_model(self, name: str) -> Path:
        """Return a folder with random bf16 weights of a model's shapes, written when it is first asked for."""
        folder = self.folder / f"{name}-bf16"
        if not folder.exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(self.config(name), dtype=torch.bfloat16).save_pretrained(folder)
            PreTrainedTokenizerFast.from_pretrained(self.tokenizer).save_pretrained(folder)
        return folder

    def int8_model(self, name: str) -> Path:
        """Return the same in eight bits, written layer by layer."""
        folder = self.folder / f"{name}-int8"
        if not folder.exists():
            write_random_model(folder, self.config(name), self.tokenizer)
        return folder

    def settings(self, model: Path, run: str, *, length: int, steps: int) -> list[str]:
        """Return the settings that all runs have in common.

        Args:
            model: The model's folder.
            run: Name of the run's folder.
            length: Tokens of a row.
            steps: Optimizer steps.
        """
        length, steps = (min(length, 32), min(steps, 6)) if self.tiny else (length, steps)
        words = [
            f"model.name={model}",
            f"model.cache_dir={self.folder / 'cache'}",
            f"data.train={self.text}",
            "data.eval_fraction=0",
            f"training.output_dir={self.folder / run}",
            f"training.device={self.device}",
            f"training.max_length={length}",
            f"training.max_steps={steps}",
            "training.warmup_steps=1",
        ]
        return [*words, "optimizer.galore.rank=8"] if self.tiny else words
