"""A run whose layers are in files is killed at any moment, and resumed; it ends with the bits of one that was not."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from forked import run_forked
from placed import QUICK, SETTINGS, Left, PlacedRuns, assert_same
from resume.placed_crash import CLOCK, MOMENTS, crash_run
from sophia_galore.records.files import checkpoint_folder
from sophia_galore.train.checkpoint import checkpoints, find_checkpoint
from sophia_galore.train.folder import streaming_folder
from sophia_galore.weights.manifest import sha256_of

FAMILY = "llama, untied"
KINDS: dict[str, list[str]] = {
    "adamw": ["optimizer.type=adamw", "model.store=bf16"],
    "int8, folded late": ["quantization.enabled=true", "quantization.fold=refresh"],
}
NUM_KILLS, NUM_SOON = 100, 6
WORDS = [*QUICK, "memory.placement=disk", "checkpoint.save_every_steps=2", "checkpoint.keep_last=2"]


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run.

    Args:
        left: What it left.
        files: Hashes of the final model's files.
        counts: How often each moment was reached, and how long training took.
    """

    left: Left
    files: dict[str, str]
    counts: dict[str, float]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> PlacedRuns:
    return PlacedRuns(tmp_path_factory.mktemp("runs"))


def run(
    runs: PlacedRuns, output: Path, kind: str, *more: str, moment: str = "never", at: float = 0, counts: bool = False
) -> int:
    """One process; returns its exit code, negative if it died by a signal."""
    runs.config(output, FAMILY)  # writes model and data
    arguments = ["train", f"model.name={runs.folder / FAMILY}", f"data.train={runs.folder / 'data.json'}"]
    arguments += [*SETTINGS, *WORDS, *KINDS[kind], f"training.output_dir={output}", *more]
    log = output.with_name(f"{output.name}.log")
    return run_forked(
        lambda: crash_run(moment, at, arguments, output.with_name("counts.json") if counts else None), log
    )


@pytest.fixture(scope="module")
def whole(runs: PlacedRuns) -> Callable[[str], Whole]:
    @cache
    def made(kind: str) -> Whole:
        output = runs.folder / f"whole-{kind}" / "run"
        output.parent.mkdir()
        assert run(runs, output, kind, counts=True) == 0, output.with_name("run.log").read_text()
        counts = json.loads(output.with_name("counts.json").read_text())
        assert all(counts[moment] > 1 for moment in MOMENTS)
        return Whole(Left.in_folder(output), final_files(output), counts)

    return made


def final_files(output: Path) -> dict[str, str]:
    """Hashes of the files of the final model."""
    return {path.name: sha256_of(path) for path in output.glob("model*.safetensors*")}


@pytest.mark.parametrize(
    "number",
    [pytest.param(number, marks=[pytest.mark.by_hand] if number >= NUM_SOON else []) for number in range(NUM_KILLS)],
)
def test_killed_at_any_moment(number: int, runs: PlacedRuns, whole: Callable[[str], Whole], tmp_path: Path) -> None:
    draw = random.Random(number)
    kind = list(KINDS)[number % len(KINDS)]
    moment = (*MOMENTS, CLOCK, CLOCK, CLOCK)[number % 7]  # in turn, so that the default run has each
    expected = whole(kind)
    most = expected.counts[moment]
    at = draw.uniform(0, 0.9 * most) if moment == CLOCK else draw.randint(1, int(most))
    output, log = tmp_path / "run", tmp_path / "run.log"
    code = run(runs, output, kind, moment=moment, at=at)
    assert code == -signal.SIGKILL, log.read_text()
    assert streaming_folder(output).is_dir(), "a killed run can't remove it"
    saved = checkpoints(output)
    for folder in saved:
        find_checkpoint(output, folder)  # its files are what was written
    code = run(runs, output, kind, "--resume")
    if not saved:
        assert code == 2 and "holds no complete checkpoint" in log.read_text()
        code = run(runs, output, kind)
    assert code == 0, log.read_text()
    assert final_files(output) == expected.files
    assert_same(Left.in_folder(output), expected.left)
    assert checkpoints(output) == [checkpoint_folder(output, step) for step in (4, 6)]
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "run.log", ".run.lock", "run.previous-1"}
