"""What speaks against taking a table of runs at its word."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from sophia_galore.report.run import Run

Kind = Literal[
    "identical",
    "overlap",
    "repetition",
    "too low",
    "rerouted",
    "data",
    "budget",
    "ended early",
    "machine",
    "unfinished",
]

NOVEL_LOSS = 0.3
"""Nats a token below which no language model gets on text that it can't have seen. The best published ones stay above
some 0.5 even on source code, the most regular text there is; a bound well below that blames nobody in vain."""

REPEATED = 0.5
"""Evaluation data of which more than this share is told by repetition alone measure repetition."""

PARTLY_REPEATED = 0.25
"""With more than this share it is enough that counting beats the untrained model; with less, that says that the model
knew nothing, not that the texts repeat each other."""


@dataclass(frozen=True)
class Doubt:
    """One warning.

    Args:
        kind: What it is about.
        runs: Labels of the runs that it concerns.
        message: Cause and consequence, in a sentence or two.
    """

    kind: Kind
    runs: tuple[str, ...]
    message: str

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"kind": self.kind, "runs": list(self.runs), "message": self.message}


def label(run: Run) -> str:
    """A run among others of the same name: `galore, seed 42`."""
    return f"{run.name}, seed {run.seed}"


def doubts(runs: Sequence[Run]) -> list[Doubt]:
    """Everything that a reader of a table of these runs should know before believing it.

    Args:
        runs: The runs that are compared.

    Returns:
        Warnings; the same one for several runs is said once.
    """
    num_runs = len(runs)
    each = [doubt for run in runs for doubt in (*_rerouted(run), *_overlap(run), *_repetition(run), *_too_low(run))]
    ends = [*_ended_early(runs), *_unfinished(runs)]
    return [*_identical(runs), *_together(each, num_runs), *_differing(runs), *_together(ends, num_runs)]


def _identical(runs: Sequence[Run]) -> list[Doubt]:
    """Runs whose every recorded loss is the same: as floats, which the records hold exactly."""
    found = []
    for first, second in combinations(runs, 2):
        losses = [
            ([line.loss for line in run.metrics.train], [line.eval_loss for line in run.metrics.eval])
            for run in (first, second)
        ]
        if losses[0] != losses[1] or not first.metrics.train:
            continue
        keys = [key for key in differing_keys([first, second]) if key != "training.output_dir"]
        differ = f"although they differ in {', '.join(keys)}" if keys else "and so are their settings"
        found.append(
            Doubt(
                "identical",
                (label(first), label(second)),
                f"{label(first)} and {label(second)} are identical to the bit in all {len(losses[0][0])} steps, "
                f"{differ}. Unless that changes no number, both took the same path, and one of them says nothing.",
            )
        )
    return found


def _rerouted(run: Run) -> list[Doubt]:
    """What was asked for is not what trained it."""
    asked, trained = run.config.get("optimizer.type"), run.plan["optimizer"]
    routes = [route for route in run.plan["routes"] if route.get("trained", True)]
    if asked is None or (asked == trained and any(route["rule"] == asked for route in routes)):
        return []
    rules = sorted({route["rule"] for route in routes})
    fallbacks = [f"fall back to {rule}" for rule in rules]
    why = [verdict["reason"] for verdict in run.plan.get("verdicts", []) if verdict["verdict"] in fallbacks]
    reason = f" {why[0]}" if why and len(rules) == 1 else ""
    return [
        Doubt(
            "rerouted",
            (label(run),),
            f"asked for {asked}, but {' and '.join(rules) or 'nothing'} trained {run.plan['trained_fraction']:.0%} of "
            f"the parameters.{reason} It says nothing about {asked}.",
        )
    ]


def _overlap(run: Run) -> list[Doubt]:
    shared = run.plan.get("num_shared") or 0
    if not shared:
        return []
    return [
        Doubt(
            "overlap",
            (label(run),),
            f"{shared} training records are in the evaluation data too: the eval loss is better than it would be on "
            "text that was not trained on.",
        )
    ]


def _repetition(run: Run) -> list[Doubt]:
    """The evaluation examples repeat the training examples so much that a count of token sequences tells them."""
    share, counted = run.plan.get("repetition_share"), run.plan.get("repetition_loss")
    if share is None or counted is None:
        return []
    before = next((line.eval_loss for line in run.metrics.eval if line.step == 0), None)
    beaten = before is not None and counted < before
    if share <= (PARTLY_REPEATED if beaten else REPEATED):
        return []
    # Without the number, which differs a little between formats of the weights: it is one warning for all runs.
    beats = ", less than the untrained model" if beaten else ""
    return [
        Doubt(
            "repetition",
            (label(run),),
            f"the evaluation data repeat the training data: a mere count of token sequences tells {share:.0%} of the "
            f"counted tokens and reaches a loss of {counted:.3f}{beats}. A low eval loss shows that repetition was "
            "learned, and little else.",
        )
    ]


def _too_low(run: Run) -> list[Doubt]:
    """A loss that not even the repetition of the training text explains."""
    share = run.plan.get("repetition_share")
    losses = [line.eval_loss for line in run.metrics.eval]
    if share is None or not losses:
        return []
    floor = NOVEL_LOSS * (1 - share)
    lowest = min(losses)
    if lowest >= floor:
        return []
    return [
        Doubt(
            "too low",
            (label(run),),
            f"an eval loss of {lowest:.4f} is below what the text's own repetition explains: {1 - share:.0%} of the "
            f"counted tokens are not told by it, and with {NOVEL_LOSS} nats for each of these, less than any language "
            f"model reaches on text that it has not seen, it would be {floor:.4f}. Look for evaluation text in the "
            "training data, in other words.",
        )
    ]


def _together(doubts: Sequence[Doubt], num_runs: int) -> list[Doubt]:
    """The same warning about several runs as one, with the runs' labels before it."""
    by_words: dict[tuple[Kind, str], list[str]] = defaultdict(list)
    for doubt in doubts:
        by_words[doubt.kind, doubt.message].extend(doubt.runs)
    return [
        Doubt(kind, tuple(runs), f"{'All runs' if len(runs) == num_runs > 1 else '; '.join(runs)}: {message}")
        for (kind, message), runs in by_words.items()
    ]


