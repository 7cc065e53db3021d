"""Each warning fires where it should and is silent elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from made_runs import ROUTE, write_run
from sophia_galore.records.report import RunWarning
from sophia_galore.report.run import read_run
from sophia_galore.report.warnings import find_warnings

OTHER = {"losses": (3.0, 2.8, 2.6, 2.5), "evals": {0: 3.1, 2: 2.5, 4: 2.3}}
ADAMW = {
    "config": {"optimizer": {"type": "adamw"}},
    "plan": {"optimizer": "adamw", "routes": [{**ROUTE, "rule": "adamw"}]},
}
FALLBACK = {
    "key": "frozen",
    "verdict": "fall back to adamw",
    "reason": "The matrices are held by bitsandbytes.",
    "remedy": "",
}

# What the second of two runs is, what is warned of, and words of the warning.
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "the same numbers": ({}, "identical", "identical to the bit in all 4 steps"),
    "the same numbers by other settings": (
        ADAMW,
        "identical",
        "although they differ in optimizer.type",
    ),
    "examples in both parts": (
        {**OTHER, "plan": {"num_shared": 3}},
        "overlap",
        "3 training records are in the evaluation data too",
    ),
    "evaluation data that repeat the training data": (
        {**OTHER, "plan": {"repetition_share": 0.97, "repetition_loss": 0.08}},
        "repetition",
        "predicts 97% of the counted tokens and reaches a loss of 0.080, less than the untrained model.",
    ),
    "a count of sequences beats the untrained model": (
        {**OTHER, "plan": {"repetition_share": 0.4, "repetition_loss": 3.0}},
        "repetition",
        "predicts 40%",
    ),
    "a loss that nothing explains": (
        {"losses": OTHER["losses"], "evals": {0: 3.1, 2: 0.5, 4: 0.0045}},
        "too low",
        "0.0045 is below what the text's own repetition explains: 90% of the counted tokens are not predicted by it",
    ),
    "a run that ended early": (
        {
            "losses": (3.0, 2.5, 2.4),
            "evals": {0: 3.1, 2: 2.9, 3: 2.95},
            "waited": {3: 1},
            "config": {"training": {"early_stopping_patience": 1}},
        },
        "ended early",
        "ended early, after step 3 of 4 (training.early_stopping_patience): compare losses at equal tokens",
    ),
    "GaLore that fell back": (
        {
            **OTHER,
            "plan": {
                "optimizer": "adamw",
                "routes": [{**ROUTE, "rule": "adamw"}, {**ROUTE, "rule": "frozen", "trained": False}],
                "trained_fraction": 0.21,
                "verdicts": [FALLBACK],
            },
        },
        "rerouted",
        "asked for galore, but adamw trained 21% of the parameters. The matrices are held by bitsandbytes. It says",
    ),
    "GaLore that projects nothing": (
        {**OTHER, "plan": {"routes": [{**ROUTE, "rule": "adamw"}]}},
        "rerouted",
        "asked for galore, but adamw trained 100%",
    ),
    "other data": ({**OTHER, "plan": {"data_fingerprint": "0" * 64}}, "data", "data fingerprints differ"),
    "other steps": ({**OTHER, "plan": {"num_steps": 3}}, "budget", "do not have the same number of steps"),
    "another machine": ({**OTHER, "environment": {"machine": {"num_cores": 64}}}, "machine", "different machines"),
    "another version": ({**OTHER, "environment": {"versions": {"torch": "1"}}}, "machine", "different versions"),
    "still running": (
        {**OTHER, "losses": (3.0,), "evals": {0: 3.1}, "finished": False},
        "unfinished",
        "at step 1 of 4",
    ),
}


def warnings_between(folder: Path, second: dict[str, Any]) -> list[RunWarning]:
    runs = [read_run(write_run(folder / "first")), read_run(write_run(folder / "second", **second))]
    return find_warnings(runs)


@pytest.mark.parametrize("case", CASES)
def test_it_fires(case: str, tmp_path: Path) -> None:
    second, kind, words = CASES[case]
    (warning,) = warnings_between(tmp_path, second)
    assert warning.kind == kind
    assert words in warning.message
    assert "second, seed 42" in warning.runs


def test_two_honest_runs_raise_none(tmp_path: Path) -> None:
    assert warnings_between(tmp_path, OTHER) == []


def test_low_losses_that_repetition_explains_are_not_too_low(tmp_path: Path) -> None:
    """Templated data: the loss is near zero because the text repeats itself, and that is what is said."""
    templated = {"evals": {0: 3.1, 4: 0.0045}, "plan": {"repetition_share": 0.99, "repetition_loss": 0.02}}
    (warning,) = warnings_between(tmp_path, {**OTHER, **templated})
    assert warning.kind == "repetition"


def test_a_model_that_knew_nothing_is_no_sign_of_repetition(tmp_path: Path) -> None:
    """Random weights are beaten by any count, on whatever text."""
    random = {"evals": {0: 12.1, 4: 11.9}, "plan": {"repetition_share": 0.02, "repetition_loss": 8.0}}
    assert warnings_between(tmp_path, {**OTHER, **random}) == []


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", losses=(3.0,), evals={}, finished=False)
    (warning,) = find_warnings([read_run(folder, failure="Out of memory in backward")])
    assert (warning.kind, warning.message) == (
        "unfinished",
        "a, seed 42: failed after step 1 of 4: Out of memory in backward",
    )


def test_what_holds_for_all_is_said_once(tmp_path: Path) -> None:
    shared = {"plan": {"num_shared": 2}}
    runs = [read_run(write_run(tmp_path / "a", **shared)), read_run(write_run(tmp_path / "b", **{**OTHER, **shared}))]
    (warning,) = find_warnings(runs)
    assert warning.message.startswith("All runs: 2 training records")
    assert warning.runs == ["a, seed 42", "b, seed 42"]


def test_plans_of_earlier_versions_are_not_accused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    plan = folder / "plan.json"
    text = plan.read_text()
    for key in ("num_shared", "repetition_loss", "repetition_share", "verdicts"):
        text = text.replace(f'"{key}"', f'"without {key}"')
    plan.write_text(text)
    (folder / "environment.json").unlink()
    assert find_warnings([read_run(folder)]) == []
