"""What settings that save memory cost in time: tokens a second of the same run with each of them, side by side.

    python bench/tradeoffs.py --output tradeoffs.json

Fine-tunes SmolLM2-135M on the sample data by the ordinary command, a few steps for each variant, one variant after the
other and all of them again, several times over. Shown are medians over the steps of all turns but each run's first, as
ratios to the first variant, with the lowest and the highest ratio of a turn. `memory/ladder.py` holds the factors that
follow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

VARIANTS: dict[str, tuple[str, ...]] = {
    "as is": (),
    "graphs of all layers kept": ("training.gradient_checkpointing=false",),
    "half of them": ("engine.keep_layers=15",),
    "half the micro-batch": ("training.batch_size=2", "training.gradient_accumulation_steps=4"),
    "tiles of 16 MiB": ("memory.logits_chunk_mib=16",),
    "tiles of 4 MiB": ("memory.logits_chunk_mib=4",),
    "full gradients apart": ("engine.full_gradients=matrix",),
    "clipped": ("training.max_grad_norm=1",),
    "clipped, full gradients apart": ("training.max_grad_norm=1", "engine.full_gradients=matrix"),
    "bf16 weights": ("model.store=bf16",),
    "int8 weights": ("quantization.enabled=true",),
    "16-bit state": ("optimizer.state_bits=16",),
    "8-bit state": ("optimizer.state_bits=8",),
    "4-bit bases": ("optimizer.galore.projection_bits=4",),
}


def speeds(variant: str, folder: Path, arguments: argparse.Namespace) -> list[float]:
    """Tokens a second of each step but the first."""
    settings = [
        f"model.name={arguments.model}",
        f"training.output_dir={folder}",
        f"training.max_steps={arguments.steps}",
        "training.warmup_steps=0",
        "training.max_length=256",
        "training.batch_size=4",
        "training.gradient_accumulation_steps=2",
        "training.probe_step=false",
        "training.sample_questions=[]",
        "training.device=cpu",
        "data.eval_fraction=0",
        "data.max_eval_examples=null",
        "training.eval_every_steps=0",
        "memory.predict=false",
        "memory.track_steps=0",
        "checkpoint.save_every_steps=0",
        *VARIANTS[variant],
    ]
    command = [sys.executable, "-m", "sophia_galore", "train", "--config", "configs/quickstart.yaml", *settings]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{variant}: {done.stderr}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][1:]


def main() -> None:
    """Run all variants, turn after turn, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the speeds of all steps")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args()
    found: dict[str, list[list[float]]] = {variant: [] for variant in arguments.variants}
    for _ in range(arguments.turns):
        for variant in arguments.variants:
            with tempfile.TemporaryDirectory() as work:
                found[variant].append(speeds(variant, Path(work) / "run", arguments))
            arguments.output.write_text(json.dumps({"cores": os.cpu_count(), "speeds": found}, indent=1))
    first = found[arguments.variants[0]]
    print("| variant | tokens a second, against the first | lowest and highest of a turn |\n|---|---|---|")
    for variant, turns in found.items():
        ratio = _median(turns) / _median(first)
        each = [statistics.median(turn) / statistics.median(base) for turn, base in zip(turns, first, strict=True)]
        print(f"| {variant} | {ratio:.3f} | {min(each):.3f} to {max(each):.3f} |")


def _median(turns: list[list[float]]) -> float:
    return statistics.median(speed for turn in turns for speed in turn)


if __name__ == "__main__":
    main()
