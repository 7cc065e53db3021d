"""The update in backward: each gradient is used and dropped as soon as it is there, so only one is alive at a time."""

from __future__ import annotations

from small import arguments, batch, model_and_tokenizer, show_loss

import sophia_galore

options = arguments()
model, tokenizer = model_and_tokenizer(options.model)
model.to(options.device)
optimizer = sophia_galore.GaLore(
    model.named_parameters(),
    lr=1e-2 if options.model is None else 1e-3,
    rank=16 if options.model is None else 128,
)
inputs = batch(tokenizer, options.device)

show_loss("before", model, tokenizer)
with sophia_galore.attach(optimizer, model, max_grad_norm=1.0):  # of each parameter by itself
    for _ in range(options.steps):
        model(**inputs).loss.backward()  # the weights move in here
        optimizer.step()  # and this says that the step is over
assert all(parameter.grad is None for parameter in model.parameters())
show_loss("after", model, tokenizer)
