"""Ours beside the Hugging Face Trainer with the optimizers that it knows: speed, memory, loss, and whether it resumes.

    python bench/peers.py --output peers.jsonl
    python bench/peers.py --output peers.jsonl --table

All sides but those of LoRA train all weights of SmolLM2-135M. All work on the same micro-batches of the sample data,
in float32 arithmetic on the CPU, with the same threads, rate schedule and number of steps. Of each side is measured,
every time in a process of its own:

- tokens a second: the median over the steps but the first, in several turns; sides take turns one after the other, so
  that what else the machine does meets all of them. Beside it the same over all steps: a first step makes what later
  ones use, such as the singular vectors of all gradients.
  A turn beside which something else used the processor is marked, and left out of the table.
- peak resident size, until the last step is done. Where torchao is installed, transformers imports it on all sides.
- peak of live tensors, by our storage tracker over the first steps, which it slows down.
- loss on the held-out examples, of the model that it saved, by one and the same function. Where a side has several
  rates, each is tried and the best one counts.
- whether a run that is resumed from a checkpoint in a new process ends with the same bits as one that was not stopped.

The optimizers of others come with `pip install "sophia-galore[bench]"`. A side that can't run says why in its row.
Lines are appended when they are there, and what the file holds is not measured again: delete a line to have it anew.
On two cores all of it takes some two and a half hours, and at times 6 GB in the folder for temporary files.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from measured import read_lines
from peers_sides import BASE, ROOT, SIDES, Work
from peers_table import table
from quiet import cpu_times, quietness, warn_if_busy

_PACKAGES = ("torch", "transformers", "accelerate", "galore-torch", "apollo-torch", "torchao", "peft", "bitsandbytes")
KINDS = ("memory", "resume", "rates")
"""What is measured besides the times: the peak of live tensors, resuming, and the loss at rates but the first."""
# Only a side that hangs takes so long.
_LONGEST_S = 3600


@dataclass(frozen=True)
class Job:
    """One line of the output.

    Args:
        kind: What is measured: start (the loss before training), timing, memory or resume.
        side: Of which side.
        rate: At which peak rate.
        turn: In which turn, from 0; None: only for the loss.
    """

    kind: str
    side: str
    rate: float
    turn: int | None = None

    @property
    def evaluates(self) -> bool:
        """Whether the loss is measured: the same steps give it in every turn."""
        return self.kind == "timing" and not self.turn


def jobs(
    sides: Sequence[str], turns: int, rates: Mapping[str, Sequence[float]], kinds: Sequence[str] = KINDS
) -> Iterator[Job]:
    """Everything that is to be measured, in order.

    Args:
        sides: Names of sides.
        turns: How often each is timed.
        rates: Peak rates of each side; timed with the first one.
        kinds: What is measured besides; see `KINDS`.
    """
    yield Job("start", BASE, 0.0)
    for turn in range(turns):
        first = turn % len(sides)
        for side in (*sides[first:], *sides[:first]):
            yield Job("timing", side, rates[side][0], turn)
    for kind in ("memory", "resume"):
        for side in sides if kind in kinds else ():
            yield Job(kind, side, rates[side][0])
    for side in sides if "rates" in kinds else ():
        for rate in rates[side][1:]:
            yield Job("timing", side, rate)


def child(task: dict[str, Any], work: Work, threads: int | None) -> dict[str, Any]:
    """Carry out a task in a fresh process.

    Args:
        task: What `peers_child.py` is told.
        work: What all sides do.
        threads: Threads of the arithmetic; None: torch's own choice.

    Returns:
        What it wrote, or why it could not: {"failed": ...}.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "task.json", Path(folder) / "result.json"
        asked.write_text(json.dumps({**task, "work": vars(work)}), encoding="utf-8")
        command = [sys.executable, str(ROOT / "bench" / "peers_child.py"), str(asked), str(answered)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment, timeout=_LONGEST_S
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"It took more than {_LONGEST_S} s."}
        if answered.exists():
            result: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
            if "failed" in result:
                print(done.stderr[-4000:], file=sys.stderr)
            return result
        print(done.stderr[-4000:], file=sys.stderr)
        ended = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return {"failed": f"The process ended without a result: {ended}."}


