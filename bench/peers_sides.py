"""The sides that `peers.py` compares, and the work that is the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_trainer import TrainerOptions
    from sophia_galore.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
RANK, GAP, SCALE = 128, 200, 0.25
BASE = "trainer-adamw"
"""The side that the others are compared with."""

# As the Trainer's documentation names them: the linear maps of all layers.
_LINEARS = (r".*.attn.*", r".*.mlp.*")
_LOW_RANK = f"rank={RANK},update_proj_gap={GAP}"
# The Trainer has one rate for projected matrices, embedding and norms. GaLore's own is best for the first, and a
# quarter of it (its scale) for the others: so both are tried, and what is between them.
_GALORE_RATES = (1.6e-3, 8e-4, 4e-4)
_LORA_RATES = (5e-4, 1e-3, 2e-3)


@dataclass(frozen=True)
class Side:
    """One row of the comparison.

    Args:
        title: What it is called in the table.
        rates: Peak rates that are tried; speed and memory are measured with the first one.
        settings: What differs from the common configuration, as overrides.
        optim: The Trainer's optimizer; empty: this is a run of ours.
        optim_args: Its arguments.
        targets: Modules whose matrices it projects.
        one_micro_batch: Whether to take the whole effective batch as one padded micro-batch where the side refuses
            the common setting.
        compiles: Whether its step is compiled.
        lora: Rank of a low-rank adapter that is trained instead of the weights; 0: none.
        lora_int8: Whether the weights below it are in eight bits.
        remark: What its row has to say.
    """

    title: str
    rates: tuple[float, ...]
    settings: tuple[str, ...] = ()
    optim: str = ""
    optim_args: str | None = None
    targets: tuple[str, ...] = ()
    one_micro_batch: bool = False
    compiles: bool = False
    lora: int = 0
    lora_int8: bool = False
    remark: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether our own engine runs it."""
        return not self.optim

    @property
    def trainer_options(self) -> TrainerOptions:
        """What the Trainer is told."""
        from hf_trainer import Adapter, TrainerOptions

        adapter = Adapter(self.lora, self.lora_int8) if self.lora else None
        return TrainerOptions(self.optim, self.optim_args, self.targets, self.compiles, adapter)


# So many that the process stays below 0.6 of the Trainer's memory in the default work: with fp32 weights, with an 8-bit
# state beside them, and with int8 weights.
SOME_LAYERS, SOME_LAYERS_STATE, SOME_LAYERS_INT8 = 8, 20, 24
_KEPT = "training.gradient_checkpointing=false"
_ADAMW, _GALORE = "optimizer.type=adamw", "optimizer.type=galore"
_INT8 = (_GALORE, "quantization.load_in_8bit=true", "optimizer.state_bits=8")
SIDES: dict[str, Side] = {
    # adamw_torch_fused is the Trainer's default.
    BASE: Side("Trainer, AdamW", (2e-4,), optim="adamw_torch_fused"),
    "trainer-adamw-kept": Side(
        "Trainer, AdamW, no checkpointing", (2e-4,), settings=(_KEPT,), optim="adamw_torch_fused"
    ),
    "trainer-galore": Side(
        "Trainer, galore_adamw",
        _GALORE_RATES,
        optim="galore_adamw",
        optim_args=f"{_LOW_RANK},scale={SCALE}",
        targets=_LINEARS,
    ),
    "trainer-galore-layerwise": Side(
        "Trainer, galore_adamw_layerwise",
        _GALORE_RATES,
        optim="galore_adamw_layerwise",
        optim_args=f"{_LOW_RANK},scale={SCALE}",
        targets=_LINEARS,
        one_micro_batch=True,
    ),
    "trainer-apollo": Side(
        "Trainer, apollo_adamw", (2e-4, 4e-4, 8e-4), optim="apollo_adamw", optim_args=_LOW_RANK, targets=_LINEARS
    ),
    "trainer-adamw8bit": Side(
        "Trainer, AdamW8bit of torchao",
        (2e-4,),
        optim="adamw_torch_8bit",
        compiles=True,
        remark="its compiled step is not followed by the tracker, the state that it leaves is",
    ),
    "lora-16": Side("Trainer, LoRA of rank 16", _LORA_RATES, optim="adamw_torch_fused", lora=16),
    "lora-64": Side("Trainer, LoRA of rank 64", _LORA_RATES, optim="adamw_torch_fused", lora=64),
    "lora-16-int8": Side(
        "Trainer, LoRA of rank 16, int8 base", _LORA_RATES, optim="adamw_torch_fused", lora=16, lora_int8=True
    ),
    "lora-64-int8": Side(
        "Trainer, LoRA of rank 64, int8 base", _LORA_RATES, optim="adamw_torch_fused", lora=64, lora_int8=True
    ),
    "ours-galore": Side("ours, GaLore", (1.6e-3,), settings=(_GALORE,)),
    "ours-galore-kept": Side("ours, GaLore, all graphs kept", (1.6e-3,), settings=(_GALORE, _KEPT)),
    "ours-galore-some-kept": Side(
        f"ours, GaLore, graphs of {SOME_LAYERS} of 30 layers kept",
        (1.6e-3,),
        settings=(_GALORE, f"engine.keep_layers={SOME_LAYERS}"),
    ),
    "ours-galore-state8-some-kept": Side(
        f"ours, GaLore, 8-bit state, graphs of {SOME_LAYERS_STATE} of 30 layers kept, logits in smaller chunks",
        (1.6e-3,),
        settings=(
            *(_GALORE, "optimizer.state_bits=8"),
            *(f"engine.keep_layers={SOME_LAYERS_STATE}", "memory.logits_chunk_mib=16"),
        ),
    ),
    "ours-galore-bf16": Side("ours, GaLore, bf16 weights", (1.6e-3,), settings=(_GALORE, "model.store=bf16")),
    "ours-galore-int8": Side("ours, GaLore, int8 weights, 8-bit state", (1.6e-3,), settings=_INT8),
    "ours-galore-int8-some-kept": Side(
        f"ours, GaLore, int8 weights, 8-bit state, graphs of {SOME_LAYERS_INT8} of 30 layers kept",
        (1.6e-3,),
        settings=(*_INT8, f"engine.keep_layers={SOME_LAYERS_INT8}"),
    ),
    "ours-adamw": Side("ours, AdamW", (2e-4,), settings=(_ADAMW,)),
    "ours-adamw-kept": Side("ours, AdamW, all graphs kept", (2e-4,), settings=(_ADAMW, _KEPT)),
}


