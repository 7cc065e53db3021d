"""What goes wrong with layers that live in files is said in two lines, checkpoints stay, and nothing is left over."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import _get_current_dispatch_mode

from small_disk import mounted
from sophia_galore.streaming import checked_file
from sophia_galore.streaming.checked_file import CheckedFile
from sophia_galore.streaming.homes import DiskHome
from sophia_galore.streaming.lanes import CpuLane
from sophia_galore.train import output as run_output
from sophia_galore.train.checkpoint import checkpoints, find_checkpoint
from sophia_galore.train.folder import locked, streaming_folder
from sophia_galore.train.metrics import MetricsLog
from sophia_galore.weights.manifest import sha256_of
from unit.cli.tiny_run import Ended, World

WORDS = ["memory.placement=disk", "training.max_steps=5", "checkpoint.save_every_steps=2", "data.eval_fraction=0"]
# The last layer's: of three layers in two buffers it is the one that is fetched again in the next step.
DAMAGED = "weights-00002.safetensors"
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def whole(world: World) -> dict[str, str]:
    """Hashes of the final model of a run in which nothing goes wrong."""
    ended = world.train("whole", *WORDS)
    assert ended.code == 0, ended.err
    return final_files(world.folder / "whole")


def final_files(output: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in output.glob("model*.safetensors*")}


def assert_explained(ended: Ended, code: int, *words: str) -> None:
    assert ended.code == code, ended.out + ended.err
    assert ended.err.startswith("Error: ") and "Traceback" not in ended.err + ended.out
    assert len(ended.err.strip().splitlines()) <= 2, ended.err
    assert all(word in ended.err for word in words), ended.err
    assert _get_current_dispatch_mode() is None, "nothing keeps watching"
    assert not [each for each in threading.enumerate() if each.name.startswith("streaming")], "the copies go on"


def assert_goes_on(world: World, output: Path, whole: dict[str, str], last_saved: int) -> None:
    """The run's checkpoints are what was written, and the rest of it is as if nothing had happened."""
    saved = checkpoints(output)
    assert [path.name for path in saved] == [f"checkpoint-{step}" for step in range(2, last_saved + 1, 2)]
    for path in saved:
        find_checkpoint(output, path)
    assert not list(output.glob(".*.tmp"))
    ended = world.train(str(output), *WORDS, *(["--resume"] if saved else []))
    assert ended.code == 0, ended.err
    assert final_files(output) == whole
    assert not os.path.lexists(streaming_folder(output))


