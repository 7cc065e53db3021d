"""Clock: it jumps, the process stands still for a while, or a second run wants the same folder; no bit changes."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from faults_child import command, start
from faults_world import FEW, Found, Setting, World, last_words, torn_checkpoints, traceback_in

# Seconds: a summer time, a clock that was wrong by years, the beginning of 1970 and beyond.
_JUMPS = (-3600.0, 3600.0, -1e9, 1e9, -4e9, 1e-6, 86400.0)


def one(world: World, number: int, draw: random.Random) -> Found:
    """Disturb one run."""
    setting = (*FEW, Setting("device", "bf16", "galore", 2))[number % (len(FEW) + 1)]
    world.undisturbed(setting)
    return (_jump, _stop, _second)[number % 3](world, setting, draw)


def _jump(world: World, setting: Setting, draw: random.Random) -> Found:
    """The system's clock is set, again and again."""
    at, seed = draw.uniform(0.001, 0.2), draw.randrange(2**32)
    found = Found({"setting": str(setting), "way": "clock", "share": at, "seed": seed}, {"clocks": 1})
    with world.place() as place:
        output, log = place / "run", place / "log"
        run = command(world.words(output, *setting.words))
        codes = [child.wait() for child in start(lambda: _jumping(run, at, seed), log, setting.num_processes)]
        _judge(world, setting, found, codes, place)
    return found


def _jumping(run: Callable[[], int], share: float, seed: int) -> int:
    draw, offset = random.Random(seed), [0.0]
    now, now_ns = time.time, time.time_ns

    def jumped() -> float:
        if draw.random() < share:
            offset[0] = draw.choice(_JUMPS)
        return max(0.0, now() + offset[0])

    time.time = jumped
    time.time_ns = lambda: max(0, now_ns() + int(offset[0] * 1e9))
    return run()


def _stop(world: World, setting: Setting, draw: random.Random) -> Found:
    """The process is stopped and goes on, as a laptop that sleeps."""
    whole = world.undisturbed(setting)
    found = Found({"setting": str(setting), "way": "stopped", "at_s": []})
    with world.place() as place:
        output, log = place / "run", place / "log"
        children = start(command(world.words(output, *setting.words)), log, setting.num_processes)
        for _ in range(draw.randint(1, 3)):
            wait_s = draw.uniform(0, 0.5 * whole.seconds)
            time.sleep(wait_s)
            victim = draw.choice(children)
            victim.send(signal.SIGSTOP)
            time.sleep(draw.uniform(0.05, 0.6))
            victim.send(signal.SIGCONT)
            found.case["at_s"].append(round(wait_s, 3))
            found.count("stops")
        _judge(world, setting, found, [child.wait() for child in children], place)
    return found


def _second(world: World, setting: Setting, draw: random.Random) -> Found:
    """A second run into the same folder, anew or with --resume, is refused; the first one does not notice."""
    whole = world.undisturbed(setting)
    found = Found({"setting": str(setting), "way": "second run"})
    with world.place() as place:
        output, log, other = place / "run", place / "log", place / "other"
        first = start(command(world.words(output, *setting.words)), log, setting.num_processes)
        time.sleep(draw.uniform(0, whole.seconds))
        resume = draw.random() < 0.5
        [second] = start(command(world.words(output, *setting.words, "training.seed=3", resume=resume)), other)
        code = second.wait()
        codes = [child.wait() for child in first]
        found.case |= {"resume": resume, "exit code": code}
        if code == 0 or codes != [0] * len(first):
            # One of them was over before the other began, or began later: then the later one counts.
            found.count("one after the other")
            if code not in (0, 2) or any(each not in (0, 2) for each in codes) or (code and any(codes)):
                found.faults.append(f"exit codes {codes} and {code}: {last_words(log)} / {last_words(other)}")
        else:
            found.count("refused")
            if code != 2 or "Error:" not in last_words(other, 100_000):
                found.faults.append(f"the second run: {code}: {last_words(other)}")
            _judge(world, setting, found, codes, place)
        if traceback_in(log) or traceback_in(other):
            found.faults.append(f"a traceback: {last_words(log)} / {last_words(other)}")
        found.faults += torn_checkpoints(output) if output.is_dir() else []
    return found


def _judge(world: World, setting: Setting, found: Found, codes: list[int], place: Path) -> None:
    output, log = place / "run", place / "log"
    if any(codes) or traceback_in(log):
        found.faults.append(f"exit codes {codes}: {last_words(log)}")
    else:
        world.compare(setting, output, found)
