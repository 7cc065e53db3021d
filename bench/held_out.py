"""Loss of a model folder on held-out examples, by the plain Hugging Face model in float32, whoever trained it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sophia_galore.config import RunConfig
from sophia_galore.data.batches import IGNORED, MicroBatch, pad_token
from sophia_galore.data.dataset import load_data
from sophia_galore.data.feed import Feed
from sophia_galore.model.skeleton import load_tokenizer


def held_out_batches(config: RunConfig) -> list[MicroBatch]:
    """The evaluation examples of a run, read with the tokenizer of the model that it starts from."""
    training = config.training
    tokenizer = load_tokenizer(Path(config.model.name))
    data = load_data(config.data, max_length=training.max_length, seed=training.seed, tokenizer=tokenizer)
    return Feed.of(config, data.eval, pad_token(tokenizer)).longest_first()


def eval_loss(folder: Path, batches: Sequence[MicroBatch]) -> float:
    """Summed cross-entropy over the counted tokens, divided by their number.

    Args:
        folder: A model folder, weights in any precision.
        batches: Micro-batches of held-out examples, (B, T).

    Returns:
        Nats a token.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    summed = 0.0
    with torch.no_grad():
        for batch in batches:
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            targets = batch.labels.flatten()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"
            )
            summed += float(losses)
    return summed / sum(batch.num_counted for batch in batches)
