"""Long runs: several sides, rates and seeds; the rate chosen on a validation set, the figures from a test set.

    python bench/long_run.py --task answers --folder outputs/long --output answers.jsonl --minutes 120
    python bench/long_run.py --task answers --folder outputs/long --output answers.jsonl --table

Tasks: `answers` (questions on Python's standard library, SmolLM2-135M), `sums` (arithmetic in words, whose answers are
right or wrong), `text` (pre-training of a Llama of 8 to 12 M parameters on the library's source). For each side all
rates are tried with the first seed, over a third of the steps and a whole schedule; the one with the lowest validation
loss is run with each seed. A line is written when a run is done; what the file holds is not run again, and a run that
was ended goes on from its last checkpoint, so that the same command can be given again and again until everything is
there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from held_out import eval_loss, held_out_batches
from long_tasks import TASKS, exact_match
from measured import provenance, read_lines, reason
from peers_sides import SIDES, Work, run_config
from quiet import cpu_times, is_disturbed, quietness
from sophia_galore.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
_KEPT = "training.gradient_checkpointing=false"


@dataclass(frozen=True)
class Contender:
    """A side of the study.

    Args:
        side: Its name among the sides of `peers_sides.py`.
        rates: Peak rates that are tried, by task; others take those of `answers`.
        words: Settings beside those of the side.
        rate_of: The contender whose best rate is taken, instead of rates of its own: to see what one setting changes.
    """

    side: str
    rates: dict[str, tuple[float, ...]]
    words: tuple[str, ...] = ()
    rate_of: str = ""


_ADAMW = {"answers": (1e-4, 2e-4, 4e-4), "text": (5e-4, 1e-3, 2e-3)}
_GALORE = {"answers": (8e-4, 1.6e-3, 3.2e-3), "text": (1e-2, 2e-2, 4e-2)}
_FIRA = {"answers": (4e-4, 8e-4, 1.6e-3), "text": _GALORE["text"]}
CONTENDERS: dict[str, Contender] = {
    "adamw": Contender("ours-adamw", _ADAMW, (_KEPT,)),
    "galore": Contender("ours-galore", _GALORE, (_KEPT,)),
    "galore-int8": Contender("ours-galore-int8", {}, (_KEPT,), rate_of="galore"),
    "fira": Contender("ours-galore", _FIRA, (_KEPT, "optimizer.galore.residual=fira")),
    "galore-muon": Contender("ours-galore", _GALORE, (_KEPT, "optimizer.galore.rule=muon")),
    "lora-16": Contender("lora-16", {"answers": SIDES["lora-16"].rates}),
    "lora-64": Contender("lora-64", {"answers": SIDES["lora-64"].rates}),
}


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        contender: A key of `CONTENDERS`.
        rate: Peak rate.
        seed: Of everything random.
        steps: Optimizer steps.
    """

    contender: str
    rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.contender}-{self.rate:g}-{self.seed}-{self.steps}"


@dataclass(frozen=True)
class Design:
    """Which runs make a study.

    Args:
        task: A key of `TASKS`.
        names: The contenders, in order.
        seeds: The first one chooses the rate.
        steps: Of the runs that are reported.
        rate_steps: Of those that choose the rate.
    """

    task: str
    names: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    rate_steps: int


def next_job(lines: Sequence[dict[str, Any]], design: Design) -> Job | None:
    """Return what is to be run next; None: everything is there.

    Args:
        lines: What is known.
        design: What is asked for.
    """
    known = {(line["contender"], line["rate"], line["seed"], line["steps"]) for line in lines}
    for name in design.names:
        for rate in _rates(name, design.task):
            job = Job(name, rate, design.seeds[0], design.rate_steps)
            if (job.contender, job.rate, job.seed, job.steps) not in known:
                return job
    for seed in design.seeds:
        for name in design.names:
            chosen = best_rate(lines, name, design.rate_steps)
            if chosen is not None and (name, chosen, seed, design.steps) not in known:
                return Job(name, chosen, seed, design.steps)
    return None


