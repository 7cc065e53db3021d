"""What rules look at, as data: a Turing card or a missing package is a value, not a machine to be found.

What is not known yet, or does not matter, has a value that no rule refuses, so that rules can be asked as soon as
there is something to ask them: about the machine before a model is downloaded, about the model before the data
are read. `detect.py` finds the facts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sophia_galore.config import RunConfig
from sophia_galore.config.check import keeps_projected_gradients
from sophia_galore.config.field_types import TrackerName
from sophia_galore.config.problems import nearest
from sophia_galore.config.size import bytes_in_words
from sophia_galore.engine.passes import FullGradients
from sophia_galore.engine.proof import Proof

MIN_BITSANDBYTES = (0, 50)
"""The first version whose eight-bit products run on every device."""

TIED_HEAD = "lm_head.weight"
"""The other name of an embedding that is the head as well."""

# Clipping by the model keeps what steps need of the gradients; beyond this share it would be the gradients themselves.
_LARGEST_KEPT_SHARE = 0.5


@dataclass(frozen=True)
class DeviceFacts:
    """The device of the run.

    Args:
        place: "cpu" or "cuda:N".
        name: Its name.
        capability: (major, minor) of CUDA's compute capability; None if it has none.
        real_bf16: Whether it calculates in bfloat16 itself. PyTorch emulates that where it does not.
        total_bytes: Memory of a GPU; None if it is no GPU or not in this machine.
    """

    place: str = "cpu"
    name: str = "the CPU"
    capability: tuple[int, int] | None = None
    real_bf16: bool = False
    total_bytes: int | None = None

    @property
    def is_cpu(self) -> bool:
        """Whether it is the CPU."""
        return self.place == "cpu"


@dataclass(frozen=True)
class BitsandbytesFacts:
    """The bitsandbytes package, which stores frozen weights.

    Args:
        version: Its version; None if it is not installed.
        problem: Its error on the device; None if it works.
    """

    version: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Param:
    """One parameter of the model, on the meta device.

    Args:
        name: Its name.
        shape: Its shape.
        part: The part of the model that it belongs to: embed, entry (what else is before the first layer), layer, norm
            or head.
        is_head: Whether it is the head's weight; a tied head's is the embedding's.
        is_linear: Whether it is the weight of a linear map in a layer.
        padding_row: Row without a gradient from look-ups; None if there is none.
        requires_grad: Whether the model lets it have a gradient.
        inner: Its name inside its layer; outside of the layers, its name.
        is_expert: Whether it belongs to one expert of a mixture.
        is_router: Whether it chooses the experts of each token.
    """

    name: str
    shape: tuple[int, ...]
    part: str = "layer"
    is_head: bool = False
    is_linear: bool = False
    padding_row: int | None = None
    requires_grad: bool = True
    inner: str = ""
    is_expert: bool = False
    is_router: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether it has two dimensions."""
        return len(self.shape) == 2

    @property
    def num_elements(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)

    def goes_by(self, pattern: str) -> bool:
        """Return whether a pattern matches its name; a tied head has two names."""
        names = [self.name, *([TIED_HEAD] if self.is_head and self.part == "embed" else [])]
        return any(fnmatchcase(name, pattern) for name in names)


@dataclass(frozen=True)
class ModelFacts:
    """The model, from its `config.json`.

    Args:
        model_type: Its architecture's name; empty if not known yet.
        positions: Its maximum number of positions; None if unlimited.
        vocab_size: Rows of its embedding; None if not known yet.
        name: The model that is trained.
        instead_of: The model that was asked for, if it was not available; else empty.
    """

    model_type: str = ""
    positions: int | None = None
    vocab_size: int | None = None
    name: str = ""
    instead_of: str = ""


@dataclass(frozen=True)
class DataFacts:
    """The tokenised data.

    Args:
        largest_token: Largest token id that occurs in them.
        largest_known: Largest token id that the tokenizer knows.
        num_steps: Optimizer steps of the run; 0: not known yet.
        num_evaluations: Evaluations after a step; None: not known yet.
    """

    largest_token: int = -1
    largest_known: int = -1
    num_steps: int = 0
    num_evaluations: int | None = None


@dataclass(frozen=True)
class RouteFacts:
    """The routes of all parameters, summed up.

    Args:
        kept_share: What steps need of the gradients, as a share of all trained elements.
        num_projected: Parameters whose gradient is projected.
        num_fast: Of these, so many whose full gradient need not be formed.
        num_folded: Of these, so many whose updates are folded in late.
    """

    kept_share: float = 0.0
    num_projected: int = 0
    num_fast: int = 0
    num_folded: int = 0


@dataclass(frozen=True)
class MemoryFacts:
    """The forecast memory of a run, and the available memory.

    Args:
        needed_bytes: Most bytes of tensors at once.
        limit_bytes: What the process may take on the device; None: any amount.
        reserve_bytes: Part of the limit that is not for tensors.
        streamed: What lives elsewhere and where, as text; empty: nothing does.
        host_excess_bytes: Bytes beyond the limit of the host's memory.
        disk_written_bytes: Bytes that a step writes to disk.
        full_gradients: Which full gradients may be in memory together.
    """

    needed_bytes: int = 0
    limit_bytes: int | None = None
    reserve_bytes: int = 0
    streamed: str = ""
    host_excess_bytes: int = 0
    disk_written_bytes: int = 0
    full_gradients: FullGradients = "layer"


