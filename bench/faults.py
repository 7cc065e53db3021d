"""A campaign against faults: what can go wrong around a run goes wrong, as often as is asked for.

    python bench/faults.py kills --count 200 --seed 0 --output outputs/kills.jsonl
    python bench/faults.py all --minutes 10 --output outputs/faults.jsonl
    python bench/faults.py --table outputs/*.jsonl

Case N of a kind depends on the seed and on N alone. Each case adds a line to the output as soon as it is done, and
cases that the output has already are left out; so a campaign may be ended at any time and called again, and results
are merged by writing several outputs behind each other. The exit code is 1 if there were faults.

All runs are of a model of two tiny layers, and nothing is downloaded.
"""

from __future__ import annotations

import os

# Before torch is imported: copies of a process with threads hang.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import faults_clock
import faults_disk
import faults_inputs
import faults_kills
import faults_memory
import faults_mutations
import faults_power
from faults_child import Hangs, without_pictures
from faults_world import Found, World
from measured import provenance, reason

KINDS: dict[str, Callable[[World, int, random.Random], Found]] = {
    "kills": faults_kills.one,
    "power": faults_power.one,
    "mutations": faults_mutations.one,
    "inputs": faults_inputs.one,
    "disk": faults_disk.one,
    "memory": faults_memory.one,
    "clock": faults_clock.one,
}


def campaign(
    kinds: Sequence[str], output: Path, *, count: int, minutes: float, seed: int, first: int = 0, beside: bool = False
) -> list[dict[str, Any]]:
    """Carry out cases of some kinds, and write each into a file.

    Args:
        kinds: Names in `KINDS`.
        output: The file; lines are added to it.
        count: Cases of each kind; 0: as many as there is time for.
        minutes: Time for each kind; 0: no limit.
        seed: Of all that is drawn.
        first: Number of the first case.
        beside: Whether checkpoints are completed beside the steps however small they are.

    Returns:
        The lines of this campaign's cases, those of earlier calls too.
    """
    import torch
    import transformers

    from sophia_galore.train import checkpoint

    if beside:
        checkpoint._AT_ONCE_BYTES = 0  # the runs are copies of this process
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    without_pictures()
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for line in read([output]) if line.get("seed") == seed and line.get("kind") in kinds]
    done = {(line["kind"], line["number"]) for line in lines}
    command = " ".join(["python", *sys.argv])
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, output.open("a", encoding="utf-8") as file:
        _write(file, {"provenance": provenance() | {"command": command, "python": sys.version.split()[0]}})
        world = World(Path(folder))
        for kind in kinds:
            began, number = time.monotonic(), first
            while (not count or number < first + count) and (not minutes or time.monotonic() - began < minutes * 60):
                if (kind, number) not in done:
                    line = _case(world, kind, number, seed)
                    _write(file, line)
                    lines.append(line)
                    if line["faults"]:
                        print(f"{kind} {number}: {line['case']}: {'; '.join(line['faults'])}", flush=True)
                number += 1
    return lines


def _case(world: World, kind: str, number: int, seed: int) -> dict[str, Any]:
    began = time.monotonic()
    try:
        found = KINDS[kind](world, number, random.Random(f"{seed} {kind} {number}"))
    except Hangs as error:
        found = Found(faults=[str(error)])
    except Exception as error:  # one case that fails must not end a campaign of hours
        found = Found(faults=[f"the campaign itself: {reason(error)}"])
    return {
        "kind": kind,
        "number": number,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 2),
        "case": found.case,
        "counts": found.counts,
        "faults": found.faults,
    }


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the lines of outputs; one that a kill cut off is left out."""
    lines = []
    for path in paths:
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def table(lines: Iterable[dict[str, Any]]) -> str:
    """Return a table of kinds in Markdown: cases, counts, minutes, faults."""
    cases = {(line["kind"], line["seed"], line["number"]): line for line in lines if "kind" in line}
    rows = ["| kind | cases | counts | minutes | cases with faults |", "|---|---|---|---|---|"]
    for kind in KINDS:
        own = [line for line in cases.values() if line["kind"] == kind]
        if not own:
            continue
        counts = sum((Counter(line["counts"]) for line in own), Counter())
        words = ", ".join(f"{name}: {number:,}" for name, number in sorted(counts.items()))
        seconds, faulty = sum(line["seconds"] for line in own), sum(bool(line["faults"]) for line in own)
        rows.append(f"| {kind} | {len(own):,} | {words} | {seconds / 60:.1f} | {faulty} |")
    return "\n".join(rows)


def _write(file: Any, line: dict[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


def main() -> int:
    """Carry out a campaign, or show what earlier ones found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"all, or some of: {', '.join(KINDS)}")
    parser.add_argument("--count", type=int, default=0, help="cases of each kind")
    parser.add_argument("--minutes", type=float, default=0, help="time for each kind; 0: no limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument(
        "--beside", action="store_true", help="for kills: complete checkpoints beside the steps, however small they are"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/faults.jsonl"), help="takes a line for each case")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="only show a table of earlier outputs")
    asked = parser.parse_args()
    if asked.table:
        print(table(read(asked.table)))
        return 0
    kinds = list(KINDS) if asked.kinds == ["all"] else asked.kinds
    if not kinds or set(kinds) - set(KINDS):
        parser.error(f"name kinds of faults: all, or some of {', '.join(KINDS)}")
    if not asked.count and not asked.minutes:
        parser.error("say how many cases (--count) or how long (--minutes)")
    if asked.beside and kinds != ["kills"]:
        parser.error("--beside is for kills: other kinds record or count what is done in the order of a single thread")
    sizes = {"count": asked.count, "minutes": asked.minutes, "seed": asked.seed, "first": asked.first}
    lines = campaign(kinds, asked.output, **sizes, beside=asked.beside)
    print(table(lines))
    return 1 if any(line["faults"] for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