@dataclass(frozen=True)
class Work:
    """What all sides do.

    Args:
        model: Folder of the model that training starts from.
        data: File of records.
        steps: Optimizer steps.
        batch_size: Examples in a micro-batch.
        accumulation: Micro-batches in a step.
        max_length: Longest example in tokens.
        eval_examples: Held-out examples.
        seed: Decides which examples are held out, and the order of the others.
    """

    model: str
    data: str
    steps: int
    batch_size: int
    accumulation: int
    max_length: int
    eval_examples: int
    seed: int

    def shown(self) -> dict[str, Any]:
        """What two measurements must have in common to stand in one table."""
        return {**vars(self), "model": Path(self.model).name, "data": Path(self.data).name}


def run_config(
    side: Side,
    work: Work,
    *,
    rate: float,
    output: Path,
    steps: int | None = None,
    save_every: int = 0,
    track_steps: int = 0,
    one_micro_batch: bool = False,
    words: tuple[str, ...] = (),
) -> RunConfig:
    """The configuration of a run; of a side of the Trainer, what it has in common with ours.

    Args:
        side: What to run.
        work: What all sides do.
        rate: Peak learning rate.
        output: Folder of the run.
        steps: Optimizer steps; None: those of `work`.
        save_every: Steps between checkpoints; 0: none.
        track_steps: Steps in which storages are tracked.
        one_micro_batch: Take the effective batch at once.
        words: Settings that go before all these.
    """
    from sophia_galore.config import load_config

    batch_size, accumulation, num_steps = work.batch_size, work.accumulation, steps or work.steps
    if one_micro_batch:
        batch_size, accumulation = batch_size * accumulation, 1
    overrides = [
        f"model.name={work.model}",
        f"data.train={work.data}",
        # For our own evaluation, which nobody looks at: it doesn't change what is held out.
        "data.max_eval_examples=1",
        f"training.output_dir={output}",
        f"training.seed={work.seed}",
        f"training.learning_rate={rate}",
        f"training.max_steps={num_steps}",
        f"training.warmup_steps={min(3, num_steps - 1)}",
        f"training.batch_size={batch_size}",
        f"training.gradient_accumulation_steps={accumulation}",
        f"training.max_length={work.max_length}",
        "training.eval_every_steps=0",
        "training.sample_questions=[]",
        "training.device=cpu",
        # The Trainer has no such step, and its memory would count.
        "training.probe_step=false",
        "memory.predict=false",
        f"memory.track_steps={track_steps}",
        f"checkpoint.save_every_steps={save_every}",
        "checkpoint.keep_last=2",
        f"optimizer.galore.rank={RANK}",
        f"optimizer.galore.update_proj_gap={GAP}",
        f"optimizer.galore.scale={SCALE}",
        *(side.settings if side.is_ours else (_ADAMW, *side.settings)),
        *words,
    ]
    return load_config(ROOT / "configs" / "quickstart.yaml", overrides)
