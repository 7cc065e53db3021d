"""The Hugging Face Trainer with GaLore."""

from __future__ import annotations

import tempfile

from small import TEXTS, arguments, model_and_tokenizer, show_loss
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import sophia_galore

options = arguments()
model, tokenizer = model_and_tokenizer(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
optimizer = sophia_galore.GaLore(
    model.named_parameters(),
    lr=1e-2 if options.model is None else 1e-3,
    rank=16 if options.model is None else 128,
)

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
            use_cpu=options.device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=[tokenizer(text, return_token_type_ids=False) for text in TEXTS],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        optimizers=(optimizer, None),  # None: the Trainer makes the scheduler from its arguments
    )
    show_loss("before", model, tokenizer)
    trainer.train()
    show_loss("after", model, tokenizer)
