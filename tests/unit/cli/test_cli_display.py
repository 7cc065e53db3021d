"""Nobody reads what is printed any more: a run goes on, or saves if its terminal is gone; an answer ends."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sophia_galore.cli.display import Display, ReaderGone, displays, need_reader
from sophia_galore.cli.main import main
from sophia_galore.cli.show import Terminal
from sophia_galore.train.checkpoint import checkpoints
from unit.cli.tiny_run import World

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
QUICK = ["memory.track_steps=0", "memory.predict=false", "training.max_steps=4", "data.eval_fraction=0"]


class Failing(io.StringIO):
    """A stream that fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error: Exception | None = error

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


GONE = [BrokenPipeError(errno.EPIPE, "x"), OSError(errno.EIO, "x"), OSError(errno.EBADF, "x"), ValueError("closed")]


@pytest.mark.parametrize("error", GONE, ids=["pipe", "terminal", "closed number", "closed"])
def test_a_stream_that_nobody_reads_never_fails(error: Exception) -> None:
    display = Display(Failing(error))
    print("text", file=display, flush=True)  # type: ignore[arg-type]
    assert display.failure is None
    display.needs_reader = True
    with pytest.raises(ReaderGone):
        print("text", file=display)  # type: ignore[arg-type]


def test_a_full_disk_behind_a_stream_is_told_at_the_end(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for words, code in (
        (["prepare-data", "--output", str(tmp_path / "data.json")], 2),
        (["train", "--config", str(world.config), f"training.output_dir={tmp_path / 'run'}", *QUICK], 0),
    ):
        said = io.StringIO()
        monkeypatch.setattr(sys, "stderr", said)
        monkeypatch.setattr(sys, "stdout", Failing(full))
        assert main(words) == code
        assert "The output could not be written: No space left" in said.getvalue()
    assert (tmp_path / "data.json").is_file() and (tmp_path / "run" / "model.safetensors").is_file()


def test_afterwards_the_streams_are_what_they_were() -> None:
    before = sys.stdout, sys.stderr
    with displays() as out:
        assert sys.stdout is out  # type: ignore[comparison-overlap]
        need_reader()
        assert out.needs_reader
    assert (sys.stdout, sys.stderr) == before


def forked(work: Callable[[], int]) -> int:
    """Do something in a process of its own; returns its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def standard_streams(out: int, err: int) -> None:
    """Let this process write to other places, as a shell does before it starts a program."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)  # type: ignore[arg-type]
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)  # type: ignore[arg-type]


def closed_pipe() -> int:
    """What is left of `| head` after its last line."""
    reads, writes = os.pipe()
    os.close(reads)
    return writes


@posix
def test_a_run_does_not_need_its_pipe(world: World, tmp_path: Path) -> None:
    def work() -> int:
        standard_streams(closed_pipe(), closed_pipe())
        return main(["train", "--config", str(world.config), f"training.output_dir={tmp_path / 'run'}", *QUICK])

    assert forked(work) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "loss.png").is_file()


@posix
def test_an_answer_ends_with_its_reader(world: World, tmp_path: Path) -> None:
    said = tmp_path / "err"

    def work() -> int:
        with said.open("w") as err:
            standard_streams(closed_pipe(), err.fileno())
            return main(["generate", str(world.model), "x", "--max-new-tokens", "50"])

    assert forked(work) == 0
    assert "Error" not in said.read_text() and "Traceback" not in said.read_text()


@posix
def test_a_terminal_that_closes_lets_the_run_save(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of it: the system sends SIGHUP, and writing to the terminal fails from then on."""
    folder = tmp_path / "run"
    waits, goes_on = os.pipe()
    original = Terminal.stepped

    def stepped(self: Terminal, record: dict[str, Any], **more: Any) -> None:
        if record["step"] == 2:
            print("SECOND STEP", flush=True)
            os.read(waits, 1)  # until the terminal is closed
        original(self, record, **more)

    pid, terminal = os.forkpty()
    if pid == 0:
        code = 99
        try:
            os.close(goes_on)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            standard_streams(os.dup(1), os.dup(2))
            monkeypatch.setattr(Terminal, "stepped", stepped)
            code = main(["train", "--config", str(world.config), f"training.output_dir={folder}", *QUICK])
        finally:
            os._exit(code)
    os.close(waits)
    shown = b""
    while b"SECOND STEP" not in shown:
        try:
            shown += (part := os.read(terminal, 4096))
        except OSError:
            part = b""
        if not part:
            pytest.fail(shown.decode(errors="replace"))
    os.close(terminal)
    with contextlib.suppress(OSError):
        os.write(goes_on, b"x")
    os.close(goes_on)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    assert not (folder / "model.safetensors").exists()


@posix
@pytest.mark.parametrize("nohup", [False, True])
def test_under_nohup_a_hangup_is_nothing(nohup: bool, world: World, tmp_path: Path) -> None:
    def work() -> int:
        original = Terminal.stepped

        def stepped(self: Terminal, record: dict[str, Any], **more: Any) -> None:
            os.kill(os.getpid(), signal.SIGHUP)
            original(self, record, **more)

        Terminal.stepped = stepped  # type: ignore[method-assign]
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        standard_streams(closed_pipe(), closed_pipe())
        return main(["train", "--config", str(world.config), f"training.output_dir={tmp_path / 'run'}", *QUICK])

    assert forked(work) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file() is nohup
    assert bool(checkpoints(tmp_path / "run")) is not nohup
