"""Sophia in the Hugging Face Trainer: one line more, since it wants to see the curvature."""

from __future__ import annotations

import tempfile

from small import TEXTS, arguments, model_and_tokenizer, show_loss
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import sophia_galore

options = arguments()
model, tokenizer = model_and_tokenizer(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
optimizer = sophia_galore.Sophia(model.named_parameters(), lr=3e-3 if options.model is None else 2e-4)
sophia_galore.watch(optimizer, model)  # every tenth step it draws labels from the model's own logits

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            use_cpu=options.device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=[tokenizer(text, return_token_type_ids=False) for text in TEXTS],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        optimizers=(optimizer, None),
    )
    show_loss("before", model, tokenizer)
    trainer.train()
    show_loss("after", model, tokenizer)
