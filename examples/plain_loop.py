"""A training loop of your own: GaLore in the place of any torch optimizer."""

from __future__ import annotations

import torch
from small import arguments, batch, model_and_tokenizer, show_loss
from transformers import get_cosine_schedule_with_warmup

import sophia_galore

options = arguments()
model, tokenizer = model_and_tokenizer(options.model)
model.to(options.device)
optimizer = sophia_galore.GaLore(
    model.named_parameters(),  # by name: states and checkpoints are kept by it
    lr=1e-2 if options.model is None else 1e-3,
    rank=16 if options.model is None else 128,
    state_bits=8,
)
scheduler = get_cosine_schedule_with_warmup(optimizer, 2, options.steps)
inputs = batch(tokenizer, options.device)

show_loss("before", model, tokenizer)
for _ in range(options.steps):
    model(**inputs).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
show_loss("after", model, tokenizer)