def _differing(runs: Sequence[Run]) -> list[Doubt]:
    """What must be the same for losses and times to be comparable."""
    labels = tuple(label(run) for run in runs)
    found = []
    if len({run.plan["data_fingerprint"] for run in runs}) > 1:
        found.append(
            Doubt(
                "data",
                labels,
                "The runs were not trained and measured on the same examples (their data fingerprints differ), so "
                "their losses can't be compared. Give them the same data, max_length and data.seed.",
            )
        )
    if len({(run.plan["num_steps"], run.plan["steps_per_epoch"]) for run in runs}) > 1:
        found.append(
            Doubt(
                "budget",
                labels,
                "The runs do not have the same number of steps, or of steps an epoch: compare losses at equal tokens, "
                "not at the end.",
            )
        )
    machines = {str(run.environment.get("machine")) for run in runs if run.environment}
    versions = {str(run.environment.get("versions")) for run in runs if run.environment}
    if len(machines) > 1 or len(versions) > 1:
        what = " and ".join(
            word for word, found_ones in (("machines", machines), ("versions", versions)) if len(found_ones) > 1
        )
        found.append(Doubt("machine", labels, f"The runs were made with different {what}: do not compare their times."))
    return found


def _ended_early(runs: Sequence[Run]) -> list[Doubt]:
    """Of one run alone it is no reason for doubt."""
    return [
        Doubt(
            "ended early",
            (label(run),),
            f"ended early, after step {run.step} of {run.num_steps} (training.early_stopping_patience): compare losses "
            "at equal tokens, not at the end.",
        )
        for run in runs
        if run.ended_early and len(runs) > 1
    ]


def _unfinished(runs: Sequence[Run]) -> list[Doubt]:
    return [
        Doubt(
            "unfinished",
            (label(run),),
            f"failed after step {run.step} of {run.num_steps}: {run.failure}"
            if run.failure
            else f"at step {run.step} of {run.num_steps}; its numbers are those so far.",
        )
        for run in runs
        if not run.finished
    ]


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Keys of the configuration in which runs differ, in the order of the first run's file."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [key for key in keys if any(run.config.get(key) != runs[0].config.get(key) for run in runs)]
