"""Load the weights and the optimizer's state, and build the engine and the stepper."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from sophia_galore.data.batches import pad_token
from sophia_galore.data.feed import Feed
from sophia_galore.distributed.owned_states import ShardedOptimizer
from sophia_galore.distributed.processes import Processes
from sophia_galore.distributed.reducer import ProcessReducer
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.engine.stepper import Stepper
from sophia_galore.memory.monitor import MemoryMonitor
from sophia_galore.memory.out_of_memory import storage_names
from sophia_galore.model.folder_layout import load_buffers
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.plan.route import frozen_names
from sophia_galore.plan.routes import int8_format
from sophia_galore.streaming.store import StreamedStore
from sophia_galore.train.callback import Callback
from sophia_galore.train.prepared import Loaded, Prepared
from sophia_galore.train.signals import StopRequest
from sophia_galore.train.streamed_files import keeping, open_streamed
from sophia_galore.weights.bitsandbytes import Freezer
from sophia_galore.weights.files import load_store
from sophia_galore.weights.folder import HEAD
from sophia_galore.weights.plain import DTYPES
from sophia_galore.weights.weight import Weight


def load(
    prepared: Prepared,
    monitor: MemoryMonitor,
    callback: Callback,
    stop: StopRequest,
    at_end: ExitStack,
    processes: Processes | None = None,
) -> Loaded:
    """Load a prepared run.

    Args:
        prepared: The prepared run.
        monitor: Measures memory.
        callback: Called at each event of the run.
        stop: Whether the user asked the run to stop.
        at_end: Ended with the run.
        processes: The processes of the run; None: there is one.

    Raises:
        UserError: Weights or state can't be read, or do not belong together.
        OutOfMemory: They do not fit into memory.
    """
    config, plan, checkpoint = prepared.config, prepared.plan, prepared.checkpoint
    processes = processes or Processes()
    with monitor.phase("load"):
        streaming = open_streamed(prepared, monitor, at_end, processes)

        def settle(name: str, weight: Weight) -> Weight:
            if streaming is None:
                return weight
            with keeping(prepared):
                return streaming.take_in(name, weight)

        callback.say(f"Loading {plan.num_parameters / 1e6:.1f} M parameters from {prepared.folder} ...")
        architecture = prepared.architecture
        frozen = [route.name for route in plan.routes if route.format == "bnb8"]
        freezer = Freezer(architecture.model, architecture.linear_names(), frozen, prepared.device) if frozen else None
        store = load_store(
            prepared.folder,
            architecture.parameter_shapes(),
            tied_head=HEAD if architecture.tied else None,
            dtype=DTYPES[config.model.store],
            device=prepared.device,
            int8=[route.name for route in plan.routes if route.format == "int8"],
            form=int8_format(config.quantization),
            without_updates=checkpoint is not None,
            frozen=freezer,
            elsewhere=prepared.streamed.names,
            settle=settle,
            layout=prepared.layout.reading,
        )
        load_buffers(prepared.folder, prepared.layout, architecture)
        specs = [route.spec for route in plan.routes if route.spec]
        optimizer: ParamOptimizer
        shards = config.distributed.shard_state and not processes.is_alone
        if shards:
            optimizer = sharded = ShardedOptimizer(
                specs, seed=config.training.seed, device=prepared.device, processes=processes
            )
        else:
            optimizer = ParamOptimizer(
                specs, seed=config.training.seed, device=prepared.device, elsewhere=prepared.streamed.names
            )
        if streaming:
            store = StreamedStore(
                dict(store.items()), streaming.streams, optimizer.states.tensors(), optimizer.with_deferred_update
            )
            optimizer.states.lend = partial(store.borrow, trains=True)
            optimizer.states.begin(prepared.streamed.names)
        if checkpoint:
            with monitor.apart():
                optimizer.states.load(checkpoint.optimizer_state())
        if shards:
            optimizer.states.lend = sharded.lend_to_first
        monitor.names = lambda: storage_names(store, optimizer)
        monitor.tag_state(optimizer.states.named().items())

    def adapted(change: str) -> None:
        monitor.adaptations.append(change)
        callback.say(change)

    if config.distributed.sum_blocks > 1 and processes.count > 2:  # of two, there is one order
        processes.sum_in_pairs()
    # A layer that streams would have to come a second time for its update.
    overlaps = config.distributed.overlap and streaming is None
    engine = LayerwiseEngine(
        architecture,
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
        spill=streaming.spill if streaming else None,
        full_gradients=plan.full_gradients,
        reducer=None if processes.is_alone else ProcessReducer(processes, overlaps=overlaps),
    )
    stepper = Stepper(
        engine,
        optimizer,
        store,
        clip_by=plan.clip_by,
        curvature_every=plan.curvature_every,
        max_grad_norm=config.training.max_grad_norm,
    )
    pad_id = pad_token(prepared.tokenizer)
    feed, eval_feed = (Feed.of(config, part, pad_id) for part in (prepared.dataset.train, prepared.dataset.eval))
    return Loaded(
        prepared,
        streaming.streams if streaming else None,
        store,
        optimizer,
        engine,
        stepper,
        feed,
        eval_feed,
        monitor,
        stop,
        processes,
    )
