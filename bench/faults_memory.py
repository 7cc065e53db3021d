"""Memory: that of the host runs out at any point of a run; cause, remedy and exit code are said, nothing is lost."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from faults_child import LIMIT_S, command, start
from faults_world import FEW, Found, World, last_words, torn_checkpoints, traceback_in

# As powers of two: what a tiny run takes beyond what is imported, from nothing to all of it.
_LEAST, _MOST = 14.0, 25.5
# What a new interpreter takes with all of its imports.
_WHOLE_BYTES = 4 * 2**30
_SIGNALS = (-6, -11, -7)


def one(world: World, number: int, draw: random.Random) -> Found:
    """Limit the address space of one run, copied or begun as a new interpreter; then take the limit off."""
    setting = FEW[number % len(FEW)]
    world.undisturbed(setting)
    is_new = number // len(FEW) % 4 == 3
    most = draw.randrange(2**26, _WHOLE_BYTES) if is_new else int(2 ** draw.uniform(_LEAST, _MOST))
    found = Found({"setting": str(setting), "new interpreter": is_new, "bytes": most})
    with world.place() as place:
        output, log = place / "run", place / "log"
        words = world.words(output, *setting.words)
        code = _in_new(words, most, log) if is_new else _in_copy(words, most, log)
        said = last_words(log, 100_000)
        found.count(f"exit code {code}")
        if code in _SIGNALS:
            # A library in C or Rust that gives up; the process can't say anything any more.
            found.count("ended by a library")
            found.case["said"] = last_words(log)
        elif code not in (0, 1, 2) or traceback_in(log):
            found.faults.append(f"exit code {code}: {last_words(log)}")
        elif code and "memory" not in said.lower():
            found.faults.append(f"does not say that memory ran out: {last_words(log)}")
        found.faults += torn_checkpoints(output) if output.is_dir() else []
        log.unlink(missing_ok=True)
        world.finish(setting, output, log, found)
    return found


def _in_copy(words: Sequence[str], more: int, log: Path) -> int:
    run = command(words)

    def limited() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
        return run()

    [child] = start(limited, log)
    return child.wait()


def _in_new(words: Sequence[str], most: int, log: Path) -> int:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-m", "sophia_galore", *words],
            stdout=file,
            stderr=file,
            preexec_fn=limit,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=LIMIT_S,
            check=False,
        )
    return done.returncode
