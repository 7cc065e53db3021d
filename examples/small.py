"""What the examples train: a tiny random model, made in a second without a network, or `--model NAME`."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

TEXTS = [f"{a} plus {b} is {a + b}, and {b} plus {a} is the same." for a in range(8) for b in range(4)]


def arguments() -> argparse.Namespace:
    """The options of every example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a model's name on the hub, or its folder; by default a tiny random one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def model_and_tokenizer(name: str | None) -> tuple[Any, Any]:
    """The model that was named, or a tiny one, and its tokenizer."""
    torch.manual_seed(0)
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(name)
    letters = Tokenizer(models.BPE())
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    letters.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>", pad_token="<end>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config), tokenizer


def batch(tokenizer: Any, device: str) -> dict[str, Any]:
    """All texts as one batch; padding is no label."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False).to(device)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


@torch.no_grad()
def show_loss(when: str, model: Any, tokenizer: Any, *, quiet: bool = False) -> None:
    """Print the loss over all texts; `quiet` where another process does, since all must compute a sharded model."""
    model.eval()
    loss = model(**batch(tokenizer, model.device)).loss.item()
    if not quiet:
        print(f"loss {when}: {loss:.3f}")
    model.train()
