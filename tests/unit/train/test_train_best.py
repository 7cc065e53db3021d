"""Runs that end early, and runs whose final model is the best one; interrupted anywhere, they come to the same end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bitsandbytes_here import NEEDS_BITSANDBYTES
from sophia_galore.config import load_config
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.report.run import read_run
from sophia_galore.train.callback import Callback
from sophia_galore.train.checkpoint import checkpoints
from sophia_galore.train.result import RunResult
from sophia_galore.train.run import train
from sophia_galore.train.trained import find_weights
from unit.cli.tiny_run import World, json_lines, make_world, sha256

# A rate that does not look at the end of the run, so that a shorter run is the beginning of a longer one.
COMMON = [
    "training.lr_scheduler_type=constant",
    "training.eval_every_steps=1",
    "training.max_steps=6",
    "training.probe_step=false",
    "memory.track_steps=0",
    "memory.predict=false",
]
BEST = ["load_best_model_at_end=true"]


class Crash(Exception):
    """What ends a run in its midst."""


@dataclass
class Heard(Callback):
    """Keeps what is said; raises where a run is to be cut short."""

    crash_after: int = 0
    said: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.said.append(text)

    def stepped(self, record: dict[str, Any], *, num_steps: int, seconds_left: float) -> None:
        if record["step"] == self.crash_after:
            raise Crash

    def __str__(self) -> str:
        return "\n".join(self.said)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What evaluations are made to find, by the step that they follow."""
    script: list[float] = []
    done = [0]
    step = LayerwiseEngine.forward

    def stepped(self: LayerwiseEngine, *given: Any, **more: Any) -> Any:
        done[0] = more["step"]
        return step(self, *given, **more)

    monkeypatch.setattr(LayerwiseEngine, "forward", stepped)
    monkeypatch.setattr(LayerwiseEngine, "evaluate", lambda self, batches: (script[done[0]], 1))
    script_of = _Script(script, done)
    yield script_of


class _Script(list[float]):
    """Setting it begins anew."""

    def __init__(self, script: list[float], done: list[int]) -> None:
        super().__init__()
        self.script, self.done = script, done

    def set(self, losses: Sequence[float]) -> None:
        self.script[:], self.done[0] = losses, 0


def carry_out(
    folder: Path, world: World, *words: str, resume: bool = False, resume_from: Path | None = None, crash_after: int = 0
) -> tuple[RunResult | None, Heard]:
    config = load_config(world.config, [*COMMON, f"training.output_dir={folder}", *words])
    heard = Heard(crash_after)
    try:
        return train(config, heard, resume=resume, resume_from=resume_from), heard
    except Crash:
        return None, heard


def chosen(result: RunResult) -> tuple[int, float]:
    assert result.exported is not None
    return result.exported.exported_step, result.exported.loss


def losses_of(result: RunResult) -> list[tuple[int, float]]:
    return [(each.step, each.loss) for each in result.evaluations]


def state_of(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text())
    return state


def steps_of(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in checkpoints(folder)]


# Losses by step, settings -> the last step that is done.
ENDINGS: dict[str, tuple[list[float], list[str], int]] = {
    "falls to the end": ([6, 5, 4, 3, 2, 1, 0.5], ["early_stopping_patience=1"], 6),
    "rises once": ([6, 5, 4, 4.5, 3, 2, 1], ["early_stopping_patience=1"], 3),
    "never below the untrained model": ([1, 5, 4, 3, 2, 1.5, 1.2], ["early_stopping_patience=2"], 2),
    "falls by too little": (
        [6, 5, 4.9, 4.8, 4.7, 4.6, 4.5],
        ["early_stopping_patience=3", "early_stopping_threshold=0.2"],
        4,
    ),
    "patience ends with the run": ([6, 5, 4, 3, 4, 4, 4], ["early_stopping_patience=3"], 6),
    "evaluated every second step": ([6, 0, 5, 0, 5, 0, 5], ["early_stopping_patience=1", "eval_steps=2"], 4),
}


