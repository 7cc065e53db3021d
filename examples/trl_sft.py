"""TRL's SFTTrainer with APOLLO-Mini, whose state is a sliver of AdamW's."""

from __future__ import annotations

import tempfile

from datasets import Dataset
from small import TEXTS, arguments, model_and_tokenizer, show_loss
from trl import SFTConfig, SFTTrainer

import sophia_galore

options = arguments()
model, tokenizer = model_and_tokenizer(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
optimizer = sophia_galore.Apollo(model.named_parameters(), lr=3e-3 if options.model is None else 2e-4, mini=True)

with tempfile.TemporaryDirectory() as folder:
    trainer = SFTTrainer(
        model,
        SFTConfig(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            max_length=64,
            use_cpu=options.device == "cpu",
            bf16=options.device != "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    show_loss("before", model, tokenizer)
    trainer.train()
    show_loss("after", model, tokenizer)