@dataclass(frozen=True)
class Facts:
    """All facts that verdicts depend on.

    Args:
        config: What was asked.
        device: Where the arithmetic runs.
        num_processes: Processes that share an effective batch.
        bitsandbytes: The package; None: it is not needed, and was not looked for.
        missing_trackers: Those of `training.report_to` whose package is not installed.
        model: The model.
        proof: The comparison of the engine with autograd; None: the tests cover the architecture, or not known yet.
        parameters: Its parameters, in its order.
        data: The data.
        routes: What became of the parameters; None: not known yet.
        memory: What the run needs, and what there is; None: not known yet.
    """

    config: RunConfig
    device: DeviceFacts = DeviceFacts()
    num_processes: int = 1
    bitsandbytes: BitsandbytesFacts | None = None
    missing_trackers: tuple[TrackerName, ...] = ()
    model: ModelFacts = ModelFacts()
    proof: Proof | None = None
    parameters: tuple[Param, ...] = ()
    data: DataFacts = DataFacts()
    routes: RouteFacts | None = None
    memory: MemoryFacts | None = None

    @property
    def excess_bytes(self) -> int:
        """Bytes by which the forecast exceeds the available memory; 0 if the run fits or no limit is known."""
        if self.memory is None or self.memory.limit_bytes is None:
            return 0
        return max(0, self.memory.needed_bytes + self.memory.reserve_bytes - self.memory.limit_bytes)

    @property
    def forms_apart_by_itself(self) -> bool:
        """Whether nothing but the memory decided that full gradients are formed one matrix after the other."""
        is_open = self.config.engine.full_gradients == "auto"
        return is_open and self.memory is not None and self.memory.full_gradients == "matrix"

    @property
    def excess(self) -> str:
        """The same as text."""
        return bytes_in_words(self.excess_bytes)

    @property
    def needed(self) -> str:
        """The forecast memory, as text."""
        return bytes_in_words(self.memory.needed_bytes) if self.memory else ""

    @property
    def streamed(self) -> str:
        """What lives elsewhere than on the device, as text; empty: nothing does, or it is not known."""
        return self.memory.streamed if self.memory else ""

    @property
    def host_excess(self) -> str:
        """What the host's memory lacks, as text; empty: nothing."""
        return bytes_in_words(self.memory.host_excess_bytes) if self.memory and self.memory.host_excess_bytes else ""

    @property
    def disk_writes(self) -> str:
        """What steps write to disk, as text; empty: nothing."""
        written = self.memory.disk_written_bytes if self.memory else 0
        if not written:
            return ""
        run = f", {written * self.data.num_steps / 1e12:.2g} TB in this run" if self.data.num_steps else ""
        return f"{written / 1e9:.2g} GB{run}"

    @property
    def missing_extras(self) -> str:
        """The extras that install the missing trackers, in pip's syntax."""
        return ",".join(self.missing_trackers)

    @property
    def freezes_layers(self) -> bool:
        """Whether the layers' matrices are stored in bitsandbytes' int8, which is frozen."""
        return self.config.quantization.int8 and self.config.quantization.backend == "bitsandbytes"

    @property
    def has_native_int8(self) -> bool:
        """Whether weight matrices are stored in our int8."""
        return self.config.quantization.int8 and self.config.quantization.backend == "native"

    @property
    def folds_late(self) -> bool:
        """Whether updates are rounded into int8 weights only when the basis is refreshed."""
        return self.has_native_int8 and self.config.quantization.fold == "refresh"

    @property
    def looks_at_eval_losses(self) -> bool:
        """Whether something depends on the evaluations of the run."""
        training = self.config.training
        return training.early_stopping_patience is not None or training.load_best_model

    @property
    def emulates_bf16(self) -> bool:
        """Whether the device would only emulate bfloat16."""
        return not self.device.is_cpu and not self.device.real_bf16

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped."""
        return self.config.training.max_grad_norm > 0

    @property
    def may_clip_by_model(self) -> bool:
        """Whether the gradients that must be kept until the model's norm is known are small."""
        kept = self.routes.kept_share if self.routes else 0.0
        return keeps_projected_gradients(self.config) and kept <= _LARGEST_KEPT_SHARE

    @property
    def unmatched_skip(self) -> str | None:
        """The first pattern of `quantization.skip` that matches no parameter; None: all do."""
        skips = self.config.quantization.skip if self.has_native_int8 and self.parameters else ()
        names = [param.name for param in self.parameters]
        return next((skip for skip in skips if not any(fnmatchcase(name, skip) for name in names)), None)

    @property
    def unmatched_trainable(self) -> str | None:
        """The first pattern of `training.trainable` that matches no parameter; None: all do."""
        wanted = (self.config.training.trainable or ()) if self.parameters else ()
        return next((one for one in wanted if not any(param.goes_by(one) for param in self.parameters)), None)

    @property
    def held_trainable(self) -> str | None:
        """The first pattern of `training.trainable` all of whose parameters bitsandbytes holds; None: there is none."""
        if not self.freezes_layers or self.unmatched_trainable is not None:
            return None
        wanted = (self.config.training.trainable or ()) if self.parameters else ()
        return next(
            (one for one in wanted if all(param.is_linear for param in self.parameters if param.goes_by(one))), None
        )

    @property
    def in_question(self) -> str:
        """Which weights are trained, as text; empty if all that can be."""
        return "" if self.config.training.trainable is None else "of training.trainable "

    @property
    def nearest_trainable(self) -> str:
        """A suggestion for the pattern that matches nothing, as text."""
        names = [param.name for param in self.parameters]
        modules = dict.fromkeys(name.rsplit(".", depth)[0] for depth in (1, 2, 3) for name in names)
        found = nearest((self.unmatched_trainable or "").rstrip("*").rstrip("."), [*names, *modules])
        return f"Did you mean {found}{'' if found in names else '.*'}? " if found else ""

    @property
    def capability(self) -> str:
        """The device's compute capability as text, to append to its name."""
        return " (compute capability {}.{})".format(*self.device.capability) if self.device.capability else ""
