"""In Hugging Face's Trainer and TRL's SFTTrainer: a run that was resumed ends on the bits of one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import sophia_galore
from small_net import assert_same, weights
from sophia_galore.errors import StepError
from tiny import tiny_model, tiny_tokenizer

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def data() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 300, (48, 12), generator=draw)
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    """Six steps, with a checkpoint after three; the Trainer clips at 1 by itself."""
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1.0,  # not read: the rate is the optimizer's
        "lr_scheduler_type": "cosine",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        **more,
    }


def make_optimizer(kind: str, model: Any) -> torch.optim.Optimizer:
    if kind == "sophia":
        optimizer = sophia_galore.Sophia(model.named_parameters(), lr=1e-3, curvature_every=2, state_bits=8)
        sophia_galore.watch(optimizer, model)
        return optimizer
    return sophia_galore.GaLore(model.named_parameters(), lr=1e-2, rank=8, update_proj_gap=4, state_bits=8)


def trainer(kind: str, dtype: torch.dtype, folder: Path, **more: Any) -> Trainer:
    model = tiny_model().to(dtype)
    settings = TrainingArguments(**arguments(folder, **more))
    return Trainer(model, settings, train_dataset=data(), optimizers=(make_optimizer(kind, model), None))


def sft_trainer(kind: str, dtype: torch.dtype, folder: Path) -> Trainer:
    model = tiny_model().to(dtype)
    rows = Dataset.from_dict({"text": [f"what follows {n} is {n + 1}" for n in range(32)]})
    settings = SFTConfig(**arguments(folder, max_length=32, gradient_checkpointing=False, bf16=False))
    optimizers = (make_optimizer(kind, model), None)
    return SFTTrainer(model, settings, train_dataset=rows, processing_class=tiny_tokenizer(), optimizers=optimizers)


@DTYPES
@pytest.mark.parametrize(
    ("make", "kind"),
    [(trainer, "galore"), (trainer, "sophia"), (sft_trainer, "galore")],
    ids=["trainer-galore", "trainer-sophia", "sft-galore"],
)
def test_a_resumed_run_ends_on_the_same_bits(make: Any, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = make(kind, dtype, tmp_path)
    start = weights(whole.model)
    whole.train()
    assert not torch.equal(start["model.norm.weight"], whole.model.model.norm.weight)
    resumed = make(kind, dtype, tmp_path)
    assert_same(weights(resumed.model), start)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(weights(resumed.model), weights(whole.model))
    assert resumed.state.global_step == 6


def test_update_in_backward(tmp_path: Path) -> None:
    """With accumulation off and no clipping the Trainer needs to know nothing of it."""
    ends = []
    for attached in (True, False):
        one = trainer("galore", torch.float32, tmp_path, gradient_accumulation_steps=1, max_grad_norm=0.0)
        handle = sophia_galore.attach(one.optimizer, one.model) if attached else None
        one.train()
        if handle:
            handle.remove()
        ends.append(weights(one.model))
    assert_same(*ends)


def test_update_in_backward_refuses_to_accumulate(tmp_path: Path) -> None:
    one = trainer("galore", torch.float32, tmp_path)
    with sophia_galore.attach(one.optimizer, one.model), pytest.raises(StepError, match="gradient_accumulation_steps"):
        one.train()


def test_sft_trainer_makes_no_logits_for_sophia_to_see(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"has none(.|\n)*observe_curvature"):
        sft_trainer("sophia", torch.float32, tmp_path).train()
