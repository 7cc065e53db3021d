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
from sophia_galore.model.architecture import SUPPORTED

MIN_BITSANDBYTES = (0, 50)
"""The first version whose eight-bit products run on every device."""

TIED_HEAD = "lm_head.weight"
"""The other name of an embedding that is the head as well."""

# Clipping by the model keeps what steps need of the gradients; beyond this share it would be the gradients themselves.
_LARGEST_KEPT_SHARE = 0.5


@dataclass(frozen=True)
class DeviceFacts:
    """Where the arithmetic runs.

    Args:
        place: "cpu" or "cuda:N".
        name: What it is called.
        capability: (major, minor) of CUDA's compute capability; None: no such thing.
        real_bf16: Whether it calculates in bfloat16 itself. PyTorch emulates that where it does not.
        total_bytes: Memory of a GPU; None: it is none, or not here.
    """

    place: str = "cpu"
    name: str = "the CPU"
    capability: tuple[int, int] | None = None
    real_bf16: bool = False
    total_bytes: int | None = None

    @property
    def is_cpu(self) -> bool:
        """Whether it is the processor."""
        return self.place == "cpu"


@dataclass(frozen=True)
class BitsandbytesFacts:
    """The package that holds frozen weights.

    Args:
        version: Its version; None: it is not installed.
        problem: Why it does not work on the device, in its own words; None: it does.
    """

    version: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Param:
    """One parameter of the model, on the meta device.

    Args:
        name: Its name.
        shape: Its shape.
        part: The part of the model that it belongs to; "other": one that the engine does not run.
        is_head: Whether it is the head's weight; a tied head's is the embedding's.
        is_linear: Whether it is the weight of a linear map in a layer.
        padding_row: Row that look-ups give no gradient; None: there is none.
        requires_grad: Whether the model lets it have a gradient.
    """

    name: str
    shape: tuple[int, ...]
    part: str = "layer"
    is_head: bool = False
    is_linear: bool = False
    padding_row: int | None = None
    requires_grad: bool = True

    @property
    def is_matrix(self) -> bool:
        """Whether it has two sides."""
        return len(self.shape) == 2

    @property
    def num_elements(self) -> int:
        """The product of its sides."""
        return math.prod(self.shape)

    def goes_by(self, pattern: str) -> bool:
        """Whether a pattern is one for its name; a head that is the embedding has both names."""
        names = [self.name, *([TIED_HEAD] if self.is_head and self.part == "embed" else [])]
        return any(fnmatchcase(name, pattern) for name in names)


@dataclass(frozen=True)
class ModelFacts:
    """The model, from its `config.json`.

    Args:
        model_type: Its architecture's name; empty: not known yet.
        positions: Tokens that it knows positions for; None: any number.
        vocab_size: Rows of its embedding; None: not known yet.
        experts: The key that says how many experts a layer has, and the number; None: layers have none.
        name: What is trained.
        instead_of: What was asked for, if that could not be had; empty: what is trained is what was asked for.
    """

    model_type: str = ""
    positions: int | None = None
    vocab_size: int | None = None
    experts: tuple[str, int] | None = None
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
    """What became of the parameters together.

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
    """What a run is expected to need, and what there is.

    Args:
        needed_bytes: Most bytes of tensors at once.
        limit_bytes: What the process may take on the device; None: any amount.
        reserve_bytes: Part of the limit that is not for tensors.
    """

    needed_bytes: int = 0
    limit_bytes: int | None = None
    reserve_bytes: int = 0


@dataclass(frozen=True)
class Facts:
    """Everything that verdicts depend on.

    Args:
        config: What was asked.
        device: Where the arithmetic runs.
        bitsandbytes: The package; None: it is not needed, and was not looked for.
        missing_trackers: Those of `training.report_to` whose package is not installed.
        model: The model.
        parameters: Its parameters, in its order.
        data: The data.
        routes: What became of the parameters; None: not known yet.
        memory: What the run needs, and what there is; None: not known yet.
    """

    config: RunConfig
    device: DeviceFacts = DeviceFacts()
    bitsandbytes: BitsandbytesFacts | None = None
    missing_trackers: tuple[TrackerName, ...] = ()
    model: ModelFacts = ModelFacts()
    parameters: tuple[Param, ...] = ()
    data: DataFacts = DataFacts()
    routes: RouteFacts | None = None
    memory: MemoryFacts | None = None

    @property
    def excess_bytes(self) -> int:
        """Bytes that the run is expected to need beyond what there is for tensors; 0: it fits, or no limit is known."""
        if self.memory is None or self.memory.limit_bytes is None:
            return 0
        return max(0, self.memory.needed_bytes + self.memory.reserve_bytes - self.memory.limit_bytes)

    @property
    def excess(self) -> str:
        """The same in words."""
        return bytes_in_words(self.excess_bytes)

    @property
    def needed(self) -> str:
        """What the run is expected to need, in words."""
        return bytes_in_words(self.memory.needed_bytes) if self.memory else ""

    @property
    def missing_extras(self) -> str:
        """The extras that bring the trackers that are missing, as pip takes them."""
        return ",".join(self.missing_trackers)

    @property
    def freezes_layers(self) -> bool:
        """Whether the matrices of the layers are held in bitsandbytes' eight bits, which can't be written to."""
        return self.config.quantization.int8 and self.config.quantization.backend == "bitsandbytes"

    @property
    def has_native_int8(self) -> bool:
        """Whether weight matrices are held in native eight bits."""
        return self.config.quantization.int8 and self.config.quantization.backend == "native"

    @property
    def folds_late(self) -> bool:
        """Whether updates are to go into weights in eight bits when the basis is refreshed."""
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
        """Whether what has to be kept until the norm over the model is known is small."""
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
        """Which weights are trained, in words that follow what they are; empty: all that can be."""
        return "" if self.config.training.trainable is None else "of training.trainable "

    @property
    def nearest_trainable(self) -> str:
        """What the pattern that matches none was probably meant to be, in words."""
        names = [param.name for param in self.parameters]
        modules = dict.fromkeys(name.rsplit(".", depth)[0] for depth in (1, 2, 3) for name in names)
        found = nearest((self.unmatched_trainable or "").rstrip("*").rstrip("."), [*names, *modules])
        return f"Did you mean {found}{'' if found in names else '.*'}? " if found else ""

    @property
    def is_buildable(self) -> bool:
        """Whether the model is of an architecture whose parts can be found."""
        return self.model.model_type in SUPPORTED and self.model.experts is None

    @property
    def without_gradient(self) -> str:
        """The first parameter that the model does not let have a gradient; empty: there is none."""
        return next((param.name for param in self.parameters if not param.requires_grad), "")

    @property
    def outside(self) -> str:
        """The first parameter that is in no part that the engine runs; empty: there is none."""
        return next((param.name for param in self.parameters if param.part == "other"), "")

    @property
    def supported(self) -> str:
        """The models that can be trained, in words."""
        return ", ".join(SUPPORTED.values())

    @property
    def capability(self) -> str:
        """The device's compute capability, in words that follow its name."""
        return " (compute capability {}.{})".format(*self.device.capability) if self.device.capability else ""
