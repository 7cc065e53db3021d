"""Which optimizer learns most from the same tokens: eval loss, time a step and state bytes of each, at its best rate.

    python bench/optimizers.py --output bench/results/optimizers.jsonl
    python bench/optimizers.py --output bench/results/optimizers.jsonl --table

Fine-tunes all weights of SmolLM2-135M on the sample data once for every variant, learning rate and seed
that `PLAN` lists. For one seed the examples, their order, the held-out examples and the schedule are the same;
another seed holds out others, so variants are compared seed by seed.
Each result is a line of the output, written when it is there; what the file holds already is not run again.
Times a step are medians within a run; where the machine does other things too, compare them with care.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

# What differs from the quickstart, by name. Rates are the peak rates of projected matrices.
VARIANTS: dict[str, tuple[str, ...]] = {
    "adamw": ("optimizer.type=adamw",),
    "galore": ("optimizer.type=galore",),
    "galore, fira": ("optimizer.galore.residual=fira",),
    "galore, no transport": ("optimizer.galore.moment_transport=false",),
    "galore, svd as published": (
        "optimizer.galore.subspace=svd",
        "optimizer.galore.moment_transport=false",
        "optimizer.galore.projection_bits=32",
    ),
    "galore, svd": ("optimizer.galore.subspace=svd",),
    "galore, randomized": ("optimizer.galore.subspace=randomized",),
    "galore, random": ("optimizer.galore.subspace=random",),
    "galore, int4 bases": ("optimizer.galore.projection_bits=4",),
    "galore, 8-bit state, bf16 weights": ("optimizer.state_bits=8", "model.store=bf16"),
    "galore, sophia": ("optimizer.galore.rule=sophia",),
    "galore, adafactor": ("optimizer.galore.rule=adafactor",),
    "galore, muon": ("optimizer.galore.rule=muon",),
    "galore, sgd": ("optimizer.galore.rule=sgd",),
    "sophia": ("optimizer.type=sophia",),
    "apollo": ("optimizer.type=apollo",),
    "apollo_mini": ("optimizer.type=apollo_mini",),
    "scale": ("optimizer.type=scale",),
}

# Variant, rates, seeds, in the order in which they are run.
PLAN: list[tuple[str, tuple[float, ...], tuple[int, ...]]] = [
    ("adamw", (2e-4, 4e-4, 1e-4), (0,)),
    ("galore", (1.6e-3, 3.2e-3, 0.8e-3), (0,)),
    ("galore, fira", (1.6e-3,), (0,)),
    ("adamw", (2e-4,), (1, 2)),
    ("galore", (1.6e-3,), (1, 2)),
    ("galore, 8-bit state, bf16 weights", (1.6e-3,), (0, 1, 2)),
    ("sophia", (2e-4,), (0,)),
    ("apollo", (2e-4,), (0,)),
    ("scale", (1e-2,), (0,)),
    ("galore, svd as published", (1.6e-3,), (0,)),
    ("galore, no transport", (1.6e-3,), (0,)),
    ("galore, svd", (1.6e-3,), (0,)),
    ("sophia", (5e-5,), (0,)),
    ("galore, sophia", (4e-4,), (0,)),
    ("galore, muon", (1.6e-3,), (0,)),
    ("apollo", (4e-4,), (0,)),
    ("scale", (3e-3,), (0,)),
    ("apollo_mini", (2e-4,), (0,)),
    ("galore, adafactor", (1.6e-3,), (0,)),
    ("sophia", (1e-4,), (0,)),
    ("galore, sgd", (4.0,), (0,)),
    ("galore, random", (1.6e-3,), (0,)),
    ("galore, randomized", (1.6e-3,), (0,)),
    ("galore, int4 bases", (1.6e-3,), (0,)),
    ("galore, fira", (0.8e-3, 3.2e-3), (0,)),
    ("galore, svd as published", (3.2e-3, 0.8e-3), (0,)),
    ("galore, sophia", (1.6e-3, 2e-4), (0,)),
    ("galore, muon", (3.2e-3, 0.8e-3), (0,)),
    ("galore, adafactor", (3.2e-3, 0.8e-3), (0,)),
    ("sophia", (4e-4,), (0,)),
    ("apollo", (1e-4,), (0,)),
    ("apollo_mini", (4e-4, 1e-4), (0,)),
    ("scale", (3e-2,), (0,)),
    ("galore, sgd", (1.0, 16.0), (0,)),
]


def settings(variant: str, rate: float, seed: int, arguments: argparse.Namespace) -> list[str]:
    """The run's overrides of the quickstart."""
    return [
        f"model.name={arguments.model}",
        *VARIANTS[variant],
        f"training.learning_rate={rate}",
        f"training.seed={seed}",
        f"training.max_steps={arguments.steps}",
        "training.warmup_steps=3",
        "training.batch_size=3",
        "training.gradient_accumulation_steps=2",
        f"training.max_length={arguments.max_length}",
        "training.sample_questions=[]",
        "training.device=cpu",
        f"data.max_eval_examples={arguments.eval_examples}",
        # So that the steps include what happens once a gap: a tenth of the quickstart's.
        "optimizer.galore.update_proj_gap=20",
        "optimizer.apollo.update_proj_gap=20",
    ]


