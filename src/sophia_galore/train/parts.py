"""The live parts of a run, put together."""

from __future__ import annotations

from dataclasses import dataclass

from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.engine.stepper import Stepper
from sophia_galore.memory.monitor import MemoryMonitor
from sophia_galore.memory.out_of_memory import storage_names
from sophia_galore.model.frozen import Freezer
from sophia_galore.model.store import DTYPES, WeightStore, load_store
from sophia_galore.model.weight_files import HEAD
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.plan.route import frozen_names
from sophia_galore.plan.routes import int8_format
from sophia_galore.train.checkpoint import Checkpoint
from sophia_galore.train.listener import Listener
from sophia_galore.train.prepare import Prepared


@dataclass(frozen=True)
class Parts:
    """What a run consists of.

    Args:
        store: The weights.
        optimizer: The optimizer with its state.
        engine: Finds gradients.
        stepper: Takes steps.
    """

    store: WeightStore
    optimizer: ParamOptimizer
    engine: LayerwiseEngine
    stepper: Stepper


def assemble(prepared: Prepared, monitor: MemoryMonitor, listener: Listener, checkpoint: Checkpoint | None) -> Parts:
    """Load weights and state, and put engine and optimizer over them.

    Args:
        prepared: What will be done.
        monitor: Watches memory.
        listener: Hears what happens.
        checkpoint: Where the run goes on from, if it does.

    Raises:
        UserError: Weights or state can't be read, or do not belong together.
        OutOfMemory: They do not fit.
    """
    config, plan = prepared.config, prepared.plan
    with monitor.phase("load"):
        listener.say(f"Loading {plan.num_parameters / 1e6:.1f} M parameters from {prepared.folder} ...")
        store = _load(prepared, going_on=checkpoint is not None)
        specs = (route.spec for route in plan.routes if route.spec)
        optimizer = ParamOptimizer(specs, seed=config.training.seed, device=prepared.device)
        if checkpoint:
            with monitor.apart():
                optimizer.load_named_state(checkpoint.optimizer_state())
        monitor.names = lambda: storage_names(store, optimizer)
        monitor.tag_state(optimizer.named_state().items())

    def adapted(change: str) -> None:
        monitor.adaptations.append(change)
        listener.say(change)

    engine = LayerwiseEngine(
        prepared.anatomy,
        store,
        compute_dtype=prepared.compute_dtype,
        device=prepared.device,
        seed=config.training.seed,
        observer=monitor,
        logits_chunk_bytes=config.memory.logits_chunk_mib * 2**20,
        keep_layers=plan.keep_layers,
        on_oom=config.memory.on_oom,
        say=adapted,
        frozen=frozen_names(plan.routes),
        neftune_alpha=config.training.neftune_alpha or 0.0,
    )
    stepper = Stepper(
        engine,
        optimizer,
        store,
        clip_by=plan.clip_by,
        curvature_every=plan.curvature_every,
        max_grad_norm=config.training.max_grad_norm,
    )
    return Parts(store, optimizer, engine, stepper)


def _load(prepared: Prepared, *, going_on: bool) -> WeightStore:
    frozen = [route.name for route in prepared.plan.routes if route.format == "bnb8"]
    return load_store(
        prepared.folder,
        prepared.anatomy.parameter_shapes(),
        tied_head=HEAD if prepared.anatomy.tied else None,
        dtype=DTYPES[prepared.config.model.store],
        device=prepared.device,
        int8=[route.name for route in prepared.plan.routes if route.format == "int8"],
        form=int8_format(prepared.config.quantization),
        without_remainders=going_on,
        frozen=Freezer(prepared.anatomy, frozen, prepared.device) if frozen else None,
    )