def _rates(name: str, task: str) -> tuple[float, ...]:
    contender = CONTENDERS[name]
    return () if contender.rate_of else contender.rates.get(task, contender.rates["answers"])


def best_rate(lines: Sequence[dict[str, Any]], name: str, rate_steps: int) -> float | None:
    """Return the rate with the lowest validation loss; None: no run that chooses it succeeded."""
    own = CONTENDERS[name].rate_of or name
    tried = [line for line in lines if line["contender"] == own and line["steps"] == rate_steps]
    tried = [line for line in tried if "failed" not in line]
    return min(tried, key=lambda line: float(line["validation_loss"]))["rate"] if tried else None


def config_of(job: Job, asked: argparse.Namespace, folder: Path, measured: str = "validation") -> RunConfig:
    """Return the configuration of a run, with a part of the data to measure on."""
    contender, task = CONTENDERS[job.contender], TASKS[asked.task]
    data = folder / "data"
    work = Work(
        model=str(asked.model),
        data=str(task.file(data, "train")),
        steps=job.steps,
        batch_size=asked.batch_size,
        accumulation=asked.accumulation,
        max_length=task.length,
        eval_examples=asked.eval_examples,
        seed=job.seed,
    )
    words = [
        *contender.words,
        f"data.eval={task.file(data, measured)}",
        f"data.max_eval_examples={asked.eval_examples}",
        f"training.warmup_steps={max(1, job.steps // 20)}",
        "checkpoint.keep_last=1",
    ]
    if task.pretrains:
        words += [f"optimizer.galore.rank={asked.rank}", "model.init=random"]
        words += ["training.weight_decay=0.1", "training.max_grad_norm=1.0"]
    output, save_every = folder / job.name, asked.save_every
    return run_config(
        SIDES[contender.side], work, rate=job.rate, output=output, save_every=save_every, words=tuple(words)
    )


def carry_out(job: Job, asked: argparse.Namespace) -> dict[str, Any]:
    """Train, and measure on validation and test; a run that was ended goes on."""
    from transformers.trainer_utils import get_last_checkpoint

    from hf_trainer import run_trainer
    from ours import run_ours

    task, folder = TASKS[asked.task], asked.folder / asked.task
    config = config_of(job, asked, folder)
    run = Path(config.run_folder)
    # Of both kinds of runs: the Trainer's checkpoints are named as ours are.
    newest = get_last_checkpoint(str(run)) if run.is_dir() else None
    side = SIDES[CONTENDERS[job.contender].side]
    resume = Path(newest) if newest else None
    if side.is_ours:
        measured = run_ours(config, resume_from=resume)
    else:
        measured = run_trainer(config, side.trainer_options, resume_from=resume)
    timed = measured.steps[1:] or measured.steps  # of the steps since the run was resumed
    tokens, seconds = sum(tokens for tokens, _ in timed), sum(seconds for _, seconds in timed)
    found: dict[str, Any] = {
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "peak_process_bytes": measured.peak_process_bytes,
    }
    for part in ("validation", "test"):
        found[f"{part}_loss"] = eval_loss(run, held_out_batches(config_of(job, asked, folder, part)))
    if task.exact:
        lines = task.file(folder / "data", "test").read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line) for line in lines[: asked.questions]]
        found |= {"exact_match": exact_match(run, asked.model, questions), "questions": len(questions)}
    return found


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the figures as Markdown: means over the seeds of the best rate, with their standard errors."""
    rows = [
        "| side | rates tried | best | seeds | validation | test loss | exact match | tokens/s | peak resident MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    succeeded = [line for line in lines if "failed" not in line]
    rate_steps, steps = (choose(line["steps"] for line in succeeded) for choose in (min, max)) if succeeded else (0, 0)
    for name, contender in CONTENDERS.items():
        best = best_rate(succeeded, name, rate_steps)
        chosen = [line for line in succeeded if _key(line) == (name, best, steps)]
        if not chosen:
            continue
        tried = {line["rate"] for line in lines if _key(line)[::2] == (contender.rate_of or name, rate_steps)}
        speeds = [line["tokens_per_second"] for line in chosen if not is_disturbed(line)]
        cells = [
            name,
            ", ".join(f"{rate:g}" for rate in sorted(tried)),
            f"{best:g}",
            str(len(chosen)),
            _spread([line["validation_loss"] for line in chosen]),
            _spread([line["test_loss"] for line in chosen]),
            _spread([line["exact_match"] for line in chosen]) if "exact_match" in chosen[0] else "",
            f"{statistics.median(speeds):.0f}" if speeds else "disturbed",
            f"{statistics.median(line['peak_process_bytes'] for line in chosen) / 2**20:.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _key(line: dict[str, Any]) -> tuple[str, float, int]:
    return line["contender"], line["rate"], line["steps"]


def _spread(values: Sequence[float]) -> str:
    """Return the mean with the standard error of it."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def prepare(asked: argparse.Namespace) -> None:
    """Write data and, for pre-training, the new model's folder; what is there stays."""
    task, folder = TASKS[asked.task], asked.folder / asked.task
    data = folder / "data"
    if not task.file(data, "test").exists():
        data.mkdir(parents=True, exist_ok=True)
        task.write(data)
    if task.pretrains:
        asked.model = folder / "model"
        if not asked.model.exists():
            words = [str(task.file(data, "train")), str(asked.model), "--vocab-size", str(asked.vocab_size)]
            words += ["--hidden-size", str(asked.width), "--layers", str(asked.layers)]
            subprocess.run([sys.executable, str(ROOT / "examples" / "new_model.py"), *words], check=True)
        return
    from sophia_galore.config.schema import ModelConfig
    from sophia_galore.model.source import resolve_model

    asked.model = resolve_model(ModelConfig(name=str(asked.model)), print).folder.resolve()


