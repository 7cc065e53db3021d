"""The configuration's keys are a promise to users: changing one is a decision, not an accident."""

from __future__ import annotations

from sophia_galore.config.keys import known_keys

KEYS = [
    "checkpoint.keep_last",
    "checkpoint.save_every_minutes",
    "checkpoint.save_every_steps",
    "data.eval",
    "data.eval_fraction",
    "data.format",
    "data.max_eval_examples",
    "data.max_train_examples",
    "data.too_long",
    "data.train",
    "export.dtype",
    "memory.track_steps",
    "model.cache_dir",
    "model.fallback",
    "model.name",
    "model.source",
    "model.store",
    "model.trust_remote_code",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.galore.dense_learning_rate",
    "optimizer.galore.rank",
    "optimizer.galore.scale",
    "optimizer.galore.stagger",
    "optimizer.galore.update_proj_gap",
    "optimizer.type",
    "quantization.enabled",
    "quantization.load_in_8bit",
    "training.batch_size",
    "training.compute_dtype",
    "training.device",
    "training.epochs",
    "training.eval_every_steps",
    "training.gradient_accumulation_steps",
    "training.gradient_checkpointing",
    "training.learning_rate",
    "training.logging_steps",
    "training.lr_scheduler_type",
    "training.max_grad_norm",
    "training.max_length",
    "training.max_steps",
    "training.output_dir",
    "training.sample_max_new_tokens",
    "training.sample_questions",
    "training.seed",
    "training.warmup_steps",
    "training.weight_decay",
]


def test_the_keys_are_exactly_these() -> None:
    assert known_keys() == KEYS
