"""Disk: it is full at a random byte, or files may not grow; a run stops clearly, and goes on when there is room."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from faults_child import command, start
from faults_world import FEW, Found, World, last_words, torn_checkpoints, traceback_in

_PAGE = 4096
# As much as a run wants to see before it begins.
_DISK_BYTES = 400 * 2**20


def one(world: World, number: int, draw: random.Random) -> Found:
    """Let a run meet the end of a disk, then let it have room."""
    setting = FEW[number % len(FEW)]
    whole = world.undisturbed(setting)
    taken = sum(path.stat().st_size for path in whole.folder.rglob("*") if path.is_file())
    way = draw.choice(("disk", "file size")) if _mounts() else "file size"
    most = draw.randint(0, int(1.3 * taken) // _PAGE) * _PAGE if way == "disk" else draw.randint(1, 60_000)
    after_s = draw.uniform(0, 0.9 * whole.seconds)
    found = Found({"setting": str(setting), "way": way, "bytes": most})
    log = world.folder / "disk.log"
    log.unlink(missing_ok=True)
    with world.place() as place, _disk(place / "disk", mounts=way == "disk") as disk:
        output, ballast = disk / "run", disk / "ballast"
        words = command(world.words(output, *setting.words))
        [child] = start(words if way == "disk" else lambda: _limited(most, words), log)
        if way == "disk":
            # Later, since a run looks at the free space before it begins.
            found.case["after_s"] = round(after_s, 3)
            time.sleep(after_s)
            _fill(ballast, leaving=most)
        code = child.wait()
        found.count(f"exit code {code}")
        if code not in (0, 2) or traceback_in(log):
            found.faults.append(f"exit code {code}: {last_words(log)}")
        elif code == 2 and "Error:" not in last_words(log, 100_000):
            found.faults.append(f"stopped without words: {last_words(log)}")
        if torn := torn_checkpoints(output) if output.is_dir() else []:
            found.count("torn checkpoints", len(torn))
            found.faults += torn
        ballast.unlink(missing_ok=True)
        world.finish(setting, output, log, found)
    return found


def _fill(ballast: Path, *, leaving: int) -> None:
    """Take the room of a disk, but for some bytes; others take some of it meanwhile."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while (free := shutil.disk_usage(ballast.parent).free - leaving) >= _PAGE:
            file.write(bytes(min(free, 1 << 20) // _PAGE * _PAGE))


def _limited(most: int, function: Callable[[], int]) -> int:
    # What is printed goes into a file too, which another process writes, so that it may be longer than that.
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        for stream in (1, 2):
            os.dup2(writer.stdin.fileno(), stream)
        writer.stdin.close()
        # A stream that was opened on a file wants to seek.
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        try:
            return function()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream in (1, 2):
                os.close(stream)


_can_mount: list[bool] = []


def _mounts() -> bool:
    """Return whether this user may mount a file system."""
    if not _can_mount:
        with tempfile.TemporaryDirectory() as folder:
            _can_mount.append(_mount(Path(folder), _PAGE * 16))
            if _can_mount[0]:
                _unmount(Path(folder))
    return _can_mount[0]


@contextmanager
def _disk(place: Path, *, mounts: bool) -> Iterator[Path]:
    """Lend a file system of its own, or an ordinary folder."""
    place.mkdir()
    if mounts and not _mount(place, _DISK_BYTES):
        raise RuntimeError("a file system can't be mounted any more")
    try:
        yield place
    finally:
        if mounts:
            _unmount(place)


def _mount(place: Path, size: int) -> bool:
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    return shutil.which("mount") is not None and not subprocess.run(words, capture_output=True, check=False).returncode


def _unmount(place: Path) -> None:
    subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)