@pytest.mark.parametrize(("script", "words", "last"), ENDINGS.values(), ids=ENDINGS)
def test_a_run_ends_when_its_patience_is_used_up(
    script: list[float], words: list[str], last: int, world: World, tmp_path: Path, losses: _Script
) -> None:
    losses.set(script)
    result, heard = carry_out(tmp_path / "run", world, *words)
    assert result is not None and result.finished
    assert (result.step, result.early) == (last, last < 6)
    assert ("Ended early" in str(heard)) == (last < 6)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    state = state_of(tmp_path / "run")
    assert (state["global_step"], state["max_steps"]) == (last, 6)
    read = read_run(tmp_path / "run")
    assert read.finished and read.ended_early == (last < 6)
    assert find_weights(str(tmp_path / "run"), heard.say).folder == tmp_path / "run"
    again, said = carry_out(tmp_path / "run", world, *words, resume=True)
    assert again is not None and (again.step, again.early, again.finished) == (last, last < 6, True)
    assert f"is finished: {result.how_it_ended}" in str(said)


def test_it_takes_the_same_steps_as_without(world: World, tmp_path: Path, losses: _Script) -> None:
    """The schedule is that of the whole run; what is written is the model after the last step that was done."""
    losses.set([6, 5, 4, 4, 4, 4, 4])
    words = ["lr_scheduler_type=cosine"]
    carry_out(tmp_path / "early", world, *words, "early_stopping_patience=2")
    losses.set([6, 5, 4, 4, 4, 4, 4])
    carry_out(tmp_path / "whole", world, *words, "checkpoint.save_every_steps=4", "export.dtype=fp32")
    early, whole = (
        [line for line in json_lines(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("early", "whole")
    )
    numbers = ("step", "loss", "learning_rate", "grad_norm")
    assert [[line[key] for key in numbers] for line in early] == [[line[key] for key in numbers] for line in whole[:4]]
    assert sha256(tmp_path / "early" / "model.safetensors") == sha256(
        tmp_path / "whole" / "checkpoint-4" / "model.safetensors"
    )


@pytest.mark.parametrize("crash_after", [1, 3, 5])
def test_an_interrupted_run_keeps_counting(crash_after: int, world: World, tmp_path: Path, losses: _Script) -> None:
    script = [6, 5, 4, 4.1, 4.2, 4.3, 1]
    words = ["early_stopping_patience=3", "load_best_model_at_end=true", "checkpoint.save_every_steps=1"]
    losses.set(script)
    carry_out(tmp_path / "run", world, *words, crash_after=crash_after)
    if crash_after == 1:
        assert not checkpoints(tmp_path / "run")  # nothing was saved yet: it begins anew
    losses.set(script)
    result, _ = carry_out(tmp_path / "run", world, *words, resume=crash_after > 1)
    assert result is not None and (result.step, result.early) == (5, True)
    assert chosen(result) == (2, 4)
    assert losses_of(result) == list(enumerate(script[:6]))
    assert state_of(tmp_path / "run")["best_global_step"] == 2
    losses.set(script)
    carry_out(tmp_path / "short", world, "training.max_steps=2")
    assert sha256(tmp_path / "run" / "model.safetensors") == sha256(tmp_path / "short" / "model.safetensors")


def test_a_run_that_fails_after_its_end_is_finished_without_a_step(
    world: World, tmp_path: Path, losses: _Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its patience was used up when the disk was full: resuming writes the model, and takes no further step."""
    from sophia_galore.train import output as run_output

    script = [6, 5, 6, 6, 6, 6, 6]
    words = ["early_stopping_patience=2", "checkpoint.save_every_steps=1"]
    losses.set(script)

    def fail(*_: Any, **__: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(run_output, "replace_model", fail)
        carry_out(tmp_path / "run", world, *words)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    result, heard = carry_out(tmp_path / "run", world, *words, resume=True)
    assert result is not None and result.finished and result.step == 3
    assert "Ended early: after step 3 of 6" in str(heard)


def test_with_more_patience_it_goes_on(world: World, tmp_path: Path, losses: _Script) -> None:
    script = [6, 5, 6, 6, 4, 3, 2]
    losses.set(script)
    carry_out(tmp_path / "run", world, "early_stopping_patience=2", "checkpoint.save_every_steps=1")
    result, _ = carry_out(
        tmp_path / "run", world, "early_stopping_patience=3", "checkpoint.save_every_steps=1", resume=True
    )
    assert result is not None and (result.step, result.early) == (6, False)
    assert losses_of(result) == list(enumerate(script))


FORMATS: dict[str, list[str]] = {
    "fp32": [],
    "bf16": ["model.store=bf16"],
    "exported in bf16": ["export.dtype=bf16"],
    "int8": ["load_in_8bit=true"],
    "int8, folded late": ["load_in_8bit=true", "quantization.fold=refresh", "optimizer.galore.update_proj_gap=4"],
    "int8, folded late, bases in fp32": [
        "load_in_8bit=true",
        "quantization.fold=refresh",
        "optimizer.galore.projection_bits=32",
        "export.dtype=fp32",
    ],
    "adamw": ["optimizer.type=adamw"],
    "frozen": ['training.trainable=["model.layers.1.*", "*norm*"]'],
}


@pytest.mark.parametrize("words", FORMATS.values(), ids=FORMATS)
def test_the_final_model_is_the_best_one_to_the_bit(
    words: list[str], world: World, tmp_path: Path, losses: _Script
) -> None:
    """As a run that ended there would have written it, and so are its answers."""
    best_is_written(words, world, tmp_path, losses)


@NEEDS_BITSANDBYTES
def test_so_it_is_with_layers_that_bitsandbytes_holds(world: World, tmp_path: Path, losses: _Script) -> None:
    best_is_written(["load_in_8bit=true", "quantization.backend=bitsandbytes"], world, tmp_path, losses)


def best_is_written(words: list[str], world: World, tmp_path: Path, losses: _Script) -> None:
    asked = [*words, 'training.sample_questions=["one and two"]', "training.sample_max_new_tokens=3"]
    losses.set([6, 5, 4, 4.5])
    result, heard = carry_out(tmp_path / "run", world, *asked, *BEST, "training.max_steps=3")
    losses.set([6, 5, 4])
    carry_out(tmp_path / "short", world, *asked, "training.max_steps=2")
    assert sha256(tmp_path / "run" / "model.safetensors") == sha256(tmp_path / "short" / "model.safetensors")
    answers = [json.loads((tmp_path / name / "answers.json").read_text()) for name in ("run", "short")]
    assert answers[0] == answers[1]
    assert result is not None and chosen(result) == (2, 4.0)
    assert "The final model is the best one, that after step 2: eval loss 4.0000" in str(heard)
    state = state_of(tmp_path / "run")
    assert (state["best_metric"], state["best_global_step"]) == (4.0, 2)
    assert state["best_model_checkpoint"] == str(tmp_path / "run" / "checkpoint-2")
    assert json_lines(tmp_path / "run" / "metrics.jsonl")[-1]["exported_step"] == 2


# Losses by step, checkpoint settings -> steps whose checkpoints are left, and the best one.
KEPT: dict[str, tuple[list[float], list[str], list[int], int]] = {
    "each is better": ([6, 5, 4, 3, 2, 1, 0.5], ["checkpoint.keep_last=2"], [5, 6], 6),
    "the best is old": ([6, 5, 1, 3, 2, 2, 2], ["checkpoint.keep_last=1", "save_steps=1"], [2, 6], 2),
    "only the best ones are saved": ([6, 5, 6, 4, 6, 6, 6], ["checkpoint.keep_last=1"], [3], 3),
    "of equal ones the first": ([6, 3, 3, 3, 3, 3, 3], ["checkpoint.keep_last=1"], [1], 1),
    "worse than the untrained model": ([1, 5, 4, 6, 6, 6, 6], ["checkpoint.keep_last=1"], [2], 2),
}


@pytest.mark.parametrize(("script", "words", "left", "best"), KEPT.values(), ids=KEPT)
def test_the_best_checkpoint_stays(
    script: list[float], words: list[str], left: list[int], best: int, world: World, tmp_path: Path, losses: _Script
) -> None:
    losses.set(script)
    result, heard = carry_out(tmp_path / "run", world, *BEST, *words)
    assert steps_of(tmp_path / "run") == left
    assert result is not None and chosen(result) == (best, script[best])
    assert ("The untrained model had a lower one, 1.0000" in str(heard)) == (script[0] == 1)


def test_going_back_before_the_best_one_finds_it_again(world: World, tmp_path: Path, losses: _Script) -> None:
    """What was best later counts for nothing until it comes again; the best one until there stays meanwhile."""
    script = [6, 3, 4, 5, 2, 4, 4]
    words = [*BEST, "checkpoint.save_every_steps=1", "checkpoint.keep_last=6"]
    losses.set(script)
    carry_out(tmp_path / "run", world, *words)
    digest = sha256(tmp_path / "run" / "model.safetensors")
    carry_out(
        tmp_path / "run", world, *words, resume_from=tmp_path / "run" / "checkpoint-2", resume=True, crash_after=3
    )
    assert state_of(tmp_path / "run")["best_global_step"] == 1
    result, _ = carry_out(tmp_path / "run", world, *words, resume=True)
    assert result is not None and chosen(result) == (4, 2)
    assert sha256(tmp_path / "run" / "model.safetensors") == digest


def test_in_another_folder_the_best_checkpoint_comes_along(world: World, tmp_path: Path, losses: _Script) -> None:
    script = [6, 5, 2, 5, 4, 4, 4]
    words = [*BEST, "checkpoint.save_every_steps=1", "checkpoint.keep_last=2"]
    losses.set(script)
    carry_out(tmp_path / "first", world, *words, crash_after=5)
    result, _ = carry_out(tmp_path / "second", world, *words, resume=True, resume_from=tmp_path / "first")
    assert result is not None and chosen(result) == (2, 2)
    assert steps_of(tmp_path / "second") == [2, 5, 6]


def test_asked_for_later_it_says_what_it_can_not_have(world: World, tmp_path: Path, losses: _Script) -> None:
    losses.set([6, 1, 5, 5, 4, 5, 5])
    carry_out(tmp_path / "run", world, "checkpoint.save_every_steps=2", crash_after=3)
    result, heard = carry_out(tmp_path / "run", world, "checkpoint.save_every_steps=2", *BEST, resume=True)
    assert "The lowest eval loss so far, 1.0000 after step 1, has no checkpoint" in str(heard)
    assert result is not None and chosen(result) == (4, 4)


def test_of_a_damaged_best_checkpoint_the_next_one_is_taken(
    world: World, tmp_path: Path, losses: _Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses.set([6, 5, 4, 2, 3, 3, 3])
    spoilt = tmp_path / "run" / "checkpoint-3" / "model.safetensors"
    stepped = Heard.stepped

    def spoil(self: Heard, record: dict[str, Any], **more: Any) -> None:
        stepped(self, record, **more)
        if record["step"] == 5:
            *whole, last = spoilt.read_bytes()
            spoilt.write_bytes(bytes([*whole, last ^ 1]))

    monkeypatch.setattr(Heard, "stepped", spoil)
    result, heard = carry_out(tmp_path / "run", world, *BEST, "checkpoint.keep_last=9")
    assert "The best model can't be loaded" in str(heard) and "model.safetensors is not what was written" in str(heard)
    assert result is not None and result.finished and chosen(result) == (2, 4)


def test_nothing_of_this_changes_a_run_that_asks_for_none(world: World, tmp_path: Path, losses: _Script) -> None:
    losses.set([6, 5, 4, 5, 5, 5, 5])
    carry_out(tmp_path / "plain", world)
    losses.set([6, 5, 4, 5, 5, 5, 5])
    carry_out(tmp_path / "patient", world, "early_stopping_patience=9")
    assert not checkpoints(tmp_path / "plain")
    assert not {"exported_step", "evaluations_without_improvement"} & {
        key for line in json_lines(tmp_path / "plain" / "metrics.jsonl") for key in line
    }
    digests = [sha256(tmp_path / name / "model.safetensors") for name in ("plain", "patient")]
    assert digests[0] == digests[1]
