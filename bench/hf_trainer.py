"""The Hugging Face Trainer on the very micro-batches that our run takes, with the same rate and schedule.

A run's configuration says what both have in common; `TrainerOptions` says which optimizer the Trainer takes. Batches
are made beforehand by our own code, in the order in which our run takes them, and handed over one by one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type
from torch.utils.data import Dataset, SequentialSampler

from measured import Measured
from sophia_galore.config import RunConfig
from sophia_galore.data.batches import MicroBatch, pad_token
from sophia_galore.data.dataset import load_data
from sophia_galore.data.feed import Feed
from sophia_galore.memory.report import peak_process_bytes
from sophia_galore.memory.tracker import StorageTracker
from sophia_galore.model.skeleton import load_tokenizer
from sophia_galore.plan.routes import peak_learning_rate


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter of peft on all linear maps of the layers; the model itself stays as it is.

    Args:
        rank: Its rank; its factor is twice that over the rank, without dropout.
        int8: Whether the model below is held in eight bits by bitsandbytes.
    """

    rank: int
    int8: bool = False


@dataclass(frozen=True)
class TrainerOptions:
    """What the Trainer is told beside what it has in common with our run.

    Args:
        optim: Its `optim`.
        optim_args: Its `optim_args`.
        targets: Its `optim_target_modules`.
        compiles: Whether it compiles its step, which torch refuses to do where operations are followed.
        adapter: What is trained instead of the model's weights; None: all of these.
    """

    optim: str
    optim_args: str | None = None
    targets: tuple[str, ...] = ()
    compiles: bool = False
    adapter: Adapter | None = None


class PlainTensorTracker(StorageTracker):
    """A storage tracker for programs whose tensors may be made of others.

    An optimizer state of torchao is a tensor in name only, and its own storage holds nothing: its operations are
    handed on to its class, and the tensors that it consists of are counted when those are used.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)


def _plain_tensors(value: Any) -> list[torch.Tensor]:
    """The tensors that a value of an optimizer's state consists of."""
    if not isinstance(value, torch.Tensor):
        return []
    if not is_traceable_wrapper_subclass_type(type(value)):
        return [value]
    names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
    return [plain for name in names for plain in _plain_tensors(getattr(value, name))]


def micro_batches(config: RunConfig) -> list[list[MicroBatch]]:
    """The micro-batches of each step of our run with this configuration.

    Args:
        config: The run's configuration; `model.name` is a folder.

    Raises:
        ValueError: There are so few examples that a step has fewer micro-batches than another one.
    """
    training = config.training
    tokenizer = load_tokenizer(Path(config.model.name))
    data = load_data(config.data, max_length=training.max_length, seed=training.seed, tokenizer=tokenizer)
    feed = Feed.of(config, data.train, pad_token(tokenizer))
    steps = []
    for step in range(training.max_steps):
        chosen = feed.step(step + 1)
        if len(chosen) < training.gradient_accumulation_steps:
            raise ValueError(f"Step {step + 1} has {len(chosen)} micro-batches: give more examples, or fewer steps.")
        steps.append(chosen)
    return steps


def trainer_inputs(batch: MicroBatch) -> dict[str, torch.Tensor]:
    """A micro-batch as a Hugging Face model takes it, which shifts the labels itself."""
    labels = torch.full_like(batch.labels, -100)
    labels[:, 1:] = batch.labels[:, :-1]
    mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    return {"input_ids": batch.input_ids, "attention_mask": mask, "labels": labels}


def run_trainer(
    config: RunConfig, options: TrainerOptions, *, resume_from: Path | None = None, tracked: bool = False
) -> Measured:
    """Train with the Trainer, in float32 on the CPU.

    Args:
        config: What it has in common with our run: model, data, steps, rate, schedule, checkpointing. Checkpoints are
            made as `checkpoint.save_every_steps` says, in `training.output_dir`; the final model is written there too.
        options: The optimizer.
        resume_from: The checkpoint to go on from.
        tracked: Whether to follow tensor storages, from the loaded weights on; that takes time.

    Returns:
        What was measured.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    steps = micro_batches(config)
    rows = [trainer_inputs(batch) for chosen in steps for batch in chosen]

    class Batches(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return rows[index]

    class Times(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.peak_process_bytes = 0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began_s = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began_s)
            self.peak_process_bytes = peak_process_bytes()

    class NotFollowed(TrainerCallback):
        """Takes the tracker off while the optimizer works, and counts its state afterwards."""

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            tracker.__exit__(None, None, None)

        def on_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
            tracker.__enter__()
            for state in optimizer.state.values():
                for tensor in (tensor for value in state.values() for tensor in _plain_tensors(value)):
                    tracker.tag(tensor, "optimizer state")

    training, save_every = config.training, config.checkpoint.save_every_steps
    arguments = TrainingArguments(
        output_dir=config.run_folder,
        # A row of the data set is a whole micro-batch.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_steps=training.max_steps,
        learning_rate=peak_learning_rate(config),
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        activation_checkpointing=training.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        optim=options.optim,
        optim_args=options.optim_args,
        optim_target_modules=list(options.targets) or None,
        seed=training.seed,
        report_to=[],
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 500,
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    model = _model(config, options.adapter)
    times = Times()
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Batches(), data_collator=lambda some: some[0], callbacks=[times]
    )
    # In the order given: the batches are made already.
    trainer._get_train_sampler = lambda *_: SequentialSampler(rows)  # type: ignore[method-assign]
    checkpoint = str(resume_from) if resume_from else None
    peak_tracked_bytes = None
    if tracked:
        tracker = PlainTensorTracker(torch.device("cpu"))
        if options.compiles:
            trainer.add_callback(NotFollowed())
        with tracker:
            for tensor in (*model.parameters(), *model.buffers()):
                tracker.tag(tensor, "weights")
            trainer.train(resume_from_checkpoint=checkpoint)
            peak_tracked_bytes = tracker.peak_bytes
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    begun = training.max_steps - len(times.seconds)
    tokens = [sum(batch.num_tokens for batch in chosen) for chosen in steps[begun:]]
    return Measured(list(zip(tokens, times.seconds, strict=True)), times.peak_process_bytes, peak_tracked_bytes)


def _model(config: RunConfig, adapter: Adapter | None) -> Any:
    """The model in float32; with an adapter, the model that peft makes of it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if adapter is None:
        return AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(config.training.seed)
    form = BitsAndBytesConfig(load_in_8bit=True) if adapter.int8 else None
    model = AutoModelForCausalLM.from_pretrained(
        config.model.name, dtype=torch.float32, quantization_config=form, device_map="cpu" if form else None
    )
    if adapter.int8:
        # Checkpointing is the Trainer's business.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    asked = LoraConfig(r=adapter.rank, lora_alpha=2 * adapter.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, asked)
