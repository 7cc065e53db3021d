"""Stopping by a signal, and going on with the very command that the message names: the same bits in the end."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from sophia_galore.cli.show import Terminal
from sophia_galore.records.memory import MemoryReport
from sophia_galore.train import output as run_output
from sophia_galore.train import run
from unit.cli.tiny_run import World, command, json_lines, sha256

pytestmark = pytest.mark.signals

GALORE = ["--optimizer", "galore", "training.lr_scheduler_type=cosine"]
ADAMW = ["--optimizer", "adamw", "model.store=bf16"]
PACKED = ["--optimizer", "adamw", "data.packing=true", "training.max_length=48"]


def send_after(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Send a signal to this process when a step has been shown."""
    original = Terminal.stepped

    def stepped(self: Terminal, record: dict[str, Any], **more: Any) -> None:
        original(self, record, **more)
        if record["step"] == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Terminal, "stepped", stepped)


def command_to_go_on(out: str) -> list[str]:
    """The words of the command that a stopped run names."""
    (line,) = [line for line in out.splitlines() if line.startswith("Go on with: ")]
    words = shlex.split(line.removeprefix("Go on with: "))
    assert words[0] == "sophia-galore"
    return words[1:]


@pytest.mark.parametrize(
    ("number", "words", "step"),
    [(signal.SIGINT, GALORE, 2), (signal.SIGTERM, ADAMW, 7), (signal.SIGINT, PACKED, 3)],
    ids=["SIGINT galore fp32", "SIGTERM adamw bf16", "SIGINT adamw packed"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    number: signal.Signals, words: list[str], step: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in a shell's background
    # A question with spaces and quotes: the command to go on must survive a shell.
    words = [*words, 'training.sample_questions=["what\'s one"]', "training.sample_max_new_tokens=2"]
    whole = world.train(str(tmp_path / "whole"), *words)
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patch:
        send_after(patch, step, number)
        stopped = world.train(str(tmp_path / "cut short"), *words)
    folder = tmp_path / "cut short"
    assert stopped.code == 0, stopped.err
    assert f"Stopped after step {step}; saved in {folder / f'checkpoint-{step}'}" in stopped.out
    assert not (folder / "model.safetensors").exists()
    assert (folder / "trainer_state.json").is_file()
    assert MemoryReport.read(folder / "memory_report.json").peak_allocated_bytes
    assert signal.getsignal(signal.SIGINT) is before

    resumed = command(*command_to_go_on(stopped.out))
    assert resumed.code == 0, resumed.err
    assert f"Going on after step {step}" in resumed.out
    assert sha256(folder / "model.safetensors") == sha256(tmp_path / "whole" / "model.safetensors")
    numbers = ("step", "loss", "learning_rate", "grad_norm", "tokens", "eval_loss")
    lines = [
        [{key: line.get(key) for key in numbers} for line in json_lines(path / "metrics.jsonl")]
        for path in (folder, tmp_path / "whole")
    ]
    assert lines[0] == lines[1]
    assert (folder / "loss.png").is_file() and (folder / "memory.png").is_file()


def test_a_signal_in_the_last_step_still_finishes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_after(monkeypatch, 2, signal.SIGINT)
    ended = world.train(str(tmp_path / "run"), "training.max_steps=2", "memory.track_steps=0")
    assert ended.code == 0, ended.err
    assert "Go on with" not in ended.out
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_second_signal_stops_at_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process, since the signal ends it."""
    pid = os.fork()
    if pid == 0:
        try:
            send_after(monkeypatch, 2, signal.SIGTERM)
            monkeypatch.setattr(run_output, "save_checkpoint", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
            world.train(str(tmp_path / "run"), "memory.track_steps=0")
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    assert len(json_lines(tmp_path / "run" / "metrics.jsonl")) == 3  # one evaluation and two steps
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_after_going_back_the_run_goes_on_from_where_it_was_stopped(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    words = [str(folder), "training.max_steps=6", "checkpoint.save_every_steps=2", "checkpoint.keep_last=4"]
    assert world.train(*words).code == 0
    expected, lines = sha256(folder / "model.safetensors"), json_lines(folder / "metrics.jsonl")
    with monkeypatch.context() as patch:
        send_after(patch, 3, signal.SIGINT)
        stopped = world.train(*words, "--resume", str(folder / "checkpoint-2"))
    assert stopped.code == 0, stopped.err
    # checkpoint-6 of the first time is newer, but what comes between would be missing in the records.
    assert f"Stopped after step 3; saved in {folder / 'checkpoint-3'}." in stopped.out
    assert command(*command_to_go_on(stopped.out)).code == 0
    assert sha256(folder / "model.safetensors") == expected
    again = json_lines(folder / "metrics.jsonl")
    assert [(line["step"], line.get("loss")) for line in again] == [(line["step"], line.get("loss")) for line in lines]


def test_ctrl_c_before_the_first_step_is_no_failure(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "prepare", interrupted)
    ended = world.train(str(tmp_path / "run"))
    assert ended.code == 130
    assert ended.err.strip() == "Error: Stopped."
