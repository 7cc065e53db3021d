"""A disk that is full or can only be read: what was saved stays, and the message says what is missing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from small_disk import mounted
from sophia_galore.config import load_config
from sophia_galore.errors import EnvironmentProblem
from sophia_galore.model.disk import errno_of, reason
from sophia_galore.records import files as names
from sophia_galore.records.schema import write_json
from sophia_galore.train import checkpoint
from sophia_galore.train import output as run_output
from sophia_galore.train.callback import Callback
from sophia_galore.train.checkpoint import checkpoints, find_checkpoint
from sophia_galore.train.metrics import MetricsLog
from sophia_galore.train.run import train
from unit.cli.tiny_run import World, command, make_world

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
WORDS = ["memory.track_steps=0", "memory.predict=false", "data.eval_fraction=0", "checkpoint.save_every_steps=2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "x"), errno.EDQUOT),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), errno.EFBIG),
        (Exception("No space left on device (os error 28)"), errno.ENOSPC),  # the tokenizers' own
        (RuntimeError("something else"), None),
        (EnvironmentProblem("[Errno 28] told already"), None),
    ],
)
def test_the_systems_number_is_found(error: Exception, number: int | None) -> None:
    assert errno_of(error) == number


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, ["the disk is full", "needed", "free", "too little"]),
        (errno.EDQUOT, ["quota", "needed", "free"]),
        (errno.EFBIG, ["larger than is allowed"]),
        (errno.EROFS, ["can only be read"]),
        (errno.EACCES, ["Permission denied"]),
    ],
)
def test_what_is_missing_is_said(number: int, words: list[str], tmp_path: Path) -> None:
    said = reason(OSError(number, "x"), tmp_path / "not there", needed_bytes=2**60)
    assert all(word in said for word in words)


class Says(Callback):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


# Where a run writes: the model of a checkpoint, its state, the final model; each fails at the named moment.
def fails_from(name: str, number: int, error: Exception, patch: pytest.MonkeyPatch, owner: Any) -> None:
    original, calls = getattr(owner, name), [0]

    def failing(*given: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] >= number:
            raise error
        return original(*given, **more)

    patch.setattr(owner, name, failing)


@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("checkpoint-4", errno.ENOSPC),
        ("checkpoint-4", errno.EFBIG),
        ("The final model", errno.EDQUOT),
        ("The final model", errno.EROFS),
    ],
)
def test_the_last_good_checkpoint_stays(
    what: str, number: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WORDS, f"training.output_dir={tmp_path / 'run'}"]
    words.append(f"training.max_steps={5 if what == 'checkpoint-4' else 3}")
    with monkeypatch.context() as patch:
        # Each checkpoint and the final model are one call.
        fails_from("write_model", 2, OSError(number, os.strerror(number)), patch, run_output)
        with pytest.raises(EnvironmentProblem) as caught:
            train(load_config(world.config, words), Callback())
    assert f"{what} could not be saved" in caught.value.cause
    if number in (errno.ENOSPC, errno.EDQUOT):
        assert "needed" in caught.value.cause and "free" in caught.value.cause
    assert "--resume" in caught.value.remedy
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not [name for name in left if name.endswith(".tmp")]
    assert find_checkpoint(tmp_path / "run", None).step == 2
    assert not (tmp_path / "run" / names.MODEL).exists()
    assert train(load_config(world.config, words), Callback(), resume=True).finished


def test_a_checkpoint_that_fails_beside_the_steps_ends_the_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WORDS, f"training.output_dir={tmp_path / 'run'}", "training.max_steps=9"]
    monkeypatch.setattr(checkpoint, "_AT_ONCE_BYTES", 0)
    with monkeypatch.context() as patch:
        fails_from("_finish", 2, OSError(errno.ENOSPC, "x"), patch, checkpoint)
        with pytest.raises(EnvironmentProblem) as caught:
            train(load_config(world.config, words), Callback())
    assert "checkpoint-4 could not be saved" in caught.value.cause and "--resume" in caught.value.remedy
    assert find_checkpoint(tmp_path / "run", None).step == 2
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert train(load_config(world.config, words), Callback(), resume=True).finished


def test_the_last_checkpoint_is_complete_when_a_run_stops_or_ends(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow ones are waited for: what a message names is there."""
    monkeypatch.setattr(checkpoint, "_AT_ONCE_BYTES", 0)
    finish = checkpoint._finish
    monkeypatch.setattr(checkpoint, "_finish", lambda *given: (time.sleep(0.2), finish(*given))[1])

    class Stops(Callback):
        def stepped(self, record: dict[str, Any], *, num_steps: int, seconds_left: float) -> None:
            if record["step"] == 3:
                signal.raise_signal(signal.SIGINT)

    words = [*WORDS, f"training.output_dir={tmp_path / 'run'}", "training.max_steps=6"]
    stopped = train(load_config(world.config, words), Stops())
    assert stopped.saved is not None and find_checkpoint(stopped.saved.parent, None).folder == stopped.saved
    assert train(load_config(world.config, words), Callback(), resume=True).finished
    assert [path.name for path in checkpoints(tmp_path / "run")][-1] == "checkpoint-6"