@contextmanager
def failing(number: int, patches: Callable[[OSError, Patch], None]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patches(OSError(number, os.strerror(number)), patch)
        yield


def _fails(error: OSError, patch: Patch, owner: Any, name: str, when: Callable[..., bool]) -> None:
    original = getattr(owner, name)

    def maybe(*given: Any, **more: Any) -> Any:
        if when(*given):
            raise error
        return original(*given, **more)

    patch.setattr(owner, name, maybe)


class From:
    """True from the call of a number on."""

    def __init__(self, number: int) -> None:
        self._left = number

    def __call__(self, *given: object) -> bool:
        self._left -= 1
        return self._left <= 0


def _in_background(*given: object) -> bool:
    return threading.current_thread() is not threading.main_thread()


def _in_a_checkpoint(error: OSError, patch: Patch) -> None:
    _fails(OSError(errno.EPERM, "no links"), patch, os, "link", lambda *given: True)
    _fails(error, patch, shutil, "copyfile", From(10))  # of 8 files of layers each time; so in the second


# Where the disk is full, and the last checkpoint that there is then.
FULL: dict[str, tuple[Callable[[OSError, Patch], None], int]] = {
    "when files are made": (partial(_fails, owner=CheckedFile, name="_create", when=From(3)), 0),
    "when weights are taken in": (partial(_fails, owner=DiskHome, name="write", when=From(9)), 0),
    "when a layer is first written back": (partial(_fails, owner=DiskHome, name="write", when=_in_background), 0),
    "half through a layer": (partial(_fails, owner=checked_file, name="write_all", when=From(330)), 2),
    "when a linked file begins anew": (
        partial(_fails, owner=CheckedFile, name="_create", when=lambda self, path: path.suffix == ".new"),
        2,
    ),
    "when a new file takes its place": (
        partial(_fails, owner=os, name="replace", when=lambda old, new: str(old).endswith(".new")),
        2,
    ),
    "when a checkpoint copies": (_in_a_checkpoint, 2),
}


# Then the copies meet it, which know nothing of sizes.
WHILE_IT_TRAINS = [when for when in FULL if when.endswith(("first written back", "layer", "begins anew", "its place"))]


@pytest.mark.parametrize("when", FULL)
def test_a_full_disk(when: str, world: World, whole: dict[str, str], tmp_path: Path) -> None:
    patches, last_saved = FULL[when]
    with failing(errno.ENOSPC, lambda error, patch: patches(error, patch)):
        ended = world.train(str(tmp_path / "run"), *WORDS)
    words = "can't be kept on disk: No space left" if when in WHILE_IT_TRAINS else "he disk is full"
    assert_explained(ended, 2, words, "ree some space")
    assert not streaming_folder(tmp_path / "run").exists()
    assert_goes_on(world, tmp_path / "run", whole, last_saved)


def at_step(number: int, patch: Patch, happen: Callable[[], object]) -> None:
    """Let something happen when a step is recorded."""
    add = MetricsLog.add

    def changed(log: MetricsLog, record: dict[str, Any]) -> None:
        add(log, record)
        if record.get("step") == number and "loss" in record:
            happen()

    patch.setattr(MetricsLog, "add", changed)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(bytes(data))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is removed": (Path.unlink, "it is gone"),
    "a file is cut short": (lambda path: os.truncate(path, 900), "it was cut short"),
    "a bit is flipped": (_flip, "is not what was written"),
    "the folder is removed": (lambda path: shutil.rmtree(path.parent), "it is gone"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage(kind: str, world: World, whole: dict[str, str], tmp_path: Path, monkeypatch: Patch) -> None:
    """In step 3, when no checkpoint shares the file any more."""
    damage, words = DAMAGE[kind]
    path = streaming_folder(tmp_path / "run") / DAMAGED
    with monkeypatch.context() as patch:
        at_step(3, patch, lambda: damage(path))
        ended = world.train(str(tmp_path / "run"), *WORDS, "memory.prefetch=false")
    assert_explained(ended, 1, f"The file {path}", words, "--resume")
    assert not path.parent.exists()
    assert_goes_on(world, tmp_path / "run", whole, 2)


def test_an_error_that_nobody_expects(world: World, whole: dict[str, str], tmp_path: Path, monkeypatch: Patch) -> None:
    """Even then the files go, and so does the thread."""

    def surprise() -> None:
        raise ValueError("surprise")

    with monkeypatch.context() as patch:
        at_step(3, patch, surprise)
        ended = world.train(str(tmp_path / "run"), *WORDS)
    assert_explained(ended, 1, "ValueError: surprise")
    assert not streaming_folder(tmp_path / "run").exists()
    assert_goes_on(world, tmp_path / "run", whole, 2)


# ---- the folder's name


def _folder_of(path: Path, *names: str) -> None:
    path.mkdir()
    for name in names:
        (path / name).write_text("mine")


TAKEN: dict[str, Callable[[Path], object]] = {
    "a file": lambda path: path.write_text("mine"),
    "a folder": lambda path: _folder_of(path, "notes.txt", "weights-00000.safetensors"),
    "a folder in a folder": lambda path: (_folder_of(path), _folder_of(path / "inputs", "notes.txt")),
    "a link": lambda path: (_folder_of(path.with_name("elsewhere"), "notes.txt"), path.symlink_to("elsewhere")),
    "a dead link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("what", TAKEN)
def test_its_name_is_taken_by_the_user(what: str, world: World, tmp_path: Path) -> None:
    folder = streaming_folder(tmp_path / "run")
    TAKEN[what](folder)
    before = sorted(tmp_path.rglob("*"))
    ended = world.train(str(tmp_path / "run"), *WORDS)
    assert_explained(ended, 2, str(folder), "Move it away")
    assert sorted({*tmp_path.rglob("*")} - {tmp_path / ".run.lock"}) == before
    ended = world.train(str(tmp_path / "run"), *WORDS, "memory.placement=host", "training.max_steps=1")
    assert ended.code == 0, ended.err
    assert {*before} <= {*tmp_path.rglob("*")}, "nobody needs the name, so it is left alone"


@pytest.mark.parametrize("placement", ["disk", "device"])
def test_what_a_killed_run_left_is_removed(placement: str, world: World, tmp_path: Path) -> None:
    folder = streaming_folder(tmp_path / "run")
    _folder_of(folder, "weights-00000.safetensors", "state-00070.safetensors", "weights-00001.safetensors.new")
    _folder_of(folder / "inputs", "state-00003.safetensors")
    ended = world.train(str(tmp_path / "run"), *WORDS, f"memory.placement={placement}", "training.max_steps=1")
    assert ended.code == 0, ended.err
    assert not folder.exists()


def test_what_somebody_puts_there_meanwhile_stays(world: World, tmp_path: Path, monkeypatch: Patch) -> None:
    folder = streaming_folder(tmp_path / "run")
    at_step(1, monkeypatch, lambda: (folder / "notes.txt").write_text("mine"))
    ended = world.train(str(tmp_path / "run"), *WORDS, "training.max_steps=2")
    assert ended.code == 0, ended.err
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_another_run_in_the_same_folder(world: World, tmp_path: Path) -> None:
    folder = streaming_folder(tmp_path / "run")
    _folder_of(folder, "weights-00000.safetensors")
    with locked(tmp_path / "run"):
        ended = world.train(str(tmp_path / "run"), *WORDS)
    assert_explained(ended, 2, "Another process is training in")
    assert (folder / "weights-00000.safetensors").read_text() == "mine", "the other one's files"


# ---- memory and real disks


def test_host_memory_that_is_not_there(world: World, tmp_path: Path, monkeypatch: Patch) -> None:
    def refuse(self: CpuLane, num_bytes: int) -> None:
        raise MemoryError(f"Unable to allocate {num_bytes} bytes")

    monkeypatch.setattr(CpuLane, "host_buffer", refuse)
    ended = world.train(str(tmp_path / "run"), *WORDS, "memory.placement=host")
    assert_explained(ended, 2, "Host memory of ", "can't be allocated", "memory.placement=disk")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 6 MiB."""
    with mounted(tmp_path / "disk", "6m") as place:
        yield place


def _fill(place: Path) -> None:
    (place / "others").write_bytes(b"x" * (shutil.disk_usage(place).free - 40_000))


def _only_read(place: Path) -> None:
    """Of the folder of layers; the rest of the disk has files that are open for writing."""
    folder = str(streaming_folder(place / "run"))
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)


def _can_be_written(place: Path) -> None:
    subprocess.run(["umount", str(streaming_folder(place / "run"))], check=True)


@pytest.mark.parametrize(
    ("happens", "words", "undo"),
    [
        pytest.param(_fill, "No space left", lambda place: (place / "others").unlink(), id="full"),
        pytest.param(_only_read, "Read-only file system", _can_be_written, id="read only"),
    ],
)
def test_a_disk_that_changes_under_the_run(
    happens: Callable[[Path], None],
    words: str,
    undo: Callable[[Path], object],
    world: World,
    whole: dict[str, str],
    small_disk: Path,
    monkeypatch: Patch,
) -> None:
    """The real thing, after the first checkpoint: the next write begins a linked file anew."""
    monkeypatch.setattr("sophia_galore.train.preflight.refuse_full_disk", lambda *given: None)  # 40 MiB of tokenizer
    save = run_output.save_checkpoint

    def saving(*given: Any, **more: Any) -> Path:
        path = save(*given, **more)
        happens(small_disk)
        return path

    with monkeypatch.context() as patch:
        patch.setattr(run_output, "save_checkpoint", saving)
        ended = world.train(str(small_disk / "run"), *WORDS)
    undo(small_disk)
    assert_explained(ended, 2, words)
    assert_goes_on(world, small_disk / "run", whole, 2)
