"""Checkpoints: complete or not there, whatever goes wrong, and verified before anything is believed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from sophia_galore.errors import CheckpointError, EnvironmentProblem
from sophia_galore.train import checkpoint as module
from sophia_galore.train.checkpoint import checkpoints, find_checkpoint, optimizer_state_files, save_checkpoint
from sophia_galore.weights.safetensors_layout import TensorWriter
from sophia_galore.weights.tensor_stream import TensorStream

STATE = {"w/exp_avg": torch.arange(6.0).view(2, 3), "w/basis": torch.tensor([[0.1], [-0.0]])}
FILES = ["model.safetensors", "optimizer.safetensors", "plan.json", "run_config.json", "trainer_state.json"]


def write_model(folder: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2, 3)}, folder / "model.safetensors")


def in_memory(stream: TensorStream) -> dict[str, torch.Tensor]:
    """All tensors of a stream."""
    made = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in stream.kinds.items()}
    for name, rows, first in stream.blocks():
        made[name][first : first + len(rows)] = rows
    return made


def save(run_folder: Path, step: int, keep_last: int = 9, **more: Any) -> Path:
    given: dict[str, Any] = {"optimizer_state": TensorStream.of(STATE), "write_model": write_model, **more}
    documents = {
        "plan.json": {"model_name": "m", "step": step},
        "run_config.json": {"training.seed": 42},
        "trainer_state.json": {"global_step": step},
    }
    return save_checkpoint(run_folder, step, documents=documents, keep_last=keep_last, **given)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    assert folder == tmp_path / "checkpoint-7"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "manifest.json"])
    found = find_checkpoint(tmp_path, None)
    assert (found.folder, found.step) == (folder, 7)
    assert found.plan == {"model_name": "m", "step": 7}
    assert found.config == {"training.seed": 42}
    state = in_memory(found.optimizer_state())
    assert state.keys() == STATE.keys()
    # As bits: -0.0 equals 0.0, but is another number to go on from.
    assert all(torch.equal(state[key].view(torch.int32), STATE[key].view(torch.int32)) for key in STATE)


def test_the_manifest_names_every_file_with_its_hash(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert sorted(manifest["files"]) == FILES
    assert all(len(digest) == 64 for digest in manifest["files"].values())


def test_the_newest_is_found_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 100, 2):
        save(tmp_path, step)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (2, 9, 10, 100)]
    assert find_checkpoint(tmp_path, None).step == 100


def test_folders_that_only_look_like_checkpoints_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 3)
    for name in ("checkpoint-best", "checkpoint-9", ".checkpoint-12.tmp", "checkpoint-7-old", "xcheckpoint-8"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("keep_last", "steps", "left"),
    [
        (1, [2, 4, 6], [6]),
        (2, [8, 9, 10, 11], [10, 11]),
        (5, [1, 2], [1, 2]),
        # After resuming from an older one by name, what is newly written must not be what goes first.
        (1, [6, 3], [3]),
        (2, [2, 6, 3], [3, 6]),
    ],
)
def test_keep_last(keep_last: int, steps: list[int], left: list[int], tmp_path: Path) -> None:
    for step in steps:
        assert save(tmp_path, step, keep_last).is_dir()
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_leftovers_of_a_killed_save_are_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-4.tmp").mkdir()
    (tmp_path / ".checkpoint-4.tmp" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".checkpoint-6.tmp").mkdir()
    save(tmp_path, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 6)
    save(tmp_path, 6, optimizer_state=TensorStream.of({"w/exp_avg": torch.zeros(1)}))
    assert find_checkpoint(tmp_path, None).optimizer_state().kinds.keys() == {"w/exp_avg"}


def fails_at(number: int, error: Exception, original: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but its `number`-th call raises."""
    calls = 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return original(*args, **kwargs)

    return broken


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
DENIED = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
BROKEN = OSError(errno.EIO, os.strerror(errno.EIO))
WRAPPED = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
# One a stage: making the folder, the model, the state, documents, each flush, the rename.
STAGES = [
    (Path, "mkdir", 1),
    (safetensors.torch, "save_file", 1),
    (TensorWriter, "write", 1),
    (TensorWriter, "write", 2),
    (Path, "write_text", 1),
    (Path, "write_text", 4),
    (os, "fsync", 1),
    (os, "fsync", 6),
    (os, "fsync", 7),
    (os, "replace", 1),
]