def main() -> None:
    """Run what is missing as long as time is left, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="data and runs; kept between calls")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--table", action="store_true", help="print what the output holds, and run nothing")
    parser.add_argument("--minutes", type=float, default=60, help="no run is begun after that")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate-steps", type=int, help="of the runs that choose a rate; by default a third of --steps")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--eval-examples", type=int, default=192)
    parser.add_argument("--questions", type=int, default=200, help="answered questions, for tasks with exact answers")
    parser.add_argument("--model", type=Path, default=Path("smollm2-135m"))
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the new model, as the next three")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=96, help="of GaLore in pre-training; 96 takes 0.3 of AdamW's state")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.table:
        print(table(read_lines(asked.output)))
        return
    prepare(asked)
    if asked.job:
        name, rate, seed, steps = asked.job
        try:
            result = carry_out(Job(name, float(rate), int(seed), int(steps)), asked)
        except Exception as error:
            result = {"failed": reason(error)}
        (asked.folder / asked.task / "result.json").write_text(json.dumps(result), encoding="utf-8")
        return
    names = asked.contenders or [n for n in CONTENDERS if not (TASKS[asked.task].pretrains and n.startswith("lora"))]
    rate_steps = asked.rate_steps or max(1, asked.steps // 3)
    design = Design(asked.task, tuple(names), tuple(asked.seeds), asked.steps, rate_steps)
    end = time.monotonic() + 60 * asked.minutes
    while time.monotonic() < end:
        job = next_job(read_lines(asked.output), design)
        if job is None:
            print(table(read_lines(asked.output)))
            return
        result = asked.folder / asked.task / "result.json"
        result.unlink(missing_ok=True)
        words, begun = ["--job", job.contender, *map(str, (job.rate, job.seed, job.steps))], cpu_times()
        subprocess.run([sys.executable, __file__, *sys.argv[1:], *words], check=False)
        if not result.exists():
            raise SystemExit(f"{job.name} was ended; the same command goes on from its last checkpoint.")
        line = {
            **{"contender": job.contender, "rate": job.rate, "seed": job.seed, "steps": job.steps},
            **json.loads(result.read_text(encoding="utf-8")),
            **quietness(begun),
            **provenance(),
            "command": " ".join(sys.argv),
        }
        with asked.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = {k: line[k] for k in ("failed", "validation_loss", "test_loss", "exact_match") if k in line}
        print(f"{job.name}: {shown}", flush=True)


if __name__ == "__main__":
    main()
