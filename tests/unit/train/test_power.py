"""What a power failure could undo is on the disk before something relies on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sophia_galore.records.files import METRICS
from sophia_galore.records.schema import write_text
from unit.cli.tiny_run import World, make_world

WORDS = (
    "checkpoint.save_every_steps=2",
    "training.max_steps=2",
    "data.eval_fraction=0",
    "training.sample_questions=[]",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


class Disk:
    """Which files and folders were flushed, as they are now; asked at each rename."""

    def __init__(self, patch: pytest.MonkeyPatch, look: Callable[[Disk, Path, Path], None]) -> None:
        self.flushed: dict[tuple[int, int], tuple[int, int]] = {}
        fsync = os.fsync

        def flush(handle: Any) -> None:
            fsync(handle)
            found = os.fstat(handle)
            self.flushed[found.st_dev, found.st_ino] = (found.st_size, found.st_mtime_ns)

        patch.setattr(os, "fsync", flush)
        for name in ("rename", "replace"):
            patch.setattr(os, name, self._looking(getattr(os, name), look))

    def _looking(self, move: Callable[[Any, Any], None], look: Callable[[Disk, Path, Path], None]) -> Any:
        def moved(old: Any, new: Any, **more: Any) -> None:
            look(self, Path(old), Path(new))
            move(old, new, **more)

        return moved

    def named(self, path: Path) -> bool:
        """Whether a file's name is on the disk: its folder was flushed after the file got it."""
        found = path.parent.stat()
        return self.flushed.get((found.st_dev, found.st_ino), (0, 0))[1] >= path.stat().st_ctime_ns - 10**9

    def holds(self, path: Path) -> bool:
        """Whether the file or folder is on the disk as it is now."""
        found = path.stat()
        return self.flushed.get((found.st_dev, found.st_ino)) == (found.st_size, found.st_mtime_ns)


def test_a_checkpoint_relies_on_what_is_on_the_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    output = world.folder / "new" / "folders" / "run"
    seen = []

    def look(disk: Disk, old: Path, new: Path) -> None:
        if new.name != "checkpoint-2":
            return
        seen.append(new)
        for path in (old, *old.iterdir(), new.parent / METRICS):
            assert disk.holds(path), path
        assert disk.named(new.parent / METRICS)
        for folder in (output.parent, output.parent.parent, world.folder):  # else the run itself could be gone
            assert disk.holds(folder), folder

    Disk(monkeypatch, look)
    ended = world.train("new/folders/run", *WORDS)
    assert ended.code == 0, ended.err
    assert len(seen) == 1


def test_a_final_model_is_on_the_disk_before_it_counts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(disk: Disk, old: Path, new: Path) -> None:
        if new.name == ".files.whole.tmp":
            seen.append(new)
            for path in (old, *old.iterdir()):
                assert disk.holds(path), path

    Disk(monkeypatch, look)
    ended = world.train("final", *WORDS)
    assert ended.code == 0, ended.err
    assert len(seen) == 1


def test_a_record_is_on_the_disk_before_it_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(disk: Disk, old: Path, new: Path) -> None:
        seen.append(new)
        assert disk.holds(old)

    Disk(monkeypatch, look)
    write_text(tmp_path / "plan.json", "{}")
    assert seen == [tmp_path / "plan.json"]


@pytest.mark.parametrize("left", [".checkpoint-1.old.tmp", ".checkpoint-2.tmp", ".checkpoint-2.replaced.tmp"])
def test_what_a_killed_run_left_half_deleted_is_removed(left: str, world: World) -> None:
    ended = world.train(left, *WORDS, "checkpoint.save_every_steps=1")
    assert ended.code == 0, ended.err
    run = world.folder / left
    for path in (run / "model.safetensors", run / left / "part"):
        path.unlink() if path.exists() else path.parent.mkdir()
    (run / left / "part").write_text("x")
    ended = world.train(left, *WORDS, "checkpoint.save_every_steps=1", "--resume")
    assert ended.code == 0 and "Going on after step 2" in ended.out, ended.err
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