@pytest.mark.parametrize("error", [FULL, DENIED, BROKEN, WRAPPED], ids=["full", "denied", "broken", "wrapped"])
@pytest.mark.parametrize(("owner", "name", "number"), STAGES, ids=[f"{stage[1]}-{stage[2]}" for stage in STAGES])
def test_a_failure_at_any_stage_leaves_no_trace(
    owner: Any, name: str, number: int, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4)
    before = content(tmp_path)

    def write(folder: Path) -> None:
        safetensors.torch.save_file({"w": torch.ones(2, 3)}, folder / "model.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails_at(number, error, getattr(owner, name)))
        with pytest.raises(EnvironmentProblem, match="Earlier checkpoints are untouched") as caught:
            save(tmp_path, 6, keep_last=1, write_model=write)
    assert content(tmp_path) == before
    assert "checkpoint-6" in caught.value.cause and "--resume" in caught.value.remedy
    assert ("The disk is full" in caught.value.cause) == (error in (FULL, WRAPPED))
    save(tmp_path, 6, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


def test_a_failed_second_save_of_a_step_keeps_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 6)
    before = content(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails_at(3, FULL, os.fsync))
        with pytest.raises(EnvironmentProblem):
            save(tmp_path, 6)
    assert content(tmp_path) == before


def test_a_kill_before_the_rename_leaves_nothing_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill is the one end that cleans up nothing."""
    save(tmp_path, 2)

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails_at(1, Killed(), os.replace))  # type: ignore[arg-type]
        with pytest.raises(Killed):
            save(tmp_path, 4)
    assert (tmp_path / ".checkpoint-4.tmp" / "manifest.json").is_file()
    assert find_checkpoint(tmp_path, None).step == 2


def test_every_file_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    order: list[str] = []
    original = module._hash_and_flush

    def hash_and_flush(path: Path) -> str:
        flushed.append(path.name)
        return original(path)

    monkeypatch.setattr(module, "_hash_and_flush", hash_and_flush)
    monkeypatch.setattr(module, "flush_folder", lambda folder: order.append(folder.name))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("rename"), replace(*paths)))
    save(tmp_path, 2)
    assert sorted(flushed) == sorted([*FILES, "manifest.json"])
    assert flushed[-1] == "manifest.json"
    assert order == [".checkpoint-2.tmp", "rename", tmp_path.name]


def test_a_large_checkpoint_is_completed_beside_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Callable[[], None]] = []
    save(tmp_path, 2, beside=left.append)
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-2"] and not left  # a small one is not worth a thread
    monkeypatch.setattr(module, "_AT_ONCE_BYTES", 0)
    assert save(tmp_path, 4, keep_last=1, beside=left.append) == tmp_path / "checkpoint-4"
    # Until it is complete, the one before is the newest, and stays.
    assert find_checkpoint(tmp_path, None).step == 2
    (complete,) = left
    complete()
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-4"] and find_checkpoint(tmp_path, None).step == 4
    assert content(tmp_path / "checkpoint-4").keys() == content(save(tmp_path, 6)).keys()


def test_an_error_of_the_disk_may_come_while_it_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2)
    monkeypatch.setattr(module, "_AT_ONCE_BYTES", 0)
    left: list[Callable[[], None]] = []
    save(tmp_path, 4, beside=left.append)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_hash_and_flush", fails_at(2, OSError(errno.ENOSPC, "x"), module._hash_and_flush))
        with pytest.raises(EnvironmentProblem, match="checkpoint-4 could not be saved"):
            left[0]()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "one bit", "removed"])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_found_and_the_one_before_offered(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    before, newest = save(tmp_path, 9), save(tmp_path, 10)
    damage(newest / name)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path, None)
    assert str(newest) in caught.value.cause and name in caught.value.cause
    assert caught.value.remedy == f"Go on from another one: --resume {before}"
    assert find_checkpoint(tmp_path, before).step == 9


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"files": []}', '{"step": 3}', '{"files": {}, "step": "x"}', "\x00\x01"],
)
def test_a_broken_manifest_is_damage(text: str, tmp_path: Path) -> None:
    before, newest = save(tmp_path, 2), save(tmp_path, 3)
    (newest / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        find_checkpoint(tmp_path, None)
    assert str(newest) in caught.value.cause
    assert str(before) in caught.value.remedy


def test_no_bit_of_a_manifest_changes_what_it_says(tmp_path: Path) -> None:
    """Another step would be another run, and a file that is not listed is not checked."""
    path = save(tmp_path, 4) / "manifest.json"
    content = path.read_bytes()
    accepted = 0
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            try:
                found = find_checkpoint(tmp_path, None)
            except CheckpointError:
                continue
            accepted += 1
            assert found.step == 4
            assert [file.name for file in optimizer_state_files(found.folder)] == ["optimizer.safetensors"]
    assert accepted, "a space may become a line"


@pytest.mark.parametrize("step", [3, 6])
def test_a_manifest_of_an_earlier_version_must_say_what_the_state_says(step: int, tmp_path: Path) -> None:
    path = save(tmp_path, 4) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    assert find_checkpoint(tmp_path, None).step == 4
    path.write_text(json.dumps(manifest | {"step": step}))
    with pytest.raises(CheckpointError, match="is damaged"):
        find_checkpoint(tmp_path, None)


def test_damage_without_another_checkpoint(tmp_path: Path) -> None:
    flip(save(tmp_path, 2) / "plan.json")
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path, None)
    assert caught.value.remedy == "There is no other checkpoint: start without --resume."


def test_the_newest_other_one_is_offered_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        save(tmp_path, step)
    cut(tmp_path / "checkpoint-11" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path, tmp_path / "checkpoint-11")
    assert caught.value.remedy.endswith("checkpoint-10")


def test_a_checkpoint_that_was_asked_for_wins_over_newer_ones(tmp_path: Path) -> None:
    for step in (2, 4):
        save(tmp_path, step)
    assert find_checkpoint(tmp_path, tmp_path / "checkpoint-2").step == 2
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "checkpoint-2", elsewhere)
    assert find_checkpoint(tmp_path / "no such run", elsewhere).step == 2


@pytest.mark.parametrize("what", ["missing", "folder", "file", "hidden"])
def test_asking_for_something_else_is_refused(what: str, tmp_path: Path) -> None:
    there = save(tmp_path, 2)
    asked = tmp_path / what
    if what == "folder":
        asked.mkdir()
    elif what == "file":
        asked.write_text("x")
    elif what == "hidden":
        asked = there / "model.safetensors"
    with pytest.raises(CheckpointError, match="is not a complete checkpoint") as caught:
        find_checkpoint(tmp_path, asked)
    assert str(asked) in caught.value.cause
    assert caught.value.remedy


@pytest.mark.parametrize("exists", [True, False])
def test_a_run_without_checkpoints(exists: bool, tmp_path: Path) -> None:
    folder = tmp_path if exists else tmp_path / "nothing"
    with pytest.raises(CheckpointError, match="holds no complete checkpoint") as caught:
        find_checkpoint(folder, None)
    assert "Start without --resume" in caught.value.remedy


def test_steps_that_are_to_stay_are_no_part_of_those_that_are_counted(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=1, keep_steps={2})
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    save(tmp_path, 5, keep_last=1, keep_steps={5})
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-5"]


def test_killed_while_an_old_one_is_deleted_no_half_of_it_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being deleted is no checkpoint any more, whichever of its files goes first."""
    save(tmp_path, 1)

    def killed(folder: Path, **_: Any) -> None:
        (Path(folder) / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, keep_last=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert find_checkpoint(tmp_path, None).step == 2
    save(tmp_path, 3, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
