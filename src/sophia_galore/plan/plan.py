"""`RunPlan`: all decisions about a run.

`check` prints it, `train` executes it, a checkpoint stores it, and resuming compares it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from sophia_galore.config import RunConfig
from sophia_galore.data.chat_format import ChatFormat
from sophia_galore.data.dataset import Dataset
from sophia_galore.data.feed import Arrangement, Feed
from sophia_galore.engine.observe import Category
from sophia_galore.engine.passes import FullGradients
from sophia_galore.engine.proof import Proof
from sophia_galore.engine.stepper import ClipBy
from sophia_galore.model.source import ResolvedModel
from sophia_galore.numerics.noise import NOISE
from sophia_galore.plan.decisions import decide_step, standing_bytes
from sophia_galore.plan.facts import Facts
from sophia_galore.plan.route import Route
from sophia_galore.plan.routes import dense_learning_rate, peak_learning_rate
from sophia_galore.plan.rules import optimizer
from sophia_galore.plan.verdicts import Decided
from sophia_galore.streaming.units import Placement

_OWN_FORMAT = ChatFormat()
_ALL_HERE: Mapping[str, Placement] = {}


@dataclass(frozen=True)
class RunPlan:
    """All decisions about a run.

    Args:
        model_name: The model that is trained.
        model_folder: Where its files are.
        model_source: Where they came from.
        device: Where the arithmetic runs.
        compute_dtype: Precision of the arithmetic.
        optimizer: The optimizer's name.
        learning_rate: Peak rate of projected parameters (of all, without projection).
        dense_learning_rate: Peak rate of the others.
        clip_by: What gradients are clipped by: the norm over the model, over each layer, or nothing.
        curvature_every: Steps between two curvature estimates; 0 if no rule needs them.
        keep_layers: Number of last layers that run without activation checkpointing.
        placements: For each layer, and for the embedding's and the head's weight, where it lives; those that are left
            out stay on the device.
        full_gradients: Which full gradients may be in memory together.
        chat_format: How conversations are written.
        num_train_examples: Training examples.
        num_eval_examples: Evaluation examples.
        arrangement: How examples form micro-batches: shuffled; grouped by similar length; or packed, several in a
            row.
        num_rows: Rows of the training data; as many as examples, unless they are packed.
        fill: Share of tokens in the first epoch's micro-batches, from 0 to 1; the rest is padding.
        fill_shuffled: The same for examples that are only shuffled.
        data_fingerprint: SHA-256 over all token ids and masks.
        num_shared: Training records whose text is also in the evaluation data.
        num_bad: Unusable records that were left out.
        repetition_loss: Eval loss of counting the training data's token sequences, in nats a token; None without an
            evaluation.
        repetition_share: Share of the counted tokens that it predicts, from 0 to 1; None without an evaluation.
        steps_per_epoch: Optimizer steps in a pass over the data.
        num_steps: Optimizer steps of the run.
        routes: One for each parameter.
        notes: Sentences for the user, one for each verdict.
        verdicts: The rules of `rules.py` that apply.
        proof: The comparison of the engine with autograd; None: the tests cover the architecture.
    """

    model_name: str
    model_folder: str
    model_source: str
    device: str
    compute_dtype: str
    optimizer: str
    learning_rate: float
    dense_learning_rate: float
    clip_by: ClipBy
    curvature_every: int
    keep_layers: int
    placements: Mapping[str, Placement]
    full_gradients: FullGradients
    chat_format: ChatFormat
    num_train_examples: int
    num_eval_examples: int
    arrangement: Arrangement
    num_rows: int
    fill: float
    fill_shuffled: float
    data_fingerprint: str
    num_shared: int
    num_bad: int
    repetition_loss: float | None
    repetition_share: float | None
    steps_per_epoch: int
    num_steps: int
    routes: tuple[Route, ...]
    notes: tuple[str, ...]
    verdicts: tuple[Decided, ...] = ()
    proof: Proof | None = None

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters; a tied head counts once."""
        return sum(route.num_elements for route in self.routes)

    @property
    def num_trained_parameters(self) -> int:
        """Elements of those that are trained."""
        return sum(route.num_elements for route in self.routes if route.trained)

    @property
    def trained_fraction(self) -> float:
        """Share of the elements that are trained, from 0 to 1."""
        return self.num_trained_parameters / self.num_parameters

    @property
    def rounds(self) -> bool:
        """Whether weights or states are rounded stochastically."""
        specs = [(route.format, route.spec.state_bits) for route in self.routes if route.spec]
        return any(form != "fp32" or bits < 32 for form, bits in specs)

    @property
    def standing_bytes(self) -> dict[Category, int]:
        """Bytes of weights and optimizer states, by category, wherever they live."""
        return standing_bytes(self.routes)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data, for `plan.json`."""
        apart = ("chat_format", "routes", "notes", "verdicts", "proof")
        plain = {key: value for key, value in vars(self).items() if key not in apart}
        return {
            **plain,
            "chat_format": self.chat_format.to_json(),
            "num_parameters": self.num_parameters,
            "num_trained_parameters": self.num_trained_parameters,
            "trained_fraction": self.trained_fraction,
            "bytes": self.standing_bytes,
            "noise": NOISE,
            "proof": asdict(self.proof) if self.proof else None,
            "notes": list(self.notes),
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "routes": [route.to_json() for route in self.routes],
        }


def make_plan(
    facts: Facts,
    *,
    model: ResolvedModel,
    dataset: Dataset,
    chat_format: ChatFormat = _OWN_FORMAT,
    keep_layers: int = 0,
    placements: Mapping[str, Placement] = _ALL_HERE,
    full_gradients: FullGradients = "layer",
) -> RunPlan:
    """Make the plan of a run.

    Args:
        facts: Configuration, machine, model and parameters.
        model: The model's name, folder and source.
        dataset: The tokenised data.
        chat_format: How conversations are written.
        keep_layers: Number of last layers that run without activation checkpointing.
        placements: Which parts of the model live elsewhere than on the device, and where.
        full_gradients: Which full gradients may be in memory together.

    Raises:
        UserError: The run is refused; the error names all reasons.
    """
    config = facts.config
    repeated = dataset.repetition
    feed = Feed.of(config, dataset.train)
    steps_per_epoch, num_steps = count_steps(config, dataset)
    measured = range(1, num_steps + 1) if dataset.eval else ()
    data = replace(
        facts.data,
        largest_token=dataset.largest_token,
        num_steps=num_steps,
        num_evaluations=sum(evaluates_after(step, config, steps_per_epoch, num_steps) for step in measured),
    )
    decided = decide_step(replace(facts, data=data))
    facts = decided.facts
    return RunPlan(
        model_name=model.name,
        model_folder=str(model.folder),
        model_source=model.source,
        device=facts.device.place,
        compute_dtype=str(decided.compute_dtype).removeprefix("torch."),
        optimizer=optimizer(facts),
        learning_rate=peak_learning_rate(config),
        dense_learning_rate=dense_learning_rate(config),
        clip_by=decided.clip_by,
        curvature_every=decided.curvature_every,
        keep_layers=keep_layers,
        placements=dict(placements),
        full_gradients=full_gradients,
        chat_format=chat_format,
        num_train_examples=len(dataset.train),
        num_eval_examples=len(dataset.eval),
        arrangement=feed.arrangement,
        num_rows=len(feed.rows),
        fill=round(feed.fill, 6),
        fill_shuffled=round(feed.shuffled().fill, 6),
        data_fingerprint=dataset.fingerprint,
        num_shared=dataset.summary.num_shared,
        num_bad=dataset.summary.num_bad,
        repetition_loss=repeated.loss if repeated else None,
        repetition_share=repeated.share if repeated else None,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        routes=decided.routes,
        notes=tuple(verdict.sentence() for verdict in decided.verdicts),
        verdicts=decided.verdicts,
        proof=facts.proof,
    )


def count_steps(config: RunConfig, dataset: Dataset) -> tuple[int, int]:
    """Return the optimizer steps of an epoch and of the run.

    Args:
        config: The configuration.
        dataset: The tokenised data.
    """
    training = config.training
    steps_per_epoch = Feed.of(config, dataset.train).steps_per_epoch
    return steps_per_epoch, training.max_steps or math.ceil(round(training.epochs * steps_per_epoch, 6))


def evaluates_after(step: int, config: RunConfig, steps_per_epoch: int, num_steps: int) -> bool:
    """Return whether a run with evaluation examples is evaluated after a step.

    Args:
        step: The step, counted from 1.
        config: The configuration.
        steps_per_epoch: Optimizer steps of an epoch.
        num_steps: Optimizer steps of the run.
    """
    every = config.training.eval_every_steps or steps_per_epoch
    return step % every == 0 or step == num_steps