class Bench:
    """Carries out jobs.

    Args:
        work: What all sides do.
        threads: Threads of the arithmetic.
        refusals: Why sides refused the common setting, as far as that is known.
    """

    def __init__(self, work: Work, threads: int | None, refusals: dict[str, str]) -> None:
        self._work, self._threads, self._refusals = work, threads, refusals

    def measure(self, job: Job) -> dict[str, Any]:
        """The line of a job, without what all lines have in common."""
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "run"
            if job.kind == "start":
                return self._child("evaluation", job, Path(self._work.model))
            if job.kind == "resume":
                return self._resume(job, output)
            result = self._attempt(job.kind, job, output)
            if job.evaluates and "failed" not in result:
                result = {**self._child("evaluation", job, output), **result}
            return result

    def _resume(self, job: Job, output: Path) -> dict[str, Any]:
        whole = self._attempt("saving", job, output)
        if "failed" in whole:
            return whole
        half = min(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        resumed = self._attempt("saving", job, output.with_name("resumed"), resume_from=str(half))
        line = {key: value for key, value in whole.items() if key != "sha256"}
        if "failed" in resumed:
            return {**line, "same_bits": False, "reason": resumed["failed"]}
        same = resumed["sha256"] == whole["sha256"]
        return {**line, "same_bits": same, **({} if same else {"reason": "it ends with other weights"})}

    def _attempt(self, name: str, job: Job, output: Path, **more: Any) -> dict[str, Any]:
        """A task, in the nearest setting that the side takes where it refuses the common one."""
        if job.side not in self._refusals:
            result = self._child(name, job, output, **more)
            if "failed" not in result or not SIDES[job.side].one_micro_batch:
                return result
            refusal = result["failed"]
        else:
            refusal = self._refusals[job.side]
        result = self._child(name, job, output, one_micro_batch=True, **more)
        if "failed" in result:
            return result
        self._refusals[job.side] = refusal
        return {**result, "instead_of": refusal}

    def _child(self, name: str, job: Job, output: Path, **more: Any) -> dict[str, Any]:
        task = {"task": name, "side": job.side, "rate": job.rate, "output": str(output), **more}
        return child(task, self._work, self._threads)


def versions() -> dict[str, str]:
    """Versions of Python and of what takes part; of what is not installed, that."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def about(work: Work) -> dict[str, Any]:
    """What every line says of its circumstances."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
        "versions": versions(),
        "commit": done.stdout.strip() or None,
        "command": "python " + " ".join(sys.argv),
        "work": work.shown(),
    }


def parse_rates(words: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Rates of all sides, with those that were given as SIDE=RATE,RATE instead of the default ones.

    Raises:
        ValueError: A word names no side, or something that is no positive number.
    """
    rates = {name: side.rates for name, side in SIDES.items()}
    for word in words:
        name, _, given = word.partition("=")
        if name not in SIDES:
            raise ValueError(f"--rates {word}: there is no side {name!r}; there are {', '.join(SIDES)}.")
        rates[name] = tuple(float(rate) for rate in given.split(","))
        if min(rates[name]) <= 0:
            raise ValueError(f"--rates {word}: a rate is above 0.")
    return rates


def main() -> None:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; appended to")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and run nothing")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="what is measured besides the times")
    parser.add_argument("--turns", type=int, default=3, help="how often each side is timed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rates", nargs="+", default=[], metavar="SIDE=RATE,...", help="the first is the one timed")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="data/sample_data.json")
    parser.add_argument("--batch-size", type=int, default=3)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--eval-examples", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="by default what torch takes")
    arguments = parser.parse_args()
    lines = read_lines(arguments.output)
    if arguments.table:
        print(table(lines) if lines else f"There is nothing in {arguments.output}.")
        return
    try:
        rates = parse_rates(arguments.rates)
    except ValueError as error:
        parser.error(str(error))
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: the first one is not timed.")
    from sophia_galore.config.schema import ModelConfig
    from sophia_galore.model.source import resolve_model

    same = ("steps", "batch_size", "accumulation", "max_length", "eval_examples", "seed")
    work = Work(
        # Here once, so that every process finds the same folder.
        model=str(resolve_model(ModelConfig(name=arguments.model), print).folder.resolve()),
        data=str(Path(arguments.data).resolve()),
        **{name: getattr(arguments, name) for name in same},
    )
    if any(line["work"] != work.shown() for line in lines):
        parser.error(f"{arguments.output} holds measurements of other work ({lines[0]['work']}): take another file.")
    # The first side always: it is what the others are compared with.
    sides = [name for name in SIDES if name in arguments.sides or name == BASE]
    known = {Job(line["kind"], line["side"], line["rate"], line["turn"]) for line in lines}
    bench = Bench(work, arguments.threads, {one["side"]: one["instead_of"] for one in lines if "instead_of" in one})
    circumstances = about(work)
    failed = {line["side"] for line in lines if line["kind"] == "timing" and "failed" in line and line["turn"] == 0}
    warn_if_busy()
    for job in jobs(sides, arguments.turns, rates, arguments.kinds):
        if job in known or job.side in failed:
            continue
        begun = cpu_times()
        line = {**vars(job), **bench.measure(job), **quietness(begun), **circumstances}
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if "failed" in line and job.kind == "timing" and job.turn == 0:
            failed.add(job.side)
        shown = {key: line[key] for key in ("failed", "eval_loss", "peak_tracked_bytes", "same_bits") if key in line}
        print(f"{job.kind}, {job.side}, rate {job.rate:g}, turn {job.turn}: {shown}", flush=True)


if __name__ == "__main__":
    main()
