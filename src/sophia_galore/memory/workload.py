"""The micro-batches and steps to simulate, among them those that need most memory.

The micro-batches are the largest of the data or, if the data are unknown, the largest that the settings allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sophia_galore.config import RunConfig
from sophia_galore.config.schema_data import sources_in_words
from sophia_galore.data.batches import IGNORED, MicroBatch
from sophia_galore.data.dataset import Dataset
from sophia_galore.data.feed import Feed
from sophia_galore.data.portion import deal, in_blocks, to_evaluate
from sophia_galore.engine.passes import FullGradients, most_at_once
from sophia_galore.optim.spec import SubspaceSpec
from sophia_galore.plan.route import Route

MOST_BATCHES = 8
"""Most micro-batches that are simulated; the memory of more is extrapolated."""
MOST_BATCHES_OF_EXPERTS = 4
"""The same for models of many experts, each of which takes time."""
_MOST_STEPS = 4096
"""Most steps that are searched for the one with the highest peak."""


@dataclass(frozen=True)
class Workload:
    """The largest micro-batches of a run.

    Args:
        train: The micro-batches of the largest step.
        probe: Those of the probe step; empty if there is none, or if it is not larger.
        eval: Those that are evaluated together; empty without an evaluation.
        source: Where they come from, as text.
    """

    train: tuple[MicroBatch, ...]
    probe: tuple[MicroBatch, ...]
    eval: tuple[MicroBatch, ...]
    source: str


@dataclass(frozen=True)
class Sample:
    """A few micro-batches, from which the memory of all is extrapolated.

    Args:
        fewer: Some micro-batches; empty if `more` is all of them.
        more: More of them.
        factor: How many times the difference of `more` and `fewer` is added to `more`.
    """

    fewer: tuple[MicroBatch, ...]
    more: tuple[MicroBatch, ...]
    factor: float


def workload_of_data(
    config: RunConfig, dataset: Dataset, num_steps: int, pad_id: int, num_processes: int = 1
) -> Workload:
    """Return a run's largest step, its probe step, and its longest evaluation examples, in one process.

    Args:
        config: The configuration.
        dataset: The tokenised data.
        num_steps: Steps of the run.
        pad_id: The token id to pad with.
        num_processes: Processes that share the micro-batches.
    """
    training = config.training
    feed = Feed.of(config, dataset.train, pad_id)
    blocks = config.distributed.sum_blocks
    train = _largest_portion(feed.largest_step(num_steps), num_processes, blocks)
    probe = _largest_portion(feed.largest_window(), num_processes, blocks) if training.probe_step else []
    if _sizes(probe) == _sizes(train):
        probe = []  # it needs no more than the first step
    together = -(-training.gradient_accumulation_steps // num_processes)
    evaluated = Feed.of(config, dataset.eval, pad_id).longest_first()[:together]
    longest = max(batch.input_ids.shape[1] for batch in (*probe, *train))
    what = "fullest rows" if feed.arrangement == "packed" else "longest examples"
    words = (
        f"the {what} of {sources_in_words(config.data.train)}: {len(train)} x {train[0].input_ids.shape[0]} x {longest}"
    )
    return Workload(tuple(train), tuple(probe), tuple(to_evaluate(evaluated, blocks)), f"{words} tokens")


def largest_workload(config: RunConfig, vocab_size: int, num_processes: int = 1) -> Workload:
    """Return the largest workload that the settings allow, in one process.

    Args:
        config: The configuration.
        vocab_size: Size of the model's vocabulary.
        num_processes: Processes that share the micro-batches.
    """
    training = config.training
    size, length = training.batch_size, training.max_length
    together = -(-training.gradient_accumulation_steps // num_processes)
    batches = full_batches(size, together, length, vocab_size)
    evaluates = config.data.eval is not None or config.data.eval_fraction > 0
    source = f"examples of training.max_length: {together} x {size} x {length} tokens"
    in_step = in_blocks(batches, max(1, config.distributed.sum_blocks // num_processes))
    evaluated = tuple(to_evaluate(batches, config.distributed.sum_blocks)) if evaluates else ()
    return Workload(tuple(in_step), (), evaluated, source)


def full_batches(batch_size: int, num_batches: int, length: int, vocab_size: int) -> tuple[MicroBatch, ...]:
    """Return micro-batches without padding in which every token counts and as few as possible are equal.

    Args:
        batch_size: Examples in a micro-batch.
        num_batches: Micro-batches in a step.
        length: Tokens of each example.
        vocab_size: Number of different tokens.
    """
    tokens = torch.arange(num_batches * batch_size * length).remainder_(vocab_size)
    batches: list[MicroBatch] = []
    for input_ids in tokens.view(num_batches, batch_size, length):
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, :-1] = input_ids[:, 1:]
        batches.append(MicroBatch(input_ids, None, labels, batch_size * length, batch_size * (length - 1)))
    return tuple(batches)


def sample(batches: Sequence[MicroBatch], most: int = MOST_BATCHES) -> Sample:
    """Choose a few micro-batches to simulate.

    Args:
        batches: All of them.
        most: So many at most.
    """
    # The memory of blocks depends on the largest one, so all of them are simulated.
    if len(batches) <= most or batches[0].block != batches[-1].block:
        return Sample((), tuple(batches), 0.0)
    # The memory of a phase grows with all tokens or with all counted tokens; part of it depends only on the largest
    # micro-batch.
    largest, *rest = sorted(batches, key=lambda batch: (-batch.input_ids.numel(), -_scores(batch)))
    num_tokens = sum(batch.input_ids.numel() for batch in rest)
    usual = min(rest, key=lambda batch: abs(batch.input_ids.numel() - num_tokens / len(rest)))
    half = most // 2
    wanted = 1 + num_tokens / usual.input_ids.numel()
    usual = _counting(usual, sum(batch.num_counted for batch in rest) / (wanted - 1))
    return Sample((largest, *[usual] * (half - 1)), (largest, *[usual] * (most - 1)), (wanted - most) / (most - half))


def steps_to_simulate(
    around: Sequence[Route], last: Sequence[Route], num_steps: int, full_gradients: FullGradients = "layer"
) -> list[int]:
    """Return the numbers of a few steps, one of which has the highest peak.

    The first step makes every basis and needs full gradients for that. Later, if only projected gradients are formed,
    the one of a tied head is kept until the embedding's backward. The peak is then in a step that refreshes no basis of
    the head and some of the last layer, whose backward comes next. If full gradients are formed apart, more bases mean
    more passes, but no more full gradients at once: such steps with the fewest and with the most of them are taken.

    Args:
        around: Routes of the parameters outside the layers.
        last: Routes of the last layer that is trained, or of the last layer.
        num_steps: Steps of the run.
        full_gradients: Which full gradients may be in memory together.
    """
    subspaces = [subspace for route in (*around, *last) if (subspace := _subspace(route))]
    # Refreshes repeat after this many steps; with growing gaps, the first ones are covered.
    horizon = min(num_steps, _MOST_STEPS, max((2 * subspace.gap for subspace in subspaces), default=1))
    head = [subspace for route in around if (subspace := _subspace(route))]
    steps = {1}
    if any(subspace.fast for subspace in subspaces):
        waiting = [
            step
            for step in range(2, horizon + 1)
            if not any(subspace.fast and subspace.refreshes_at(step) for subspace in head)
        ]
        for sign in (1, -1) if full_gradients == "matrix" else (1,):
            if waiting:
                steps.add(max(waiting, key=lambda step: _formed_at(last, step, full_gradients, sign)))
    # A random basis needs no gradient, but from the second one on moments are moved into it.
    drawn = [subspace for subspace in head if subspace.kind == "random"]
    again = [step for step in range(2, horizon + 1) if any(subspace.refreshes_at(step) for subspace in drawn)]
    return sorted({*steps, *again[:1]})


def batch_bytes(batches: Sequence[MicroBatch]) -> int:
    """Return the bytes of the tensors of micro-batches."""
    tensors = [tensor for batch in batches for tensor in (batch.input_ids, batch.labels, batch.attention_mask)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _largest_portion(batches: Sequence[MicroBatch], num_processes: int, sum_blocks: int) -> Sequence[MicroBatch]:
    """Return the portion with the most tokens, including padding."""
    portions = [deal(batches, rank, num_processes, sum_blocks=sum_blocks).batches for rank in range(num_processes)]
    return max(portions, key=lambda portion: sum(batch.input_ids.numel() for batch in portion))


def _sizes(batches: Sequence[MicroBatch]) -> list[tuple[int, ...]]:
    return sorted((*batch.input_ids.shape, batch.num_counted, _scores(batch)) for batch in batches)


def _scores(batch: MicroBatch) -> int:
    """Return the number of attention scores of one head."""
    rows, width = batch.input_ids.shape
    return rows * width**2 if batch.lengths is None else sum(length**2 for row in batch.lengths for length in row)


def _counting(batch: MicroBatch, num_counted: float) -> MicroBatch:
    """Return the same tokens with another number of counted ones."""
    ids = batch.input_ids
    may_count = torch.ones_like(ids, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask != 0
    places = may_count.flatten().nonzero().flatten()[: round(num_counted)]
    labels = torch.full_like(ids, IGNORED)
    labels.view(-1)[places] = ids.view(-1)[places]
    return replace(batch, labels=labels, num_counted=len(places))


def _subspace(route: Route) -> SubspaceSpec | None:
    return route.spec.subspace if route.spec else None


def _formed_at(routes: Sequence[Route], step: int, full_gradients: FullGradients, sign: int) -> tuple[int, int]:
    """Return the most elements of a layer's full gradients at once in a step; and the number of them, with a sign."""
    sizes: dict[str, int] = {}
    reduced: list[str] = []
    for route in routes:
        subspace = _subspace(route)
        if route.trained and (subspace is None or not subspace.fast or subspace.refreshes_at(step)):
            sizes[route.name] = route.num_elements
            if subspace is not None and subspace.residual == "none":
                reduced.append(route.name)
    largest = max((route.num_elements for route in routes if route.trained), default=0)
    return most_at_once(sizes, reduced, largest, full_gradients), sign * len(sizes)
