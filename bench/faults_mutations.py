"""Mutations: the files of a checkpoint change on the disk; a run refuses them in words, or they change nothing."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults_child import command, start
from faults_world import FEW, Found, Setting, World, last_words, losses_of, traceback_in
from measured import weights_sha256
from sophia_galore.records import files
from sophia_galore.train import run as running
from sophia_galore.train.checkpoint import checkpoints

_DIES_IN = 6
# Small files in which each bit counts; and files of the run that are read when it goes on.
_SMALL = (files.MANIFEST, files.FLAT_CONFIG, files.TRAINER_STATE, files.PLAN)
_BESIDE = (files.METRICS, files.TRAINER_STATE, files.CONFIG, files.PLAN, files.ENVIRONMENT, files.MEMORY_REPORT)


def _cut(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(max(1, len(content)))])


def _flip_bit(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _change_bytes(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 8) if content else 0):
        content[draw.randrange(len(content))] = draw.randrange(256)
    path.write_bytes(content)


def _zero(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start, size = draw.randrange(max(1, len(content))), draw.choice((1, 64, 512, 4096, len(content)))
    content[start : start + size] = bytes(len(content[start : start + size]))
    path.write_bytes(content)


def _append(path: Path, draw: random.Random) -> None:
    with path.open("ab") as file:
        file.write(draw.choice((b"\n", b"\0", b"}", draw.randbytes(draw.randint(1, 600)))))


def _change_digit(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if places := [place for place, byte in enumerate(content) if chr(byte).isdigit()]:
        content[draw.choice(places)] = ord(str(draw.randrange(10)))
    path.write_bytes(content)


def _remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def _remove_lines(path: Path, draw: random.Random) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    start = draw.randrange(max(1, len(lines)))
    del lines[start : start + draw.randint(1, 3)]
    path.write_bytes(b"".join(lines))


def _swap(path: Path, draw: random.Random) -> None:
    files_there = (each for each in path.parent.iterdir() if each.is_file() and each.name != files.METRICS)
    other = draw.choice(sorted(files_there))
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)


def _of_another(path: Path, draw: random.Random) -> None:
    """Take the file of the same name from the checkpoint before."""
    others = [folder for folder in path.parents[1].glob("checkpoint-*") if folder != path.parent]
    if others and (others[0] / path.name).is_file():
        shutil.copyfile(others[0] / path.name, path)


def _be_a_folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "cut": _cut,
    "bit": _flip_bit,
    "bytes": _change_bytes,
    "zeros": _zero,
    "appended": _append,
    "digit": _change_digit,
    "lines removed": _remove_lines,
    "removed": _remove,
    "swapped": _swap,
    "of another checkpoint": _of_another,
    "a folder": _be_a_folder,
}


def one(world: World, number: int, draw: random.Random) -> Found:
    """Change a file of the newest checkpoint, or of the run, and resume."""
    setting = FEW[number % len(FEW)]
    begun = _begun(world, setting)
    whole = world.undisturbed(setting)
    with world.place() as place:
        output, log = place / "run", place / "log"
        shutil.copytree(begun, output)
        saved = checkpoints(output)[-1]
        kind = draw.random()
        if kind < 0.3:  # one bit of a small file
            path, name = saved / draw.choice(_SMALL), "bit"
        elif kind < 0.5:
            there = [output / each for each in _BESIDE if (output / each).is_file()]
            path, name = draw.choice(there), draw.choice(list(MUTATIONS))
        else:
            path = draw.choice(sorted(each for each in saved.iterdir() if each.is_file()))
            name = draw.choice(list(MUTATIONS))
        before = _contents(output)
        MUTATIONS[name](path, draw)
        file = str(path.relative_to(output))
        found = Found({"setting": str(setting), "file": file, "mutation": name, "changed": _contents(output) != before})
        [child] = start(command(world.words(output, *setting.words, resume=True)), log)
        code = child.wait()
        if traceback_in(log) or code not in (0, 2):
            found.faults.append(f"{name} of {file}: exit code {code}: {last_words(log)}")
        elif code == 2:
            found.count("refused")
            if "Error:" not in log.read_text(encoding="utf-8", errors="replace"):
                found.faults.append(f"{name} of {file}: refused without words")
        elif weights_sha256(output) == whole.sha256:
            found.count("harmless")
            if losses_of(output) != whole.losses and path.name != files.METRICS:
                found.faults.append(f"{name} of {file}: accepted; metrics.jsonl is another one")
        else:
            found.count("silently accepted")
            found.faults.append(f"{name} of {file}: silently accepted, and the final weights are others")
    return found


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _begun(world: World, setting: Setting) -> Path:
    """Return the folder of a run that died with two checkpoints, in the step before its end."""
    if ("mutations", setting) not in world.kept:
        place = world.folder / f"begun-{FEW.index(setting)}"
        place.mkdir()
        [child] = start(lambda: _die(world, setting, place / "run"), place / "log")
        if child.wait() != -signal.SIGKILL or len(checkpoints(place / "run")) != 2:
            raise RuntimeError(last_words(place / "log"))
        world.kept["mutations", setting] = place / "run"
    made: Path = world.kept["mutations", setting]
    return made


def _die(world: World, setting: Setting, output: Path) -> int:
    step = running._Run._step

    def deadly(self: running._Run, number: int) -> dict[str, Any]:
        if number == _DIES_IN:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number)

    running._Run._step = deadly  # type: ignore[assignment,method-assign]
    return command(world.words(output, *setting.words))()
