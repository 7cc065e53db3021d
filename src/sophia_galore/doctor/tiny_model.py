"""A model of half a million random weights with its tokenizer and data, made here: nothing is downloaded.

The head is not tied, and its rows of special tokens begin at zero, so that answers don't end before they began.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sophia_galore.engine.determinism import seeded

QUESTION = "what is the sum of one and two"
_SEED = 0
SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>")
_END = SPECIAL.index("<|im_end|>")
_VOCABULARY = 320
# Wide enough that the weights alone take more than the least memory.limit that is accepted.
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": SPECIAL.index("<|im_start|>"),
    "eos_token_id": _END,
    "pad_token_id": _END,
    "tie_word_embeddings": False,
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = ("what", "is", "the", "sum", "of", "one", "two", "three", "four", "and", "so", "it", "follows")


def tiny_config() -> Any:
    """Return the Hugging Face configuration of the model, a small Llama."""
    from transformers import LlamaConfig

    return LlamaConfig(**_SIZES, architectures=["LlamaForCausalLM"])


def write_model(folder: Path) -> Path:
    """Write the model as a hub would give it.

    Args:
        folder: A folder that does not exist yet.

    Returns:
        `folder`.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = tiny_config()
    with seeded(torch.device("cpu"), _SEED):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # As they are made, all logits are almost equal; larger ones give answers that a small error does not change.
    weights["lm_head.weight"] *= 20
    weights["lm_head.weight"][: len(SPECIAL)] = 0
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    # Not by the model itself, which would show a bar of its progress.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    chat_tokenizer(_VOCABULARY).save_pretrained(folder)
    return folder


def write_data(path: Path, *, num_records: int = 16, most_words: tuple[int, int] = (4, 6)) -> Path:
    """Write instruction examples of different lengths.

    Args:
        path: The file.
        num_records: How many.
        most_words: Words of the longest question and of the longest answer.

    Returns:
        `path`.
    """
    draw = random.Random(_SEED)
    records = [
        {
            "instruction": " ".join(draw.choices(_WORDS, k=draw.randint(1, most_words[0]))),
            "output": f"{number} " + " ".join(draw.choices(_WORDS, k=draw.randint(1, most_words[1]))),
        }
        for number in range(num_records)
    ]
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def chat_tokenizer(vocab_size: int) -> Any:
    """Return a tokenizer for conversations, in which every text can be written byte by byte.

    Args:
        vocab_size: Its number of tokens, or less if the few words it is made from do not give so many.
    """
    from transformers import PreTrainedTokenizerFast

    made = byte_tokenizer([" ".join(_WORDS)], vocab_size, SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=SPECIAL[1], eos_token=SPECIAL[2])
    fast.chat_template = TEMPLATE
    return fast


def byte_tokenizer(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> Any:
    """Return a tokenizer of the library `tokenizers`, in which every text can be written byte by byte.

    Args:
        texts: What its longer tokens are made from.
        vocab_size: Its number of tokens at most.
        special: Its special tokens, which come first.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
