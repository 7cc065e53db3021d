"""Warnings: reasons to doubt the numbers of runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

from sophia_galore.records.report import RunWarning, WarningKind
from sophia_galore.report.run import Run

Kinds = Mapping[WarningKind, Callable[[Run], str]]
"""Kinds of warnings about a single run, each with the function that returns its message; "": it does not apply."""

NOVEL_LOSS = 0.3
"""Lowest loss, in nats a token, that a language model can reach on unseen text. The best published models stay above
about 0.5 even on source code, the most regular kind of text. A lower bound avoids false warnings."""

REPEATED = 0.5
"""If repetition alone predicts more than this share of the evaluation data, they mostly measure repetition."""

PARTLY_REPEATED = 0.25
"""The same threshold if counting beats the untrained model. With a smaller share, that only shows that the model was
untrained, not that the texts repeat each other."""


def find_warnings(runs: Sequence[Run]) -> list[RunWarning]:
    """Return the warnings about runs.

    Args:
        runs: The runs that are compared.

    Returns:
        The warnings; the same one about several runs appears once.
    """
    # For a single run, ending early is no reason for a warning.
    endings = [_ENDED_EARLY, _UNFINISHED] if len(runs) > 1 else [_UNFINISHED]
    return [
        *_identical(runs),
        *_each(runs, _NUMBERS),
        *_differing(runs),
        *(warning for ending in endings for warning in _each(runs, ending)),
    ]


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Return the configuration keys in which runs differ, in the order of the first run's file."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [key for key in keys if any(run.config.get(key) != runs[0].config.get(key) for run in runs)]


def _identical(runs: Sequence[Run]) -> list[RunWarning]:
    """Return a warning for each two runs whose losses are all equal, bit by bit."""
    found = []
    for first, second in combinations(runs, 2):
        losses = [
            ([line.loss for line in run.metrics.train], [line.loss for line in run.metrics.eval])
            for run in (first, second)
        ]
        if losses[0] != losses[1] or not first.metrics.train:
            continue
        keys = [key for key in differing_keys([first, second]) if key != "training.output_dir"]
        differ = f"although they differ in {', '.join(keys)}" if keys else "and so are their settings"
        message = (
            f"{first.label} and {second.label} are identical to the bit in all {len(losses[0][0])} steps, {differ}. "
            "Unless that changes no number, both took the same path, and one of them says nothing."
        )
        found.append(RunWarning(kind="identical", runs=[first.label, second.label], message=message))
    return found


def _differing(runs: Sequence[Run]) -> list[RunWarning]:
    """Return warnings about differences that make losses or times incomparable."""
    found: dict[WarningKind, str] = {}
    if len({run.plan.data_fingerprint for run in runs}) > 1:
        found["data"] = (
            "The runs were not trained and measured on the same examples (their data fingerprints differ), so their "
            "losses can't be compared. Give them the same data, max_length and data.seed."
        )
    if len({(run.plan.num_steps, run.plan.steps_per_epoch) for run in runs}) > 1:
        found["budget"] = (
            "The runs do not have the same number of steps, or of steps an epoch: compare losses at equal tokens, not "
            "at the end."
        )
    known = [run.environment for run in runs if run.environment.model_fields_set]
    machines = {str(environment.machine) for environment in known}
    versions = {str(environment.versions) for environment in known}
    if what := [word for word, each in (("machines", machines), ("versions", versions)) if len(each) > 1]:
        found["machine"] = f"The runs were made with different {' and '.join(what)}: do not compare their times."
    labels = [run.label for run in runs]
    return [RunWarning(kind=kind, runs=labels, message=message) for kind, message in found.items()]


def _each(runs: Sequence[Run], find: Kinds) -> list[RunWarning]:
    """Return warnings about single runs; equal ones are merged, with the runs' labels before them."""
    by_words: dict[tuple[WarningKind, str], list[str]] = defaultdict(list)
    for run in runs:
        for kind, message_of in find.items():
            if message := message_of(run):
                by_words[kind, message].append(run.label)
    found = []
    for (kind, message), labels in by_words.items():
        who = "All runs" if len(labels) == len(runs) > 1 else "; ".join(labels)
        found.append(RunWarning(kind=kind, runs=labels, message=f"{who}: {message}"))
    return found


def _rerouted(run: Run) -> str:
    """Check whether another optimizer than the requested one trained the run."""
    asked, trained = run.config.get("optimizer.type"), run.plan.optimizer
    routes = [route for route in run.plan.routes if route.trained]
    if asked is None or (asked == trained and any(route.rule == asked for route in routes)):
        return ""
    rules = sorted({route.rule for route in routes})
    fallbacks = [f"fall back to {rule}" for rule in rules]
    why = [verdict.reason for verdict in run.plan.verdicts if verdict.verdict in fallbacks]
    reason = f" {why[0]}" if why and len(rules) == 1 else ""
    return (
        f"asked for {asked}, but {' and '.join(rules) or 'nothing'} trained {run.plan.trained_fraction:.0%} of the "
        f"parameters.{reason} It says nothing about {asked}."
    )


def _overlap(run: Run) -> str:
    if not run.plan.num_shared:
        return ""
    return (
        f"{run.plan.num_shared} training records are in the evaluation data too: the eval loss is better than it would "
        "be on text that was not trained on."
    )


def _repetition(run: Run) -> str:
    """Check whether counts of token sequences in the training data predict much of the evaluation data."""
    share, counted = run.plan.repetition_share, run.plan.repetition_loss
    if share is None or counted is None:
        return ""
    beaten = run.loss_before is not None and counted < run.loss_before
    if share <= (PARTLY_REPEATED if beaten else REPEATED):
        return ""
    # The untrained model's loss differs a little between weight formats; without it, all runs share one warning.
    beats = ", less than the untrained model" if beaten else ""
    return (
        f"the evaluation data repeat the training data: counting token sequences alone predicts {share:.0%} of the "
        f"counted tokens and reaches a loss of {counted:.3f}{beats}. A low eval loss shows that repetition was "
        "learned, and little else."
    )


def _too_low(run: Run) -> str:
    """Check for a loss that is too low even for evaluation data that repeat the training data."""
    share = run.plan.repetition_share
    losses = [line.loss for line in run.metrics.eval]
    if share is None or not losses:
        return ""
    floor, lowest = NOVEL_LOSS * (1 - share), min(losses)
    if lowest >= floor:
        return ""
    return (
        f"an eval loss of {lowest:.4f} is below what the text's own repetition explains: {1 - share:.0%} of the "
        f"counted tokens are not predicted by it, and with {NOVEL_LOSS} nats for each of these, less than any language "
        f"model reaches on text that it has not seen, it would be {floor:.4f}. Look for reworded evaluation "
        "text in the training data."
    )


def _ended_early(run: Run) -> str:
    if not run.ended_early:
        return ""
    return (
        f"ended early, after step {run.step} of {run.plan.num_steps} (training.early_stopping_patience): compare "
        "losses at equal tokens, not at the end."
    )


def _unfinished(run: Run) -> str:
    if run.finished:
        return ""
    if run.failure:
        return f"failed after step {run.step} of {run.plan.num_steps}: {run.failure}"
    return f"at step {run.step} of {run.plan.num_steps}; its numbers are those so far."


_NUMBERS: Kinds = {"rerouted": _rerouted, "overlap": _overlap, "repetition": _repetition, "too low": _too_low}
_ENDED_EARLY: Kinds = {"ended early": _ended_early}
_UNFINISHED: Kinds = {"unfinished": _unfinished}