def test_without_a_checkpoint_it_is_said_so(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*WORDS, f"training.output_dir={tmp_path / 'run'}", "training.max_steps=2"]
    fails_from("write_model", 1, OSError(errno.ENOSPC, "x"), monkeypatch, run_output)
    with pytest.raises(EnvironmentProblem) as caught:
        train(load_config(world.config, words), Callback())
    assert "There is no earlier checkpoint" in caught.value.remedy


def test_records_that_find_no_room_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is no reason to lose a run that needs it only hours later."""
    said: list[str] = []
    log = MetricsLog(tmp_path / "metrics.jsonl", None, said.append)
    log.add({"step": 1})
    assert log._file is not None
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*given: Any, **more: Any) -> int:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        log._file.close()
        patch.setattr(log, "_file", type("Full", (), {"write": refuse, "close": lambda self: None})())
        for step in (2, 3):
            log.add({"step": step})
        assert log.problem is full and len(said) == 1 and "lags behind: the disk is full" in said[0]
        assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1]
    log.add({"step": 4})
    log.close()
    assert log.problem is None
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2, 3, 4]
    assert not (tmp_path / "metrics.tmp").exists()


def test_a_document_on_a_full_disk_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"a": 1})
    original = Path.write_text

    def half(self: Path, text: str, **more: Any) -> int:
        original(self, text[:3], **more)
        raise OSError(errno.ENOSPC, "x")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="x"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["plan.json"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 3 MiB."""
    with mounted(tmp_path / "disk", "3m") as place:
        yield place


def fill(place: Path, left_bytes: int) -> Path:
    """A file that takes what is free, but for so many bytes."""
    path = place / "others"
    path.write_bytes(b"x" * (shutil.disk_usage(place).free - left_bytes))
    return path


def test_a_disk_that_fills_up(world: World, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing: everything on a small disk, which others fill after the first checkpoint."""
    monkeypatch.setattr("sophia_galore.train.preflight.refuse_full_disk", lambda *given: None)  # 40 MiB of tokenizer
    original = run_output.save_checkpoint
    saved: list[Path] = []

    def save(*given: Any, **more: Any) -> Path:
        saved.append(original(*given, **more))
        if len(saved) == 1:
            fill(small_disk, 65536)
        return saved[-1]

    monkeypatch.setattr(run_output, "save_checkpoint", save)
    words = ["train", "--config", str(world.config), f"training.output_dir={small_disk / 'run'}", *WORDS]
    words.append("training.max_steps=5")
    ended = command(*words)
    assert ended.code == 2, ended.out + ended.err
    assert "The disk is full: about " in ended.err and "too little" in ended.err and "checkpoint-4" in ended.err
    assert "--resume" in ended.err and "Traceback" not in ended.err
    run = small_disk / "run"
    assert find_checkpoint(run, None).step == 2
    assert not list(run.glob(".*.tmp"))
    exported = command("export", str(saved[0]), "--to", "fp32", "--output", str(small_disk / "out"))
    assert exported.code == 2 and "the disk is full: about" in exported.err, exported.err
    assert {path.name for path in small_disk.iterdir()} == {"run", ".run.lock", "others"}
    (small_disk / "others").unlink()
    assert command(*words, "--resume").code == 0


def test_a_disk_that_can_only_be_read(world: World, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ended = world.train(str(small_disk / "run"), *WORDS)
    assert ended.code == 2 and "can't be written to" in ended.err and "Traceback" not in ended.err


@posix
def test_a_limit_on_the_size_of_files(world: World, tmp_path: Path) -> None:
    """`ulimit -f`, in a process of its own: what the system does is a signal first, which Python ignores."""
    import resource

    said = tmp_path / "said"
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
            ended = world.train(str(tmp_path / "run"), *WORDS, "training.max_steps=5")
            said.write_text(ended.err)
            code = ended.code
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert "larger than is allowed there (ulimit -f allows 39 KiB)" in said.read_text(), said.read_text()
    assert not list((tmp_path / "run").glob(".*.tmp"))