def assemble(config: Any) -> tuple[Any, Any, Any]:
    """The live parts of a run: what was prepared, the engine, and the stepper."""
    from sophia_galore.engine.layerwise import LayerwiseEngine
    from sophia_galore.engine.stepper import Stepper
    from sophia_galore.optim.optimizer import ParamOptimizer
    from sophia_galore.train.callback import Callback
    from sophia_galore.train.prepare import prepare
    from sophia_galore.weights.files import load_store
    from sophia_galore.weights.plain import DTYPES

    prepared = prepare(config, Callback(), None)
    architecture, seed = prepared.architecture, config.training.seed
    store = load_store(
        prepared.folder,
        architecture.parameter_shapes(),
        tied_head="lm_head.weight" if architecture.tied else None,
        dtype=DTYPES[config.model.store],
        device=prepared.device,
    )
    optimizer = ParamOptimizer((route.spec for route in prepared.plan.routes), seed=seed, device=prepared.device)
    engine = LayerwiseEngine(
        architecture, store, compute_dtype=prepared.compute_dtype, device=prepared.device, seed=seed
    )
    plan = prepared.plan
    stepper = Stepper(
        engine,
        optimizer,
        store,
        clip_by=plan.clip_by,
        curvature_every=plan.curvature_every,
        max_grad_norm=config.training.max_grad_norm,
    )
    return prepared, engine, stepper


def run(variant: str, rate: float, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train once; the loop of the ordinary run without its records and checkpoints."""
    from sophia_galore.config import load_config
    from sophia_galore.data.feed import Feed
    from sophia_galore.data.portion import whole
    from sophia_galore.optim.schedule import schedule

    config = load_config(Path("configs/quickstart.yaml"), settings(variant, rate, seed, arguments))
    prepared, engine, stepper = assemble(config)
    plan = prepared.plan
    factor = schedule(config.training.lr_scheduler_type, warmup_steps=3, num_steps=plan.num_steps)
    pad_id = prepared.tokenizer.pad_token_id
    feed = Feed.of(config, prepared.dataset.train, pad_id)
    losses, seconds, tokens = [], [], 0
    for step in range(1, plan.num_steps + 1):
        batches = feed.step(step)
        started = time.perf_counter()
        found, _ = stepper.take(whole(batches), step=step, factor=factor(step))
        seconds.append(time.perf_counter() - started)
        losses.append(round(found.loss, 4))
        tokens += found.num_tokens
    summed, counted = engine.evaluate(Feed.of(config, prepared.dataset.eval, pad_id).longest_first())
    return {
        "variant": variant,
        "learning_rate": rate,
        "seed": seed,
        "eval_loss": summed / counted,
        "median_step_s": round(statistics.median(seconds), 3),
        "longest_step_s": round(max(seconds), 3),
        "state_bytes": plan.standing_bytes["optimizer state"] + plan.standing_bytes["projections"],
        "tokens": tokens,
        "train_losses": losses,
    }


def jobs() -> Iterator[tuple[str, float, int]]:
    """Everything that is to be run."""
    for variant, rates, seeds in PLAN:
        for seed in seeds:
            for rate in rates:
                yield variant, rate, seed


def table(results: list[dict[str, Any]]) -> str:
    """Each variant at the rate that was best with seed 0; times are those of its least disturbed run."""
    runs: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        runs[result["variant"]][result["learning_rate"]].append(result)
    rows = []
    for variant, by_rate in runs.items():
        zero = {rate: one["eval_loss"] for rate, some in by_rate.items() for one in some if one["seed"] == 0}
        best = min(zero, key=lambda rate: zero[rate])
        losses = [one["eval_loss"] for one in by_rate[best]]
        mean = f"{statistics.mean(losses):.4f}" if len(losses) > 1 else "-"
        fastest = min(one["median_step_s"] for some in by_rate.values() for one in some)
        tried = ", ".join(f"{rate:g}" for rate in sorted(by_rate))
        state_mb = by_rate[best][0]["state_bytes"] / 1e6
        cells = (variant, f"{best:g}", tried, f"{zero[best]:.4f}", mean, f"{fastest:.1f}", f"{state_mb:.0f}")
        rows.append((zero[best], "| " + " | ".join(cells) + " |"))
    lines = [
        "| variant | best rate | rates tried | eval loss, seed 0 | mean of 3 seeds | median step s | state MB |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [line for _, line in sorted(rows)])


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--eval-examples", type=int, default=48)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; appended to")
    parser.add_argument("--only", help="run only this variant")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and run nothing")
    arguments = parser.parse_args()
    lines = arguments.output.read_text(encoding="utf-8").splitlines() if arguments.output.exists() else []
    results = [json.loads(line) for line in lines]
    if arguments.table:
        print(table(results))
        return
    import torch

    done = {(result["variant"], result["learning_rate"], result["seed"]) for result in results}
    about = {"date": date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__}
    about |= {"steps": arguments.steps, "max_length": arguments.max_length, "eval_examples": arguments.eval_examples}
    for variant, rate, seed in jobs():
        if (variant, rate, seed) in done or arguments.only not in (None, variant):
            continue
        result = run(variant, rate, seed, arguments)
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**result, **about}) + "\n")
        print(f"{variant}, rate {rate:g}, seed {seed}: {result['eval_loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()
