"""Power: it fails at any moment of a run; what the disk may hold then is enough to go on, to the same bits."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

from faults_child import command, start
from faults_disk_model import Mark, Recorder, Recording, write_state
from faults_world import FEW, SAVED_EVERY, Found, Setting, World, last_words, torn_checkpoints, traceback_in
from sophia_galore.train import checkpoint, output
from sophia_galore.train.checkpoint import checkpoints

_FINISHED = -1


def one(world: World, number: int, draw: random.Random) -> Found:
    """Let the power fail once, and go on."""
    setting = FEW[number % len(FEW)]
    recording = _recorded(world, setting)
    upto, ordered = draw.randint(1, len(recording.events)), draw.random() < 0.5
    found = Found({"setting": str(setting), "before": upto, "of": len(recording.events), "ordered": ordered})
    promised = [event.number for event in recording.events[:upto] if isinstance(event, Mark)]
    with world.place() as place:
        write_state(recording, upto, place, draw, ordered=ordered)
        output, log = place / "run", world.folder / "power.log"
        log.unlink(missing_ok=True)
        there = [int(path.name.partition("-")[2]) for path in checkpoints(output)] if output.is_dir() else []
        steps = [step for step in promised if step != _FINISHED]
        least = steps[-1] if steps else 0
        newest = there[-1] if there else 0
        found.count("went on from the last checkpoint" if newest >= least else "went on from the one before")
        if newest < least - SAVED_EVERY:
            found.faults.append(f"checkpoint-{least} was saved, but only {there} are there")
        if there and (torn := [said for said in torn_checkpoints(output) if f"checkpoint-{there[-1]} " in said]):
            found.count("torn checkpoints")
            found.faults += torn
        if promised[-1:] == [_FINISHED]:
            found.count("failed after the end")
        world.finish(setting, output, log, found)
        if traceback_in(log):
            found.faults.append(f"a traceback: {last_words(log)}")
    return found


def _recorded(world: World, setting: Setting) -> Recording:
    """Return the recording of an undisturbed run; it is made once."""
    if ("power", setting) not in world.kept:
        with world.place() as place:
            kept, log = world.folder / "recording", world.folder / "recording.log"
            [child] = start(lambda: _record(world, setting, place, kept), log)
            if child.wait(600) != 0:
                raise RuntimeError(last_words(log))
            world.kept["power", setting] = pickle.loads(kept.read_bytes())
    made: Recording = world.kept["power", setting]
    return made


def _record(world: World, setting: Setting, place: Path, kept: Path) -> int:
    save = checkpoint.save_checkpoint
    recorder = Recorder(place)

    def saved(run_folder: Path, step: int, **more: Any) -> Path:
        path: Path = save(run_folder, step, **more)
        recorder.mark("saved", step)
        return path

    setattr(output, "save_checkpoint", saved)  # noqa: B010 - it is imported there
    code = command(world.words(place / "run", *setting.words))()
    recorder.mark("finished", _FINISHED)
    recorder.save(kept)
    return code
