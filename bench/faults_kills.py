"""Kills: a run dies by SIGKILL at random moments, is resumed, dies again; it ends with the bits of one that did not."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

from faults_child import Child, Hangs, command, start
from faults_world import Found, World, last_words, said_in, settings, torn_checkpoints, traceback_in
from sophia_galore.train.checkpoint import checkpoints

MOST_KILLS = 6
# The survivor of a killed process is to end within this time.
_SURVIVAL_S = 60.0
# The first process says it once all are there.
_HAVE_MET = "Format of the training records"


def one(world: World, number: int, draw: random.Random) -> Found:
    """Kill a run up to six times, and take it to its end."""
    every = settings()
    setting = every[number % len(every)]
    whole = world.undisturbed(setting)
    found = Found({"setting": str(setting), "after_s": []})
    with world.place() as place:
        output, log = place / "run", place / "log"
        for _ in range(draw.randint(2, MOST_KILLS)):
            log.unlink(missing_ok=True)
            resumes = output.is_dir() and bool(checkpoints(output))
            children = start(command(world.words(output, *setting.words, resume=resumes)), log, setting.num_processes)
            after_s = draw.uniform(0, 1.1 * whole.seconds)
            if not _lasts(children, after_s):
                if any(child.wait() for child in children):
                    found.faults.append(f"failed before it was killed: {last_words(log)}")
                break
            found.case["after_s"].append(round(after_s, 3))
            _kill(children, draw, log, found)
            found.count("kills")
            if torn := torn_checkpoints(output):
                found.count("torn checkpoints", len(torn))
                found.faults += torn
        log.unlink(missing_ok=True)
        world.finish(setting, output, log, found)
    return found


def _lasts(children: list[Child], seconds: float) -> bool:
    """Return whether all processes still run after a time."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if any(child.poll() is not None for child in children):
            return False
        time.sleep(min(left, 0.01))
    return all(child.poll() is None for child in children)


def _kill(children: list[Child], draw: random.Random, log: Path, found: Found) -> None:
    """Kill all processes, or one of them; then the others end by themselves and say why."""
    victims = children if draw.random() < 0.5 else [draw.choice(children)]
    for child in victims:
        child.send(signal.SIGKILL)
    for child in victims:
        child.wait()
    for child in children:
        if child in victims:
            continue
        try:
            code = child.wait(_SURVIVAL_S)
        except Hangs:
            # Who waits for another process to come does so for distributed.timeout_minutes, and has said nothing yet;
            # torch has, of its attempts to connect.
            if _HAVE_MET in said_in(log):
                found.faults.append(f"the survivor of a killed process hangs: {last_words(log)}")
            else:
                found.count("waited for one that never came")
            continue
        if code not in (0, 1) or traceback_in(log):
            found.faults.append(f"the survivor of a killed process ended with {code}: {last_words(log)}")
